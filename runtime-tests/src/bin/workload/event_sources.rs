//! eventfd, signalfd and timerfd.

use std::time::Duration;

use crate::kernel::{fails_with, raw, read, sys, write};
use crate::procfs;
use crate::stage::{Check, Fallible, Setup, Stage, eventually, holds, same};

pub const WORKLOADS: &[(&str, Setup)] =
    &[("eventfd", eventfd), ("signalfd", signalfd), ("timerfd", timerfd), ("timerfd-rings", timerfd_rings)];

fn eventfd(stage: &mut Stage) -> Fallible<Check> {
    let plain = sys!(eventfd(0xffff_0000, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC))? as i32;
    let semaphore = sys!(eventfd(3, libc::EFD_SEMAPHORE | libc::EFD_NONBLOCK))? as i32;
    let empty = sys!(eventfd(0, libc::EFD_NONBLOCK))? as i32;
    let full = sys!(eventfd(0, libc::EFD_NONBLOCK))? as i32;
    let most = u64::MAX - 1;
    write(full, &most.to_ne_bytes())?;
    let shared = sys!(eventfd(0, 0))? as i32;
    stage.member("child", move |_| {
        std::thread::spawn(move || {
            // Answers 5 with 500, whoever reads it.
            let back = move || -> Fallible {
                loop {
                    if u64::from_ne_bytes(read(shared, 8)?.try_into().map_err(|_| "eventfd")?) == 5 {
                        write(shared, &500u64.to_ne_bytes())?;
                        std::thread::sleep(Duration::from_millis(20));
                    }
                }
            };
            let _ = back();
        });
        Ok(Box::new(|| Ok(())))
    })?;
    let number = |fd: i32| read(fd, 8).map(|b| u64::from_ne_bytes(b.try_into().expect("an eventfd gives 8 bytes")));
    Ok(Box::new(move || {
        same("close-on-exec", libc::FD_CLOEXEC, sys!(fcntl(plain, libc::F_GETFD))? as i32)?;
        same("count", 0xffff_0000, number(plain)?)?;
        write(plain, &0xffff_0000u64.to_ne_bytes())?;
        same("semaphore", [1, 1, 1], [number(semaphore)?, number(semaphore)?, number(semaphore)?])?;
        fails_with("empty semaphore", libc::EAGAIN, number(semaphore).map(|n| n as i64))?;
        write(semaphore, &3u64.to_ne_bytes())?;
        fails_with("empty eventfd", libc::EAGAIN, number(empty).map(|n| n as i64))?;
        let one = 1u64.to_ne_bytes();
        fails_with("write to a full eventfd", libc::EAGAIN, write(full, &one).map(|()| 0))?;
        same("full eventfd", most, number(full)?)?;
        write(full, &most.to_ne_bytes())?;
        write(shared, &5u64.to_ne_bytes())?;
        std::thread::sleep(Duration::from_millis(10));
        same("the child's answer", 500, number(shared)?)
    }))
}

/// Signals that came before, and signals that come after; the set may grow.
fn signalfd(_: &mut Stage) -> Fallible<Check> {
    let set_of = |signals: &[i32]| {
        let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
        for signal in signals {
            unsafe { libc::sigaddset(&mut set, *signal) };
        }
        set
    };
    let all = set_of(&[libc::SIGUSR1, libc::SIGRTMIN() + 5, libc::SIGUSR2]);
    sys!(sigprocmask(libc::SIG_BLOCK, &all, std::ptr::null_mut()))?;
    let some = set_of(&[libc::SIGUSR1, libc::SIGRTMIN() + 5]);
    let flags = libc::SFD_NONBLOCK | libc::SFD_CLOEXEC;
    let fd = sys!(signalfd(-1, &some, flags))? as i32;
    let next = move || read(fd, 128).map(|b| i64::from(b[0]));
    let send = |signal: i32| sys!(kill(libc::getpid(), signal)).map(drop);
    let mask = move || {
        let info = procfs::text(&format!("/proc/self/fdinfo/{fd}"))?;
        let line = info.lines().find(|l| l.starts_with("sigmask:"));
        Ok::<_, String>(line.unwrap_or_default().to_owned())
    };
    let before = mask()?;
    send(libc::SIGUSR1)?;
    send(libc::SIGUSR2)?;
    Ok(Box::new(move || {
        same("set", &before, &mask()?)?;
        let flags = sys!(fcntl(fd, libc::F_GETFD))?;
        same("close-on-exec", i64::from(libc::FD_CLOEXEC), flags)?;
        same("pending", i64::from(libc::SIGUSR1), next()?)?;
        fails_with("SIGUSR2 is not in the set", libc::EAGAIN, next())?;
        send(libc::SIGRTMIN() + 5)?;
        same("new", i64::from(libc::SIGRTMIN() + 5), next()?)?;
        send(libc::SIGUSR1)
    }))
}

