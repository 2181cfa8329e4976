//! The container's cgroup, in every hierarchy that is mounted: where it is, who is in it, how to
//! stop, kill and remove it.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::path::{Component, Path, PathBuf};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use libcgroups::common::CgroupConfig;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxResources};

use super::systemd::Unit;
use super::{Error, Result, devices, update};
use crate::sys::pidfd::PidFd;
use crate::sys::{bpf, fork};

/// How long a killed or frozen cgroup may take to come to rest.
const PATIENCE: Duration = Duration::from_secs(10);

/// A cgroup by its path below the mount points of the hierarchies.
#[derive(Debug, Clone)]
pub struct Cgroup {
    path: PathBuf,
}

/// One mounted hierarchy.
#[derive(Debug)]
pub struct Hierarchy {
    pub mount: PathBuf,
    /// cgroup2, on its own or beside version 1 controllers.
    pub unified: bool,
}

impl Cgroup {
    /// The cgroup of container `id`: what config.json says, read from the root of each hierarchy, or `/lmrun-<id>`.
    ///
    /// # Errors
    /// [`Error::CgroupPath`] for a path that is a hierarchy's root or leads out of it: lmrun kills and
    /// removes what it finds there.
    pub fn of_container(configured: Option<&Path>, id: &str) -> Result<Self> {
        let path = match configured.filter(|p| !p.as_os_str().is_empty()) {
            None => PathBuf::from(format!("/lmrun-{id}")),
            Some(path) => Path::new("/").join(path),
        };
        let named = path.components().filter(|c| matches!(c, Component::Normal(_))).count();
        if named == 0 || path.components().any(|c| c == Component::ParentDir) {
            return Err(Error::CgroupPath(path));
        }
        Ok(Cgroup { path })
    }

    /// A cgroup whose path was checked when its container was made.
    pub fn at(path: &Path) -> Self {
        Cgroup { path: path.to_owned() }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its directory in the hierarchy mounted at `mount`.
    pub fn below(&self, mount: &Path) -> PathBuf {
        below(mount, &self.path)
    }

    /// What libcontainer wants to be told; it makes no cgroup here.
    pub fn config(&self, id: &str) -> CgroupConfig {
        CgroupConfig { cgroup_path: self.path.clone(), systemd_cgroup: false, container_name: id.to_owned() }
    }

    /// Makes the cgroup in every hierarchy, with its limits. `unit`: whose it is, if systemd's. `rootless`: the container is
    /// left out of hierarchies that the caller has no right to, as under runc.
    ///
    /// # Errors
    /// What the kernel says; with `rootless` [`Error::RootlessLimit`] for a limit that takes a cgroup which there is not.
    pub fn make(&self, resources: Option<&LinuxResources>, unit: Option<&Unit>, rootless: bool) -> Result<Birthplace> {
        let hierarchies = hierarchies()?;
        let mut birthplace = Birthplace { rootless, unit: unit.cloned(), ..Birthplace::default() };
        for hierarchy in hierarchies {
            match self.make_in(hierarchy, hierarchies.len() == 1, &mut birthplace) {
                Err(Error::Io { source, .. }) if rootless && is_denied(&source) => {}
                made => made?,
            }
        }
        match resources.map_or(Ok(()), |resources| self.limit(resources)) {
            // Who may not make the nodes has no use for devices that he does not own.
            Err(Error::Devices { .. }) if rootless => {}
            Err(Error::NoController(limit)) if rootless => return Err(Error::RootlessLimit(limit)),
            Err(Error::Io { source, path }) if rootless && is_denied(&source) => {
                return Err(Error::RootlessLimit(path.display().to_string()));
            }
            limited => limited?,
        }
        Ok(birthplace)
    }

    fn make_in(&self, hierarchy: &Hierarchy, alone: bool, birthplace: &mut Birthplace) -> Result<()> {
        let dir = self.below(&hierarchy.mount);
        fs::create_dir_all(&dir).map_err(|e| Error::io(&dir, e))?;
        if hierarchy.unified {
            // Beside version 1 controllers there is no use for those that are left.
            if alone {
                hand_down_controllers(&hierarchy.mount, &self.path);
            }
            birthplace.unified = Some(File::open(&dir).map_err(|e| Error::io(&dir, e))?);
        } else {
            if dir.join("cpuset.cpus").exists() {
                hand_down_cpus(&hierarchy.mount, &self.path)?;
            }
            let tasks = dir.join("tasks");
            let file = File::options().write(true).open(&tasks).map_err(|e| Error::io(&tasks, e))?;
            birthplace.version1.push(file);
        }
        Ok(())
    }

    fn limit(&self, resources: &LinuxResources) -> Result<()> {
        update::limit(&self.path, resources)?;
        let Some(rules) = resources.devices().as_deref() else {
            return Ok(());
        };
        let Some(version1) = hierarchies()?.iter().find(|h| h.mount.ends_with("devices")) else {
            return self.restrict_devices(rules);
        };
        let dir = self.below(&version1.mount);
        devices::version1(rules).into_iter().try_for_each(|(allow, line)| {
            let file = dir.join(if allow { "devices.allow" } else { "devices.deny" });
            // Without the directory there are no rules; only who has no right to make it gets this far then.
            match fs::write(&file, line) {
                Err(e) if e.kind() == ErrorKind::NotFound => Ok(()),
                written => written.map_err(|e| Error::io(&file, e)),
            }
        })
    }

    /// Restricts the use of devices where there is no version 1 controller for it.
    fn restrict_devices(&self, rules: &[LinuxDeviceCgroup]) -> Result<()> {
        let Some(unified) = hierarchies()?.iter().find(|h| h.unified) else {
            return Ok(());
        };
        let path = below(&unified.mount, &self.path);
        let dir = match File::open(&path) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            opened => opened.map_err(|e| Error::io(&path, e))?,
        };
        bpf::attach_device_program(&dir, &devices::program(rules)).map_err(|errno| Error::Devices { path, errno })
    }

