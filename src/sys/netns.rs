//! Work inside another network namespace.

use std::io;
use std::os::fd::BorrowedFd;

use nix::sched::{CloneFlags, setns};

use super::netlink::{Batch, NLM_F_ACK, NetlinkSocket};

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

/// Sets the loopback interface of `netns` up: a new network namespace has it, and has it down. Needs
/// CAP_NET_ADMIN in the namespace's owner, beside what [`within`] needs.
pub fn raise_loopback(netns: BorrowedFd<'_>) -> io::Result<()> {
    within(netns, raise_own_loopback)?
}

/// As [`raise_loopback`], in the caller's network namespace.
pub fn raise_own_loopback() -> io::Result<()> {
    /// include/uapi/linux/rtnetlink.h.
    const RTM_NEWLINK: u16 = 16;
    /// include/uapi/linux/if.h.
    const IFF_UP: u32 = 1;
    /// include/net/net_namespace.h: the first interface of every namespace.
    const LOOPBACK: u32 = 1;
    let mut batch = Batch::default();
    // struct ifinfomsg: family and type (0), index, flags, which flags to change.
    let header = [0, LOOPBACK, IFF_UP, IFF_UP].map(u32::to_ne_bytes).concat();
    batch.request(RTM_NEWLINK, NLM_F_ACK, &header, |_| {});
    NetlinkSocket::route()?.transact(&batch)
}
