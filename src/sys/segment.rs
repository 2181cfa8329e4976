//! TCP segments made by hand and sent by raw sockets (raw(7), RFC 9293).

use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, sendto, socket,
};

use super::netns;

/// A segment without data, with ACK set. IPv4 addresses mapped into IPv6 travel as IPv4.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    pub from: SocketAddr,
    pub to: SocketAddr,
    pub seq: u32,
    pub ack: u32,
    /// As in the header: the receive window shifted by the scale of the sender.
    pub window: u16,
    /// The sender has nothing more to say.
    pub fin: bool,
    /// TSval; TSecr is 0.
    pub timestamp: Option<u32>,
}

const IPPROTO_TCP: u8 = 6;
const FLAG_FIN: u8 = 0x01;
const FLAG_ACK: u8 = 0x10;

impl Segment {
    /// IP header and TCP header. None if the addresses are of two families.
    fn packet(&self) -> Option<Vec<u8>> {
        let tcp = self.header();
        let len = tcp.len() as u16;
        let (mut packet, addresses) = match (self.from.ip().to_canonical(), self.to.ip().to_canonical()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                // Version, header of 5 words, TOS, length, id, fragment, TTL, protocol, checksum (by the kernel).
                let [high, low] = (20 + len).to_be_bytes();
                let fixed = [0x45, 0, high, low, 0, 0, 0, 0, 64, IPPROTO_TCP, 0, 0];
                ([&fixed[..], &from.octets(), &to.octets()].concat(), 12)
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                // Version, class, flow label, length, next header, hop limit.
                let [high, low] = len.to_be_bytes();
                let fixed = [0x60, 0, 0, 0, high, low, IPPROTO_TCP, 64];
                ([&fixed[..], &from.octets(), &to.octets()].concat(), 8)
            }
            _ => return None,
        };
        let pseudo = [&packet[addresses..], &[0, IPPROTO_TCP], &len.to_be_bytes()].concat();
        let sum = checksum(&pseudo, &tcp);
        packet.extend_from_slice(&tcp);
        let at = packet.len() - tcp.len() + 16;
        packet[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        Some(packet)
    }

    /// The TCP header, its checksum 0.
    fn header(&self) -> Vec<u8> {
        let mut tcp = Vec::with_capacity(32);
        tcp.extend_from_slice(&self.from.port().to_be_bytes());
        tcp.extend_from_slice(&self.to.port().to_be_bytes());
        tcp.extend_from_slice(&self.seq.to_be_bytes());
        tcp.extend_from_slice(&self.ack.to_be_bytes());
        let words: u8 = if self.timestamp.is_some() { 8 } else { 5 };
        tcp.extend_from_slice(&[words << 4, FLAG_ACK | if self.fin { FLAG_FIN } else { 0 }]);
        tcp.extend_from_slice(&self.window.to_be_bytes());
        // Checksum, urgent pointer.
        tcp.extend_from_slice(&[0; 4]);
        if let Some(value) = self.timestamp {
            // Two NOPs to align, then kind 8 of length 10.
            tcp.extend_from_slice(&[1, 1, 8, 10]);
            tcp.extend_from_slice(&value.to_be_bytes());
            tcp.extend_from_slice(&[0; 4]);
        }
        tcp
    }
}

/// The checksum of RFC 9293 over the pseudo header and the header, both of even length.
fn checksum(pseudo: &[u8], tcp: &[u8]) -> u16 {
    let words = pseudo.as_chunks::<2>().0.iter().chain(tcp.as_chunks::<2>().0);
    let mut sum: u32 = words.map(|w| u32::from(u16::from_be_bytes(*w))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// Raw sockets of one network namespace.
#[derive(Debug)]
pub struct RawTcp {
    ip: OwnedFd,
    /// None where the kernel has no IPv6.
    ip6: Option<OwnedFd>,
}

impl RawTcp {
    /// Opens the sockets in `netns`, an open `/proc/PID/ns/net`; needs CAP_NET_RAW there.
    pub fn open(netns: BorrowedFd<'_>) -> io::Result<Self> {
        let raw = |family| socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw);
        netns::within(netns, || {
            let ip = raw(AddressFamily::Inet)?;
            let ip6 = match raw(AddressFamily::Inet6) {
                Ok(socket) => Some(socket),
                Err(Errno::EAFNOSUPPORT) => None,
                Err(e) => return Err(e.into()),
            };
            Ok(Self { ip, ip6 })
        })?
    }

    /// Sends the segment by the namespace's routes. One whose destination is local is received here.
    pub fn send(&self, segment: &Segment) -> io::Result<()> {
        let packet = segment.packet().ok_or(io::ErrorKind::InvalidInput)?;
        // A raw socket wants no port.
        match (segment.to.ip().to_canonical(), segment.to) {
            (IpAddr::V4(ip), _) => {
                let to = SockaddrIn::from(SocketAddrV4::new(ip, 0));
                sendto(self.ip.as_raw_fd(), &packet, &to, MsgFlags::empty())?;
            }
            (IpAddr::V6(ip), to) => {
                let scope = if let SocketAddr::V6(to) = to { to.scope_id() } else { 0 };
                let to = SockaddrIn6::from(SocketAddrV6::new(ip, 0, 0, scope));
                let socket = self.ip6.as_ref().ok_or(io::ErrorKind::Unsupported)?;
                sendto(socket.as_raw_fd(), &packet, &to, MsgFlags::empty())?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(from: &str, to: &str) -> Segment {
        let (from, to) = (from.parse().unwrap(), to.parse().unwrap());
        Segment { from, to, seq: 1, ack: 2, window: 3, fin: false, timestamp: Some(4) }
    }

    #[test]
    fn checksums_add_up() {
        let p = segment("10.0.0.1:80", "[::ffff:10.0.0.2]:81").packet().unwrap();
        assert_eq!(p.len(), 52);
        assert_eq!(checksum(&[&p[12..20], &[0, 6, 0, 32]].concat(), &p[20..]), 0);
        let p = segment("[fd00::1]:80", "[fd00::2]:81").packet().unwrap();
        assert_eq!(p.len(), 72);
        assert_eq!(checksum(&[&p[8..40], &[0, 6, 0, 32]].concat(), &p[40..]), 0);
        assert_eq!(segment("10.0.0.1:80", "[fd00::2]:81").packet(), None);
    }
}
