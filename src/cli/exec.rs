//! `lmrun exec`

use std::path::PathBuf;

use super::report::Failure;
use crate::runtime::{self, Edits, ExecOptions, ProcessSource, Store};

/// Run one more process in a container; attached, exit with its exit code
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Unix socket that gets the master of the process's terminal
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,
    /// Unix socket that gets a pidfd of the process
    #[arg(long, value_name = "SOCKET")]
    pidfd_socket: Option<PathBuf>,
    /// Working directory in the container
    #[arg(long, value_name = "DIR")]
    cwd: Option<String>,
    /// Add to the environment
    #[arg(short, long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Give the process a terminal
    #[arg(short, long)]
    tty: bool,
    /// Run as this user, and group
    #[arg(short, long, value_name = "UID[:GID]", value_parser = user)]
    user: Option<(u32, Option<u32>)>,
    /// Add supplementary groups
    #[arg(short = 'g', long, value_name = "GID", value_delimiter = ',')]
    additional_gids: Vec<u32>,
    /// File with the process, as the member `process` of a config.json; other options about it do not count then
    #[arg(short, long, value_name = "FILE")]
    process: Option<PathBuf>,
    /// Return as soon as the process runs
    #[arg(short, long)]
    detach: bool,
    /// File for the process's pid
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// SELinux label of the process
    #[arg(long, value_name = "LABEL")]
    process_label: Option<String>,
    /// AppArmor profile of the process
    #[arg(long, value_name = "PROFILE")]
    apparmor: Option<String>,
    /// Set no_new_privs
    #[arg(long)]
    no_new_privs: bool,
    /// Add capabilities
    #[arg(short, long, value_name = "CAP_...", value_delimiter = ',')]
    cap: Vec<String>,
    /// Pass descriptors 3 to 3 + N - 1 on to the process
    #[arg(long, value_name = "N", default_value_t = 0)]
    preserve_fds: u32,
    /// Run in a cgroup below the container's
    #[arg(long, value_name = "[CONTROLLER:]PATH")]
    cgroup: Vec<String>,
    /// Enter a paused container, and wait until it is resumed
    #[arg(long)]
    ignore_paused: bool,
    /// The name of the container
    id: String,
    /// Program and arguments, unless there is a process file
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required_unless_present = "process")]
    args: Vec<String>,
}

/// runc's exit code where the process could not be run at all.
const NOT_RUN: u8 = 255;

impl Args {
    fn options(&self) -> ExecOptions {
        let edits = || Edits {
            args: self.args.clone(),
            cwd: self.cwd.clone(),
            env: self.env.clone(),
            tty: self.tty,
            user: self.user,
            additional_gids: self.additional_gids.clone(),
            capabilities: self.cap.clone(),
            no_new_privileges: self.no_new_privs,
            apparmor: self.apparmor.clone(),
            label: self.process_label.clone(),
        };
        ExecOptions {
            process: self.process.clone().map_or_else(|| ProcessSource::Edits(edits()), ProcessSource::File),
            cgroups: self.cgroup.clone(),
            ignore_paused: self.ignore_paused,
            detach: self.detach,
            pid_file: self.pid_file.clone(),
            console_socket: self.console_socket.clone(),
            pidfd_socket: self.pidfd_socket.clone(),
            preserve_fds: self.preserve_fds,
        }
    }

    pub fn run(&self, store: &Store) -> Result<u8, Failure> {
        match runtime::exec(store, &self.id, &self.options()) {
            Ok(code) => Ok(code.to_le_bytes()[0]),
            Err(error) => Err(Failure::new("exec failed", error).exit_code(NOT_RUN)),
        }
    }
}

fn user(text: &str) -> Result<(u32, Option<u32>), String> {
    let number = |text: &str| text.parse().map_err(|_| format!("{text:?} is no id"));
    match text.split_once(':') {
        None => Ok((number(text)?, None)),
        Some((uid, gid)) => Ok((number(uid)?, Some(number(gid)?))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Cli, Command};
    use super::*;
    use clap::Parser;

    fn options(argv: &str) -> ExecOptions {
        let Command::Exec(args) = Cli::try_parse_from(argv.split(' ')).unwrap().command else { panic!() };
        args.options()
    }

    #[test]
    fn as_containerd_calls_it() {
        let options = options(
            "lmrun --root /r --log /b/log.json --log-format json exec --process /tmp/runc-process1 --console-socket /s \
             --detach --pid-file /b/e.pid c",
        );
        assert!(matches!(options.process, ProcessSource::File(path) if path.to_str() == Some("/tmp/runc-process1")));
        assert!(options.detach);
        assert_eq!(options.pid_file.unwrap().to_str(), Some("/b/e.pid"));
        assert_eq!(options.console_socket.unwrap().to_str(), Some("/s"));
    }

    #[test]
    fn as_conmon_calls_it() {
        let options = options("lmrun exec --pid-file /u/exec_pid --process /u/exec-process-1 --detach c");
        assert!(options.detach && matches!(options.process, ProcessSource::File(_)));
    }

    #[test]
    fn what_follows_the_id_is_the_programs() {
        let options = options("lmrun exec -t -u 5:6 -e A=1 --cap CAP_KILL c ls -l --tty");
        let ProcessSource::Edits(edits) = options.process else { panic!() };
        assert_eq!(edits.args, ["ls", "-l", "--tty"]);
        assert_eq!(edits.user, Some((5, Some(6))));
        assert!(edits.tty);
        assert!(Cli::try_parse_from(["lmrun", "exec", "c"]).is_err(), "nothing to run");
    }
}
