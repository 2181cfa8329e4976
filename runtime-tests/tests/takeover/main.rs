//! A container's addresses go from one network namespace to another, and its neighbours follow. Needs root and iproute2.

mod capture;
mod conntrack;

use std::fs::File;
use std::io::ErrorKind;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use lmrun::migrate::address::{Interfaces, Silence, Silencer, announce};
use runtime_tests::command::tool;
use runtime_tests::needs;
use runtime_tests::network::Namespace;

/// Two places where the container can be, on one link with a neighbour.
struct Street {
    here: Namespace,
    there: Namespace,
    neighbour: Namespace,
}

const ADDRESS: &str = "10.77.0.10";
const ADDRESS_6: &str = "fd77::10";
const NEIGHBOUR: &str = "10.77.0.1";
const NEIGHBOUR_6: &str = "fd77::1";

impl Street {
    /// `here` has the addresses; `there` has an interface of another name and none.
    fn new() -> Self {
        let street =
            Self { here: Namespace::new("here"), there: Namespace::new("there"), neighbour: Namespace::new("nb") };
        street.neighbour.ip("link add br0 type bridge");
        street.neighbour.ip("link set br0 address 02:00:00:00:00:01 up");
        for (place, name, mac) in [(&street.here, "eth0", "0a"), (&street.there, "eth9", "0b")] {
            let (inside, outside) = (place.name(), street.neighbour.name());
            tool(&format!("ip link add {name} netns {inside} type veth peer name to-{name} netns {outside}"));
            place.ip(&format!("link set {name} address 02:00:00:00:00:{mac} up"));
            street.neighbour.ip(&format!("link set to-{name} master br0 up"));
        }
        street.neighbour.ip(&format!("addr add {NEIGHBOUR}/24 dev br0"));
        street.neighbour.ip(&format!("addr add {NEIGHBOUR_6}/64 dev br0 nodad"));
        street.here.ip(&format!("addr add {ADDRESS}/24 brd + dev eth0"));
        street.here.ip(&format!("addr add {ADDRESS_6}/64 dev eth0 nodad"));
        street
    }

    /// The hardware address that the neighbour has for an address of the container.
    fn known(&self, address: &str) -> String {
        let listed = tool(&format!("ip -n {} neigh show {address}", self.neighbour.name())).out;
        let mac = listed.split_whitespace().skip_while(|word| *word != "lladdr").nth(1);
        mac.unwrap_or_default().to_owned()
    }

    /// Makes the neighbour look for the container.
    fn look(&self) {
        self.neighbour.within(|| {
            for (from, to) in [(NEIGHBOUR, ADDRESS), (NEIGHBOUR_6, ADDRESS_6)] {
                let socket = UdpSocket::bind((from, 0)).unwrap();
                socket.send_to(b"hello", (to, 9)).unwrap();
            }
        });
    }
}

fn open(namespace: &Namespace) -> File {
    File::open(namespace.path()).unwrap()
}

