//! One root: what is there, and what of it the destination knows.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, fstat, fstatat};

use super::super::content::{Fingerprint, Reader, differing};
use super::super::message::{BLOCK, Block, Create, Forget, Link, Meta, Op, ROOT, Resize, Unlink, XATTR_LIMIT};
use super::super::watch::Watches;
use super::super::{Error, Result, Root, xattrs};
use super::{Out, Round, Stage};
use crate::sys::file::reopen;

/// What stat(2) tells of a change: two alike mean that there was none, unless they are of the moment when it was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Signature {
    size: i64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

impl Signature {
    fn of(s: &FileStat) -> Self {
        let (mtime, ctime) = ((s.st_mtime, s.st_mtime_nsec), (s.st_ctime, s.st_ctime_nsec));
        Self { size: s.st_size, mtime, ctime }
    }

    /// Changed at `time` (from the epoch) or later.
    fn is_since(&self, time: Duration) -> bool {
        self.ctime >= (time.as_secs() as i64, i64::from(time.subsec_nanos()))
    }
}

/// Why a file is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Why {
    /// Everything is.
    Scan,
    /// Something was done to its name or its attributes: the content is as it was unless size or time say otherwise.
    Touched,
    /// It is open: a change shows in its attributes.
    Open,
    /// Its content may have changed without a trace in its attributes.
    Written,
}

/// What kind of round it is.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    pub stage: Stage,
    /// Everything is looked at.
    pub all: bool,
    /// What changed then (from the epoch) or later may change once more without a trace.
    pub since: Duration,
}

/// A file, of whatever kind.
struct Node {
    inode: u64,
    /// What it was made as; its number is in there.
    file: Create,
    /// Directory and name, more than one for hard links.
    names: Vec<(u64, OsString)>,
    /// Of a directory.
    entries: BTreeMap<OsString, u64>,
    meta: Meta,
    size: u64,
    blocks: BTreeMap<u64, Fingerprint>,
    /// When its attributes, and its content, were last read. None also if it may have changed just afterwards.
    seen: Option<Signature>,
    read: Option<Signature>,
    /// The destination has been told of it.
    told: bool,
    /// A directory whose entries are known and, if anything is, watched.
    listed: bool,
}

impl Node {
    fn is(&self, kind: u32) -> bool {
        self.file.kind == kind
    }
}

pub struct Tree {
    pub index: u32,
    pub root: Root,
    dir: OwnedFd,
    view: Option<OwnedFd>,
    device: u64,
    seed: u64,
    nodes: HashMap<u64, Node>,
    by_inode: HashMap<u64, u64>,
    next: u64,
    // To be looked at in the next round.
    touched: BTreeMap<u64, BTreeMap<OsString, Why>>,
    /// Directories whose entries are to be listed.
    unlisted: BTreeSet<u64>,
    /// Files that changed so shortly before they were read that it may have been afterwards, or that could not be read.
    again: BTreeSet<u64>,
    /// Files that a process had a writable mapping of once: nothing tells of changes.
    mapped: BTreeSet<u64>,
    // Found in the present round, to be told.
    /// Entries that changed, with what they were.
    entries: BTreeMap<(u64, OsString), Option<u64>>,
    /// Files that have lost a name, or have none yet.
    loose: BTreeSet<u64>,
    changed_meta: BTreeSet<u64>,
    changed_content: BTreeSet<u64>,
    forgotten: Vec<u64>,
}

fn directory_flags() -> OFlag {
    OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC
}

/// What a name in an open directory is for calls that take a path. Not followed by those that do not follow.
fn place(dir: impl AsFd, name: &OsStr) -> PathBuf {
    Path::new(&format!("/proc/self/fd/{}", dir.as_fd().as_raw_fd())).join(name)
}

fn is_gone(e: Errno) -> bool {
    // ENOTDIR, ELOOP: another kind of file has its name now.
    matches!(e, Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP | Errno::ESTALE)
}

