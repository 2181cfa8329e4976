//! A child that goes on in the same program (fork(2)).
#![allow(unsafe_code)]

use std::io;

use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

/// Forks; the child runs `work` and ends with the status that it returns, without unwinding and without
/// the exit handlers of the parent. The caller should have one thread only: what another one holds (a lock
/// of the allocator apart, which libc releases) stays held in the child for ever.
pub fn child(work: impl FnOnce() -> i32) -> io::Result<Pid> {
    // SAFETY: the child runs `work` and leaves by _exit; see above for what it may not wait for.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => {
            let status = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or(101);
            // SAFETY: _exit(2) does not return.
            unsafe { libc::_exit(status) }
        }
    }
}

/// As [`child`], but nobody has to wait for the process: it is the child of a child that has ended, and so becomes
/// that of init or of a subreaper.
pub fn orphan(work: impl FnOnce() -> i32) -> io::Result<()> {
    let middle = child(|| i32::from(child(work).is_err()))?;
    match waitpid(middle, None)? {
        WaitStatus::Exited(_, 0) => Ok(()),
        _ => Err(io::ErrorKind::Other.into()),
    }
}