    /// The pids in this cgroup and below it, each once.
    pub fn pids(&self) -> Result<Vec<i32>> {
        let mut pids = Vec::new();
        for (dir, _) in self.dirs()? {
            for dir in with_children(&dir) {
                let procs = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
                pids.extend(procs.lines().filter_map(|pid| pid.parse::<i32>().ok()));
            }
        }
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    /// Kills all processes, waits until they are gone, removes the directories. A cgroup that does not exist
    /// is no error; the caller itself is never killed.
    ///
    /// # Errors
    /// [`Error::CgroupBusy`] with the pids that would not die.
    pub fn destroy(&self) -> Result<()> {
        // Mostly all have ended, and nothing lies below.
        if self.dirs()?.iter().all(|(dir, _)| fs::remove_dir(dir).is_ok()) {
            return Ok(());
        }
        self.kill_all()?;
        for (dir, _) in self.dirs()? {
            let mut dirs = with_children(&dir);
            dirs.reverse();
            for dir in dirs {
                remove_dir(&dir)?;
            }
        }
        Ok(())
    }

    /// Kills all processes but the caller and waits until they are gone.
    pub fn kill_all(&self) -> Result<()> {
        let own = std::process::id().cast_signed();
        let deadline = Instant::now() + PATIENCE;
        for (dir, unified) in self.dirs()? {
            // A task frozen by version 1 dies only when it thaws.
            if !unified && dir.join("freezer.state").exists() {
                let _ = fs::write(dir.join("freezer.state"), "THAWED");
            }
        }
        loop {
            let mut pids = self.pids()?;
            pids.retain(|pid| *pid != own);
            if pids.is_empty() {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(Error::CgroupBusy { path: self.path.clone(), pids });
            }
            let tasks: Vec<_> = pids.iter().filter_map(|pid| PidFd::open(*pid).ok()).collect();
            for task in &tasks {
                let _ = task.kill(Signal::SIGKILL as i32);
            }
            // A child forked meanwhile is not in the list: look again when these are gone.
            for task in &tasks {
                let _ = task.wait_end(Duration::from_millis(100));
            }
        }
    }

    /// Stops all tasks with the version 2 freezer where the container is in that hierarchy, else with
    /// version 1's, and waits until all have stopped. On failure all run again.
    pub fn freeze(&self) -> Result<()> {
        let freezer = self.freezer()?;
        let frozen = freezer.write(true).and_then(|()| freezer.wait_frozen());
        if frozen.is_err() {
            let _ = freezer.write(false);
        }
        frozen.map_err(|source| Error::Freezer { path: freezer.dir, source })
    }

    /// Lets all tasks run again.
    pub fn thaw(&self) -> Result<()> {
        let freezer = self.freezer()?;
        freezer.write(false).map_err(|source| Error::Freezer { path: freezer.dir, source })
    }

    /// Whether [`freeze`](Self::freeze) was called last. A cgroup without a freezer is not frozen.
    pub fn is_frozen(&self) -> bool {
        self.freezer().is_ok_and(|freezer| freezer.is_set())
    }

    fn freezer(&self) -> Result<Freezer> {
        let mut dirs = self.dirs()?;
        dirs.sort_by_key(|(_, unified)| !unified);
        dirs.into_iter()
            .map(|(dir, unified)| Freezer { dir, unified })
            .find(|freezer| freezer.file().exists())
            .ok_or_else(|| Error::NoFreezer(self.path.clone()))
    }

    /// The directories that exist, with whether each is in the unified hierarchy.
    pub fn dirs(&self) -> Result<Vec<(PathBuf, bool)>> {
        let hierarchies = hierarchies()?.iter();
        Ok(hierarchies.map(|h| (below(&h.mount, &self.path), h.unified)).filter(|(dir, _)| dir.is_dir()).collect())
    }
}

/// A cgroup that is ready for its first process.
#[derive(Debug, Default)]
pub struct Birthplace {
    /// Its directory in the unified hierarchy, in which a process can be born.
    pub unified: Option<File>,
    /// Its lists of threads in the others.
    version1: Vec<File>,
    /// The caller may lack the right to put a process there.
    rootless: bool,
    /// Then systemd can do it for him.
    unit: Option<Unit>,
}

impl Birthplace {
    /// Forks a child into the unified hierarchy, as [`fork::child_in`] does.
    pub fn fork(&self, namespaces: u64, work: impl FnOnce() -> i32) -> io::Result<Pid> {
        let mut work = Some(work);
        let mut run = || work.take().map_or(101, |work| work());
        match fork::child_in(namespaces, self.unified.as_ref().map(AsFd::as_fd), &mut run) {
            Err(e) if self.rootless && self.unified.is_some() && is_denied(&e) => match &self.unit {
                Some(unit) => unit.fork(namespaces, run),
                None => fork::child_in(namespaces, None, run),
            },
            forked => forked,
        }
    }

