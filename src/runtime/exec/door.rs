//! The way into the container's cgroup, in all hierarchies it is in.
//!
//! Moving a process makes the kernel wait for all forks of the machine. A process is therefore *born* in the
//! cgroup of version 2 (clone3(2)), and in those of version 1 it moves itself by the file `tasks`, for which the
//! kernel need not wait.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::unistd::Pid;

use super::super::cgroup::{Cgroup, is_denied};
use super::super::state::State;
use super::super::systemd::Unit;
use super::super::{Error, Result};
use crate::sys::fork;

/// Directories of the cgroup that a process is to be in.
pub(super) struct Door {
    unified: Option<PathBuf>,
    version1: Vec<PathBuf>,
    /// Where to go when the cgroup takes no processes: it has become an inner one. None where somebody has chosen it.
    inits: Option<PathBuf>,
    /// The caller may lack the right to put a process there.
    rootless: bool,
    /// Then systemd can do it for him.
    unit: Option<Unit>,
}

impl Door {
    /// `chosen` as in [`ExecOptions::cgroups`](super::ExecOptions::cgroups).
    pub fn to(state: &State, chosen: &[String], rootless: bool) -> Result<Self> {
        let chosen = chosen.iter().map(|text| Chosen::parse(text)).collect::<Result<Vec<_>>>()?;
        let unit = state.unit.clone();
        let mut door = Door { unified: None, version1: Vec::new(), inits: None, rootless, unit };
        for (dir, unified) in Cgroup::at(&state.cgroup).dirs()? {
            let below = chosen.iter().find(|chosen| chosen.means(&dir, unified));
            let place = below.map_or(dir.clone(), |chosen| dir.join(&chosen.path));
            if unified {
                // Beside version 1 controllers, nobody but lmrun makes a cgroup there.
                let hybrid = !door.version1.is_empty();
                door.unified = Some(if hybrid && !place.is_dir() { dir } else { place });
                door.inits =
                    state.init.filter(|_| below.is_none()).map(|init| format!("/proc/{}/cgroup", init.pid).into());
            } else {
                door.version1.push(place);
            }
        }
        for place in door.version1.iter().chain(&door.unified) {
            if !place.is_dir() {
                return Err(Error::SubCgroup(place.display().to_string()));
            }
        }
        Ok(door)
    }

    /// Forks a child into the version 2 cgroup.
    pub fn fork(&self, work: impl FnOnce() -> i32) -> io::Result<Pid> {
        let Some(dir) = &self.unified else {
            return fork::child(work);
        };
        let mut work = Some(work);
        let mut run = || work.take().map_or(101, |work| work());
        match fork::child_in(0, Some(File::open(dir)?.as_fd()), &mut run) {
            Err(e) if e.raw_os_error() == Some(Errno::EBUSY as i32) => {
                let dir = self.inits.as_deref().and_then(|file| inits_directory(file, dir)).ok_or(e)?;
                fork::child_in(0, Some(File::open(dir)?.as_fd()), &mut run)
            }
            // Without systemd it stays where it is, as under runc.
            Err(e) if self.rootless && is_denied(&e) => match &self.unit {
                Some(unit) => unit.fork(0, run),
                None => fork::child(run),
            },
            forked => forked,
        }
    }

    /// Moves the calling process, which has one thread, into the version 1 cgroups.
    pub fn enter_version1(&self) -> io::Result<()> {
        self.version1.iter().try_for_each(|dir| match fs::write(dir.join("tasks"), "0") {
            Err(e) if self.rootless && is_denied(&e) => Ok(()),
            entered => entered,
        })
    }
}

/// The directory of init's own cgroup in the hierarchy that `dir` is in.
fn inits_directory(file: &Path, dir: &Path) -> Option<PathBuf> {
    let text = fs::read_to_string(file).ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    dir.ancestors().map(|mount| mount.join(path)).find(|place| place.starts_with(dir) && place.is_dir())
}

/// One `--cgroup`.
#[derive(Debug, PartialEq, Eq)]
struct Chosen {
    /// Empty: all.
    controllers: Vec<String>,
    /// Relative.
    path: PathBuf,
}

impl Chosen {
    fn parse(text: &str) -> Result<Self> {
        let (controllers, path) = text.split_once(':').unwrap_or(("", text));
        let path = path.trim_start_matches('/');
        if Path::new(path).components().any(|part| part == Component::ParentDir) {
            return Err(Error::SubCgroup(text.to_owned()));
        }
        let controllers = controllers.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect();
        Ok(Chosen { controllers, path: path.into() })
    }

    /// Whether it is about the hierarchy in which `dir` is. Those of version 1 are mounted by their controllers' names.
    fn means(&self, dir: &Path, unified: bool) -> bool {
        let mount = dir.strip_prefix("/sys/fs/cgroup").ok().and_then(|path| path.components().next());
        let names = mount.map(|name| name.as_os_str().to_string_lossy()).filter(|_| !unified).unwrap_or_default();
        self.controllers.is_empty() || self.controllers.iter().any(|wanted| names.split(',').any(|name| name == wanted))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroups_are_chosen_as_runc_has_it() {
        let chosen = Chosen::parse("cpu,memory:/a/b").unwrap();
        assert_eq!(chosen, Chosen { controllers: vec!["cpu".into(), "memory".into()], path: "a/b".into() });
        assert!(chosen.means(Path::new("/sys/fs/cgroup/cpu,cpuacct/x"), false));
        assert!(!chosen.means(Path::new("/sys/fs/cgroup/pids/x"), false));
        assert!(Chosen::parse("a").unwrap().means(Path::new("/sys/fs/cgroup/x"), true));
        assert!(matches!(Chosen::parse("../x"), Err(Error::SubCgroup(_))));
    }
}
