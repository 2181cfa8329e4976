//! UDP sockets: who they speak to, and how.

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;

use crate::kernel::sys;
use crate::stage::{Check, Fallible, Setup, Stage, same};

pub const WORKLOADS: &[(&str, Setup)] = &[("udp-bound", bound), ("udp-connected", connected), ("udp-options", options)];

fn text<T>(outcome: std::io::Result<T>) -> Fallible<T> {
    outcome.map_err(|e| e.to_string())
}

fn exchange(from: &UdpSocket, to: &UdpSocket, at: Option<SocketAddr>) -> Fallible {
    text(match at {
        Some(at) => from.send_to(b"datagram", at),
        None => from.send(b"datagram"),
    })?;
    let mut room = [0; 20];
    let (length, sender) = text(to.recv_from(&mut room))?;
    same("datagram", &b"datagram"[..], &room[..length])?;
    same("sender", text(from.local_addr())?.port(), sender.port())
}

/// Bound to an address, to all of them, to none; of both families.
fn bound(_: &mut Stage) -> Fallible<Check> {
    let addresses = ["127.0.0.1:0", "0.0.0.0:0", "[::1]:0"];
    let sockets = addresses.map(UdpSocket::bind).into_iter().map(text).collect::<Fallible<Vec<_>>>()?;
    let unbound = sys!(socket(libc::AF_INET, libc::SOCK_DGRAM, 0))? as i32;
    let names = move |sockets: &[UdpSocket]| sockets.iter().map(|s| text(s.local_addr())).collect::<Fallible<Vec<_>>>();
    let before = names(&sockets)?;
    Ok(Box::new(move || {
        same("names", &before, &names(&sockets)?)?;
        exchange(&sockets[1], &sockets[0], Some(before[0]))?;
        exchange(&sockets[2], &sockets[2], Some(before[2]))?;
        let mut name: libc::sockaddr_in = unsafe { std::mem::zeroed() };
        let mut length = size_of_val(&name) as u32;
        sys!(getsockname(unbound, (&raw mut name).cast(), &raw mut length))?;
        same("port of the unbound", 0, name.sin_port)
    }))
}

/// Connected to each other; one of them hears nobody else.
fn connected(_: &mut Stage) -> Fallible<Check> {
    let [a, b, stranger] = [(); 3].map(|()| UdpSocket::bind("127.0.0.1:0"));
    let (a, b, stranger) = (text(a)?, text(b)?, text(stranger)?);
    let at = |s: &UdpSocket| text(s.local_addr());
    text(a.connect(at(&b)?))?;
    text(b.connect(at(&a)?))?;
    text(b.set_nonblocking(true))?;
    Ok(Box::new(move || {
        same("peer", at(&b)?, text(a.peer_addr())?)?;
        text(stranger.send_to(b"stranger", at(&b)?))?;
        same("nobody else is heard", true, b.recv(&mut [0; 20]).is_err())?;
        exchange(&a, &b, None)?;
        exchange(&b, &a, None)
    }))
}

/// Options that only datagrams have.
fn options(_: &mut Stage) -> Fallible<Check> {
    let socket = text(UdpSocket::bind("0.0.0.0:0"))?;
    text(socket.set_broadcast(true))?;
    text(socket.set_multicast_ttl_v4(7))?;
    text(socket.set_multicast_loop_v4(false))?;
    text(socket.set_ttl(33))?;
    let fd = socket.as_raw_fd();
    let set = |level, name, value: i32| sys!(setsockopt(fd, level, name, (&raw const value).cast(), 4));
    set(libc::IPPROTO_IP, libc::IP_PKTINFO, 1)?;
    set(libc::SOL_SOCKET, libc::SO_RCVBUF, 30000)?;
    let get = move |level, name| -> Fallible<i32> {
        let (mut value, mut length) = (0i32, 4u32);
        sys!(getsockopt(fd, level, name, (&raw mut value).cast(), &raw mut length))?;
        Ok(value)
    };
    Ok(Box::new(move || {
        same("broadcast", true, text(socket.broadcast())?)?;
        same("multicast", (7, false), (text(socket.multicast_ttl_v4())?, text(socket.multicast_loop_v4())?))?;
        same("ttl", 33, text(socket.ttl())?)?;
        same("packet information", 1, get(libc::IPPROTO_IP, libc::IP_PKTINFO)?)?;
        same("buffer", 60000, get(libc::SOL_SOCKET, libc::SO_RCVBUF)?)
    }))
}
