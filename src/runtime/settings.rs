//! What engines have no words for: the host's configuration, the annotations of a container, and what an engine that
//! cannot ask is given.
//!
//! The host's file is `/etc/lmrun/lmrun.conf`. It has the form of CRIU's configuration files, which the annotation
//! `org.criu.config` names: one option in a line, its argument behind it, `#` before a comment.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::libc;

use super::bundle::Bundle;
use super::{Error, Result};

const HOST_FILE: &str = "/etc/lmrun/lmrun.conf";
const CRIU_CONFIG: &str = "org.criu.config";
/// Names the checkpoint that `create` and `start` restore, as an annotation or a variable.
pub const RESTORE: &str = "dev.lmrun.restore";
/// The annotation, and the word in it, by which Podman says that a container is its own.
const MANAGER: &str = "io.container.manager";
const PODMAN: &str = "libpod";
const CHECKPOINTS: &str = "/var/lib/lmrun/checkpoints";
/// Longest configuration file, in bytes.
const LONGEST: u64 = 1 << 16;

/// The settings for one container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Established TCP connections go along without being asked for.
    pub tcp_established: bool,
    /// A shim of containerd calls, perhaps for Docker: neither has an option for connections or locks.
    pub by_shim: bool,
    /// `create` restores what lies below this directory only.
    checkpoints: PathBuf,
    /// [`RESTORE`] counts as a variable of the process, too.
    restore_by_environment: bool,
}

impl Settings {
    /// # Errors
    /// A configuration file that cannot be read, or has an option that is not known.
    pub fn of(annotations: &std::collections::HashMap<String, String>) -> Result<Self> {
        // Every shim has it, and nobody else.
        let by_shim = std::env::var_os("TTRPC_ADDRESS").is_some();
        let mut settings = Settings {
            tcp_established: by_shim,
            by_shim,
            checkpoints: CHECKPOINTS.into(),
            restore_by_environment: false,
        };
        let host = Path::new(HOST_FILE);
        if let Some(text) = read(host)? {
            settings.add(host, &text, true)?;
        }
        if let Some(file) = annotations.get(CRIU_CONFIG).map(PathBuf::from) {
            let text = read(&file)?.ok_or_else(|| Error::io(&file, ErrorKind::NotFound.into()))?;
            settings.add(&file, &text, false)?;
        }
        Ok(settings)
    }

    /// Lines are named by number: who asks may not be allowed to read them.
    fn add(&mut self, file: &Path, text: &str, host: bool) -> Result<()> {
        for (number, line) in (1..).zip(text.lines()) {
            let bad = |what: &str| Err(Error::Settings { file: file.to_owned(), line: number, what: what.to_owned() });
            let line = line.split('#').next().unwrap_or_default().trim();
            let (name, argument) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
            let argument = argument.trim().trim_matches('"');
            match (name.trim_start_matches("--"), argument) {
                ("", _) => {}
                ("tcp-established", "") => self.tcp_established = true,
                ("checkpoints", dir) if host && dir.starts_with('/') => self.checkpoints = dir.into(),
                ("restore-by-environment", "") if host => self.restore_by_environment = true,
                // What lmrun does anyway.
                ("file-locks" | "ext-unix-sk" | "shell-job" | "link-remap" | "ghost-limit" | "force-irmap", _) => {}
                // How CRIU talks, and where it keeps its own things.
                ("verbosity" | "log-file" | "log-pid" | "manage-cgroups" | "manage-cgroups-mode" | "timeout", _) => {}
                _ if host => return bad("unknown option, or a wrong argument"),
                _ => tracing::warn!(file = %file.display(), line = number, "option of CRIU that lmrun does not have"),
            }
        }
        Ok(())
    }

    /// The checkpoint that `create` is to restore.
    ///
    /// Images name variables and users name annotations, so the directory must be one that only root can have
    /// put there.
    ///
    /// # Errors
    /// [`Error::Checkpoint`]: it is not.
    pub fn checkpoint_to_restore(&self, bundle: &Bundle) -> Result<Option<PathBuf>> {
        let annotation = bundle.spec.annotations().as_ref().and_then(|all| all.get(RESTORE)).map(String::as_str);
        let variable = || {
            let env = bundle.spec.process().as_ref().and_then(|process| process.env().as_deref()).unwrap_or_default();
            env.iter().find_map(|pair| pair.strip_prefix(RESTORE)?.strip_prefix('='))
        };
        let asked = annotation.or_else(|| if self.restore_by_environment { variable() } else { None });
        asked.map(|dir| self.trusted(Path::new(dir))).transpose()
    }

