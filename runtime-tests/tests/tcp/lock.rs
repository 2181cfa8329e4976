//! The network lock: what it stops, what it lets pass, and how it ends.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use lmrun::engine::netlock::{Connection, Nft};
use lmrun::engine::res::fd::tcp;

use crate::able;
use crate::net::{HERE, Namespace, Triangle};

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

/// A host with a bridge, and what hangs on it.
struct Bridge {
    host: Namespace,
    neighbour: Namespace,
}

const HOST: [&str; 2] = ["10.88.1.1", "fd88:1::1"];
const CONTAINER: [&str; 2] = ["10.88.1.2", "fd88:1::2"];
const NEIGHBOUR: [&str; 2] = ["10.88.1.3", "fd88:1::3"];

impl Bridge {
    fn new() -> Self {
        let (host, neighbour) = (Namespace::new(), Namespace::new());
        host.ip("link add bridge type bridge");
        addresses(&host, "bridge", HOST);
        let bridge = Self { host, neighbour };
        bridge.plug(&bridge.neighbour, "neighbour", NEIGHBOUR, "02:00:00:00:01:03");
        bridge
    }

    /// Always with the same link address, as engines give it: nobody has to ask for it again.
    fn plug(&self, end: &Namespace, port: &str, to: [&str; 2], mac: &str) {
        self.host.ip(&format!("link add {port} type veth peer name eth0 address {mac} netns {}", end.path()));
        self.host.ip(&format!("link set {port} master bridge up"));
        addresses(end, "eth0", to);
    }

    fn plug_container(&self) -> Namespace {
        let container = Namespace::new();
        self.plug(&container, "container", CONTAINER, "02:00:00:00:01:02");
        container
    }
}

fn addresses(at: &Namespace, link: &str, [ipv4, ipv6]: [&str; 2]) {
    at.ip(&format!("addr add {ipv4}/24 dev {link}"));
    at.ip(&format!("addr add {ipv6}/64 dev {link} nodad"));
    at.ip(&format!("link set {link} up"));
}

/// Whether the peer is told within `patience` that nobody knows its connection.
fn is_reset(mut peer: &TcpStream, patience: Duration) -> bool {
    peer.set_read_timeout(Some(patience)).unwrap();
    peer.read(&mut [0]).is_err_and(|e| e.kind() == ErrorKind::ConnectionReset)
}

#[test]
fn a_new_namespace_behind_a_bridge_resets_nobody_who_is_held() {
    if !able() {
        return;
    }
    let net = Bridge::new();
    let container = net.plug_container();
    let mut pairs = Vec::new();
    for address in CONTAINER {
        for from in [&net.host, &net.neighbour] {
            let listener = container.run(|| TcpListener::bind((address, 0)).expect("bind"));
            let port = listener.local_addr().unwrap().port();
            let connect = || from.run(|| TcpStream::connect((address, port)).expect("connect"));
            for held in [true, false] {
                let peer = connect();
                pairs.push((listener.accept().expect("accept").0, peer, held));
            }
        }
    }
    let held: Vec<Connection> =
        pairs.iter().filter(|(_, _, held)| *held).map(|(here, _, _)| connection(here)).collect();
    let here = || net.host.run(|| Nft::here().expect("nft"));
    here().hold_at_bridges("net-held", &held, Duration::from_secs(30)).expect("hold");
    here().hold_at_bridges("net-held", &held, Duration::from_secs(60)).expect("hold again");
    assert_eq!(net.host.tables().lines().count(), 1, "{}", net.host.tables());
    for (here, peer, held) in &pairs {
        assert!(if *held { stopped(peer, here) } else { passes(peer, here) }, "{peer:?}");
    }

    // It goes with its sockets, and another one comes in its place that has none.
    net.host.ip("link del container");
    let peers: Vec<(TcpStream, bool)> = pairs.into_iter().map(|(_, peer, held)| (peer, held)).collect();
    drop(container);
    let _container = net.plug_container();
    let (held, free): (Vec<_>, Vec<_>) = peers.iter().partition(|(_, held)| *held);
    for (mut peer, _) in peers.iter().map(|(peer, held)| (peer, held)) {
        peer.write_all(b"x").expect("send");
    }
    // Long enough for some retransmissions.
    let patience = Duration::from_secs(5);
    assert!(free.iter().all(|(peer, _)| is_reset(peer, patience)));
    assert!(!held.iter().any(|(peer, _)| is_reset(peer, Duration::from_millis(100))));
    here().unhold_at_bridges(Some("net-held")).expect("unhold");
    assert_eq!(net.host.tables(), "");
    assert!(held.iter().all(|(peer, _)| is_reset(peer, patience)), "only the filter had kept them from that");
}

#[test]
fn what_is_held_at_bridges_expires_and_is_cleared_away() {
    if !able() {
        return;
    }
    let net = Bridge::new();
    let container = net.plug_container();
    let listener = container.run(|| TcpListener::bind((CONTAINER[0], 0)).expect("bind"));
    let peer = net.host.run(|| TcpStream::connect(listener.local_addr().unwrap()).expect("connect"));
    let here = listener.accept().expect("accept").0;
    let nft = net.host.run(|| Nft::here().expect("nft"));
    nft.hold_at_bridges("net-held", &[connection(&here)], Duration::from_millis(600)).expect("hold");
    assert!(stopped(&peer, &here));
    assert!(passes(&peer, &here), "the entries expire");
    for others in ["lmrun-gone-until-1", "lmrun-there-until-99999999999", "lmrun-other", "other-until-1"] {
        assert!(net.host.command("nft", &format!("add table bridge {others}")).status.success());
    }
    nft.unhold_at_bridges(Some("net-held")).expect("unhold");
    let mut left: Vec<String> = net.host.tables().lines().map(str::to_owned).collect();
    left.sort();
    assert_eq!(
        left,
        ["lmrun-other", "lmrun-there-until-99999999999", "other-until-1"].map(|name| format!("table bridge {name}"))
    );
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
