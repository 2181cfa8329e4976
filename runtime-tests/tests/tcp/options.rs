//! What a process has set up: options, listening and unconnected sockets.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use libc::{IPPROTO_IP, IPPROTO_IPV6, IPPROTO_TCP, SOL_SOCKET, c_int};
use lmrun::engine::res::fd::tcp::{self, Facts, Kind};
use lmrun::engine::res::fd::{address, tcp_stream};
use lmrun::sys::segment::RawTcp;
use lmrun::sys::sockopt::{get_int, set_bytes, set_int, set_words};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::able;
use crate::moves::{connected, move_connection};
use crate::net::{HERE, PEER, Triangle};

/// Options and values that are not the defaults.
const SET: [(c_int, c_int, c_int); 23] = [
    (SOL_SOCKET, libc::SO_REUSEADDR, 1),
    (SOL_SOCKET, libc::SO_KEEPALIVE, 1),
    (SOL_SOCKET, libc::SO_OOBINLINE, 1),
    (SOL_SOCKET, libc::SO_SNDBUF, 100_000),
    (SOL_SOCKET, libc::SO_RCVBUF, 90_000),
    (SOL_SOCKET, libc::SO_MARK, 17),
    (SOL_SOCKET, libc::SO_RCVLOWAT, 3),
    (SOL_SOCKET, libc::SO_TIMESTAMPNS, 1),
    (IPPROTO_IP, libc::IP_TOS, 0x10),
    (SOL_SOCKET, libc::SO_PRIORITY, 4),
    (IPPROTO_IP, libc::IP_TTL, 77),
    (IPPROTO_IP, libc::IP_MTU_DISCOVER, 0),
    (IPPROTO_TCP, libc::TCP_NODELAY, 1),
    (IPPROTO_TCP, libc::TCP_KEEPIDLE, 111),
    (IPPROTO_TCP, libc::TCP_KEEPINTVL, 22),
    (IPPROTO_TCP, libc::TCP_KEEPCNT, 7),
    (IPPROTO_TCP, libc::TCP_USER_TIMEOUT, 12345),
    (IPPROTO_TCP, libc::TCP_LINGER2, 9),
    (IPPROTO_TCP, libc::TCP_SYNCNT, 3),
    (IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, 16384),
    (IPPROTO_TCP, libc::TCP_INQ, 1),
    (IPPROTO_TCP, libc::TCP_SAVE_SYN, 1),
    (IPPROTO_TCP, libc::TCP_THIN_LINEAR_TIMEOUTS, 1),
];

fn set_up(fd: BorrowedFd<'_>) {
    for (level, name, value) in SET {
        set_int(fd, level, name, value).unwrap_or_else(|e| panic!("{level}/{name}: {e}"));
    }
    set_words(fd, SOL_SOCKET, libc::SO_LINGER, &[1, 5]).unwrap();
    set_bytes(fd, SOL_SOCKET, libc::SO_RCVTIMEO, &[2u64.to_ne_bytes(), 500_000u64.to_ne_bytes()].concat()).unwrap();
    set_bytes(fd, IPPROTO_TCP, libc::TCP_CONGESTION, b"reno").unwrap();
}

/// All but what identifies the socket and what the kernel tunes by itself.
fn comparable(mut facts: Facts) -> Facts {
    facts.entry.ino = 0;
    facts.pending = 0;
    facts.more.options.retain(|o| (o.level, o.name) != (IPPROTO_TCP as u32, libc::TCP_WINDOW_CLAMP as u32));
    facts
}

#[test]
fn of_a_connection() {
    if !able() {
        return;
    }
    for address in HERE {
        let net = Triangle::new();
        let (_listener, here, mut peer) = connected(&net, address, address);
        set_up(here.as_fd());
        if address == HERE[1] {
            set_int(here.as_fd(), IPPROTO_IPV6, libc::IPV6_TCLASS, 0x20).unwrap();
            set_int(here.as_fd(), IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS, 33).unwrap();
        }
        let before = comparable(tcp::facts(here.as_fd()).unwrap());
        let moved = move_connection(&net, here, Duration::ZERO);
        let after = comparable(tcp::facts(moved.socket.as_fd()).unwrap());
        assert_eq!(before, after);
        peer.write_all(b"on we go").unwrap();
        TcpStream::from(moved.socket).read_exact(&mut [0; 8]).unwrap();
    }
}

