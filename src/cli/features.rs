//! `lmrun features`

use serde_json::{Value, json};

use super::report::Failure;
use crate::runtime;

/// Print what lmrun can do, as the runtime specification's features.json
#[derive(Debug, clap::Args)]
pub struct Args {}

impl Args {
    pub fn run(&self) -> Result<u8, Failure> {
        println!("{:#}", features());
        Ok(0)
    }
}

/// features.md of the runtime specification.
fn features() -> Value {
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.3.0",
        "hooks": ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"],
        "mountOptions": runtime::MOUNT_OPTIONS,
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"],
            "capabilities": runtime::capabilities(),
            "cgroup": { "v1": true, "v2": true, "systemd": true, "systemdUser": true, "rdma": false },
            "seccomp": runtime::seccomp_features(),
            "apparmor": { "enabled": true },
            "selinux": { "enabled": true },
            "intelRdt": { "enabled": true, "schemata": true, "monitoring": true },
            "memoryPolicy": {
                "modes": ["MPOL_DEFAULT", "MPOL_BIND", "MPOL_INTERLEAVE", "MPOL_WEIGHTED_INTERLEAVE", "MPOL_PREFERRED",
                    "MPOL_PREFERRED_MANY", "MPOL_LOCAL"],
                "flags": ["MPOL_F_NUMA_BALANCING", "MPOL_F_RELATIVE_NODES", "MPOL_F_STATIC_NODES"],
            },
            "mountExtensions": { "idmap": { "enabled": true } },
            "netDevices": { "enabled": true },
        },
        "annotations": {
            "org.opencontainers.runc.checkpoint.enabled": "true",
            "dev.lmrun.version": env!("CARGO_PKG_VERSION"),
        },
        "potentiallyUnsafeConfigAnnotations": ["dev.lmrun.restore", "org.criu.config"],
    })
}

#[cfg(test)]
mod tests {
    use super::super::{Cli, Command};
    use super::features;
    use clap::Parser;
    use oci_spec::runtime::Features;

    #[test]
    fn takes_nothing() {
        assert!(matches!(Cli::try_parse_from(["lmrun", "features"]).unwrap().command, Command::Features(_)));
    }

    #[test]
    fn the_text_is_a_features_document() {
        let features: Features = serde_json::from_value(features()).unwrap();
        let linux = features.linux().as_ref().unwrap();
        assert!(linux.capabilities().as_ref().unwrap().iter().any(|name| name == "CAP_CHECKPOINT_RESTORE"));
        assert_eq!(linux.seccomp().as_ref().unwrap().enabled(), &Some(true));
    }
}
