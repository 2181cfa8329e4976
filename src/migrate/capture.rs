//! Frames that come while the container is on its way: taken at the source, given to the container at the destination.
//!
//! Between the moment in which its sockets are read and the one in which it runs at the destination, nobody takes what
//! arrives. A peer would send a segment again, after 200 ms or more; so it is kept and goes along.
//!
//! A packet socket sees what arrives before nftables drop it ([`super::address::Silence`]). Frames travel with their
//! offload headers, so that those that were never cut into packets need not be.

use std::os::fd::BorrowedFd;

use prost::Message;

use super::address::{Error, Link, Result, links, netlink, within};
use super::wire::MAX_PAYLOAD;
use crate::sys::packet::{LONGEST, OFFLOAD_HEADER, PacketSocket};

/// Bytes that go to the other host at most: one message of [`super::wire`]. It is a millisecond of a fast link.
const MOST_BYTES: usize = MAX_PAYLOAD - 64;

/// The kernel counts more for a frame than its length.
const ROOM: u32 = 16 << 20;

/// Destination, source, protocol.
const ETHERNET: usize = 14;

/// Frames of all interfaces, in the order of their arrival at each.
#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct Frames {
    #[prost(message, repeated, tag = "1")]
    pub frames: Vec<Frame>,
    /// How many more there were.
    #[prost(uint32, tag = "2")]
    pub lost: u32,
}

#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct Frame {
    /// Name of the interface in the container.
    #[prost(string, tag = "1")]
    pub interface: String,
    /// `struct virtio_net_hdr` and the frame from its Ethernet header on.
    #[prost(bytes = "vec", tag = "2")]
    pub bytes: Vec<u8>,
}

impl Frame {
    fn ethertype(&self) -> Option<u16> {
        let at = OFFLOAD_HEADER + ETHERNET - 2;
        Some(u16::from_be_bytes([*self.bytes.get(at)?, *self.bytes.get(at + 1)?]))
    }

    /// IP of some length: neighbours are asked anew.
    fn is_carried(&self) -> bool {
        let ip = [libc::ETH_P_IP as u16, libc::ETH_P_IPV6 as u16];
        self.bytes.len() <= LONGEST && self.ethertype().is_some_and(|ethertype| ip.contains(&ethertype))
    }
}

impl Frames {
    /// As they go to the other host, in one message.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.encode_to_vec()
    }

    /// What another host has sent, if it can be believed.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let wrong = |what: &str| Error::Wrong(format!("frames on their way: {what}"));
        if bytes.len() > MAX_PAYLOAD {
            return Err(wrong("too many"));
        }
        let read = Self::decode(bytes).map_err(|e| wrong(&e.to_string()))?;
        if read.frames.iter().all(Frame::is_carried) { Ok(read) } else { Err(wrong("one that is not IP")) }
    }
}

/// Keeps what arrives at the interfaces of a namespace.
#[derive(Debug)]
pub struct Capture(Vec<(String, PacketSocket)>);

impl Capture {
    /// Makes ready, which takes some 100 us.
    pub fn open(netns: BorrowedFd<'_>) -> Result<Self> {
        within(netns, || {
            let up = links()?.into_iter().filter(|link| !link.loopback && link.is_up());
            let open = |link: Link| {
                let socket = PacketSocket::capture(link.index, ROOM).map_err(netlink("capture frames"))?;
                Ok((link.name, socket))
            };
            up.map(open).collect::<Result<_>>().map(Self)
        })
    }

    /// From now on frames are kept, until [`Capture::drain`] or until there is no room. Just before its sockets are read: what
    /// has arrived until now the container has had.
    pub fn begin(&self) -> Result<()> {
        self.0.iter().try_for_each(|(_, socket)| socket.begin().map_err(netlink("capture frames")))
    }

