//! The side that the container comes to: makes of messages what they say, below directories of its own and nowhere else.
//!
//! What the source says is not trusted. It has no paths to give: each name is one component, directories are opened one by one
//! without following links, and a file that is written to is one that was made here.

use std::collections::{BTreeSet, HashMap};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, FallocateFlags, OFlag, RenameFlags, fallocate, openat, renameat2};
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, fstatat, mkdirat, mknodat, utimensat};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, LinkatFlags, Uid, UnlinkatFlags, fchownat, linkat, symlinkat, unlinkat};

use super::digest::Ledger;
use super::message::{BLOCK, Block, Create, End, Link, Message, Meta, Op, ROOT, Resize, Unlink};
use super::{Error, Result, Root, xattrs};

mod merged;

/// A label that the security module of this host gives to every file; it is kept where the source has none.
const LABEL: &[u8] = b"security.selinux";

/// What the source told of, or will be told of not having told.
pub struct Target {
    trees: Vec<Tree>,
    ledger: Ledger,
    /// The last round is complete.
    finished: bool,
    committed: bool,
}

/// A file that was made.
struct Node {
    kind: u32,
    /// An overlay's, for a name that a lower directory has.
    is_whiteout: bool,
    /// Directory and name. Without one it is in the limbo, its number is its name.
    names: Vec<(u64, OsString)>,
    meta: Option<Meta>,
    /// Of a directory.
    entries: HashMap<OsString, u64>,
}

struct Tree {
    index: u32,
    path: PathBuf,
    /// The directory itself is ours.
    made: bool,
    dir: OwnedFd,
    /// What `dir` is now: an [overlay](merged) that was mounted on it.
    is_merged: bool,
    /// A directory in it for files without names.
    limbo: OwnedFd,
    limbo_name: OsString,
    nodes: HashMap<u64, Node>,
    /// Whose attributes are to be set, or looked at, at the end of the round.
    touched: BTreeSet<u64>,
    /// The file that was written to last.
    open: Option<(u64, File)>,
}

fn hostile(what: impl std::fmt::Display) -> Error {
    Error::Hostile { what: what.to_string() }
}

fn directory_flags() -> OFlag {
    OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC
}

impl Target {
    /// As [`create`](Self::create), for directories that may have something in them: that goes.
    pub fn replace(roots: Vec<Root>) -> Result<Self> {
        for root in &roots {
            let failed = |e| Error::io("empty", &root.path)(e);
            for entry in fs::read_dir(&root.path).map_err(failed)? {
                let entry = entry.map_err(failed)?;
                let is_dir = entry.file_type().map_err(failed)?.is_dir();
                let path = entry.path();
                if is_dir { fs::remove_dir_all(path) } else { fs::remove_file(path) }.map_err(failed)?;
            }
        }
        Self::create(roots)
    }

    /// Each root's directory must be empty, or not there yet (its parent is).
    pub fn create(roots: Vec<Root>) -> Result<Self> {
        let mut target = Self { trees: Vec::new(), ledger: Ledger::default(), finished: false, committed: false };
        for (index, root) in (0..).zip(roots) {
            target.trees.push(Tree::create(index, root.path)?);
        }
        Ok(target)
    }

    /// Does what a message says. After an error there is no going on.
    pub fn apply(&mut self, message: Message) -> Result<()> {
        if self.finished {
            return Err(hostile("a message after the last"));
        }
        let op = message.op.ok_or_else(|| hostile("nothing"))?;
        if let Op::End(end) = op {
            return self.end(&end);
        }
        let tree = self.trees.get_mut(message.root as usize).ok_or_else(|| hostile("no such root"))?;
        match &op {
            Op::Create(create) => tree.create_file(create)?,
            Op::Resize(resize) => tree.resize(resize)?,
            Op::Block(block) => tree.block(block, &self.ledger)?,
            Op::Meta(meta) => tree.meta(meta)?,
            Op::Unlink(unlink) => tree.unlink(unlink)?,
            Op::Link(link) => tree.link(link)?,
            Op::Forget(forget) => tree.forget(forget.id)?,
            Op::End(_) => {}
        }
        self.ledger.apply(message.root, &op);
        Ok(())
    }

