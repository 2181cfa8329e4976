//! The network of a namespace, read.

use std::collections::HashMap;
use std::os::fd::BorrowedFd;

use super::{Address, Hop, Interface, Interfaces, Neighbour, Result, Route, netlink, within};
use crate::sys::netlink::{NetlinkSocket, attributes};
use crate::sys::rtnetlink::{self as rt, AddressHeader, HopHeader, LinkHeader, NeighbourHeader, RouteHeader};
use crate::sys::rtnetlink::{bytes, ifa, ifla, name, nda, number, rta};

/// A link as the kernel counts it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub kind: String,
    pub mac: Vec<u8>,
    pub mtu: u32,
    pub flags: u32,
    pub loopback: bool,
    /// Index of the other end, of a veth or macvlan; perhaps in another namespace.
    pub other: Option<u32>,
}

impl Link {
    pub fn is_up(&self) -> bool {
        self.flags & libc::IFF_UP as u32 != 0
    }
}

/// All links of the socket's namespace.
pub(super) fn links(socket: &NetlinkSocket) -> Result<Vec<Link>> {
    let all = socket.dump(rt::RTM_GETLINK, &LinkHeader::default().bytes()).map_err(netlink("read interfaces"))?;
    Ok(all.iter().filter_map(|payload| link(payload)).collect())
}

fn link(payload: &[u8]) -> Option<Link> {
    let (header, a) = LinkHeader::parse(payload)?;
    let info = attributes(a.get(&ifla::LINKINFO).copied().unwrap_or_default());
    Some(Link {
        index: header.index,
        name: name(&a, ifla::IFNAME)?,
        kind: name(&info, ifla::INFO_KIND).unwrap_or_default(),
        mac: bytes(&a, ifla::ADDRESS),
        mtu: number(&a, ifla::MTU).unwrap_or_default(),
        flags: header.flags,
        loopback: header.flags & libc::IFF_LOOPBACK as u32 != 0,
        other: number(&a, ifla::LINK),
    })
}

/// All addresses, each with the index of its link.
pub(super) fn addresses(socket: &NetlinkSocket) -> Result<Vec<(u32, Address)>> {
    let all = socket.dump(rt::RTM_GETADDR, &AddressHeader::default().bytes()).map_err(netlink("read addresses"))?;
    Ok(all.iter().filter_map(|payload| address(payload)).collect())
}

fn address(payload: &[u8]) -> Option<(u32, Address)> {
    let (header, a) = AddressHeader::parse(payload)?;
    let (local, other) = (bytes(&a, ifa::LOCAL), bytes(&a, ifa::ADDRESS));
    // IPv6 has LOCAL only where there is another end, IPv4 always has both.
    let (local, peer) = match (local.is_empty(), local == other) {
        (true, _) => (other, Vec::new()),
        (false, true) => (local, Vec::new()),
        (false, false) => (local, other),
    };
    super::ip(&local)?;
    let life = a.get(&ifa::CACHEINFO).and_then(|info| info.first_chunk::<8>());
    let life = life.map_or([u32::MAX; 2], |info| {
        let (words, _) = info.as_chunks::<4>();
        [u32::from_ne_bytes(words[0]), u32::from_ne_bytes(words[1])]
    });
    Some((
        header.index,
        Address {
            local,
            prefix: header.prefix.into(),
            peer,
            broadcast: bytes(&a, ifa::BROADCAST),
            scope: header.scope.into(),
            flags: number(&a, ifa::FLAGS).unwrap_or(header.flags.into()),
            label: name(&a, ifa::LABEL).unwrap_or_default(),
            metric: number(&a, ifa::RT_PRIORITY).unwrap_or_default(),
            preferred: life[0],
            valid: life[1],
        },
    ))
}

/// The routes that somebody has made, with `names` of links by their index.
pub(super) fn routes(socket: &NetlinkSocket, names: &HashMap<u32, String>) -> Result<Vec<Route>> {
    let mut found = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let header = RouteHeader { family: family as u8, ..RouteHeader::default() };
        let all = socket.dump(rt::RTM_GETROUTE, &header.bytes()).map_err(netlink("read routes"))?;
        found.extend(all.iter().filter_map(|payload| route(payload, names)));
    }
    Ok(found)
}

