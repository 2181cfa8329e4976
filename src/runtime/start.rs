//! Letting a created container go.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use libcontainer::notify_socket::NotifySocket;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::stat::Mode;

use super::create::{NOTIFY_SOCKET, START_REPORT};
use super::state::{Locked, State, Status, Store};
use super::{Error, Result, caller, chain, delete, hooks, restore, status};

/// Starts the workload of container `id`.
///
/// # Errors
/// [`Error::WrongStatus`] where the container is not `created`; why the workload could not be executed.
pub fn start(store: &Store, id: &str) -> Result<()> {
    caller::keep_descriptors(0)?;
    let locked = store.lock(id)?;
    let mut state = locked.load()?;
    match status(&state) {
        Status::Created => match start_locked(&locked, &mut state) {
            // The lifecycle goes on with the container's end (runtime specification, 9 and 12).
            Err(hook @ Error::Hook(_)) => delete::remove(locked, &state).and(Err(hook)),
            started => started,
        },
        Status::Stopped => Err(Error::WrongStatus("cannot start a container that has stopped")),
        _ => Err(Error::WrongStatus("cannot start an already running container")),
    }
}

pub(super) fn start_locked(locked: &Locked, state: &mut State) -> Result<()> {
    match (state.restore.take(), state.init) {
        (Some(pending), Some(init)) => restore::complete(locked.dir(), state, init.pid, &pending)?,
        _ => start_workload(locked)?,
    }
    for used in [START_REPORT, NOTIFY_SOCKET] {
        let _ = fs::remove_file(locked.dir().join(used));
    }
    state.status = Status::Running;
    locked.save(state)?;
    hooks::poststart(state)
}

fn start_workload(locked: &Locked) -> Result<()> {
    let path = locked.dir().join(START_REPORT);
    // Opening must not wait for an init that has died.
    let report = open(&path, OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC, Mode::empty())
        .and_then(|fd| fcntl(&fd, FcntlArg::F_SETFL(OFlag::empty())).map(|_| fd));
    let mut report = File::from(report.map_err(|e| Error::io(&path, e.into()))?);
    go(locked.dir())?;
    let mut failure = String::new();
    report.read_to_string(&mut failure).map_err(|e| Error::io(&path, e))?;
    if !failure.is_empty() {
        return Err(Error::Init(failure));
    }
    Ok(())
}

/// Wakes the init that waits at the end of libcontainer's work.
pub(super) fn go(dir: &Path) -> Result<()> {
    NotifySocket::new(dir.join(NOTIFY_SOCKET)).notify_container_start().map_err(|e| Error::Libcontainer(chain(&e)))
}
