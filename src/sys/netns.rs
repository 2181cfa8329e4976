//! Work inside another network namespace.

use std::io;
use std::os::fd::BorrowedFd;

use nix::sched::{CloneFlags, setns};

/// Runs `work` on a thread of its own that has entered the network namespace `netns` (an open
/// `/proc/PID/ns/net`). What it opens (sockets) stays in that namespace; no other thread is touched.
/// setns(2): needs CAP_SYS_ADMIN in the namespace's owner and in the caller's user namespace.
pub fn within<T: Send>(netns: BorrowedFd<'_>, work: impl FnOnce() -> T + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, || {
            setns(netns, CloneFlags::CLONE_NEWNET)?;
            Ok(work())
        })?;
        match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}
