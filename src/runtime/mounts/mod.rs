//! The mounts of config.json, made by descriptor on a root that nothing leads out of.
//!
//! libcontainer, which could make them, knows no propagation, no mapped ids and no read-only cgroups, and looks at procfs some
//! thirty times for each mount.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags, OFlag, openat};
use nix::libc;
use nix::mount::{MsFlags, mount};
use nix::sys::stat::{Mode, fstatat, mkdirat};
use nix::sys::statfs::{PROC_SUPER_MAGIC, fstatfs};
use nix::unistd::{UnlinkatFlags, symlinkat, unlinkat};
use oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType, Mount as Configured, Spec};

use super::bundle::{makes_namespace, namespace};
use super::cgroup::{self, Cgroup};
use super::{Error, Result};
use crate::sys::mount::{self as kernel, Attributes};
use crate::sys::{file, namespace as namespaces};

mod options;
mod propagation;

use options::{Options, Recursion};
pub use propagation::Propagation;

/// What may be mounted below /proc: files that lxcfs and its kin stand in for.
const BELOW_PROC: &[&str] = &[
    "/proc/cpuinfo",
    "/proc/diskstats",
    "/proc/loadavg",
    "/proc/meminfo",
    "/proc/slabinfo",
    "/proc/stat",
    "/proc/swaps",
    "/proc/uptime",
    "/proc/sys/kernel/ns_last_pid",
    "/proc/sys/crypto/fips_enabled",
];

const DEFAULT_DEVICES: &[&str] = &["/dev/null", "/dev/zero", "/dev/full", "/dev/tty", "/dev/urandom", "/dev/random"];

const DEV_LINKS: &[&str] = &["/dev/fd", "/dev/stdin", "/dev/stdout", "/dev/stderr", "/dev/kcore"];

/// All that is to be mounted, prepared before anything is forked.
#[derive(Debug)]
pub struct Mounts {
    list: Vec<Prepared>,
    /// Where libcontainer makes devices, and takes none for its own that it finds.
    devices: Vec<PathBuf>,
    rootfs: PathBuf,
    propagation: MsFlags,
    own_cgroup_namespace: bool,
    cgroup: Cgroup,
}

#[derive(Debug)]
struct Prepared {
    kind: Kind,
    source: PathBuf,
    destination: PathBuf,
    options: Options,
    /// The user namespace whose mapping it gets.
    mapping: Option<OwnedFd>,
    /// The SELinux label of a file system of message queues, which takes it from its root only.
    queue_label: Option<String>,
}

#[derive(Debug, PartialEq)]
enum Kind {
    Bind(Recursion),
    New(String),
    Cgroup,
    Remount,
}

/// Opens the source of the bind mount with this number in the list, mounted nowhere yet.
pub type Opener<'a> = &'a dyn Fn(usize) -> io::Result<OwnedFd>;

/// An error with the mount that it is about.
type Said<T> = std::result::Result<T, String>;

impl Mounts {
    /// Takes the mounts out of a spec. None where they are libcontainer's affair: without a mount namespace of the
    /// container's own.
    pub fn take(spec: &mut Spec, bundle: &Path, cgroup: &Cgroup) -> Result<Option<Mounts>> {
        if !makes_namespace(spec, LinuxNamespaceType::Mount) {
            return Ok(None);
        }
        let configured = spec.mounts().clone().unwrap_or_default();
        let label = spec.linux().as_ref().and_then(|linux| linux.mount_label().as_deref());
        let list = configured.iter().map(|mount| prepare(mount, spec, bundle, label)).collect::<Result<_>>()?;
        let wanted = spec.linux().as_ref().and_then(|linux| linux.rootfs_propagation().as_deref());
        // libcontainer does not know the recursive words, which mean the same here.
        let plain =
            wanted.map(|word| word.strip_prefix('r').unwrap_or(word).to_owned()).filter(|word| !word.is_empty());
        let propagation = match wanted {
            Some("shared" | "rshared") => MsFlags::MS_SHARED,
            Some("private" | "rprivate") => MsFlags::MS_PRIVATE,
            Some("slave" | "rslave" | "unbindable" | "runbindable" | "") | None => MsFlags::MS_SLAVE,
            Some(other) => return Err(Error::Config(format!("linux.rootfsPropagation {other:?} is unknown"))),
        };
        spec.set_mounts(None);
        if let (Some(linux), Some(word)) = (spec.linux_mut(), plain) {
            linux.set_rootfs_propagation(Some(word));
        }
        let devices = spec.linux().as_ref().and_then(|linux| linux.devices().as_ref()).into_iter().flatten();
        let devices = devices.map(|device| device.path().clone()).chain(DEFAULT_DEVICES.iter().map(PathBuf::from));
        Ok(Some(Mounts {
            list,
            devices: devices.collect(),
            rootfs: spec.root().as_ref().map(|root| root.path().clone()).unwrap_or_default(),
            propagation,
            own_cgroup_namespace: namespace(spec, LinuxNamespaceType::Cgroup).is_some(),
            cgroup: cgroup.clone(),
        }))
    }