/// The buffers of a connection for which the process has chosen no size go on growing.
#[test]
fn buffers_stay_tuned_by_the_kernel() {
    if !able() {
        return;
    }
    let net = Triangle::new();
    let (_listener, here, _peer) = connected(&net, HERE[0], HERE[0]);
    let before = tcp::facts(here.as_fd()).unwrap().entry.opts;
    let moved = move_connection(&net, here, Duration::ZERO);
    let after = tcp::facts(moved.socket.as_fd()).unwrap().entry.opts;
    assert_eq!(before.so_buf_lock, Some(0));
    assert_eq!(before, after);
}

#[test]
fn of_a_listening_socket() {
    if !able() {
        return;
    }
    for (address, only) in [("10.88.0.1", None), ("::", Some(0)), ("::", Some(1)), ("fd88::1", None)] {
        // Namespaces of its own: a child that another test makes just now has the last listener until its exec.
        let net = Triangle::new();
        let listener = net.a.run(|| TcpListener::bind((address, 7000)).unwrap());
        set_up(listener.as_fd());
        set_int(listener.as_fd(), IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, 3).unwrap();
        set_int(listener.as_fd(), IPPROTO_TCP, libc::TCP_FASTOPEN, 9).unwrap();
        nix::unistd::fchown(listener.as_fd(), Some(1000.into()), None).unwrap();
        let old = if let Some(only) = only { unbound_v6(&net, only) } else { listener.into() };
        let before = comparable(tcp::facts(old.as_fd()).unwrap());
        assert_eq!(before.kind, Kind::Listening);
        // The kernel sets it by itself when the address is a particular one.
        let expected = address.contains(':').then_some(only != Some(0));
        assert_eq!(before.entry.v6only, expected);
        drop(old);
        let new = net.c.run(|| tcp::create_listening(&before.entry, Some(&before.more)).unwrap());
        assert_eq!(before, comparable(tcp::facts(new.as_fd()).unwrap()));
    }
}

fn unbound_v6(net: &Triangle, only: c_int) -> OwnedFd {
    net.a.run(|| {
        let family = AddressFamily::Inet6;
        let new = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
        set_int(new.as_fd(), IPPROTO_IPV6, libc::IPV6_V6ONLY, only).unwrap();
        address::bind(new.as_fd(), "[::]:7001".parse().unwrap()).unwrap();
        nix::sys::socket::listen(&new, nix::sys::socket::Backlog::new(17).unwrap()).unwrap();
        new
    })
}

/// The listener comes back while connections have its port, and takes new ones.
#[test]
fn a_listener_beside_its_connections() {
    if !able() {
        return;
    }
    for reuse in [0, 1] {
        for listener_first in [true, false] {
            let net = Triangle::new();
            let (listener, here, peer) = connected(&net, HERE[0], HERE[0]);
            set_int(listener.as_fd(), SOL_SOCKET, libc::SO_REUSEADDR, reuse).unwrap();
            let facts = tcp::facts(listener.as_fd()).unwrap();
            assert_eq!(facts.pending, 0);
            drop(listener);
            let create = || net.c.run(|| tcp::create_listening(&facts.entry, Some(&facts.more)).unwrap());
            // Before its connections are live, or while they have SO_REUSEADDR.
            let early = listener_first.then(create);
            let moved = move_connection(&net, here, Duration::ZERO);
            let listener = TcpListener::from(early.unwrap_or_else(create));
            let again = get_int(listener.as_fd(), SOL_SOCKET, libc::SO_REUSEADDR).unwrap();
            assert_eq!(again, reuse);
            let another = net.b.run(|| TcpStream::connect(peer.peer_addr().unwrap()).unwrap());
            listener.accept().unwrap();
            drop((moved, another));
        }
    }
}

