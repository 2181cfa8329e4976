//! Internet sockets as a kind of file; [`super::tcp`] and [`super::udp`] know how to read and make one.

use std::os::fd::{AsFd, OwnedFd};

use libc::c_int;

use super::{Collected, FdFacts, FdKind, Workshop, part};
use super::{tcp, udp};
use crate::engine::{Error, Result};
use crate::image::records::files::{FdTypes, FileEntry, FownEntry};
use crate::sys::file;
use crate::tracee::batch::Batch;

pub struct InetSocket;

impl FdKind for InetSocket {
    const NAME: &'static str = "internet socket";
    const TYPE: FdTypes = FdTypes::Inetsk;

    fn claims(f: &FdFacts) -> bool {
        let is_ours = |(family, kind, protocol)| {
            let ours = [(libc::SOCK_STREAM, libc::IPPROTO_TCP), (libc::SOCK_DGRAM, libc::IPPROTO_UDP)];
            matches!(family, libc::AF_INET | libc::AF_INET6) && ours.contains(&(kind, protocol))
        };
        f.link.starts_with(b"socket:[") && file::socket_kind(&f.dup).is_some_and(is_ours)
    }

    /// The queues of a connection are read late, see `engine::network`.
    fn dump(f: &FdFacts, id: u32, all: &mut Collected) -> Result<FileEntry> {
        if file::socket_kind(&f.dup).is_some_and(|(_, kind, _)| kind == libc::SOCK_DGRAM) {
            return dump_udp(f, id, all);
        }
        let mut facts = match tcp::facts(f.dup.as_fd()) {
            Ok(facts) => facts,
            Err(tcp::Error::Unsupported { what }) => {
                return f.refuse(format!("TCP sockets {what} cannot be carried"), "close it before the checkpoint");
            }
            Err(e) => return Err(Error::Socket { id, source: e }),
        };
        if facts.kind.has_peer() && !all.keep_established() {
            return f.refuse("is an established TCP connection", "use --tcp-established to keep it");
        }
        if facts.pending > 0 && all.is_whole() {
            let why = format!("{} connections wait to be accepted", facts.pending);
            return f.refuse(why, "try again once the program has accepted them");
        }
        (facts.entry.id, facts.entry.flags, facts.entry.fown) = (id, f.flags(), f.owner()?);
        facts.more.id = id;
        all.socket_extras.push(facts.more);
        Ok(FileEntry { r#type: Self::TYPE as i32, id, isk: Some(facts.entry), ..FileEntry::default() })
    }

    fn create(e: &FileEntry, shop: &mut Workshop) -> Result<OwnedFd> {
        let r = part(e, Self::NAME, e.isk.as_ref())?;
        let fd = shop.network.create(r)?;
        file::set_flags(&fd, r.flags).map_err(Error::system(format_args!("set the flags of socket {:#x}", e.id)))?;
        Ok(fd)
    }

    fn link(_: &FileEntry, _: c_int, _: &mut Batch) {}

    fn owner(e: &FileEntry) -> Option<&FownEntry> {
        e.isk.as_ref().map(|r| &r.fown)
    }
}

fn dump_udp(f: &FdFacts, id: u32, all: &mut Collected) -> Result<FileEntry> {
    let (mut entry, mut more) = match udp::facts(f.dup.as_fd()) {
        Ok(facts) => facts,
        Err(tcp::Error::Unsupported { what }) => {
            return f.refuse(format!("UDP sockets {what} cannot be carried"), "close it before the checkpoint");
        }
        Err(source) => return Err(Error::Socket { id, source }),
    };
    (entry.id, entry.flags, entry.fown) = (id, f.flags(), f.owner()?);
    more.id = id;
    all.socket_extras.push(more);
    Ok(FileEntry { r#type: FdTypes::Inetsk as i32, id, isk: Some(entry), ..FileEntry::default() })
}