    /// What the bind mount with this number in the list is of, with its mapping of ids, mounted nowhere yet.
    pub fn open(&self, number: usize) -> io::Result<OwnedFd> {
        let Some(wanted @ Prepared { kind: Kind::Bind(recursion), source, .. }) = self.list.get(number) else {
            return Err(ErrorKind::InvalidInput.into());
        };
        let source = File::options().read(true).custom_flags(libc::O_PATH).open(source)?;
        let made = kernel::copy(&source, *recursion == Recursion::Yes)?;
        wanted.map_ids(&made)?;
        Ok(made)
    }

    /// Makes all mounts, in the caller's mount namespace, which is the container's own by now.
    pub fn make(&self, opener: Opener<'_>) -> Said<()> {
        let none = None::<&str>;
        let mounting = |e: Errno| format!("prepare {}: {e}", self.rootfs.display());
        mount(none, "/", none, MsFlags::MS_REC | self.propagation, none).map_err(mounting)?;
        mount(Some(&self.rootfs), &self.rootfs, none, MsFlags::MS_BIND | MsFlags::MS_REC, none).map_err(mounting)?;
        // What is mounted here must not come to light on the host.
        let hidden = if self.propagation == MsFlags::MS_SLAVE { MsFlags::MS_SLAVE } else { MsFlags::MS_PRIVATE };
        mount(none, &self.rootfs, none, hidden, none).map_err(mounting)?;
        let path = File::options().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(&self.rootfs);
        let root = Root(path.map_err(|e| format!("open {}: {e}", self.rootfs.display()))?);
        for (number, mount) in self.list.iter().enumerate() {
            self.make_one(&root, mount, &|| opener(number)).map_err(|e| {
                let (source, destination) = (mount.source.display(), mount.destination.display());
                format!("error mounting {source:?} to rootfs at {destination:?}: {e}")
            })?;
        }
        // libcontainer fills it by a path that a link would lead anywhere.
        let dev = root.place(Path::new("/dev")).and_then(|dev| root.name_of(&dev));
        if dev.map_err(|e| format!("make /dev: {e}"))? != Path::new("/dev") {
            return Err("/dev must be an ordinary directory".into());
        }
        self.devices.iter().for_each(|device| root.forget(device, &[libc::S_IFCHR, libc::S_IFBLK, libc::S_IFIFO]));
        DEV_LINKS.iter().for_each(|link| root.forget(Path::new(link), &[libc::S_IFLNK]));
        Ok(())
    }

    fn make_one(&self, root: &Root, wanted: &Prepared, open: &dyn Fn() -> io::Result<OwnedFd>) -> io::Result<()> {
        let options = &wanted.options;
        let made = match &wanted.kind {
            Kind::Cgroup => return self.make_cgroups(root, wanted),
            Kind::Remount => {
                let at = root.place(&wanted.destination)?;
                return kernel::set(&at, false, &options.own);
            }
            Kind::Bind(_) => open()?,
            Kind::New(kind) => {
                let source = wanted.source.to_str().ok_or(ErrorKind::InvalidInput)?;
                let made = kernel::new(kind, source, &options.data)?;
                wanted.map_ids(&made)?;
                made
            }
        };
        wanted.set_attributes(&made)?;
        if let Some(label) = &wanted.queue_label {
            xattr::set(format!("/proc/self/fd/{}", made.as_raw_fd()), "security.selinux", label.as_bytes())?;
        }
        let at = self.target(root, wanted, &made)?;
        kernel::put(&made, &at)
    }

    /// Where a mount goes, made if it is not there, and checked against what must not be covered.
    fn target(&self, root: &Root, wanted: &Prepared, made: &OwnedFd) -> io::Result<OwnedFd> {
        let directory = file::stat(made)?.kind() == libc::S_IFDIR;
        let at = if directory { root.place(&wanted.destination)? } else { root.file(&wanted.destination)? };
        let place = root.name_of(&at)?;
        let is_proc = matches!(&wanted.kind, Kind::New(kind) if kind == "proc");
        if matches!(&wanted.kind, Kind::New(kind) if kind == "proc" || kind == "sysfs")
            && place != lexical(&wanted.destination)
        {
            return Err(io::Error::other("must be mounted on an ordinary directory"));
        }
        let proc_itself =
            place == Path::new("/proc") && (is_proc || fstatfs(made)?.filesystem_type() == PROC_SUPER_MAGIC);
        let allowed = proc_itself || BELOW_PROC.iter().any(|allowed| place == Path::new(allowed));
        if place.starts_with("/proc") && !allowed {
            return Err(io::Error::other("is inside /proc"));
        }
        Ok(at)
    }

