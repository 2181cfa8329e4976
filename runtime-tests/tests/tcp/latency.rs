//! What a peer sees of a move: the longest time that a message takes.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::able;
use crate::moves::{connected, move_connection};
use crate::net::{HERE, Triangle};

/// A retransmission takes at least this long; a peer that waits for one has not been served well.
const RETRANSMISSION: Duration = Duration::from_millis(200);

/// Serves for a while: echoes what comes.
fn serve(socket: &mut TcpStream, time: Duration) {
    let start = Instant::now();
    socket.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
    let mut bytes = [0; 65536];
    while start.elapsed() < time {
        match socket.read(&mut bytes) {
            Ok(n) => socket.write_all(&bytes[..n]).unwrap(),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(e) => panic!("{e}"),
        }
    }
}

/// The longest gap of a client while its server moves, frozen for `frozen` before the lock.
fn longest_gap(frozen: Duration, client: impl FnOnce(TcpStream, &AtomicBool) -> Duration + Send) -> Duration {
    let net = Triangle::new();
    let (_listener, mut here, peer) = connected(&net, HERE[0], HERE[0]);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let client = scope.spawn(|| client(peer, &stop));
        serve(&mut here, Duration::from_millis(200));
        let moved = move_connection(&net, here, frozen);
        // Open until the client has been told to stop: its end would be no answer.
        let mut there = moved.socket.into();
        serve(&mut there, Duration::from_millis(500));
        stop.store(true, Ordering::SeqCst);
        drop(there);
        client.join().unwrap()
    })
}

/// Asks, waits for the answer, asks again.
fn ask(mut peer: TcpStream, stop: &AtomicBool) -> Duration {
    peer.set_nodelay(true).unwrap();
    let mut longest = Duration::ZERO;
    while !stop.load(Ordering::SeqCst) {
        let start = Instant::now();
        peer.write_all(&[1; 64]).unwrap();
        if !stop.load(Ordering::SeqCst) {
            peer.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
            match peer.read_exact(&mut [0; 64]) {
                Ok(()) => longest = longest.max(start.elapsed()),
                Err(_) => assert!(stop.load(Ordering::SeqCst), "no answer"),
            }
        }
        std::thread::sleep(Duration::from_micros(300));
    }
    longest
}

/// Talks with Nagle's algorithm: one message in flight, the next waits for its acknowledgement.
fn talk(peer: TcpStream, stop: &AtomicBool) -> Duration {
    let mut reader = peer.try_clone().unwrap();
    let start = Instant::now();
    let now = move || start.elapsed().as_nanos() as u64;
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let mut peer = peer;
            while !stop.load(Ordering::SeqCst) {
                peer.write_all(&now().to_ne_bytes()).unwrap();
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        reader.set_read_timeout(Some(Duration::from_millis(400))).unwrap();
        let mut longest = 0;
        let mut message = [0; 8];
        while !stop.load(Ordering::SeqCst) && reader.read_exact(&mut message).is_ok() {
            longest = longest.max(now() - u64::from_ne_bytes(message));
        }
        Duration::from_nanos(longest)
    })
}

#[test]
fn a_request_in_flight_waits_for_no_timer() {
    if !able() {
        return;
    }
    let mut gaps: Vec<Duration> = (0..5).map(|_| longest_gap(Duration::from_millis(10), ask)).collect();
    gaps.sort();
    println!("longest gap of an asking client, frozen 10 ms: {gaps:?}");
    assert!(gaps[2] < RETRANSMISSION / 2, "{gaps:?}");
}

#[test]
fn a_message_held_back_by_nagle_waits_for_no_timer() {
    if !able() {
        return;
    }
    let mut gaps: Vec<Duration> = (0..5).map(|_| longest_gap(Duration::from_millis(10), talk)).collect();
    gaps.sort();
    println!("longest gap of a talking client, frozen 10 ms: {gaps:?}");
    assert!(gaps[2] < RETRANSMISSION / 2, "{gaps:?}");
}
