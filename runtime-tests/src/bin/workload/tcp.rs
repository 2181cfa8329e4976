//! TCP: sockets that listen, and connections within the container and to the outside.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::time::Duration;

use crate::kernel::{noise, sys};
use crate::stage::{Check, Fallible, Setup, Stage, holds, same};

pub const WORKLOADS: &[(&str, Setup)] = &[
    ("tcp-listen", listen),
    ("tcp-listen-6", listen_6),
    ("tcp-listen-shared", listen_shared),
    ("tcp-loopback", loopback),
    ("tcp-loopback-6", loopback_6),
    ("tcp-loopback-full", loopback_full),
    ("tcp-loopback-half-closed", loopback_half_closed),
    ("tcp-loopback-options", loopback_options),
    ("tcp-loopback-between", loopback_between),
    ("tcp-server", server),
];

fn text(e: std::io::Error) -> String {
    e.to_string()
}

fn option(fd: RawFd, level: i32, name: i32) -> Fallible<i32> {
    let (mut value, mut size) = (0i32, 4u32);
    sys!(getsockopt(fd, level, name, (&raw mut value).cast(), &mut size))?;
    Ok(value)
}

fn set(fd: RawFd, level: i32, name: i32, value: i32) -> Fallible {
    sys!(setsockopt(fd, level, name, (&raw const value).cast(), 4)).map(drop)
}

/// A connection is made to `listener` and carries a greeting both ways.
fn serves(listener: &TcpListener, address: &str) -> Fallible {
    let port = listener.local_addr().map_err(text)?.port();
    let mut client =
        TcpStream::connect(format!("{address}:{port}")).map_err(|e| format!("connect to {address}: {e}"))?;
    let (mut server, _) = listener.accept().map_err(text)?;
    let mut buf = [0; 5];
    client.write_all(b"hello").map_err(text)?;
    server.read_exact(&mut buf).map_err(text)?;
    server.write_all(&buf).map_err(text)?;
    client.read_exact(&mut buf).map_err(text)?;
    same("echo", b"hello", &buf)
}

fn listen(_: &mut Stage) -> Fallible<Check> {
    let any = TcpListener::bind("0.0.0.0:7001").map_err(text)?;
    let local = TcpListener::bind("127.0.0.1:0").map_err(text)?;
    set(local.as_raw_fd(), libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
    set(local.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, 0)?;
    sys!(listen(local.as_raw_fd(), 77))?;
    local.set_nonblocking(true).map_err(text)?;
    let addresses = (any.local_addr().map_err(text)?, local.local_addr().map_err(text)?);
    Ok(Box::new(move || {
        same("addresses", addresses, (any.local_addr().map_err(text)?, local.local_addr().map_err(text)?))?;
        for (listener, keepalive) in [(&any, 0), (&local, 1)] {
            let fd = listener.as_raw_fd();
            same("SO_ACCEPTCONN", 1, option(fd, libc::SOL_SOCKET, libc::SO_ACCEPTCONN)?)?;
            same("SO_REUSEADDR", 1, option(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR)?)?;
            same("SO_KEEPALIVE", keepalive, option(fd, libc::SOL_SOCKET, libc::SO_KEEPALIVE)?)?;
        }
        // TCP_INFO of a listener: tcpi_sacked is its backlog, 28 bytes in.
        let mut info = [0u32; 64];
        let mut size = 256u32;
        sys!(getsockopt(local.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, info.as_mut_ptr().cast(), &mut size))?;
        same("backlog", 77, info[7])?;
        let nobody = local.accept().err().map(|e| e.kind());
        same("accept when nobody calls", Some(std::io::ErrorKind::WouldBlock), nobody)?;
        serves(&any, "127.0.0.1")
    }))
}

/// IPv6 alone, and both families on one socket.
fn listen_6(_: &mut Stage) -> Fallible<Check> {
    let new = |only_6: i32, port: u16| -> Fallible<TcpListener> {
        let fd = sys!(socket(libc::AF_INET6, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0))? as i32;
        set(fd, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, only_6)?;
        let mut address: libc::sockaddr_in6 = unsafe { std::mem::zeroed() };
        address.sin6_family = libc::AF_INET6 as u16;
        address.sin6_port = port.to_be();
        sys!(bind(fd, (&raw const address).cast(), size_of_val(&address) as u32))?;
        sys!(listen(fd, 5))?;
        Ok(unsafe { TcpListener::from_raw_fd(fd) })
    };
    let (only, both) = (new(1, 7002)?, new(0, 7003)?);
    Ok(Box::new(move || {
        let v6only = |l: &TcpListener| option(l.as_raw_fd(), libc::IPPROTO_IPV6, libc::IPV6_V6ONLY);
        same("IPV6_V6ONLY", [1, 0], [v6only(&only)?, v6only(&both)?])?;
        serves(&only, "[::1]")?;
        serves(&both, "[::1]")?;
        serves(&both, "127.0.0.1")?;
        holds(TcpStream::connect("127.0.0.1:7002").is_err(), "a socket for IPv6 alone takes no IPv4")
    }))
}

/// A listener that parent and children accept from, as pre-forking servers do.
fn listen_shared(stage: &mut Stage) -> Fallible<Check> {
    let listener = TcpListener::bind("127.0.0.1:7004").map_err(text)?;
    let fd = listener.as_raw_fd();
    for name in ["a", "b"] {
        stage.member(name, move |_| {
            std::thread::spawn(move || {
                let listener = unsafe { TcpListener::from_raw_fd(fd) };
                while let Ok((mut client, _)) = listener.accept() {
                    let _ = client.write_all(&std::process::id().to_ne_bytes());
                }
            });
            Ok(Box::new(|| Ok(())))
        })?;
    }
    Ok(Box::new(move || {
        let _ = &listener;
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..50 {
            let mut pid = [0; 4];
            TcpStream::connect("127.0.0.1:7004").map_err(text)?.read_exact(&mut pid).map_err(text)?;
            seen.insert(u32::from_ne_bytes(pid));
        }
        holds(!seen.is_empty() && !seen.contains(&1), format!("served by {seen:?}"))
    }))
}

/// A connection of the container with itself.
fn connect(address: &str) -> Fallible<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind(address).map_err(text)?;
    let client = TcpStream::connect(listener.local_addr().map_err(text)?).map_err(text)?;
    let (server, _) = listener.accept().map_err(text)?;
    for end in [&client, &server] {
        end.set_read_timeout(Some(Duration::from_secs(10))).map_err(text)?;
        end.set_write_timeout(Some(Duration::from_secs(10))).map_err(text)?;
    }
    Ok((client, server))
}