    /// The container's own cgroups: the unified hierarchy, or a directory with those of version 1.
    fn make_cgroups(&self, root: &Root, wanted: &Prepared) -> io::Result<()> {
        let at = root.place(&wanted.destination)?;
        let hierarchies = cgroup::hierarchies().map_err(io::Error::other)?;
        let open = |dir: &Path| File::options().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(dir);
        // A container that has no cgroup of its own, for want of the right to make it, is shown all.
        let own = |mount: &Path| {
            let dir = match open(&self.cgroup.below(mount)) {
                Err(e) if e.kind() == ErrorKind::NotFound => open(mount)?,
                opened => opened?,
            };
            kernel::copy(&dir, false)
        };
        let version1: Vec<_> = hierarchies.iter().filter(|hierarchy| !hierarchy.unified).collect();
        if version1.is_empty() {
            let Some(unified) = hierarchies.first() else {
                return Err(io::Error::other("no cgroups are mounted"));
            };
            let made =
                if self.own_cgroup_namespace { kernel::new("cgroup2", "cgroup", &[])? } else { own(&unified.mount)? };
            kernel::set(&made, false, &wanted.options.own)?;
            return kernel::put(&made, &at);
        }
        let made = kernel::new("tmpfs", "tmpfs", &[("mode".into(), Some("755".into()))])?;
        kernel::put(&made, &at)?;
        for hierarchy in version1 {
            let name = hierarchy.mount.file_name().unwrap_or_default();
            mkdirat(&made, name, Mode::from_bits_truncate(0o755))?;
            let controller = own(&hierarchy.mount)?;
            kernel::set(&controller, false, &wanted.options.own)?;
            kernel::put(&controller, openat(&made, name, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?)?;
            let both = name.to_str().filter(|name| name.contains(','));
            for alias in both.into_iter().flat_map(|name| name.split(',')) {
                symlinkat(name, &made, alias)?;
            }
        }
        kernel::set(&made, false, &wanted.options.own)
    }
}

impl Prepared {
    fn set_attributes(&self, made: &OwnedFd) -> io::Result<()> {
        for (attributes, recursive) in [(&self.options.own, false), (&self.options.recursive, true)] {
            if *attributes != Attributes::default() {
                kernel::set(made, recursive, attributes)?;
            }
        }
        Ok(())
    }

