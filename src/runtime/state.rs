//! The state file of a container and the directory it lives in.
//!
//! `<root>/<id>/state.json` is replaced as a whole (written under another name, then renamed), so
//! a reader needs no lock. Commands that change a container hold its lock from load to save.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use oci_spec::runtime::Hooks;
use serde::{Deserialize, Serialize};

use super::process::Process;
use super::rdt::Group;
use super::restore::Pending;
use super::streams::Stream;
use super::systemd::Unit;
use super::{Error, Result, users};

/// Where a container is in its life. `Paused` is never stored: the freezer knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    Creating,
    Created,
    Running,
    Paused,
    Stopped,
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Status::Creating => "creating",
            Status::Created => "created",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Stopped => "stopped",
        })
    }
}

/// What lmrun remembers of a container. The upper part is what `lmrun state` prints.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    pub oci_version: String,
    pub id: String,
    pub status: Status,
    pub bundle: PathBuf,
    pub rootfs: PathBuf,
    /// RFC 3339, UTC.
    pub created: String,
    #[serde(default, skip_serializing_if = "HashMap::is_empty")]
    pub annotations: HashMap<String, String>,
    /// Name of the user who made the container, empty where the uid has none.
    pub owner: String,

    /// The container's first process, once there is one.
    pub init: Option<Process>,
    /// Init's descriptors 0, 1 and 2 when it was made.
    #[serde(default)]
    pub streams: Vec<Stream>,
    /// Where something was mounted when the container was made.
    #[serde(default)]
    pub mounts: Vec<String>,
    /// The lmrun that makes or made the container.
    pub creator: Process,
    /// Below the mount point of every cgroup hierarchy.
    pub cgroup: PathBuf,
    /// What systemd calls the container, where its cgroup is systemd's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unit: Option<Unit>,
    /// The hooks that are still to run; config.json may have changed or gone by then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hooks: Option<Hooks>,
    /// A created container that `start` makes from a checkpoint, or from what arrives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restore: Option<Pending>,
    /// The container is in its maker's session keyring, not in one of its own.
    #[serde(default)]
    pub no_new_keyring: bool,
    /// Its share of caches and memory bandwidth.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) rdt: Option<Group>,
}

/// The directory that holds one directory per container (`--root`).
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
    systemd: bool,
    rootless: bool,
}

/// A container's directory, locked against all other commands that change it.
///
/// The lock is a POSIX record lock: it belongs to this process and not to the open file, so
/// neither a half-made container nor a keeper can inherit it.
#[derive(Debug)]
pub struct Locked {
    dir: PathBuf,
    _lock: File,
}

/// All of the lock file, for one writer.
const WHOLE: libc::flock =
    libc::flock { l_type: libc::F_WRLCK as i16, l_whence: libc::SEEK_SET as i16, l_start: 0, l_len: 0, l_pid: 0 };

impl Store {
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Store { root: root.into(), systemd: false, rootless: users::is_rootless() }
    }

    /// Cgroups of containers made from now on are systemd's.
    pub fn with_systemd(self, systemd: bool) -> Self {
        Store { systemd, ..self }
    }

    /// None: whether the caller is root on the host says it.
    pub fn with_rootless(self, rootless: Option<bool>) -> Self {
        Store { rootless: rootless.unwrap_or(self.rootless), ..self }
    }

    /// Containers go without cgroups that the caller has no right to make.
    pub fn is_rootless(&self) -> bool {
        self.rootless
    }

    pub fn has_systemd(&self) -> bool {
        self.systemd
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The directory of container `id`.
    pub fn dir(&self, id: &str) -> PathBuf {
        self.root.join(id)
    }

    /// Makes and locks the directory of a new container.
    ///
    /// # Errors
    /// [`Error::InvalidId`], [`Error::Exists`], or what the file system says.
    pub fn create(&self, id: &str) -> Result<Locked> {
        validate_id(id)?;
        let mut private = fs::DirBuilder::new();
        private.mode(0o700);
        let dir = self.dir(id);
        private.recursive(true).create(&self.root).map_err(|source| Error::io(&self.root, source))?;
        // Of a former one, if whoever removed it was killed.
        gone(&removed(&dir))?;
        private.recursive(false).create(&dir).map_err(|source| match source.kind() {
            ErrorKind::AlreadyExists => Error::Exists,
            _ => Error::io(&dir, source),
        })?;
        Locked::acquire(dir)
    }

    /// Waits for the lock of an existing container.
    ///
    /// # Errors
    /// [`Error::NotFound`], or what the file system says.
    pub fn lock(&self, id: &str) -> Result<Locked> {
        validate_id(id)?;
        let dir = self.dir(id);
        if !dir.is_dir() {
            return Err(Error::NotFound);
        }
        let locked = Locked::acquire(dir)?;
        // Whoever held the lock may have deleted the container.
        if locked.dir.is_dir() { Ok(locked) } else { Err(Error::NotFound) }
    }

    /// The lock if nobody has it.
    pub fn try_lock(&self, id: &str) -> Result<Option<Locked>> {
        validate_id(id)?;
        let locked = Locked::open(self.dir(id))?;
        match fcntl(&locked._lock, FcntlArg::F_SETLK(&WHOLE)) {
            Ok(_) if locked.dir.is_dir() => Ok(Some(locked)),
            Ok(_) => Err(Error::NotFound),
            Err(Errno::EACCES | Errno::EAGAIN) => Ok(None),
            Err(e) => Err(Error::io(locked.dir, e.into())),
        }
    }

    /// Reads the state of container `id` without its lock.
    ///
    /// # Errors
    /// [`Error::NotFound`], or a state file that cannot be read.
    pub fn load(&self, id: &str) -> Result<State> {
        validate_id(id)?;
        load(&self.dir(id))
    }

    /// All ids, sorted. A root that does not exist holds none.
    pub fn ids(&self) -> Result<Vec<String>> {
        let entries = match fs::read_dir(&self.root) {
            Ok(entries) => entries,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(Error::io(&self.root, source)),
        };
        let mut ids: Vec<String> = entries
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|id| validate_id(id).is_ok())
            .collect();
        ids.sort();
        Ok(ids)
    }
}