    fn end(&mut self, end: &End) -> Result<()> {
        for tree in &mut self.trees {
            tree.settle()?;
            if end.last && tree.nodes.iter().any(|(id, node)| *id != ROOT && node.names.is_empty()) {
                return Err(hostile("files that have no names"));
            }
        }
        let ours = self.ledger.digest();
        if ours[..] != end.digest[..] {
            let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect();
            return Err(Error::Digest { ours: hex(&ours), theirs: hex(&end.digest) });
        }
        self.finished = end.last;
        Ok(())
    }

    /// The directory of root `index` is now the upper one of an overlay that is mounted at `at`: what comes from now on is
    /// done there.
    pub fn mounted(&mut self, index: usize, at: &Path) -> Result<()> {
        self.trees.get_mut(index).map_or(Ok(()), |tree| tree.mounted(at))
    }

    /// After the last round: everything is in place, and is what the source has.
    pub fn finish(&mut self) -> Result<()> {
        if !self.finished {
            return Err(hostile("the last round is not complete"));
        }
        for tree in &mut self.trees {
            tree.remove_limbo()?;
        }
        Ok(())
    }

    /// It stays; without this it is removed when this value is dropped.
    pub fn commit(mut self) -> Kept {
        self.committed = true;
        Kept(self.trees.iter().map(|tree| tree.path.clone()).collect())
    }
}

/// What stays.
#[derive(Debug)]
pub struct Kept(Vec<PathBuf>);

impl Kept {
    /// Asks the disks to have it all; takes as long as they do.
    pub fn sync(&self) -> Result<()> {
        for path in &self.0 {
            let failed = Error::io("write", path);
            File::open(path).and_then(|dir| Ok(nix::unistd::syncfs(dir)?)).map_err(failed)?;
        }
        Ok(())
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if !self.committed {
            for tree in &self.trees {
                tree.remove();
            }
        }
    }
}

/// What a name in an open directory is for calls that take a path.
fn place(dir: impl AsFd, name: &OsStr) -> PathBuf {
    Path::new(&format!("/proc/self/fd/{}", dir.as_fd().as_raw_fd())).join(name)
}

impl Tree {
    fn create(index: u32, path: PathBuf) -> Result<Self> {
        let made = match fs::create_dir(&path) {
            Ok(()) => true,
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => false,
            Err(e) => return Err(Error::io("create", path)(e)),
        };
        let failed = |e: Errno| Error::io("open", &path)(e.into());
        let dir = openat(AT_FDCWD, &path, directory_flags() - OFlag::O_NOFOLLOW, Mode::empty()).map_err(failed)?;
        if fs::read_dir(&path).map_err(Error::io("read", &path))?.next().is_some() {
            return Err(Error::NotEmpty { path });
        }
        let mut random = [0; 8];
        File::open("/dev/urandom")
            .and_then(|mut file| io::Read::read_exact(&mut file, &mut random))
            .map_err(Error::io("read", "/dev/urandom"))?;
        let limbo_name = OsString::from(format!(".lmrun-{:016x}", u64::from_ne_bytes(random)));
        let limbo = mkdirat(&dir, limbo_name.as_os_str(), Mode::S_IRWXU)
            .and_then(|()| openat(&dir, limbo_name.as_os_str(), directory_flags(), Mode::empty()))
            .map_err(failed)?;
        let root =
            Node { kind: libc::S_IFDIR, is_whiteout: false, names: Vec::new(), meta: None, entries: HashMap::new() };
        let nodes = HashMap::from([(ROOT, root)]);
        let touched = BTreeSet::from([ROOT]);
        Ok(Self { index, path, made, dir, is_merged: false, limbo, limbo_name, nodes, touched, open: None })
    }

    fn node(&self, id: u64) -> Result<&Node> {
        self.nodes.get(&id).ok_or_else(|| hostile(format_args!("no file {id}")))
    }

    fn of_kind(&self, id: u64, kind: u32) -> Result<()> {
        if self.node(id)?.kind == kind { Ok(()) } else { Err(hostile(format_args!("file {id} is of another kind"))) }
    }

    // --- places ---

    /// Where a file is: a directory's descriptor and a name in there.
    fn find(&self, id: u64) -> Result<(OwnedFd, OsString)> {
        if id == ROOT {
            return Ok((self.cloned(&self.dir)?, OsString::from(".")));
        }
        match self.node(id)?.names.first() {
            Some((dir, name)) => Ok((self.open_dir(*dir)?, name.clone())),
            None => Ok((self.cloned(&self.limbo)?, OsString::from(id.to_string()))),
        }
    }

