//! Addresses of internet sockets, in the kernel and in `inet_sk_entry`.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::sys::socket::{self, SockaddrIn, SockaddrIn6, SockaddrLike, SockaddrStorage, getsockname};

use crate::image::records::sockets::InetSkEntry;
use crate::sys::sockopt;

/// include/uapi/asm-generic/socket.h.
const SO_PEERNAME: libc::c_int = 28;

/// The socket's own address.
pub fn sock_name(fd: BorrowedFd<'_>) -> io::Result<SocketAddr> {
    let storage = getsockname::<SockaddrStorage>(fd.as_raw_fd())?;
    match (storage.as_sockaddr_in(), storage.as_sockaddr_in6()) {
        (Some(a), _) => Ok(SocketAddrV4::from(*a).into()),
        (_, Some(a)) => Ok(SocketAddrV6::from(*a).into()),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// The address that the socket is connected to, or is about to: getpeername(2) gives the former only.
pub fn peer_name(fd: BorrowedFd<'_>) -> io::Result<SocketAddr> {
    let mut buf = [0; 28];
    // A struct sockaddr_in or sockaddr_in6; the kernel wants its exact length.
    let family = sockopt::get_int(fd, libc::SOL_SOCKET, libc::SO_DOMAIN)?;
    let buf = if family == libc::AF_INET { &mut buf[..16] } else { &mut buf[..] };
    sockopt::get_bytes(fd, libc::SOL_SOCKET, SO_PEERNAME, buf)?;
    let port = u16::from_be_bytes([buf[2], buf[3]]);
    match (buf.get(8..24), buf.get(24..28)) {
        (Some(ip), Some(scope)) => {
            let ip: [u8; 16] = std::array::from_fn(|i| ip[i]);
            let scope = u32::from_ne_bytes(std::array::from_fn(|i| scope[i]));
            Ok(SocketAddrV6::new(ip.into(), port, 0, scope).into())
        }
        _ => Ok(([buf[4], buf[5], buf[6], buf[7]], port).into()),
    }
}

/// bind(2).
pub fn bind(fd: BorrowedFd<'_>, address: SocketAddr) -> io::Result<()> {
    with_sockaddr(address, |a| socket::bind(fd.as_raw_fd(), a))
}

/// connect(2).
pub fn connect(fd: BorrowedFd<'_>, address: SocketAddr) -> io::Result<()> {
    with_sockaddr(address, |a| socket::connect(fd.as_raw_fd(), a))
}

fn with_sockaddr(address: SocketAddr, call: impl FnOnce(&dyn SockaddrLike) -> nix::Result<()>) -> io::Result<()> {
    match address {
        SocketAddr::V4(a) => call(&SockaddrIn::from(a))?,
        SocketAddr::V6(a) => call(&SockaddrIn6::from(a))?,
    }
    Ok(())
}

/// The scope (index of an interface) of a link-local address; 0 if it is none.
pub fn scope(address: SocketAddr) -> u32 {
    match address {
        SocketAddr::V4(_) => 0,
        SocketAddr::V6(a) => a.scope_id(),
    }
}

/// No address and no port, in the family of another one.
pub fn unspecified(like: SocketAddr) -> SocketAddr {
    match like {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    }
}

/// An address as the record has it: its bytes as they are, in words.
pub fn words(address: SocketAddr) -> Vec<u32> {
    let word = |bytes: &[u8; 4]| u32::from_ne_bytes(*bytes);
    match address {
        SocketAddr::V4(a) => vec![word(&a.ip().octets())],
        SocketAddr::V6(a) => a.ip().octets().as_chunks().0.iter().map(word).collect(),
    }
}

/// The socket's own address in a record, without a scope; no address is the unspecified one, None a malformed one.
pub fn local(entry: &InetSkEntry) -> Option<SocketAddr> {
    endpoint(entry.family, &entry.src_addr, entry.src_port)
}

/// The peer's address in a record, without a scope; None if it is malformed.
pub fn remote(entry: &InetSkEntry) -> Option<SocketAddr> {
    endpoint(entry.family, &entry.dst_addr, entry.dst_port)
}

fn endpoint(family: u32, words: &[u32], port: u32) -> Option<SocketAddr> {
    let port = u16::try_from(port).ok()?;
    let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
    match family as libc::c_int {
        libc::AF_INET if words.is_empty() => Some((Ipv4Addr::UNSPECIFIED, port).into()),
        libc::AF_INET6 if words.is_empty() => Some((Ipv6Addr::UNSPECIFIED, port).into()),
        libc::AF_INET => Some((<[u8; 4]>::try_from(bytes).ok()?, port).into()),
        libc::AF_INET6 => Some((<[u8; 16]>::try_from(bytes).ok()?, port).into()),
        _ => None,
    }
}

/// The address with a scope, if it is one of those that need it: fe80::/10.
pub fn scoped(address: SocketAddr, scope: u32) -> SocketAddr {
    match address {
        SocketAddr::V6(a) if a.ip().is_unicast_link_local() => {
            SocketAddrV6::new(*a.ip(), a.port(), a.flowinfo(), scope).into()
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_go_through_the_record() {
        for (text, family) in [("10.1.2.3:80", libc::AF_INET), ("[fd00::7]:8080", libc::AF_INET6)] {
            let address: SocketAddr = text.parse().unwrap();
            let there = words(address);
            assert_eq!(endpoint(family as u32, &there, 65536), None);
            let back = endpoint(family as u32, &there, address.port().into());
            assert_eq!(back, Some(address));
            assert_eq!(endpoint(family as u32, &[there, vec![0]].concat(), 80), None);
        }
        assert_eq!(words("1.0.0.0:1".parse().unwrap()), [u32::from_ne_bytes([1, 0, 0, 0])]);
    }
}
