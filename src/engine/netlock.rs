//! The network lock: for a while, no segment of the container's TCP connections passes.
//!
//! One nftables table in the container's network namespace, made by one netlink batch. It holds still the
//! connections it was given and nothing else: the namespace may be shared, and the pages may be
//! travelling through it. There are two sorts of table:
//!
//! * `lmrun-ID-PID` is owned by the process that made it; the kernel removes it when that process ends, however
//!   it ends ([`NetLock`]).
//! * `lmrun-ID` stays when the container has left ([`Nft::hold`]), so that its peers meet silence and not a
//!   reset until the connections live elsewhere; its entries expire.
//!
//! Message and attribute numbers: include/uapi/linux/netfilter/nf_tables.h.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use crate::sys::netlink::{Attributes, Batch, NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NetlinkSocket};
use crate::sys::netns;

const NFPROTO_UNSPEC: u8 = 0;
const NFPROTO_INET: u8 = 1;
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;
const SUBSYSTEM: u16 = 10;

const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEWTABLE: u16 = SUBSYSTEM << 8;
const DELTABLE: u16 = SUBSYSTEM << 8 | 2;
const NEWCHAIN: u16 = SUBSYSTEM << 8 | 3;
const NEWRULE: u16 = SUBSYSTEM << 8 | 6;
const NEWSET: u16 = SUBSYSTEM << 8 | 9;
const NEWSETELEM: u16 = SUBSYSTEM << 8 | 12;

/// NFT_TABLE_F_OWNER, since Linux 5.12.
const TABLE_OWNER: u32 = 2;
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

    /// Stops the segments of `connections`, both ways, until the value that is returned is released or this
    /// process ends.
    pub fn lock(self, id: &str, connections: &[Connection]) -> Result<NetLock, Error> {
        let table = format!("lmrun-{id}-{}", std::process::id());
        let mut batch = Batch::default();
        begin(&mut batch);
        add_table(&mut batch, &table, TABLE_OWNER, NLM_F_EXCL);
        add_locks(&mut batch, &table, connections, None);
        self.commit(batch, "add table", &table)?;
        Ok(NetLock { nft: self, table })
    }

    /// Stops the segments of `connections` for as long as `timeout`, beyond the end of this process.
    /// Replaces what an earlier call for the same container left.
    pub fn hold(&self, id: &str, connections: &[Connection], timeout: Duration) -> Result<(), Error> {
        let table = held_table(id);
        let mut batch = Batch::default();
        begin(&mut batch);
        // So that the removal finds a table, and all within one transaction.
        add_table(&mut batch, &table, 0, 0);
        delete_table(&mut batch, &table);
        add_table(&mut batch, &table, 0, NLM_F_EXCL);
        add_locks(&mut batch, &table, connections, Some(timeout));
        self.commit(batch, "add table", &table)
    }

    /// Removes what [`Nft::hold`] left; false if there was nothing.
    pub fn unhold(&self, id: &str) -> Result<bool, Error> {
        let table = held_table(id);
        let mut batch = Batch::default();
        begin(&mut batch);
        delete_table(&mut batch, &table);
        match self.commit(batch, "delete table", &table) {
            Ok(()) => Ok(true),
            Err(Error::Table { source, .. }) if source.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(e) => Err(e),
        }
    }

    fn commit(&self, mut batch: Batch, what: &'static str, table: &str) -> Result<(), Error> {
        batch.request(BATCH_END, 0, &nfgenmsg(NFPROTO_UNSPEC, SUBSYSTEM), |_| ());
        self.0.transact(&batch).map_err(|source| Error::Table { what, table: table.to_owned(), source })
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
        let mut batch = Batch::default();
        begin(&mut batch);
        delete_table(&mut batch, &self.table);
        self.nft.commit(batch, "delete table", &self.table)?;
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

/// `struct nfgenmsg`: family, version 0, and in network order the resource.
fn nfgenmsg(family: u8, resource: u16) -> [u8; 4] {
    let [high, low] = resource.to_be_bytes();
    [family, 0, high, low]
}

fn begin(batch: &mut Batch) {
    batch.request(BATCH_BEGIN, 0, &nfgenmsg(NFPROTO_UNSPEC, SUBSYSTEM), |_| ());
}

fn add_table(batch: &mut Batch, table: &str, table_flags: u32, request_flags: u16) {
    batch.request(NEWTABLE, NLM_F_CREATE | NLM_F_ACK | request_flags, &nfgenmsg(NFPROTO_INET, 0), |a| {
        a.put_name(1, table);
        a.put_be32(2, table_flags);
    });
}

fn delete_table(batch: &mut Batch, table: &str) {
    batch.request(DELTABLE, NLM_F_ACK, &nfgenmsg(NFPROTO_INET, 0), |a| a.put_name(1, table));
}

/// One family's set of connections: a key is source and destination address, source and destination port, as
/// they stand in the packet.
struct Family {
    set: &'static str,
    set_id: u32,
    nfproto: u8,
    /// Where in the network header the two addresses are, and how long they are together.
    addresses: (u32, u32),
}

const FAMILIES: [Family; 2] = [
    Family { set: "ip", set_id: 1, nfproto: NFPROTO_IPV4, addresses: (12, 8) },
    Family { set: "ip6", set_id: 2, nfproto: NFPROTO_IPV6, addresses: (8, 32) },
];

fn add_locks(batch: &mut Batch, table: &str, connections: &[Connection], timeout: Option<Duration>) {
    for family in &FAMILIES {
        add_set(batch, table, family, timeout);
        let keys: Vec<Vec<u8>> = connections.iter().flat_map(|c| keys(family.nfproto, c)).collect();
        for keys in keys.chunks(ELEMENTS) {
            add_elements(batch, table, family, keys);
        }
    }
    // NF_INET_LOCAL_IN and NF_INET_LOCAL_OUT.
    for (chain, hook) in [("input", 1), ("output", 3)] {
        add_chain(batch, table, chain, hook);
        for family in &FAMILIES {
            add_rule(batch, table, chain, family);
        }
    }
}

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

fn add_set(batch: &mut Batch, table: &str, family: &Family, timeout: Option<Duration>) {
    batch.request(NEWSET, NLM_F_CREATE | NLM_F_EXCL, &nfgenmsg(NFPROTO_INET, 0), |a| {
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

fn add_elements(batch: &mut Batch, table: &str, family: &Family, keys: &[Vec<u8>]) {
    batch.request(NEWSETELEM, NLM_F_CREATE, &nfgenmsg(NFPROTO_INET, 0), |a| {
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

fn add_chain(batch: &mut Batch, table: &str, chain: &str, hook: u32) {
    batch.request(NEWCHAIN, NLM_F_CREATE, &nfgenmsg(NFPROTO_INET, 0), |a| {
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

/// `meta nfproto FAMILY meta l4proto tcp KEY @SET drop`.
fn add_rule(batch: &mut Batch, table: &str, chain: &str, family: &Family) {
    // NFT_META_NFPROTO and NFT_META_L4PROTO.
    let tests = [(15, family.nfproto), (16, libc::IPPROTO_TCP as u8)];
    let (offset, len) = family.addresses;
    // NFT_PAYLOAD_NETWORK_HEADER: addresses; NFT_PAYLOAD_TRANSPORT_HEADER: ports; into consecutive registers.
    let loads = [(REG32, 1, offset, len), (REG32 + len / 4, 2, 0, 4)];
    batch.request(NEWRULE, NLM_F_CREATE, &nfgenmsg(NFPROTO_INET, 0), |a| {
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
                    a.nest(3, |a| a.put(1, &[value]));
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
