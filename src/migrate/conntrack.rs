//! What a host's packet filter knows of the container's connections: entries of its connection tracking, carried to the
//! other host, where a filter that lets only known connections pass would stop them otherwise.
//!
//! Message and attribute numbers: include/uapi/linux/netfilter/nfnetlink_conntrack.h.

use std::collections::HashSet;
use std::io;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;

use prost::Message;

use super::address::{Error, Interfaces, Result, netlink, within};
use crate::sys::netlink::{Attributes, Batch, NLM_F_ACK, NLM_F_CREATE, NetlinkSocket, attributes};

const SUBSYSTEM: u16 = 1;
const NEW: u16 = SUBSYSTEM << 8;
const GET: u16 = SUBSYSTEM << 8 | 1;

/// CTA_*
const TUPLE_ORIG: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const STATUS: u16 = 3;
const PROTOINFO: u16 = 4;
const NAT_SRC: u16 = 6;
const TIMEOUT: u16 = 7;
const MARK: u16 = 8;
const NAT_DST: u16 = 13;
const ZONE: u16 = 18;

/// IPS_*, include/uapi/linux/netfilter/nf_conntrack_common.h.
const SEEN_REPLY: u32 = 2;
const ASSURED: u32 = 4;
const CONFIRMED: u32 = 8;
const IS_SRC_NAT: u32 = 0x10;
const IS_DST_NAT: u32 = 0x20;

/// IP_CT_TCP_FLAG_BE_LIBERAL, include/uapi/linux/netfilter/nf_conntrack_tcp.h: sequence numbers out of the window pass. The
/// window is not in an entry.
const BE_LIBERAL: u8 = 8;

/// More than are carried.
const MOST: usize = 65536;

/// Entries that go to the other host in one message of [`super::wire`].
const IN_ONE_MESSAGE: usize = 4096;

/// Requests that go to the kernel together.
const TOGETHER: usize = 64;

#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct Entries {
    #[prost(message, repeated, tag = "1")]
    pub entries: Vec<Entry>,
}

/// A connection as it was begun, and as its answers come: not the same where addresses are translated.
#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct Entry {
    #[prost(message, required, tag = "1")]
    pub original: Tuple,
    #[prost(message, required, tag = "2")]
    pub reply: Tuple,
    /// IPS_*
    #[prost(uint32, tag = "3")]
    pub status: u32,
    /// Seconds.
    #[prost(uint32, tag = "4")]
    pub timeout: u32,
    #[prost(uint32, tag = "5")]
    pub mark: u32,
    #[prost(uint32, tag = "6")]
    pub zone: u32,
    #[prost(message, optional, tag = "7")]
    pub tcp: Option<Tcp>,
}

#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct Tuple {
    /// 4 or 16 bytes.
    #[prost(bytes = "vec", tag = "1")]
    pub src: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub dst: Vec<u8>,
    /// IPPROTO_TCP and others that have ports.
    #[prost(uint32, tag = "3")]
    pub protocol: u32,
    #[prost(uint32, tag = "4")]
    pub src_port: u32,
    #[prost(uint32, tag = "5")]
    pub dst_port: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, ::prost::Message)]
pub struct Tcp {
    /// TCP_CONNTRACK_*
    #[prost(uint32, tag = "1")]
    pub state: u32,
    /// IP_CT_TCP_FLAG_*, of who began the connection and of the other.
    #[prost(uint32, tag = "2")]
    pub flags_original: u32,
    #[prost(uint32, tag = "3")]
    pub flags_reply: u32,
    /// Shifts of the windows.
    #[prost(uint32, tag = "4")]
    pub scale_original: u32,
    #[prost(uint32, tag = "5")]
    pub scale_reply: u32,
}

const WITH_PORTS: [u32; 3] = [libc::IPPROTO_TCP as u32, libc::IPPROTO_UDP as u32, libc::IPPROTO_SCTP as u32];

