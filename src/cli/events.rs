//! `lmrun events`

use std::io::{self, Write};
use std::time::Duration;

use super::report::Failure;
use crate::runtime::{self, Store};

/// Show what a container uses, and OOM kills in it, as lines of JSON
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Time between two statistics, as 500ms or 1m30s
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = duration)]
    interval: Duration,
    /// Show the statistics once
    #[arg(long)]
    stats: bool,
    /// The name of the container
    id: String,
}

impl Args {
    pub fn run(&self, store: &Store) -> Result<u8, Failure> {
        let interval = (!self.stats).then_some(self.interval);
        // Without a reader there is no more to do.
        let mut show = |event: &serde_json::Value| writeln!(io::stdout(), "{event}").is_ok();
        runtime::events(store, &self.id, interval, &mut show)
            .map_err(|e| Failure::new(format!("cannot watch container {}", self.id), e))?;
        Ok(0)
    }
}

/// Go's notation.
fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("invalid duration {text:?}");
    let mut rest = text;
    let mut sum = 0.0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(wrong)?;
        let (number, behind) = rest.split_at(digits);
        let unit = behind.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(behind.len());
        let seconds = match &behind[..unit] {
            "ns" => 1e-9,
            "us" | "µs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return Err(wrong()),
        };
        sum += number.parse::<f64>().map_err(|_| wrong())? * seconds;
        rest = &behind[unit..];
    }
    let duration = Duration::try_from_secs_f64(sum).map_err(|_| wrong())?;
    if duration.is_zero() { Err("duration interval must be greater than 0".into()) } else { Ok(duration) }
}

#[cfg(test)]
mod tests {
    use super::super::{Cli, Command};
    use super::*;
    use clap::Parser;

    #[test]
    fn durations_as_go_writes_them() {
        assert_eq!(duration("1m30s"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        for bad in ["", "0s", "5", "s", "1x", "-1s"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
        let Command::Events(args) = Cli::try_parse_from(["lmrun", "events", "c"]).unwrap().command else { panic!() };
        assert_eq!(args.interval, Duration::from_secs(5));
    }
}
