//! Unix sockets as the kernel shows them, and their queues, left as they are (unix(7), sock_diag(7)).
#![allow(unsafe_code)]

use std::io;
use std::mem::{MaybeUninit, offset_of};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use libc::{c_int, c_ulong, pid_t};

use super::netlink::{NetlinkSocket, attributes};

/// include/uapi/linux/sock_diag.h.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// include/uapi/linux/unix_diag.h: what a request asks for.
const UDIAG_SHOW_PEER: u32 = 4;
const UDIAG_SHOW_ICONS: u32 = 8;
const UDIAG_SHOW_RQLEN: u32 = 16;
/// include/uapi/linux/unix_diag.h: attributes of an answer.
const UNIX_DIAG_PEER: u16 = 2;
const UNIX_DIAG_ICONS: u16 = 3;
const UNIX_DIAG_RQLEN: u16 = 4;
const UNIX_DIAG_SHUTDOWN: u16 = 6;
/// include/uapi/linux/un.h, since 4.13: the file that the socket is bound to, as an O_PATH descriptor.
const SIOCUNIXFILE: c_ulong = 0x89e0;
/// include/linux/socket.h, since 6.5: a pidfd of the sender.
const SCM_PIDFD: c_int = 4;

/// What sock_diag(7) tells of a unix socket.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    pub inode: u32,
    /// `sys::tcp::state`: ESTABLISHED, LISTEN or CLOSE.
    pub state: u32,
    /// Inode of the socket that it is connected to; 0: that one is closed, or not accepted yet.
    pub peer: Option<u32>,
    /// Inodes of the sockets that wait to be accepted.
    pub waiting: Vec<u32>,
    /// How many connections may wait to be accepted.
    pub backlog: u32,
    /// Bit 0: nothing more can be received; bit 1: nothing more can be sent.
    pub shutdown: u32,
}

/// All unix sockets of the network namespace of the calling thread.
pub fn all() -> io::Result<Vec<Facts>> {
    let family = [libc::AF_UNIX as u8, 0, 0, 0];
    // States, inode (of no meaning for a list), attributes, cookie.
    let rest = [u32::MAX, 0, UDIAG_SHOW_PEER | UDIAG_SHOW_ICONS | UDIAG_SHOW_RQLEN, u32::MAX, u32::MAX];
    let request = [family].into_iter().chain(rest.map(u32::to_ne_bytes)).collect::<Vec<_>>().concat();
    let answer = NetlinkSocket::sock_diag()?.dump(SOCK_DIAG_BY_FAMILY, &request)?;
    Ok(answer.iter().filter_map(|m| parse(m)).collect())
}

/// `struct unix_diag_msg` (family, type, state, padding, inode, cookie) and attributes.
fn parse(message: &[u8]) -> Option<Facts> {
    let (fixed, rest) = message.split_first_chunk::<16>()?;
    let found = attributes(rest);
    let words = |kind: u16| -> Vec<u32> {
        let bytes = found.get(&kind).copied().unwrap_or_default();
        bytes.as_chunks::<4>().0.iter().map(|b| u32::from_ne_bytes(*b)).collect()
    };
    Some(Facts {
        inode: u32::from_ne_bytes(*fixed[4..].first_chunk()?),
        state: fixed[2].into(),
        peer: words(UNIX_DIAG_PEER).first().copied(),
        waiting: words(UNIX_DIAG_ICONS),
        backlog: words(UNIX_DIAG_RQLEN).get(1).copied().unwrap_or(0),
        shutdown: found.get(&UNIX_DIAG_SHUTDOWN).and_then(|s| s.first().copied()).unwrap_or(0).into(),
    })
}

/// The file that a socket is bound to; None: it is not bound to one. Needs CAP_NET_ADMIN in the user namespace that
/// owns the socket's network namespace.
pub fn file(socket: BorrowedFd<'_>) -> io::Result<Option<OwnedFd>> {
    // SAFETY: the request takes no argument; its result is a descriptor of ours alone.
    unsafe {
        let fd = libc::ioctl(socket.as_raw_fd(), SIOCUNIXFILE as _, 0);
        match io::Error::last_os_error() {
            _ if fd >= 0 => Ok(Some(OwnedFd::from_raw_fd(fd))),
            e if e.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            e => Err(e),
        }
    }
}

/// Who sent a message, as the kernel recorded it: a pid of our namespace (0 for none).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sender {
    pub pid: pid_t,
    pub uid: u32,
    pub gid: u32,
}