    /// The caller, which has one thread, enters the hierarchies of version 1. A thread that moves itself alone does not wait
    /// for an RCU grace period (kernel/cgroup/cgroup.c, cgroup_procs_write_start), as any other move does.
    pub fn enter_version1(&self) -> io::Result<()> {
        self.version1.iter().try_for_each(|mut tasks| match tasks.write_all(b"0") {
            Err(e) if self.rootless && is_denied(&e) => Ok(()),
            entered => entered,
        })
    }
}

pub(super) fn is_denied(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem)
}

/// The freezer's files in one directory. Documentation/admin-guide/cgroup-v2.rst (cgroup.freeze) and
/// cgroup-v1/freezer-subsystem.rst.
struct Freezer {
    dir: PathBuf,
    unified: bool,
}

impl Freezer {
    fn file(&self) -> PathBuf {
        self.dir.join(if self.unified { "cgroup.freeze" } else { "freezer.state" })
    }

    fn write(&self, frozen: bool) -> io::Result<()> {
        let value = match (self.unified, frozen) {
            (true, true) => "1",
            (true, false) => "0",
            (false, true) => "FROZEN",
            (false, false) => "THAWED",
        };
        fs::write(self.file(), value)
    }

    fn is_set(&self) -> bool {
        fs::read_to_string(self.file()).is_ok_and(|value| matches!(value.trim(), "1" | "FROZEN" | "FREEZING"))
    }

    fn wait_frozen(&self) -> io::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let events = self.dir.join("cgroup.events");
        while Instant::now() < deadline {
            if self.unified {
                let file = File::open(&events)?;
                if io::read_to_string(&file)?.lines().any(|line| line == "frozen 1") {
                    return Ok(());
                }
                let mut wait = [PollFd::new(file.as_fd(), PollFlags::POLLPRI)];
                poll(&mut wait, PollTimeout::from(100_u8))?;
            } else {
                if fs::read_to_string(self.file())?.trim() == "FROZEN" {
                    return Ok(());
                }
                // Version 1 has no event, and looks again for late comers when it is written.
                thread::sleep(Duration::from_millis(1));
                self.write(true)?;
            }
        }
        Err(io::Error::new(ErrorKind::TimedOut, "tasks do not stop"))
    }
}

/// The mounted hierarchies, each by its first mount that shows it from its top. Read once: they stay while lmrun runs.
pub fn hierarchies() -> Result<&'static [Hierarchy]> {
    static FOUND: OnceLock<Vec<Hierarchy>> = OnceLock::new();
    if FOUND.get().is_none() {
        let path = "/proc/self/mountinfo";
        let mountinfo = fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
        FOUND.get_or_init(|| parse_hierarchies(&mountinfo));
    }
    Ok(FOUND.get().map_or(&[], Vec::as_slice))
}