impl Tuple {
    fn is_sound(&self) -> bool {
        matches!(self.src.len(), 4 | 16)
            && self.dst.len() == self.src.len()
            && WITH_PORTS.contains(&self.protocol)
            && self.src_port.max(self.dst_port) <= u16::MAX.into()
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let tuple = attributes(bytes);
        let (ip, proto) = (attributes(tuple.get(&1)?), attributes(tuple.get(&2)?));
        // CTA_IP_V4_SRC, CTA_IP_V4_DST, or those of IPv6.
        let address = |v4: u16, v6: u16| ip.get(&v4).or(ip.get(&v6)).map(|bytes| bytes.to_vec());
        let port = |kind: u16| Some(u16::from_be_bytes(*proto.get(&kind)?.first_chunk()?).into());
        let protocol = u32::from(*proto.get(&1)?.first()?);
        let tuple = Self { src: address(1, 3)?, dst: address(2, 4)?, protocol, src_port: port(2)?, dst_port: port(3)? };
        tuple.is_sound().then_some(tuple)
    }

    fn put(&self, kind: u16, a: &mut Attributes<'_>) {
        let (src, dst) = if self.src.len() == 4 { (1, 2) } else { (3, 4) };
        a.nest(kind, |a| {
            a.nest(1, |a| {
                a.put(src, &self.src);
                a.put(dst, &self.dst);
            });
            a.nest(2, |a| {
                a.put(1, &[self.protocol as u8]);
                a.put(2, &(self.src_port as u16).to_be_bytes());
                a.put(3, &(self.dst_port as u16).to_be_bytes());
            });
        });
    }
}

impl Entry {
    fn parse(payload: &[u8]) -> Option<Self> {
        // struct nfgenmsg.
        let a = attributes(payload.get(4..)?);
        let number = |kind: u16| Some(u32::from_be_bytes(*a.get(&kind)?.first_chunk()?));
        let zone = a.get(&ZONE).and_then(|zone| zone.first_chunk()).map(|zone| u16::from_be_bytes(*zone).into());
        Some(Self {
            original: Tuple::parse(a.get(&TUPLE_ORIG)?)?,
            reply: Tuple::parse(a.get(&TUPLE_REPLY)?)?,
            status: number(STATUS)?,
            timeout: number(TIMEOUT)?,
            mark: number(MARK).unwrap_or_default(),
            zone: zone.unwrap_or_default(),
            tcp: a.get(&PROTOINFO).and_then(|info| Tcp::parse(info)),
        })
    }

    fn addresses(&self) -> [&[u8]; 4] {
        [&self.original.src, &self.original.dst, &self.reply.src, &self.reply.dst].map(Vec::as_slice)
    }

    fn is_sound(&self) -> bool {
        let (a, b) = (&self.original, &self.reply);
        a.is_sound() && b.is_sound() && a.protocol == b.protocol && a.src.len() == b.src.len()
    }

    /// The address of this host by which addresses of the connection are translated.
    fn translated(&self) -> Option<&[u8]> {
        match (self.status & IS_SRC_NAT != 0, self.status & IS_DST_NAT != 0) {
            (true, _) => Some(&self.reply.dst),
            (false, true) => Some(&self.original.dst),
            (false, false) => None,
        }
    }

    /// `anew`: how addresses are translated can be said only of a connection that is not known yet.
    fn request(&self, batch: &mut Batch, anew: bool) {
        let family = if self.original.src.len() == 4 { libc::AF_INET } else { libc::AF_INET6 };
        batch.request(NEW, NLM_F_CREATE | NLM_F_ACK, &[family as u8, 0, 0, 0], |a| {
            // The kernel wants the answers as they would be without translation, and translates them itself.
            let mut reply = self.reply.clone();
            if self.status & IS_SRC_NAT != 0 {
                (reply.dst, reply.dst_port) = (self.original.src.clone(), self.original.src_port);
            }
            if self.status & IS_DST_NAT != 0 {
                (reply.src, reply.src_port) = (self.original.dst.clone(), self.original.dst_port);
            }
            self.original.put(TUPLE_ORIG, a);
            reply.put(TUPLE_REPLY, a);
            a.put_be32(STATUS, self.status & (SEEN_REPLY | ASSURED) | CONFIRMED);
            a.put_be32(TIMEOUT, self.timeout);
            if self.mark != 0 {
                a.put_be32(MARK, self.mark);
            }
            if self.zone != 0 {
                a.put(ZONE, &(self.zone as u16).to_be_bytes());
            }
            if anew && self.status & IS_DST_NAT != 0 {
                put_range(NAT_DST, &self.reply.src, self.reply.src_port, a);
            }
            if anew && self.status & IS_SRC_NAT != 0 {
                put_range(NAT_SRC, &self.reply.dst, self.reply.dst_port, a);
            }
            if let Some(tcp) = &self.tcp {
                tcp.put(a);
            }
        });
    }
}

