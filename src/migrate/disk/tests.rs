//! Source and destination together, on real file systems. As root.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, FallocateFlags, fallocate};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, mknod, utimensat};
use nix::sys::time::TimeSpec;

use super::message::{Block, Create, End, Forget, Link, Message, Meta, Op, Piece, Resize, Unlink};
use super::*;
use crate::sys::file::next_data;
use crate::sys::window::Window;

/// A directory for one test, removed when dropped.
pub(super) struct Scratch(PathBuf);

impl Scratch {
    pub(super) fn new() -> Self {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("lmrun-disk-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        // Not /tmp, which may be a tmpfs without extended attributes.
        let path = Path::new("/var/tmp").join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub(super) fn dir(&self, name: &str) -> PathBuf {
        let path = self.0.join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        for name in ["merged", "there"] {
            let _ = umount2(&self.0.join(name), MntFlags::MNT_DETACH);
        }
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Everything that is to be kept of a file, as text.
type Facts = BTreeMap<PathBuf, String>;

fn facts(root: &Path) -> Facts {
    let mut all = Facts::new();
    let mut inodes = BTreeMap::new();
    let mut todo = vec![root.to_owned()];
    while let Some(path) = todo.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        let below = path.strip_prefix(root).unwrap().to_owned();
        let mut fact = format!(
            "{:o} {}:{} {}.{:09} {:x}",
            meta.mode(),
            meta.uid(),
            meta.gid(),
            meta.mtime(),
            meta.mtime_nsec(),
            meta.rdev()
        );
        let names: std::collections::BTreeSet<_> = xattr::list(&path).unwrap().collect();
        for name in names {
            fact += &format!(" {name:?}={:?}", xattr::get(&path, &name).unwrap());
        }
        if meta.is_dir() {
            let mut names: Vec<_> = fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()).collect();
            names.retain(|path| !path.file_name().unwrap().as_encoded_bytes().starts_with(b".lmrun-"));
            names.sort();
            todo.extend(names.into_iter().rev());
        } else {
            let first = inodes.entry(meta.ino()).or_insert_with(|| below.clone());
            fact += &format!(" first {first:?}");
        }
        if meta.is_symlink() {
            fact += &format!(" -> {:?}", fs::read_link(&path).unwrap());
        }
        if meta.is_file() {
            fact += &format!(" {} bytes {:?}", meta.len(), content(&path));
        }
        all.insert(below, fact);
    }
    all
}

/// Where there is data, and a digest of it.
fn content(path: &Path) -> Vec<(u64, u64, blake3::Hash)> {
    let file = File::open(path).unwrap();
    let size = file.metadata().unwrap().len();
    let mut all = Vec::new();
    let mut at = 0;
    while let Some((start, end)) = next_data(&file, at).unwrap() {
        let mut bytes = vec![0; (end.min(size) - start) as usize];
        file.read_exact_at(&mut bytes, start).unwrap();
        all.push((start, end, blake3::hash(&bytes)));
        at = end;
    }
    all
}

/// The first difference is what one wants to see.
fn assert_same(source: &Path, target: &Path, when: &str) {
    // Allocation that is put off would show as data where there will be none, or the other way round.
    for path in [source, target] {
        nix::unistd::syncfs(File::open(path).unwrap()).unwrap();
    }
    let (a, b) = (facts(source), facts(target));
    for path in a.keys().chain(b.keys()) {
        assert_eq!(a.get(path), b.get(path), "{path:?}, {when}");
    }
}

fn root(path: &Path) -> Root {
    Root { name: "root".into(), path: path.to_owned(), view: None, inside: "/".into() }
}

/// A source and a destination with what lies between them.
struct Pair {
    source: Source,
    target: Target,
}

impl Pair {
    fn new(source: Vec<Root>, target: Vec<Root>) -> Self {
        Self { source: Source::open(source).unwrap(), target: Target::create(target).unwrap() }
    }

    fn round(&mut self, stage: Stage, busy: &[Busy]) -> Round {
        let target = &mut self.target;
        let mut emit = |message: Message| {
            let bytes = prost::Message::encode_to_vec(&message);
            assert!(bytes.len() <= LIMIT);
            target.apply(Message::parse(&bytes).unwrap()).map_err(io::Error::other)
        };
        self.source.round(stage, busy, &mut emit).unwrap_or_else(|e| panic!("{e}: {:?}", std::error::Error::source(&e)))
    }

    fn finish(mut self) {
        self.target.finish().unwrap();
        self.target.commit();
    }
}

fn node(path: &Path, kind: SFlag, device: u64) {
    mknod(path, kind, Mode::from_bits_truncate(0o640), device).unwrap();
}

fn set_time(path: &Path, seconds: i64, nanos: i64) {
    let at = TimeSpec::new(seconds, nanos);
    utimensat(AT_FDCWD, path, &at, &at, UtimensatFlags::NoFollowSymlink).unwrap();
}

/// user::rw-, user:1000:r--, group::r--, mask::r--, other::---
const ACL: &[u8] = &[
    2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 4, 0, 0xe8, 3, 0, 0, 4, 0, 4, 0, 255, 255, 255, 255, 16, 0, 4, 0,
    255, 255, 255, 255, 32, 0, 0, 0, 255, 255, 255, 255,
];

/// cap_net_raw=ep
const CAPABILITY: &[u8] = &[1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// One of each.
fn fill(dir: &Path) {
    fs::write(dir.join("plain"), "hello").unwrap();
    fs::write(dir.join("empty"), "").unwrap();
    fs::create_dir_all(dir.join("a/b/c")).unwrap();
    fs::write(dir.join("a/b/large"), vec![7; 700_001]).unwrap();
    fs::hard_link(dir.join("a/b/large"), dir.join("second")).unwrap();
    fs::hard_link(dir.join("a/b/large"), dir.join("a/b/c/third")).unwrap();
    symlink("/etc/passwd", dir.join("link")).unwrap();
    lchown(dir.join("link"), Some(5), Some(6)).unwrap();
    set_time(&dir.join("link"), 7, 8);
    node(&dir.join("fifo"), SFlag::S_IFIFO, 0);
    node(&dir.join("socket"), SFlag::S_IFSOCK, 0);
    node(&dir.join("null"), SFlag::S_IFCHR, libc::makedev(1, 3));
    node(&dir.join("disk"), SFlag::S_IFBLK, libc::makedev(259, 70_000));
    node(&dir.join("whiteout"), SFlag::S_IFCHR, 0);
    let sparse = File::create(dir.join("sparse")).unwrap();
    sparse.set_len(10 << 20).unwrap();
    sparse.write_all_at(&[1; 4096], 1 << 20).unwrap();
    sparse.write_all_at(&[2; 5000], (1 << 20) + 65_536).unwrap();
    sparse.write_all_at(&[0; 4096], 5 << 20).unwrap();
    File::create(dir.join("hole")).unwrap().set_len(1 << 40).unwrap();
    fs::write(dir.join("setuid"), "x").unwrap();
    lchown(dir.join("setuid"), Some(1000), Some(1001)).unwrap();
    xattr::set(dir.join("setuid"), "security.capability", CAPABILITY).unwrap();
    fs::set_permissions(dir.join("setuid"), Permissions::from_mode(0o6711)).unwrap();
    xattr::set(dir.join("plain"), "system.posix_acl_access", ACL).unwrap();
    xattr::set(dir.join("plain"), "user.empty", b"").unwrap();
    xattr::set(dir.join("a"), "trusted.overlay.opaque", b"y").unwrap();
    xattr::set(dir.join("a/b"), "system.posix_acl_default", ACL).unwrap();
    xattr::set(dir.join("whiteout"), "trusted.x", b"\0\xff").unwrap();
    fs::set_permissions(dir.join("a/b"), Permissions::from_mode(0o2000)).unwrap();
    set_time(&dir.join("a/b"), 1_000_000_000, 123_456_789);
    set_time(dir, -5, 1);
    fs::write(dir.join(OsStr::new("name \u{fc}\n\\")), "odd").unwrap();
    set_time(dir, -5, 1);
}

#[test]
fn everything_is_kept() {
    let scratch = Scratch::new();
    let (from, to) = (scratch.dir("from"), scratch.0.join("to"));
    fill(&from);
    let mut pair = Pair::new(vec![root(&from)], vec![root(&to)]);
    let first = pair.round(Stage::Live, &[]);
    assert!(first.scanned && first.sent > 700_000 && first.sent < 2_000_000, "{first:?}");
    let second = pair.round(Stage::Last, &[]);
    assert_eq!((second.sent, second.scanned), (0, false), "{second:?}");
    pair.finish();
    assert_same(&from, &to, "");
}

#[test]
fn what_is_done_between_rounds_follows() {
    let scratch = Scratch::new();
    let (from, to) = (scratch.dir("from"), scratch.dir("to"));
    fill(&from);
    let mut pair = Pair::new(vec![root(&from)], vec![root(&to)]);
    pair.round(Stage::Live, &[]);
    // Names that change places, also of directories; a directory that goes below another; a file of another kind.
    fs::rename(from.join("plain"), from.join("x")).unwrap();
    fs::rename(from.join("setuid"), from.join("plain")).unwrap();
    fs::rename(from.join("x"), from.join("setuid")).unwrap();
    fs::create_dir(from.join("new")).unwrap();
    fs::rename(from.join("a/b"), from.join("new/b")).unwrap();
    fs::rename(from.join("a"), from.join("new/b/a")).unwrap();
    fs::write(from.join("new/b/a/in"), "new").unwrap();
    fs::remove_file(from.join("fifo")).unwrap();
    fs::create_dir(from.join("fifo")).unwrap();
    fs::remove_file(from.join("link")).unwrap();
    symlink("elsewhere", from.join("link")).unwrap();
    fs::remove_file(from.join("second")).unwrap();
    fs::hard_link(from.join("empty"), from.join("second")).unwrap();
    xattr::remove(from.join("whiteout"), "trusted.x").unwrap();
    let round = pair.round(Stage::Live, &[]);
    assert!(!round.scanned && round.sent < 1000, "{round:?}");
    fs::remove_dir_all(from.join("new")).unwrap();
    OpenOptions::new().append(true).open(from.join("empty")).unwrap().write_all(b"no more").unwrap();
    File::options().write(true).open(from.join("sparse")).unwrap().set_len(1 << 20).unwrap();
    pair.round(Stage::Last, &[]);
    pair.finish();
    assert_same(&from, &to, "");
}

#[test]
fn of_a_large_file_only_blocks_that_differ_are_sent() {
    let scratch = Scratch::new();
    let (from, to) = (scratch.dir("from"), scratch.dir("to"));
    let path = from.join("database");
    let content: Vec<u8> = (0..40_u32 << 18).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    fs::write(&path, &content).unwrap();
    let mut pair = Pair::new(vec![root(&from)], vec![root(&to)]);
    assert_eq!(pair.round(Stage::Live, &[]).sent, content.len() as u64);
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    for at in [0, 12_345_678, 33 << 20] {
        file.write_all_at(b"changed", at).unwrap();
    }
    fallocate(&file, FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE, 20 << 20, 1 << 20)
        .unwrap();
    let round = pair.round(Stage::Live, &[]);
    assert_eq!((round.sent, round.compared), (3 * message::BLOCK, content.len() as u64));
    file.set_len(content.len() as u64 + 5).unwrap();
    file.write_all_at(b"end", content.len() as u64 + 2).unwrap();
    assert_eq!(pair.round(Stage::Last, &[]).sent, 5);
    pair.finish();
    assert_same(&from, &to, "");
}

/// A mapping changes a file and nobody is told.
#[test]
fn mapped_files_are_compared_when_they_are_named() {
    let scratch = Scratch::new();
    let (from, to) = (scratch.dir("from"), scratch.dir("to"));
    fs::create_dir(from.join("var")).unwrap();
    let path = from.join("var/mapped");
    fs::write(&path, vec![1; 1 << 20]).unwrap();
    let mut pair = Pair::new(vec![root(&from)], vec![root(&to)]);
    let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let mapping = Window::map_writable(&file, 1 << 20);
    pair.round(Stage::Live, &[]);
    let busy = [Busy { path: "/var/mapped".into(), mapped: true }];
    for n in 0..3 {
        mapping.store(n * 300_000, 9);
        assert_eq!(pair.round(Stage::Live, &busy).sent, message::BLOCK);
    }
    // It was mapped once, and may have been until just now.
    mapping.store(1_000_000, 9);
    drop(mapping);
    assert_eq!(pair.round(Stage::Last, &[]).sent, message::BLOCK);
    pair.finish();
    assert_same(&from, &to, "");
}

/// A file that is only open may be written to without a word (io_submit(2)); its times tell.
#[test]
fn open_files_are_looked_at_when_they_are_named() {
    let scratch = Scratch::new();
    let (from, volume) = (scratch.dir("from"), scratch.dir("volume"));
    fs::create_dir(from.join("data")).unwrap();
    fs::write(from.join("data/file"), "hidden by the volume").unwrap();
    fs::create_dir(volume.join("db")).unwrap();
    let path = volume.join("db/file");
    fs::write(&path, vec![1; 1 << 20]).unwrap();
    set_time(&path, 5, 5);
    let volume_at = |path| Root { inside: "/data".into(), ..root(path) };
    let (to, to_volume) = (scratch.0.join("to"), scratch.0.join("to_volume"));
    let mut pair = Pair::new(vec![root(&from), volume_at(&volume)], vec![root(&to), volume_at(&to_volume)]);
    let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    let mapping = Window::map_writable(&file, 1 << 20);
    // Until what was written last is old enough for its time to be believed.
    std::thread::sleep(std::time::Duration::from_millis(1100));
    pair.round(Stage::Live, &[]);
    mapping.store(700_000, 2);
    let busy = |path: &str| [Busy { path: path.into(), mapped: false }];
    for other in ["/data/db/none", "/data/db", "/data", "/", "/elsewhere", "/../data/db/../../x"] {
        assert_eq!(pair.round(Stage::Live, &busy(other)).sent, 0, "{other}");
    }
    assert_eq!(pair.round(Stage::Last, &busy("/data/db/file")).sent, message::BLOCK);
    pair.finish();
    assert_same(&from, &to, "");
    assert_same(&volume, &to_volume, "");
}

/// More happens than the kernel keeps notes of.
#[test]
fn what_was_missed_is_found() {
    let scratch = Scratch::new();
    let (from, to) = (scratch.dir("from"), scratch.dir("to"));
    fill(&from);
    let mut pair = Pair::new(vec![root(&from)], vec![root(&to)]);
    pair.round(Stage::Live, &[]);
    let limit = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap().trim().parse::<u32>().unwrap();
    let files = ["plain", "empty"].map(|name| OpenOptions::new().write(true).open(from.join(name)).unwrap());
    let write = |n: u32| files[n as usize % 2].write_all_at(&n.to_le_bytes(), 0).unwrap();
    (0..limit + 10).for_each(write);
    fs::create_dir(from.join("unseen")).unwrap();
    fs::rename(from.join("a"), from.join("unseen/a")).unwrap();
    assert!(pair.round(Stage::Live, &[]).scanned);
    // With somebody to take them, they are kept.
    for n in 0..limit + 10 {
        write(n);
        if n % 1000 == 0 {
            pair.source.drain().unwrap();
        }
    }
    let round = pair.round(Stage::Last, &[]);
    assert!(!round.scanned && round.looked < 10, "{round:?}");
    pair.finish();
    assert_same(&from, &to, "");
}

#[test]
fn what_changes_in_the_last_round_is_an_error() {
    let scratch = Scratch::new();
    let from = scratch.dir("from");
    fs::write(from.join("file"), vec![1; 1 << 20]).unwrap();
    let mut source = Source::open(vec![root(&from)]).unwrap();
    let mut emit = |message: Message| {
        if matches!(message.op, Some(Op::Block(_))) {
            fs::write(from.join("file"), "else")?;
        }
        Ok(())
    };
    let error = source.round(Stage::Last, &[], &mut emit).unwrap_err();
    assert!(matches!(&error, Error::Changed { path } if path == &from.join("file")), "{error}");
}

#[test]
fn other_file_systems_are_refused() {
    let scratch = Scratch::new();
    let merged = scratch.dir("merged");
    mount(Some("tmpfs"), &merged, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    let error = Source::open(vec![root(&scratch.0)]).unwrap().round(Stage::Live, &[], &mut |_| Ok(())).unwrap_err();
    assert!(matches!(&error, Error::OtherFileSystem { path, .. } if path == &merged), "{error}");
}

#[test]
fn what_is_not_committed_is_removed() {
    let scratch = Scratch::new();
    let from = scratch.dir("from");
    fill(&from);
    let (new, there) = (scratch.0.join("new"), scratch.dir("there"));
    let mut pair = Pair::new(vec![root(&from), root(&from)], vec![root(&new), root(&there)]);
    pair.round(Stage::Live, &[]);
    assert!(new.join("a").exists() && there.join("a").exists());
    drop(pair);
    assert!(!new.exists());
    assert_eq!(fs::read_dir(&there).unwrap().count(), 0);
    fs::write(there.join("other"), "").unwrap();
    assert!(matches!(Target::create(vec![root(&there)]), Err(Error::NotEmpty { .. })));
    assert!(there.join("other").exists());
}

#[test]
fn layers_are_the_same_if_their_digests_are() {
    let scratch = Scratch::new();
    let (one, two) = (scratch.dir("one"), scratch.dir("two"));
    fill(&one);
    // Made in another order, so with other inode numbers.
    let mut pair = Pair::new(vec![root(&one)], vec![root(&two.join("copy"))]);
    pair.round(Stage::Last, &[]);
    pair.finish();
    let two = two.join("copy");
    set_time(&two.join("a"), 99, 9);
    assert_eq!(digest_of(&one).unwrap(), digest_of(&two).unwrap());
    for change in [
        (|dir| fs::write(dir.join("empty"), "x")) as fn(&Path) -> io::Result<()>,
        |dir| fs::rename(dir.join("empty"), dir.join("full")),
        |dir| lchown(dir.join("link"), Some(1), None),
        |dir| xattr::remove(dir.join("a"), "trusted.overlay.opaque"),
    ] {
        let before = digest_of(&two).unwrap();
        change(&two).unwrap();
        assert_ne!(digest_of(&two).unwrap(), before);
    }
}

/// Whatever comes, nothing outside is touched, and what is wrong is refused.
#[test]
fn a_source_is_not_believed() {
    let scratch = Scratch::new();
    let outside = scratch.dir("outside");
    fs::write(outside.join("file"), "as it was").unwrap();
    let made = || {
        let mut target = Target::create(vec![root(&scratch.0.join("to"))]).unwrap();
        let create = |id, kind, link: &str| Op::Create(Create { id, kind, rdev: 0, target: link.into() });
        let link = |dir, name: &str, id| Op::Link(Link { dir, name: name.into(), id });
        let up = outside.to_str().unwrap();
        for op in [
            create(1, libc::S_IFDIR, ""),
            create(2, libc::S_IFREG, ""),
            create(3, libc::S_IFLNK, up),
            create(4, libc::S_IFDIR, ""),
            create(5, libc::S_IFREG, ""),
            Op::Resize(Resize { id: 2, size: 10 }),
            link(0, "dir", 1),
            link(1, "file", 2),
            link(0, "link", 3),
            link(1, "below", 4),
        ] {
            target.apply(Message::new(0, op)).unwrap();
        }
        target
    };
    let create = |id| Op::Create(Create { id, kind: libc::S_IFREG, ..Create::default() });
    let link = |dir, name: &str, id| Op::Link(Link { dir, name: name.into(), id });
    let unlink = |dir, name: &str, id| Op::Unlink(Unlink { dir, name: name.into(), id });
    let block =
        |id, index, offset, len| Op::Block(Block { id, index, pieces: vec![Piece { offset, bytes: vec![1; len] }] });
    let meta = |id| Op::Meta(Meta { id, ..Meta::default() });
    for op in [
        // Numbers that are not there, or are already, or are the root's.
        create(2),
        create(0),
        link(9, "x", 2),
        link(0, "x", 9),
        link(0, "x", 0),
        unlink(0, "x", 2),
        unlink(1, "file", 1),
        Op::Forget(Forget { id: 9 }),
        Op::Forget(Forget { id: 0 }),
        Op::Resize(Resize { id: 9, size: 1 }),
        block(9, 0, 0, 1),
        meta(9),
        // What is not a directory has no names in it; what is not a file has no content.
        link(2, "x", 5),
        link(3, "file", 5),
        unlink(3, "file", 5),
        Op::Resize(Resize { id: 3, size: 1 }),
        Op::Resize(Resize { id: 1, size: 1 }),
        block(3, 0, 0, 1),
        // Behind the end.
        block(2, 1, 0, 1),
        block(2, 0, 0, 11),
        block(2, 0, 10, 1),
        // A name twice; a directory twice.
        link(1, "file", 5),
        link(0, "x", 1),
        // What is in use, or full.
        Op::Forget(Forget { id: 2 }),
    ] {
        let text = format!("{op:?}");
        let error = made().apply(Message::new(0, op)).expect_err(&text);
        assert!(matches!(error, Error::Hostile { .. } | Error::Io { .. }), "{text}: {error}");
    }
    assert!(made().apply(Message::new(1, create(9))).is_err());
    assert!(made().finish().is_err());

    // A directory below itself.
    let mut target = made();
    target.apply(Message::new(0, unlink(0, "dir", 1))).unwrap();
    assert!(target.apply(Message::new(0, link(4, "x", 1))).is_err());
    assert!(target.apply(Message::new(0, Op::Forget(Forget { id: 1 }))).is_err());
    drop(target);

    // An end with another digest; without attributes.
    let mut target = made();
    let end = |digest: Vec<u8>| Message::new(0, Op::End(End { last: true, digest }));
    assert!(matches!(target.apply(end(vec![0; 32])), Err(Error::Hostile { .. })));
    (0..6).for_each(|id| target.apply(Message::new(0, meta(id))).unwrap());
    target.apply(Message::new(0, Op::Forget(Forget { id: 5 }))).unwrap();
    assert!(matches!(target.apply(end(vec![0; 32])), Err(Error::Digest { .. })));
    drop(target);

    assert_eq!(fs::read(outside.join("file")).unwrap(), b"as it was");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
    assert!(!scratch.0.join("to").exists());
}

/// Messages in any order with any numbers: an error, or a tree in its place.
#[test]
fn random_messages_stay_in_their_place() {
    let scratch = Scratch::new();
    let outside = scratch.dir("outside");
    fs::write(outside.join("file"), "as it was").unwrap();
    let before = facts(&outside);
    let mut random = Random(7);
    let mut applied = 0;
    for _ in 0..300 {
        let mut target = Target::create(vec![root(&scratch.0.join("to"))]).unwrap();
        for _ in 0..60 {
            let (id, dir) = (random.below(7) as u64, random.below(7) as u64);
            let name = ["a", "b", "file"][random.below(3)].as_bytes().to_vec();
            let kinds = [libc::S_IFREG, libc::S_IFDIR, libc::S_IFLNK, libc::S_IFIFO];
            let kind = kinds[random.below(4)];
            let link = if kind == libc::S_IFLNK { outside.to_str().unwrap().into() } else { vec![] };
            let pieces = vec![Piece { offset: random.below(9) as u32, bytes: vec![1; 1 + random.below(9)] }];
            let op = match random.below(8) {
                0 | 1 => Op::Create(Create { id, kind, rdev: 0, target: link }),
                2 => Op::Resize(Resize { id, size: random.below(300_000) as u64 }),
                3 => Op::Block(Block { id, index: random.below(3) as u64, pieces }),
                4 => Op::Meta(Meta { id, mode: 0o777, uid: 5, ..Meta::default() }),
                5 => Op::Unlink(Unlink { dir, name, id }),
                6 => Op::Link(Link { dir, name, id }),
                _ => Op::Forget(Forget { id }),
            };
            applied += usize::from(target.apply(Message::new(0, op)).is_ok());
        }
    }
    assert!(applied > 1000, "{applied}");
    assert_eq!(facts(&outside), before);
    assert_eq!(fs::read_dir(&scratch.0).unwrap().count(), 1);
}

/// An overlay that is mounted at `merged`.
fn overlay(scratch: &Scratch, lower: &Path, upper: &Path) -> PathBuf {
    overlay_at(scratch, "merged", lower, upper)
}

fn overlay_at(scratch: &Scratch, name: &str, lower: &Path, upper: &Path) -> PathBuf {
    let (merged, work) = (scratch.dir(name), scratch.dir(&format!("work of {name}")));
    let options = format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
    mount(Some("overlay"), &merged, Some("overlay"), MsFlags::empty(), Some(options.as_str())).unwrap();
    merged
}

/// What a container does to its root, on the way it does it.
#[test]
fn an_overlay_s_upper_directory() {
    let scratch = Scratch::new();
    let (lower, upper, to) = (scratch.dir("lower"), scratch.dir("upper"), scratch.dir("to"));
    fill(&lower);
    fs::create_dir_all(lower.join("usr/share/doc")).unwrap();
    fs::write(lower.join("usr/share/doc/text"), "text").unwrap();
    let merged = overlay(&scratch, &lower, &upper);
    let from = Root { view: Some(merged.clone()), ..root(&upper) };
    fs::create_dir(merged.join("tmp")).unwrap();
    fs::remove_file(merged.join("fifo")).unwrap();
    let mut pair = Pair::new(vec![from], vec![root(&to)]);
    pair.round(Stage::Live, &[]);

    // A copy-up below directories that the upper has not had; a whiteout; an opaque directory; a moved directory.
    OpenOptions::new().append(true).open(merged.join("usr/share/doc/text")).unwrap().write_all(b"more").unwrap();
    fs::remove_file(merged.join("plain")).unwrap();
    fs::remove_dir_all(merged.join("a")).unwrap();
    fs::create_dir(merged.join("a")).unwrap();
    fs::write(merged.join("tmp/x"), vec![3; 300_000]).unwrap();
    let round = pair.round(Stage::Live, &[]);
    assert!(!round.scanned && round.sent > 300_000, "{round:?}");
    assert_eq!(fs::symlink_metadata(to.join("plain")).unwrap().rdev(), 0);
    assert_eq!(xattr::get(to.join("a"), "trusted.overlay.opaque").unwrap().as_deref(), Some(&b"y"[..]));

    // What is open is written to; what was copied up is written to again; a mapping.
    let file = OpenOptions::new().read(true).write(true).open(merged.join("tmp/x")).unwrap();
    file.write_all_at(b"here", 200_000).unwrap();
    OpenOptions::new().append(true).open(merged.join("usr/share/doc/text")).unwrap().write_all(b" and more").unwrap();
    let mapping = Window::map_writable(&file, 300_000);
    mapping.store(5, 77);
    fs::rename(merged.join("usr/share/doc/text"), merged.join("tmp/text")).unwrap();
    fs::set_permissions(merged.join("second"), Permissions::from_mode(0o600)).unwrap();
    let busy = [Busy { path: "/tmp/x".into(), mapped: true }];
    let round = pair.round(Stage::Live, &busy);
    assert!(!round.scanned, "{round:?}");
    mapping.store(6, 77);
    let round = pair.round(Stage::Last, &busy);
    assert_eq!(round.sent, message::BLOCK);
    pair.finish();
    assert_same(&upper, &to, "");

    // It is good for what it is for.
    drop((file, mapping));
    let before = facts(&merged);
    umount2(&merged, MntFlags::empty()).unwrap();
    overlay(&scratch, &lower, &to);
    let after = facts(&merged);
    assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>());
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n.max(1)
    }

    fn of<'a, T>(&mut self, list: &'a [T]) -> Option<&'a T> {
        (!list.is_empty()).then(|| &list[self.below(list.len())])
    }
}

