//! A network namespace that neither hears nor speaks: the container is not here, or not yet, but its addresses are.
//!
//! One nftables table of the netdev family, with a chain at the ingress and one at the egress of each interface, and drop as
//! their policy: ARP and neighbour discovery are not answered, connections are neither made nor reset. Nothing else is touched,
//! so it is undone in an instant: the chains are there before and after, and only their policy changes. Packet sockets ([`super::super::capture`]) still see what arrives.
//!
//! Attribute numbers: include/uapi/linux/netfilter/nf_tables.h.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use super::{Error, Result, netlink, read, within};
use crate::sys::netlink::{NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NetlinkSocket};
use crate::sys::nftables::{NEWCHAIN, TABLE_OWNER, Transaction};

const NFPROTO_NETDEV: u8 = 5;
/// NF_NETDEV_INGRESS, and NF_NETDEV_EGRESS, since Linux 5.16.
const INGRESS: u32 = 0;
const EGRESS: u32 = 1;
/// NF_DROP and NF_ACCEPT.
const DROP: u32 = 0;
const ACCEPT: u32 = 1;

/// What stays when this process ends.
const KEPT: &str = "lmrun-silence";

/// A namespace that can be silenced at once: the chains are there, and let everything pass.
#[derive(Debug)]
pub struct Silencer {
    nft: NetlinkSocket,
    interfaces: Vec<String>,
    hooks: &'static [u32],
    table: String,
}

/// A namespace that is silent, until this is dropped or this process ends; or until [`Silence::lift_kept`], if it is a lasting one.
#[derive(Debug)]
#[must_use = "the silence ends when this is dropped"]
pub struct Silence {
    silencer: Silencer,
    /// Somebody had kept it silent.
    was_kept: bool,
}

impl Silencer {
    /// Makes the chains in `netns`, which takes some milliseconds: before the container is frozen. They are there until
    /// this is dropped or this process ends. Interfaces that come or are renamed later
    /// are not silenced.
    pub fn open(netns: BorrowedFd<'_>) -> Result<Self> {
        Ok(Silencer::with(netns, own_table(), TABLE_OWNER, ACCEPT)?.0)
    }

    /// As [`Silencer::open`], for a silence that lasts beyond this process: until [`Silence::lift_kept`], which is to be
    /// called even if it was never imposed.
    pub fn lasting(netns: BorrowedFd<'_>) -> Result<Self> {
        Ok(Silencer::with(netns, KEPT.to_owned(), 0, ACCEPT)?.0)
    }

    /// With it comes whether there was such a table, which is replaced.
    fn with(netns: BorrowedFd<'_>, table: String, flags: u32, policy: u32) -> Result<(Self, bool)> {
        within(netns, || {
            let route = NetlinkSocket::route().map_err(netlink("open rtnetlink"))?;
            let links = read::links(&route)?.into_iter().filter(|link| !link.loopback);
            let nft = NetlinkSocket::netfilter().map_err(netlink("open nftables"))?;
            let interfaces = links.map(|link| link.name).collect();
            let mut this = Self { nft, interfaces, hooks: &[INGRESS, EGRESS], table };
            let mut replaces = false;
            loop {
                match this.make(flags, policy, replaces) {
                    Ok(()) => return Ok((this, replaces)),
                    // What this kernel cannot drop is what the container sends, and it is frozen or not there.
                    Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) && this.hooks.len() > 1 => {
                        this.hooks = &[INGRESS]
                    }
                    Err(e) if e.raw_os_error() == Some(libc::EEXIST) && !replaces => replaces = true,
                    Err(e) => return Err(netlink("prepare to silence the interfaces by nftables")(e)),
                }
            }
        })
    }

    /// From now on nothing passes. Takes some 50 us.
    pub fn impose(self) -> Result<Silence> {
        self.decide(DROP).map_err(netlink("silence the interfaces by nftables"))?;
        Ok(Silence { silencer: self, was_kept: false })
    }

    fn make(&self, flags: u32, policy: u32, replaces: bool) -> io::Result<()> {
        let mut transaction = Transaction::begin(NFPROTO_NETDEV, &self.table);
        if replaces {
            transaction.delete_table();
        }
        transaction.add_table(flags, NLM_F_EXCL);
        self.chains(|name, hook, interface| add_chain(&mut transaction, name, hook, interface, policy));
        transaction.commit(&self.nft)
    }

    /// To change a policy is quick; to take a chain away is not.
    fn decide(&self, policy: u32) -> io::Result<()> {
        if self.interfaces.is_empty() {
            return Ok(());
        }
        let mut transaction = Transaction::begin(NFPROTO_NETDEV, &self.table);
        self.chains(|name, _, _| {
            transaction.put(NEWCHAIN, NLM_F_ACK, |a| {
                a.put_name(1, &self.table);
                a.put_name(3, name);
                a.put_be32(5, policy);
            });
        });
        transaction.commit(&self.nft)
    }

    fn chains(&self, mut each: impl FnMut(&str, u32, &str)) {
        for (n, interface) in self.interfaces.iter().enumerate() {
            for hook in self.hooks {
                each(&format!("{hook}-{n}"), *hook, interface);
            }
        }
    }
}

impl Silence {
    /// In `netns`, beyond the end of this process. Takes some milliseconds.
    pub fn lasting(netns: BorrowedFd<'_>) -> Result<Self> {
        let (silencer, was_kept) = Silencer::with(netns, KEPT.to_owned(), 0, DROP)?;
        Ok(Silence { silencer, was_kept })
    }

    /// Whether somebody had kept it silent before.
    pub fn was_kept(&self) -> bool {
        self.was_kept
    }

    /// From now on everything passes. Takes some 50 us. What is left of a lasting one is for [`Silence::lift_kept`].
    pub fn lift(self) -> Result<()> {
        self.silencer.decide(ACCEPT).map_err(netlink("end the silence"))?;
        // To close the socket is to remove the chains, for which the kernel waits for all processors.
        let _ = thread::Builder::new().name("silence".to_owned()).spawn(|| drop(self));
        Ok(())
    }

    /// Ends in `netns` a silence that lasts; false if there was nothing.
    pub fn lift_kept(netns: BorrowedFd<'_>) -> Result<bool> {
        within(netns, || {
            let nft = NetlinkSocket::netfilter().map_err(netlink("open nftables"))?;
            match remove(&nft, KEPT) {
                Ok(()) => Ok(true),
                Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
                Err(source) => Err(Error::Netlink { what: "end the silence", source }),
            }
        })
    }
}

/// A table that goes with this process. A former one may still be on its way out.
fn own_table() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("{KEPT}-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

fn remove(nft: &NetlinkSocket, table: &str) -> io::Result<()> {
    let mut transaction = Transaction::begin(NFPROTO_NETDEV, table);
    transaction.delete_table();
    transaction.commit(nft)
}

fn add_chain(transaction: &mut Transaction<'_>, chain: &str, hook: u32, interface: &str, policy: u32) {
    let table = transaction.table;
    transaction.put(NEWCHAIN, NLM_F_CREATE | NLM_F_ACK, |a| {
        a.put_name(1, table);
        a.put_name(3, chain);
        a.nest(4, |a| {
            a.put_be32(1, hook);
            // Before everybody else.
            a.put_be32(2, -500i32 as u32);
            a.put_name(3, interface);
        });
        a.put_be32(5, policy);
        a.put_name(7, "filter");
    });
}
