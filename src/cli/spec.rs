//! `lmrun spec`

use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;

use nix::unistd::{getegid, geteuid};
use serde_json::{Value, json};

use super::report::Failure;

/// The container that runc's `spec` describes: a shell on a read-only root.
const CONFIG: &str = include_str!("spec.json");

/// Write a config.json to start from
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Directory for config.json
    #[arg(short, long, default_value = ".")]
    bundle: PathBuf,
    /// For a container that the caller can run without being root
    #[arg(long)]
    rootless: bool,
}

impl Args {
    pub fn run(&self) -> Result<u8, Failure> {
        let path = self.bundle.join("config.json");
        let config = if self.rootless {
            let json = serde_json::from_str(CONFIG).and_then(|config| serde_json::to_string_pretty(&rootless(config)));
            json.map_err(|e| Failure::new("cannot write a config.json", e))?
        } else {
            CONFIG.to_owned()
        };
        let written = OpenOptions::new()
            .create_new(true)
            .write(true)
            .open(&path)
            .and_then(|mut file| file.write_all(config.as_bytes()));
        written.map_err(|e| Failure::new(format!("cannot write {}", path.display()), e))?;
        Ok(0)
    }
}

/// What a user can have: a user namespace with their own ids as root's, the host's network and /sys, no limits.
fn rootless(mut config: Value) -> Value {
    let linux = &mut config["linux"];
    if let Some(namespaces) = linux["namespaces"].as_array_mut() {
        namespaces.retain(|namespace| namespace["type"] != "network");
        namespaces.push(json!({ "type": "user" }));
    }
    linux["uidMappings"] = json!([{ "containerID": 0, "hostID": geteuid().as_raw(), "size": 1 }]);
    linux["gidMappings"] = json!([{ "containerID": 0, "hostID": getegid().as_raw(), "size": 1 }]);
    if let Some(linux) = linux.as_object_mut() {
        linux.remove("resources");
    }
    for mount in config["mounts"].as_array_mut().into_iter().flatten() {
        if mount["destination"] == "/sys" {
            *mount = json!({ "destination": "/sys", "type": "none", "source": "/sys",
                "options": ["rbind", "nosuid", "noexec", "nodev", "ro"] });
        }
        // Ids that are not mapped.
        if let Some(options) = mount["options"].as_array_mut() {
            let has_id =
                |option: &Value| option.as_str().is_some_and(|o| o.starts_with("gid=") || o.starts_with("uid="));
            options.retain(|option| !has_id(option));
        }
    }
    config
}

#[cfg(test)]
mod tests {
    use super::{CONFIG, rootless};
    use oci_spec::runtime::Spec;

    #[test]
    fn rootless_specs_map_the_caller_and_leave_its_network() {
        let config = rootless(serde_json::from_str(CONFIG).unwrap());
        let spec: Spec = serde_json::from_value(config.clone()).unwrap();
        let linux = spec.linux().as_ref().unwrap();
        assert_eq!(linux.uid_mappings().as_ref().unwrap()[0].host_id(), nix::unistd::geteuid().as_raw());
        assert!(!config.to_string().contains("gid=") && !config.to_string().contains("\"network\""));
    }

    #[test]
    fn the_text_is_a_spec_of_version_1() {
        let spec: Spec = serde_json::from_str(CONFIG).unwrap();
        assert!(spec.version().starts_with("1."));
        assert_eq!(spec.process().as_ref().unwrap().args().as_deref(), Some(&["sh".to_owned()][..]));
    }
}
