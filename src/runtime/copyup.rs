//! `tmpcopyup`, an option of runc's for tmpfs mounts: the new file system begins with what the root file system has at
//! that place. Podman asks for it.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use nix::libc;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{fchdir, pipe2, write};
use oci_spec::runtime::Spec;

use super::{Error, Result, chain};
use crate::sys::{file, fork, namespace};

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
///
/// A process of its own does it, as the container's root: in a user namespace, nobody else has ids there.
pub fn copy(init: i32, rootfs: &Path, mount: &Path) -> Result<()> {
    let io = |e| Error::io(mount, e);
    let root = File::open(rootfs).map_err(|e| Error::io(rootfs, e))?;
    let flags = (libc::O_RDONLY | libc::O_DIRECTORY) as u32;
    let from = match file::open_in(&root, mount.as_os_str().as_encoded_bytes(), flags) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        opened => opened.map_err(io)?,
    };
    let mut scratch = File::options();
    let scratch = scratch.read(true).write(true).custom_flags(libc::O_TMPFILE).mode(0o600).open(std::env::temp_dir());
    let scratch = scratch.map_err(io)?;
    let (said, saying) = pipe2(OFlag::O_CLOEXEC).map_err(|e| io(e.into()))?;
    let child =
        fork::child(|| match namespace::enter_as_root(init).and_then(|()| copy_inside(&from, &scratch, mount)) {
            Ok(()) => 0,
            Err(error) => {
                let _ = write(&saying, chain(&error).as_bytes());
                1
            }
        })
        .map_err(Error::Fork)?;
    drop(saying);
    let mut why = String::new();
    File::from(said).read_to_string(&mut why).map_err(io)?;
    match waitpid(child, None) {
        Ok(WaitStatus::Exited(_, 0)) => Ok(()),
        _ => Err(Error::Init(format!("copy what the image has at {}: {why}", mount.display()))),
    }
}

fn copy_inside(from: &OwnedFd, scratch: &File, mount: &Path) -> io::Result<()> {
    // No path leads there from here, and this /proc knows nobody from outside.
    fchdir(from)?;
    let mut builder = tar::Builder::new(scratch);
    builder.follow_symlinks(false);
    builder.append_dir_all(".", ".")?;
    let mut scratch = builder.into_inner()?;
    scratch.rewind()?;
    let mut archive = tar::Archive::new(BufReader::new(scratch));
    archive.set_preserve_permissions(true);
    archive.set_preserve_ownerships(true);
    archive.set_preserve_mtime(true);
    archive.unpack(mount)
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