/// What an address and a port are translated to: CTA_NAT_*.
fn put_range(kind: u16, address: &[u8], port: u32, a: &mut Attributes<'_>) {
    let (least, most) = if address.len() == 4 { (1, 2) } else { (4, 5) };
    let port = (port as u16).to_be_bytes();
    a.nest(kind, |a| {
        a.put(least, address);
        a.put(most, address);
        a.nest(3, |a| {
            a.put(1, &port);
            a.put(2, &port);
        });
    });
}

impl Tcp {
    fn parse(info: &[u8]) -> Option<Self> {
        let info = attributes(info);
        let tcp = attributes(info.get(&1)?);
        let byte = |kind: u16| tcp.get(&kind).and_then(|value| value.first()).map(|byte| u32::from(*byte));
        Some(Self {
            state: byte(1)?,
            scale_original: byte(2).unwrap_or_default(),
            scale_reply: byte(3).unwrap_or_default(),
            flags_original: byte(4).unwrap_or_default(),
            flags_reply: byte(5).unwrap_or_default(),
        })
    }

    fn put(&self, a: &mut Attributes<'_>) {
        // struct nf_ct_tcp_flags: flags, and which of them count.
        let flags = |flags: u32| [flags as u8 | BE_LIBERAL, flags as u8 | BE_LIBERAL];
        a.nest(PROTOINFO, |a| {
            a.nest(1, |a| {
                a.put(1, &[self.state as u8]);
                a.put(2, &[self.scale_original.min(14) as u8]);
                a.put(3, &[self.scale_reply.min(14) as u8]);
                a.put(4, &flags(self.flags_original));
                a.put(5, &flags(self.flags_reply));
            });
        });
    }
}

impl Entries {
    /// As they go to the other host, in as many messages as it takes.
    pub fn to_messages(&self) -> Vec<Vec<u8>> {
        let each = self.entries.chunks(IN_ONE_MESSAGE);
        each.map(|some| Self { entries: some.to_vec() }.encode_to_vec()).collect()
    }

    /// What another host has sent in one message, if it can be believed.
    pub fn from_message(bytes: &[u8]) -> Result<Self> {
        let wrong = |what: &str| Error::Wrong(format!("tracked connections: {what}"));
        let read = Self::decode(bytes).map_err(|e| wrong(&e.to_string()))?;
        if read.entries.len() > IN_ONE_MESSAGE {
            return Err(wrong("too many"));
        }
        if read.entries.iter().all(Entry::is_sound) { Ok(read) } else { Err(wrong("one that is none")) }
    }
}

/// What the namespace `netns` (the container's, or the host's) knows of connections of `addresses`. Nothing, if it does not
/// track connections or this kernel cannot tell.
pub fn read(netns: BorrowedFd<'_>, addresses: &[IpAddr]) -> Result<Entries> {
    let wanted: HashSet<Vec<u8>> = addresses.iter().map(bytes_of).collect();
    within(netns, || {
        let socket = NetlinkSocket::netfilter().map_err(netlink("open ctnetlink"))?;
        let mut entries = Vec::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            let all = match socket.dump(GET, &[family as u8, 0, 0, 0]) {
                // The kernel has no such subsystem.
                Err(e) if is_missing(&e) => return Ok(Entries::default()),
                all => all.map_err(netlink("read tracked connections"))?,
            };
            let found = all.iter().filter_map(|payload| Entry::parse(payload));
            entries.extend(found.filter(|entry| entry.addresses().iter().any(|address| wanted.contains(*address))));
        }
        entries.truncate(MOST);
        Ok(Entries { entries })
    })
}

fn is_missing(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOENT | libc::EPROTONOSUPPORT))
}

