//! What peers of each sort see of a move in which frames are kept: the longest that one of them waits. Integrity is asserted;
//! how long it takes is printed, since other work on this machine takes its time.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lmrun::engine::netlock::Nft;
use lmrun::engine::res::fd::{tcp, tcp_stream};
use lmrun::migrate::capture::{Capture, Frames, Injector};
use lmrun::sys::segment::RawTcp;

use crate::able;
use crate::moves::connected;
use crate::net::{HERE, Triangle};

/// A message: when it was sent, in ns, and its number.
const MESSAGE: usize = 16;

/// How a peer behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Peer {
    /// Sends without waiting for answers, one message in 5 ms.
    Streams { nodelay: bool },
    /// Asks and waits for the answer.
    Asks,
    /// Sends 32 KB in a millisecond.
    Floods,
    /// Says nothing, and is told something in 5 ms.
    Receives,
    /// Nothing is said during the move, and then it asks.
    Idle,
}

struct Clock(Instant);

impl Clock {
    fn now(&self) -> u64 {
        self.0.elapsed().as_nanos() as u64
    }

    fn message(&self, number: u64) -> [u8; MESSAGE] {
        let mut bytes = [0; MESSAGE];
        bytes[..8].copy_from_slice(&self.now().to_ne_bytes());
        bytes[8..].copy_from_slice(&number.to_ne_bytes());
        bytes
    }

    /// How old a message is; it must be the one of that number.
    fn age(&self, message: &[u8], number: u64) -> Duration {
        let (words, _) = message.as_chunks::<8>();
        assert_eq!(u64::from_ne_bytes(words[1]), number, "messages come in their order, each once");
        Duration::from_nanos(self.now() - u64::from_ne_bytes(words[0]))
    }
}

/// The container's end: takes messages, answers them where the peer asks, sends where the peer receives.
struct Server<'a> {
    clock: &'a Clock,
    peer: Peer,
    speaks: bool,
    kept: Vec<u8>,
    received: u64,
    sent: u64,
    longest: Duration,
}

impl Server<'_> {
    fn serve(&mut self, socket: &TcpStream, time: Duration) {
        let start = Instant::now();
        socket.set_read_timeout(Some(Duration::from_millis(2))).unwrap();
        let mut bytes = vec![0; 1 << 20];
        let mut next = Duration::ZERO;
        while start.elapsed() < time {
            if self.speaks && start.elapsed() >= next {
                (&*socket).write_all(&self.clock.message(self.sent)).unwrap();
                self.sent += 1;
                next = start.elapsed() + Duration::from_millis(5);
            }
            match (&*socket).read(&mut bytes) {
                Ok(len) => self.take(socket, &bytes[..len]),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(e) => panic!("{e}"),
            }
        }
    }

    fn take(&mut self, mut socket: &TcpStream, bytes: &[u8]) {
        self.kept.extend_from_slice(bytes);
        let whole = self.kept.len() / MESSAGE * MESSAGE;
        for message in self.kept[..whole].chunks(MESSAGE) {
            self.longest = self.longest.max(self.clock.age(message, self.received));
            self.received += 1;
            if matches!(self.peer, Peer::Asks | Peer::Idle) {
                socket.write_all(message).unwrap();
            }
        }
        self.kept.drain(..whole);
    }
}