fn set(fd: i32, flags: i32, first: Duration, then: Duration) -> Fallible {
    let time = |d: Duration| libc::timespec { tv_sec: d.as_secs() as i64, tv_nsec: d.subsec_nanos() as i64 };
    let value = libc::itimerspec { it_value: time(first), it_interval: time(then) };
    raw!(SYS_timerfd_settime, fd, flags, &raw const value, 0).map(drop)
}

/// Lines of fdinfo that a restore must bring back as they were.
fn steady_info(fd: i32) -> Fallible<Vec<String>> {
    let info = procfs::text(&format!("/proc/self/fdinfo/{fd}"))?;
    let steady = |l: &&str| {
        ["flags", "clockid", "settime flags", "it_interval"].contains(&l.split(':').next().unwrap_or_default())
    };
    Ok(info.lines().filter(steady).map(str::to_owned).collect())
}

/// What is left, flags, clocks, and expirations that nobody has read yet.
fn timerfd(_: &mut Stage) -> Fallible<Check> {
    const HOUR: Duration = Duration::from_secs(3600);
    let new = |clock: i32| sys!(timerfd_create(clock, libc::TFD_NONBLOCK | libc::TFD_CLOEXEC)).map(|fd| fd as i32);
    let mut now: libc::timespec = unsafe { std::mem::zeroed() };
    sys!(clock_gettime(libc::CLOCK_MONOTONIC, &mut now))?;
    let absolute = Duration::new(now.tv_sec as u64, now.tv_nsec as u32) + HOUR;
    let mut timers = Vec::new();
    for clock in [libc::CLOCK_MONOTONIC, libc::CLOCK_REALTIME, libc::CLOCK_BOOTTIME] {
        let (once, often, off) = (new(clock)?, new(clock)?, new(clock)?);
        set(once, 0, HOUR, Duration::ZERO)?;
        set(often, 0, HOUR, Duration::from_millis(777))?;
        timers.extend([(once, HOUR), (often, HOUR), (off, Duration::ZERO)]);
    }
    let by_date = new(libc::CLOCK_MONOTONIC)?;
    set(by_date, libc::TFD_TIMER_ABSTIME, absolute, Duration::from_secs(60))?;
    timers.push((by_date, HOUR));
    let expired = new(libc::CLOCK_MONOTONIC)?;
    set(expired, 0, Duration::from_millis(1), Duration::ZERO)?;
    let many = new(libc::CLOCK_REALTIME)?;
    set(many, 0, Duration::from_millis(1), Duration::from_millis(1))?;
    std::thread::sleep(Duration::from_millis(100));
    let ticks = move |fd: i32| read(fd, 8).map(|b| u64::from_ne_bytes(b.try_into().expect("a timerfd gives 8 bytes")));
    let infos = timers.iter().map(|(fd, _)| steady_info(*fd)).collect::<Fallible<Vec<_>>>()?;
    Ok(Box::new(move || {
        for ((fd, whole), info) in timers.iter().zip(&infos) {
            same("fdinfo of a timerfd", info, &steady_info(*fd)?)?;
            let mut value: libc::itimerspec = unsafe { std::mem::zeroed() };
            raw!(SYS_timerfd_gettime, *fd, &raw mut value)?;
            let left = Duration::new(value.it_value.tv_sec as u64, value.it_value.tv_nsec as u32);
            let least = whole.saturating_sub(Duration::from_secs(120));
            holds((least..=*whole).contains(&left), format!("timerfd {fd}: {left:?} are left of {whole:?}"))?;
            fails_with("a timerfd that is not due", libc::EAGAIN, ticks(*fd).map(|n| n as i64))?;
        }
        same("unread expiration of a one-shot timerfd", 1, ticks(expired)?)?;
        fails_with("read twice", libc::EAGAIN, ticks(expired).map(|n| n as i64))?;
        let unread = ticks(many)?;
        holds(unread >= 90, format!("expirations of a 1 ms timerfd in more than 100 ms: {unread}"))?;
        set(expired, 0, Duration::from_millis(1), Duration::ZERO)?;
        std::thread::sleep(Duration::from_millis(120));
        Ok(())
    }))
}

/// A timerfd that falls due while the container is stopped, or after, is read in time; not before.
fn timerfd_rings(_: &mut Stage) -> Fallible<Check> {
    let fd = sys!(timerfd_create(libc::CLOCK_MONOTONIC, 0))? as i32;
    let due = Duration::from_millis(1500);
    let begin = move || -> Fallible<std::time::Instant> {
        set(fd, 0, due, Duration::ZERO)?;
        Ok(std::time::Instant::now())
    };
    let mut since = begin()?;
    Ok(Box::new(move || {
        let mut entry = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        eventually("a timerfd is due", || unsafe { libc::poll(&mut entry, 1, 0) } == 1)?;
        let took = since.elapsed();
        holds(took >= due, format!("a timerfd of {due:?} was due after {took:?}"))?;
        same("expirations", 1u64.to_ne_bytes().to_vec(), read(fd, 8)?)?;
        since = begin()?;
        Ok(())
    }))
}
