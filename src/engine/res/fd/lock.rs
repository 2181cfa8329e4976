//! File locks: flock(2), and those of fcntl(2), a process's own and an open file description's.
//!
//! fdinfo shows each lock at the descriptors through which it is held (fs/locks.c, `show_fd_locks`):
//! `1: FLOCK  ADVISORY  WRITE 2682 fe:00:1234 0 EOF`.

use std::collections::BTreeSet;

use super::FdFacts;
use crate::engine::{Error, Result};
use crate::image::records::files::FileLockEntry;
use crate::tracee::batch::Batch;

/// include/linux/filelock.h
const FL_POSIX: u32 = 1;
const FL_FLOCK: u32 = 2;
const FL_OFDLCK: u32 = 1024;

/// The locks of a container.
#[derive(Debug, Default)]
pub struct Seen {
    pub records: Vec<FileLockEntry>,
    /// Kind, file, process (for what a process holds itself), start.
    known: BTreeSet<(u32, u32, u32, i64)>,
}

/// Records the locks that `process` (its pid inside) holds through a descriptor of `file`.
pub fn collect(f: &FdFacts, file: u32, process: u32, seen: &mut Seen) -> Result<()> {
    for line in f.info.all("lock") {
        let Some(record) = parse(line, process, f.fd) else {
            return f.refuse(format!("holds a lock of a kind that cannot be carried ({line})"), "release the lock");
        };
        let own = if record.flag == FL_POSIX { process } else { 0 };
        if seen.known.insert((record.flag, file, own, record.start)) {
            seen.records.push(record);
        }
    }
    Ok(())
}

fn parse(line: &str, process: u32, fd: i32) -> Option<FileLockEntry> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let [_, kind, "ADVISORY", access, _, _, start, end] = words[..] else { return None };
    let flag = match kind {
        "FLOCK" => FL_FLOCK,
        "POSIX" => FL_POSIX,
        "OFDLCK" => FL_OFDLCK,
        _ => return None,
    };
    let r#type = match access {
        "READ" => libc::F_RDLCK,
        "WRITE" => libc::F_WRLCK,
        _ => return None,
    };
    let start: i64 = start.parse().ok()?;
    // In a record as in struct flock: no length is up to the end, wherever that is.
    let len = if end == "EOF" { 0 } else { end.parse::<i64>().ok()?.checked_sub(start)?.checked_add(1)? };
    Some(FileLockEntry { flag, r#type: r#type as u32, pid: process.cast_signed(), fd, start, len })
}

/// Has the holder take a lock again. All its files must be in place: whoever closes one loses its own locks of it.
pub fn restore(e: &FileLockEntry, b: &mut Batch) -> Result<()> {
    if e.flag == FL_FLOCK {
        let how = if e.r#type == libc::F_RDLCK as u32 { libc::LOCK_SH } else { libc::LOCK_EX };
        b.call("flock", libc::SYS_flock, [e.fd.into(), (how | libc::LOCK_NB).into()]);
        return Ok(());
    }
    let (name, command) = match e.flag {
        FL_POSIX => ("fcntl(F_SETLK)", libc::F_SETLK),
        FL_OFDLCK => ("fcntl(F_OFD_SETLK)", libc::F_OFD_SETLK),
        other => return Err(Error::BadRecord { what: format!("a lock has the unknown flags {other:#x}") }),
    };
    // struct flock: type and whence (SEEK_SET) in a word, start, length, pid.
    let words = [u64::from(e.r#type & 0xffff), e.start.cast_unsigned(), e.len.cast_unsigned(), 0];
    let at = b.bytes(&words.map(u64::to_ne_bytes).concat());
    b.call(name, libc::SYS_fcntl, [e.fd.into(), command.into(), at.into()]);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_fdinfo() {
        let whole = parse("1: FLOCK  ADVISORY  WRITE 2682 fe:00:1234 0 EOF", 5, 3).unwrap();
        assert_eq!((whole.flag, whole.r#type, whole.pid, whole.fd, whole.start, whole.len), (2, 1, 5, 3, 0, 0));
        let part = parse("2: POSIX  ADVISORY  READ  2682 fe:00:1234 10 19", 5, 3).unwrap();
        assert_eq!((part.flag, part.r#type, part.start, part.len), (1, 0, 10, 10));
        assert_eq!(parse("1: OFDLCK ADVISORY  WRITE -1 fe:00:1234 0 4", 5, 3).unwrap().flag, 1024);
        assert_eq!(parse("1: LEASE  ACTIVE    READ  2682 fe:00:1234 0 EOF", 5, 3), None);
    }
}