/// proc_pid_mountinfo(5): `id parent major:minor root mount options [tags] - type source options`.
fn parse_hierarchies(mountinfo: &str) -> Vec<Hierarchy> {
    let mut seen = Vec::new();
    let mut found = Vec::new();
    for line in mountinfo.lines() {
        let Some((before, after)) = line.split_once(" - ") else {
            continue;
        };
        let unified = match after.split(' ').next() {
            Some("cgroup2") => true,
            Some("cgroup") => false,
            _ => continue,
        };
        let mut fields = before.split(' ').skip(2);
        let (Some(device), Some(_root), Some(mount)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        // What is mounted elsewhere belongs to somebody else (CRIU keeps mounts of its own).
        if mount.starts_with("/sys/fs/cgroup") && !seen.contains(&device) {
            seen.push(device);
            found.push(Hierarchy { mount: PathBuf::from(mount), unified });
        }
    }
    found
}

fn below(mount: &Path, path: &Path) -> PathBuf {
    mount.join(path.strip_prefix("/").unwrap_or(path))
}

/// Enables the controllers of the root for all that is below it, down to `path`. Best effort: a limit that wants one
/// which is not to be had fails by itself.
fn hand_down_controllers(mount: &Path, path: &Path) {
    let available = fs::read_to_string(mount.join("cgroup.controllers")).unwrap_or_default();
    let mut parents: Vec<_> = path.ancestors().skip(1).collect();
    parents.reverse();
    for parent in parents {
        let file = below(mount, parent).join("cgroup.subtree_control");
        let enabled = fs::read_to_string(&file).unwrap_or_default();
        for controller in available.split_whitespace().filter(|c| !enabled.split_whitespace().any(|e| e == *c)) {
            let _ = fs::write(&file, format!("+{controller}"));
        }
    }
}

/// cpuset(7): a new cgroup has no processors and no memory, and takes no process until it has.
fn hand_down_cpus(mount: &Path, path: &Path) -> Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let io = |path: &Path| {
            let path = path.to_owned();
            move |e| Error::io(path, e)
        };
        let mut given = String::new();
        let mut dirs: Vec<_> = path.ancestors().map(|dir| below(mount, dir)).collect();
        dirs.reverse();
        for dir in dirs {
            let file = dir.join(file);
            let own = fs::read_to_string(&file).map_err(io(&file))?;
            if own.trim().is_empty() {
                fs::write(&file, &given).map_err(io(&file))?;
            } else {
                given = own;
            }
        }
    }
    Ok(())
}

/// `dir` and all directories below it, parents first.
fn with_children(dir: &Path) -> Vec<PathBuf> {
    let mut all = vec![dir.to_owned()];
    let mut next = 0;
    while next < all.len() {
        if let Ok(entries) = fs::read_dir(&all[next]) {
            let children = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            all.extend(children.map(|entry| entry.path()));
        }
        next += 1;
    }
    all
}

/// A task leaves its cgroup a moment after its end can be seen: EBUSY passes by itself. Not waited for by cgroup.events,
/// which version 1 has not, and of which the kernel tells once in 10 ms at most (kernel/cgroup/cgroup.c,
/// CGROUP_FILE_NOTIFY_MIN_INTV): that is longer than many a container lives.
fn remove_dir(dir: &Path) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let mut pause = Duration::from_micros(50);
    loop {
        match fs::remove_dir(dir) {
            Ok(()) => return Ok(()),
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            Err(e) if e.kind() == ErrorKind::ResourceBusy && Instant::now() < deadline => {
                thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(5));
            }
            Err(e) => return Err(Error::io(dir, e)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path_of(configured: &str) -> Result<PathBuf> {
        Cgroup::of_container(Some(Path::new(configured)), "c1").map(|c| c.path)
    }

    #[test]
    fn where_a_container_goes() {
        assert_eq!(Cgroup::of_container(None, "c1").unwrap().path(), Path::new("/lmrun-c1"));
        assert_eq!(path_of("/docker/c1").unwrap(), Path::new("/docker/c1"));
        assert_eq!(path_of("docker/c1").unwrap(), Path::new("/docker/c1"));
        assert_eq!(path_of("system.slice:docker:ab").unwrap(), Path::new("/system.slice:docker:ab"));
    }

    #[test]
    fn a_hierarchys_root_is_nobodys_cgroup() {
        for bad in ["/", "//", ".", "/a/../..", "../x"] {
            assert!(matches!(path_of(bad), Err(Error::CgroupPath(_))), "{bad}");
        }
    }

    #[test]
    fn foreign_and_repeated_mounts_do_not_count() {
        let mountinfo = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
            32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime shared:3 - cgroup cgroup rw,cpu\n\
            33 31 0:29 / /sys/fs/cgroup/cpuacct rw - cgroup cgroup rw,cpu\n\
            34 31 0:30 / /tmp/.yard/net_prio rw - cgroup cgroup rw,net_prio\n\
            41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let found: Vec<_> = parse_hierarchies(mountinfo).into_iter().map(|h| (h.mount, h.unified)).collect();
        assert_eq!(found, [("/sys/fs/cgroup/cpu".into(), false), ("/sys/fs/cgroup/unified".into(), true)]);
    }
}