fn route(payload: &[u8], names: &HashMap<u32, String>) -> Option<Route> {
    let (header, a) = RouteHeader::parse(payload)?;
    if header.protocol == rta::PROTOCOL_KERNEL || header.flags & rta::F_CLONED != 0 {
        return None;
    }
    let hop = |index: u32, flags: u32, weight: u8, a: &rt::Attributes<'_>| Hop {
        interface: names.get(&index).cloned().unwrap_or_default(),
        gateway: bytes(a, rta::GATEWAY),
        via: bytes(a, rta::VIA),
        onlink: flags & rta::F_ONLINK != 0,
        weight: weight.into(),
    };
    let hops = match (a.get(&rta::MULTIPATH), number(&a, rta::OIF)) {
        (Some(all), _) => {
            let each = HopHeader::parse_all(all);
            each.iter().map(|(h, a)| hop(h.index, h.flags.into(), h.hops, a)).collect()
        }
        (None, Some(index)) => vec![hop(index, header.flags, 0, &a)],
        (None, None) => Vec::new(),
    };
    Some(Route {
        family: header.family.into(),
        dst: bytes(&a, rta::DST),
        dst_prefix: header.dst_prefix.into(),
        src: bytes(&a, rta::SRC),
        src_prefix: header.src_prefix.into(),
        tos: header.tos.into(),
        table: number(&a, rta::TABLE).unwrap_or(header.table.into()),
        protocol: header.protocol.into(),
        scope: header.scope.into(),
        kind: header.kind.into(),
        preferred_source: bytes(&a, rta::PREFSRC),
        metric: number(&a, rta::PRIORITY).unwrap_or_default(),
        metrics: bytes(&a, rta::METRICS),
        preference: a.get(&rta::PREF).and_then(|pref| pref.first()).map(|pref| (*pref).into()),
        hops,
    })
}

/// The neighbours that somebody has made: permanent ones, and those that are answered for.
pub(super) fn neighbours(socket: &NetlinkSocket, names: &HashMap<u32, String>) -> Result<Vec<Neighbour>> {
    let mut found = Vec::new();
    for flags in [0, nda::F_PROXY] {
        let header = NeighbourHeader { flags, ..NeighbourHeader::default() };
        let all = socket.dump(rt::RTM_GETNEIGH, &header.bytes()).map_err(netlink("read neighbours"))?;
        found.extend(all.iter().filter_map(|payload| neighbour(payload, names)));
    }
    Ok(found)
}

fn neighbour(payload: &[u8], names: &HashMap<u32, String>) -> Option<Neighbour> {
    let (header, a) = NeighbourHeader::parse(payload)?;
    let made = header.state & nda::PERMANENT != 0 || header.flags & nda::F_PROXY != 0;
    let ip = a.get(&nda::DST).filter(|ip| made && super::ip(ip).is_some())?;
    let interface = names.get(&header.index)?.clone();
    Some(Neighbour { interface, ip: ip.to_vec(), mac: bytes(&a, nda::LLADDR), flags: header.flags.into() })
}

/// The rules beside those that each namespace has from the beginning.
pub(super) fn rules(socket: &NetlinkSocket) -> Result<Vec<Vec<u8>>> {
    let mut found = Vec::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let mut header = [0; rt::RULE_HEADER];
        header[0] = family as u8;
        let all = socket.dump(rt::RTM_GETRULE, &header).map_err(netlink("read rules"))?;
        found.extend(all.into_iter().filter(|rule| !is_default(rule)));
    }
    Ok(found)
}

/// Of priority 0 for table local, 32766 for main, 32767 for default, and nothing more.
fn is_default(rule: &[u8]) -> bool {
    let Some((header, rest)) = rule.split_first_chunk::<{ rt::RULE_HEADER }>() else { return true };
    let priority = number(&attributes(rest), rt::FRA_PRIORITY).unwrap_or_default();
    // Source, destination, their prefixes and TOS are not looked at; fib_rule_hdr has the table in its fifth byte.
    let [_, dst, src, tos, table, ..] = *header;
    (dst, src, tos) == (0, 0, 0) && matches!((priority, table), (0, 255) | (32766, 254) | (32767, 253))
}

impl Interfaces {
    /// Reads the network of `netns`, an open `/proc/PID/ns/net`.
    pub fn read(netns: BorrowedFd<'_>) -> Result<Self> {
        within(netns, || {
            let socket = NetlinkSocket::route().map_err(netlink("open rtnetlink"))?;
            Self::read_by(&socket)
        })
    }

    pub(super) fn read_by(socket: &NetlinkSocket) -> Result<Self> {
        let links = links(socket)?;
        let names: HashMap<u32, String> = links.iter().map(|link| (link.index, link.name.clone())).collect();
        let mut interfaces = Vec::new();
        let addresses = addresses(socket)?;
        for link in links.into_iter().filter(|link| !link.loopback) {
            let own = addresses.iter().filter(|(index, _)| *index == link.index);
            interfaces.push(Interface {
                addresses: own.map(|(_, address)| address.clone()).collect(),
                name: link.name,
                kind: link.kind,
                mac: link.mac,
                mtu: link.mtu,
                up: link.flags & libc::IFF_UP as u32 != 0,
                noarp: link.flags & libc::IFF_NOARP as u32 != 0,
            });
        }
        let (routes, neighbours) = (routes(socket, &names)?, neighbours(socket, &names)?);
        Ok(Self { interfaces, routes, neighbours, rules: rules(socket)? })
    }
}
