//! A child that goes on in the same program (fork(2)).
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

/// Forks; the child runs `work` and ends with the status that it returns, without unwinding and without
/// the exit handlers of the parent. The caller should have one thread only: what another one holds (a lock
/// of the allocator apart, which libc releases) stays held in the child for ever.
pub fn child(work: impl FnOnce() -> i32) -> io::Result<Pid> {
    // SAFETY: the child runs `work` and leaves by _exit; see above for what it may not wait for.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => run(work),
    }
}

fn run(work: impl FnOnce() -> i32) -> ! {
    let status = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or(101);
    // SAFETY: _exit(2) does not return.
    unsafe { libc::_exit(status) }
}

/// CLONE_PARENT, for [`child_in`]: the child is its caller's sibling, and its caller's parent is told of its end.
pub const SIBLING: u64 = 0x8000;

/// include/uapi/linux/sched.h. (The C library's binding is too narrow for it.)
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// As [`child`], with new `namespaces` (CLONE_NEW* of clone(2)), and born in the cgroup whose directory (of cgroup2) is
/// given: clone3(2), since Linux 5.7. It costs none of the waiting that moving a process costs.
///
/// # Errors
/// As the man page has them: `EBUSY` for a cgroup that has controllers enabled for those below it.
pub fn child_in(namespaces: u64, cgroup: Option<BorrowedFd<'_>>, work: impl FnOnce() -> i32) -> io::Result<Pid> {
    // SAFETY: plain numbers, of which zero is a good value.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = namespaces;
    // Who is forked as a sibling gets its caller's, and clone3(2) wants none then.
    args.exit_signal = if namespaces & SIBLING == 0 { libc::SIGCHLD as u64 } else { 0 };
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: without CLONE_VM this is fork(2); the kernel reads a struct that lives until the call returns. What the C
    // library does for other threads at a fork is not needed (see `child`), and the thread id that it has
    // noted is the parent's until the child executes a program: nothing here asks for it.
    let result = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<libc::clone_args>()) };
    match Errno::result(result)? {
        0 => run(work),
        pid => Ok(Pid::from_raw(pid as i32)),
    }
}

/// Takes note of a child that has ended, whichever it is; if `wait`, until there is one. False: there is none.
pub fn reap(wait: bool) -> io::Result<bool> {
    use nix::sys::wait::WaitPidFlag;
    loop {
        match waitpid(None, (!wait).then_some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
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