fn receives(what: &str, end: &mut TcpStream, expected: &[u8]) -> Fallible {
    let mut got = vec![0; expected.len()];
    end.read_exact(&mut got).map_err(|e| format!("{what}: {e}"))?;
    holds(got == expected, format!("{what}: other bytes than were sent"))
}

/// Content under way in both directions, and a connection that is idle.
fn content(address: &str) -> Fallible<Check> {
    let (mut client, mut server) = connect(address)?;
    let (mut idle_client, mut idle_server) = connect(address)?;
    let names = |stream: &TcpStream| (stream.local_addr().ok(), stream.peer_addr().ok());
    let before = (names(&client), names(&server));
    client.write_all(&noise(1, 30_000)).map_err(text)?;
    server.write_all(&noise(2, 777)).map_err(text)?;
    Ok(Box::new(move || {
        same("addresses", &before, &(names(&client), names(&server)))?;
        receives("bytes for the server", &mut server, &noise(1, 30_000))?;
        receives("bytes for the client", &mut client, &noise(2, 777))?;
        idle_client.write_all(b"awake").map_err(text)?;
        receives("idle connection", &mut idle_server, b"awake")?;
        idle_server.write_all(b"indeed").map_err(text)?;
        receives("idle connection", &mut idle_client, b"indeed")?;
        client.write_all(&noise(1, 30_000)).map_err(text)?;
        server.write_all(&noise(2, 777)).map_err(text)
    }))
}

fn loopback(_: &mut Stage) -> Fallible<Check> {
    content("127.0.0.1:0")
}

fn loopback_6(_: &mut Stage) -> Fallible<Check> {
    content("[::1]:0")
}

/// As much in the queues as they take: both a full receive queue and an unsent one.
fn loopback_full(_: &mut Stage) -> Fallible<Check> {
    let (mut client, mut server) = connect("127.0.0.1:0")?;
    let stuff = |client: &mut TcpStream, seed: u64| -> Fallible<Vec<u8>> {
        let bytes = noise(seed, 16 << 20);
        client.set_nonblocking(true).map_err(text)?;
        let mut sent = 0;
        loop {
            match client.write(&bytes[sent..]) {
                Ok(count) => sent += count,
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(text(e)),
            }
        }
        client.set_nonblocking(false).map_err(text)?;
        Ok(bytes[..sent].to_vec())
    };
    let mut expected = stuff(&mut client, 5)?;
    Ok(Box::new(move || {
        receives("a full queue", &mut server, &expected)?;
        expected = stuff(&mut client, 6)?;
        Ok(())
    }))
}