fn eventually(what: &str, mut happens: impl FnMut() -> bool) {
    let start = Instant::now();
    while !happens() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn the_network_is_made_as_it_was() {
    if !needs::root() {
        return;
    }
    let street = Street::new();
    for words in [
        "link set eth0 mtu 1400",
        "addr add 10.77.0.11/24 dev eth0",
        "addr add 192.168.7.1 peer 192.168.7.2/32 dev eth0",
        "route add default via 10.77.0.1 metric 50",
        "route add blackhole 10.99.0.0/16",
        "route add 10.98.0.0/16 via 10.77.0.2 dev eth0 table 1000 mtu 1300",
        "route add 10.97.0.0/16 nexthop via 10.77.0.2 weight 2 nexthop via 10.77.0.3",
        "rule add from 10.77.0.11 table 1000 priority 500",
        "neigh add 10.77.0.77 lladdr 02:00:00:00:00:77 dev eth0 nud permanent",
        "neigh add proxy 10.77.0.78 dev eth0",
        "-6 route add default via fd77::1 dev eth0",
        "-6 route add fd99::/64 via fe80::99 dev eth0 metric 7",
        "-6 rule add to fd98::/64 table 1001",
    ] {
        street.here.ip(words);
    }
    // The container's own link-local address is ready after a while.
    let (here, there) = (open(&street.here), open(&street.there));
    let read = |file: &File| Interfaces::read(file.as_fd()).unwrap();
    const TENTATIVE: u32 = 0x40;
    let tentative = |network: &Interfaces| network.interfaces[0].addresses.iter().any(|a| a.flags & TENTATIVE != 0);
    eventually("no address is tentative", || !tentative(&read(&here)));
    street.there.ip("addr add 10.55.0.1/24 dev eth9");
    street.there.ip("route add default via 10.55.0.9");
    let before = read(&here);
    let wanted = Interfaces::from_bytes(&before.to_bytes()).unwrap();
    assert_eq!((wanted.routes.len(), wanted.neighbours.len(), wanted.rules.len()), (6, 2, 2), "{wanted:?}");
    let start = Instant::now();
    let (silence, problems) = wanted.stand_by(there.as_fd()).unwrap();
    assert_eq!(problems, Vec::<String>::new());
    println!("a network is made in {:?}", start.elapsed());
    let comparable = |mut network: Interfaces| {
        for address in network.interfaces.iter_mut().flat_map(|interface| &mut interface.addresses) {
            // IFA_F_NODAD, and whose lifetime counts down.
            address.flags &= !2;
        }
        network.interfaces.iter_mut().for_each(|i| i.addresses.sort_by(|a, b| a.local.cmp(&b.local)));
        network.routes.sort_by_key(|route| (route.table, route.dst.clone(), route.metric));
        network
    };
    assert_eq!(comparable(read(&there)), comparable(before));
    // Nobody finds it there: the neighbour knows that port of its bridge by nothing that it has sent.
    let listed = street.neighbour.within(|| tool("bridge fdb show dev to-eth9").out);
    assert!(!listed.lines().any(|line| line.starts_with("02:00:00:00:00:0a")), "{listed}");
    // Once more, and nothing is to be done.
    assert_eq!(wanted.apply(there.as_fd()).unwrap(), Vec::<String>::new());
    assert_eq!(comparable(read(&there)), comparable(read(&here)));
    silence.lift().unwrap();
}

#[test]
fn what_cannot_be_made_is_said() {
    if !needs::root() {
        return;
    }
    let street = Street::new();
    street.here.ip("link add br1 type bridge");
    street.here.ip("route add 10.98.0.0/16 via 10.77.0.2 dev eth0");
    street.there.ip("link add br9 type bridge");
    let network = Interfaces::read(open(&street.here).as_fd()).unwrap();
    let problems = network.apply(open(&street.there).as_fd()).unwrap();
    println!("{problems:?}");
    assert!(problems.iter().any(|problem| problem.contains("no interface eth0")), "{problems:?}");
    assert!(problems.iter().any(|problem| problem.starts_with("route to 10.98.0.0/16 by 10.77.0.2")), "{problems:?}");
}

#[test]
fn a_silent_namespace_is_not_to_be_found() {
    if !needs::root() {
        return;
    }
    let street = Street::new();
    let here = open(&street.here);
    let listener = street.here.within(|| TcpListener::bind((ADDRESS, 7700)).unwrap());
    let connect = |patience| {
        street.neighbour.within(|| TcpStream::connect_timeout(&format!("{ADDRESS}:7700").parse().unwrap(), patience))
    };
    connect(Duration::from_secs(20)).unwrap();
    // A port that nobody listens to: the answer would be a reset.
    let refused = || {
        street.neighbour.within(|| {
            let address = format!("{ADDRESS}:7701").parse().unwrap();
            TcpStream::connect_timeout(&address, Duration::from_millis(150)).unwrap_err().kind()
        })
    };
    assert_eq!(refused(), ErrorKind::ConnectionRefused);
    let silencer = Silencer::open(here.as_fd()).unwrap();
    connect(Duration::from_secs(20)).unwrap();
    let start = Instant::now();
    let silence = silencer.impose().unwrap();
    println!("silent after {:?}", start.elapsed());
    assert_eq!(refused(), ErrorKind::TimedOut);
    street.neighbour.ip("neigh flush all");
    street.look();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!((street.known(ADDRESS), street.known(ADDRESS_6)), (String::new(), String::new()));
    let start = Instant::now();
    silence.lift().unwrap();
    println!("heard again after {:?}", start.elapsed());
    street.neighbour.ip("neigh flush all");
    connect(Duration::from_secs(20)).unwrap();
    // What is to outlast us is found by the next one.
    drop(Silencer::lasting(here.as_fd()).unwrap().impose().unwrap());
    assert_eq!(refused(), ErrorKind::TimedOut);
    assert!(Silence::lasting(here.as_fd()).unwrap().was_kept());
    assert_eq!(refused(), ErrorKind::TimedOut);
    assert!(Silence::lift_kept(here.as_fd()).unwrap());
    assert!(!Silence::lift_kept(here.as_fd()).unwrap());
    assert!(!Silence::lasting(here.as_fd()).unwrap().was_kept());
    assert!(Silence::lift_kept(here.as_fd()).unwrap());
    connect(Duration::from_secs(20)).unwrap();
    eventually("no table is left", || street.here.tables().is_empty());
    drop(listener);
}

#[test]
fn neighbours_follow_an_announcement() {
    if !needs::root() {
        return;
    }
    let street = Street::new();
    street.look();
    let old = "02:00:00:00:00:0a";
    eventually("the neighbour finds both addresses", || street.known(ADDRESS) == old && street.known(ADDRESS_6) == old);
    let (here, there) = (open(&street.here), open(&street.there));
    let mut network = Interfaces::read(here.as_fd()).unwrap();
    // It keeps its hardware address there, so that one sees who is believed.
    network.interfaces[0].mac = Vec::new();
    let _silence = Silencer::open(here.as_fd()).unwrap().impose().unwrap();
    assert_eq!(network.apply(there.as_fd()).unwrap(), Vec::<String>::new());
    let start = Instant::now();
    let announced = announce(there.as_fd(), &network).unwrap();
    println!("announced in {:?}", start.elapsed());
    assert_eq!(announced.problems, Vec::<String>::new());
    let new = "02:00:00:00:00:0b";
    eventually("the neighbour follows", || street.known(ADDRESS) == new && street.known(ADDRESS_6) == new);
    println!("the neighbour has followed after {:?}", start.elapsed());
    announced.wait();
}
