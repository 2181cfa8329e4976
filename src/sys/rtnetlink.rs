//! Links, addresses, routes, neighbours and rules as the kernel's messages have them (rtnetlink(7)): the fixed parts of
//! the messages, and the numbers of their attributes.

use std::collections::HashMap;

use super::netlink::attributes;

/// include/uapi/linux/rtnetlink.h: message types.
pub const RTM_NEWLINK: u16 = 16;
pub const RTM_GETLINK: u16 = 18;
pub const RTM_NEWADDR: u16 = 20;
pub const RTM_DELADDR: u16 = 21;
pub const RTM_GETADDR: u16 = 22;
pub const RTM_NEWROUTE: u16 = 24;
pub const RTM_DELROUTE: u16 = 25;
pub const RTM_GETROUTE: u16 = 26;
pub const RTM_NEWNEIGH: u16 = 28;
pub const RTM_DELNEIGH: u16 = 29;
pub const RTM_GETNEIGH: u16 = 30;
pub const RTM_NEWRULE: u16 = 32;
pub const RTM_DELRULE: u16 = 33;
pub const RTM_GETRULE: u16 = 34;

/// include/uapi/linux/if_link.h: attributes of a link.
pub mod ifla {
    pub const ADDRESS: u16 = 1;
    pub const IFNAME: u16 = 3;
    pub const MTU: u16 = 4;
    /// The index of the other end, of a veth or macvlan.
    pub const LINK: u16 = 5;
    pub const LINKINFO: u16 = 18;
    /// Within LINKINFO.
    pub const INFO_KIND: u16 = 1;
    /// In which namespace LINK is, if not in this one.
    pub const LINK_NETNSID: u16 = 37;
}

/// include/uapi/linux/if_addr.h: attributes of an address.
pub mod ifa {
    pub const ADDRESS: u16 = 1;
    pub const LOCAL: u16 = 2;
    pub const LABEL: u16 = 3;
    pub const BROADCAST: u16 = 4;
    /// `struct ifa_cacheinfo`: preferred and valid for so many seconds, made and changed when.
    pub const CACHEINFO: u16 = 6;
    pub const FLAGS: u16 = 8;
    pub const RT_PRIORITY: u16 = 9;

    /// IFA_F_NODAD and others.
    pub const F_SECONDARY: u32 = 0x01;
    pub const F_NODAD: u32 = 0x02;
    pub const F_DADFAILED: u32 = 0x08;
    pub const F_TENTATIVE: u32 = 0x40;
    pub const F_PERMANENT: u32 = 0x80;
    pub const F_MANAGETEMPADDR: u32 = 0x100;
    pub const F_NOPREFIXROUTE: u32 = 0x200;
    pub const F_MCAUTOJOIN: u32 = 0x400;
}

/// include/uapi/linux/rtnetlink.h: attributes of a route.
pub mod rta {
    pub const DST: u16 = 1;
    pub const SRC: u16 = 2;
    pub const OIF: u16 = 4;
    pub const GATEWAY: u16 = 5;
    pub const PRIORITY: u16 = 6;
    pub const PREFSRC: u16 = 7;
    pub const METRICS: u16 = 8;
    pub const MULTIPATH: u16 = 9;
    pub const TABLE: u16 = 15;
    pub const VIA: u16 = 18;
    pub const PREF: u16 = 20;
    pub const ENCAP: u16 = 22;
    pub const NH_ID: u16 = 30;

    /// RTPROT_KERNEL: made by the kernel for an address.
    pub const PROTOCOL_KERNEL: u8 = 2;
    /// RTM_F_CLONED: an entry of a cache.
    pub const F_CLONED: u32 = 0x200;
    /// RTNH_F_ONLINK: the gateway is there, whatever the addresses say.
    pub const F_ONLINK: u32 = 4;
}

/// include/uapi/linux/neighbour.h: attributes of a neighbour.
pub mod nda {
    pub const DST: u16 = 1;
    pub const LLADDR: u16 = 2;

    /// NUD_PERMANENT
    pub const PERMANENT: u16 = 0x80;
    /// NTF_PROXY: answered for somebody else.
    pub const F_PROXY: u8 = 0x08;
}

