//! Image directories: written whole or not at all, read without leaving them.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, BufReader, BufWriter};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, Flock, FlockArg, OFlag, OpenHow, RenameFlags, ResolveFlag, openat2, renameat2};
use prost::Message;

use super::format::{self, ImageFile, Payload, RecordReader, RecordWriter};
use super::records::stats::StatsEntry;
use super::{Error, Result};

/// The link in an image directory to the directory that it is an increment of.
pub(crate) const PARENT: &str = "parent";

/// How many generations of parents are followed.
const MAX_PARENTS: usize = 128;

/// An image directory in the making.
///
/// It is written under a temporary name, `.NAME.lmrun-PID` beside the final one, and appears
/// under its final name by [`commit`](Self::commit) or never. A lock on the directory tells the
/// living from what the dead left behind; the next writer for the same name removes the latter.
/// (Processes forked meanwhile must not keep the descriptor.)
#[derive(Debug)]
pub struct ImageWriter {
    target: PathBuf,
    staging: PathBuf,
    /// The target is a mount point: it cannot be replaced, only filled.
    fill: bool,
    /// The target holds images, which the new ones replace.
    replace: bool,
    parent: Option<ImageDir>,
    _lock: Flock<File>,
}

impl ImageWriter {
    /// Begins the directory `target`, which must not exist, be empty, or be an image directory: engines use the same
    /// one again, and until the commit the old images stay. `parent` is the image directory that this one is an
    /// increment of, relative to `target`.
    ///
    /// # Errors
    /// [`Error::Occupied`], and whatever is wrong with the parent, before anything was made.
    pub fn create(target: &Path, parent: Option<&Path>) -> Result<Self> {
        let at = Error::io;
        let (above, name) = match (target.parent(), target.file_name()) {
            (Some(above), Some(name)) => (if above.as_os_str().is_empty() { Path::new(".") } else { above }, name),
            _ => {
                return Err(Error::Occupied { path: target.to_owned() });
            }
        };
        DirBuilder::new().recursive(true).mode(0o700).create(above).map_err(at(above))?;
        let above = above.canonicalize().map_err(at(above))?;
        let target = above.join(name);
        let fill = is_mount_point(&target).map_err(at(&target))?;

        let prefix = format!(".{}.lmrun-", name.display());
        let around = if fill { &target } else { &above };
        remove_stale(around, &prefix).map_err(at(around))?;
        let replace = !is_vacant(&target).map_err(at(&target))?;
        if replace && (fill || !ImageDir::open(&target).is_ok_and(|dir| dir.has_images().unwrap_or(false))) {
            return Err(Error::Occupied { path: target });
        }
        let staging = around.join(format!("{prefix}{}", std::process::id()));
        let lock = make_locked(&staging).map_err(at(&staging))?;
        let mut writer = Self { target, staging, fill, replace, parent: None, _lock: lock };
        if let Some(link) = parent {
            writer.parent = Some(writer.link_parent(link)?);
        }
        Ok(writer)
    }

    fn link_parent(&self, link: &Path) -> Result<ImageDir> {
        // The target may not exist yet; the staging directory beside it sees the same.
        let parent = open_parent(if self.fill { &self.target } else { &self.staging }, link)?;
        if self.replace {
            parent.must_not_need(&self.target)?;
        }
        let place = self.staging.join(PARENT);
        symlink(link, &place).map_err(Error::io(&place))?;
        Ok(parent)
    }

    /// Where the files are until the commit.
    pub fn path(&self) -> &Path {
        &self.staging
    }

    /// The parent image.
    pub fn parent(&self) -> Option<&ImageDir> {
        self.parent.as_ref()
    }

    /// Writes a file of records.
    pub fn write<T: Message>(&self, kind: &ImageFile<T>, id: u64, records: &[T]) -> Result<()> {
        let mut out = self.records(kind, id)?;
        records.iter().try_for_each(|record| out.record(record))?;
        out.finish().map(drop)
    }