    fn trusted(&self, dir: &Path) -> Result<PathBuf> {
        let refuse = |why: String| Error::Checkpoint { dir: dir.to_owned(), why };
        let real = |path: &Path| fs::canonicalize(path).map_err(|e| refuse(format!("{}: {e}", path.display())));
        let (root, images) = (real(&self.checkpoints)?, real(dir)?);
        if !dir.is_absolute() || images == root || !images.starts_with(&root) {
            return Err(refuse(format!("is not below {}", root.display())));
        }
        for step in images.ancestors().take_while(|step| step.starts_with(&root)) {
            let meta = fs::symlink_metadata(step).map_err(|e| refuse(format!("{}: {e}", step.display())))?;
            if !meta.is_dir() || meta.uid() != 0 || meta.mode() & 0o022 != 0 {
                return Err(refuse(format!("{} is not a directory of root's alone", step.display())));
            }
        }
        Ok(images)
    }
}

/// Whether Podman made the container.
pub fn by_podman(annotations: &std::collections::HashMap<String, String>) -> bool {
    annotations.get(MANAGER).is_some_and(|manager| manager == PODMAN)
}

/// None: there is no such file.
fn read(path: &Path) -> Result<Option<String>> {
    let open = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let file = match open {
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        open => open.map_err(|e| Error::io(path, e))?,
    };
    let mut text = String::new();
    let read = file.metadata().and_then(|meta| match meta.is_file() && meta.len() <= LONGEST {
        true => file.take(LONGEST).read_to_string(&mut text),
        false => Err(ErrorKind::InvalidInput.into()),
    });
    read.map_err(|e| Error::io(path, e))?;
    Ok(Some(text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn settings() -> Settings {
        let checkpoints = CHECKPOINTS.into();
        Settings { tcp_established: false, by_shim: false, checkpoints, restore_by_environment: false }
    }

    #[test]
    fn a_file_of_criu_is_understood() {
        let mut s = settings();
        let text =
            "# for web1\ntcp-established\n--file-locks # too\nghost-limit 4M\nlog-file \"/tmp/x y\"\nnever-heard\n";
        s.add(Path::new("f"), text, false).unwrap();
        assert_eq!(s, Settings { tcp_established: true, ..settings() });
    }

    #[test]
    fn the_host_decides_where_checkpoints_are() {
        let mut s = settings();
        s.add(Path::new("f"), "checkpoints /srv/c\nrestore-by-environment", true).unwrap();
        assert_eq!(s, Settings { checkpoints: "/srv/c".into(), restore_by_environment: true, ..settings() });
        let mut s = settings();
        s.add(Path::new("f"), "checkpoints /srv/c\nrestore-by-environment", false).unwrap();
        assert_eq!(s, settings(), "the file that an annotation names does not");
        let error = s.add(Path::new("f"), "\nsecret", true).unwrap_err().to_string();
        assert!(error.contains("line 2") && !error.contains("secret"), "{error}");
    }

    #[test]
    fn only_roots_own_directories_are_trusted() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let root = std::env::temp_dir().join(format!("lmrun-settings-{}", std::process::id()));
        let (good, open) = (root.join("c/good"), root.join("c/open"));
        for dir in [&good, &open] {
            fs::create_dir_all(dir).unwrap();
            fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
        }
        fs::set_permissions(root.join("c"), fs::Permissions::from_mode(0o755)).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
        let s = Settings { checkpoints: root.join("c"), ..settings() };
        assert_eq!(s.trusted(&good).unwrap(), fs::canonicalize(&good).unwrap());
        let above = good.join("../..");
        for bad in [root.join("c"), above, open, root.join("c/none"), "c/good".into()] {
            assert!(matches!(s.trusted(&bad), Err(Error::Checkpoint { .. })), "{}", bad.display());
        }
        fs::remove_dir_all(root).unwrap();
    }
}