/// A message's attributes by number.
pub type Attributes<'a> = HashMap<u16, &'a [u8]>;

/// The fixed part of a message, which is all of these of one size each.
fn split<const N: usize>(payload: &[u8]) -> Option<(&[u8; N], Attributes<'_>)> {
    let (header, rest) = payload.split_first_chunk::<N>()?;
    Some((header, attributes(rest)))
}

fn u32_at(header: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(std::array::from_fn(|n| header[at + n]))
}

/// A number that an attribute has.
pub fn number(attributes: &Attributes<'_>, kind: u16) -> Option<u32> {
    attributes.get(&kind)?.first_chunk().map(|word| u32::from_ne_bytes(*word))
}

/// A name that an attribute has.
pub fn name(attributes: &Attributes<'_>, kind: u16) -> Option<String> {
    let bytes = attributes.get(&kind)?.split(|byte| *byte == 0).next()?;
    Some(String::from_utf8_lossy(bytes).into_owned())
}

/// What an attribute has; empty if there is none.
pub fn bytes(attributes: &Attributes<'_>, kind: u16) -> Vec<u8> {
    attributes.get(&kind).map(|bytes| bytes.to_vec()).unwrap_or_default()
}

/// `struct ifinfomsg`, include/uapi/linux/rtnetlink.h.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LinkHeader {
    /// ARPHRD_ETHER and others.
    pub kind: u16,
    pub index: u32,
    /// IFF_UP and others.
    pub flags: u32,
    /// Which of them are to be changed.
    pub change: u32,
}

impl LinkHeader {
    pub fn parse(payload: &[u8]) -> Option<(Self, Attributes<'_>)> {
        let (header, attributes) = split::<16>(payload)?;
        let kind = u16::from_ne_bytes([header[2], header[3]]);
        let [index, flags, change] = [4, 8, 12].map(|at| u32_at(header, at));
        Some((Self { kind, index, flags, change }, attributes))
    }

    pub fn bytes(&self) -> Vec<u8> {
        let kind = u32::from(self.kind) << 16;
        [kind, self.index, self.flags, self.change].map(u32::to_ne_bytes).concat()
    }
}

/// `struct ifaddrmsg`, include/uapi/linux/if_addr.h.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AddressHeader {
    pub family: u8,
    pub prefix: u8,
    pub flags: u8,
    pub scope: u8,
    pub index: u32,
}

impl AddressHeader {
    pub fn parse(payload: &[u8]) -> Option<(Self, Attributes<'_>)> {
        let (header, attributes) = split::<8>(payload)?;
        let [family, prefix, flags, scope, ..] = *header;
        Some((Self { family, prefix, flags, scope, index: u32_at(header, 4) }, attributes))
    }

    pub fn bytes(&self) -> Vec<u8> {
        [&[self.family, self.prefix, self.flags, self.scope][..], &self.index.to_ne_bytes()].concat()
    }
}

/// `struct rtmsg`, include/uapi/linux/rtnetlink.h.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RouteHeader {
    pub family: u8,
    pub dst_prefix: u8,
    pub src_prefix: u8,
    pub tos: u8,
    pub table: u8,
    pub protocol: u8,
    pub scope: u8,
    pub kind: u8,
    pub flags: u32,
}

impl RouteHeader {
    pub fn parse(payload: &[u8]) -> Option<(Self, Attributes<'_>)> {
        let (header, attributes) = split::<12>(payload)?;
        let [family, dst_prefix, src_prefix, tos, table, protocol, scope, kind, ..] = *header;
        let flags = u32_at(header, 8);
        Some((Self { family, dst_prefix, src_prefix, tos, table, protocol, scope, kind, flags }, attributes))
    }

    pub fn bytes(&self) -> Vec<u8> {
        let Self { family, dst_prefix, src_prefix, tos, table, protocol, scope, kind, flags } = *self;
        let bytes = [family, dst_prefix, src_prefix, tos, table, protocol, scope, kind];
        [&bytes[..], &flags.to_ne_bytes()].concat()
    }
}

