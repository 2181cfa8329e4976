//! The container's network as others see it: what its interfaces are called, their hardware addresses, the addresses and
//! routes that they have. All of it is read at the source, made anew at the destination, and announced there when the
//! container has moved.
//!
//! ```text
//! source                                destination
//! Silencer::open
//! Interfaces::read  -------------------> Interfaces::stand_by         while the container still runs
//! (the container is frozen)
//! Silencer::impose                                                    nobody is answered by either
//!                                        Silence::lift, announce      it runs here
//! ```
//!
//! The other way round, [`Silence::lift`] at the source undoes it all: nothing else was touched there. A silence that must not end with
//! its process is a lasting one: at the destination until it is decided that the container runs there, at the source from the moment when it
//! gives the right to run up.

mod announce;
mod apply;
mod read;
mod silence;

pub use announce::{Announcement, announce};
pub(super) use read::Link;
pub use silence::{Silence, Silencer};

use std::io;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;

use prost::Message;

use crate::sys::netlink::NetlinkSocket;
use crate::sys::netns;
use crate::sys::rtnetlink::{ifa, nda};

/// More objects of a kind than a container's network namespace has: what a peer sends is bounded by it.
pub const MOST: usize = 4096;

/// A network namespace cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("enter the container's network namespace")]
    Namespace(#[source] io::Error),
    #[error("network of the container: {what}")]
    Netlink { what: &'static str, source: io::Error },
    #[error("network of the container: {0}")]
    Wrong(String),
}

pub type Result<T> = std::result::Result<T, Error>;

pub(super) fn netlink(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Netlink { what, source }
}

/// The links of the calling thread's network namespace.
pub(super) fn links() -> Result<Vec<Link>> {
    let socket = NetlinkSocket::route().map_err(netlink("open rtnetlink"))?;
    read::links(&socket)
}

/// Runs `work` in the network namespace `netns`.
pub(super) fn within<T: Send>(netns: BorrowedFd<'_>, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    netns::within(netns, work).map_err(Error::Namespace)?
}

/// All interfaces of a namespace but the loopback, and what decides where packets go.
#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct Interfaces {
    #[prost(message, repeated, tag = "1")]
    pub interfaces: Vec<Interface>,
    /// Those that the kernel has not made by itself.
    #[prost(message, repeated, tag = "2")]
    pub routes: Vec<Route>,
    /// The permanent ones.
    #[prost(message, repeated, tag = "3")]
    pub neighbours: Vec<Neighbour>,
    /// Beside the three that every namespace has; each as in RTM_NEWRULE, without its netlink header.
    #[prost(bytes = "vec", repeated, tag = "4")]
    pub rules: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct Interface {
    #[prost(string, tag = "1")]
    pub name: String,
    /// As in `ip -d link`: `veth`, `macvlan`; empty for hardware.
    #[prost(string, tag = "2")]
    pub kind: String,
    /// Hardware address; empty: it has none.
    #[prost(bytes = "vec", tag = "3")]
    pub mac: Vec<u8>,
    #[prost(uint32, tag = "4")]
    pub mtu: u32,
    #[prost(bool, tag = "5")]
    pub up: bool,
    /// IFF_NOARP: addresses of neighbours are not asked for.
    #[prost(bool, tag = "6")]
    pub noarp: bool,
    /// The primary one before its secondaries.
    #[prost(message, repeated, tag = "7")]
    pub addresses: Vec<Address>,
}

#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct Address {
    /// 4 or 16 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub local: Vec<u8>,
    #[prost(uint32, tag = "2")]
    pub prefix: u32,
    /// The other end of a point-to-point link; empty: it is none.
    #[prost(bytes = "vec", tag = "3")]
    pub peer: Vec<u8>,
    #[prost(bytes = "vec", tag = "4")]
    pub broadcast: Vec<u8>,
    /// RT_SCOPE_*
    #[prost(uint32, tag = "5")]
    pub scope: u32,
    /// IFA_F_*
    #[prost(uint32, tag = "6")]
    pub flags: u32,
    #[prost(string, tag = "7")]
    pub label: String,
    /// Of the routes that the kernel makes for it; 0: none of its own.
    #[prost(uint32, tag = "8")]
    pub metric: u32,
    /// Seconds; u32::MAX: for ever.
    #[prost(uint32, tag = "9")]
    pub preferred: u32,
    #[prost(uint32, tag = "10")]
    pub valid: u32,
}

