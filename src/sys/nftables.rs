//! Transactions with a table of nftables. Message and attribute numbers: include/uapi/linux/netfilter/nf_tables.h.

use std::io;

use super::netlink::{Attributes, Batch, NLM_F_ACK, NLM_F_CREATE, NetlinkSocket};

const NFPROTO_UNSPEC: u8 = 0;
const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEWTABLE: u16 = SUBSYSTEM << 8;
pub const GETTABLE: u16 = SUBSYSTEM << 8 | 1;
const DELTABLE: u16 = SUBSYSTEM << 8 | 2;
pub const NEWCHAIN: u16 = SUBSYSTEM << 8 | 3;
pub const NEWRULE: u16 = SUBSYSTEM << 8 | 6;
pub const NEWSET: u16 = SUBSYSTEM << 8 | 9;
pub const NEWSETELEM: u16 = SUBSYSTEM << 8 | 12;

/// NFT_TABLE_F_OWNER, since Linux 5.12: the table goes with the socket that made it.
pub const TABLE_OWNER: u32 = 2;

/// `struct nfgenmsg`: family, version 0, and in network order the resource.
pub fn nfgenmsg(family: u8, resource: u16) -> [u8; 4] {
    let [high, low] = resource.to_be_bytes();
    [family, 0, high, low]
}

/// Requests about one table, all of which are done or none.
#[derive(Debug)]
pub struct Transaction<'a> {
    batch: Batch,
    /// NFPROTO_*
    family: u8,
    pub table: &'a str,
}

impl<'a> Transaction<'a> {
    pub fn begin(family: u8, table: &'a str) -> Self {
        let mut batch = Batch::default();
        batch.request(BATCH_BEGIN, 0, &nfgenmsg(NFPROTO_UNSPEC, SUBSYSTEM), |_| ());
        Self { batch, family, table }
    }

    pub fn put(&mut self, kind: u16, flags: u16, attributes: impl FnOnce(&mut Attributes<'_>)) {
        self.batch.request(kind, flags, &nfgenmsg(self.family, 0), attributes);
    }

    pub fn add_table(&mut self, table_flags: u32, request_flags: u16) {
        let table = self.table;
        self.put(NEWTABLE, NLM_F_CREATE | NLM_F_ACK | request_flags, |a| {
            a.put_name(1, table);
            a.put_be32(2, table_flags);
        });
    }

    pub fn delete_table(&mut self) {
        let table = self.table;
        self.put(DELTABLE, NLM_F_ACK, |a| a.put_name(1, table));
    }

    /// # Errors
    /// That of the first request which the kernel refused; nothing was done then.
    pub fn commit(mut self, nft: &NetlinkSocket) -> io::Result<()> {
        self.batch.request(BATCH_END, 0, &nfgenmsg(NFPROTO_UNSPEC, SUBSYSTEM), |_| ());
        nft.transact(&self.batch)
    }
}
