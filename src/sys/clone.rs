//! A child with new namespaces and in a cgroup from its first instant (clone3(2)).
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::unistd::Pid;

/// include/uapi/linux/sched.h, since 5.7. (libc's constant has the type of clone's flags, which it does not fit.)
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Forks with `namespaces` (CLONE_NEW* of clone(2)) into the directory of a cgroup2 hierarchy; the child runs `work` and ends
/// with the status that it returns. As with [`fork::child`](super::fork::child) the caller has one thread only.
///
/// A process that is born in a cgroup costs nothing there; moving one waits for an RCU grace period.
///
/// # Errors
/// `EINVAL`, `EBUSY`, `EOPNOTSUPP` where the kernel cannot or will not put it there.
pub fn child(namespaces: u64, cgroup: Option<BorrowedFd<'_>>, work: impl FnOnce() -> i32) -> io::Result<Pid> {
    // SAFETY: a struct of integers, all of which may be zero.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = namespaces;
    args.exit_signal = libc::SIGCHLD as u64;
    if let Some(dir) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = dir.as_raw_fd() as u64;
    }
    // SAFETY: without CLONE_VM the child has memory of its own and goes on behind the call as after fork(2); `args` lives
    // until then.
    match Errno::result(unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of_val(&args)) })? {
        0 => {
            let status = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or(101);
            // SAFETY: _exit(2) does not return.
            unsafe { libc::_exit(status) }
        }
        pid => Ok(Pid::from_raw(pid as i32)),
    }
}
