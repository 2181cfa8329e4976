//! `tmpcopyup`, an option of runc's for tmpfs mounts: the new file system begins with what the root file system has at
//! that place. Podman asks for it.

use std::fs::File;
use std::io::{self, BufReader, Seek};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::libc;
use oci_spec::runtime::Spec;

use super::{Error, Result};
use crate::sys::{file, namespace};

const OPTION: &str = "tmpcopyup";

/// Takes the option out of a spec; gives the mounts that had it.
pub fn take(spec: &mut Spec) -> Vec<PathBuf> {
    let mut asked = Vec::new();
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for mount in &mut mounts {
        let options = mount.options().clone().unwrap_or_default();
        let rest: Vec<String> = options.iter().filter(|option| *option != OPTION).cloned().collect();
        if rest.len() < options.len() && mount.typ().as_deref() == Some("tmpfs") {
            asked.push(mount.destination().clone());
        }
        mount.set_options(Some(rest));
    }
    if !asked.is_empty() {
        spec.set_mounts(Some(mounts));
    }
    asked
}

/// Copies what `rootfs` has at `mount` into the container of `init`, which has just been made.
pub fn copy(init: i32, rootfs: &Path, mount: &Path) -> Result<()> {
    let archive = match archive(rootfs, mount) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        archive => archive,
    };
    let unpack = |archive: File| {
        namespace::in_mounts_of(init, || {
            let mut archive = tar::Archive::new(BufReader::new(archive));
            archive.set_preserve_permissions(true);
            archive.set_preserve_ownerships(true);
            archive.set_preserve_mtime(true);
            archive.unpack(mount)
        })
    };
    archive.and_then(unpack).map_err(|e| Error::io(mount, e))
}

fn archive(rootfs: &Path, mount: &Path) -> io::Result<File> {
    let root = File::open(rootfs)?;
    let flags = (libc::O_RDONLY | libc::O_DIRECTORY) as u32;
    let from = file::open_in(&root, mount.as_os_str().as_encoded_bytes(), flags)?;
    let mut scratch = File::options();
    let scratch = scratch.read(true).write(true).custom_flags(libc::O_TMPFILE).mode(0o600).open(std::env::temp_dir())?;
    let mut builder = tar::Builder::new(scratch);
    builder.follow_symlinks(false);
    builder.append_dir_all(".", format!("/proc/self/fd/{}", from.as_raw_fd()))?;
    let mut scratch = builder.into_inner()?;
    scratch.rewind()?;
    Ok(scratch)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_option_is_taken_out() {
        let json = r#"{"ociVersion": "1.0.2", "mounts": [
            {"destination": "/run", "type": "tmpfs", "options": ["rw", "tmpcopyup"]},
            {"destination": "/tmp", "type": "tmpfs", "options": ["rw"]}]}"#;
        let mut spec: Spec = serde_json::from_str(json).unwrap();
        assert_eq!(take(&mut spec), [PathBuf::from("/run")]);
        let left = spec.mounts().as_ref().unwrap()[0].options().clone().unwrap();
        assert_eq!(left, ["rw"]);
        assert!(take(&mut spec).is_empty());
    }
}
