//! SELinux: the label of a process, and those of its mounts and keys.
//!
//! Where the kernel has none, a label for a process is refused and one for mounts is logged: nobody would check either.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::fd::AsFd;
use std::path::Path;

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use oci_spec::runtime::Spec;

use super::{Error, Result};
use crate::sys::mount;

/// Whether labels are checked on this host: selinuxfs is where the kernel's documentation wants it.
pub(super) fn is_enabled() -> bool {
    Path::new("/sys/fs/selinux/enforce").exists()
}

/// The label that `process` is to have.
///
/// # Errors
/// In runc's words, where nobody would check it.
pub(super) fn process_label(spec: &Spec) -> Result<Option<String>> {
    let label = spec.process().as_ref().and_then(|process| process.selinux_label().clone());
    match label.filter(|label| !label.is_empty()) {
        Some(_) if !is_enabled() => {
            Err(Error::Config("selinux label is specified in config, but selinux is disabled or not supported".into()))
        }
        label => Ok(label),
    }
}

/// The label that new file systems of the container are to have.
pub(super) fn mount_label(spec: &Spec) -> Option<String> {
    let label = spec.linux().as_ref().and_then(|linux| linux.mount_label().clone());
    let label = label.filter(|label| !label.is_empty())?;
    if !is_enabled() {
        tracing::warn!(label, "linux.mountLabel has no effect: selinux is disabled or not supported");
        return None;
    }
    Some(label)
}

/// Has the next program that the calling process executes, and the next key it makes, carry `label`.
///
/// A new procfs is asked, not the container's own /proc, which may be anything (CVE-2025-52881).
pub(super) fn label_next(label: &str) -> std::result::Result<(), String> {
    let failed = |what: &str| {
        let what = what.to_owned();
        move |e: std::io::Error| format!("unable to apply the selinux label {label:?}: {what}: {e}")
    };
    let proc = mount::new("proc", "proc", &[]).map_err(failed("make a procfs"))?;
    for attribute in ["keycreate", "exec"] {
        let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC;
        let path = format!("thread-self/attr/{attribute}");
        match openat(proc.as_fd(), path.as_str(), flags, Mode::empty()).map_err(std::io::Error::from) {
            Err(e) if attribute == "keycreate" && e.kind() == ErrorKind::NotFound => {}
            opened => {
                opened.and_then(|file| File::from(file).write_all(label.as_bytes())).map_err(failed(attribute))?
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_label_is_none() {
        let spec = |label: &str| -> Spec {
            let json = format!(
                r#"{{"ociVersion": "1.3.0", "process": {{"cwd": "/", "user": {{"uid": 0, "gid": 0}}, "selinuxLabel": {label:?}}},
                     "linux": {{"mountLabel": {label:?}}}}}"#
            );
            serde_json::from_str(&json).unwrap()
        };
        assert_eq!(process_label(&spec("")).unwrap(), None);
        assert_eq!(mount_label(&spec("")), None);
        if !is_enabled() {
            let error = process_label(&spec("system_u:system_r:container_t:s0")).unwrap_err().to_string();
            assert!(error.contains("selinux is disabled or not supported"), "{error}");
        }
    }
}