impl Tree {
    pub fn open(index: u32, root: Root, seed: u64) -> Result<Self> {
        let open = |path: &Path| {
            // The root's own path may lead through links.
            let flags = directory_flags() - OFlag::O_NOFOLLOW;
            openat(AT_FDCWD, path, flags, Mode::empty()).map_err(|e| Error::io("open", path)(e.into()))
        };
        let dir = open(&root.path)?;
        let view = root.view.as_deref().map(open).transpose()?;
        let stat = fstat(&dir).map_err(|e| Error::io("read", &root.path)(e.into()))?;
        let mut tree = Self {
            index,
            root,
            dir,
            view,
            device: stat.st_dev,
            seed,
            nodes: HashMap::new(),
            by_inode: HashMap::new(),
            next: ROOT,
            touched: BTreeMap::new(),
            unlisted: BTreeSet::from([ROOT]),
            again: BTreeSet::new(),
            mapped: BTreeSet::new(),
            entries: BTreeMap::new(),
            loose: BTreeSet::new(),
            changed_meta: BTreeSet::new(),
            changed_content: BTreeSet::new(),
            forgotten: Vec::new(),
        };
        let id = tree.add(&stat, Vec::new());
        // The destination has made it.
        tree.nodes.get_mut(&id).expect("was added").told = true;
        Ok(tree)
    }

    // --- what happened ---

    /// Something was done to these entries, and to the directory itself; true: content may have been written to.
    pub fn touched(&mut self, dir: u64, names: BTreeMap<OsString, bool>) {
        self.touched.entry(dir).or_default();
        for (name, written) in names {
            self.touch(dir, name, if written { Why::Written } else { Why::Touched });
        }
    }

    fn touch(&mut self, dir: u64, name: OsString, why: Why) {
        let old = self.touched.entry(dir).or_default().entry(name).or_insert(why);
        *old = why.max(*old);
    }

    pub fn unwatched(&mut self, dir: u64) {
        self.unlisted.insert(dir);
    }

