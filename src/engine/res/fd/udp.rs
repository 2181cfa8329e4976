//! UDP sockets. Datagrams that nobody has received yet are lost, as the network may lose them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use libc::{IPPROTO_IP, IPPROTO_IPV6, IPPROTO_UDP, SOL_SOCKET, c_int};

use super::tcp::{self, Error, Result, call};
use super::{address, sockopts};
use crate::image::records::files::FownEntry;
use crate::image::records::lmrun::{LmrunSockOpt, LmrunSocket};
use crate::image::records::sockets::InetSkEntry;
use crate::sys::sockopt;
use crate::sys::tcp::state;

/// include/uapi/linux/udp.h
const UDP_CORK: c_int = 1;
const UDP_ENCAP: c_int = 100;
const UDP_NO_CHECK6_TX: c_int = 101;
const UDP_NO_CHECK6_RX: c_int = 102;
const UDP_SEGMENT: c_int = 103;
const UDP_GRO: c_int = 104;

/// Options of datagrams that are one int. Those of IPv6 are for such sockets alone.
const OPTIONS: [(c_int, c_int); 17] = [
    (IPPROTO_IP, libc::IP_MULTICAST_TTL),
    (IPPROTO_IP, libc::IP_MULTICAST_LOOP),
    (IPPROTO_IP, libc::IP_MULTICAST_IF),
    (IPPROTO_IP, libc::IP_MULTICAST_ALL),
    (IPPROTO_IP, libc::IP_RECVTOS),
    (IPPROTO_IP, libc::IP_RECVTTL),
    (IPPROTO_IP, libc::IP_RECVORIGDSTADDR),
    (IPPROTO_IPV6, libc::IPV6_MULTICAST_HOPS),
    (IPPROTO_IPV6, libc::IPV6_MULTICAST_LOOP),
    (IPPROTO_IPV6, libc::IPV6_MULTICAST_IF),
    (IPPROTO_IPV6, libc::IPV6_RECVPKTINFO),
    (IPPROTO_IPV6, libc::IPV6_RECVTCLASS),
    (IPPROTO_IPV6, libc::IPV6_RECVHOPLIMIT),
    (IPPROTO_UDP, UDP_NO_CHECK6_TX),
    (IPPROTO_UDP, UDP_NO_CHECK6_RX),
    (IPPROTO_UDP, UDP_SEGMENT),
    (IPPROTO_UDP, UDP_GRO),
];

/// Whether a record is of such a socket.
pub fn is_udp(e: &InetSkEntry) -> bool {
    e.proto == IPPROTO_UDP as u32
}

/// Reads a socket by a duplicate of its descriptor. `id`, `flags` and `fown` are the caller's to fill in.
pub fn facts(fd: BorrowedFd<'_>) -> Result<(InetSkEntry, LmrunSocket)> {
    let int = |level, name| call("getsockopt")(sockopt::get_int(fd, level, name));
    for (name, what) in [(UDP_CORK, "with a datagram that is not complete"), (UDP_ENCAP, "that encapsulates others")] {
        if int(IPPROTO_UDP, name)? != 0 {
            return Err(Error::Unsupported { what: what.into() });
        }
    }
    let family = int(SOL_SOCKET, libc::SO_DOMAIN)?;
    let stat = call("fstat")(nix::sys::stat::fstat(fd))?;
    let local = call("getsockname")(address::sock_name(fd))?;
    let (state, remote) = match address::peer_name(fd) {
        Ok(peer) => (state::ESTABLISHED, peer),
        Err(e) if e.raw_os_error() == Some(libc::ENOTCONN) => (state::CLOSE, address::unspecified(local)),
        Err(e) => return call("SO_PEERNAME")(Err(e)),
    };
    let ifname = match address::scope(local) {
        0 => None,
        scope => Some(call("SIOCGIFNAME")(sockopt::interface_name(fd, scope))?),
    };
    let v6 = family == libc::AF_INET6;
    let mut entry = InetSkEntry {
        id: 0,
        ino: stat.st_ino as u32,
        family: family as u32,
        r#type: libc::SOCK_DGRAM as u32,
        proto: IPPROTO_UDP as u32,
        state,
        src_port: local.port().into(),
        dst_port: remote.port().into(),
        flags: 0,
        backlog: 0,
        src_addr: address::words(local),
        dst_addr: address::words(remote),
        fown: FownEntry::default(),
        opts: sockopts::dump(fd)?,
        v6only: if v6 { Some(int(IPPROTO_IPV6, libc::IPV6_V6ONLY)? != 0) } else { None },
        ip_opts: Some(sockopts::dump_ip(fd)?),
        ifname,
        ns_id: None,
        shutdown: None,
        tcp_opts: None,
    };
    entry.shutdown = tcp::shut_down(fd, &entry)?.map(|how| how as i32);
    let mut more = sockopts::dump_more(fd, stat.st_uid)?;
    for (level, name) in OPTIONS.into_iter().filter(|(level, _)| v6 || *level != IPPROTO_IPV6) {
        // Some are younger than the oldest kernel that we run on.
        if let Ok(value) = sockopt::get_int(fd, level, name) {
            more.options.push(LmrunSockOpt { level: level as u32, name: name as u32, value: value.cast_unsigned() });
        }
    }
    Ok((entry, more))
}

/// Makes a socket, in the network namespace of the calling thread.
pub fn create(entry: &InetSkEntry, more: Option<&LmrunSocket>) -> Result<OwnedFd> {
    let owned = tcp::fresh(entry, more)?;
    let fd = owned.as_fd();
    tcp::restore_reuse(fd, &entry.opts)?;
    let ends = tcp::addresses(fd, entry)?;
    if ends.local.port() != 0 {
        call("bind")(address::bind(fd, ends.local))?;
    }
    if entry.state == state::ESTABLISHED {
        call("connect")(address::connect(fd, ends.remote))?;
    }
    tcp::restore_options(fd, entry, more)?;
    for option in more.iter().flat_map(|more| &more.options) {
        let (level, name) = (option.level as c_int, option.name as c_int);
        // Set only where it is not the default: some cannot be set to that.
        if OPTIONS.contains(&(level, name))
            && sockopt::get_int(fd, level, name).ok() != Some(option.value.cast_signed())
        {
            call("setsockopt")(sockopt::set_int(fd.as_fd(), level, name, option.value.cast_signed()))?;
        }
    }
    sockopts::restore_buffer_locks(fd, &entry.opts)?;
    tcp::restore_shutdown(fd, entry)?;
    Ok(owned)
}