impl Locked {
    fn acquire(dir: PathBuf) -> Result<Self> {
        let locked = Locked::open(dir)?;
        fcntl(&locked._lock, FcntlArg::F_SETLKW(&WHOLE)).map_err(|e| Error::io(&locked.dir, e.into()))?;
        Ok(locked)
    }

    /// Not locked yet.
    fn open(dir: PathBuf) -> Result<Self> {
        let path = dir.join("lock");
        let lock = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
        let lock = lock.map_err(|source| match source.kind() {
            ErrorKind::NotFound => Error::NotFound,
            _ => Error::io(&path, source),
        })?;
        Ok(Locked { dir, _lock: lock })
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn load(&self) -> Result<State> {
        load(&self.dir)
    }

    /// Replaces the state file as a whole.
    pub fn save(&self, state: &State) -> Result<()> {
        let path = self.dir.join("state.json");
        let mut json = serde_json::to_vec_pretty(state).map_err(|e| Error::io(&path, e.into()))?;
        json.push(b'\n');
        write_whole(&path, &json).map_err(|source| Error::io(&path, source))
    }

    /// Removes the directory. What is gone already is no error. It goes as a whole, so that who is killed meanwhile leaves no
    /// container without what belongs to it.
    pub fn remove(self) -> Result<()> {
        let removed = removed(&self.dir);
        gone(&removed)?;
        match fs::rename(&self.dir, &removed) {
            Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
            Err(source) => Err(Error::io(&self.dir, source)),
            Ok(()) => gone(&removed),
        }
    }
}

/// What a container's directory is called while it is removed: no id begins so.
fn removed(dir: &Path) -> PathBuf {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    dir.with_file_name(format!(".removed:{name}"))
}

fn gone(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(source) if source.kind() != ErrorKind::NotFound => Err(Error::io(dir, source)),
        _ => Ok(()),
    }
}

/// Writes a file that is there as a whole or not at all.
pub(super) fn write_whole(path: &Path, content: &[u8]) -> io::Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.{}", std::process::id()));
    let written = File::create(&temporary)
        .and_then(|mut file| file.write_all(content))
        .and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

fn load(dir: &Path) -> Result<State> {
    let path = dir.join("state.json");
    let json = fs::read(&path).map_err(|source| match source.kind() {
        ErrorKind::NotFound => Error::NotFound,
        _ => Error::io(&path, source),
    })?;
    serde_json::from_slice(&json).map_err(|e| Error::io(&path, e.into()))
}

/// runc's rule: letters, digits and `_+-.`, and nothing that a directory already means.
pub(super) fn validate_id(id: &str) -> Result<()> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "_+-.".contains(c);
    if id.is_empty() || id == "." || id == ".." || id.len() > 255 || !id.chars().all(allowed) {
        return Err(Error::InvalidId(id.to_owned()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(name: &str) -> Store {
        let root = std::env::temp_dir().join(format!("lmrun-state-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&root);
        Store::new(root)
    }

    fn state(id: &str) -> State {
        State {
            oci_version: "1.0.2".into(),
            id: id.into(),
            status: Status::Creating,
            bundle: "/bundle".into(),
            rootfs: "/bundle/rootfs".into(),
            created: String::new(),
            annotations: HashMap::new(),
            owner: "root".into(),
            init: None,
            streams: Vec::new(),
            mounts: Vec::new(),
            creator: Process::own(),
            cgroup: "/lmrun-x".into(),
            unit: None,
            hooks: None,
            restore: None,
            no_new_keyring: false,
            rdt: None,
        }
    }

    #[test]
    fn a_container_is_made_once_and_found_until_removed() {
        let store = store("once");
        let locked = store.create("a").unwrap();
        assert!(matches!(store.create("a"), Err(Error::Exists)));
        assert!(matches!(store.load("a"), Err(Error::NotFound)), "no state was saved yet");
        locked.save(&state("a")).unwrap();
        assert_eq!(store.load("a").unwrap().status, Status::Creating);
        assert_eq!(store.ids().unwrap(), ["a"]);
        assert_eq!(fs::read_dir(store.dir("a")).unwrap().count(), 2, "lock and state.json, no leftovers");
        locked.remove().unwrap();
        assert!(matches!(store.lock("a"), Err(Error::NotFound)));
        fs::remove_dir_all(store.root).unwrap();
    }

    #[test]
    fn ids_are_file_names() {
        for good in ["a", "a-b_c+d.e", "..."] {
            validate_id(good).unwrap();
        }
        for bad in ["", ".", "..", "a/b", "a b", "ä"] {
            assert!(matches!(validate_id(bad), Err(Error::InvalidId(_))), "{bad:?}");
        }
    }
}