/// Makes the entries in `netns`; those that are there are brought up to date. Connections that are translated by an address
/// that this namespace does not have are left out: what they send or get does not come by here.
///
/// Returns what could not be done, one sentence each.
pub fn write(netns: BorrowedFd<'_>, entries: &Entries) -> Result<Vec<String>> {
    if entries.entries.is_empty() {
        return Ok(Vec::new());
    }
    let own: HashSet<Vec<u8>> = Interfaces::read(netns)?.addresses().iter().map(bytes_of).collect();
    let (here, elsewhere): (Vec<&Entry>, Vec<&Entry>) = entries
        .entries
        .iter()
        .filter(|entry| entry.is_sound())
        .partition(|entry| entry.translated().is_none_or(|address| own.contains(address)));
    let mut problems = Vec::new();
    if !elsewhere.is_empty() {
        problems.push(format!("{} tracked connections are translated by an address of the source", elsewhere.len()));
    }
    within(netns, || {
        let socket = NetlinkSocket::netfilter().map_err(netlink("open ctnetlink"))?;
        for some in here.chunks(TOGETHER) {
            let make = |entries: &[&Entry], anew| {
                let mut batch = Batch::default();
                entries.iter().for_each(|entry| entry.request(&mut batch, anew));
                socket.transact(&batch)
            };
            if make(some, true).is_ok() {
                continue;
            }
            // One after the other, to learn which.
            for entry in some {
                let made = match make(&[entry], true) {
                    Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => make(&[entry], false),
                    made => made,
                };
                if let Err(e) = made {
                    problems.push(format!("tracked connection {}: {e}", shown(&entry.original)));
                }
            }
        }
        Ok(problems)
    })
}

fn bytes_of(address: &IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn shown(tuple: &Tuple) -> String {
    let ip = |bytes: &[u8]| super::address::ip(bytes).map(|ip| ip.to_string()).unwrap_or_default();
    format!("{}:{} to {}:{}", ip(&tuple.src), tuple.src_port, ip(&tuple.dst), tuple.dst_port)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::netlink::HEADER;

    fn entry() -> Entry {
        let tuple = |src: u8, dst: u8, src_port, dst_port| Tuple {
            src: vec![10, 0, 0, src],
            dst: vec![10, 0, 0, dst],
            protocol: 6,
            src_port,
            dst_port,
        };
        let (original, reply) = (tuple(1, 2, 4000, 80), tuple(2, 1, 80, 4000));
        let tcp = Some(Tcp { state: 3, flags_original: 1, flags_reply: 1, scale_original: 7, scale_reply: 8 });
        Entry { original, reply, status: 0xe, timeout: 100, mark: 5, zone: 3, tcp }
    }

    /// A request is what the kernel's own message looks like.
    fn parsed(entry: &Entry) -> Entry {
        let mut batch = Batch::default();
        entry.request(&mut batch, true);
        Entry::parse(&batch.bytes()[HEADER..]).unwrap()
    }

    #[test]
    fn a_request_says_what_was_read() {
        let liberal = Tcp { flags_original: 9, flags_reply: 9, ..entry().tcp.unwrap() };
        assert_eq!(parsed(&entry()), Entry { tcp: Some(liberal), ..entry() });
    }

    #[test]
    fn the_answers_are_asked_for_untranslated() {
        let mut translated = entry();
        translated.status |= IS_DST_NAT;
        translated.reply.src = vec![172, 17, 0, 2];
        translated.reply.src_port = 8080;
        assert_eq!(parsed(&translated).reply, entry().reply);
        assert_eq!(translated.translated(), Some(&[10, 0, 0, 2][..]));
        translated.status |= IS_SRC_NAT;
        assert_eq!(translated.translated(), Some(&[10, 0, 0, 1][..]));
    }

    #[test]
    fn what_another_host_makes_up_is_not_believed() {
        let sound = Entries { entries: vec![entry()] };
        assert_eq!(Entries::from_message(&sound.to_messages()[0]).unwrap(), sound);
        let bad: [fn(&mut Entry); 5] = [
            |e| e.original.src = vec![],
            |e| e.reply.dst = vec![0; 16],
            |e| e.reply.protocol = 17,
            |e| (e.original.protocol, e.reply.protocol) = (1, 1),
            |e| e.original.src_port = 65536,
        ];
        for (number, spoil) in bad.iter().enumerate() {
            let mut entry = entry();
            spoil(&mut entry);
            let message = &Entries { entries: vec![entry] }.to_messages()[0];
            assert!(Entries::from_message(message).is_err(), "{number}");
        }
        assert!(Entries::from_message(&[0xff; 5]).is_err());
        assert!(Entry::parse(&[0; 3]).is_none() && Entry::parse(&[0; 40]).is_none());
    }
}