/// `struct rtnexthop`, include/uapi/linux/rtnetlink.h: one way of a route that has several.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HopHeader {
    pub flags: u8,
    /// The weight, less one.
    pub hops: u8,
    pub index: u32,
}

impl HopHeader {
    const SIZE: usize = 8;

    /// The ways in the attribute RTA_MULTIPATH.
    pub fn parse_all(mut bytes: &[u8]) -> Vec<(Self, Attributes<'_>)> {
        let mut found = Vec::new();
        while let Some((header, _)) = bytes.split_first_chunk::<{ Self::SIZE }>() {
            let len = usize::from(u16::from_ne_bytes([header[0], header[1]])).max(Self::SIZE);
            let inner = bytes.get(Self::SIZE..len).unwrap_or_default();
            let hop = Self { flags: header[2], hops: header[3], index: u32_at(header, 4) };
            found.push((hop, attributes(inner)));
            bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
        }
        found
    }

    /// Before `attributes` bytes of attributes.
    pub fn bytes(&self, attributes: usize) -> Vec<u8> {
        let len = (Self::SIZE + attributes) as u16;
        [&len.to_ne_bytes()[..], &[self.flags, self.hops], &self.index.to_ne_bytes()].concat()
    }
}

/// `struct ndmsg`, include/uapi/linux/neighbour.h.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NeighbourHeader {
    pub family: u8,
    pub index: u32,
    /// NUD_PERMANENT and others.
    pub state: u16,
    pub flags: u8,
    pub kind: u8,
}

impl NeighbourHeader {
    pub fn parse(payload: &[u8]) -> Option<(Self, Attributes<'_>)> {
        let (header, attributes) = split::<12>(payload)?;
        let state = u16::from_ne_bytes([header[8], header[9]]);
        let index = u32_at(header, 4);
        Some((Self { family: header[0], index, state, flags: header[10], kind: header[11] }, attributes))
    }

    pub fn bytes(&self) -> Vec<u8> {
        let [s0, s1] = self.state.to_ne_bytes();
        let tail = [s0, s1, self.flags, self.kind];
        [&[self.family, 0, 0, 0][..], &self.index.to_ne_bytes(), &tail].concat()
    }
}

/// Size of `struct fib_rule_hdr`, include/uapi/linux/fib_rules.h. Its first byte is the family.
pub const RULE_HEADER: usize = 12;
/// FRA_PRIORITY, include/uapi/linux/fib_rules.h.
pub const FRA_PRIORITY: u16 = 6;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_come_back() {
        let link = LinkHeader { kind: 1, index: 2, flags: 3, change: 4 };
        assert_eq!(LinkHeader::parse(&link.bytes()).unwrap().0, link);
        let address = AddressHeader { family: 2, prefix: 24, flags: 3, scope: 4, index: 5 };
        assert_eq!(AddressHeader::parse(&address.bytes()).unwrap().0, address);
        let route = RouteHeader {
            family: 2,
            dst_prefix: 24,
            src_prefix: 1,
            tos: 3,
            table: 4,
            protocol: 5,
            scope: 6,
            kind: 7,
            flags: 8,
        };
        assert_eq!(RouteHeader::parse(&route.bytes()).unwrap().0, route);
        let neighbour = NeighbourHeader { family: 2, index: 3, state: 0x80, flags: 4, kind: 5 };
        assert_eq!(NeighbourHeader::parse(&neighbour.bytes()).unwrap().0, neighbour);
        let hop = HopHeader { flags: 1, hops: 2, index: 3 };
        assert_eq!(HopHeader::parse_all(&[hop.bytes(0), hop.bytes(0)].concat()).len(), 2);
        assert_eq!(HopHeader::parse_all(&hop.bytes(0))[0].0, hop);
    }

    #[test]
    fn torn_messages_are_none() {
        assert!(LinkHeader::parse(&[0; 15]).is_none());
        assert!(AddressHeader::parse(&[0; 7]).is_none());
        assert!(RouteHeader::parse(&[0; 11]).is_none());
        assert!(NeighbourHeader::parse(&[]).is_none());
        assert!(HopHeader::parse_all(&[0; 7]).is_empty());
        assert_eq!(HopHeader::parse_all(&[0; 20]).len(), 2);
    }
}
