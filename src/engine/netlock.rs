//! The network lock: for a while, no segment of the container's TCP connections passes.
//!
//! One nftables table in the container's network namespace, made by one netlink batch. It holds still the
//! connections it was given and nothing else: the namespace may be shared, and the pages may be
//! travelling through it. There are three sorts of table:
//!
//! * `lmrun-ID-PID` is owned by the process that made it; the kernel removes it when that process ends, however
//!   it ends ([`NetLock`]).
//! * `lmrun-ID` stays when the container has left ([`Nft::hold`]), so that its peers meet silence and not a
//!   reset until the connections live elsewhere; its entries expire.
//! * `lmrun-ID-until-SECOND` does the same at the ports of the host's bridges ([`Nft::hold_at_bridges`]), for an engine that removes
//!   the container's namespace and connects a new one before it calls any runtime. `SECOND` is of CLOCK_BOOTTIME: the
//!   entries have expired then, and whoever looks at such tables next removes it.
//!
//! Attribute numbers: include/uapi/linux/netfilter/nf_tables.h.

use std::ffi::CStr;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use crate::sys::netlink::{self, Attributes, NLM_F_CREATE, NLM_F_EXCL, NetlinkSocket};
use crate::sys::nftables::{GETTABLE, NEWCHAIN, NEWRULE, NEWSET, NEWSETELEM, TABLE_OWNER, Transaction, nfgenmsg};
use crate::sys::{clock, netns};

const NFPROTO_INET: u8 = 1;
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_BRIDGE: u8 = 7;
const NFPROTO_IPV6: u8 = 10;

/// NFT_SET_TIMEOUT.
const SET_TIMEOUT: u32 = 0x10;

/// NFTA_LIST_ELEM.
const LIST_ELEM: u16 = 1;
/// NFT_REG_VERDICT.
const REG_VERDICT: u32 = 0;
/// NFT_REG32_00; one register is 4 bytes, the next one has the next number.
const REG32: u32 = 8;

/// Elements per message: an attribute cannot be longer than 64 KiB.
const ELEMENTS: usize = 1000;

/// The two ends of a TCP connection. An IPv4 address mapped into IPv6 is the same as the IPv4 address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Connection {
    pub local: SocketAddr,
    pub remote: SocketAddr,
}