/// Some change somewhere below `dir`; it may be impossible, then nothing happens.
fn mutate(dir: &Path, random: &mut Random) {
    let mut dirs = vec![dir.to_owned()];
    let mut others = Vec::new();
    let mut at = 0;
    while at < dirs.len() {
        for entry in fs::read_dir(&dirs[at]).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() { dirs.push(entry.path()) } else { others.push(entry.path()) }
        }
        at += 1;
    }
    let name = ["a", "b", "c", "d", "e", "f", "g"][random.below(7)];
    let new = random.of(&dirs).unwrap().join(name);
    let files: Vec<_> =
        others.iter().filter(|path| fs::symlink_metadata(path).is_ok_and(|m| m.is_file())).cloned().collect();
    let any: Vec<_> = dirs[1..].iter().chain(&others).cloned().collect();
    let size = [0, 10, 5000, 300_000][random.below(4)];
    let write = |path: &Path, random: &mut Random| {
        let file = OpenOptions::new().write(true).open(path).unwrap();
        let _ = file.write_all_at(&vec![random.below(256) as u8; random.below(9000)], random.below(1 << 20) as u64);
    };
    let _: io::Result<()> = match random.below(16) {
        0 | 1 => fs::write(&new, vec![random.below(3) as u8; size]),
        2 => fs::create_dir(&new),
        3 => symlink(name, &new),
        4 => mknod(&new, SFlag::S_IFCHR, Mode::empty(), 0).map_err(Into::into),
        5 => random.of(&any).map_or(Ok(()), |old| fs::rename(old, &new)),
        6 => random.of(&files).map_or(Ok(()), |old| fs::hard_link(old, &new)),
        7 => random.of(&others).map_or(Ok(()), fs::remove_file),
        8 if random.below(3) == 0 => random.of(&dirs[1..]).map_or(Ok(()), fs::remove_dir_all),
        9 | 10 => random.of(&files).map_or(Ok(()), |path| {
            write(path, random);
            Ok(())
        }),
        11 => random.of(&files).map_or(Ok(()), |path| {
            let len = random.below(1 << 20) as u64;
            OpenOptions::new().write(true).open(path)?.set_len(len)
        }),
        12 => random.of(&files).map_or(Ok(()), |path| {
            let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            let file = OpenOptions::new().write(true).open(path)?;
            Ok(fallocate(file, flags, random.below(1 << 20) as i64, 1 + random.below(1 << 19) as i64)?)
        }),
        13 => random.of(&any).map_or(Ok(()), |path| lchown(path, Some(random.below(9) as u32), None)),
        14 => random.of(&any).map_or(Ok(()), |path| {
            let at = TimeSpec::new(random.below(1 << 30) as i64, random.below(1_000_000_000) as i64);
            Ok(utimensat(AT_FDCWD, path, &at, &at, UtimensatFlags::NoFollowSymlink)?)
        }),
        _ => random.of(&any).map_or(Ok(()), |path| {
            let name = ["trusted.a", "trusted.b"][random.below(2)];
            if random.below(2) == 0 {
                xattr::set(path, name, &vec![1; random.below(99)])
            } else {
                xattr::remove(path, name)
            }
        }),
    };
}

