//! epoll(7) instances and what they watch.

use std::os::fd::OwnedFd;

use libc::c_int;

use super::{Collected, FdFacts, FdKind, Workshop, part};
use crate::engine::{Error, Result};
use crate::image::records::files::{EventpollFileEntry, EventpollTfdEntry, FdTypes, FileEntry, FownEntry};
use crate::sys::file;
use crate::tracee::batch::Batch;

pub struct Epoll;

impl FdKind for Epoll {
    const NAME: &'static str = "epoll instance";
    const TYPE: FdTypes = FdTypes::Eventpoll;

    fn claims(f: &FdFacts) -> bool {
        f.link == b"anon_inode:[eventpoll]"
    }

    fn dump(f: &FdFacts, id: u32, _: &mut Collected) -> Result<FileEntry> {
        let lines = f.info.extra.iter().filter(|(k, _)| k == "tfd");
        let targets: Option<Vec<_>> = lines.map(|(_, v)| target(id, v)).collect();
        let line = || format!("{:?}", f.info.extra);
        let tfd = targets.ok_or_else(|| Error::BadFdInfo { pid: f.pid, fd: f.fd, line: line() })?;
        for t in &tfd {
            // The kernel goes on watching a file whose descriptor is closed while another one keeps it
            // open; nobody could watch it under that number again.
            let now = std::fs::metadata(format!("/proc/{}/fd/{}", f.pid, t.tfd));
            if now.ok().map(|m| std::os::unix::fs::MetadataExt::ino(&m)) != t.inode {
                let why = format!("watches descriptor {}, which is another file by now", t.tfd);
                return f.refuse(why, "remove the file from the epoll instance before closing it");
            }
        }
        let record = EventpollFileEntry { id, flags: f.flags(), fown: f.owner()?, tfd };
        Ok(FileEntry { r#type: Self::TYPE as i32, id, epfd: Some(record), ..FileEntry::default() })
    }

    fn create(e: &FileEntry, _: &mut Workshop) -> Result<OwnedFd> {
        let r = part(e, Self::NAME, e.epfd.as_ref())?;
        let make = || {
            let fd = file::epoll()?;
            file::set_flags(&fd, r.flags)?;
            Ok(fd)
        };
        make().map_err(Error::system(format_args!("make epoll instance {:#x}", e.id)))
    }

    /// A watch remembers the number of the descriptor that it was made with: only the task can make it.
    fn link(e: &FileEntry, fd: c_int, b: &mut Batch) {
        for t in e.epfd.iter().flat_map(|r| &r.tfd) {
            // struct epoll_event is packed
            let event = b.bytes(&[&t.events.to_ne_bytes()[..], &t.data.to_ne_bytes()].concat());
            let args = [fd.into(), libc::EPOLL_CTL_ADD.into(), t.tfd.into(), event.into()];
            b.call("epoll_ctl", libc::SYS_epoll_ctl, args);
        }
    }

    fn owner(e: &FileEntry) -> Option<&FownEntry> {
        e.epfd.as_ref().map(|r| &r.fown)
    }
}

/// `5 events:       19 data:                5  pos:0 ino:2f sdev:e`, all but the first in hexadecimal.
fn target(id: u32, line: &str) -> Option<EventpollTfdEntry> {
    let (tfd, rest) = line.trim().split_once(' ')?;
    let spaced = rest.replace(':', " ");
    let mut words = spaced.split_whitespace();
    let mut value = |name: &str| (words.next()? == name).then(|| words.next())?;
    let hex = |s: &str| u64::from_str_radix(s, 16).ok();
    let events = hex(value("events")?)? as u32;
    let data = hex(value("data")?)?;
    let pos = value("pos")?.parse::<i64>().ok()? as u64;
    let inode = hex(value("ino")?)?;
    let dev = hex(value("sdev")?)? as u32;
    Some(EventpollTfdEntry {
        id,
        tfd: tfd.parse().ok()?,
        events,
        data,
        dev: Some(dev),
        inode: Some(inode),
        pos: Some(pos),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watch_is_read() {
        let t = target(7, "        5 events:       1d data: ffffffffffffffff  pos:0 ino:61af sdev:7").unwrap();
        assert_eq!((t.id, t.tfd, t.events, t.data), (7, 5, 0x1d, u64::MAX));
        assert_eq!((t.inode, t.dev), (Some(0x61af), Some(7)));
        assert!(target(7, "5 events: zz").is_none());
    }
}
