//! `linux.netDevices`: interfaces of the host that move into the container's network namespace, with their addresses.
//!
//! They are not fetched back: when the namespace ends the kernel returns physical devices to the host, and virtual ones
//! end with it (runtime specification, "Namespace Lifecycle and Container Termination").

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::net::if_::if_nametoindex;
use oci_spec::runtime::{LinuxNetDevice, Spec};

use super::{Error, Result};
use crate::sys::netlink::{Batch, NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NetlinkSocket, attributes};
use crate::sys::netns;

// include/uapi/linux/rtnetlink.h
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
const RT_SCOPE_UNIVERSE: u8 = 0;
// include/uapi/linux/if_link.h
const IFLA_IFNAME: u16 = 3;
const IFLA_NET_NS_FD: u16 = 28;
// include/uapi/linux/if_addr.h
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const IFA_FLAGS: u16 = 8;
const IFA_F_PERMANENT: u32 = 0x80;
/// include/uapi/linux/if.h
const IFF_UP: u32 = 1;

/// Takes the devices out of a spec: libcontainer knows no templates for names.
pub(super) fn take(spec: &mut Spec) -> HashMap<String, LinuxNetDevice> {
    let linux = spec.linux_mut().as_mut();
    linux.and_then(|linux| linux.net_devices_mut().take()).unwrap_or_default()
}

/// Moves `devices` of the caller's network namespace into that of `init`, and sets them up there.
///
/// # Errors
/// A device that is not there, that cannot move, or whose new name is taken.
pub(super) fn give(devices: &HashMap<String, LinuxNetDevice>, init: i32) -> Result<()> {
    if devices.is_empty() {
        return Ok(());
    }
    let path = format!("/proc/{init}/ns/net");
    let netns = File::open(&path).map_err(|e| Error::io(&path, e))?;
    devices.iter().try_for_each(|(name, device)| {
        let inside = device.name().as_deref().filter(|inside| !inside.is_empty()).unwrap_or(name);
        move_one(name, inside, netns.as_fd())
            .map_err(|e| Error::Init(format!("move network device {name:?} into the container as {inside:?}: {e}")))
    })
}

fn move_one(name: &str, inside: &str, netns: BorrowedFd<'_>) -> io::Result<()> {
    let route = NetlinkSocket::route()?;
    let index = if_nametoindex(name)?;
    // Setting a device down takes some of its addresses.
    let addresses = permanent_addresses(&route, index)?;
    let before = netns::within(netns, links)??;
    let mut batch = Batch::default();
    batch.request(RTM_NEWLINK, NLM_F_ACK, &link(index, false), |_| {});
    batch.request(RTM_NEWLINK, NLM_F_ACK, &link(index, false), |attributes| {
        attributes.put(IFLA_NET_NS_FD, &netns.as_raw_fd().to_ne_bytes());
        attributes.put_name(IFLA_IFNAME, inside);
    });
    route.transact(&batch)?;
    netns::within(netns, || {
        // Neither name (a template) nor index (it may be taken) need be what was asked for.
        let new = links()?.difference(&before).copied().next().ok_or_else(|| io::Error::other("it is gone"))?;
        let mut batch = Batch::default();
        addresses.iter().for_each(|address| address.add(&mut batch, new));
        batch.request(RTM_NEWLINK, NLM_F_ACK, &link(new, true), |_| {});
        NetlinkSocket::route()?.transact(&batch)
    })?
}

/// struct ifinfomsg: family and type (0), index, flags, which flags to change.
fn link(index: u32, up: bool) -> Vec<u8> {
    [0, index, if up { IFF_UP } else { 0 }, IFF_UP].map(u32::to_ne_bytes).concat()
}

/// The indices of all devices in the caller's network namespace.
fn links() -> io::Result<HashSet<u32>> {
    let all = NetlinkSocket::route()?.dump(RTM_GETLINK, &[0; 16])?;
    Ok(all.iter().filter_map(|link| index_of(link)).collect())
}

/// Both struct ifinfomsg and struct ifaddrmsg have it behind four bytes.
fn index_of(message: &[u8]) -> Option<u32> {
    message.get(4..8).and_then(|bytes| bytes.try_into().ok()).map(u32::from_ne_bytes)
}

/// An address of a device, as RTM_NEWADDR takes it.
struct Address {
    /// struct ifaddrmsg: family, length of the prefix, flags, scope.
    header: [u8; 4],
    attributes: Vec<(u16, Vec<u8>)>,
}

impl Address {
    /// None for what config.json's author did not configure: link-local and temporary ones.
    fn of(message: &[u8]) -> Option<Address> {
        let (header, rest) = (*message.first_chunk::<4>()?, message.get(8..)?);
        let found = attributes(rest);
        let flags = found.get(&IFA_FLAGS).and_then(|bytes| (*bytes).try_into().ok()).map(u32::from_ne_bytes);
        let permanent = flags.unwrap_or(header[2].into()) & IFA_F_PERMANENT != 0;
        let kept = [IFA_ADDRESS, IFA_LOCAL, IFA_BROADCAST, IFA_FLAGS];
        let kept = kept.into_iter().filter_map(|kind| Some((kind, found.get(&kind)?.to_vec()))).collect();
        (permanent && header[3] == RT_SCOPE_UNIVERSE).then_some(Address { header, attributes: kept })
    }

    fn add(&self, batch: &mut Batch, index: u32) {
        let header = [self.header, index.to_ne_bytes()].concat();
        batch.request(RTM_NEWADDR, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, &header, |attributes| {
            self.attributes.iter().for_each(|(kind, value)| attributes.put(*kind, value));
        });
    }
}

fn permanent_addresses(route: &NetlinkSocket, index: u32) -> io::Result<Vec<Address>> {
    let all = route.dump(RTM_GETADDR, &[0; 8])?;
    Ok(all.iter().filter(|message| index_of(message) == Some(index)).filter_map(|m| Address::of(m)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_configured_goes_along() {
        let message = |scope: u8, flags: u32| {
            // family, prefix, flags, scope, index; IFA_FLAGS.
            let mut bytes = vec![2, 24, 0, scope, 5, 0, 0, 0, 8, 0, IFA_FLAGS as u8, 0];
            bytes.extend(flags.to_ne_bytes());
            bytes
        };
        assert!(Address::of(&message(RT_SCOPE_UNIVERSE, IFA_F_PERMANENT)).is_some());
        assert!(Address::of(&message(253, IFA_F_PERMANENT)).is_none(), "link-local");
        assert!(Address::of(&message(RT_SCOPE_UNIVERSE, 0)).is_none(), "temporary");
        assert!(Address::of(&[2, 24, 0x80]).is_none());
        assert_eq!(index_of(&message(0, 0)), Some(5));
    }
}
