//! The network of a namespace, made as it was elsewhere.

use std::collections::HashMap;
use std::io;
use std::os::fd::BorrowedFd;

use super::read::{self, Link};
use super::{Address, Interface, Interfaces, Neighbour, Result, Route, Silence, family, netlink, within};
use crate::sys::netlink::{Attributes, Batch, NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, NetlinkSocket};
use crate::sys::rtnetlink::{self as rt, AddressHeader, HopHeader, LinkHeader, NeighbourHeader, RouteHeader};
use crate::sys::rtnetlink::{ifa, ifla, nda, rta};

const UP: u32 = libc::IFF_UP as u32;
const NOARP: u32 = libc::IFF_NOARP as u32;

/// Flags of an address that one may ask for.
const ADDRESS_FLAGS: u32 = ifa::F_MANAGETEMPADDR | ifa::F_NOPREFIXROUTE | ifa::F_MCAUTOJOIN;

impl Interfaces {
    /// Makes the interfaces of `netns` like these: name, hardware address, MTU, addresses, routes, neighbours, rules. What
    /// is there and is not here goes. An interface is the one of the same name, or the only one. Needs CAP_NET_ADMIN in
    /// the namespace's owner.
    ///
    /// The addresses answer at once: [`Interfaces::stand_by`] is for those that have another place as well.
    ///
    /// Returns what could not be done, one sentence each.
    pub fn apply(&self, netns: BorrowedFd<'_>) -> Result<Vec<String>> {
        let mut problems = self.rename(netns)?;
        problems.extend(self.make(netns)?);
        Ok(problems)
    }

    /// As [`Interfaces::apply`], in a lasting silence from the first address on: even if this process is killed, nobody finds here
    /// what is still elsewhere.
    pub fn stand_by(&self, netns: BorrowedFd<'_>) -> Result<(Silence, Vec<String>)> {
        // With its name an interface loses its chains, since Linux 6.16.
        let mut problems = self.rename(netns)?;
        let silence = Silence::lasting(netns)?;
        problems.extend(self.make(netns)?);
        Ok((silence, problems))
    }

    /// Gives the interfaces their names.
    fn rename(&self, netns: BorrowedFd<'_>) -> Result<Vec<String>> {
        self.check()?;
        within(netns, || {
            let mut work = Work::begin()?;
            for (wanted, link) in work.pairs(self)? {
                if wanted.name != link.name {
                    let name = |a: &mut Attributes<'_>| a.put_name(ifla::IFNAME, &wanted.name);
                    let done = work.change(&link, name);
                    work.note(|| format!("{}: name", wanted.name), done);
                }
            }
            Ok(work.problems)
        })
    }

    fn make(&self, netns: BorrowedFd<'_>) -> Result<Vec<String>> {
        within(netns, || {
            let mut work = Work::begin()?;
            work.interfaces(self)?;
            let links = read::links(&work.socket)?;
            let index = links.iter().map(|link| (link.name.clone(), link.index)).collect();
            work.routes(&self.routes, &index, &links)?;
            work.neighbours(&self.neighbours, &index, &links)?;
            work.rules(&self.rules)?;
            Ok(work.problems)
        })
    }
}

struct Work {
    socket: NetlinkSocket,
    problems: Vec<String>,
}

impl Work {
    fn begin() -> Result<Self> {
        let socket = NetlinkSocket::route().map_err(netlink("open rtnetlink"))?;
        Ok(Self { socket, problems: Vec::new() })
    }