/// nf_tables would not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("network namespace")]
    Namespace(#[source] io::Error),
    #[error("nftables: list the tables of bridges")]
    List(#[source] io::Error),
    #[error("nftables: {what} {table}")]
    Table { what: &'static str, table: String, source: io::Error },
}

/// The packet filter of one network namespace. To open it takes a thread (some 50 us): do that before the freeze.
#[derive(Debug)]
pub struct Nft(NetlinkSocket);

impl AsFd for Nft {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Nft {
    /// Opens the filter of `netns`, an open `/proc/PID/ns/net`. To use it needs CAP_NET_ADMIN there.
    pub fn open(netns: BorrowedFd<'_>) -> Result<Self, Error> {
        let socket = netns::within(netns, NetlinkSocket::netfilter).and_then(|socket| socket);
        socket.map(Self).map_err(Error::Namespace)
    }

    /// Opens the filter of the network namespace that we are in.
    pub fn here() -> Result<Self, Error> {
        NetlinkSocket::netfilter().map(Self).map_err(Error::Namespace)
    }

    /// Stops the segments of `connections`, both ways, until the value that is returned is released or this
    /// process ends.
    pub fn lock(self, id: &str, connections: &[Connection]) -> Result<NetLock, Error> {
        let table = format!("lmrun-{id}-{}", std::process::id());
        let mut request = Request::begin(&ENDS, &table);
        request.transaction.add_table(TABLE_OWNER, NLM_F_EXCL);
        request.add_locks(connections, None);
        self.commit(request, "add table")?;
        Ok(NetLock { nft: self, table })
    }

    /// Stops the segments of `connections` for as long as `timeout`, beyond the end of this process.
    /// Replaces what an earlier call for the same container left.
    pub fn hold(&self, id: &str, connections: &[Connection], timeout: Duration) -> Result<(), Error> {
        let table = held_table(id);
        let mut request = Request::begin(&ENDS, &table);
        // So that the removal finds a table, and all within one transaction.
        request.transaction.add_table(0, 0);
        request.transaction.delete_table();
        request.transaction.add_table(0, NLM_F_EXCL);
        request.add_locks(connections, Some(timeout));
        self.commit(request, "add table")
    }

    /// Removes what [`Nft::hold`] left; false if there was nothing.
    pub fn unhold(&self, id: &str) -> Result<bool, Error> {
        self.remove(&ENDS, &held_table(id))
    }

    /// Keeps the segments of `connections` from all that hangs on this namespace's bridges, for as long as `timeout` and beyond the
    /// end of this process. Replaces what an earlier call for the same container left.
    pub fn hold_at_bridges(&self, id: &str, connections: &[Connection], timeout: Duration) -> Result<(), Error> {
        self.unhold_at_bridges(Some(id))?;
        // The entries expire before it.
        let until = now() + timeout.as_secs() + 2;
        let table = format!("{}{UNTIL}{until}", held_table(id));
        let mut request = Request::begin(&BRIDGES, &table);
        request.transaction.add_table(0, NLM_F_EXCL);
        request.add_locks(connections, Some(timeout));
        self.commit(request, "add table")
    }

    /// Removes what [`Nft::hold_at_bridges`] left for this container, and what has expired of others.
    pub fn unhold_at_bridges(&self, id: Option<&str>) -> Result<(), Error> {
        let all = self.0.dump(GETTABLE, &nfgenmsg(NFPROTO_BRIDGE, 0)).map_err(Error::List)?;
        for message in &all {
            let found = netlink::attributes(message.get(nfgenmsg(0, 0).len()..).unwrap_or_default());
            // NFTA_TABLE_NAME.
            let Some(name) = found.get(&1).and_then(|name| CStr::from_bytes_with_nul(name).ok()?.to_str().ok()) else {
                continue;
            };
            let Some((held, until)) = name.rsplit_once(UNTIL) else { continue };
            let Ok(until) = until.parse::<u64>() else { continue };
            if id.is_some_and(|id| held == held_table(id)) || held.starts_with(&held_table("")) && until < now() {
                self.remove(&BRIDGES, name)?;
            }
        }
        Ok(())
    }

    /// False where there is no such table.
    fn remove(&self, place: &'static Place, table: &str) -> Result<bool, Error> {
        let mut request = Request::begin(place, table);
        request.transaction.delete_table();
        match self.commit(request, "delete table") {
            Ok(()) => Ok(true),
            Err(Error::Table { source, .. }) if source.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(e) => Err(e),
        }
    }

    fn commit(&self, request: Request<'_>, what: &'static str) -> Result<(), Error> {
        let table = request.transaction.table;
        request.transaction.commit(&self.0).map_err(|source| Error::Table { what, table: table.to_owned(), source })
    }
}

/// A lock that is in force. Must be released; when the last duplicate of its [`Nft`] is closed it ends, too.
#[derive(Debug)]
#[must_use = "the lock ends when this is dropped"]
pub struct NetLock {
    nft: Nft,
    table: String,
}

impl NetLock {
    /// Lets the segments pass again. To close the last duplicate of the [`Nft`] takes the kernel some 10 ms: leave that to
    /// somebody for whom nobody waits.
    pub fn release(self) -> Result<Nft, Error> {
        let mut request = Request::begin(&ENDS, &self.table);
        request.transaction.delete_table();
        self.nft.commit(request, "delete table")?;
        Ok(self.nft)
    }

    /// See [`Nft::unhold`]; this lock stays.
    pub fn unhold(&self, id: &str) -> Result<bool, Error> {
        self.nft.unhold(id)
    }

    /// See [`Nft::hold`]; this lock stays.
    pub fn hold(&self, id: &str, connections: &[Connection], timeout: Duration) -> Result<(), Error> {
        self.nft.hold(id, connections, timeout)
    }
}

fn held_table(id: &str) -> String {
    format!("lmrun-{id}")
}

/// In the name of a table, before the second of CLOCK_BOOTTIME with which it is empty.
const UNTIL: &str = "-until-";

/// The second of CLOCK_BOOTTIME that is passing.
fn now() -> u64 {
    (clock::boottime() / 1_000_000_000) as u64
}

/// Where a table sees segments.
#[derive(Debug)]
struct Place {
    /// The table's family.
    family: u8,
    /// Names of its chains, and their hooks.
    chains: &'static [(&'static str, u32)],
}

/// Where the connection ends in this namespace: NF_INET_LOCAL_IN and NF_INET_LOCAL_OUT.
const ENDS: Place = Place { family: NFPROTO_INET, chains: &[("input", 1), ("output", 3)] };

/// Where segments leave a bridge by one of its ports, whoever sent them: NF_BR_POST_ROUTING.
const BRIDGES: Place = Place { family: NFPROTO_BRIDGE, chains: &[("postrouting", 4)] };

/// A transaction with one table.
struct Request<'a> {
    place: &'static Place,
    transaction: Transaction<'a>,
}