    fn cloned(&self, fd: &OwnedFd) -> Result<OwnedFd> {
        fd.try_clone().map_err(Error::io("open", &self.path))
    }

    /// Opens a directory (O_PATH) by its names, one by one: nothing is followed, and no path is too long.
    fn open_dir(&self, id: u64) -> Result<OwnedFd> {
        self.of_kind(id, libc::S_IFDIR)?;
        let mut names = Vec::new();
        let mut at = id;
        let mut fd = loop {
            if at == ROOT {
                break self.cloned(&self.dir)?;
            }
            match self.node(at)?.names.first() {
                Some((dir, name)) => {
                    names.push(name.clone());
                    at = *dir;
                }
                None => {
                    names.push(OsString::from(at.to_string()));
                    break self.cloned(&self.limbo)?;
                }
            }
        };
        for name in names.iter().rev() {
            fd = openat(&fd, name.as_os_str(), directory_flags(), Mode::empty())
                .map_err(|e| self.failed("open", id)(e.into()))?;
        }
        Ok(fd)
    }

    /// For people.
    fn place_of(&self, mut id: u64) -> PathBuf {
        let mut names = Vec::new();
        while let Some((dir, name)) = self.nodes.get(&id).and_then(|node| node.names.first()) {
            names.push(name);
            id = *dir;
        }
        names.iter().rev().fold(self.path.clone(), |path, name| path.join(name))
    }

    /// For `map_err`.
    fn failed(&self, doing: &'static str, id: u64) -> impl FnOnce(io::Error) -> Error {
        Error::io(doing, self.place_of(id))
    }

    // --- messages ---

    fn create_file(&mut self, file: &Create) -> Result<()> {
        if self.nodes.contains_key(&file.id) {
            return Err(hostile(format_args!("file {} twice", file.id)));
        }
        let is_whiteout = file.kind == libc::S_IFCHR && file.rdev == 0;
        let node = Node { kind: file.kind, is_whiteout, names: Vec::new(), meta: None, entries: HashMap::new() };
        if self.is_merged && is_whiteout {
            self.nodes.insert(file.id, node);
            return Ok(());
        }
        let name = file.id.to_string();
        let (limbo, name) = (&self.limbo, name.as_str());
        let private = Mode::S_IRUSR | Mode::S_IWUSR;
        let made = match file.kind {
            libc::S_IFREG => {
                let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_RDWR | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                openat(limbo, name, flags, private).map(|fd| self.open = Some((file.id, fd.into())))
            }
            libc::S_IFDIR => mkdirat(limbo, name, Mode::S_IRWXU),
            libc::S_IFLNK => symlinkat(OsStr::from_bytes(&file.target), limbo, name),
            kind => mknodat(limbo, name, SFlag::from_bits_truncate(kind), private, file.rdev),
        };
        made.map_err(|e| Error::io("create a file in", &self.path)(e.into()))?;
        self.nodes.insert(file.id, node);
        self.touched.insert(file.id);
        Ok(())
    }

    /// A regular file, to write to.
    fn file(&mut self, id: u64) -> Result<&File> {
        if self.open.as_ref().is_none_or(|(open, _)| *open != id) {
            self.of_kind(id, libc::S_IFREG)?;
            let (dir, name) = self.find(id)?;
            let flags = OFlag::O_RDWR | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let fd =
                openat(&dir, name.as_os_str(), flags, Mode::empty()).map_err(|e| self.failed("open", id)(e.into()))?;
            self.open = Some((id, fd.into()));
        }
        self.touched.insert(id);
        Ok(&self.open.as_ref().expect("was opened").1)
    }

    fn resize(&mut self, to: &Resize) -> Result<()> {
        let made = self.file(to.id)?.set_len(to.size);
        made.map_err(self.failed("write", to.id))?;
        Ok(())
    }

