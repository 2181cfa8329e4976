//! signalfd(2). What waits to be read belongs to the processes, not to the file.

use std::os::fd::OwnedFd;

use libc::c_int;

use super::{Collected, FdFacts, FdKind, Workshop, part};
use crate::engine::{Error, Result};
use crate::image::records::files::{FdTypes, FileEntry, FownEntry, SignalfdEntry};
use crate::sys::file;
use crate::tracee::batch::Batch;

pub struct SignalFd;

impl FdKind for SignalFd {
    const NAME: &'static str = "signalfd";
    const TYPE: FdTypes = FdTypes::Signalfd;

    fn claims(f: &FdFacts) -> bool {
        f.link == b"anon_inode:[signalfd]"
    }

    fn dump(f: &FdFacts, id: u32, _: &mut Collected) -> Result<FileEntry> {
        let record = SignalfdEntry { id, flags: f.flags(), fown: f.owner()?, sigmask: f.number("sigmask", 16)? };
        Ok(FileEntry { r#type: Self::TYPE as i32, id, sgfd: Some(record), ..FileEntry::default() })
    }

    fn create(e: &FileEntry, _: &mut Workshop) -> Result<OwnedFd> {
        let r = part(e, Self::NAME, e.sgfd.as_ref())?;
        let make = || {
            let fd = file::signalfd(r.sigmask)?;
            file::set_flags(&fd, r.flags)?;
            Ok(fd)
        };
        make().map_err(Error::system(format_args!("make signalfd {:#x}", e.id)))
    }

    fn link(_: &FileEntry, _: c_int, _: &mut Batch) {}

    fn owner(e: &FileEntry) -> Option<&FownEntry> {
        e.sgfd.as_ref().map(|r| &r.fown)
    }
}