    /// Writes a file of records with the bytes that belong to each.
    pub fn write_payloads<T>(&self, kind: &ImageFile<T>, id: u64, records: &[(T, Vec<u8>)]) -> Result<()>
    where
        T: Message + Payload,
    {
        let mut out = self.records(kind, id)?;
        for (record, bytes) in records {
            if record.payload_len() != bytes.len() as u64 {
                return Err(Error::Payload {
                    path: self.staging.join(kind.name(id)),
                    said: record.payload_len(),
                    given: bytes.len() as u64,
                });
            }
            out.record(record)?;
            out.raw(bytes)?;
        }
        out.finish().map(drop)
    }

    /// Begins a file whose records and bytes come in an order of their own.
    pub fn records<T>(&self, kind: &ImageFile<T>, id: u64) -> Result<RecordWriter<BufWriter<File>>> {
        start_records(kind, self.staging.join(kind.name(id)))
    }

    /// Writes a file that holds no records.
    pub fn raw_file(&self, name: &str, bytes: &[u8]) -> Result<()> {
        io::Write::write_all(&mut self.new_file(name)?, bytes).map_err(Error::io(&self.staging.join(name)))
    }

    /// Begins a file that holds no records.
    pub fn new_file(&self, name: &str) -> Result<File> {
        let path = self.staging.join(name);
        create_new(&path).map_err(Error::io(&path))
    }

    /// Makes everything durable and gives the directory its final name.
    pub fn commit(self) -> Result<()> {
        let Self { target, staging, fill, .. } = &self;
        let (mut files, mut paths) = (Vec::new(), Vec::new());
        for entry in fs::read_dir(staging).map_err(Error::io(staging))? {
            let entry = entry.map_err(Error::io(staging))?;
            if entry.file_type().map_err(Error::io(staging))?.is_file() {
                paths.push(entry.path());
            }
            files.push(entry.file_name());
        }
        sync_all(&paths)?;
        sync(staging)?;
        if *fill {
            // The inventory comes last: without it there is no image.
            let inventory = format::INVENTORY.name(0);
            files.sort_by_key(|name| name.as_os_str() == inventory.as_str());
            for name in files {
                fs::rename(staging.join(&name), target.join(&name)).map_err(Error::io(target))?;
            }
            fs::remove_dir(staging).map_err(Error::io(staging))?;
            return sync(target);
        }
        if self.replace {
            // What was there is removed when this is dropped.
            renameat2(AT_FDCWD, staging, AT_FDCWD, target, RenameFlags::RENAME_EXCHANGE).map_err(Error::io(target))?;
            return sync(target.parent().unwrap_or(Path::new("/")));
        }
        match fs::rename(staging, target) {
            Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => Err(Error::Occupied { path: target.clone() }),
            done => done.map_err(Error::io(target)),
        }?;
        sync(target.parent().unwrap_or(Path::new("/")))
    }
}

impl Drop for ImageWriter {
    fn drop(&mut self) {
        // After a commit there is nothing under this name any more, or what was replaced.
        let _ = fs::remove_dir_all(&self.staging);
    }
}

/// An image directory that is read. Files are opened without following links, so nothing
/// outside the directory is taken for a part of it; only `parent` leads elsewhere.
#[derive(Debug)]
pub struct ImageDir {
    path: PathBuf,
    dir: OwnedFd,
    /// Device and inode of this directory and, before it, of those that led here.
    lineage: Vec<(u64, u64)>,
}

impl ImageDir {
    /// Opens the directory at `path`.
    pub fn open(path: &Path) -> Result<Self> {
        Self::open_after(path, Vec::new())
    }