    fn block(&mut self, block: &Block, ledger: &Ledger) -> Result<()> {
        let file = (self.index, block.id);
        let start = block.index * BLOCK;
        let size = ledger.size(file);
        if start >= size {
            return Err(hostile(format_args!("a block behind the end of file {}", block.id)));
        }
        let len = BLOCK.min(size - start) as usize;
        if block.end() > len {
            return Err(hostile(format_args!("a block that goes further than file {}", block.id)));
        }
        let had_data = ledger.has_block(file, block.index);
        let open = self.file(block.id)?;
        let made = (|| {
            let mut hole = 0;
            let mut write = |at: usize, bytes: &[u8]| {
                if had_data && hole < at {
                    // Behind the end, too: of a page that is punched in part, the rest would stay.
                    let end = if at == len { BLOCK } else { at as u64 };
                    make_hole(open, start + hole as u64, end - hole as u64, at - hole)?;
                }
                hole = at + bytes.len();
                open.write_all_at(bytes, start + at as u64)
            };
            for piece in &block.pieces {
                write(piece.offset as usize, &piece.bytes)?;
            }
            write(len, &[])
        })();
        made.map_err(self.failed("write", block.id))?;
        Ok(())
    }

    fn meta(&mut self, meta: &Meta) -> Result<()> {
        self.node(meta.id)?;
        self.touched.insert(meta.id);
        self.nodes.get_mut(&meta.id).expect("is known").meta = Some(meta.clone());
        Ok(())
    }

    fn unlink(&mut self, entry: &Unlink) -> Result<()> {
        let dir = self.open_dir(entry.dir)?;
        let node = self.nodes.get_mut(&entry.dir).expect("was opened");
        let id = entry.id;
        if node.entries.get(entry.name()) != Some(&id) {
            return Err(hostile(format_args!("a name that file {id} does not have")));
        }
        node.entries.remove(entry.name());
        let node = self.nodes.get_mut(&id).expect("has a name");
        node.names.retain(|(d, n)| (*d, n.as_os_str()) != (entry.dir, entry.name()));
        let (kind, is_loose) = (node.kind, node.names.is_empty());
        let done = if self.is_merged && node.is_whiteout {
            Ok(())
        } else if is_loose {
            renameat2(&dir, entry.name(), &self.limbo, id.to_string().as_str(), RenameFlags::RENAME_NOREPLACE)
        } else {
            unlinkat(&dir, entry.name(), UnlinkatFlags::NoRemoveDir)
        };
        let done = match done {
            Err(Errno::EXDEV) if self.is_merged && kind == libc::S_IFDIR => self.evacuate(&dir, entry.name(), id),
            done => done.map_err(io::Error::from),
        };
        done.map_err(self.failed("remove a file from", entry.dir))?;
        self.touched.insert(entry.dir);
        Ok(())
    }

    fn link(&mut self, entry: &Link) -> Result<()> {
        let (id, name) = (entry.id, entry.name());
        let node = self.node(id)?;
        if id == ROOT || name == self.limbo_name {
            return Err(hostile("a name that is ours"));
        }
        let is_new = node.names.is_empty();
        if node.kind == libc::S_IFDIR && !is_new {
            return Err(hostile(format_args!("a second name for directory {id}")));
        }
        let to = self.open_dir(entry.dir)?;
        let has = self.is_merged && self.make_way(&to, entry)?;
        let (from, old) = self.find(id)?;
        let done = if has {
            Ok(())
        } else if is_new {
            // Of a directory into itself: the kernel refuses.
            renameat2(&from, old.as_os_str(), &to, name, RenameFlags::RENAME_NOREPLACE)
        } else {
            linkat(&from, old.as_os_str(), &to, name, LinkatFlags::empty())
        };
        done.map_err(|e| self.failed("create a file in", entry.dir)(e.into()))?;
        self.nodes.get_mut(&entry.dir).expect("was opened").entries.insert(name.to_owned(), id);
        self.nodes.get_mut(&id).expect("is known").names.push((entry.dir, name.to_owned()));
        self.touched.insert(entry.dir);
        Ok(())
    }

    fn forget(&mut self, id: u64) -> Result<()> {
        let node = self.node(id)?;
        if id == ROOT || !node.names.is_empty() || !node.entries.is_empty() {
            return Err(hostile(format_args!("the end of file {id}, which is in use")));
        }
        let flag = if node.kind == libc::S_IFDIR { UnlinkatFlags::RemoveDir } else { UnlinkatFlags::NoRemoveDir };
        if !(self.is_merged && node.is_whiteout) {
            unlinkat(&self.limbo, id.to_string().as_str(), flag).map_err(|e| self.failed("remove", id)(e.into()))?;
        }
        self.nodes.remove(&id);
        self.touched.remove(&id);
        self.open.take_if(|(open, _)| *open == id);
        Ok(())
    }