/// The peer's life; returns the longest that it waited.
fn live(mut socket: TcpStream, peer: Peer, clock: &Clock, stop: &AtomicBool, moving: &AtomicBool) -> Duration {
    socket.set_nodelay(matches!(peer, Peer::Streams { nodelay: true } | Peer::Asks | Peer::Idle)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let stopped = || stop.load(Ordering::SeqCst);
    let mut longest = Duration::ZERO;
    let mut number = 0;
    while !stopped() {
        match peer {
            Peer::Streams { .. } => {
                socket.write_all(&clock.message(number)).unwrap();
                number += 1;
                std::thread::sleep(Duration::from_millis(5));
            }
            Peer::Floods => {
                let all: Vec<u8> = (0..2000).flat_map(|n| clock.message(number + n)).collect();
                socket.write_all(&all).unwrap();
                number += 2000;
                std::thread::sleep(Duration::from_millis(1));
            }
            Peer::Receives => {
                let mut message = [0; MESSAGE];
                match socket.read_exact(&mut message) {
                    Ok(()) => longest = longest.max(clock.age(&message, number)),
                    Err(_) if stopped() => break,
                    Err(e) => panic!("{e}"),
                }
                number += 1;
            }
            Peer::Idle if moving.load(Ordering::SeqCst) => std::thread::sleep(Duration::from_millis(1)),
            Peer::Asks | Peer::Idle => {
                let question = clock.message(number);
                socket.write_all(&question).unwrap();
                let mut answer = [0; MESSAGE];
                match socket.read_exact(&mut answer) {
                    Ok(()) => longest = longest.max(clock.age(&answer, number)),
                    Err(_) if stopped() => break,
                    Err(e) => panic!("{e}"),
                }
                number += 1;
                std::thread::sleep(Duration::from_micros(300));
            }
        }
    }
    longest
}

/// What takes a real move longer than this one: the network between the hosts, many sockets.
const ON_ITS_WAY: Duration = Duration::from_millis(12);

/// The order of a migration: frozen, forget, lock, read, switch, go live, inject.
fn move_with_frames(net: &Triangle, old: TcpStream) -> (TcpStream, usize) {
    let mut facts = tcp::facts(old.as_fd()).expect("facts");
    let connection = tcp::connection(&facts.entry).expect("connection");
    let (nft, raw) = (Nft::open(net.a.fd()).expect("nft"), RawTcp::open(net.c.fd()).expect("raw"));
    let capture = Capture::open(net.a.fd()).expect("capture");
    let injector = Injector::open(net.c.fd(), net.b.fd()).expect("injector");
    assert!(injector.problems.is_empty(), "{:?}", injector.problems);
    std::thread::sleep(Duration::from_millis(10));
    capture.begin().expect("begin");
    let lock = nft.lock("net-stalls", &[connection]).expect("lock");
    let stream = tcp_stream::read(old.as_fd(), &mut facts.entry).expect("stream").expect("open");
    tcp_stream::silence(old.as_fd()).expect("silence");
    std::thread::sleep(ON_ITS_WAY);
    let silent = net.c.run(|| tcp_stream::create(&facts.entry, Some(&facts.more), stream).expect("create"));
    net.route("to-c");
    let frames = Frames::from_bytes(&capture.drain().expect("drain").to_bytes()).expect("frames");
    let socket = silent.go_live(&raw).expect("go live");
    let injected = injector.inject(&frames);
    assert_eq!(injected, frames.frames.len());
    capture.close();
    drop((old, lock));
    (socket.into(), injected)
}

fn longest_stall(peer: Peer) -> (Duration, usize) {
    let net = Triangle::new();
    let (_listener, here, there) = connected(&net, HERE[0], HERE[0]);
    here.set_nodelay(true).unwrap();
    let (clock, stop, moving) = (Clock(Instant::now()), AtomicBool::new(false), AtomicBool::new(false));
    let mut server = Server {
        clock: &clock,
        peer,
        speaks: peer == Peer::Receives,
        kept: Vec::new(),
        received: 0,
        sent: 0,
        longest: Duration::ZERO,
    };
    std::thread::scope(|scope| {
        let client = scope.spawn(|| live(there, peer, &clock, &stop, &moving));
        server.serve(&here, Duration::from_millis(150));
        // What was slow before the move is none of its doing.
        server.longest = Duration::ZERO;
        moving.store(peer == Peer::Idle, Ordering::SeqCst);
        let (moved, injected) = move_with_frames(&net, here);
        moving.store(false, Ordering::SeqCst);
        server.serve(&moved, Duration::from_millis(400));
        stop.store(true, Ordering::SeqCst);
        // An asking peer gets its last answer; one that receives has gone.
        server.speaks = false;
        server.serve(&moved, Duration::from_millis(50));
        drop(moved);
        (client.join().unwrap().max(server.longest), injected)
    })
}

#[test]
fn no_message_is_lost_whatever_the_peer_does() {
    if !able() {
        return;
    }
    let peers = [
        Peer::Streams { nodelay: false },
        Peer::Streams { nodelay: true },
        Peer::Asks,
        Peer::Floods,
        Peer::Receives,
        Peer::Idle,
    ];
    for peer in peers {
        let (longest, injected) = longest_stall(peer);
        println!("{peer:?}: longest wait {longest:.1?}, {injected} frames injected (frozen 22 ms)");
    }
}
