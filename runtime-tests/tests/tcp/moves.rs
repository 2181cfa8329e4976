//! Sockets that go from one namespace to another.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use lmrun::engine::netlock::Nft;
use lmrun::engine::res::fd::tcp::{self, Facts, Kind};
use lmrun::engine::res::fd::tcp_stream::{self, Stream};
use lmrun::sys::segment::RawTcp;
use lmrun::sys::tcp::max_segment;

use crate::able;
use crate::net::{HERE, Triangle};
use crate::stream::{End, Peer, settle};

const PORT: u16 = 7788;

/// A connection from `b` to the container in `a`: the container's end and the peer's.
pub fn connected(net: &Triangle, listen_on: &str, connect_to: &str) -> (TcpListener, TcpStream, TcpStream) {
    let listener = net.a.run(|| TcpListener::bind((listen_on, PORT)).expect("bind"));
    let peer = net.b.run(|| TcpStream::connect((connect_to, PORT)).expect("connect"));
    let (here, _) = listener.accept().expect("accept");
    (listener, here, peer)
}

pub struct Moved {
    pub stream: Stream,
    pub socket: OwnedFd,
}

/// Moves a connection from `a` to `c`, as the engine does: lock late, read, make, switch, go live.
pub fn move_connection(net: &Triangle, socket: impl Into<OwnedFd>, frozen: Duration) -> Moved {
    let old: OwnedFd = socket.into();
    let segment = max_segment(old.as_fd()).expect("mss");
    let mut facts = tcp::facts(old.as_fd()).expect("facts");
    assert_eq!(facts.kind, Kind::Connected);
    let connection = tcp::connection(&facts.entry).expect("connection");
    let (nft, raw) = (Nft::open(net.a.fd()).expect("nft"), RawTcp::open(net.c.fd()).expect("raw"));
    std::thread::sleep(frozen);
    let start = Instant::now();
    let lock = nft.lock("net-move", &[connection]).expect("lock");
    let locked = start.elapsed();
    let stream = tcp_stream::read(old.as_fd(), &mut facts.entry).expect("stream").expect("open");
    tcp_stream::silence(old.as_fd()).expect("silence");
    let read = start.elapsed();
    let silent = net.c.run(|| tcp_stream::create(&facts.entry, Some(&facts.more), stream.clone()).expect("create"));
    let made = start.elapsed();
    net.route("to-c");
    let switched = start.elapsed();
    let socket = silent.go_live(&raw).expect("go live");
    println!(
        "lock {locked:?} read {:?} make {:?} live {:?}; in {} out {} unsent {}",
        read - locked,
        made - read,
        start.elapsed() - switched,
        stream.inq.len(),
        stream.outq.len(),
        stream.entry.unsq_len.unwrap()
    );
    assert_eq!(max_segment(socket.as_fd()).expect("mss"), segment);
    drop(old);
    drop(lock);
    Moved { stream, socket }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Queues {
    AsTheyCome,
    /// The peer sends and nobody reads.
    FullReceive,
    /// The peer reads nothing: its window is closed.
    Unsent,
    /// What was sent is lost on its way.
    Unacked,
}

fn stream_survives(listen_on: &str, connect_to: &str, queues: Queues) {
    if !able() {
        return;
    }
    let net = Triangle::new();
    let (_listener, here, there) = connected(&net, listen_on, connect_to);
    let mut here = End::new(here);
    let peer = Peer::start(there);
    here.pump(Duration::from_millis(100));
    let mut loss = None;
    match queues {
        Queues::AsTheyCome => {}
        Queues::FullReceive => std::thread::sleep(Duration::from_millis(300)),
        Queues::Unsent => {
            peer.receives(false);
            let mut refused = 0;
            while refused < 50 {
                refused = if here.send(8000) == 0 { refused + 1 } else { 0 };
                std::thread::sleep(Duration::from_micros(500));
            }
        }
        Queues::Unacked => {
            peer.sends(false);
            std::thread::sleep(Duration::from_millis(100));
            while here.receive() != Some(0) {}
            let connection = tcp::connection(&tcp::facts(here.socket.as_fd()).expect("facts").entry).unwrap();
            loss = Some(Nft::open(net.b.fd()).unwrap().lock("net-loss", &[connection]).expect("loss"));
            std::thread::sleep(Duration::from_millis(20));
            here.send(8000);
            here.send(500_000);
        }
    }
    let moved = move_connection(&net, here.socket.try_clone().unwrap(), Duration::ZERO);
    let (unsent, outq) = (moved.stream.entry.unsq_len.unwrap() as usize, moved.stream.outq.len());
    match queues {
        Queues::AsTheyCome => {}
        Queues::FullReceive => assert!(moved.stream.inq.len() > 65536),
        Queues::Unsent => assert!(unsent > 65536),
        Queues::Unacked => assert!(outq - unsent >= 8000, "{outq} {unsent}"),
    }
    here.moved_to(moved.socket.into());
    drop(loss);
    peer.receives(true);
    peer.sends(true);
    // What was really lost is sent again after a second, or after two: the restored socket knows no round-trip time, and
    // where all of it had been sent the kernel's first try is a tail loss probe, whose answer tells it nothing.
    here.pump(Duration::from_millis(if queues == Queues::Unacked { 1500 } else { 300 }));
    let before = here.progress();
    here.pump(Duration::from_millis(300));
    let after = here.progress();
    println!("after the move: {} and {} bytes in 300 ms", after.0 - before.0, after.1 - before.1);
    // How soon what was lost is sent again is the kernel's affair; that nothing is missing is seen below.
    assert!(after.0 > before.0 || queues == Queues::Unacked, "the stream goes out");
    assert!(after.1 > before.1, "the stream comes in");
    let mut there = peer.stop();
    settle(&mut here, &mut there);
}

#[test]
fn ipv4_stream() {
    stream_survives(HERE[0], HERE[0], Queues::AsTheyCome);
}

#[test]
fn ipv4_full_receive_queue() {
    stream_survives(HERE[0], HERE[0], Queues::FullReceive);
}

#[test]
fn ipv4_unsent_queue() {
    stream_survives(HERE[0], HERE[0], Queues::Unsent);
}

#[test]
fn ipv4_unacked_queue() {
    stream_survives(HERE[0], HERE[0], Queues::Unacked);
}

#[test]
fn ipv6_stream() {
    stream_survives(HERE[1], HERE[1], Queues::AsTheyCome);
}

#[test]
fn ipv6_full_receive_queue() {
    stream_survives("::", HERE[1], Queues::FullReceive);
}

#[test]
fn ipv6_unacked_queue() {
    stream_survives(HERE[1], HERE[1], Queues::Unacked);
}

#[test]
fn ipv4_mapped_into_ipv6() {
    stream_survives("::", HERE[0], Queues::Unacked);
}

/// A server with many clients: all within one bracket.
#[test]
fn many_connections_in_one_bracket() {
    if !able() {
        return;
    }
    const COUNT: usize = 200;
    let net = Triangle::new();
    let listener = net.a.run(|| TcpListener::bind((HERE[0], PORT)).expect("bind"));
    let (here, peers): (Vec<TcpStream>, Vec<TcpStream>) = net.b.run(|| {
        let pair = |_| {
            let peer = TcpStream::connect((HERE[0], PORT)).expect("connect");
            (listener.accept().expect("accept").0, peer)
        };
        (0..COUNT).map(pair).unzip()
    });
    for (i, mut peer) in peers.iter().enumerate() {
        peer.write_all(&[i as u8; 100]).expect("send");
    }
    let (nft, raw) = (Nft::open(net.a.fd()).unwrap(), RawTcp::open(net.c.fd()).unwrap());
    let mut times = vec![("", Instant::now())];
    let mut facts: Vec<Facts> = here.iter().map(|h| tcp::facts(h.as_fd()).expect("facts")).collect();
    times.push(("facts", Instant::now()));
    let connections: Vec<_> = facts.iter().map(|f| tcp::connection(&f.entry).unwrap()).collect();
    let lock = nft.lock("net-bracket", &connections).expect("lock");
    times.push(("lock", Instant::now()));
    let read =
        |(h, f): (&TcpStream, &mut Facts)| tcp_stream::read(h.as_fd(), &mut f.entry).expect("stream").expect("open");
    let streams: Vec<Stream> = here.iter().zip(&mut facts).map(read).collect();
    here.iter().for_each(|h| tcp_stream::silence(h.as_fd()).expect("silence"));
    times.push(("read", Instant::now()));
    let silent: Vec<_> = net.c.run(|| {
        let create = |(f, s): (&Facts, Stream)| tcp_stream::create(&f.entry, Some(&f.more), s);
        facts.iter().zip(streams).map(create).map(|s| s.expect("create")).collect()
    });
    times.push(("create", Instant::now()));
    net.route("to-c");
    times.push(("route", Instant::now()));
    let live: Vec<_> = silent.into_iter().map(|s| s.go_live(&raw).expect("go live")).collect();
    times.push(("go live", Instant::now()));
    for pair in times.windows(2) {
        println!("{COUNT} connections: {} {:?}", pair[1].0, pair[1].1 - pair[0].1);
    }
    drop((here, lock));
    for (i, (socket, mut peer)) in live.into_iter().zip(&peers).enumerate() {
        let mut socket = TcpStream::from(socket);
        let mut bytes = [0; 100];
        socket.read_exact(&mut bytes).expect("what was queued");
        assert_eq!(bytes, [i as u8; 100]);
        socket.write_all(&bytes).expect("answer");
        peer.read_exact(&mut bytes).expect("answer");
    }
}