    /// What has arrived since then for the container itself: nothing that was sent to all.
    pub fn drain(&self) -> Result<Frames> {
        let mut all = Frames::default();
        let mut buf = vec![0; LONGEST];
        let mut bytes = 0;
        for (interface, socket) in &self.0 {
            while let Some(received) = socket.receive(&mut buf).map_err(netlink("capture frames"))? {
                let frame = Frame { interface: interface.clone(), bytes: received.bytes };
                if !received.to_us || !frame.is_carried() {
                    continue;
                }
                // With its tag and length.
                bytes += frame.encoded_len() + 4;
                if bytes > MOST_BYTES {
                    all.lost += 1;
                } else {
                    all.frames.push(frame);
                }
            }
            all.lost += socket.dropped().map_err(netlink("capture frames"))?;
        }
        Ok(all)
    }

    /// Ends it without making anybody wait: the kernel takes 10 ms and more to close such a socket.
    pub fn close(self) {
        let _ = std::thread::Builder::new().name("capture".to_owned()).spawn(|| drop(self));
    }
}

/// Gives frames to a container as if they had just arrived: from the other ends of its interfaces.
#[derive(Debug)]
pub struct Injector {
    ends: Vec<End>,
    /// Interfaces for which it cannot be done, one sentence each.
    pub problems: Vec<String>,
}

#[derive(Debug)]
struct End {
    interface: String,
    /// The container's hardware address here.
    mac: [u8; 6],
    socket: PacketSocket,
}

impl Injector {
    /// `host` is the namespace in which the other ends of the container's interfaces are: this host's.
    pub fn open(container: BorrowedFd<'_>, host: BorrowedFd<'_>) -> Result<Self> {
        let inside = within(container, links)?;
        within(host, || {
            let outside = links()?;
            let mut this = Self { ends: Vec::new(), problems: Vec::new() };
            for link in inside.into_iter().filter(|link| !link.loopback) {
                // Only a cable has an end that can be spoken into.
                let is_end = |end: &&Link| {
                    link.kind == "veth"
                        && end.kind == "veth"
                        && link.other == Some(end.index)
                        && end.other == Some(link.index)
                };
                match (outside.iter().find(is_end), <[u8; 6]>::try_from(&link.mac[..])) {
                    (Some(end), Ok(mac)) => {
                        let socket = PacketSocket::injector(end.index).map_err(netlink("inject frames"))?;
                        this.ends.push(End { interface: link.name, mac, socket });
                    }
                    _ => this.problems.push(format!(
                        "{}: frames that arrive during the move are lost: its other end is not on this host",
                        link.name
                    )),
                }
            }
            Ok(this)
        })
    }

    /// Sends the frames in their order; returns how many went. The container's namespace must not be silent.
    pub fn inject(&self, frames: &Frames) -> usize {
        let mut sent = 0;
        for frame in frames.frames.iter().filter(|frame| frame.is_carried()) {
            let Some(end) = self.ends.iter().find(|end| end.interface == frame.interface) else { continue };
            let mut bytes = frame.bytes.clone();
            bytes[OFFLOAD_HEADER..OFFLOAD_HEADER + 6].copy_from_slice(&end.mac);
            match end.socket.send(&bytes) {
                Ok(()) => sent += 1,
                Err(e) => tracing::warn!("{}: a frame of {} bytes: {e}", end.interface, bytes.len()),
            }
        }
        sent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(ethertype: u16, len: usize) -> Frame {
        let mut bytes = vec![0; len];
        bytes[22..24].copy_from_slice(&ethertype.to_be_bytes());
        Frame { interface: "eth0".into(), bytes }
    }

    #[test]
    fn only_ip_goes_along() {
        let good = Frames { frames: vec![frame(0x800, 64), frame(0x86dd, LONGEST)], lost: 1 };
        assert_eq!(Frames::from_bytes(&good.to_bytes()).unwrap(), good);
        for bad in [frame(0x806, 64), frame(0x800, LONGEST + 1), Frame { bytes: vec![8; 23], ..Frame::default() }] {
            let frames = Frames { frames: vec![bad], lost: 0 };
            assert!(Frames::from_bytes(&frames.to_bytes()).is_err());
        }
        assert!(Frames::from_bytes(&[0xff; 9]).is_err());
        assert!(Frames::from_bytes(&vec![0; MAX_PAYLOAD + 1]).is_err());
    }
}
