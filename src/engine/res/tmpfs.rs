//! The content of the container's own tmpfs mounts (tmpfs(5)): memory that has no other place than the image.
//!
//! One archive in the format of tar(5) holds all of them, with paths from the container's root. A tmpfs of the host's that
//! is only bound into the container stays where it is. Sockets are not in the archive: whoever holds one binds it again.

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsStr;
use std::fs::{self, File, Metadata, Permissions};
use std::io::{self, BufReader, BufWriter, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

use libc::pid_t;
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, mknod, utimensat};
use nix::sys::time::TimeSpec;
use tar::{Archive, Builder, Entry, EntryType};

use crate::sys::namespace;
use crate::sys::proc::Mount;

/// The archive's name in an image directory.
pub const ARCHIVE: &str = "tmpfs.tar";

/// Extended attributes in an extended header.
const XATTR: &str = "SCHILY.xattr.";
/// A time with its nanoseconds, which the header of an entry lacks.
const MTIME: &str = "mtime";

/// The mount points of those of a container's own mounts that are tmpfs and can be written to, each file system once. Those
/// in /proc and /sys are the runtime's.
pub fn points(own: &[Mount]) -> Vec<PathBuf> {
    let mut seen = BTreeSet::new();
    let mut all = Vec::new();
    for m in own.iter().filter(|m| m.fs_type == "tmpfs" && m.root == "/" && !m.read_only) {
        let point = PathBuf::from(&m.point);
        let runtimes = point.starts_with("/proc") || point.starts_with("/sys");
        if !runtimes && seen.insert(&m.device) {
            all.push(point);
        }
    }
    all
}

/// Bytes that the given mounts hold; what cannot be asked counts as nothing.
pub fn used(init: pid_t, mounts: &[PathBuf]) -> u64 {
    let size = |mount: &PathBuf| {
        let s = nix::sys::statvfs::statvfs(mount).ok()?;
        Some((s.blocks() - s.blocks_free()) * s.fragment_size())
    };
    namespace::in_mounts_of(init, || Ok(mounts.iter().filter_map(size).sum())).unwrap_or(0)
}

/// Writes what is in the given mounts of a stopped container into `archive`.
pub fn dump(init: pid_t, mounts: &[PathBuf], archive: File) -> io::Result<()> {
    namespace::in_mounts_of(init, || {
        let mut out = Builder::new(BufWriter::new(archive));
        out.follow_symlinks(false);
        out.preserve_absolute(true);
        for mount in mounts {
            let device = fs::symlink_metadata(mount)?.dev();
            append(&mut out, mount, device, &mut HashMap::new())?;
        }
        out.into_inner()?.flush()
    })
}

/// Appends what is at `path` and below it, as far as it is on `device`. `links`: files with more than one name.
fn append(
    out: &mut Builder<impl Write>,
    path: &Path,
    device: u64,
    links: &mut HashMap<u64, PathBuf>,
) -> io::Result<()> {
    let meta = fs::symlink_metadata(path)?;
    if meta.dev() != device || meta.file_type().is_socket() {
        return Ok(());
    }
    if !meta.is_dir() && meta.nlink() > 1 {
        if let Some(first) = links.get(&meta.ino()) {
            let mut header = tar::Header::new_gnu();
            header.set_metadata(&meta);
            header.set_entry_type(EntryType::Link);
            header.set_size(0);
            return out.append_link(&mut header, path, first);
        }
        links.insert(meta.ino(), path.to_owned());
    }
    let mut extended = vec![(MTIME.to_owned(), format!("{}.{:09}", meta.mtime(), meta.mtime_nsec()).into_bytes())];
    for key in xattr::list(path)? {
        let value = xattr::get(path, &key)?.unwrap_or_default();
        extended.push((format!("{XATTR}{}", key.display()), value));
    }
    out.append_pax_extensions(extended.iter().map(|(key, value)| (key.as_str(), value.as_slice())))?;
    out.append_path(path)?;
    if meta.is_dir() {
        for entry in fs::read_dir(path)? {
            append(out, &entry?.path(), device, links)?;
        }
    }
    Ok(())
}

