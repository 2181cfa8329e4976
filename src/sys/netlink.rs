//! Netlink: requests as bytes, answers as errors (netlink(7), RFC 3549).

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use libc::c_int;
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};

use super::sockopt;

/// include/uapi/linux/netlink.h.
const NLM_F_REQUEST: u16 = 1;
/// include/uapi/linux/netlink.h.
pub const NLM_F_ACK: u16 = 4;
/// include/uapi/linux/netlink.h: put it in the place of what exists.
pub const NLM_F_REPLACE: u16 = 0x100;
/// include/uapi/linux/netlink.h: fail if it exists.
pub const NLM_F_EXCL: u16 = 0x200;
/// include/uapi/linux/netlink.h: make it if it does not exist.
pub const NLM_F_CREATE: u16 = 0x400;
/// include/uapi/linux/netlink.h: the attribute consists of attributes.
const NLA_F_NESTED: u16 = 0x8000;
/// include/uapi/linux/netlink.h: the type without what is said of the value.
const NLA_TYPE_MASK: u16 = 0x3fff;
/// include/uapi/linux/netlink.h: all objects of a kind.
const NLM_F_DUMP: u16 = 0x300;
/// include/uapi/linux/netlink.h: an acknowledgement, which is an error of 0.
const NLMSG_ERROR: u16 = 2;
/// include/uapi/linux/netlink.h: the end of a dump, with an error that is usually 0.
const NLMSG_DONE: u16 = 3;
/// Length of `struct nlmsghdr`.
pub const HEADER: usize = 16;

/// Several requests that go to the kernel in one send(2).
#[derive(Debug, Default)]
pub struct Batch {
    bytes: Vec<u8>,
    requests: u32,
}

impl Batch {
    /// What goes to the kernel.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Appends a request: `header` is the fixed part of its family, `attributes` writes the rest.
    pub fn request(&mut self, kind: u16, flags: u16, header: &[u8], attributes: impl FnOnce(&mut Attributes<'_>)) {
        let start = self.bytes.len();
        self.requests += 1;
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
        self.bytes.extend_from_slice(&self.requests.to_ne_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(header);
        attributes(&mut Attributes { bytes: &mut self.bytes });
        let len = (self.bytes.len() - start) as u32;
        self.bytes[start..start + 4].copy_from_slice(&len.to_ne_bytes());
    }
}

/// Where the attributes of a request are written.
#[derive(Debug)]
pub struct Attributes<'a> {
    bytes: &'a mut Vec<u8>,
}

impl Attributes<'_> {
    /// Appends an attribute, at most 65531 bytes.
    pub fn put(&mut self, kind: u16, value: &[u8]) {
        put(self.bytes, kind, value);
    }

    /// Appends a 32-bit number in network order.
    pub fn put_be32(&mut self, kind: u16, value: u32) {
        self.put(kind, &value.to_be_bytes());
    }

    /// Appends a string with its NUL byte.
    pub fn put_name(&mut self, kind: u16, value: &str) {
        self.put(kind, &[value.as_bytes(), b"\0"].concat());
    }

    /// Appends an attribute that consists of what `inner` writes, less than 64 KiB.
    pub fn nest(&mut self, kind: u16, inner: impl FnOnce(&mut Attributes<'_>)) {
        let start = self.bytes.len();
        self.put(kind | NLA_F_NESTED, &[]);
        inner(&mut Attributes { bytes: self.bytes });
        let len = u16::try_from(self.bytes.len() - start).expect("an attribute is shorter than 64 KiB");
        self.bytes[start..start + 2].copy_from_slice(&len.to_ne_bytes());
    }
}

/// Appends an attribute, at most 65531 bytes.
pub fn put(to: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let len = u16::try_from(value.len() + 4).expect("an attribute is shorter than 64 KiB");
    to.extend_from_slice(&len.to_ne_bytes());
    to.extend_from_slice(&kind.to_ne_bytes());
    to.extend_from_slice(value);
    to.resize(to.len().next_multiple_of(4), 0);
}

/// A netlink socket; it belongs to the network namespace in which it was opened.
#[derive(Debug)]
pub struct NetlinkSocket(OwnedFd);

impl AsFd for NetlinkSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for NetlinkSocket {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl NetlinkSocket {
    /// Opens a socket of the netfilter family.
    pub fn netfilter() -> io::Result<Self> {
        Self::open(SockProtocol::NetlinkNetFilter)
    }

    /// Opens a socket for links and addresses (rtnetlink(7)).
    pub fn route() -> io::Result<Self> {
        Self::open(SockProtocol::NetlinkRoute)
    }

    /// Opens a socket for facts about sockets (sock_diag(7)).
    pub fn sock_diag() -> io::Result<Self> {
        Self::open(SockProtocol::NetlinkSockDiag)
    }

    fn open(protocol: SockProtocol) -> io::Result<Self> {
        Ok(Self(socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?))
    }

    /// Asks for all objects of a kind; `header` is the fixed part of the request. Returns what each message of the
    /// answer holds.
    pub fn dump(&self, kind: u16, header: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        let mut request = Batch::default();
        request.request(kind, NLM_F_DUMP, header, |_| {});
        send(self.0.as_raw_fd(), &request.bytes, MsgFlags::empty())?;
        let mut objects = Vec::new();
        let mut buf = vec![0; 65536];
        loop {
            let len = recv(self.0.as_raw_fd(), &mut buf, MsgFlags::empty())?;
            for (kind, payload) in messages(&buf[..len]) {
                if !matches!(kind, NLMSG_DONE | NLMSG_ERROR) {
                    objects.push(payload.to_vec());
                    continue;
                }
                return match error(payload) {
                    Some(error) if error < 0 => Err(io::Error::from_raw_os_error(-error)),
                    _ => Ok(objects),
                };
            }
        }
    }

