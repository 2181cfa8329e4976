//! The network lock: what it stops, what it lets pass, and how it ends.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use lmrun::engine::netlock::{Connection, Nft};
use lmrun::engine::res::fd::tcp;

use crate::able;
use crate::net::{HERE, Triangle};

fn pair(net: &Triangle, address: &str) -> (TcpStream, TcpStream) {
    let listener = net.a.run(|| TcpListener::bind((address, 0)).expect("bind"));
    let port = listener.local_addr().unwrap().port();
    let peer = net.b.run(|| TcpStream::connect((address, port)).expect("connect"));
    (listener.accept().expect("accept").0, peer)
}

fn connection(socket: &TcpStream) -> Connection {
    tcp::connection(&tcp::facts(socket.as_fd()).expect("facts").entry).expect("connection")
}

/// Whether a byte sent at one end arrives at the other within `patience`.
fn arrives(from: &TcpStream, to: &TcpStream, patience: Duration) -> bool {
    let (mut from, mut to) = (from, to);
    from.write_all(b"x").expect("send");
    to.set_read_timeout(Some(patience)).unwrap();
    to.read_exact(&mut [0]).is_ok()
}

/// Long enough for a retransmission.
fn passes(from: &TcpStream, to: &TcpStream) -> bool {
    arrives(from, to, Duration::from_secs(3))
}

fn stopped(from: &TcpStream, to: &TcpStream) -> bool {
    !arrives(from, to, Duration::from_millis(100))
}

#[test]
fn only_its_own_connections() {
    if !able() {
        return;
    }
    let net = Triangle::new();
    for address in HERE {
        let (locked, locked_peer) = pair(&net, address);
        let (free, free_peer) = pair(&net, address);
        let nft = Nft::open(net.a.fd()).expect("nft");
        let lock = nft.lock("net-only", &[connection(&locked)]).expect("lock");
        assert!(passes(&free, &free_peer) && passes(&free_peer, &free));
        assert!(stopped(&locked, &locked_peer) && stopped(&locked_peer, &locked));
        let start = Instant::now();
        let nft = lock.release().expect("release");
        println!("release {:?}", start.elapsed());
        drop(nft);
        println!("and close {:?}", start.elapsed());
        locked_peer.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
        (&locked_peer).read_exact(&mut [0]).expect("retransmission");
        assert!(!net.a.tables().contains("lmrun"), "{}", net.a.tables());
    }
}

#[test]
fn ends_with_its_owner() {
    if !able() {
        return;
    }
    let net = Triangle::new();
    let (here, peer) = pair(&net, HERE[0]);
    let (nft, connections) = (Nft::open(net.a.fd()).expect("nft"), [connection(&here)]);
    let lock = nft.lock("net-owner", &connections).expect("lock");
    // nft cannot change what is another's.
    let table = format!("lmrun-net-owner-{}", std::process::id());
    assert!(net.a.tables().contains(&table), "{}", net.a.tables());
    assert!(!net.a.command("nft", &format!("delete table inet {table}")).status.success());
    assert!(stopped(&peer, &here));
    drop(lock);
    assert!(!net.a.tables().contains("lmrun"));
    assert!(passes(&peer, &here));
}

#[test]
fn holds_for_a_time_after_the_owner() {
    if !able() {
        return;
    }
    let net = Triangle::new();
    let (here, peer) = pair(&net, HERE[0]);
    let (here6, peer6) = pair(&net, HERE[1]);
    let connections = [connection(&here), connection(&here6)];
    let nft = Nft::open(net.a.fd()).expect("nft");
    assert!(!nft.unhold("net-held").expect("nothing to remove"));
    nft.hold("net-held", &connections, Duration::from_secs(30)).expect("hold");
    nft.hold("net-held", &connections, Duration::from_millis(600)).expect("hold again");
    drop(nft);
    assert!(net.a.tables().contains("lmrun-net-held"));
    assert!(stopped(&peer, &here) && stopped(&peer6, &here6));
    std::thread::sleep(Duration::from_millis(700));
    assert!(passes(&here, &peer) && passes(&here6, &peer6), "the entries expire");
    let nft = Nft::open(net.a.fd()).expect("nft");
    assert!(nft.unhold("net-held").expect("remove"));
    assert_eq!(net.a.tables(), "");
}

#[test]
fn many_connections_and_fast() {
    if !able() {
        return;
    }
    let net = Triangle::new();
    for count in [1, 100, 5000] {
        let connections: Vec<Connection> = (0..count)
            .map(|i| {
                let host = usize::from(i % 2 == 1);
                let end = |port| (HERE[host].parse::<std::net::IpAddr>().unwrap(), port).into();
                Connection { local: end(80), remote: end(1000 + i) }
            })
            .collect();
        let mut times = Vec::new();
        for _ in 0..20 {
            let start = Instant::now();
            let nft = Nft::open(net.a.fd()).expect("nft");
            let opened = start.elapsed();
            let lock = nft.lock("net-many", &connections).expect("lock");
            let locked = start.elapsed() - opened;
            let nft = lock.release().expect("release");
            let released = start.elapsed() - opened - locked;
            drop(nft);
            times.push([opened, locked, released, start.elapsed() - opened - locked - released]);
        }
        for (i, what) in ["open", "lock", "release", "close"].into_iter().enumerate() {
            let mut times: Vec<Duration> = times.iter().map(|t| t[i]).collect();
            times.sort();
            println!("{count} connections: {what} median {:?} worst {:?}", times[10], times[19]);
            assert!(what != "lock" || count > 1 || times[10] < Duration::from_millis(1), "{times:?}");
        }
    }
}
