//! The hooks that libcontainer does not run for us, and the state that all hooks get.

use libcontainer::container::{ContainerStatus, State as HookState};
use libcontainer::hooks::run_hooks;
use oci_spec::runtime::Hook;

use super::state::State;
use super::{Error, Result, chain};

/// What a hook reads on its standard input.
pub(super) fn state(state: &State, status: ContainerStatus) -> HookState {
    let pid = state.init.map(|init| init.pid);
    let mut hook_state = HookState::new(&state.id, status, pid, state.bundle.clone());
    hook_state.oci_version = state.oci_version.clone();
    hook_state.annotations = Some(state.annotations.clone());
    hook_state
}

/// # Errors
/// The first hook that fails, where config.json is of version 1.3 or later: since then that ends the container. Before, it
/// was a warning.
pub(super) fn poststart(container: &State) -> Result<()> {
    let hooks = container.hooks.as_ref().and_then(|hooks| hooks.poststart().as_ref());
    let hook_state = state(container, ContainerStatus::Running);
    if ends_on_failure(&container.oci_version) {
        let ran = run_hooks(hooks, Some(&hook_state), None, None, None);
        return ran.map_err(|e| Error::Hook(format!("error running poststart hook: {}", chain(&e))));
    }
    run_and_warn("poststart", hooks.map(Vec::as_slice), &hook_state);
    Ok(())
}

fn ends_on_failure(version: &str) -> bool {
    let mut numbers = version.split(['.', '-']).map(|part| part.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (1_u32, 3_u32)
}

pub(super) fn poststop(container: &State) {
    let hooks = container.hooks.as_ref().and_then(|hooks| hooks.poststop().as_deref());
    let mut hook_state = state(container, ContainerStatus::Stopped);
    hook_state.pid = None;
    run_and_warn("poststop", hooks, &hook_state);
}

/// The runtime specification (Lifecycle, 13, and 9 before 1.3): when one of these fails, the runtime logs a warning
/// and goes on as if it had not.
fn run_and_warn(kind: &str, hooks: Option<&[Hook]>, state: &HookState) {
    for hook in hooks.unwrap_or_default() {
        if let Err(error) = run_hooks(Some(&vec![hook.clone()]), Some(state), None, None, None) {
            tracing::warn!(hook = %hook.path().display(), error = chain(&error), "{kind} hook failed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::ends_on_failure;

    #[test]
    fn a_config_gets_what_its_version_says() {
        assert!(["1.3.0", "1.3.1-dev", "1.10.0", "2.0.0"].into_iter().all(ends_on_failure));
        assert!(!["1.0.2", "1.0.2-dev", "1.2.1", ""].into_iter().any(ends_on_failure));
    }
}