    /// One request; the kernel's answer.
    fn ask(
        &self,
        kind: u16,
        flags: u16,
        header: &[u8],
        attributes: impl FnOnce(&mut Attributes<'_>),
    ) -> io::Result<()> {
        let mut batch = Batch::default();
        batch.request(kind, flags | NLM_F_ACK, header, attributes);
        self.socket.transact(&batch)
    }

    /// Notes what did not work.
    fn note(&mut self, what: impl FnOnce() -> String, done: io::Result<()>) {
        if let Err(e) = done {
            self.problems.push(format!("{}: {e}", what()));
        }
    }

    /// Each interface with the link that is to be it.
    fn pairs<'a>(&self, wanted: &'a Interfaces) -> Result<Vec<(&'a Interface, Link)>> {
        let links: Vec<Link> = read::links(&self.socket)?.into_iter().filter(|link| !link.loopback).collect();
        let only = wanted.interfaces.len() == 1 && links.len() == 1;
        let find = |interface: &Interface| links.iter().find(|link| only || link.name == interface.name).cloned();
        Ok(wanted.interfaces.iter().filter_map(|interface| Some((interface, find(interface)?))).collect())
    }

    fn interfaces(&mut self, wanted: &Interfaces) -> Result<()> {
        let pairs = self.pairs(wanted)?;
        for interface in wanted.interfaces.iter().filter(|interface| !pairs.iter().any(|(i, _)| i == interface)) {
            self.problems.push(format!("there is no interface {} at the destination", interface.name));
        }
        for (interface, link) in pairs {
            self.link(interface, &link);
            self.addresses(interface, link.index)?;
        }
        Ok(())
    }

