//! Ending containers: signals, and the removal of all that was made.

use std::io;

use nix::sys::signal::Signal;

use super::cgroup::Cgroup;
use super::state::{Locked, State, Status, Store};
use super::{Error, Result, caller, hooks, settings, status};
use crate::engine;
use crate::sys::pidfd::PidFd;

/// Sends `signal` to the first process of container `id`, or with `all` to every process in it.
///
/// # Errors
/// [`Error::NotRunning`] where nobody is left to get the signal.
pub fn kill(store: &Store, id: &str, signal: i32, all: bool) -> Result<()> {
    let state = store.load(id)?;
    let targets = if all { Cgroup::at(&state.cgroup).pids()? } else { Vec::new() };
    let running = state.init.filter(|init| init.is_alive());
    if targets.is_empty() && running.is_none() {
        return Err(Error::NotRunning);
    }
    for pid in targets.into_iter().chain(running.map(|init| init.pid).filter(|_| !all)) {
        match send(pid, signal) {
            Ok(true) => {}
            Ok(false) if all => {}
            Ok(false) => return Err(Error::NotRunning),
            Err(source) => return Err(Error::Signal { pid, source }),
        }
    }
    Ok(())
}

/// Removes a stopped container, or with `force` any container, half-made ones included.
///
/// Podman calls this after a checkpoint, too, when the container is gone: then its peers stay silent.
///
/// # Errors
/// [`Error::NotFound`] (not with `force`), [`Error::StillRunning`], or what would not go away.
pub fn delete(store: &Store, id: &str, force: bool) -> Result<()> {
    caller::keep_descriptors(0)?;
    if force {
        // Whoever still makes the container holds its lock, fails now, and cleans up behind itself.
        match store.load(id) {
            Ok(state) if state.status == Status::Creating => kill_all(&state)?,
            _ => {}
        }
    }
    let locked = match store.lock(id) {
        Err(Error::NotFound) if force => return Ok(()),
        locked => locked?,
    };
    let state = match locked.load() {
        Ok(state) => state,
        // Killed before the first state was saved: only the directory was made.
        Err(Error::NotFound) if force => return locked.remove(),
        Err(error) => return Err(error),
    };
    let now = status(&state);
    if !force && !matches!(now, Status::Stopped | Status::Created) {
        return Err(Error::StillRunning { id: id.to_owned(), status: now });
    }
    remove(locked, &state)?;
    if settings::by_podman(&state.annotations) {
        engine::leave_bridges(Some(id));
    }
    Ok(())
}

/// Kills what still runs, runs the poststop hooks, removes cgroup and state.
pub(super) fn remove(locked: Locked, state: &State) -> Result<()> {
    kill_init(state)?;
    destroy_cgroup(state)?;
    if let Some(group) = &state.rdt {
        group.remove();
    }
    hooks::poststop(state);
    locked.remove()
}

/// Kills all that is in the container's cgroup, and removes that.
pub(super) fn destroy_cgroup(state: &State) -> Result<()> {
    let cgroup = Cgroup::at(&state.cgroup);
    if let Some(unit) = &state.unit {
        cgroup.kill_all()?;
        // systemd may have gone; the container goes all the same.
        if let Err(error) = unit.stop() {
            tracing::warn!(error = super::chain(&error), id = state.id, "cannot end the container's unit");
        }
    }
    cgroup.destroy()
}

/// Kills init, which takes its pid namespace with it, and all in the cgroup.
fn kill_all(state: &State) -> Result<()> {
    kill_init(state)?;
    Cgroup::at(&state.cgroup).kill_all()
}

fn kill_init(state: &State) -> Result<()> {
    match state.init.filter(|init| init.is_alive()) {
        None => Ok(()),
        Some(init) => {
            let sent = send(init.pid, Signal::SIGKILL as i32);
            sent.map(drop).map_err(|source| Error::Signal { pid: init.pid, source })
        }
    }
}

/// False where the process is gone.
fn send(pid: i32, signal: i32) -> io::Result<bool> {
    match PidFd::open(pid).and_then(|process| process.kill(signal)) {
        Ok(()) => Ok(true),
        Err(e) if e.raw_os_error() == Some(nix::libc::ESRCH) => Ok(false),
        Err(e) => Err(e),
    }
}
