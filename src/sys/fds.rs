//! The process's own table of descriptors.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;

/// A duplicate of a descriptor that whoever started this program has left open under a number.
pub fn inherited(fd: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: takes no pointers; the result is a descriptor of ours alone.
    unsafe {
        let fd = libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3);
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd)) }
    }
}

/// Closes every descriptor from `first` up. close_range(2), since Linux 5.9.
///
/// Only for a process that owns none of them any more in the sense of Rust: one that is about
/// to loop in plain system calls, such as the puppet of a restore.
///
/// # Errors
/// None that depends on the descriptors; `ENOSYS` on kernels before 5.9.
pub fn close_from(first: u32) -> nix::Result<()> {
    // SAFETY: takes no pointers. The caller gives up all descriptors from `first` on.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
    Errno::result(result).map(drop)
}

/// Has every descriptor from `first` up closed by the next execve(2). close_range(2), the flag since Linux 5.11.
pub fn close_on_exec_from(first: u32) -> nix::Result<()> {
    /// include/uapi/linux/close_range.h
    const CLOSE_RANGE_CLOEXEC: libc::c_uint = 1 << 2;
    // SAFETY: takes no pointers, and closes nothing of this program's.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, CLOSE_RANGE_CLOEXEC) };
    Errno::result(result).map(drop)
}

/// Whether descriptor `number` was handed down to this program: it is open, and not one of our own, which are all
/// close-on-exec.
pub fn is_inherited(number: i32) -> bool {
    // SAFETY: fcntl(2) on a number that may name no descriptor fails, and changes nothing.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    flags >= 0 && flags & libc::FD_CLOEXEC == 0
}

/// A duplicate, close-on-exec, with a number of at least `first`.
pub fn duplicate_above(fd: BorrowedFd<'_>, first: i32) -> nix::Result<OwnedFd> {
    // SAFETY: the result is a new descriptor that nobody else knows.
    unsafe {
        let new = Errno::result(libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, first))?;
        Ok(OwnedFd::from_raw_fd(new))
    }
}

/// Closes every descriptor from `first` up but those in `kept`. For a child that owns nothing else, like
/// [`close_from`].
pub fn close_from_except(first: u32, kept: &[BorrowedFd<'_>]) -> nix::Result<()> {
    let mut kept: Vec<u32> = kept.iter().map(|fd| fd.as_raw_fd() as u32).filter(|fd| *fd >= first).collect();
    kept.sort_unstable();
    let mut next = first;
    for fd in kept {
        if next < fd {
            // SAFETY: as above.
            let result = unsafe { libc::syscall(libc::SYS_close_range, next, fd - 1, 0) };
            Errno::result(result)?;
        }
        next = fd + 1;
    }
    close_from(next)
}