/// One family's set of connections: a key is source and destination address, source and destination port, as
/// they stand in the packet.
struct Family {
    set: &'static str,
    set_id: u32,
    nfproto: u8,
    ethertype: u16,
    /// Where in the network header the two addresses are, and how long they are together.
    addresses: (u32, u32),
}

const FAMILIES: [Family; 2] = [
    Family { set: "ip", set_id: 1, nfproto: NFPROTO_IPV4, ethertype: 0x0800, addresses: (12, 8) },
    Family { set: "ip6", set_id: 2, nfproto: NFPROTO_IPV6, ethertype: 0x86dd, addresses: (8, 32) },
];

/// The keys of a connection's segments, there and back; none if it is of the other family.
fn keys(nfproto: u8, connection: &Connection) -> Vec<Vec<u8>> {
    let (local, remote) = (connection.local, connection.remote);
    let key = |from: SocketAddr, to: SocketAddr| {
        let mut key = match (from.ip().to_canonical(), to.ip().to_canonical()) {
            (IpAddr::V4(from), IpAddr::V4(to)) if nfproto == NFPROTO_IPV4 => [from.octets(), to.octets()].concat(),
            (IpAddr::V6(from), IpAddr::V6(to)) if nfproto == NFPROTO_IPV6 => [from.octets(), to.octets()].concat(),
            _ => return None,
        };
        key.extend_from_slice(&from.port().to_be_bytes());
        key.extend_from_slice(&to.port().to_be_bytes());
        Some(key)
    };
    [key(local, remote), key(remote, local)].into_iter().flatten().collect()
}

impl<'a> Request<'a> {
    fn begin(place: &'static Place, table: &'a str) -> Self {
        Self { place, transaction: Transaction::begin(place.family, table) }
    }

    fn add_locks(&mut self, connections: &[Connection], timeout: Option<Duration>) {
        for family in &FAMILIES {
            self.add_set(family, timeout);
            let keys: Vec<Vec<u8>> = connections.iter().flat_map(|c| keys(family.nfproto, c)).collect();
            for keys in keys.chunks(ELEMENTS) {
                self.add_elements(family, keys);
            }
        }
        for (chain, hook) in self.place.chains {
            self.add_chain(chain, *hook);
            for family in &FAMILIES {
                self.add_rule(chain, family);
            }
        }
    }

    fn add_set(&mut self, family: &Family, timeout: Option<Duration>) {
        let table = self.transaction.table;
        self.transaction.put(NEWSET, NLM_F_CREATE | NLM_F_EXCL, |a| {
            a.put_name(1, table);
            a.put_name(2, family.set);
            a.put_be32(3, if timeout.is_some() { SET_TIMEOUT } else { 0 });
            // NFTA_SET_KEY_TYPE is for whoever lists the table; 0 is bytes.
            a.put_be32(4, 0);
            a.put_be32(5, family.addresses.1 + 4);
            a.put_be32(10, family.set_id);
            if let Some(timeout) = timeout {
                a.put(11, &(timeout.as_millis() as u64).to_be_bytes());
            }
        });
    }

