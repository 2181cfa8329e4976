//! Connections that the host's packet filter knows.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use lmrun::migrate::conntrack::{self, Entries, Entry};
use runtime_tests::command::tool;
use runtime_tests::needs;
use runtime_tests::network::Namespace;

use crate::{ADDRESS, NEIGHBOUR, Street, eventually, open};

const OUTSIDE: &str = "10.66.0.1";
const CLIENT: &str = "10.66.0.2";

/// The street's neighbour as the host of the container: it publishes a port, and hides the container's address.
fn published() -> (Street, Namespace) {
    let street = Street::new();
    let client = Namespace::new("client");
    let host = &street.neighbour;
    tool(&format!("ip link add eth0 netns {} type veth peer name out netns {}", client.name(), host.name()));
    client.ip(&format!("addr add {CLIENT}/24 dev eth0"));
    client.ip("link set eth0 up");
    host.ip(&format!("addr add {OUTSIDE}/24 dev out"));
    host.ip("link set out up");
    street.here.ip(&format!("route add default via {NEIGHBOUR}"));
    host.within(|| {
        fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
        tool("nft add table ip nat");
        tool("nft add chain ip nat pre { type nat hook prerouting priority -100 ; }");
        tool("nft add chain ip nat post { type nat hook postrouting priority 100 ; }");
        tool(&format!("nft add rule ip nat pre iifname out tcp dport 8080 dnat to {ADDRESS}:80"));
        tool("nft add rule ip nat post oifname out masquerade");
    });
    (street, client)
}

/// Without what changes by itself: the timeout, and IPS_* that the kernel sets when a packet passes.
fn comparable(entries: Entries) -> Vec<Entry> {
    let mut entries = entries.entries;
    for entry in &mut entries {
        entry.timeout = 0;
        entry.status &= 0x3e;
        for tcp in entry.tcp.iter_mut() {
            // Sequence numbers may be anything, until a packet has passed.
            tcp.flags_original |= 8;
            tcp.flags_reply |= 8;
        }
    }
    entries.sort_by_key(|entry| entry.original.dst_port);
    entries
}

#[test]
fn entries_follow_with_their_translation() {
    if !needs::root() {
        return;
    }
    let (street, client) = published();
    let container = street.here.within(|| TcpListener::bind((ADDRESS, 80)).unwrap());
    let outside = client.within(|| TcpListener::bind((CLIENT, 9000)).unwrap());
    let _kept = [
        client.within(|| TcpStream::connect((OUTSIDE, 8080)).unwrap()),
        street.here.within(|| TcpStream::connect((CLIENT, 9000)).unwrap()),
        container.accept().unwrap().0,
        outside.accept().unwrap().0,
    ];
    let addresses = [ADDRESS.parse().unwrap()];
    let host = open(&street.neighbour);
    let read = conntrack::read(host.as_fd(), &addresses).unwrap();
    assert_eq!(read.entries.len(), 2, "{read:?}");
    assert_eq!(conntrack::read(host.as_fd(), &["10.77.0.99".parse().unwrap()]).unwrap(), Entries::default());
    let entries = Entries::from_message(&read.to_messages()[0]).unwrap();

    // Another host with the address that the port was published at.
    let other = Namespace::new("other");
    other.ip("link add br0 type bridge");
    other.ip("link set br0 up");
    let there = open(&other);
    let problems = conntrack::write(there.as_fd(), &entries).unwrap();
    assert_eq!(problems, ["2 tracked connections are translated by an address of the source"]);
    assert_eq!(conntrack::read(there.as_fd(), &addresses).unwrap(), Entries::default());
    other.ip(&format!("addr add {OUTSIDE}/24 dev br0"));
    // Twice: what is there is brought up to date.
    for _ in 0..2 {
        assert_eq!(conntrack::write(there.as_fd(), &entries).unwrap(), Vec::<String>::new());
        assert_eq!(comparable(conntrack::read(there.as_fd(), &addresses).unwrap()), comparable(read.clone()));
    }
}

#[test]
fn a_connection_passes_a_filter_that_has_forgotten_it() {
    if !needs::root() {
        return;
    }
    let street = Street::new();
    let listener = street.here.within(|| TcpListener::bind((ADDRESS, 80)).unwrap());
    street.here.within(|| {
        tool("nft add table inet f");
        tool("nft add chain inet f in { type filter hook input priority 0 ; policy drop ; }");
        tool("nft add rule inet f in ct state established accept");
        tool("nft add rule inet f in tcp flags & (syn | ack) == syn accept");
    });
    let mut peer = street.neighbour.within(|| TcpStream::connect((ADDRESS, 80)).unwrap());
    let (mut container, _) = listener.accept().unwrap();
    peer.write_all(b"a").unwrap();
    container.read_exact(&mut [0]).unwrap();
    let here = open(&street.here);
    let read = || conntrack::read(here.as_fd(), &[ADDRESS.parse().unwrap()]).unwrap();
    let known = read();
    assert_eq!(known.entries.len(), 1, "{known:?}");
    let mut short = known.clone();
    short.entries[0].timeout = 1;
    assert_eq!(conntrack::write(here.as_fd(), &short).unwrap(), Vec::<String>::new());
    eventually("the filter forgets the connection", || read().entries.is_empty());
    peer.write_all(b"b").unwrap();
    container.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    assert_eq!(container.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);
    assert_eq!(conntrack::write(here.as_fd(), &known).unwrap(), Vec::<String>::new());
    container.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    container.read_exact(&mut [0]).unwrap();
}
