//! The user's ssh, as git and rsync use it: its configuration, agent and known hosts are what they are, and what it has to ask or
//! to say goes to the terminal.

use std::io;
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use nix::sys::signal::Signal;

use super::{Channel, Destination, Error, Pace, Result};
use crate::sys::{file, signals};

/// What the kernel lets everybody have for a pipe: fewer turns between ssh and us.
const PIPE: u32 = 1 << 20;

pub(super) fn connect(destination: &Destination, arguments: &[&str], pace: Option<Arc<Pace>>) -> Result<Channel> {
    let Some(words) = command_line(destination, arguments) else {
        return Err(Error::Destination(destination.to_string()));
    };
    let mut command = Command::new("ssh");
    command.args(words).stdin(Stdio::piped()).stdout(Stdio::piped());
    // Ctrl-C at a terminal goes to all programs there. We want to say goodbye through this one.
    signals::ignore_in(&mut command, &[Signal::SIGINT]);
    let mut child = command.spawn().map_err(Error::Ssh)?;
    let mut channel = open(&mut child, destination.to_string(), pace).map_err(Error::Ssh)?;
    channel.link.program = Some(("ssh".into(), child));
    Ok(channel)
}

fn open(child: &mut Child, peer: String, pace: Option<Arc<Pace>>) -> io::Result<Channel> {
    let input = OwnedFd::from(child.stdout.take().expect("it is a pipe"));
    let output = OwnedFd::from(child.stdin.take().expect("it is a pipe"));
    for pipe in [&input, &output] {
        let _ = file::set_pipe_size(pipe, PIPE); // a matter of speed alone
    }
    Channel::over(input, output, peer, pace)
}

/// None: not by ssh.
fn command_line(destination: &Destination, arguments: &[&str]) -> Option<Vec<String>> {
    let Destination::Ssh { user, host, port, lmrun } = destination else { return None };
    let mut words = vec!["-T".to_owned()];
    if let Some(port) = port {
        words.extend(["-p".to_owned(), port.to_string()]);
    }
    if let Some(user) = user {
        words.extend(["-l".to_owned(), user.clone()]);
    }
    words.extend(["--".to_owned(), host.clone()]);
    // ssh joins what follows, and a shell takes it apart again.
    let lmrun = lmrun.as_deref().unwrap_or("lmrun");
    words.extend([lmrun, "receive", "--stdio"].iter().chain(arguments).map(|word| quoted(word)));
    Some(words)
}

/// One word for a shell.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@%,=".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_go_before_the_host_and_the_command_behind_it() {
        let line = |text: &str| command_line(&text.parse().unwrap(), &["--join", "ab"]).unwrap().join(" ");
        assert_eq!(line("ssh://b"), "-T -- b lmrun receive --stdio --join ab");
        assert_eq!(line("ssh://u@[::1]:7/opt/lmrun"), "-T -p 7 -l u -- ::1 /opt/lmrun receive --stdio --join ab");
        assert_eq!(line("ssh://b/o p/l;$(m)'n"), r"-T -- b '/o p/l;$(m)'\''n' receive --stdio --join ab");
        assert!(command_line(&"tls://b:1".parse().unwrap(), &[]).is_none());
    }

    #[test]
    fn a_shell_reads_back_what_was_quoted() {
        for word in ["", "a b", "'", "$(x)`y`\\", "a\nb", "*", "~", "-n", "é"] {
            let script = format!("printf %s {}", quoted(word));
            let said = Command::new("sh").args(["-c", &script]).output().unwrap().stdout;
            assert_eq!(said, word.as_bytes());
        }
    }
}
