//! `lmrun kill`

use nix::libc;
use nix::sys::signal::Signal;

use super::report::Failure;
use crate::runtime::{self, Store};

/// Send a signal to the first process of a container
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Send it to all processes of the container
    #[arg(short, long)]
    all: bool,
    /// The name of the container
    id: String,
    /// Name (with or without SIG) or number
    #[arg(default_value = "SIGTERM", allow_hyphen_values = true)]
    signal: String,
}

impl Args {
    pub fn run(&self, store: &Store) -> Result<u8, Failure> {
        let what = || format!("cannot signal container {}", self.id);
        let signal = signal(&self.signal).map_err(|e| Failure::new(what(), e))?;
        runtime::kill(store, &self.id, signal, self.all).map_err(|e| Failure::new(what(), e))?;
        Ok(0)
    }
}

fn signal(text: &str) -> Result<i32, String> {
    if let Ok(number) = text.parse::<i32>() {
        return if (0..=64).contains(&number) { Ok(number) } else { Err(format!("unknown signal {text:?}")) };
    }
    let name = text.to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    let real_time = |offset: &str, base: i32, sign: i32| {
        let offset = if offset.is_empty() { Some(0) } else { offset[1..].parse::<i32>().ok() };
        offset.map(|offset| base + sign * offset).filter(|n| (libc::SIGRTMIN()..=libc::SIGRTMAX()).contains(n))
    };
    let known = match name {
        n if n.starts_with("RTMIN") => real_time(&n[5..], libc::SIGRTMIN(), 1),
        n if n.starts_with("RTMAX") => real_time(&n[5..], libc::SIGRTMAX(), -1),
        n => format!("SIG{n}").parse::<Signal>().ok().map(|signal| signal as i32),
    };
    known.ok_or_else(|| format!("unknown signal {text:?}"))
}

#[cfg(test)]
mod tests {
    use super::super::{Cli, Command};
    use super::signal;
    use clap::Parser;

    #[test]
    fn signals_by_every_name() {
        for text in ["15", "TERM", "SIGTERM", "sigterm"] {
            assert_eq!(signal(text), Ok(15), "{text}");
        }
        assert_eq!(signal("RTMIN+3"), Ok(37));
        assert_eq!(signal("SIGRTMAX-1"), Ok(63));
        for text in ["", "SIGFOO", "65", "-1", "RTMIN+99"] {
            assert!(signal(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_signal_may_be_left_out() {
        let Command::Kill(args) = Cli::try_parse_from(["lmrun", "kill", "c"]).unwrap().command else { panic!() };
        assert_eq!(signal(&args.signal), Ok(15));
    }
}