    fn open_after(path: &Path, mut lineage: Vec<(u64, u64)>) -> Result<Self> {
        let dir = OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).open(path).map_err(Error::io(path))?;
        let meta = dir.metadata().map_err(Error::io(path))?;
        let identity = (meta.dev(), meta.ino());
        if lineage.contains(&identity) {
            return Err(Error::ParentCycle { path: path.to_owned() });
        }
        if lineage.len() > MAX_PARENTS {
            return Err(Error::TooManyParents { path: path.to_owned(), limit: MAX_PARENTS });
        }
        lineage.push(identity);
        Ok(Self { path: path.to_owned(), dir: dir.into(), lineage })
    }

    /// Where the directory is, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The image that this one is an increment of.
    pub fn parent(&self) -> Result<Option<Self>> {
        let link = self.path.join(PARENT);
        match fs::symlink_metadata(&link) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::io(&link)(e)),
            Ok(_) => Self::open_after(&link, self.lineage.clone()).map(Some),
        }
    }

    /// Whether there is a file of this kind and id.
    pub fn exists<T>(&self, kind: &ImageFile<T>, id: u64) -> Result<bool> {
        self.file_if_there(&kind.name(id)).map(|file| file.is_some())
    }

    /// A pre-dump whose pages went to a page server leaves lmrun.bin alone.
    fn has_images(&self) -> Result<bool> {
        Ok(self.exists(&format::INVENTORY, 0)? || self.exists(&format::LMRUN, 0)? || self.has_pagemaps()?)
    }

    /// Refuses a parent that is `target`, or has it among its own.
    fn must_not_need(&self, target: &Path) -> Result<()> {
        let meta = fs::metadata(target).map_err(Error::io(target))?;
        if self.lineage.last() == Some(&(meta.dev(), meta.ino())) {
            return Err(Error::ParentCycle { path: target.to_owned() });
        }
        self.parent()?.map_or(Ok(()), |parent| parent.must_not_need(target))
    }

    fn has_pagemaps(&self) -> Result<bool> {
        let mut names = fs::read_dir(&self.path).map_err(Error::io(&self.path))?.filter_map(|entry| entry.ok());
        Ok(names.any(|entry| entry.file_name().as_encoded_bytes().starts_with(b"pagemap-")))
    }

    /// Reads the only record of a file.
    pub fn read_one<T: Message + Default>(&self, kind: &ImageFile<T>, id: u64) -> Result<T> {
        let mut records = self.read_all(kind, id)?;
        match (records.pop(), records.len()) {
            (Some(record), 0) => Ok(record),
            (last, rest) => {
                Err(Error::NotOne { path: self.path.join(kind.name(id)), found: rest + usize::from(last.is_some()) })
            }
        }
    }

    /// Reads all records of a file.
    pub fn read_all<T: Message + Default>(&self, kind: &ImageFile<T>, id: u64) -> Result<Vec<T>> {
        let mut reader = self.records(kind, id)?;
        std::iter::from_fn(|| reader.record().transpose()).collect()
    }

    /// Reads all records of a file with the bytes that belong to each.
    pub fn read_payloads<T>(&self, kind: &ImageFile<T>, id: u64) -> Result<Vec<(T, Vec<u8>)>>
    where
        T: Message + Default + Payload,
    {
        let mut reader = self.records(kind, id)?;
        let mut all = Vec::new();
        while let Some(record) = reader.record::<T>()? {
            let bytes = reader.raw(record.payload_len())?;
            all.push((record, bytes));
        }
        Ok(all)
    }

    /// Begins to read a file whose records and bytes come in an order of their own.
    pub fn records<T>(&self, kind: &ImageFile<T>, id: u64) -> Result<RecordReader<BufReader<File>>> {
        let name = kind.name(id);
        let path = self.path.join(&name);
        let file = self.file(&name)?;
        let len = file.metadata().map_err(Error::io(&path))?.len();
        RecordReader::new(kind, BufReader::new(file), len, path)
    }

    /// Opens a regular file of the directory for reading.
    pub fn file(&self, name: &str) -> Result<File> {
        let missing = || Error::io(&self.path.join(name))(io::Error::from(Errno::ENOENT));
        self.file_if_there(name)?.ok_or_else(missing)
    }

    /// As [`file`](Self::file); None: there is no such file.
    pub fn file_if_there(&self, name: &str) -> Result<Option<File>> {
        let path = self.path.join(name);
        // Not blocking: what is there may be a FIFO.
        let how = OpenHow::new()
            .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NOCTTY | OFlag::O_NONBLOCK)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
        let file = match openat2(&self.dir, name, how) {
            Err(Errno::ENOENT) => return Ok(None),
            other => File::from(other.map_err(Error::io(&path))?),
        };
        if !file.metadata().map_err(Error::io(&path))?.is_file() {
            return Err(Error::NotAFile { path });
        }
        Ok(Some(file))
    }
}

