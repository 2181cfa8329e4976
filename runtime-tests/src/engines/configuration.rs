//! What the engines are told: where their state is, and that lmrun is their runtime.

use std::fs;
use std::path::Path;

use serde_json::json;

/// Writes one file for each daemon and for Podman, into `base`.
pub fn write(base: &Path) -> std::io::Result<()> {
    let at = |name: &str| base.join(name).display().to_string();
    let docker = json!({
        "experimental": true,
        "data-root": at("docker"), "exec-root": at("run/docker"), "pidfile": at("run/docker.pid"),
        "hosts": [format!("unix://{}", at("run/docker.sock"))], "containerd": at("run/containerd.sock"),
        "exec-opts": ["native.cgroupdriver=cgroupfs"],
        "default-runtime": "lmrun", "runtimes": { "lmrun": { "path": at("bin/lmrun") } },
    });
    fs::write(base.join("daemon.json"), docker.to_string())?;
    let containerd = format!(
        "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
         [grpc]\naddress = {:?}\n",
        at("containerd"),
        at("run/containerd"),
        at("run/containerd.sock")
    );
    fs::write(base.join("containerd.toml"), containerd)?;
    // Limits that every root may set: Podman's own are higher than some machines allow.
    let podman = format!(
        "[containers]\ndefault_ulimits = [\"nofile=1024:4096\", \"nproc=1024:4096\"]\n\
         [engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\nruntime = \"lmrun\"\n\
         [engine.runtimes]\nlmrun = [{:?}]\n",
        at("bin/lmrun")
    );
    fs::write(base.join("containers.conf"), podman)?;
    let storage =
        format!("[storage]\ndriver = \"vfs\"\ngraphroot = {:?}\nrunroot = {:?}\n", at("podman"), at("run/podman"));
    fs::write(base.join("storage.conf"), storage)
}
