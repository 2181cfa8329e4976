//! Neighbours learn where the container is now: gratuitous ARP (RFC 826, RFC 5227) and unsolicited neighbour
//! advertisements (RFC 4861).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::BorrowedFd;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::{Interface, Interfaces, Result, netlink, read, within};
use crate::sys::netlink::NetlinkSocket;
use crate::sys::packet::PacketSocket;

type Mac = [u8; 6];

const EVERYBODY: Mac = [0xff; 6];
/// ff02::1, all nodes of the link, and its hardware address.
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES_MAC: Mac = [0x33, 0x33, 0, 0, 0, 1];

/// When it is said again, after the first time: frames get lost, and switches take their time to see a port come up.
const AGAIN: [Duration; 4] =
    [Duration::from_millis(20), Duration::from_millis(100), Duration::from_millis(300), Duration::from_millis(900)];

/// It was announced, and is being announced again.
#[derive(Debug)]
#[must_use = "the announcements stop with this process: wait for them before it ends"]
pub struct Announcement {
    repeating: Option<JoinHandle<()>>,
    /// What could not be said the first time, one sentence each.
    pub problems: Vec<String>,
}

impl Announcement {
    /// Waits until it has been said for the last time, within a second.
    pub fn wait(mut self) {
        if let Some(thread) = self.repeating.take() {
            let _ = thread.join();
        }
    }
}

/// Says at once on every interface of `netns` that is up where its addresses are, and goes on to say it for a second. The
/// namespace must not be silent.
pub fn announce(netns: BorrowedFd<'_>, wanted: &Interfaces) -> Result<Announcement> {
    let speakers = within(netns, || {
        let socket = NetlinkSocket::route().map_err(netlink("open rtnetlink"))?;
        let links = read::links(&socket)?;
        let mut speakers = Vec::new();
        for interface in wanted.interfaces.iter().filter(|interface| interface.up) {
            let link = links.iter().find(|link| link.name == interface.name);
            let Some((link, mac)) = link.and_then(|link| Some((link, Mac::try_from(&link.mac[..]).ok()?))) else {
                continue;
            };
            let socket = PacketSocket::sender(link.index).map_err(netlink("open a packet socket"))?;
            speakers.push((socket, frames(interface, mac), interface.name.clone()));
        }
        Ok(speakers)
    })?;
    let say = |speakers: &[(PacketSocket, Vec<Vec<u8>>, String)]| -> Vec<String> {
        let mut problems = Vec::new();
        for (socket, frames, name) in speakers {
            for frame in frames {
                problems.extend(socket.send(frame).err().map(|e| format!("{name}: announce an address: {e}")));
            }
        }
        problems
    };
    let problems = say(&speakers);
    let start = Instant::now();
    let repeating = thread::Builder::new().name("announce".to_owned()).spawn(move || {
        for when in AGAIN {
            thread::sleep(when.saturating_sub(start.elapsed()));
            say(&speakers);
        }
    });
    Ok(Announcement { repeating: repeating.ok(), problems })
}

/// What is to be said of an interface.
fn frames(interface: &Interface, mac: Mac) -> Vec<Vec<u8>> {
    let addresses = interface.addresses.iter().filter(|address| address.is_announced());
    let each = addresses.filter_map(super::Address::ip).flat_map(|ip| match ip {
        IpAddr::V4(_) if interface.noarp => Vec::new(),
        // Some listen to the one, some to the other.
        IpAddr::V4(ip) => vec![arp(1, mac, ip), arp(2, mac, ip)],
        IpAddr::V6(ip) => vec![advertisement(mac, ip)],
    });
    each.collect()
}

fn ethernet(to: Mac, from: Mac, protocol: u16) -> Vec<u8> {
    [&to[..], &from, &protocol.to_be_bytes()].concat()
}

/// Gratuitous ARP: a request (1) for one's own address, or an answer (2) that nobody has asked for.
fn arp(operation: u16, mac: Mac, ip: Ipv4Addr) -> Vec<u8> {
    let mut frame = ethernet(EVERYBODY, mac, libc::ETH_P_ARP as u16);
    // Ethernet and IPv4, with addresses of 6 and 4 bytes.
    frame.extend_from_slice(&[0, 1, 8, 0, 6, 4]);
    frame.extend_from_slice(&operation.to_be_bytes());
    let target = if operation == 1 { [0; 6] } else { mac };
    frame.extend_from_slice(&[&mac[..], &ip.octets(), &target, &ip.octets()].concat());
    frame
}

/// A neighbour advertisement that nobody has asked for, to all.
fn advertisement(mac: Mac, ip: Ipv6Addr) -> Vec<u8> {
    const ICMPV6: u8 = 58;
    // Type, code, checksum; flags: override what you know; target; option 2: its hardware address, 1 x 8 bytes.
    let mut icmp = vec![136, 0, 0, 0, 0x20, 0, 0, 0];
    icmp.extend_from_slice(&[&ip.octets()[..], &[2, 1], &mac].concat());
    let len = icmp.len() as u16;
    let ends = [ip.octets(), ALL_NODES.octets()].concat();
    let pseudo = [&ends[..], &u32::from(len).to_be_bytes(), &[0, 0, 0, ICMPV6]].concat();
    let sum = checksum(&[&pseudo[..], &icmp].concat());
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    let mut frame = ethernet(ALL_NODES_MAC, mac, libc::ETH_P_IPV6 as u16);
    // Version, class, flow label; length, next header; a hop limit of 255 shows that it comes from the link.
    let [high, low] = len.to_be_bytes();
    frame.extend_from_slice(&[0x60, 0, 0, 0, high, low, ICMPV6, 255]);
    frame.extend_from_slice(&ends);
    frame.extend_from_slice(&icmp);
    frame
}

/// RFC 1071, of an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes.as_chunks::<2>().0.iter().map(|word| u32::from(u16::from_be_bytes(*word))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migrate::address::Address;

    const MAC: Mac = [2, 0, 0, 0, 0, 1];

    #[test]
    fn arp_as_it_is_in_the_rfc() {
        let frame = arp(1, MAC, Ipv4Addr::new(10, 0, 0, 7));
        assert_eq!(frame.len(), 42);
        assert_eq!(frame[12..22], [8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        assert_eq!(frame[28..32], frame[38..42]);
        assert_eq!(arp(2, MAC, Ipv4Addr::LOCALHOST)[32..38], MAC);
    }

    #[test]
    fn an_advertisement_adds_up() {
        let frame = advertisement(MAC, "fd00::7".parse().unwrap());
        assert_eq!(frame.len(), 14 + 40 + 32);
        let pseudo = [&frame[22..54], &32u32.to_be_bytes(), &[0, 0, 0, 58]].concat();
        assert_eq!(checksum(&[&pseudo[..], &frame[54..]].concat()), 0);
    }

    #[test]
    fn what_is_nobodys_business_is_not_announced() {
        let address = |ip: [u8; 4], scope| Address { local: ip.to_vec(), prefix: 24, scope, ..Address::default() };
        let interface = Interface {
            addresses: vec![address([10, 0, 0, 1], 0), address([10, 0, 0, 2], 254), address([127, 0, 0, 9], 0)],
            ..Interface::default()
        };
        assert_eq!(frames(&interface, MAC).len(), 2);
        assert!(frames(&Interface { noarp: true, ..interface }, MAC).is_empty());
    }
}
