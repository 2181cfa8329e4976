//! Where containerd's shim has its container's bundle and lmrun's state: engines do not tell, but the shim works in the
//! bundle, and keeps what it was told of the runtime there.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{Error, Result};
use crate::runtime::Store;
use crate::sys::proc;

/// What containerd gives a runtime that was told nothing.
const DEFAULT_ROOT: &str = "/run/containerd/runc";

/// The file in the bundle, as containerd writes it since 1.5.
#[derive(Debug, Default, Deserialize)]
struct Options {
    #[serde(default)]
    root: PathBuf,
    #[serde(default)]
    binary_name: String,
}

/// Where a container is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// lmrun's `--root`.
    pub root: PathBuf,
    pub bundle: PathBuf,
}

/// The place of container `id`, whose first process is `init`.
///
/// # Errors
/// [`Error::NotLmrun`] where another runtime has made it, [`Error::NotFound`].
pub fn place(name: &str, id: &str, init: i32) -> Result<Place> {
    let not_found = |what: String| Error::NotFound { id: id.to_owned(), what };
    let stat = proc::stat(init).map_err(|e| not_found(format!("pid {init}: {e}")))?;
    let shim = PathBuf::from(format!("/proc/{}/cwd", stat.ppid));
    let works_in = fs::read_link(&shim).map_err(|e| not_found(format!("{}: {e}", shim.display())))?;
    // A shim may serve several containers; it works in the first one's bundle.
    let bundle = works_in.with_file_name(id);
    let namespace = bundle.parent().and_then(Path::file_name).unwrap_or_default();
    let options = options(&bundle).map_err(not_found)?;
    let root = if options.root.as_os_str().is_empty() { DEFAULT_ROOT.into() } else { options.root };
    let root = root.join(namespace);
    match Store::new(&root).load(id) {
        Ok(state) if state.init.is_some_and(|process| process.pid == init) => Ok(Place { root, bundle }),
        _ => {
            let runtime = if options.binary_name.is_empty() { "runc".into() } else { options.binary_name };
            Err(Error::NotLmrun { name: name.to_owned(), runtime })
        }
    }
}

fn options(bundle: &Path) -> std::result::Result<Options, String> {
    let file = bundle.join("options.json");
    match fs::read(&file) {
        Ok(json) => serde_json::from_slice(&json).map_err(|e| format!("{}: {e}", file.display())),
        Err(e) if e.kind() == ErrorKind::NotFound && bundle.join("config.json").exists() => Ok(Options::default()),
        Err(e) => Err(format!("{}: {e}", file.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_containerds() {
        let bundle = std::env::temp_dir().join(format!("lmrun-shim-{}", std::process::id()));
        fs::create_dir_all(&bundle).unwrap();
        assert!(options(&bundle).is_err(), "that is no bundle");
        fs::write(bundle.join("config.json"), "{}").unwrap();
        assert_eq!(options(&bundle).unwrap().root, Path::new(""));
        let json =
            r#"{"binary_name":"/usr/local/bin/lmrun","root":"/var/run/docker/runtime-runc","no_pivot_root":false}"#;
        fs::write(bundle.join("options.json"), json).unwrap();
        let read = options(&bundle).unwrap();
        assert_eq!(read.root, Path::new("/var/run/docker/runtime-runc"));
        assert_eq!(read.binary_name, "/usr/local/bin/lmrun");
        fs::remove_dir_all(bundle).unwrap();
    }

    #[test]
    fn what_is_no_container_is_not_found() {
        let own = std::process::id().cast_signed();
        assert!(matches!(place("web", "none", own), Err(Error::NotFound { .. })));
    }
}