    fn map_ids(&self, made: &OwnedFd) -> io::Result<()> {
        let Some(mapping) = &self.mapping else {
            return Ok(());
        };
        let user_namespace = mapping.as_raw_fd() as u64;
        let map = Attributes { set: kernel::IDMAP, user_namespace, ..Attributes::default() };
        kernel::set(made, self.options.idmap == Some(Recursion::Yes), &map)
    }
}

fn prepare(mount: &Configured, spec: &Spec, bundle: &Path, label: Option<&str>) -> Result<Prepared> {
    let mut options = Options::parse(mount.options().as_deref().unwrap_or_default());
    let kind = mount.typ().clone().unwrap_or_default();
    let about = |why: &str| Error::Config(format!("mount {}: {why}", mount.destination().display()));
    let kind = match (options.bind, kind.as_str()) {
        _ if options.remount => Kind::Remount,
        (Some(recursion), _) => Kind::Bind(recursion),
        (None, "bind") => Kind::Bind(Recursion::No),
        (None, "cgroup" | "cgroup2") => Kind::Cgroup,
        (None, "" | "none") => return Err(about("neither a type nor bind is given")),
        (None, _) => Kind::New(kind),
    };
    // selinux(8): what has labels of its own, or shows the kernel's, takes none.
    let mut queue_label = None;
    if let (Kind::New(kind), Some(label)) = (&kind, label) {
        match kind.as_str() {
            "proc" | "sysfs" => {}
            "mqueue" => queue_label = Some(label.to_owned()),
            _ => options.data.push(("context".into(), Some(label.into()))),
        }
    }
    let source = mount.source().clone().unwrap_or_else(|| PathBuf::from("none"));
    let source = if matches!(kind, Kind::Bind(_)) { bundle.join(source) } else { source };
    let mapping = match (mount.uid_mappings(), mount.gid_mappings()) {
        (Some(uids), Some(gids)) if !uids.is_empty() && !gids.is_empty() => Some(mapped_users(uids, gids)),
        (None, None) if options.idmap.is_some() => users_of(spec),
        _ if options.idmap.is_some() => return Err(about("idmap takes both uidMappings and gidMappings")),
        _ => None,
    };
    let mapping = mapping.transpose().map_err(|e| about(&format!("make a user namespace with its mapping: {e}")))?;
    if mapping.is_none() && options.idmap.is_some() {
        return Err(about("idmap takes uidMappings and gidMappings, or a container with a user namespace"));
    }
    Ok(Prepared { kind, source, destination: mount.destination().clone(), options, mapping, queue_label })
}

/// The user namespace of the container, or another one with its mapping, where it is to have one.
fn users_of(spec: &Spec) -> Option<io::Result<OwnedFd>> {
    let linux = spec.linux().as_ref()?;
    match namespace(spec, LinuxNamespaceType::User)?.path() {
        Some(path) => Some(File::open(path).map(OwnedFd::from)),
        None => Some(mapped_users(linux.uid_mappings().as_ref()?, linux.gid_mappings().as_ref()?)),
    }
}

fn mapped_users(uids: &[LinuxIdMapping], gids: &[LinuxIdMapping]) -> io::Result<OwnedFd> {
    namespaces::mapped_users(&lines(uids), &lines(gids))
}

/// user_namespaces(7), uid_map. The kernel maps from the file system's ids (containerID) to those seen (hostID).
fn lines(mapping: &[LinuxIdMapping]) -> String {
    mapping.iter().map(|m| format!("{} {} {}\n", m.container_id(), m.host_id(), m.size())).collect()
}

/// The container's root directory (O_PATH).
struct Root(File);

impl Root {
    /// The directory at `path`, made where it is missing.
    fn place(&self, path: &Path) -> io::Result<OwnedFd> {
        let bytes = path.as_os_str().as_encoded_bytes();
        match file::open_in(&self.0, bytes, libc::O_PATH as u32) {
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            found => return found,
        }
        let mut dir = self.0.as_fd().try_clone_to_owned()?;
        let mut walked = PathBuf::from("/");
        for name in lexical(path).components().filter(|part| matches!(part, Component::Normal(_))) {
            walked.push(name);
            let flags = (libc::O_PATH | libc::O_DIRECTORY) as u32;
            dir = match file::open_in(&self.0, walked.as_os_str().as_encoded_bytes(), flags) {
                Err(e) if e.kind() == ErrorKind::NotFound => {
                    mkdirat(&dir, name.as_os_str(), Mode::from_bits_truncate(0o755))?;
                    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                    openat(&dir, name.as_os_str(), flags, Mode::empty())?
                }
                found => found?,
            };
        }
        Ok(dir)
    }

    /// The file at `path`, made empty where it is missing.
    fn file(&self, path: &Path) -> io::Result<OwnedFd> {
        match file::open_in(&self.0, path.as_os_str().as_encoded_bytes(), libc::O_PATH as u32) {
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            found => return found,
        }
        let path = lexical(path);
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(ErrorKind::InvalidInput.into());
        };
        let parent = self.place(parent)?;
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        Ok(openat(&parent, name, flags, Mode::from_bits_truncate(0o644))?)
    }

    /// Removes what an earlier container has left, if it is of one of these kinds; what cannot be removed stays.
    fn forget(&self, path: &Path, kinds: &[u32]) {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return;
        };
        let flags = (libc::O_PATH | libc::O_DIRECTORY) as u32;
        let Ok(parent) = file::open_in(&self.0, parent.as_os_str().as_encoded_bytes(), flags) else {
            return;
        };
        let found = fstatat(&parent, name, AtFlags::AT_SYMLINK_NOFOLLOW);
        if found.is_ok_and(|stat| kinds.contains(&(stat.st_mode & libc::S_IFMT))) {
            let _ = unlinkat(&parent, name, UnlinkatFlags::NoRemoveDir);
        }
    }

    /// The path of something in the root, as it is seen from there.
    fn name_of(&self, fd: impl AsFd) -> io::Result<PathBuf> {
        let link = |fd: i32| nix::fcntl::readlinkat(AT_FDCWD, format!("/proc/self/fd/{fd}").as_str());
        let (root, path) = (link(self.0.as_raw_fd())?, link(fd.as_fd().as_raw_fd())?);
        let inside = Path::new(&path).strip_prefix(&root).map_err(|_| io::Error::other("lies outside of the root"))?;
        Ok(Path::new("/").join(inside))
    }
}

/// `path` from the root, without `.`, and with `..` done by its words alone.
fn lexical(path: &Path) -> PathBuf {
    let mut clean = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => drop(clean.pop()),
            _ => {}
        }
    }
    clean
}