    /// A file below the root that is open for writing, or mapped.
    pub fn name_busy<'a>(&mut self, names: impl Iterator<Item = &'a OsStr>, mapped: bool) {
        let (mut entry, mut id) = (None, ROOT);
        for name in names {
            // Not in this root: an overlay's lower directory has it, or it was deleted.
            let Some(&next) = self.nodes.get(&id).and_then(|node| node.entries.get(name)) else { return };
            entry = Some((id, name));
            id = next;
        }
        let Some((dir, name)) = entry else { return };
        if mapped {
            self.mapped.insert(id);
        }
        self.touch(dir, name.to_owned(), Why::Open);
    }

    // --- finding out ---

    /// Reads the attributes of all that may have changed.
    pub fn look(&mut self, now: Now, watches: &mut Option<Watches>, round: &mut Round) -> Result<()> {
        let again = std::mem::take(&mut self.again);
        for id in again.union(&self.mapped.clone()) {
            for (dir, name) in self.nodes.get(id).map(|node| node.names.clone()).unwrap_or_default() {
                self.touch(dir, name, Why::Written);
            }
        }
        if now.all {
            self.unlisted.insert(ROOT);
        }
        // A directory that is not where it was is found when the one that it is in now has been looked at.
        let mut listed = BTreeSet::new();
        let mut lost = BTreeSet::new();
        loop {
            let mut found = false;
            for (dir, names) in std::mem::take(&mut self.touched) {
                let Some(fd) = self.open_dir(dir)? else {
                    self.touched.insert(dir, names);
                    continue;
                };
                found = true;
                for (name, why) in names {
                    self.look_at(dir, &fd, &name, why, now, round)?;
                }
                self.look_at_dir(dir, &fd, now)?;
            }
            while let Some(dir) = self.unlisted.pop_first() {
                if listed.contains(&dir) {
                    continue;
                }
                if self.list(dir, now, watches, round)? {
                    found = listed.insert(dir);
                } else {
                    lost.insert(dir);
                }
            }
            self.unlisted.append(&mut lost);
            if !found {
                break;
            }
        }
        self.sweep(watches);
        self.touched.retain(|dir, _| self.nodes.contains_key(dir));
        match self.touched.keys().chain(&self.unlisted).next() {
            Some(dir) if now.stage == Stage::Last => Err(Error::Changed { path: self.path(*dir) }),
            _ => Ok(()),
        }
    }

    /// Looks at every entry of a directory; false: it is not where it was.
    fn list(&mut self, dir: u64, now: Now, watches: &mut Option<Watches>, round: &mut Round) -> Result<bool> {
        let Some(fd) = self.open_dir(dir)? else { return Ok(false) };
        self.watch(dir, &fd, watches)?;
        let failed = |e| Error::io("list", self.path(dir))(e);
        let mut names: BTreeSet<OsString> = self.nodes[&dir].entries.keys().cloned().collect();
        for entry in fs::read_dir(place(&fd, OsStr::new("."))).map_err(failed)? {
            names.insert(entry.map_err(failed)?.file_name());
        }
        for name in names {
            let Some(id) = self.look_at(dir, &fd, &name, Why::Scan, now, round)? else { continue };
            if now.all && self.nodes[&id].is(libc::S_IFDIR) {
                self.unlisted.insert(id);
            }
        }
        self.look_at_dir(dir, &fd, now)?;
        Ok(true)
    }

    fn watch(&mut self, dir: u64, fd: &OwnedFd, watches: &mut Option<Watches>) -> Result<()> {
        if let Some(open) = watches {
            let failed = |source| Error::Watch { source };
            let mut is_watched = open.add((self.index, dir), fd).map_err(failed)?;
            if let Some(view) = &self.view
                && let Some(fd) = self.open_below(view, dir)?
            {
                is_watched &= open.add((self.index, dir), fd).map_err(failed)?;
            }
            if !is_watched {
                *watches = None;
            }
        }
        self.nodes.get_mut(&dir).expect("is known").listed = true;
        Ok(())
    }

    /// Notes what is at a name now; None: nothing.
    fn look_at(
        &mut self,
        dir: u64,
        fd: &OwnedFd,
        name: &OsStr,
        why: Why,
        now: Now,
        round: &mut Round,
    ) -> Result<Option<u64>> {
        round.looked += 1;
        let failed = |e: Errno| Error::io("read", self.path(dir).join(name))(e.into());
        let stat = match fstatat(fd, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(e) if is_gone(e) => {
                self.bind(dir, name, None);
                return Ok(None);
            }
            Err(e) => return Err(failed(e)),
        };
        if stat.st_dev != self.device {
            let (path, root) = (self.path(dir).join(name), self.root.path.clone());
            return Err(Error::OtherFileSystem { path, root });
        }
        let kind = stat.st_mode & libc::S_IFMT;
        let target = match kind {
            libc::S_IFLNK => match readlinkat(fd, name) {
                Ok(target) => target.into_vec(),
                // It was replaced a moment ago: there is a note of that.
                Err(e) if is_gone(e) || e == Errno::EINVAL => return Ok(None),
                Err(e) => return Err(failed(e)),
            },
            _ => Vec::new(),
        };
        let known = self.by_inode.get(&stat.st_ino).copied().filter(|id| {
            let file = &self.nodes[id].file;
            (file.kind, file.rdev, &file.target) == (kind, rdev(&stat), &target)
        });
        let id = known.unwrap_or_else(|| self.add(&stat, target));
        if !self.note(id, &place(fd, name), &stat, why, now)? {
            return Ok(None);
        }
        self.bind(dir, name, Some(id));
        let node = &self.nodes[&id];
        if node.is(libc::S_IFDIR) && !node.listed {
            self.unlisted.insert(id);
        }
        Ok(Some(id))
    }

    /// Notes a directory's own attributes.
    fn look_at_dir(&mut self, dir: u64, fd: &OwnedFd, now: Now) -> Result<()> {
        let stat = fstat(fd).map_err(|e| Error::io("read", self.path(dir))(e.into()))?;
        self.note(dir, &place(fd, OsStr::new(".")), &stat, Why::Touched, now)?;
        Ok(())
    }

    /// Notes the attributes of the file at `path`; false: it was removed a moment ago, of which there is a note.
    fn note(&mut self, id: u64, path: &Path, stat: &FileStat, why: Why, now: Now) -> Result<bool> {
        let signature = Signature::of(stat);
        let node = self.nodes.get_mut(&id).expect("is known");
        if node.is(libc::S_IFREG) {
            let is_same = match (why, node.read) {
                (Why::Written, _) | (_, None) => false,
                (Why::Touched, Some(read)) => (read.size, read.mtime) == (signature.size, signature.mtime),
                (Why::Scan | Why::Open, Some(read)) => read == signature,
            };
            if is_same {
                node.read = Some(signature);
            } else {
                self.changed_content.insert(id);
            }
        }
        if why == Why::Scan && node.seen == Some(signature) {
            return Ok(true);
        }
        let xattrs = match xattrs(path) {
            Ok(xattrs) => xattrs,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(source) => return Err(Error::Io { doing: "read", path: self.path(id), source }),
        };
        if xattrs.iter().map(|x| x.name.len() + x.value.len() + 16).sum::<usize>() > XATTR_LIMIT {
            return Err(Error::TooManyXattrs { path: self.path(id) });
        }
        let meta = Meta {
            id,
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            mtime: stat.st_mtime,
            mtime_nanos: stat.st_mtime_nsec as u32,
            xattrs,
        };
        let node = self.nodes.get_mut(&id).expect("is known");
        if !node.told || node.meta != meta {
            // An overlay that has copied the content of a file after its attributes says so in one of them.
            if node.is(libc::S_IFREG) && node.meta.xattrs != meta.xattrs {
                self.changed_content.insert(id);
            }
            node.meta = meta;
            self.changed_meta.insert(id);
        }
        node.seen = (!signature.is_since(now.since)).then_some(signature);
        Ok(true)
    }

    fn add(&mut self, stat: &FileStat, target: Vec<u8>) -> u64 {
        let id = self.next;
        self.next += 1;
        let node = Node {
            inode: stat.st_ino,
            file: Create { id, kind: stat.st_mode & libc::S_IFMT, rdev: rdev(stat), target },
            names: Vec::new(),
            entries: BTreeMap::new(),
            meta: Meta::default(),
            size: 0,
            blocks: BTreeMap::new(),
            seen: None,
            read: None,
            told: false,
            listed: false,
        };
        self.nodes.insert(id, node);
        self.by_inode.insert(stat.st_ino, id);
        // Should it find no name, it goes again.
        self.loose.insert(id);
        id
    }

    /// An entry is this file now, or there is none.
    fn bind(&mut self, dir: u64, name: &OsStr, to: Option<u64>) {
        let Some(parent) = self.nodes.get_mut(&dir) else { return };
        let old = match to {
            Some(id) => parent.entries.insert(name.to_owned(), id),
            None => parent.entries.remove(name),
        };
        if old == to {
            return;
        }
        self.entries.entry((dir, name.to_owned())).or_insert(old);
        if let Some(node) = old.and_then(|old| self.nodes.get_mut(&old)) {
            node.names.retain(|(d, n)| (*d, n.as_os_str()) != (dir, name));
            self.loose.insert(node.file.id);
        }
        let Some(node) = to.and_then(|to| self.nodes.get_mut(&to)) else { return };
        // A directory has one name: it was moved.
        let moved = if node.is(libc::S_IFDIR) { std::mem::take(&mut node.names) } else { Vec::new() };
        node.names.push((dir, name.to_owned()));
        for (dir, name) in moved {
            if let Some(parent) = self.nodes.get_mut(&dir) {
                let old = parent.entries.remove(&name);
                self.entries.entry((dir, name)).or_insert(old);
            }
        }
    }

    /// What has no name is gone, with all that is below it and has no other.
    fn sweep(&mut self, watches: &mut Option<Watches>) {
        let mut dirs = BTreeSet::new();
        let mut gone = Vec::new();
        while let Some(id) = self.loose.pop_first() {
            let Some(node) = self.nodes.get(&id).filter(|node| node.names.is_empty() && id != ROOT) else { continue };
            if node.is(libc::S_IFDIR) {
                dirs.insert(id);
            }
            gone.push(id);
            for name in node.entries.keys().cloned().collect::<Vec<_>>() {
                self.bind(id, &name, None);
            }
        }
        for id in gone {
            let Some(node) = self.nodes.remove(&id) else { continue };
            if self.by_inode.get(&node.inode) == Some(&id) {
                self.by_inode.remove(&node.inode);
            }
            self.unlisted.remove(&id);
            self.changed_meta.remove(&id);
            self.changed_content.remove(&id);
            self.mapped.remove(&id);
            if node.told {
                self.forgotten.push(id);
            }
        }
        if let Some(watches) = watches.as_mut().filter(|_| !dirs.is_empty()) {
            watches.remove(|(root, id)| root == self.index && dirs.contains(&id));
        }
    }

    // --- telling ---

    /// Sends all that was found.
    pub fn tell(&mut self, now: Now, out: &mut Out<'_>) -> Result<()> {
        let entries = std::mem::take(&mut self.entries);
        let changed: Vec<_> =
            entries.into_iter().map(|((dir, name), was)| (self.entry(dir, &name), dir, name, was)).collect();
        let changed = changed.iter().filter(|(is, _, _, was)| is != was);
        for (_, dir, name, was) in changed.clone() {
            if let Some(id) = *was {
                out.put(Op::Unlink(Unlink { dir: *dir, name: name.as_bytes().to_vec(), id }))?;
            }
        }
        let meta = std::mem::take(&mut self.changed_meta);
        let content = std::mem::take(&mut self.changed_content);
        for &id in meta.union(&content) {
            let node = self.nodes.get_mut(&id).expect("what is gone was taken out");
            if !std::mem::replace(&mut node.told, true) {
                out.put(Op::Create(node.file.clone()))?;
            }
            let written = content.contains(&id) && self.content(id, now, out)?;
            if written || meta.contains(&id) {
                out.put(Op::Meta(self.nodes[&id].meta.clone()))?;
            }
        }
        for (is, dir, name, _) in changed {
            if let Some(id) = *is {
                out.put(Op::Link(Link { dir: *dir, name: name.as_bytes().to_vec(), id }))?;
            }
        }
        for id in std::mem::take(&mut self.forgotten) {
            out.put(Op::Forget(Forget { id }))?;
        }
        Ok(())
    }

    /// Sends the blocks of a file that differ; true: there are some, or the size does.
    fn content(&mut self, id: u64, now: Now, out: &mut Out<'_>) -> Result<bool> {
        let Some((file, before)) = self.open_file(id)? else {
            self.again.insert(id);
            return match now.stage {
                Stage::Live => Ok(false),
                Stage::Last => Err(Error::Changed { path: self.path(id) }),
            };
        };
        let path = self.path(id);
        let failed = |e| Error::io("read", &path)(e);
        let node = self.nodes.get_mut(&id).expect("is known");
        let (size, mut written) = (before.size as u64, false);
        if node.size != size {
            node.size = size;
            node.blocks.split_off(&size.div_ceil(BLOCK));
            out.put(Op::Resize(Resize { id, size }))?;
            written = true;
        }
        let mut reader = Reader::new(&file, size);
        let mut send = |reader: &Reader, index: u64, has_data: bool, blocks: &mut BTreeMap<u64, Fingerprint>| {
            written = true;
            if !has_data {
                blocks.remove(&index);
                return out.put(Op::Block(Block { id, index, pieces: Vec::new() }));
            }
            blocks.insert(index, reader.fingerprint(self.seed));
            out.round.sent += reader.bytes().len() as u64;
            out.put(Op::Block(reader.message(id)))
        };
        if node.blocks.is_empty() {
            let mut next = 0;
            while let Some(index) = reader.read(next).map_err(failed)? {
                send(&reader, index, true, &mut node.blocks)?;
                next = index + 1;
            }
        } else {
            for index in differing(&file, size, &node.blocks, self.seed).map_err(failed)? {
                let has_data = reader.read_block(index).map_err(failed)?;
                send(&reader, index, has_data, &mut node.blocks)?;
            }
            out.round.compared += size;
        }
        let after = Signature::of(&fstat(&file).map_err(|e| failed(e.into()))?);
        let node = self.nodes.get_mut(&id).expect("is known");
        node.read = (before == after && !after.is_since(now.since)).then_some(after);
        if node.read.is_none() {
            self.again.insert(id);
        }
        // A change of the inode alone is nothing that the container can make now: another name for it elsewhere.
        if now.stage == Stage::Last && (before.size, before.mtime) != (after.size, after.mtime) {
            return Err(Error::Changed { path });
        }
        Ok(written)
    }

    // --- places ---

    fn entry(&self, dir: u64, name: &OsStr) -> Option<u64> {
        self.nodes.get(&dir)?.entries.get(name).copied()
    }

    /// Its names from the root on; None: it has lost its place.
    fn names(&self, mut id: u64) -> Option<Vec<&OsStr>> {
        let mut names = Vec::new();
        while id != ROOT {
            let (dir, name) = self.nodes.get(&id)?.names.first()?;
            names.push(name.as_os_str());
            id = *dir;
        }
        names.reverse();
        Some(names)
    }

    /// For people.
    fn path(&self, id: u64) -> PathBuf {
        let below: PathBuf = self.names(id).unwrap_or_default().into_iter().collect();
        // An empty path would add a slash.
        if below.as_os_str().is_empty() { self.root.path.clone() } else { self.root.path.join(below) }
    }

    /// Opens a directory (O_PATH) by its names, one by one, so that no link is followed and no path is too long.
    fn open_below(&self, base: &OwnedFd, id: u64) -> Result<Option<OwnedFd>> {
        let Some(names) = self.names(id) else { return Ok(None) };
        let mut fd = base.try_clone().map_err(Error::io("open", &self.root.path))?;
        for name in names {
            fd = match openat(&fd, name, directory_flags(), Mode::empty()) {
                Ok(fd) => fd,
                Err(e) if is_gone(e) => return Ok(None),
                Err(e) => return Err(Error::io("open", self.path(id))(e.into())),
            };
        }
        Ok(Some(fd))
    }

    /// None: it is not where it was; there is a note of that.
    fn open_dir(&self, id: u64) -> Result<Option<OwnedFd>> {
        let Some(fd) = self.open_below(&self.dir, id)? else { return Ok(None) };
        let stat = fstat(&fd).map_err(|e| Error::io("read", self.path(id))(e.into()))?;
        Ok((stat.st_ino == self.nodes[&id].inode && stat.st_dev == self.device).then_some(fd))
    }

    /// None: as with [`Tree::open_dir`].
    fn open_file(&self, id: u64) -> Result<Option<(File, Signature)>> {
        let node = &self.nodes[&id];
        let Some((dir, name)) = node.names.first() else { return Ok(None) };
        let Some(dir) = self.open_dir(*dir)? else { return Ok(None) };
        let failed = |e| Error::io("open", self.path(id))(e);
        // What has its name may be a device by now, which is not to be opened.
        let fd =
            match openat(&dir, name.as_os_str(), OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty()) {
                Ok(fd) => fd,
                Err(e) if is_gone(e) => return Ok(None),
                Err(e) => return Err(failed(e.into())),
            };
        let stat = fstat(&fd).map_err(|e| failed(e.into()))?;
        if (stat.st_ino, stat.st_dev, stat.st_mode & libc::S_IFMT) != (node.inode, self.device, libc::S_IFREG) {
            return Ok(None);
        }
        let file = reopen(&fd, (libc::O_RDONLY | libc::O_NOATIME) as u32).map_err(failed)?;
        Ok(Some((file.into(), Signature::of(&stat))))
    }
}

/// Of other files than devices it says nothing.
fn rdev(stat: &FileStat) -> u64 {
    match stat.st_mode & libc::S_IFMT {
        libc::S_IFCHR | libc::S_IFBLK => stat.st_rdev,
        _ => 0,
    }
}