    /// Changes what some drivers and older kernels do not change while the link is up.
    fn change(&self, link: &Link, attributes: impl Fn(&mut Attributes<'_>)) -> io::Result<()> {
        let header = |change| LinkHeader { index: link.index, change, ..LinkHeader::default() }.bytes();
        match self.ask(rt::RTM_NEWLINK, 0, &header(0), &attributes) {
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => self
                .ask(rt::RTM_NEWLINK, 0, &header(UP), |_| {})
                .and_then(|()| self.ask(rt::RTM_NEWLINK, 0, &header(0), &attributes)),
            done => done,
        }
    }

    fn link(&mut self, wanted: &Interface, link: &Link) {
        if link.mac != wanted.mac && !wanted.mac.is_empty() {
            let done = self.change(link, |a| a.put(ifla::ADDRESS, &wanted.mac));
            self.note(|| format!("{}: hardware address", wanted.name), done);
        }
        let header = |flags, change| LinkHeader { index: link.index, flags, change, ..LinkHeader::default() }.bytes();
        if link.mtu != wanted.mtu {
            let mtu = wanted.mtu.to_ne_bytes();
            let done = self.ask(rt::RTM_NEWLINK, 0, &header(0, 0), |a| a.put(ifla::MTU, &mtu));
            self.note(|| format!("{}: MTU {}", wanted.name, wanted.mtu), done);
        }
        let flags = if wanted.up { UP } else { 0 } | if wanted.noarp { NOARP } else { 0 };
        let done = self.ask(rt::RTM_NEWLINK, 0, &header(flags, UP | NOARP), |_| {});
        self.note(|| format!("{}: up or down", wanted.name), done);
    }

    fn addresses(&mut self, wanted: &Interface, index: u32) -> Result<()> {
        let key = |a: &Address| (a.local.clone(), a.prefix, a.peer.clone());
        // An address that is tentative waits, and may be given up.
        let ready = |a: &Address| a.flags & (ifa::F_TENTATIVE | ifa::F_DADFAILED) == 0;
        let same = |a: &Address, b: &Address| {
            key(a) == key(b) && ready(a) && (a.scope, &a.label, a.metric) == (b.scope, &b.label, b.metric)
        };
        let there: Vec<Address> =
            read::addresses(&self.socket)?.into_iter().filter(|(i, _)| *i == index).map(|(_, a)| a).collect();
        for old in there.iter().filter(|old| !wanted.addresses.iter().any(|new| same(old, new))) {
            let done = self.address(rt::RTM_DELADDR, 0, index, old);
            // With a primary address its secondaries may have gone.
            let gone = done.as_ref().is_err_and(|e| e.raw_os_error() == Some(libc::EADDRNOTAVAIL));
            self.note(|| format!("{}: remove {}", wanted.name, shown(&old.local)), if gone { Ok(()) } else { done });
        }
        for new in &wanted.addresses {
            let done = self.address(rt::RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, index, new);
            self.note(|| format!("{}: address {}/{}", wanted.name, shown(&new.local), new.prefix), done);
        }
        Ok(())
    }

    fn address(&self, kind: u16, flags: u16, index: u32, address: &Address) -> io::Result<()> {
        let header = AddressHeader {
            family: address.family(),
            prefix: address.prefix as u8,
            flags: 0,
            scope: address.scope as u8,
            index,
        };
        self.ask(kind, flags, &header.bytes(), |a| {
            let other = if address.peer.is_empty() { &address.local } else { &address.peer };
            a.put(ifa::LOCAL, &address.local);
            a.put(ifa::ADDRESS, other);
            if kind == rt::RTM_DELADDR {
                return;
            }
            if !address.broadcast.is_empty() {
                a.put(ifa::BROADCAST, &address.broadcast);
            }
            if !address.label.is_empty() {
                a.put_name(ifa::LABEL, &address.label);
            }
            if address.metric != 0 {
                a.put(ifa::RT_PRIORITY, &address.metric.to_ne_bytes());
            }
            // Nobody is asked whether the address is free: it is the container's.
            a.put(ifa::FLAGS, &(address.flags & ADDRESS_FLAGS | ifa::F_NODAD).to_ne_bytes());
            if address.valid != u32::MAX {
                a.put(ifa::CACHEINFO, &[address.preferred, address.valid, 0, 0].map(u32::to_ne_bytes).concat());
            }
        })
    }

    fn routes(&mut self, wanted: &[Route], index: &HashMap<String, u32>, links: &[Link]) -> Result<()> {
        let there = read::routes(&self.socket, &names(links))?;
        for old in there.iter().filter(|old| !wanted.contains(old)) {
            let done = self.route(rt::RTM_DELROUTE, 0, old, index);
            let gone = done.as_ref().is_err_and(|e| e.raw_os_error() == Some(libc::ESRCH));
            self.note(|| format!("remove {}", route_shown(old)), if gone { Ok(()) } else { done });
        }
        // What is on the link comes before the gateways that are found by it.
        let (mut near, far): (Vec<&Route>, Vec<&Route>) =
            wanted.iter().filter(|new| !there.contains(new)).partition(|r| r.hops.iter().all(|h| h.gateway.is_empty()));
        near.extend(far);
        for new in near {
            let done = self.route(rt::RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL, new, index);
            self.note(|| route_shown(new), done);
        }
        Ok(())
    }

    fn route(&self, kind: u16, flags: u16, route: &Route, index: &HashMap<String, u32>) -> io::Result<()> {
        let find = |name: &str| match index.get(name) {
            Some(index) => Ok(*index),
            None if name.is_empty() => Ok(0),
            None => Err(io::Error::new(io::ErrorKind::NotFound, format!("there is no interface {name}"))),
        };
        let indices = route.hops.iter().map(|hop| find(&hop.interface)).collect::<io::Result<Vec<u32>>>()?;
        let onlink = |on: bool| if on { rta::F_ONLINK } else { 0 };
        let header = RouteHeader {
            family: route.family as u8,
            dst_prefix: route.dst_prefix as u8,
            src_prefix: route.src_prefix as u8,
            tos: route.tos as u8,
            // RT_TABLE_COMPAT: the attribute has it.
            table: u8::try_from(route.table).unwrap_or(252),
            protocol: route.protocol as u8,
            scope: route.scope as u8,
            kind: route.kind as u8,
            flags: if route.hops.len() == 1 { onlink(route.hops[0].onlink) } else { 0 },
        };
        self.ask(kind, flags, &header.bytes(), |a| {
            let mut put = |kind, bytes: &[u8]| {
                if !bytes.is_empty() {
                    a.put(kind, bytes);
                }
            };
            put(rta::DST, &route.dst);
            put(rta::SRC, &route.src);
            put(rta::PREFSRC, &route.preferred_source);
            put(rta::METRICS, &route.metrics);
            put(rta::TABLE, &route.table.to_ne_bytes());
            if route.metric != 0 {
                put(rta::PRIORITY, &route.metric.to_ne_bytes());
            }
            if let Some(preference) = route.preference {
                put(rta::PREF, &[preference as u8]);
            }
            match (&route.hops[..], &indices[..]) {
                ([], _) => {}
                ([hop], [index]) => {
                    put(rta::GATEWAY, &hop.gateway);
                    put(rta::VIA, &hop.via);
                    if *index != 0 {
                        put(rta::OIF, &index.to_ne_bytes());
                    }
                }
                (hops, indices) => {
                    let mut all = Vec::new();
                    for (hop, index) in hops.iter().zip(indices) {
                        let mut gateway = Vec::new();
                        for (kind, value) in [(rta::GATEWAY, &hop.gateway), (rta::VIA, &hop.via)] {
                            if !value.is_empty() {
                                crate::sys::netlink::put(&mut gateway, kind, value);
                            }
                        }
                        let (flags, hops) = (onlink(hop.onlink) as u8, hop.weight as u8);
                        let header = HopHeader { flags, hops, index: *index };
                        all.extend([header.bytes(gateway.len()), gateway].concat());
                    }
                    put(rta::MULTIPATH, &all);
                }
            }
        })
    }

    fn neighbours(&mut self, wanted: &[Neighbour], index: &HashMap<String, u32>, links: &[Link]) -> Result<()> {
        let there = read::neighbours(&self.socket, &names(links))?;
        for old in there.iter().filter(|old| !wanted.contains(old)) {
            let done = self.neighbour(rt::RTM_DELNEIGH, 0, old, index);
            self.note(|| format!("{}: remove neighbour {}", old.interface, shown(&old.ip)), done);
        }
        for new in wanted.iter().filter(|new| !there.contains(new)) {
            let done = self.neighbour(rt::RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, new, index);
            self.note(|| format!("{}: neighbour {}", new.interface, shown(&new.ip)), done);
        }
        Ok(())
    }

    fn neighbour(&self, kind: u16, flags: u16, n: &Neighbour, index: &HashMap<String, u32>) -> io::Result<()> {
        let index = *index.get(&n.interface).ok_or(io::ErrorKind::NotFound)?;
        let header = NeighbourHeader { family: family(&n.ip), index, state: n.state(), flags: n.flags as u8, kind: 0 };
        self.ask(kind, flags, &header.bytes(), |a| {
            a.put(nda::DST, &n.ip);
            if !n.mac.is_empty() {
                a.put(nda::LLADDR, &n.mac);
            }
        })
    }

    fn rules(&mut self, wanted: &[Vec<u8>]) -> Result<()> {
        let there = read::rules(&self.socket)?;
        for old in there.iter().filter(|old| !wanted.contains(old)) {
            let done = self.ask(rt::RTM_DELRULE, 0, old, |_| {});
            self.note(|| "remove a rule".to_owned(), done);
        }
        for new in wanted.iter().filter(|new| !there.contains(new)) {
            let done = self.ask(rt::RTM_NEWRULE, NLM_F_CREATE | NLM_F_EXCL, new, |_| {});
            self.note(|| "a rule for routes".to_owned(), done);
        }
        Ok(())
    }
}

fn names(links: &[Link]) -> HashMap<u32, String> {
    links.iter().map(|link| (link.index, link.name.clone())).collect()
}

fn shown(bytes: &[u8]) -> String {
    super::ip(bytes).map(|ip| ip.to_string()).unwrap_or_default()
}

fn route_shown(route: &Route) -> String {
    let to =
        if route.dst.is_empty() { "default".to_owned() } else { format!("{}/{}", shown(&route.dst), route.dst_prefix) };
    let via = route.hops.first().filter(|hop| !hop.gateway.is_empty());
    format!("route to {to}{}", via.map(|hop| format!(" by {}", shown(&hop.gateway))).unwrap_or_default())
}
