//! Regular files that are open or mapped and have no name any more: their content goes along, and they are made anew,
//! nameless as they were.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::{File, Permissions};
use std::io::{self, BufReader, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, fchown};

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{Mode, futimens};
use nix::sys::time::TimeSpec;
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::FdFacts;
use crate::engine::{Error, Result};
use crate::image::dir::{ImageDir, ImageWriter};
use crate::image::format::{self, RecordReader};
use crate::image::records::files::{
    GhostChunkEntry, GhostFileEntry, RegFileEntry, RemapFilePathEntry, RemapType, Timeval,
};
use crate::sys::file;

/// What the kernel puts behind the last name of a file that has none.
const DELETED: &[u8] = b" (deleted)";
/// Most bytes of content in one piece.
const PIECE: u64 = 1 << 20;

/// The nameless files of a container that is dumped.
#[derive(Debug, Default)]
pub struct Found {
    by_inode: HashMap<(u64, u64), u32>,
    files: Vec<File>,
    remaps: Vec<RemapFilePathEntry>,
}

/// The file's last path, if it has no name any more.
pub fn last_name<'a>(link: &'a [u8], stat: &file::FileStat) -> Option<&'a [u8]> {
    link.strip_suffix(DELETED).filter(|_| stat.links == 0 && stat.kind() == libc::S_IFREG)
}

impl Found {
    /// Notes that record `id` is of this nameless file.
    pub fn add(&mut self, id: u32, of: impl AsFd) -> io::Result<()> {
        let stat = file::stat(&of)?;
        let next = self.files.len() as u32 + 1;
        let ghost = *self.by_inode.entry((stat.dev, stat.inode)).or_insert(next);
        if ghost == next {
            self.files.push(file::reopen(&of, libc::O_RDONLY as u32)?.into());
        }
        let remap_type = Some(RemapType::Ghost as i32);
        self.remaps.push(RemapFilePathEntry { orig_id: id, remap_id: ghost, remap_type });
        Ok(())
    }

    /// As [`Found::add`], for an open file.
    pub fn add_open(&mut self, id: u32, f: &FdFacts) -> Result<()> {
        self.add(id, &f.dup).map_err(|e| Error::proc(f.pid, e))
    }

    /// The number of a nameless file that was seen before.
    pub fn known(&self, stat: &file::FileStat) -> Option<u32> {
        self.by_inode.get(&(stat.dev, stat.inode)).copied()
    }

    /// Whether record `id` is of a nameless file.
    pub fn is_of(&self, id: u32) -> bool {
        self.remaps.iter().any(|r| r.orig_id == id)
    }

    /// Writes them all, with their content but without their holes.
    pub fn write(&self, w: &ImageWriter) -> Result<()> {
        if self.remaps.is_empty() {
            return Ok(());
        }
        w.write(&format::REMAP_FPATH, 0, &self.remaps)?;
        for (ghost, file) in (1..).zip(&self.files) {
            let read = || Error::system(format!("read deleted file {ghost}"));
            let meta = file.metadata().map_err(read())?;
            let time = |seconds: i64, nanos: i64| {
                Some(Timeval { tv_sec: seconds.cast_unsigned(), tv_usec: nanos.cast_unsigned() / 1000 })
            };
            let entry = GhostFileEntry {
                uid: meta.uid(),
                gid: meta.gid(),
                mode: meta.mode(),
                dev: Some(meta.dev() as u32),
                ino: Some(meta.ino()),
                atim: time(meta.atime(), meta.atime_nsec()),
                mtim: time(meta.mtime(), meta.mtime_nsec()),
                chunks: Some(true),
                size: Some(meta.len()),
                ..GhostFileEntry::default()
            };
            let mut out = w.records(&format::GHOST_FILE, ghost)?;
            out.record(&entry)?;
            let mut at = 0;
            while let Some((start, end)) = file::next_data(file, at).map_err(read())? {
                for off in (start..end).step_by(PIECE as usize) {
                    let mut piece = vec![0; (end - off).min(PIECE) as usize];
                    file.read_exact_at(&mut piece, off).map_err(read())?;
                    out.record(&GhostChunkEntry { len: piece.len() as u64, off })?;
                    out.raw(&piece)?;
                }
                at = end;
            }
            out.finish()?;
        }
        Ok(())
    }
}

/// The nameless files of a container that is restored. Each is made when it is first asked for.
#[derive(Default)]
pub struct Ghosts {
    /// Which of them a record is of.
    numbers: HashMap<u32, u32>,
    images: HashMap<u32, RecordReader<BufReader<File>>>,
    made: HashMap<u32, OwnedFd>,
}

