//! inotify(7) instances. The kernel shows a watch by inode, not by path: the path is searched for.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirEntryExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use libc::{c_int, pid_t};

use super::{Collected, FdFacts, FdKind, Workshop, part};
use crate::engine::{Error, Result};
use crate::image::records::files::{FdTypes, FileEntry, FownEntry};
use crate::image::records::fsnotify::{FhEntry, InotifyFileEntry, InotifyWdEntry};
use crate::sys::{file, inotify, proc, sockopt};
use crate::tracee::batch::Batch;

pub struct Inotify;

/// Most files that are looked at in search of a watched one.
const MOST: usize = 500_000;
/// Where to look first: what programs watch is their configuration and their data.
const FIRST: [&str; 8] = ["etc", "run", "tmp", "var", "srv", "home", "opt", "dev"];
/// File systems of the kernel's, which are no place to search.
const NOWHERE: [&str; 2] = ["proc", "sys"];

impl FdKind for Inotify {
    const NAME: &'static str = "inotify instance";
    const TYPE: FdTypes = FdTypes::Inotify;

    fn claims(f: &FdFacts) -> bool {
        f.link == b"anon_inode:inotify"
    }

    fn dump(f: &FdFacts, id: u32, all: &mut Collected) -> Result<FileEntry> {
        if !all.is_whole() {
            let record = InotifyFileEntry { id, flags: f.flags(), fown: f.owner()?, wd: Vec::new() };
            return Ok(FileEntry { r#type: Self::TYPE as i32, id, ify: Some(record), ..FileEntry::default() });
        }
        if sockopt::inq(f.dup.as_fd()).map_err(|e| Error::proc(f.pid, e))? > 0 {
            return f.refuse("holds events that nobody has read", "try again once the program has read them");
        }
        all.watched.instances.push(f.dup.try_clone().map_err(|e| Error::proc(f.pid, e))?);
        let bad = || Error::BadFdInfo { pid: f.pid, fd: f.fd, line: format!("{:?}", f.info.extra) };
        let lines: Vec<&str> = f.info.all("inotify wd").collect();
        let watches: Option<Vec<InotifyWdEntry>> = lines.iter().map(|line| watch(line)).collect();
        let mut wd = watches.ok_or_else(bad)?;
        all.watched.find(f.pid, &wd).map_err(|e| Error::proc(f.pid, e))?;
        for w in &mut wd {
            let Some(path) = all.watched.paths.get(&key(w)) else {
                let why = format!("watches a file of which no path is found (inode {}, device {:x})", w.i_ino, w.s_dev);
                return f.refuse(why, "remove the watch, or stop and start the container instead");
            };
            w.id = id;
            w.f_handle.path = Some(path.clone());
        }
        let record = InotifyFileEntry { id, flags: f.flags(), fown: f.owner()?, wd };
        Ok(FileEntry { r#type: Self::TYPE as i32, id, ify: Some(record), ..FileEntry::default() })
    }

    fn create(e: &FileEntry, shop: &mut Workshop) -> Result<OwnedFd> {
        let r = part(e, Self::NAME, e.ify.as_ref())?;
        let make = || {
            let fd = inotify::new()?;
            file::set_flags(&fd, r.flags)?;
            Ok((fd.try_clone()?, fd))
        };
        let (ours, fd) = make().map_err(Error::system(format_args!("make inotify instance {:#x}", e.id)))?;
        shop.unarmed.push((ours, r.clone()));
        Ok(fd)
    }

    fn link(_: &FileEntry, _: c_int, _: &mut Batch) {}

    fn owner(e: &FileEntry) -> Option<&FownEntry> {
        e.ify.as_ref().map(|r| &r.fown)
    }
}

/// Sets the watches. When all else is done: what a restore opens and closes is none of the program's events.
pub fn arm(shop: &mut Workshop) -> Result<()> {
    for (fd, record) in std::mem::take(&mut shop.unarmed) {
        for w in &record.wd {
            let path = w.f_handle.path.as_deref().unwrap_or_default();
            let set = file::open_in(&shop.root, path, libc::O_PATH as u32)
                .and_then(|target| inotify::add_as(&fd, w.wd.cast_signed(), &target, w.mask));
            set.map_err(Error::system(format_args!("watch {}", String::from_utf8_lossy(path))))?;
        }
    }
    Ok(())
}

/// What tells watched files apart: inode and device, as the kernel shows them.
type Key = (u64, u32);

fn key(w: &InotifyWdEntry) -> Key {
    (w.i_ino, w.s_dev)
}

/// `1 ino:61af sdev:fe00000 mask:100 ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:af61`, all of it in
/// hexadecimal.
fn watch(line: &str) -> Option<InotifyWdEntry> {
    let mut words = line.split_whitespace();
    let wd = u32::from_str_radix(words.next()?, 16).ok()?;
    let fields: HashMap<&str, &str> = words.filter_map(|word| word.split_once(':')).collect();
    let hex = |name: &str| u64::from_str_radix(fields.get(name)?, 16).ok();
    Some(InotifyWdEntry {
        id: 0,
        i_ino: hex("ino")?,
        mask: hex("mask")? as u32,
        ignored_mask: hex("ignored_mask")? as u32,
        s_dev: hex("sdev")? as u32,
        wd,
        f_handle: FhEntry::default(),
    })
}

/// The paths of watched files that have been found. Dropped, it takes the events out of the instances that the
/// checkpoint itself has caused: they were empty when it began.
#[derive(Debug, Default)]
pub struct Watched {
    paths: HashMap<Key, Vec<u8>>,
    instances: Vec<OwnedFd>,
}

impl Drop for Watched {
    fn drop(&mut self) {
        let mut events = [0; 4096];
        for instance in &self.instances {
            while sockopt::inq(instance.as_fd()).is_ok_and(|bytes| bytes > 0) {
                if nix::unistd::read(instance, &mut events).is_err() {
                    break;
                }
            }
        }
    }
}

impl Watched {
    /// Searches the container of `pid` for the files of `watches`.
    fn find(&mut self, pid: pid_t, watches: &[InotifyWdEntry]) -> io::Result<()> {
        let mut wanted: Vec<Key> = watches.iter().map(key).filter(|key| !self.paths.contains_key(key)).collect();
        let root = PathBuf::from(format!("/proc/{pid}/root/."));
        let mut rest: VecDeque<PathBuf> = FIRST.iter().map(|name| root.join(name)).chain([root.clone()]).collect();
        self.consider(&root, &root, &mut wanted)?;
        let mut looked_at = 0;
        while let Some(dir) = rest.pop_front().filter(|_| !wanted.is_empty() && looked_at < MOST) {
            // What cannot be read, or is no directory, has nothing to be found.
            for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
                looked_at += 1;
                let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
                // The number of a mount point is that of the directory below it.
                if is_dir || wanted.iter().any(|(inode, _)| *inode == entry.ino()) {
                    self.consider(&root, &entry.path(), &mut wanted)?;
                }
                let name = entry.file_name();
                let known = dir == root && NOWHERE.iter().chain(&FIRST).any(|known| name == *known);
                if is_dir && !known {
                    rest.push_back(entry.path());
                }
            }
            if dir != root && dir.parent() == Some(&root) {
                self.consider(&root, &dir, &mut wanted)?;
            }
        }
        Ok(())
    }

    /// Notes the path if it leads to a wanted file; the kernel is asked, as only it knows its numbers.
    fn consider(&mut self, root: &Path, path: &Path, wanted: &mut Vec<Key>) -> io::Result<()> {
        let inode = std::fs::symlink_metadata(path).map_or(0, |meta| meta.ino());
        if !wanted.iter().any(|(wanted, _)| *wanted == inode) {
            return Ok(());
        }
        let Ok(target) = File::options().read(true).custom_flags(libc::O_PATH | libc::O_NOFOLLOW).open(path) else {
            return Ok(());
        };
        let own = inotify::new()?;
        inotify::add(&own, &target, libc::IN_DELETE_SELF)?;
        let info = proc::fd_info(std::process::id().cast_signed(), own.as_raw_fd())?;
        if let Some(found) = info.all("inotify wd").find_map(watch).map(|w| key(&w))
            && wanted.contains(&found)
        {
            let inside = path.strip_prefix(root).unwrap_or(path);
            self.paths.insert(found, [b"/", inside.as_os_str().as_bytes()].concat());
            wanted.retain(|key| *key != found);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watch_is_read() {
        let w = watch("d ino:61af sdev:fe00001 mask:100 ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:af6100")
            .unwrap();
        assert_eq!((w.wd, w.i_ino, w.s_dev, w.mask), (13, 0x61af, 0xfe0_0001, 0x100));
        assert!(watch("3 ino:zz").is_none());
    }

    #[test]
    fn a_watched_directory_is_found() {
        let dir = std::env::temp_dir().join(format!("lmrun-inotify-{}", std::process::id()));
        std::fs::create_dir(&dir).unwrap();
        let own = inotify::new().unwrap();
        inotify::add(&own, File::open(&dir).unwrap(), libc::IN_CREATE).unwrap();
        let me = std::process::id().cast_signed();
        let info = proc::fd_info(me, own.as_raw_fd()).unwrap();
        let watches: Vec<_> = info.all("inotify wd").filter_map(watch).collect();
        let mut watched = Watched::default();
        watched.find(me, &watches).unwrap();
        assert_eq!(watched.paths.values().next().unwrap(), dir.as_os_str().as_bytes());
        std::fs::remove_dir(dir).unwrap();
    }
}