/// Writes [`format::STATS_DUMP`] or [`format::STATS_RESTORE`] into a work directory, in place of an older one.
pub fn write_stats(work: &Path, kind: &ImageFile<StatsEntry>, stats: &StatsEntry) -> Result<()> {
    let path = work.join(kind.name(0));
    match fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(Error::io(&path)(e)),
        _ => {}
    }
    let mut out = start_records(kind, path)?;
    out.record(stats)?;
    out.finish().map(drop)
}

fn start_records<T>(kind: &ImageFile<T>, path: PathBuf) -> Result<RecordWriter<BufWriter<File>>> {
    let file = create_new(&path).map_err(Error::io(&path))?;
    RecordWriter::new(kind, BufWriter::new(file), path)
}

/// Memory of others ends up in these files: only the owner reads them.
pub(crate) fn create_new(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)
}

pub(crate) fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).map_err(Error::io(path))
}

/// Syncs files side by side: a journal takes what comes together in one go.
fn sync_all(paths: &[PathBuf]) -> Result<()> {
    std::thread::scope(|scope| {
        let syncs: Vec<_> = paths.iter().map(|path| scope.spawn(|| sync(path))).collect();
        syncs.into_iter().try_for_each(|s| s.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

fn is_mount_point(path: &Path) -> io::Result<bool> {
    let (Some(above), Some(name)) = (path.parent(), path.file_name()) else {
        return Ok(true);
    };
    let above = File::open(above)?;
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW)
        .resolve(ResolveFlag::RESOLVE_NO_XDEV);
    match openat2(&above, name, how) {
        Ok(_) | Err(Errno::ENOENT) => Ok(false),
        Err(Errno::EXDEV) => Ok(true),
        Err(e) => Err(e.into()),
    }
}

/// Whether nothing is at `path`, or a directory with nothing in it.
fn is_vacant(path: &Path) -> io::Result<bool> {
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(true),
        Err(e) => Err(e),
        Ok(meta) => Ok(meta.is_dir() && fs::read_dir(path)?.next().is_none()),
    }
}

/// Opens the parent image that `link` leads to from the directory `from`.
pub(crate) fn open_parent(from: &Path, link: &Path) -> Result<ImageDir> {
    if link.is_absolute() {
        return Err(Error::ParentNotRelative { path: link.to_owned() });
    }
    let parent = ImageDir::open(&from.join(link))?;
    if parent.has_images()? {
        return Ok(parent);
    }
    Err(Error::NotImages { path: parent.path })
}

/// Removes staging directories whose writers are gone.
fn remove_stale(around: &Path, prefix: &str) -> io::Result<()> {
    let entries = match fs::read_dir(around) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if !entry.file_name().as_encoded_bytes().starts_with(prefix.as_bytes()) {
            continue;
        }
        match lock_dir(&entry.path()) {
            Ok(_lock) => fs::remove_dir_all(entry.path())?,
            // Somebody's who lives, or was finished meanwhile.
            Err(Errno::EWOULDBLOCK | Errno::ENOENT) => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// Makes a directory and locks it.
fn make_locked(path: &Path) -> io::Result<Flock<File>> {
    loop {
        DirBuilder::new().mode(0o700).create(path)?;
        match lock_dir(path) {
            Ok(lock) => {
                // Another writer may have found it before it was locked, and removed it.
                let same =
                    fs::metadata(path).is_ok_and(|meta| lock.metadata().is_ok_and(|ours| ours.ino() == meta.ino()));
                if same {
                    return Ok(lock);
                }
            }
            Err(Errno::EWOULDBLOCK | Errno::ENOENT) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

fn lock_dir(path: &Path) -> nix::Result<Flock<File>> {
    let dir = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW)
        .open(path)
        .map_err(|e| Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)))?;
    Flock::lock(dir, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| e)
}

#[cfg(test)]
#[path = "dir_tests.rs"]
mod tests;
