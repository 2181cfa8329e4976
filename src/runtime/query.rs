//! What a container is doing now, and stopping and resuming it.

use super::cgroup::Cgroup;
use super::state::{State, Status, Store};
use super::{Error, Result};

/// The status as it is, not as it was last saved.
pub fn status(state: &State) -> Status {
    let alive = state.init.is_some_and(|init| init.is_alive());
    match state.status {
        Status::Creating if alive || state.creator.is_alive() => Status::Creating,
        _ if !alive => Status::Stopped,
        _ if Cgroup::at(&state.cgroup).is_frozen() => Status::Paused,
        saved => saved,
    }
}

/// All containers that have a state, with their status. Those that vanish meanwhile are left out.
pub fn list(store: &Store) -> Result<Vec<(State, Status)>> {
    let mut containers = Vec::new();
    for id in store.ids()? {
        match store.load(&id) {
            Ok(state) => {
                let now = status(&state);
                containers.push((state, now));
            }
            Err(Error::NotFound) => {}
            Err(error) => tracing::warn!(id, error = super::chain(&error), "cannot read the state"),
        }
    }
    Ok(containers)
}

/// Stops all tasks of a running container.
pub fn pause(store: &Store, id: &str) -> Result<()> {
    let locked = store.lock(id)?;
    let state = locked.load()?;
    match status(&state) {
        Status::Running | Status::Created => Cgroup::at(&state.cgroup).freeze(),
        _ => Err(Error::WrongStatus("container not running")),
    }
}

/// Lets the tasks of a paused container run.
pub fn resume(store: &Store, id: &str) -> Result<()> {
    let locked = store.lock(id)?;
    let state = locked.load()?;
    match status(&state) {
        Status::Paused => Cgroup::at(&state.cgroup).thaw(),
        _ => Err(Error::WrongStatus("container not paused")),
    }
}
