//! What arrives while the container is on its way.

use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use lmrun::migrate::address::{Interfaces, Silencer};
use lmrun::migrate::capture::{Capture, Frames, Injector};
use runtime_tests::needs;

use crate::{ADDRESS, ADDRESS_6, Street, eventually, open};

const PORT: u16 = 7702;

#[test]
fn what_arrives_meanwhile_goes_along() {
    if !needs::root() {
        return;
    }
    let street = Street::new();
    let (here, there, host) = (open(&street.here), open(&street.there), open(&street.neighbour));
    let network = Interfaces::read(here.as_fd()).unwrap();
    let (incoming, problems) = network.stand_by(there.as_fd()).unwrap();
    assert_eq!(problems, Vec::<String>::new());
    let container = street.there.within(|| [ADDRESS, ADDRESS_6].map(|ip| UdpSocket::bind((ip, PORT)).unwrap()));
    let before = street.here.within(|| UdpSocket::bind((ADDRESS, PORT)).unwrap());
    before.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let sender = street.neighbour.within(|| UdpSocket::bind(("::", 0)).unwrap());
    let send = |to: &str, text: &[u8]| {
        let to = if to == ADDRESS { format!("[::ffff:{to}]:{PORT}") } else { format!("[{to}]:{PORT}") };
        sender.send_to(text, to).unwrap();
    };
    street.look();
    eventually("both addresses are known", || !street.known(ADDRESS).is_empty() && !street.known(ADDRESS_6).is_empty());
    let silencer = Silencer::open(here.as_fd()).unwrap();
    let capture = Capture::open(here.as_fd()).unwrap();
    send(ADDRESS, b"before");
    before.recv(&mut [0; 16]).unwrap();
    capture.begin().unwrap();
    let _silence = silencer.impose().unwrap();
    for n in 0..3u8 {
        send(ADDRESS, &[n]);
    }
    // Longer than the link's packets: in fragments.
    send(ADDRESS_6, &[7; 4000]);
    street.neighbour.within(|| {
        // To nobody in particular.
        let socket = UdpSocket::bind(("0.0.0.0", 0)).unwrap();
        socket.set_broadcast(true).unwrap();
        socket.send_to(b"all", ("10.77.0.255", PORT)).unwrap();
    });
    let start = Instant::now();
    let frames = capture.drain().unwrap();
    println!("{} frames drained in {:?}", frames.frames.len(), start.elapsed());
    assert_eq!((frames.frames.len(), frames.lost), (6, 0));
    capture.close();
    let frames = Frames::from_bytes(&frames.to_bytes()).unwrap();
    let injector = Injector::open(there.as_fd(), host.as_fd()).unwrap();
    assert_eq!(injector.problems, Vec::<String>::new());
    incoming.lift().unwrap();
    assert_eq!(injector.inject(&frames), 6);
    let receive = |socket: &UdpSocket| {
        let mut bytes = vec![0; 8000];
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let len = socket.recv(&mut bytes).unwrap();
        bytes.truncate(len);
        bytes
    };
    for n in 0..3u8 {
        assert_eq!(receive(&container[0]), [n]);
    }
    assert_eq!(receive(&container[1]), [7; 4000]);
}

#[test]
fn an_interface_without_another_end_is_named() {
    if !needs::root() {
        return;
    }
    let street = Street::new();
    let elsewhere = open(&street.there);
    let injector = Injector::open(open(&street.here).as_fd(), elsewhere.as_fd()).unwrap();
    assert!(injector.problems[0].starts_with("eth0: "), "{:?}", injector.problems);
}