    // --- ends ---

    /// Sets the attributes of all that was touched, which the touching has changed, and looks whether they were kept.
    fn settle(&mut self) -> Result<()> {
        self.open = None;
        let mut touched = std::mem::take(&mut self.touched);
        // The limbo comes and goes in it.
        touched.insert(ROOT);
        for id in touched {
            let node = self.node(id)?;
            let Some(meta) = &node.meta else {
                return Err(hostile(format_args!("file {id} without attributes")));
            };
            if self.is_merged && node.is_whiteout {
                continue;
            }
            let meta = &if self.is_merged { merged::seen(meta) } else { meta.clone() };
            let (dir, name) = self.find(id)?;
            let kind = node.kind;
            set(&dir, &name, kind, meta).map_err(self.failed("set the attributes of", id))?;
            let kept = kept(&dir, &name, kind, meta).map_err(self.failed("read", id))?;
            if let Some(what) = kept {
                return Err(Error::NotKept { path: self.place_of(id), what });
            }
        }
        Ok(())
    }

    fn remove_limbo(&mut self) -> Result<()> {
        match unlinkat(&self.dir, self.limbo_name.as_os_str(), UnlinkatFlags::RemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => self.settle(),
            Err(e) => Err(self.failed("remove what was temporary in", ROOT)(e.into())),
        }
    }

    /// Removes all that was made; whoever drops has no use for an error. What is mounted is its owner's.
    fn remove(&self) {
        if self.is_merged {
            return;
        }
        for entry in fs::read_dir(&self.path).into_iter().flatten().flatten() {
            let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
            let _ = if is_dir { fs::remove_dir_all(entry.path()) } else { fs::remove_file(entry.path()) };
        }
        if self.made {
            let _ = fs::remove_dir(&self.path);
        }
    }
}

/// A hole, or `zeros` bytes of zeros where the file system has none.
fn make_hole(file: &File, at: u64, len: u64, zeros: usize) -> io::Result<()> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    match fallocate(file, flags, at as i64, len as i64) {
        Err(Errno::EOPNOTSUPP) => file.write_all_at(&vec![0; zeros], at),
        done => Ok(done?),
    }
}

fn set(dir: &OwnedFd, name: &OsStr, kind: u32, meta: &Meta) -> io::Result<()> {
    let path = place(dir, name);
    let owner = (Some(Uid::from_raw(meta.uid)), Some(Gid::from_raw(meta.gid)));
    // First, as it clears set-user-id and file capabilities.
    fchownat(dir, name, owner.0, owner.1, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    if kind != libc::S_IFLNK {
        fs::set_permissions(&path, Permissions::from_mode(meta.mode))?;
    }
    let there = xattrs(&path)?;
    for old in &there {
        if old.name != LABEL && !meta.xattrs.iter().any(|new| new.name == old.name) {
            xattr::remove(&path, OsStr::from_bytes(&old.name))?;
        }
    }
    for new in meta.xattrs.iter().filter(|new| !there.contains(new)) {
        let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", new.name.escape_ascii()));
        xattr::set(&path, OsStr::from_bytes(&new.name), &new.value).map_err(named)?;
    }
    let time = TimeSpec::new(meta.mtime, meta.mtime_nanos.into());
    Ok(utimensat(dir, name, &time, &time, UtimensatFlags::NoFollowSymlink)?)
}

/// What is not as it was set, if anything.
fn kept(dir: &OwnedFd, name: &OsStr, kind: u32, meta: &Meta) -> io::Result<Option<&'static str>> {
    let stat = fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    let mut xattrs = xattrs(&place(dir, name))?;
    if !meta.xattrs.iter().any(|x| x.name == LABEL) {
        xattrs.retain(|x| x.name != LABEL);
    }
    let is = [
        (stat.st_mode & libc::S_IFMT == kind, "its kind"),
        (kind == libc::S_IFLNK || stat.st_mode & 0o7777 == meta.mode, "its mode"),
        ((stat.st_uid, stat.st_gid) == (meta.uid, meta.gid), "its owner"),
        ((stat.st_mtime, stat.st_mtime_nsec) == (meta.mtime, i64::from(meta.mtime_nanos)), "its time"),
        (xattrs == meta.xattrs, "its extended attributes"),
    ];
    Ok(is.into_iter().find(|(kept, _)| !kept).map(|(_, what)| what))
}
