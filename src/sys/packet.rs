//! Frames as they are on an interface: packet(7).
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use libc::c_int;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, socket};

use super::sockopt;

/// include/uapi/linux/if_packet.h: each frame is preceded by a `struct virtio_net_hdr`, which says what the interface was to
/// do with it: checksums, and segments that it is to be cut into. Since 2.6.27.
const PACKET_VNET_HDR: c_int = 15;
/// include/uapi/linux/if_packet.h: what this host sends is not shown. Since 4.20.
const PACKET_IGNORE_OUTGOING: c_int = 23;
/// include/uapi/linux/if_packet.h: frames received and frames dropped, since it was last asked.
const PACKET_STATISTICS: c_int = 6;

/// `struct virtio_net_hdr` without mergeable buffers, include/uapi/linux/virtio_net.h.
pub const OFFLOAD_HEADER: usize = 10;

/// Longest frame with its header: 64 KiB of IP, as segmentation offload has it, and what is before it.
pub const LONGEST: usize = OFFLOAD_HEADER + 14 + 4 + (64 << 10);

/// A socket that belongs to one interface.
#[derive(Debug)]
pub struct PacketSocket(OwnedFd);

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A frame that was received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    pub bytes: Vec<u8>,
    /// PACKET_HOST: it was sent to this interface's own address.
    pub to_us: bool,
}

impl PacketSocket {
    /// Sends frames out of the interface of that index in the calling thread's network namespace.
    pub fn sender(index: u32) -> io::Result<Self> {
        let this = Self::open()?;
        this.bind(index, 0)?;
        Ok(this)
    }

    /// As [`PacketSocket::sender`], for frames that have an offload header.
    pub fn injector(index: u32) -> io::Result<Self> {
        let this = Self::open()?;
        sockopt::set_int(this.as_fd(), libc::SOL_PACKET, PACKET_VNET_HDR, 1)?;
        this.bind(index, 0)?;
        Ok(this)
    }

    /// Receives all frames that come in by the interface, with their offload headers, from [`PacketSocket::begin`] on. `room` is
    /// how many bytes wait for us at most; each frame counts for more than it is long.
    pub fn capture(index: u32, room: u32) -> io::Result<Self> {
        let this = Self::open()?;
        sockopt::set_int(this.as_fd(), libc::SOL_PACKET, PACKET_VNET_HDR, 1)?;
        sockopt::set_int(this.as_fd(), libc::SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)?;
        let room = c_int::try_from(room).map_err(|_| io::ErrorKind::InvalidInput)?;
        sockopt::set_int(this.as_fd(), libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, room)?;
        // BPF_RET | BPF_K with 0: nothing of it is taken.
        sockopt::set_filter(this.as_fd(), &[6])?;
        this.bind(index, libc::ETH_P_ALL as u16)?;
        Ok(this)
    }

    /// From now on frames are kept.
    pub fn begin(&self) -> io::Result<()> {
        sockopt::set_int(self.as_fd(), libc::SOL_SOCKET, libc::SO_DETACH_FILTER, 0)
    }

    fn open() -> io::Result<Self> {
        // Protocol 0: nothing is received until it is bound to an interface.
        Ok(Self(socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?))
    }

    fn bind(&self, index: u32, protocol: u16) -> io::Result<()> {
        // SAFETY: a sockaddr_ll is plain data, and zeroes are a valid one.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol.to_be();
        address.sll_ifindex = c_int::try_from(index).map_err(|_| io::ErrorKind::InvalidInput)?;
        let size = size_of_val(&address) as libc::socklen_t;
        // SAFETY: the kernel reads one sockaddr_ll of that size.
        let ret = unsafe { libc::bind(self.0.as_raw_fd(), (&raw const address).cast(), size) };
        if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Sends a frame, without waiting.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        send(self.0.as_raw_fd(), frame, MsgFlags::MSG_DONTWAIT)?;
        Ok(())
    }

    /// The next frame, if there is one. `buf` is room for [`LONGEST`] bytes.
    pub fn receive(&self, buf: &mut [u8]) -> io::Result<Option<Received>> {
        // SAFETY: a sockaddr_ll is plain data, and zeroes are a valid one.
        let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        let mut size = size_of_val(&from) as libc::socklen_t;
        let (fd, flags) = (self.0.as_raw_fd(), libc::MSG_DONTWAIT | libc::MSG_TRUNC);
        // SAFETY: `buf` is writable for its length, `from` for `size` bytes.
        let len =
            unsafe { libc::recvfrom(fd, buf.as_mut_ptr().cast(), buf.len(), flags, (&raw mut from).cast(), &mut size) };
        match usize::try_from(len) {
            Ok(len) => {
                // MSG_TRUNC: the whole length, of which we have the head.
                let bytes = buf.get(..len).ok_or(io::ErrorKind::InvalidData)?.to_vec();
                Ok(Some(Received { bytes, to_us: from.sll_pkttype == libc::PACKET_HOST }))
            }
            Err(_) => match io::Error::last_os_error() {
                e if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
                e => Err(e),
            },
        }
    }

    /// How many frames found no room since this was last asked.
    pub fn dropped(&self) -> io::Result<u32> {
        sockopt::get_words(self.0.as_fd(), libc::SOL_PACKET, PACKET_STATISTICS).map(|[_, dropped]| dropped)
    }
}