    /// Sends the batch and reads every answer; the first error is returned. At least one request must set
    /// [`NLM_F_ACK`]. The kernel has answered before send(2) returns, so nothing is waited for.
    pub fn transact(&self, batch: &Batch) -> io::Result<()> {
        let room = sockopt::get_int(self.0.as_fd(), libc::SOL_SOCKET, libc::SO_SNDBUF)? as usize;
        if batch.bytes.len() > room / 2 {
            let wanted = (batch.bytes.len() * 2) as c_int;
            sockopt::set_int(self.0.as_fd(), libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, wanted)?;
        }
        send(self.0.as_raw_fd(), &batch.bytes, MsgFlags::empty())?;
        let mut outcome = Err(io::Error::from(io::ErrorKind::InvalidData));
        let mut failed = false;
        let mut buf = [0; 8192];
        loop {
            let len = match recv(self.0.as_raw_fd(), &mut buf, MsgFlags::MSG_DONTWAIT) {
                Ok(len) => len,
                Err(Errno::EAGAIN) => return outcome,
                Err(e) => return Err(e.into()),
            };
            for error in answers(&buf[..len]) {
                if failed {
                    continue;
                }
                failed = error != 0;
                outcome = if failed { Err(io::Error::from_raw_os_error(-error)) } else { Ok(()) };
            }
        }
    }
}

/// The messages of a datagram from the kernel: their types, and what follows their headers.
fn messages(mut datagram: &[u8]) -> Vec<(u16, &[u8])> {
    let mut found = Vec::new();
    while let Some((header, rest)) = datagram.split_first_chunk::<HEADER>() {
        let [l0, l1, l2, l3, k0, k1, ..] = *header;
        let len = (u32::from_ne_bytes([l0, l1, l2, l3]) as usize).max(HEADER);
        let payload = rest.get(..len - HEADER).unwrap_or(rest);
        found.push((u16::from_ne_bytes([k0, k1]), payload));
        datagram = datagram.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

/// The error number (0 or negative) with which an acknowledgement begins.
fn error(payload: &[u8]) -> Option<c_int> {
    payload.first_chunk().map(|e| c_int::from_ne_bytes(*e))
}

/// The error numbers of the acknowledgements in a datagram from the kernel.
fn answers(datagram: &[u8]) -> Vec<c_int> {
    let acknowledgements = messages(datagram).into_iter().filter(|(kind, _)| *kind == NLMSG_ERROR);
    acknowledgements.filter_map(|(_, p)| error(p)).collect()
}

/// The attributes of a message, by type; a later one of the same type wins. What is torn is left out.
pub fn attributes(mut bytes: &[u8]) -> HashMap<u16, &[u8]> {
    let mut found = HashMap::new();
    while let Some(([l0, l1, k0, k1], rest)) = bytes.split_first_chunk() {
        let len = usize::from(u16::from_ne_bytes([*l0, *l1])).max(4);
        if let Some(value) = rest.get(..len - 4) {
            found.insert(u16::from_ne_bytes([*k0, *k1]) & NLA_TYPE_MASK, value);
        }
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_nested() {
        let mut batch = Batch::default();
        batch.request(0x10, NLM_F_ACK, &[], |a| {
            a.nest(1, |a| a.put_name(2, "ab"));
            a.put_be32(3, 7);
        });
        let header = [&36u32.to_ne_bytes()[..], &0x10u16.to_ne_bytes(), &5u16.to_ne_bytes(), &1u32.to_ne_bytes()];
        assert_eq!(batch.bytes[..12], header.concat());
        let nested = [&12u16.to_ne_bytes()[..], &0x8001u16.to_ne_bytes(), &7u16.to_ne_bytes(), &2u16.to_ne_bytes()];
        assert_eq!(batch.bytes[16..24], nested.concat());
        assert_eq!(batch.bytes[24..28], *b"ab\0\0");
        assert_eq!(batch.bytes[32..36], [0, 0, 0, 7]);
    }

    #[test]
    fn attributes_are_found_again() {
        let mut batch = Batch::default();
        batch.request(0x10, 0, &[], |a| {
            a.put_name(2, "ab");
            a.put_be32(3, 7);
        });
        let found = attributes(&batch.bytes[HEADER..]);
        assert_eq!(found[&2], b"ab\0");
        assert_eq!(found[&3], [0, 0, 0, 7]);
        assert_eq!(attributes(&batch.bytes[HEADER..HEADER + 10]).len(), 1);
        assert_eq!(attributes(&[0; 7]).len(), 1);
    }

    #[test]
    fn answers_of_a_torn_datagram() {
        let mut one = [0; 20];
        one[..4].copy_from_slice(&20u32.to_ne_bytes());
        one[4..6].copy_from_slice(&NLMSG_ERROR.to_ne_bytes());
        one[16..20].copy_from_slice(&(-17i32).to_ne_bytes());
        let two = [&one[..], &one[..]].concat();
        assert_eq!(answers(&two), [-17, -17]);
        assert_eq!(answers(&two[..30]), [-17]);
        assert_eq!(answers(&[0; 16]), [0; 0]);
    }
}