/// Any changes between rounds and during them: seen by looking at everything, by notes, and by notes of what is done to an overlay.
#[test]
fn random_changes_follow() {
    for seed in 0..12 {
        let scratch = Scratch::new();
        let (from, to) = (scratch.dir("from"), scratch.dir("to"));
        let mut random = Random(seed);
        let mut view = None;
        if seed % 3 == 2 {
            let lower = scratch.dir("lower");
            (0..60).for_each(|_| mutate(&lower, &mut random));
            view = Some(overlay(&scratch, &lower, &from));
        }
        let place = view.clone().unwrap_or(from.clone());
        (0..60).for_each(|_| mutate(&place, &mut random));
        let open = if seed % 3 == 0 { Source::open_still } else { Source::open };
        let mut source = open(vec![Root { view, ..root(&from) }]).unwrap();
        let mut target = Target::create(vec![root(&to)]).unwrap();
        for round in 0..12 {
            (0..random.below(40)).for_each(|_| mutate(&place, &mut random));
            let stage = if round % 3 == 2 { Stage::Last } else { Stage::Live };
            let mut emit = |mut message: Message| {
                // While the round is under way.
                if stage == Stage::Live && random.below(8) == 0 {
                    mutate(&place, &mut random);
                }
                // There will be more, here.
                if let Some(Op::End(end)) = &mut message.op {
                    end.last = false;
                }
                target.apply(message).map_err(io::Error::other)
            };
            let done = source.round(stage, &[], &mut emit);
            done.unwrap_or_else(|e| panic!("seed {seed}, round {round}: {e}: {:?}", std::error::Error::source(&e)));
            if stage == Stage::Last {
                assert_same(&from, &to, &format!("seed {seed}, round {round}"));
            }
        }
    }
}

