//! A container that is about to go on elsewhere: what its runtime knows of it, and its end here.

use std::fs::{self, File};
use std::path::PathBuf;

use nix::fcntl::{Flock, FlockArg};

use super::cgroup::Cgroup;
use super::settings::Settings;
use super::state::{State, Status, Store};
use super::throttle::Throttle;
use super::{Error, Result, delete, status, streams};
use crate::engine::departure::Departure;
use crate::engine::{self, Freezer, Subject};
use crate::sys::clock::{self, Shift};
use crate::sys::pidfd::PidFd;

/// Only one migration of a container at a time. The file stays; the lock goes with its holder.
const LOCK: &str = "departure.lock";

/// A running container of this host, that nobody else moves meanwhile.
#[derive(Debug)]
pub struct Leaving {
    store: Store,
    state: State,
    init: i32,
    shift: Shift,
    _lock: Flock<File>,
}

impl Leaving {
    /// # Errors
    /// [`Error::NotRunning`]; [`Error::Leaving`] where somebody moves it already.
    pub fn begin(store: &Store, id: &str) -> Result<Leaving> {
        let state = store.load(id)?;
        let (Status::Running, Some(init)) = (status(&state), state.init) else {
            return Err(Error::NotRunning);
        };
        let lock = alone(store, id)?;
        let shift = clock::shift_of(init.pid).map_err(|e| Error::io(format!("/proc/{}", init.pid), e))?;
        Ok(Leaving { store: store.clone(), state, init: init.pid, shift, _lock: lock })
    }

    pub fn state(&self) -> &State {
        &self.state
    }

    /// Host pid of its first process.
    pub fn init(&self) -> i32 {
        self.init
    }

    /// The runtime's directory of this container.
    pub fn dir(&self) -> PathBuf {
        self.store.dir(&self.state.id)
    }

    pub fn config(&self) -> Result<Vec<u8>> {
        let path = self.state.bundle.join("config.json");
        fs::read(&path).map_err(|e| Error::io(path, e))
    }

    /// Host pids of all that is in its cgroup.
    pub fn pids(&self) -> Result<Vec<i32>> {
        Cgroup::at(&self.state.cgroup).pids()
    }

    /// CLOCK_MONOTONIC and CLOCK_BOOTTIME as the container sees them now, in ns.
    pub fn clocks(&self) -> (i128, i128) {
        (clock::monotonic() + self.shift.monotonic, clock::boottime() + self.shift.boottime)
    }

    /// Files of the runtime's that go with the records.
    pub fn extra_files(&self) -> Vec<(String, Vec<u8>)> {
        vec![(streams::FILE.to_owned(), streams::links(&self.state.streams))]
    }

    /// The engine's side of it.
    pub fn depart(&self) -> Result<Departure> {
        // Read now, so that a fault in it is not found in the freeze.
        Settings::of(&self.state.annotations)?;
        let external = self.state.streams.iter().filter(|s| s.from_outside).map(|s| s.link.clone()).collect();
        let subject = Subject {
            id: self.state.id.clone(),
            init: self.init,
            dir: self.dir(),
            external,
            mounts: self.state.mounts.clone(),
        };
        Departure::begin(subject).map_err(Error::Engine)
    }

    /// The cgroup's freezer, which holds the container still without anybody.
    pub fn freezer(&self) -> Box<dyn Freezer> {
        Box::new(Cgroup::at(&self.state.cgroup))
    }

    /// What can slow it down.
    ///
    /// # Errors
    /// It has no processor controller.
    pub fn throttle(&self) -> Result<Throttle> {
        Throttle::of(&Cgroup::at(&self.state.cgroup))
    }

    /// What is left of a container whose processes have ended.
    pub fn remove(self) -> Result<()> {
        let locked = self.store.lock(&self.state.id)?;
        delete::remove(locked, &self.state)
    }
}

/// Keeps everybody else from moving a container, and from settling its migration.
///
/// # Errors
/// [`Error::Leaving`] where somebody does.
pub fn alone(store: &Store, id: &str) -> Result<Flock<File>> {
    let path = store.dir(id).join(LOCK);
    let lock = File::create(&path).map_err(|e| Error::io(&path, e))?;
    Flock::lock(lock, FlockArg::LockExclusiveNonblock).map_err(|_| Error::Leaving)
}

/// Host pid of the first process of a container that was left frozen.
pub fn init(store: &Store, id: &str) -> Result<i32> {
    store.load(id)?.init.filter(|init| init.is_alive()).map(|init| init.pid).ok_or(Error::NotRunning)
}

/// Puts a container that was left frozen back to work.
///
/// # Errors
/// [`Error::NotFound`], or what its freezer says.
pub fn thaw(store: &Store, id: &str) -> Result<()> {
    Cgroup::at(&store.load(id)?.cgroup).thaw()
}

/// Lets a container run that has arrived, and whose receiver has died before it could. Does no harm to one that runs.
///
/// # Errors
/// [`Error::NotFound`]; what the kernel says.
pub fn set_going(store: &Store, id: &str) -> Result<()> {
    let cgroup = Cgroup::at(&store.load(id)?.cgroup);
    if cgroup.is_frozen() {
        engine::revive(&cgroup.pids()?).map_err(Error::Engine)?;
        cgroup.thaw()?;
    }
    Ok(())
}

/// Kills what is left frozen of a container: it runs elsewhere.
pub fn kill(store: &Store, id: &str) -> Result<()> {
    kill_frozen(&store.load(id)?)
}

/// As [`kill`], and nothing is left.
pub fn end(store: &Store, id: &str) -> Result<()> {
    let locked = store.lock(id)?;
    let state = locked.load()?;
    kill_frozen(&state)?;
    delete::remove(locked, &state)
}

fn kill_frozen(state: &State) -> Result<()> {
    // Killed first, so that nobody runs when it is thawed.
    if let Some(init) = state.init.filter(|init| init.is_alive()) {
        let killed = PidFd::open(init.pid).and_then(|init| init.kill(libc::SIGKILL));
        killed.map_err(|source| Error::Signal { pid: init.pid, source })?;
    }
    let cgroup = Cgroup::at(&state.cgroup);
    for pid in cgroup.pids()? {
        let _ = PidFd::open(pid).and_then(|task| task.kill(libc::SIGKILL));
    }
    if cgroup.is_frozen() { cgroup.thaw() } else { Ok(()) }
}