/// Shut down in one direction: FIN_WAIT2 and CLOSE_WAIT.
fn loopback_half_closed(_: &mut Stage) -> Fallible<Check> {
    let (mut client, mut server) = connect("127.0.0.1:0")?;
    client.write_all(b"the last").map_err(text)?;
    client.shutdown(Shutdown::Write).map_err(text)?;
    let mut expected: &[u8] = b"the last";
    Ok(Box::new(move || {
        receives("what was sent before", &mut server, expected)?;
        expected = b"";
        same("end of file", 0, server.read(&mut [0; 10]).map_err(text)?)?;
        server.write_all(b"the other way").map_err(text)?;
        receives("the other way is open", &mut client, b"the other way")
    }))
}

fn loopback_options(_: &mut Stage) -> Fallible<Check> {
    let (client, server) = connect("127.0.0.1:0")?;
    let fd = client.as_raw_fd();
    let wanted = [
        ("TCP_NODELAY", libc::IPPROTO_TCP, libc::TCP_NODELAY, 1),
        ("TCP_KEEPIDLE", libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 33),
        ("TCP_KEEPINTVL", libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 44),
        ("TCP_KEEPCNT", libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 5),
        ("TCP_USER_TIMEOUT", libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, 123_456),
        ("SO_KEEPALIVE", libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1),
        ("SO_RCVLOWAT", libc::SOL_SOCKET, libc::SO_RCVLOWAT, 2),
        ("IP_TOS", libc::IPPROTO_IP, libc::IP_TOS, 0x10),
        // After IP_TOS, which sets it too.
        ("SO_PRIORITY", libc::SOL_SOCKET, libc::SO_PRIORITY, 3),
    ];
    for (name, level, option, value) in wanted {
        set(fd, level, option, value).map_err(|e| format!("{name}: {e}"))?;
    }
    set(fd, libc::SOL_SOCKET, libc::SO_SNDBUF, 100_000)?;
    set(fd, libc::SOL_SOCKET, libc::SO_RCVBUF, 120_000)?;
    Ok(Box::new(move || {
        let _both_live = (&client, &server);
        for (name, level, number, value) in wanted {
            same(name, value, option(fd, level, number)?)?;
        }
        same("SO_SNDBUF", 200_000, option(fd, libc::SOL_SOCKET, libc::SO_SNDBUF)?)?;
        same("SO_RCVBUF", 240_000, option(fd, libc::SOL_SOCKET, libc::SO_RCVBUF)?)?;
        // MSS and window scaling as they were agreed upon: TCP_INFO's options (5) and scales (6).
        let mut info = [0u8; 232];
        let mut size = 232u32;
        sys!(getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, info.as_mut_ptr().cast(), &mut size))?;
        same("TCP_ESTABLISHED", 1, info[0])?;
        holds(info[5] & 0b111 == 0b111, format!("timestamps, SACK and window scaling: {:#b}", info[5]))
    }))
}

/// One end with the parent, the other with a child that answers.
fn loopback_between(stage: &mut Stage) -> Fallible<Check> {
    let (mut client, server) = connect("127.0.0.1:0")?;
    let fd = server.as_raw_fd();
    let keep = client.as_raw_fd();
    stage.member("child", move |_| {
        sys!(close(keep))?;
        std::thread::spawn(move || {
            let mut server = unsafe { TcpStream::from_raw_fd(fd) };
            let _ = server.set_read_timeout(None);
            let mut byte = [0; 1];
            while server.read_exact(&mut byte).is_ok() && server.write_all(&[byte[0].wrapping_add(1)]).is_ok() {}
        });
        Ok(Box::new(|| Ok(())))
    })?;
    drop(server);
    let mut next = 0u8;
    client.write_all(&[next]).map_err(text)?;
    Ok(Box::new(move || {
        for _ in 0..300 {
            receives("the child's answer", &mut client, &[next.wrapping_add(1)])?;
            next = next.wrapping_add(2);
            client.write_all(&[next]).map_err(text)?;
        }
        Ok(())
    }))
}

/// For clients from outside, port 7000: adds up 8-byte numbers, answering each with the sum so far; to the number
/// 0 it answers with 256 KiB of noise, whether the client reads them or not.
fn server(_: &mut Stage) -> Fallible<Check> {
    let listener = TcpListener::bind("[::]:7000").map_err(text)?;
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            std::thread::spawn(move || count_for(client));
        }
    });
    Ok(Box::new(|| Ok(())))
}

fn count_for(mut client: TcpStream) {
    let mut sum = 0u64;
    let mut number = [0; 8];
    let _ = client.set_nodelay(true);
    while client.read_exact(&mut number).is_ok() {
        let number = u64::from_le_bytes(number);
        sum = sum.wrapping_add(number);
        let answered = match number {
            0 => client.write_all(&noise(1, 256 << 10)),
            _ => client.write_all(&sum.to_le_bytes()),
        };
        if answered.is_err() {
            break;
        }
    }
}
