//! What an exec'd process is to be: config.json's process, and what was asked for.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::super::bundle::Bundle;
use super::super::{Error, Result};

/// Where the process is described.
#[derive(Debug, Clone)]
pub enum ProcessSource {
    /// A file with the `process` of a config.json.
    File(PathBuf),
    /// That of the container's config.json, with these changes.
    Edits(Edits),
}

impl Default for ProcessSource {
    fn default() -> Self {
        ProcessSource::Edits(Edits::default())
    }
}

/// Changes to the process of config.json. What is None or empty stays.
#[derive(Debug, Clone, Default)]
pub struct Edits {
    pub args: Vec<String>,
    pub cwd: Option<String>,
    /// `NAME=VALUE`, behind those of config.json.
    pub env: Vec<String>,
    pub tty: bool,
    /// Uid, and gid.
    pub user: Option<(u32, Option<u32>)>,
    pub additional_gids: Vec<u32>,
    pub capabilities: Vec<String>,
    pub no_new_privileges: bool,
    pub apparmor: Option<String>,
    pub label: Option<String>,
}

/// What a process of its own has from the container, where it says nothing itself.
const INHERITED: [&str; 9] = [
    "capabilities",
    "rlimits",
    "noNewPrivileges",
    "apparmorProfile",
    "selinuxLabel",
    "oomScoreAdj",
    "scheduler",
    "ioPriority",
    "execCPUAffinity",
];

/// The container's bundle with the new process in place of its own.
pub(super) fn bundle(path: &Path, source: &ProcessSource) -> Result<Bundle> {
    let own = match source {
        ProcessSource::File(file) => {
            let json = fs::read(file).map_err(|e| Error::io(file, e))?;
            Some(serde_json::from_slice(&json).map_err(|e| Error::Process(format!("{}: {e}", file.display())))?)
        }
        ProcessSource::Edits(_) => None,
    };
    let bundle = Bundle::load_running(path, |process| match (own, source) {
        (Some(own), _) => *process = complete(own, process),
        (None, ProcessSource::Edits(edits)) => edits.apply(process),
        (None, ProcessSource::File(_)) => {}
    })?;
    let process = bundle.process()?;
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(Error::Process("args must not be empty".into()));
    }
    if process.cwd().as_os_str().is_empty() {
        return Err(Error::Process("Cwd property must not be empty".into()));
    }
    if !process.cwd().is_absolute() {
        return Err(Error::Process("Cwd must be an absolute path".into()));
    }
    Ok(bundle)
}

/// `process` with what it does not say itself from the container's.
fn complete(mut process: Value, containers: &Value) -> Value {
    let Some(members) = process.as_object_mut() else {
        return process;
    };
    let says_nothing = |value: &Value| {
        value.is_null() || value.as_array().is_some_and(Vec::is_empty) || value.as_str().is_some_and(str::is_empty)
    };
    for name in INHERITED {
        if members.get(name).is_none_or(says_nothing) {
            members.remove(name);
            members.extend(containers.get(name).map(|value| (name.to_owned(), value.clone())));
        }
    }
    process
}

impl Edits {
    fn apply(&self, process: &mut Value) {
        process["args"] = json!(self.args);
        process["terminal"] = json!(self.tty);
        append(&mut process["env"], self.env.iter().map(|pair| json!(pair)));
        if let Some(cwd) = &self.cwd {
            process["cwd"] = json!(cwd);
        }
        if let Some((uid, gid)) = self.user {
            process["user"]["uid"] = json!(uid);
            if let Some(gid) = gid {
                process["user"]["gid"] = json!(gid);
            }
        }
        append(&mut process["user"]["additionalGids"], self.additional_gids.iter().map(|gid| json!(gid)));
        if self.no_new_privileges {
            process["noNewPrivileges"] = json!(true);
        }
        for (name, value) in [("apparmorProfile", &self.apparmor), ("selinuxLabel", &self.label)] {
            if let Some(value) = value {
                process[name] = json!(value);
            }
        }
        if !self.capabilities.is_empty() {
            let sets = &mut process["capabilities"];
            let inheritable = sets["inheritable"].as_array().is_some_and(|set| !set.is_empty());
            // An ambient capability has to be inheritable, and runc makes none so here.
            let ambient = inheritable.then_some("ambient");
            for set in ["bounding", "effective", "permitted"].into_iter().chain(ambient) {
                append(&mut sets[set], self.capabilities.iter().map(|name| json!(name)));
            }
        }
    }
}

/// Adds to a list that may be missing.
fn append(list: &mut Value, more: impl Iterator<Item = Value>) {
    let mut all = list.as_array().cloned().unwrap_or_default();
    all.extend(more);
    *list = Value::from(all);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn containers() -> Value {
        json!({ "args": ["init"], "env": ["A=1"], "cwd": "/", "user": { "uid": 5, "gid": 6 }, "terminal": true,
            "capabilities": { "bounding": ["CAP_KILL"] }, "noNewPrivileges": true, "rlimits": [{ "type": "x" }] })
    }

    #[test]
    fn edits_are_laid_over_the_containers_process() {
        let mut process = containers();
        let edits = Edits {
            args: vec!["ls".into()],
            env: vec!["B=2".into()],
            user: Some((7, None)),
            additional_gids: vec![8],
            capabilities: vec!["CAP_CHOWN".into()],
            ..Edits::default()
        };
        edits.apply(&mut process);
        assert_eq!(process["args"], json!(["ls"]));
        assert_eq!(process["env"], json!(["A=1", "B=2"]));
        assert_eq!(process["user"], json!({ "uid": 7, "gid": 6, "additionalGids": [8] }));
        assert_eq!(process["terminal"], json!(false), "init's terminal is init's");
        assert_eq!(process["capabilities"]["bounding"], json!(["CAP_KILL", "CAP_CHOWN"]));
        assert_eq!(process["capabilities"]["ambient"], json!(null));
    }

    #[test]
    fn a_process_of_its_own_keeps_the_containers_fences() {
        let own = json!({ "args": ["ls"], "cwd": "/", "user": { "uid": 0, "gid": 0 }, "rlimits": null, "apparmorProfile": "" });
        let process = complete(own, &containers());
        assert_eq!(process["noNewPrivileges"], json!(true));
        assert_eq!(process["capabilities"], json!({ "bounding": ["CAP_KILL"] }));
        assert_eq!(process["rlimits"], json!([{ "type": "x" }]));
        assert_eq!(process.get("apparmorProfile"), None);
        assert_eq!(process.get("env"), None, "the environment is its own");
    }
}
