//! The hooks that libcontainer does not run for us, and the state that all hooks get.

use libcontainer::container::{ContainerStatus, State as HookState};
use libcontainer::hooks::run_hooks;
use oci_spec::runtime::Hook;

use super::chain;
use super::state::State;

/// What a hook reads on its standard input.
pub(super) fn state(state: &State, status: ContainerStatus) -> HookState {
    let pid = state.init.map(|init| init.pid);
    let mut hook_state = HookState::new(&state.id, status, pid, state.bundle.clone());
    hook_state.oci_version = state.oci_version.clone();
    hook_state.annotations = Some(state.annotations.clone());
    hook_state
}

pub(super) fn poststart(container: &State) {
    let hooks = container.hooks.as_ref().and_then(|hooks| hooks.poststart().as_deref());
    run_and_warn("poststart", hooks, &state(container, ContainerStatus::Running));
}

pub(super) fn poststop(container: &State) {
    let hooks = container.hooks.as_ref().and_then(|hooks| hooks.poststop().as_deref());
    let mut hook_state = state(container, ContainerStatus::Stopped);
    hook_state.pid = None;
    run_and_warn("poststop", hooks, &hook_state);
}

/// The runtime specification (Lifecycle, 9 and 13): when one of these fails, the runtime logs a warning
/// and goes on as if it had not.
fn run_and_warn(kind: &str, hooks: Option<&[Hook]>, state: &HookState) {
    for hook in hooks.unwrap_or_default() {
        if let Err(error) = run_hooks(Some(&vec![hook.clone()]), Some(state), None, None, None) {
            tracing::warn!(hook = %hook.path().display(), error = chain(&error), "{kind} hook failed");
        }
    }
}