    fn add_elements(&mut self, family: &Family, keys: &[Vec<u8>]) {
        let table = self.transaction.table;
        self.transaction.put(NEWSETELEM, NLM_F_CREATE, |a| {
            a.put_name(1, table);
            a.put_name(2, family.set);
            a.put_be32(4, family.set_id);
            a.nest(3, |a| {
                for key in keys {
                    // NFTA_SET_ELEM_KEY of NFTA_DATA_VALUE.
                    a.nest(LIST_ELEM, |a| a.nest(1, |a| a.put(1, key)));
                }
            });
        });
    }

    fn add_chain(&mut self, chain: &str, hook: u32) {
        let table = self.transaction.table;
        self.transaction.put(NEWCHAIN, NLM_F_CREATE, |a| {
            a.put_name(1, table);
            a.put_name(3, chain);
            a.nest(4, |a| {
                a.put_be32(1, hook);
                // Before everybody else: NF_IP_PRI_CONNTRACK_DEFRAG.
                a.put_be32(2, -400i32 as u32);
            });
            // Policy NF_ACCEPT.
            a.put_be32(5, 1);
            a.put_name(7, "filter");
        });
    }

    /// `meta protocol FAMILY meta l4proto tcp KEY @SET drop`; bridges do not tell it as `meta nfproto`.
    fn add_rule(&mut self, chain: &str, family: &Family) {
        // NFT_META_PROTOCOL and NFT_META_L4PROTO.
        let tests: [(u32, &[u8]); 2] = [(1, &family.ethertype.to_be_bytes()), (16, &[libc::IPPROTO_TCP as u8])];
        let (offset, len) = family.addresses;
        // NFT_PAYLOAD_NETWORK_HEADER: addresses; NFT_PAYLOAD_TRANSPORT_HEADER: ports; into consecutive registers.
        let loads = [(REG32, 1, offset, len), (REG32 + len / 4, 2, 0, 4)];
        let table = self.transaction.table;
        self.transaction.put(NEWRULE, NLM_F_CREATE, |a| {
            a.put_name(1, table);
            a.put_name(2, chain);
            a.nest(4, |a| {
                for (key, value) in tests {
                    expression(a, "meta", |a| {
                        a.put_be32(1, REG32);
                        a.put_be32(2, key);
                    });
                    expression(a, "cmp", |a| {
                        a.put_be32(1, REG32);
                        a.put_be32(2, 0);
                        a.nest(3, |a| a.put(1, value));
                    });
                }
                for (register, base, offset, len) in loads {
                    expression(a, "payload", |a| {
                        a.put_be32(1, register);
                        a.put_be32(2, base);
                        a.put_be32(3, offset);
                        a.put_be32(4, len);
                    });
                }
                expression(a, "lookup", |a| {
                    a.put_name(1, family.set);
                    a.put_be32(2, REG32);
                    a.put_be32(4, family.set_id);
                });
                expression(a, "immediate", |a| {
                    a.put_be32(1, REG_VERDICT);
                    // NFTA_DATA_VERDICT of NFTA_VERDICT_CODE NF_DROP.
                    a.nest(2, |a| a.nest(2, |a| a.put_be32(1, 0)));
                });
            });
        });
    }
}

fn expression(a: &mut Attributes<'_>, name: &str, data: impl FnOnce(&mut Attributes<'_>)) {
    a.nest(LIST_ELEM, |a| {
        a.put_name(1, name);
        a.nest(2, data);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_stand_as_in_the_packet() {
        let c = Connection { local: "10.0.0.1:80".parse().unwrap(), remote: "[::ffff:10.0.0.2]:258".parse().unwrap() };
        let there = vec![10, 0, 0, 1, 10, 0, 0, 2, 0, 80, 1, 2];
        let back = vec![10, 0, 0, 2, 10, 0, 0, 1, 1, 2, 0, 80];
        assert_eq!(keys(NFPROTO_IPV4, &c), [there, back]);
        assert!(keys(NFPROTO_IPV6, &c).is_empty());
        let c = Connection { local: "[::1]:80".parse().unwrap(), remote: "[::2]:258".parse().unwrap() };
        assert_eq!(keys(NFPROTO_IPV6, &c)[1].len(), 36);
    }
}