/// The same where an overlay is mounted at the destination, too, after the first round.
#[test]
fn random_changes_follow_into_an_overlay() {
    for seed in 100..112 {
        let scratch = Scratch::new();
        let (from, to, lower) = (scratch.dir("from"), scratch.dir("to"), scratch.dir("lower"));
        let mut random = Random(seed);
        (0..80).for_each(|_| mutate(&lower, &mut random));
        let view = overlay(&scratch, &lower, &from);
        (0..60).for_each(|_| mutate(&view, &mut random));
        let mut source = Source::open(vec![Root { view: Some(view.clone()), ..root(&from) }]).unwrap();
        let mut target = Target::create(vec![root(&to)]).unwrap();
        let mut there = None;
        for round in 0..12 {
            (0..random.below(40)).for_each(|_| mutate(&view, &mut random));
            let stage = if round % 3 == 2 { Stage::Last } else { Stage::Live };
            let mut emit = |mut message: Message| {
                if stage == Stage::Live && random.below(8) == 0 {
                    mutate(&view, &mut random);
                }
                if let Some(Op::End(end)) = &mut message.op {
                    end.last = round == 11;
                }
                target.apply(message).map_err(io::Error::other)
            };
            let done = source.round(stage, &[], &mut emit);
            done.unwrap_or_else(|e| panic!("seed {seed}, round {round}: {e}: {:?}", std::error::Error::source(&e)));
            let there = there.get_or_insert_with(|| {
                let there = overlay_at(&scratch, "there", &lower, &to);
                target.mounted(0, &there).unwrap();
                // The kernel remembers what is there, and what is not.
                drop(facts(&there));
                there
            });
            if stage == Stage::Last {
                assert_same(&view, there, &format!("seed {seed}, round {round}"));
            }
        }
        target.finish().unwrap();
        target.commit();
        // And not because the kernel remembers.
        let there = there.unwrap();
        umount2(&there, MntFlags::empty()).unwrap();
        overlay_at(&scratch, "there", &lower, &to);
        assert_same(&view, &there, &format!("seed {seed}, mounted anew"));
    }
}

