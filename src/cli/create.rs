//! `lmrun create`

use std::path::PathBuf;

use super::report::Failure;
use crate::runtime::{self, CreateOptions, Store};

/// Create a container, ready to be started
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    making: Making,
    /// The name of the container
    id: String,
}

/// The options of all commands that make a container.
#[derive(Debug, clap::Args)]
pub struct Making {
    /// Directory that holds config.json
    #[arg(short, long, default_value = ".")]
    bundle: PathBuf,
    /// File for the pid of the container's first process
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// Unix socket that gets the master of the container's terminal
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,
    /// Unix socket that gets a pidfd of the container's first process
    #[arg(long, value_name = "SOCKET")]
    pidfd_socket: Option<PathBuf>,
    /// Change the root without pivot_root(2): for a root file system on an initramfs
    #[arg(long)]
    no_pivot: bool,
    /// Leave the container in the caller's session keyring
    #[arg(long)]
    no_new_keyring: bool,
    /// Pass descriptors 3 to 3 + N - 1 on to the container
    #[arg(long, value_name = "N", default_value_t = 0)]
    preserve_fds: u32,
}

impl Making {
    pub fn options(&self) -> CreateOptions {
        CreateOptions {
            bundle: self.bundle.clone(),
            pid_file: self.pid_file.clone(),
            console_socket: self.console_socket.clone(),
            no_pivot: self.no_pivot,
            no_new_keyring: self.no_new_keyring,
            preserve_fds: self.preserve_fds,
            pidfd_socket: self.pidfd_socket.clone(),
        }
    }
}

impl Args {
    pub fn run(&self, store: &Store) -> Result<u8, Failure> {
        runtime::create(store, &self.id, &self.making.options())
            .map_err(|e| Failure::new(format!("cannot create container {}", self.id), e))?;
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Cli, Command};
    use clap::Parser;

    #[test]
    fn as_containerd_calls_it() {
        let argv = "lmrun create --bundle /b --pid-file /b/init.pid --console-socket /tmp/pty.sock c1";
        let Command::Create(args) = Cli::try_parse_from(argv.split(' ')).unwrap().command else { panic!() };
        let options = args.making.options();
        assert_eq!(args.id, "c1");
        assert_eq!(options.bundle.to_str(), Some("/b"));
        assert_eq!(options.console_socket.unwrap().to_str(), Some("/tmp/pty.sock"));
    }
}
