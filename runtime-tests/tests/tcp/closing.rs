//! Connections of which one end, or both, have closed.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use lmrun::engine::netlock::Nft;
use lmrun::engine::res::fd::{tcp, tcp_stream};
use lmrun::sys::tcp::{info, state};

use crate::able;
use crate::moves::{connected, move_connection};
use crate::net::{HERE, Triangle};

fn state_of(socket: &impl AsFd) -> &'static str {
    state::name(info(socket.as_fd()).expect("info").state)
}

fn reaches(socket: &impl AsFd, wanted: &str) {
    let start = Instant::now();
    while state_of(socket) != wanted {
        assert!(start.elapsed() < Duration::from_secs(3), "{} is not {wanted}", state_of(socket));
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn read_to_end(mut socket: &TcpStream) -> String {
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut text = String::new();
    socket.read_to_string(&mut text).expect("read to the end");
    text
}

/// The peer has closed its half; we go on sending.
#[test]
fn close_wait() {
    if !able() {
        return;
    }
    for (i, address) in HERE.into_iter().enumerate() {
        let net = Triangle::new();
        let (_listener, here, mut peer) = connected(&net, address, address);
        peer.write_all(b"last words").unwrap();
        peer.shutdown(Shutdown::Write).unwrap();
        reaches(&here, "CLOSE_WAIT");
        let moved = move_connection(&net, here, Duration::from_millis(i as u64 * 50));
        assert_eq!(moved.stream.inq, b"last words");
        reaches(&moved.socket, "CLOSE_WAIT");
        let mut here = TcpStream::from(moved.socket);
        assert_eq!(read_to_end(&here), "last words");
        here.write_all(b"answer").unwrap();
        drop(here);
        assert_eq!(read_to_end(&peer), "answer");
    }
}

/// The peer closes between the collection of facts and the reading of the queues.
#[test]
fn the_peer_closes_meanwhile() {
    if !able() {
        return;
    }
    let net = Triangle::new();
    let (_listener, here, mut peer) = connected(&net, HERE[0], HERE[0]);
    let mut entry = tcp::facts(here.as_fd()).unwrap().entry;
    assert_eq!(entry.state, state::ESTABLISHED);
    peer.write_all(b"bye").unwrap();
    peer.shutdown(Shutdown::Write).unwrap();
    reaches(&here, "CLOSE_WAIT");
    let stream = tcp_stream::read(here.as_fd(), &mut entry).unwrap().expect("open");
    assert_eq!((entry.state, stream.inq.len()), (state::CLOSE_WAIT, 3));
    assert_eq!(read_to_end(&here), "bye");
}

/// We have closed our half and it is acknowledged; the peer goes on sending.
#[test]
fn fin_wait2() {
    if !able() {
        return;
    }
    for address in HERE {
        let net = Triangle::new();
        let (_listener, mut here, mut peer) = connected(&net, address, address);
        here.write_all(b"question").unwrap();
        here.shutdown(Shutdown::Write).unwrap();
        reaches(&here, "FIN_WAIT2");
        let moved = move_connection(&net, here, Duration::ZERO);
        reaches(&moved.socket, "FIN_WAIT2");
        assert_eq!(read_to_end(&peer), "question");
        peer.write_all(b"answer").unwrap();
        drop(peer);
        assert_eq!(read_to_end(&moved.socket.into()), "answer");
    }
}

/// We have closed our half, and what we said last has not arrived.
#[test]
fn fin_wait1() {
    if !able() {
        return;
    }
    let net = Triangle::new();
    let (_listener, mut here, mut peer) = connected(&net, HERE[0], HERE[0]);
    let connection = tcp::connection(&tcp::facts(here.as_fd()).unwrap().entry).unwrap();
    let loss = Nft::open(net.b.fd()).unwrap().lock("net-fin", &[connection]).unwrap();
    here.write_all(b"question").unwrap();
    here.shutdown(Shutdown::Write).unwrap();
    reaches(&here, "FIN_WAIT1");
    let moved = move_connection(&net, here, Duration::ZERO);
    drop(loss);
    assert_eq!(moved.stream.outq, b"question");
    assert_eq!(read_to_end(&peer), "question");
    reaches(&moved.socket, "FIN_WAIT2");
    peer.write_all(b"answer").unwrap();
    drop(peer);
    assert_eq!(read_to_end(&moved.socket.into()), "answer");
}

/// Both have closed, and our last word has not arrived.
#[test]
fn last_ack() {
    if !able() {
        return;
    }
    let net = Triangle::new();
    let (_listener, mut here, mut peer) = connected(&net, HERE[1], HERE[1]);
    peer.write_all(b"enough").unwrap();
    peer.shutdown(Shutdown::Write).unwrap();
    reaches(&here, "CLOSE_WAIT");
    let connection = tcp::connection(&tcp::facts(here.as_fd()).unwrap().entry).unwrap();
    let loss = Nft::open(net.b.fd()).unwrap().lock("net-last", &[connection]).unwrap();
    here.write_all(b"me too").unwrap();
    here.shutdown(Shutdown::Write).unwrap();
    reaches(&here, "LAST_ACK");
    let moved = move_connection(&net, here, Duration::ZERO);
    drop(loss);
    assert_eq!(read_to_end(&moved.socket.try_clone().unwrap().into()), "enough");
    assert_eq!(read_to_end(&peer), "me too");
    reaches(&moved.socket, "CLOSE");
}

/// Both have closed at once.
#[test]
fn closing() {
    if !able() {
        return;
    }
    let net = Triangle::new();
    let (_listener, here, peer) = connected(&net, HERE[0], HERE[0]);
    // Our segments are lost, the peer's arrive.
    for command in [
        "add table inet loss",
        "add chain inet loss input { type filter hook input priority -400 ; }",
        "add rule inet loss input tcp sport 7788 drop",
    ] {
        assert!(net.b.command("nft", command).status.success(), "nft {command}");
    }
    here.shutdown(Shutdown::Write).unwrap();
    reaches(&here, "FIN_WAIT1");
    peer.shutdown(Shutdown::Write).unwrap();
    reaches(&here, "CLOSING");
    assert!(net.b.command("nft", "delete table inet loss").status.success());
    let moved = move_connection(&net, here, Duration::ZERO);
    reaches(&moved.socket, "CLOSE");
}

/// Shut down for reading only, which the peer does not learn.
#[test]
fn shut_down_for_reading() {
    if !able() {
        return;
    }
    let net = Triangle::new();
    let (_listener, here, peer) = connected(&net, HERE[0], HERE[0]);
    here.shutdown(Shutdown::Read).unwrap();
    let moved = move_connection(&net, here, Duration::ZERO);
    assert_eq!(state_of(&moved.socket), "ESTABLISHED");
    let mut here = TcpStream::from(moved.socket);
    assert_eq!(read_to_end(&here), "");
    here.write_all(b"still").unwrap();
    drop(here);
    assert_eq!(read_to_end(&peer), "still");
}