/// What an overlay says below itself in its own words.
#[test]
fn an_overlay_s_words_are_translated() {
    let scratch = Scratch::new();
    let (lower, upper, to) = (scratch.dir("lower"), scratch.dir("upper"), scratch.dir("to"));
    for dir in ["kept", "gone/sub", "anew/sub", "file/sub"] {
        fs::create_dir_all(lower.join(dir)).unwrap();
        fs::write(lower.join(dir).join("of the image"), "image").unwrap();
    }
    fs::write(lower.join("dir"), "a file").unwrap();
    let merged = overlay(&scratch, &lower, &upper);
    fs::write(merged.join("gone/sub/mine"), "mine").unwrap();
    let mut pair = Pair::new(vec![Root { view: Some(merged.clone()), ..root(&upper) }], vec![root(&to)]);
    pair.round(Stage::Live, &[]);
    let there = overlay_at(&scratch, "there", &lower, &to);
    pair.target.mounted(0, &there).unwrap();
    assert_eq!(facts(&there).len(), facts(&merged).len());

    fs::write(merged.join("kept/mine"), "mine").unwrap();
    fs::rename(merged.join("gone/sub/mine"), merged.join("moved")).unwrap();
    fs::remove_dir_all(merged.join("gone")).unwrap();
    fs::remove_dir_all(merged.join("anew")).unwrap();
    fs::create_dir(merged.join("anew")).unwrap();
    fs::remove_dir_all(merged.join("file")).unwrap();
    fs::write(merged.join("file"), "a file").unwrap();
    fs::remove_file(merged.join("dir")).unwrap();
    fs::create_dir(merged.join("dir")).unwrap();
    let link = merged.join("kept/of the image");
    fs::hard_link(&link, merged.join("link")).unwrap();
    pair.round(Stage::Last, &[]);
    pair.finish();
    assert_same(&merged, &there, "at the end");
    assert!(there.join("kept/of the image").exists() && !there.join("anew/sub").exists());
}