impl Address {
    /// None if it is no address.
    pub fn ip(&self) -> Option<IpAddr> {
        ip(&self.local)
    }

    fn family(&self) -> u8 {
        family(&self.local)
    }

    /// Whether others may know it: it is in use, and not this host's own business.
    fn is_announced(&self) -> bool {
        let (unused, own) = (ifa::F_DADFAILED | ifa::F_TENTATIVE, u32::from(libc::RT_SCOPE_HOST));
        self.flags & unused == 0 && self.scope != own && self.ip().is_some_and(|ip| !ip.is_loopback())
    }
}

#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct Route {
    /// AF_INET or AF_INET6.
    #[prost(uint32, tag = "1")]
    pub family: u32,
    /// Empty: all; its prefix is 0 then.
    #[prost(bytes = "vec", tag = "2")]
    pub dst: Vec<u8>,
    #[prost(uint32, tag = "3")]
    pub dst_prefix: u32,
    #[prost(bytes = "vec", tag = "4")]
    pub src: Vec<u8>,
    #[prost(uint32, tag = "5")]
    pub src_prefix: u32,
    #[prost(uint32, tag = "6")]
    pub tos: u32,
    #[prost(uint32, tag = "7")]
    pub table: u32,
    #[prost(uint32, tag = "8")]
    pub protocol: u32,
    #[prost(uint32, tag = "9")]
    pub scope: u32,
    /// RTN_UNICAST, RTN_BLACKHOLE and others.
    #[prost(uint32, tag = "10")]
    pub kind: u32,
    #[prost(bytes = "vec", tag = "11")]
    pub preferred_source: Vec<u8>,
    #[prost(uint32, tag = "12")]
    pub metric: u32,
    /// RTA_METRICS as it is: MTU, window and others.
    #[prost(bytes = "vec", tag = "13")]
    pub metrics: Vec<u8>,
    /// RTA_PREF of an IPv6 router.
    #[prost(uint32, optional, tag = "14")]
    pub preference: Option<u32>,
    /// None for a route that leads nowhere.
    #[prost(message, repeated, tag = "15")]
    pub hops: Vec<Hop>,
}

/// One way of a route.
#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct Hop {
    /// Name of the interface; empty: the kernel finds it.
    #[prost(string, tag = "1")]
    pub interface: String,
    /// Empty: the destination is on the link.
    #[prost(bytes = "vec", tag = "2")]
    pub gateway: Vec<u8>,
    /// RTA_VIA: a gateway of another family, with its family before it.
    #[prost(bytes = "vec", tag = "3")]
    pub via: Vec<u8>,
    #[prost(bool, tag = "4")]
    pub onlink: bool,
    /// Less one.
    #[prost(uint32, tag = "5")]
    pub weight: u32,
}

#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct Neighbour {
    #[prost(string, tag = "1")]
    pub interface: String,
    #[prost(bytes = "vec", tag = "2")]
    pub ip: Vec<u8>,
    /// Empty for one that is answered for.
    #[prost(bytes = "vec", tag = "3")]
    pub mac: Vec<u8>,
    /// NTF_*
    #[prost(uint32, tag = "4")]
    pub flags: u32,
}

impl Neighbour {
    fn state(&self) -> u16 {
        if self.flags as u8 & nda::F_PROXY != 0 { 0 } else { nda::PERMANENT }
    }
}

impl Interfaces {
    /// All addresses that others may know.
    pub fn addresses(&self) -> Vec<IpAddr> {
        let all = self.interfaces.iter().flat_map(|i| &i.addresses);
        all.filter(|address| address.is_announced()).filter_map(Address::ip).collect()
    }

