//! Bundles: a small root file system and its `config.json`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::needs;

/// What a container is to be like, beyond the usual.
#[derive(Debug, Clone, Default)]
pub struct Shape {
    /// The command line; by default a workload's.
    pub args: Vec<String>,
    /// An existing network namespace instead of one of its own.
    pub network: Option<PathBuf>,
    /// A root file system made elsewhere, used read-only, instead of one with the workload in it.
    pub rootfs: Option<PathBuf>,
    /// Seccomp section of the config.
    pub seccomp: Option<Value>,
}

/// The capabilities of a container: those of Docker, and one by which a workload can ask for a pid.
const CAPABILITIES: [&str; 15] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
    "CAP_AUDIT_WRITE",
    "CAP_CHECKPOINT_RESTORE",
];

/// Makes a bundle in the existing directory `dir`.
pub fn make(dir: &Path, id: &str, shape: &Shape) -> std::io::Result<()> {
    let rootfs = match &shape.rootfs {
        Some(elsewhere) => elsewhere.clone(),
        None => dir.join("rootfs"),
    };
    if shape.rootfs.is_none() {
        for name in ["proc", "dev", "sys", "tmp", "run-state"] {
            fs::create_dir_all(rootfs.join(name))?;
        }
        for name in ["tmp", "run-state"] {
            fs::set_permissions(rootfs.join(name), PermissionsExt::from_mode(0o1777))?;
        }
        let workload = needs::built("workload");
        fs::hard_link(&workload, rootfs.join("workload"))
            .or_else(|_| fs::copy(&workload, rootfs.join("workload")).map(drop))?;
        fs::set_permissions(&rootfs, PermissionsExt::from_mode(0o755))?;
    }
    let config = config(id, &rootfs, shape);
    fs::write(dir.join("config.json"), config.to_string())
}

fn config(id: &str, rootfs: &Path, shape: &Shape) -> Value {
    let mut namespaces: Vec<Value> =
        ["pid", "mount", "ipc", "uts"].iter().map(|kind| json!({ "type": kind })).collect();
    namespaces.push(match &shape.network {
        Some(path) => json!({ "type": "network", "path": path }),
        None => json!({ "type": "network" }),
    });
    let mut linux = json!({
        "namespaces": namespaces,
        "cgroupsPath": format!("/lmrun-test/{id}"),
        "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
    });
    if let Some(seccomp) = &shape.seccomp {
        linux["seccomp"] = seccomp.clone();
    }
    let mount = |kind: &str, at: &str, options: &[&str]| json!({ "destination": at, "type": kind, "source": kind, "options": options });
    json!({
        "ociVersion": "1.0.2",
        "root": { "path": rootfs, "readonly": shape.rootfs.is_some() },
        "hostname": "scenario",
        "process": {
            "args": shape.args,
            "env": ["PATH=/usr/local/bin:/usr/bin:/bin", "WORKLOAD=yes"],
            "cwd": "/",
            "user": { "uid": 0, "gid": 0 },
            "capabilities": {
                "bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES,
            },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "soft": 4096, "hard": 4096 }],
        },
        "mounts": [
            mount("proc", "/proc", &[]),
            mount("tmpfs", "/dev", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("devpts", "/dev/pts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"]),
            mount("tmpfs", "/dev/shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
        ],
        "linux": linux,
    })
}
