//! The runtimes that can move a container: lmrun, and its peer, runc with CRIU. Their command lines differ little.

use std::io::{Error, Result};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::{command, needs};

/// A runtime, with its page server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Runtime {
    Lmrun,
    /// Paths of runc and CRIU, and a directory in which the latter is `criu`: runc looks for that name on its PATH.
    Runc {
        runc: PathBuf,
        criu: PathBuf,
        place: PathBuf,
    },
}

impl Runtime {
    /// runc with CRIU 4.x, from the given paths or the PATH; the error says what is missing.
    pub fn peer(runc: Option<PathBuf>, criu: Option<PathBuf>) -> Result<Runtime> {
        let find = |given: Option<PathBuf>, name: &str| {
            given.or_else(|| needs::on_path(name)).ok_or_else(|| Error::other(format!("no {name} on the PATH")))
        };
        let (runc, criu) = (find(runc, "runc")?, find(criu, "criu")?);
        let version = said(&criu, "Version:")?;
        if !version.starts_with("4.") {
            return Err(Error::other(format!("CRIU {version}; the peer is 4.x")));
        }
        let check = command::run(Command::new(&criu).arg("check"), Duration::from_secs(30));
        if !check.succeeded() {
            return Err(Error::other(format!("CRIU does not work here: {check}")));
        }
        let place = std::env::temp_dir().join(format!("lmrun-peer-{}", std::process::id()));
        std::fs::create_dir_all(&place)?;
        let link = place.join("criu");
        let _ = std::fs::remove_file(&link);
        std::os::unix::fs::symlink(criu.canonicalize()?, link)?;
        Ok(Runtime::Runc { runc, criu, place })
    }

    /// Name and version.
    pub fn version(&self) -> Result<String> {
        match self {
            Runtime::Lmrun => Ok(format!("lmrun {}", said(&needs::built("lmrun"), "lmrun version")?)),
            Runtime::Runc { runc, criu, .. } => {
                Ok(format!("runc {} + CRIU {}", said(runc, "runc version")?, said(criu, "Version:")?))
            }
        }
    }

    /// A command of the runtime's, with its state in `root`.
    pub fn command(&self, root: &Path) -> Command {
        let mut command = match self {
            Runtime::Lmrun => Command::new(needs::built("lmrun")),
            Runtime::Runc { runc, place, .. } => {
                let mut path = place.clone().into_os_string();
                path.push(":");
                path.push(std::env::var_os("PATH").unwrap_or_default());
                let mut command = Command::new(runc);
                command.env("PATH", path);
                command
            }
        };
        command.arg("--root").arg(root);
        command
    }

    /// Sends pages of a checkpoint (one of [`Runtime::command`]'s) over a network.
    pub fn send_pages(&self, checkpoint: &mut Command, address: &str, port: u16) {
        if *self == Runtime::Lmrun {
            checkpoint.arg("--insecure");
        }
        checkpoint.arg("--page-server").arg(format!("{address}:{port}"));
    }

    /// A page server that receives one checkpoint's pages into `images`, `parent` being beside them.
    pub fn page_server(&self, images: &Path, parent: Option<&str>, address: &str, port: u16) -> Result<Command> {
        if *self != Runtime::Lmrun {
            std::fs::create_dir_all(images)?;
        }
        let (mut command, images_flag, parent_flag) = match self {
            Runtime::Lmrun => (Command::new(needs::built("lmrun")), "--image-path", "--parent-path"),
            Runtime::Runc { criu, .. } => (Command::new(criu), "--images-dir", "--prev-images-dir"),
        };
        command.arg("page-server").arg(images_flag).arg(images);
        command.args(["--address", address, "--port", &port.to_string()]);
        if *self == Runtime::Lmrun {
            command.arg("--insecure");
        }
        if let Some(parent) = parent {
            command.arg(parent_flag).arg(parent);
        }
        Ok(command)
    }
}

/// What a program prints after `word` when it is asked for its version.
fn said(program: &Path, word: &str) -> Result<String> {
    let done = command::run(Command::new(program).arg("--version"), Duration::from_secs(10));
    done.out
        .lines()
        .find_map(|line| line.strip_prefix(word))
        .map(|rest| rest.trim().to_owned())
        .ok_or_else(|| Error::other(format!("no version: {done}")))
}