impl std::fmt::Debug for Ghosts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ghosts").field("numbers", &self.numbers).field("made", &self.made).finish_non_exhaustive()
    }
}

impl Ghosts {
    pub fn read(dir: &ImageDir) -> Result<Ghosts> {
        let mut ghosts = Ghosts::default();
        if !dir.exists(&format::REMAP_FPATH, 0)? {
            return Ok(ghosts);
        }
        for remap in dir.read_all(&format::REMAP_FPATH, 0)? {
            if remap.remap_type() != RemapType::Ghost {
                let what = format!("file {:#x} has a name that has to be made in an unknown way", remap.orig_id);
                return Err(Error::BadRecord { what });
            }
            ghosts.numbers.insert(remap.orig_id, remap.remap_id);
            if let Entry::Vacant(new) = ghosts.images.entry(remap.remap_id) {
                new.insert(dir.records(&format::GHOST_FILE, remap.remap_id.into())?);
            }
        }
        Ok(ghosts)
    }

    /// Whether record `id` is of a nameless file.
    pub fn is_of(&self, id: u32) -> bool {
        self.numbers.contains_key(&id)
    }

    /// The nameless file that a record is of; None: it has a name.
    pub fn open(&mut self, r: &RegFileEntry, root: BorrowedFd<'_>) -> Result<Option<BorrowedFd<'_>>> {
        let Some(ghost) = self.numbers.get(&r.id).copied() else { return Ok(None) };
        if let Some(mut image) = self.images.remove(&ghost) {
            self.made.insert(ghost, make(&mut image, &r.name, root)?);
        }
        Ok(self.made.get(&ghost).map(AsFd::as_fd))
    }

    pub fn close(&mut self) {
        self.made.clear();
    }
}

/// Makes a file where it was, fills it, and takes its name away.
fn make(image: &mut RecordReader<BufReader<File>>, name: &[u8], root: BorrowedFd<'_>) -> Result<OwnedFd> {
    let failed = || Error::system(format!("make deleted file {} anew", String::from_utf8_lossy(name)));
    let entry: Option<GhostFileEntry> = image.record()?;
    let entry = entry.filter(|e| e.chunks == Some(true) && e.mode & libc::S_IFMT == libc::S_IFREG);
    let entry = entry.ok_or_else(|| Error::BadRecord { what: "a deleted file is of an unknown form".into() })?;
    let file = nameless(name, root).map_err(failed())?;
    file.set_len(entry.size.unwrap_or(0)).map_err(failed())?;
    while let Some(chunk) = image.record::<GhostChunkEntry>()? {
        if chunk.len > PIECE {
            return Err(Error::BadRecord { what: "a deleted file has too large a piece".into() });
        }
        file.write_all_at(&image.raw(chunk.len)?, chunk.off).map_err(failed())?;
    }
    let time = |t: &Option<Timeval>| {
        let t = t.clone().unwrap_or_default();
        TimeSpec::new(t.tv_sec.cast_signed(), (t.tv_usec % 1_000_000).cast_signed() * 1000)
    };
    fchown(&file, Some(entry.uid), Some(entry.gid))
        .and_then(|()| file.set_permissions(Permissions::from_mode(entry.mode & 0o7777)))
        .and_then(|()| Ok(futimens(&file, &time(&entry.atim), &time(&entry.mtim))?))
        .map_err(failed())?;
    Ok(file.into())
}

/// A new file under its old path, or where that is taken now beside it, whose name is gone again.
fn nameless(path: &[u8], root: BorrowedFd<'_>) -> io::Result<File> {
    let cut = path.iter().rposition(|&b| b == b'/').ok_or(ErrorKind::InvalidInput)?;
    let (above, name) = (&path[..cut.max(1)], &path[cut + 1..]);
    let above = file::open_in(root, above, (libc::O_PATH | libc::O_DIRECTORY) as u32)?;
    let beside = [name, format!(".lmrun-{}", std::process::id()).as_bytes()].concat();
    let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let create = |name: &[u8]| openat(&above, name, flags, Mode::S_IRUSR | Mode::S_IWUSR);
    let (file, name) = match create(name) {
        Err(nix::Error::EEXIST) => (create(&beside)?, &beside[..]),
        file => (file?, name),
    };
    unlinkat(&above, name, UnlinkatFlags::NoRemoveDir)?;
    Ok(file.into())
}