/// Makes the tmpfs mounts of a container that is being built what they were: `init` is in its mount namespace.
pub fn restore(init: pid_t, archive: File) -> io::Result<()> {
    namespace::in_mounts_of(init, || {
        let mut archive = Archive::new(BufReader::new(archive));
        let (mut known, mut directories) = (BTreeSet::new(), Vec::new());
        for entry in archive.entries()? {
            let mut entry = entry?;
            let path = entry.path()?.into_owned();
            put(&mut entry, &path).map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))?;
            if entry.header().entry_type() == EntryType::Directory {
                directories.push((path.clone(), time(&mut entry)?));
            }
            known.insert(path);
        }
        // Last, as their times change while they are filled.
        for (path, at) in directories {
            remove_others(&path, &known)?;
            set_time(&path, at)?;
        }
        Ok(())
    })
}

/// Removes what a new tmpfs has been given (tmpcopyup) and the container had removed. Mount points stay.
fn remove_others(dir: &Path, known: &BTreeSet<PathBuf>) -> io::Result<()> {
    let device = fs::symlink_metadata(dir)?.dev();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let meta = fs::symlink_metadata(&path)?;
        if !known.contains(&path) && meta.dev() == device {
            remove(&path, Some(&meta))?;
        }
    }
    Ok(())
}

fn put(entry: &mut Entry<'_, impl io::Read>, path: &Path) -> io::Result<()> {
    let kind = entry.header().entry_type();
    let there = fs::symlink_metadata(path).ok();
    if kind == EntryType::Link {
        remove(path, there.as_ref())?;
        return fs::hard_link(entry.link_name()?.unwrap_or_default(), path);
    }
    let mode = entry.header().mode()?;
    let device = match (entry.header().device_major()?, entry.header().device_minor()?) {
        (Some(major), Some(minor)) => libc::makedev(major, minor),
        _ => 0,
    };
    let node = |kind: SFlag| Ok::<_, io::Error>(mknod(path, kind, Mode::empty(), device)?);
    // What the runtime has made (device nodes, directories) may be a mount point: it is kept where it is the same.
    let same = |is: fn(&fs::FileType) -> bool| {
        there.as_ref().is_some_and(|m| is(&m.file_type()) && (m.is_dir() || m.rdev() == device))
    };
    match kind {
        EntryType::Directory if same(fs::FileType::is_dir) => {}
        EntryType::Char if same(FileTypeExt::is_char_device) => {}
        EntryType::Block if same(FileTypeExt::is_block_device) => {}
        _ => {
            remove(path, there.as_ref())?;
            match kind {
                EntryType::Directory => fs::create_dir(path)?,
                EntryType::Char => node(SFlag::S_IFCHR)?,
                EntryType::Block => node(SFlag::S_IFBLK)?,
                EntryType::Fifo => node(SFlag::S_IFIFO)?,
                EntryType::Symlink => symlink(entry.link_name()?.unwrap_or_default(), path)?,
                _ => drop(entry.unpack(path)?),
            }
        }
    }
    // Before the mode: a change of owner clears set-user-id.
    lchown(path, Some(entry.header().uid()? as u32), Some(entry.header().gid()? as u32))?;
    if kind != EntryType::Symlink {
        fs::set_permissions(path, Permissions::from_mode(mode))?;
    }
    for extension in entry.pax_extensions()?.into_iter().flatten() {
        let extension = extension?;
        if let Some(key) = extension.key_bytes().strip_prefix(XATTR.as_bytes()) {
            xattr::set(path, OsStr::from_bytes(key), extension.value_bytes())?;
        }
    }
    let at = time(entry)?;
    set_time(path, at)
}

fn remove(path: &Path, there: Option<&Metadata>) -> io::Result<()> {
    match there {
        Some(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Some(_) => fs::remove_file(path),
        None => Ok(()),
    }
}

/// When the content was last changed.
fn time(entry: &mut Entry<'_, impl io::Read>) -> io::Result<TimeSpec> {
    let whole = TimeSpec::new(entry.header().mtime()? as i64, 0);
    for extension in entry.pax_extensions()?.into_iter().flatten() {
        let extension = extension?;
        if extension.key_bytes() == MTIME.as_bytes() {
            let text = String::from_utf8_lossy(extension.value_bytes());
            let parts = text.split_once('.').and_then(|(s, ns)| Some((s.parse().ok()?, ns.parse().ok()?)));
            return Ok(parts.map_or(whole, |(seconds, nanos)| TimeSpec::new(seconds, nanos)));
        }
    }
    Ok(whole)
}

fn set_time(path: &Path, at: TimeSpec) -> io::Result<()> {
    Ok(utimensat(nix::fcntl::AT_FDCWD, path, &at, &at, UtimensatFlags::NoFollowSymlink)?)
}