/// What is at the start of a receive queue, or at SO_PEEK_OFF.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peeked {
    /// Length of the message; what of it fits is in the buffer.
    pub len: usize,
    /// The name of the sender's socket, as in `sun_path`.
    pub from: Vec<u8>,
    /// Of a socket with SO_PASSCRED.
    pub sender: Option<Sender>,
}

/// Looks at a queue without taking anything from it and without waiting.
pub fn peek(socket: BorrowedFd<'_>, buf: &mut [u8]) -> io::Result<Peeked> {
    let mut name = MaybeUninit::<libc::sockaddr_un>::zeroed();
    let mut control = [0u64; 32];
    let mut part = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    // SAFETY: all zeroes is a msghdr; every pointer put into it is to a buffer of the length given, which lives across
    // the call. The control messages are walked as cmsg(3) prescribes, within what the kernel says it wrote.
    unsafe {
        let mut header: libc::msghdr = std::mem::zeroed();
        header.msg_name = name.as_mut_ptr().cast();
        header.msg_namelen = size_of::<libc::sockaddr_un>() as u32;
        header.msg_iov = &raw mut part;
        header.msg_iovlen = 1;
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = size_of_val(&control) as _;
        let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_TRUNC | libc::MSG_CMSG_CLOEXEC;
        let len = libc::recvmsg(socket.as_raw_fd(), &raw mut header, flags);
        if len < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut sender = None;
        let mut at = libc::CMSG_FIRSTHDR(&raw const header);
        while !at.is_null() {
            let data = libc::CMSG_DATA(at);
            match ((*at).cmsg_level, (*at).cmsg_type) {
                (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) => {
                    let libc::ucred { pid, uid, gid } = data.cast::<libc::ucred>().read_unaligned();
                    sender = Some(Sender { pid, uid, gid });
                }
                // A new descriptor of ours, which nobody wants, or a negative error number.
                (libc::SOL_SOCKET, SCM_PIDFD) => {
                    if let fd @ 0.. = data.cast::<c_int>().read_unaligned() {
                        drop(OwnedFd::from_raw_fd(fd));
                    }
                }
                _ => {}
            }
            at = libc::CMSG_NXTHDR(&raw const header, at);
        }
        let path = offset_of!(libc::sockaddr_un, sun_path);
        let written = (header.msg_namelen as usize).saturating_sub(path).min(size_of::<libc::sockaddr_un>() - path);
        let name = name.assume_init();
        let from = name.sun_path[..written].iter().map(|c| *c as u8).collect();
        Ok(Peeked { len: len as usize, from, sender })
    }
}

/// Sends all of a message, in the name of `sender`, without waiting. Another's pid, uid or gid needs CAP_SYS_ADMIN, CAP_SETUID or
/// CAP_SETGID; the pid must be of a living process.
pub fn send(
    socket: BorrowedFd<'_>,
    data: &[u8],
    to: Option<&nix::sys::socket::UnixAddr>,
    sender: Option<Sender>,
) -> io::Result<()> {
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    let credentials =
        sender.map(|s| nix::sys::socket::UnixCredentials::from(libc::ucred { pid: s.pid, uid: s.uid, gid: s.gid }));
    let control: Vec<ControlMessage<'_>> = credentials.iter().map(ControlMessage::ScmCredentials).collect();
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    let mut rest = data;
    loop {
        let sent = sendmsg(socket.as_raw_fd(), &[io::IoSlice::new(rest)], &control, flags, to)?;
        rest = &rest[sent..];
        if rest.is_empty() {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixDatagram;

    #[test]
    fn a_pair_knows_its_peer() {
        let (a, b) = UnixDatagram::pair().unwrap();
        let inode = |s: &UnixDatagram| crate::sys::file::stat(s).unwrap().inode as u32;
        let all = all().unwrap();
        let facts = all.iter().find(|f| f.inode == inode(&a)).unwrap();
        assert_eq!(facts.peer, Some(inode(&b)));
        assert_eq!((facts.state, facts.shutdown), (crate::sys::tcp::state::ESTABLISHED, 0));
        assert!(file(a.as_fd()).unwrap().is_none());
    }

    #[test]
    fn a_queue_is_looked_at_and_left() {
        let (a, b) = UnixDatagram::pair().unwrap();
        a.send(b"message").unwrap();
        for _ in 0..2 {
            let mut buf = [0; 4];
            let seen = peek(b.as_fd(), &mut buf).unwrap();
            assert_eq!((seen.len, buf), (7, *b"mess"));
            assert!(seen.from.is_empty() && seen.sender.is_none());
        }
        send(b.as_fd(), b"", None, None).unwrap();
        assert_eq!(peek(a.as_fd(), &mut [0; 4]).unwrap().len, 0);
    }
}
