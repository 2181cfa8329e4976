//! eventfd(2).

use std::os::fd::OwnedFd;

use libc::c_int;

use super::{Collected, FdFacts, FdKind, Workshop, part};
use crate::engine::{Error, Result};
use crate::image::records::files::{EventfdFileEntry, FdTypes, FileEntry, FownEntry};
use crate::sys::file;
use crate::tracee::batch::Batch;

pub struct EventFd;

/// Recorded among the flags, where no eventfd has O_WRONLY.
const SEMAPHORE: u32 = libc::EFD_SEMAPHORE as u32;

impl FdKind for EventFd {
    const NAME: &'static str = "eventfd";
    const TYPE: FdTypes = FdTypes::Eventfd;

    fn claims(f: &FdFacts) -> bool {
        f.link == b"anon_inode:[eventfd]"
    }

    fn dump(f: &FdFacts, id: u32, _: &mut Collected) -> Result<FileEntry> {
        // Kernels before 6.5 do not show it: they cannot be asked.
        let semaphore = f.info.get("eventfd-semaphore").is_ok_and(|v| v == "1");
        let record = EventfdFileEntry {
            id,
            flags: f.flags() | if semaphore { SEMAPHORE } else { 0 },
            fown: f.owner()?,
            counter: f.number("eventfd-count", 16)?,
        };
        Ok(FileEntry { r#type: Self::TYPE as i32, id, efd: Some(record), ..FileEntry::default() })
    }

    fn create(e: &FileEntry, _: &mut Workshop) -> Result<OwnedFd> {
        let r = part(e, Self::NAME, e.efd.as_ref())?;
        let make = || {
            let fd = file::eventfd(r.counter, r.flags & SEMAPHORE != 0)?;
            file::set_flags(&fd, r.flags & !SEMAPHORE)?;
            Ok(fd)
        };
        make().map_err(Error::system(format_args!("make eventfd {:#x}", e.id)))
    }

    fn link(_: &FileEntry, _: c_int, _: &mut Batch) {}

    fn owner(e: &FileEntry) -> Option<&FownEntry> {
        e.efd.as_ref().map(|r| &r.fown)
    }
}