    /// As it goes to the other host.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.encode_to_vec()
    }

    /// What another host has sent, if it can be believed.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let read = Self::decode(bytes).map_err(|e| Error::Wrong(e.to_string()))?;
        read.check().map(|()| read)
    }

    /// Refuses what no [`Interfaces::read`] yields: it comes from another host.
    pub fn check(&self) -> Result<()> {
        let wrong = |what: String| Err(Error::Wrong(what));
        let all = self.interfaces.len() + self.routes.len() + self.neighbours.len() + self.rules.len();
        if all > MOST || self.interfaces.iter().map(|i| i.addresses.len()).sum::<usize>() > MOST {
            return wrong(format!("it has more than {MOST} objects"));
        }
        for interface in &self.interfaces {
            check_name(&interface.name)?;
            if interface.mac.len() > 32 || interface.kind.len() > 32 {
                return wrong(format!("{}: hardware address or kind", interface.name));
            }
            for address in &interface.addresses {
                let Some(ip) = address.ip() else {
                    return wrong(format!("{}: an address of {} bytes", interface.name, address.local.len()));
                };
                let len = address.local.len();
                let others = [&address.peer, &address.broadcast];
                let widest = len as u32 * 8;
                if address.prefix > widest || others.iter().any(|other| !other.is_empty() && other.len() != len) {
                    return wrong(format!("{}: {ip}: prefix or other end", interface.name));
                }
                if address.label.len() > 15 || address.scope > 255 {
                    return wrong(format!("{}: {ip}: label or scope", interface.name));
                }
            }
        }
        for route in &self.routes {
            let len = match route.family as i32 {
                libc::AF_INET => 4,
                libc::AF_INET6 => 16,
                family => return wrong(format!("a route of family {family}")),
            };
            let fits = |bytes: &Vec<u8>| bytes.is_empty() || bytes.len() == len;
            let addresses = [&route.dst, &route.src, &route.preferred_source];
            let hops = route.hops.iter().all(|hop| fits(&hop.gateway) && hop.via.len() <= 18 && hop.weight < 256);
            let small = [route.dst_prefix, route.src_prefix].iter().all(|prefix| *prefix <= len as u32 * 8);
            let bytes = [route.tos, route.protocol, route.scope, route.kind].iter().all(|number| *number < 256);
            if !addresses.into_iter().all(fits) || !hops || !small || !bytes {
                return wrong("a route".to_owned());
            }
            if route.metrics.len() > 1024 || route.hops.len() > 256 {
                return wrong("the length of a route".to_owned());
            }
            route.hops.iter().filter(|hop| !hop.interface.is_empty()).try_for_each(|hop| check_name(&hop.interface))?;
        }
        for neighbour in &self.neighbours {
            check_name(&neighbour.interface)?;
            if ip(&neighbour.ip).is_none() || neighbour.mac.len() > 32 || neighbour.flags > 255 {
                return wrong(format!("a neighbour on {}", neighbour.interface));
            }
        }
        if self.rules.iter().any(|rule| rule.len() > 1024) {
            return wrong("the length of a rule".to_owned());
        }
        Ok(())
    }
}

/// What the kernel takes for a name (dev_valid_name of net/core/dev.c), and in ASCII.
fn check_name(name: &str) -> Result<()> {
    let fits = |c: char| c.is_ascii_graphic() && !matches!(c, '/' | ':');
    let good = (1..16).contains(&name.len()) && name != "." && name != ".." && name.chars().all(fits);
    if good { Ok(()) } else { Err(Error::Wrong(format!("{name:?} is no name of an interface"))) }
}

pub(super) fn ip(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}

fn family(bytes: &[u8]) -> u8 {
    if bytes.len() == 4 { libc::AF_INET as u8 } else { libc::AF_INET6 as u8 }
}

#[cfg(test)]
mod tests;
