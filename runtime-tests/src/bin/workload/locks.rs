//! File locks: who holds them, and who is kept out.

use crate::kernel::{fails_with, open, sys};
use crate::stage::{Check, Fallible, Setup, Stage, fork, same, sleep_for_good};

pub const WORKLOADS: &[(&str, Setup)] =
    &[("lock-flock", flock), ("lock-posix", posix), ("lock-description", description)];

fn made(path: &str) -> Fallible<i32> {
    std::fs::write(path, "0123456789").map_err(|e| format!("{path}: {e}"))?;
    open(path, libc::O_RDWR)
}

fn range(kind: i32, start: i64, len: i64) -> libc::flock {
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    (lock.l_type, lock.l_start, lock.l_len) = (kind as i16, start, len);
    lock
}

/// Exclusive, shared, and one that a child has inherited.
fn flock(_: &mut Stage) -> Fallible<Check> {
    let (exclusive, shared) = (made("/exclusive")?, made("/shared-lock")?);
    sys!(flock(exclusive, libc::LOCK_EX))?;
    sys!(flock(shared, libc::LOCK_SH))?;
    fork(|| sleep_for_good())?;
    let others = [open("/exclusive", libc::O_RDWR)?, open("/shared-lock", libc::O_RDWR)?];
    let kept_out =
        |fd: i32, how: i32| fails_with("flock by another", libc::EWOULDBLOCK, sys!(flock(fd, how | libc::LOCK_NB)));
    Ok(Box::new(move || {
        kept_out(others[0], libc::LOCK_SH)?;
        kept_out(others[1], libc::LOCK_EX)?;
        sys!(flock(others[1], libc::LOCK_SH | libc::LOCK_NB))?;
        sys!(flock(others[1], libc::LOCK_UN))?;
        sys!(flock(shared, libc::LOCK_SH | libc::LOCK_NB)).map(drop)
    }))
}

/// Who holds the lock that keeps one from taking `wanted`, by the kernel's account; None: nobody.
fn holder(fd: i32, mut wanted: libc::flock, command: i32) -> Fallible<Option<(i32, i64, i64)>> {
    sys!(fcntl(fd, command, &raw mut wanted))?;
    Ok((wanted.l_type != libc::F_UNLCK as i16).then_some((wanted.l_pid, wanted.l_start, wanted.l_len)))
}

/// Ranges that another process holds for itself.
fn posix(stage: &mut Stage) -> Fallible<Check> {
    let fd = made("/posix")?;
    let ours = range(libc::F_WRLCK, 100, 0);
    sys!(fcntl(fd, libc::F_SETLK, &raw const ours))?;
    let member = stage.member("holder", |_| {
        let fd = open("/posix", libc::O_RDWR)?;
        for lock in [range(libc::F_WRLCK, 0, 5), range(libc::F_RDLCK, 10, 5)] {
            sys!(fcntl(fd, libc::F_SETLK, &raw const lock))?;
        }
        Ok(Box::new(move || {
            let (pid, start, len) = holder(fd, range(libc::F_RDLCK, 200, 1), libc::F_GETLK)?.ok_or("nobody")?;
            same("what the other holds", (1, 100, 0), (pid, start, len))
        }))
    })?;
    Ok(Box::new(move || {
        let look = |kind, start| holder(fd, range(kind, start, 1), libc::F_GETLK);
        same("first range", Some((member, 0, 5)), look(libc::F_RDLCK, 2)?)?;
        same("second range", Some((member, 10, 5)), look(libc::F_WRLCK, 12)?)?;
        same("second range, to read", None, look(libc::F_RDLCK, 12)?)?;
        same("between", None, look(libc::F_WRLCK, 7)?)
    }))
}

/// A lock of an open file description.
fn description(_: &mut Stage) -> Fallible<Check> {
    let fd = made("/description")?;
    let lock = range(libc::F_WRLCK, 3, 4);
    sys!(fcntl(fd, libc::F_OFD_SETLK, &raw const lock))?;
    let other = open("/description", libc::O_RDWR)?;
    Ok(Box::new(move || {
        same("holder", Some((-1, 3, 4)), holder(other, range(libc::F_RDLCK, 0, 0), libc::F_OFD_GETLK)?)?;
        same("to the holder", None, holder(fd, range(libc::F_WRLCK, 0, 0), libc::F_OFD_GETLK)?)
    }))
}
