//! `lmrun state`

use super::report::Failure;
use crate::runtime::{self, State, Status, Store};

/// Print the state of a container as JSON
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The name of the container
    id: String,
}

impl Args {
    pub fn run(&self, store: &Store) -> Result<u8, Failure> {
        let state =
            store.load(&self.id).map_err(|e| Failure::new(format!("cannot tell the state of {}", self.id), e))?;
        println!("{:#}", json(&state, runtime::status(&state)));
        Ok(0)
    }
}

/// The members of runc's output. The pid is 0 once the container has stopped.
pub fn json(state: &State, status: Status) -> serde_json::Value {
    let pid = state.init.filter(|_| status != Status::Stopped).map_or(0, |init| init.pid);
    let mut json = serde_json::json!({
        "ociVersion": state.oci_version,
        "id": state.id,
        "pid": pid,
        "status": status,
        "bundle": state.bundle,
        "rootfs": state.rootfs,
        "created": state.created,
        "owner": state.owner,
    });
    if !state.annotations.is_empty() {
        json["annotations"] = serde_json::json!(state.annotations);
    }
    json
}

#[cfg(test)]
mod tests {
    use super::super::{Cli, Command};
    use clap::Parser;

    #[test]
    fn takes_one_id() {
        assert!(matches!(Cli::try_parse_from(["lmrun", "state", "c"]).unwrap().command, Command::State(_)));
    }
}
