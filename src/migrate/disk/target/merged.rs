//! What the source has in an overlay's upper directory, done to an overlay that is mounted (overlayfs(5): nobody may write
//! below it then).
//!
//! The overlay makes whiteouts, opaque directories and attributes of its own by itself. What is left of a message is its
//! meaning: a whiteout says that a name is not there, a directory that is not opaque also has what is in the lower ones,
//! anything else hides whatever has its name.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, RenameFlags, openat, renameat2};
use nix::sys::stat::{FileStat, Mode, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::super::message::{Link, Meta};
use super::super::{Error, Result};
use super::{Tree, directory_flags, hostile, place};

/// The overlay's own attributes, which nobody sees in what is mounted.
const OWN: &[u8] = b"trusted.overlay.";
/// What an overlay in the container has is escaped thus, since Linux 6.7.
const ESCAPED: &[u8] = b"trusted.overlay.overlay.";
const OPAQUE: &[u8] = b"trusted.overlay.opaque";
/// What can be said below an overlay alone: a directory has the content of another one, a file its own elsewhere.
const UNSEEN: [&[u8]; 2] = [b"trusted.overlay.redirect", b"trusted.overlay.metacopy"];

/// Attributes as they are in what is mounted.
pub fn seen(meta: &Meta) -> Meta {
    let mut meta = meta.clone();
    for xattr in &mut meta.xattrs {
        if let Some(name) = xattr.name.strip_prefix(ESCAPED) {
            xattr.name = [OWN, name].concat();
        } else if xattr.name.starts_with(OWN) {
            xattr.name.clear();
        }
    }
    meta.xattrs.retain(|xattr| !xattr.name.is_empty());
    meta
}

fn has(meta: &Meta, name: &[u8]) -> bool {
    meta.xattrs.iter().any(|xattr| xattr.name == name)
}

/// None: there is nothing.
fn visible(dir: &OwnedFd, name: &OsStr) -> io::Result<Option<FileStat>> {
    match fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::ENOENT) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

fn is_dir(stat: &FileStat) -> bool {
    stat.st_mode & libc::S_IFMT == libc::S_IFDIR
}

/// What has this name is not to be seen any more.
fn hide(dir: &OwnedFd, name: &OsStr, stat: &FileStat) -> io::Result<()> {
    match is_dir(stat) {
        true => fs::remove_dir_all(place(dir, name)),
        false => Ok(unlinkat(dir, name, UnlinkatFlags::NoRemoveDir)?),
    }
}

impl Tree {
    /// The overlay is mounted at `at`.
    pub(super) fn mounted(&mut self, at: &Path) -> Result<()> {
        let failed = |e: Errno| Error::io("open", at)(e.into());
        self.dir = openat(AT_FDCWD, at, directory_flags() - OFlag::O_NOFOLLOW, Mode::empty()).map_err(failed)?;
        self.limbo =
            openat(&self.dir, self.limbo_name.as_os_str(), directory_flags(), Mode::empty()).map_err(failed)?;
        self.open = None;
        self.is_merged = true;
        Ok(())
    }

    /// Before a file gets a name; true: that is all, the file is there.
    pub(super) fn make_way(&mut self, to: &OwnedFd, entry: &Link) -> Result<bool> {
        let (id, name) = (entry.id, entry.name());
        if self.nodes.get(&entry.dir).is_some_and(|dir| dir.entries.contains_key(name)) {
            return Err(hostile(format_args!("a name for file {id} that another one has")));
        }
        let failed = |e| Error::io("replace a file in", self.place_of(entry.dir))(e);
        let node = self.node(id)?;
        let is_opaque = match &node.meta {
            Some(meta) if UNSEEN.iter().any(|name| has(meta, name)) => {
                let what = "the overlay there cannot be told what it says of its content; try again";
                return Err(Error::NotKept { path: self.place_of(entry.dir).join(name), what });
            }
            meta => meta.as_ref().is_some_and(|meta| has(meta, OPAQUE)),
        };
        let there = visible(to, name).map_err(failed)?;
        match there {
            Some(there) if node.kind == libc::S_IFDIR && is_dir(&there) && !is_opaque => {
                // Its own content, if it has any already, would have to be moved: no overlay makes such a directory.
                let limbo = id.to_string();
                unlinkat(&self.limbo, limbo.as_str(), UnlinkatFlags::RemoveDir).map_err(|e| failed(e.into()))?;
                Ok(true)
            }
            Some(there) => {
                hide(to, name, &there).map_err(failed)?;
                Ok(node.is_whiteout)
            }
            None => Ok(node.is_whiteout),
        }
    }

    /// Directory `name`, which has lost its name and cannot be moved since there is more in it than what is ours: all that is
    /// ours goes into a new one without a name, and the rest is hidden.
    pub(super) fn evacuate(&self, dir: &OwnedFd, name: &OsStr, id: u64) -> io::Result<()> {
        self.move_content(dir, name, &self.limbo, OsStr::new(&id.to_string()), id)?;
        visible(dir, name)?.map_or(Ok(()), |there| hide(dir, name, &there))
    }

    fn move_content(&self, from: &OwnedFd, name: &OsStr, to: &OwnedFd, new: &OsStr, id: u64) -> io::Result<()> {
        mkdirat(to, new, Mode::S_IRWXU)?;
        let from = openat(from, name, directory_flags(), Mode::empty())?;
        let to = openat(to, new, directory_flags(), Mode::empty())?;
        let node = &self.nodes[&id];
        for (name, child) in node.entries.iter().filter(|(_, child)| !self.nodes[child].is_whiteout) {
            match renameat2(&from, name.as_os_str(), &to, name.as_os_str(), RenameFlags::RENAME_NOREPLACE) {
                Err(Errno::EXDEV) => self.move_content(&from, name, &to, name, *child)?,
                done => done?,
            }
        }
        Ok(())
    }
}
