//! Files that a path leads to: regular files, directories, and the devices that keep no state.

use std::os::fd::{AsFd, OwnedFd};

use libc::c_int;
use nix::sys::stat::{major, minor};

use super::{Collected, FdFacts, FdKind, Workshop, ghost, part};
use crate::engine::{Error, Result};
use crate::image::records::files::{FdTypes, FileEntry, FownEntry, RegFileEntry};
use crate::sys::file::{self, FileStat};
use crate::tracee::batch::Batch;

pub struct Regular;

/// Character devices without state of their own: null, zero, full, random, urandom (major 1).
fn is_stateless_device(s: &FileStat) -> bool {
    s.kind() == libc::S_IFCHR && major(s.rdev) == 1 && [3, 5, 7, 8, 9].contains(&minor(s.rdev))
}

/// Flags with which open(2) gives the same open file description again.
const REOPEN: c_int = libc::O_ACCMODE
    | libc::O_APPEND
    | libc::O_NONBLOCK
    | libc::O_DSYNC
    | libc::O_SYNC
    | libc::O_DIRECT
    | libc::O_DIRECTORY
    | libc::O_NOFOLLOW
    | libc::O_NOATIME
    | libc::O_PATH
    | libc::O_ASYNC;

impl FdKind for Regular {
    const NAME: &'static str = "regular file";
    const TYPE: FdTypes = FdTypes::Reg;

    fn claims(f: &FdFacts) -> bool {
        let by_path = matches!(f.stat.kind(), libc::S_IFREG | libc::S_IFDIR) || is_stateless_device(&f.stat);
        f.link.starts_with(b"/") && by_path && !f.link.starts_with(b"/memfd:")
    }

    fn dump(f: &FdFacts, id: u32, all: &mut Collected) -> Result<FileEntry> {
        let external = is_outside(f, all);
        if external && !all.external.contains(&f.link) {
            return f.refuse("is outside the container", "pass it as standard input, output or error, or close it");
        }
        let last_name = ghost::last_name(&f.link, &f.stat).filter(|_| !external);
        match last_name {
            Some(_) => all.ghosts.add_open(id, f)?,
            None if !external => check_path(f, all)?,
            None => {}
        }
        let record = RegFileEntry {
            id,
            flags: f.flags(),
            pos: f.info.pos,
            fown: f.owner()?,
            name: last_name.unwrap_or(&f.link).to_vec(),
            mnt_id: Some(f.info.mnt_id),
            size: (f.stat.kind() == libc::S_IFREG).then_some(f.stat.size),
            ext: external.then_some(true),
            mode: Some(f.stat.mode),
            ..RegFileEntry::default()
        };
        Ok(FileEntry { r#type: FdTypes::Reg as i32, id, reg: Some(record), ..FileEntry::default() })
    }

    fn create(e: &FileEntry, shop: &mut Workshop) -> Result<OwnedFd> {
        let r = part(e, Self::NAME, e.reg.as_ref())?;
        if r.ext == Some(true) {
            return shop.external(&r.name);
        }
        open(r, shop)
    }

    fn link(_: &FileEntry, _: c_int, _: &mut Batch) {}

    fn owner(e: &FileEntry) -> Option<&FownEntry> {
        e.reg.as_ref().map(|r| &r.fown)
    }
}

fn is_outside(f: &FdFacts, all: &Collected) -> bool {
    !all.mounts.contains_key(&f.info.mnt_id)
}

/// A restore will open the file by its path: it must lead to the same file now.
fn check_path(f: &FdFacts, all: &Collected) -> Result<()> {
    if f.stat.links == 0 || f.link.ends_with(b" (deleted)") {
        return f.refuse("is deleted under this name", "close it, or give the file its name back");
    }
    let there = file::open_in(&all.root, &f.link, libc::O_PATH as u32).and_then(file::stat);
    match there {
        Ok(s) if s.is_same_file(&f.stat) => Ok(()),
        Ok(_) => f.refuse("its path leads to another file now", "close it, or put the file back"),
        Err(e) => f.refuse(format!("its path cannot be opened: {e}"), "close it, or put the file back"),
    }
}

/// Opens a file of the container by its record.
fn open(r: &RegFileEntry, shop: &mut Workshop) -> Result<OwnedFd> {
    let what = || String::from_utf8_lossy(&r.name).into_owned();
    let flags = r.flags & REOPEN as u32;
    let fd = match shop.ghosts.open(r, shop.root.as_fd())? {
        Some(ghost) => file::reopen(ghost, flags & !(libc::O_NOFOLLOW as u32)),
        None => file::open_in(shop.root.as_fd(), &r.name, flags),
    };
    let fd = fd.map_err(Error::system(format_args!("open {} in the container", what())))?;
    let stat = file::stat(&fd).map_err(Error::system(what()))?;
    if r.mode.is_some_and(|mode| mode & libc::S_IFMT != stat.kind()) {
        return Err(Error::BadRecord { what: format!("{} is another kind of file now", what()) });
    }
    if r.flags & libc::O_PATH as u32 == 0 && r.pos != 0 {
        nix::unistd::lseek(&fd, r.pos as i64, nix::unistd::Whence::SeekSet)
            .map_err(|e| Error::system(format_args!("seek in {}", what()))(e.into()))?;
    }
    Ok(fd)
}