#[test]
fn of_a_socket_without_connection() {
    if !able() {
        return;
    }
    let net = Triangle::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        for bound in [false, true] {
            let old = net.a.run(|| {
                let new = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
                if bound {
                    let any = if family == AddressFamily::Inet { "0.0.0.0:7002" } else { "[::]:7002" };
                    address::bind(new.as_fd(), any.parse().unwrap()).unwrap();
                }
                new
            });
            set_up(old.as_fd());
            let before = comparable(tcp::facts(old.as_fd()).unwrap());
            assert_eq!(before.kind, Kind::Unconnected);
            drop(old);
            let new = net.c.run(|| tcp::create_unconnected(&before.entry, Some(&before.more)).unwrap());
            assert_eq!(before, comparable(tcp::facts(new.as_fd()).unwrap()));
        }
    }
}

/// A connection that was reset is over after the restore as well.
#[test]
fn of_a_connection_that_has_ended() {
    if !able() {
        return;
    }
    let net = Triangle::new();
    let (_listener, here, peer) = connected(&net, HERE[0], HERE[0]);
    set_words(peer.as_fd(), SOL_SOCKET, libc::SO_LINGER, &[1, 0]).unwrap();
    drop(peer);
    std::thread::sleep(Duration::from_millis(50));
    let facts = tcp::facts(here.as_fd()).unwrap();
    assert_eq!(facts.kind, Kind::Unconnected);
    let new = net.c.run(|| tcp::create_unconnected(&facts.entry, Some(&facts.more)).unwrap());
    let mut new = TcpStream::from(new);
    assert_eq!(new.read(&mut [0; 8]).unwrap(), 0);
    assert_eq!(new.write(b"x").unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
}

/// A connection that was asked for is asked for again, and a process that waits for it gets it.
#[test]
fn of_a_connection_that_is_not_answered_yet() {
    if !able() {
        return;
    }
    for peer_ip in PEER {
        let net = Triangle::new();
        let peer = SocketAddr::new(peer_ip.parse().unwrap(), 9000);
        let old = net.a.run(|| {
            let family = if peer.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let new = socket(family, SockType::Stream, flags, None).unwrap();
            // No route back: nobody answers.
            net.b.command("ip", "link set to-a down");
            let _ = address::connect(new.as_fd(), peer);
            new
        });
        set_int(old.as_fd(), IPPROTO_TCP, libc::TCP_NODELAY, 1).unwrap();
        let mut facts = tcp::facts(old.as_fd()).unwrap();
        assert_eq!(facts.kind, Kind::Connecting);
        assert_eq!(tcp::connection(&facts.entry).unwrap().remote, peer);
        assert_eq!(tcp_stream::read(old.as_fd(), &mut facts.entry).unwrap(), None);
        drop(old);
        net.route("to-c");
        let listener = net.b.run(|| TcpListener::bind(peer).unwrap());
        let raw = RawTcp::open(net.c.fd()).unwrap();
        let silent = net.c.run(|| tcp_stream::create_connecting(&facts.entry, Some(&facts.more)).unwrap());
        let mut here = TcpStream::from(silent.go_live(&raw).unwrap());
        let (mut there, from) = listener.accept().unwrap();
        assert_eq!(from, tcp::connection(&facts.entry).unwrap().local);
        there.write_all(b"welcome").unwrap();
        here.read_exact(&mut [0; 7]).unwrap();
        assert_eq!(get_int(here.as_fd(), IPPROTO_TCP, libc::TCP_NODELAY).unwrap(), 1);
    }
}

/// More is unsent than the process would be allowed to add.
#[test]
fn unsent_data_above_the_low_water_mark() {
    if !able() {
        return;
    }
    let net = Triangle::new();
    let (_listener, mut here, peer) = connected(&net, HERE[0], HERE[0]);
    here.set_nonblocking(true).unwrap();
    let mut sent = 0;
    while let Ok(n) = here.write(&[7; 65536]) {
        sent += n;
    }
    set_int(here.as_fd(), IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, 4096).unwrap();
    let moved = move_connection(&net, here, Duration::ZERO);
    assert!(moved.stream.entry.unsq_len.unwrap() > 16384);
    assert_eq!(get_int(moved.socket.as_fd(), IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT).unwrap(), 4096);
    TcpStream::from(moved.socket).shutdown(std::net::Shutdown::Write).unwrap();
    let mut received = Vec::new();
    (&peer).read_to_end(&mut received).unwrap();
    assert_eq!(received, vec![7; sent]);
}
