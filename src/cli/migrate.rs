//! `lmrun migrate`

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use clap::ValueEnum;

use super::progress::Ticker;
use super::report::Failure;
use crate::migrate::events::{Event, Journal};
use crate::migrate::options::{Malformed, rate};
use crate::migrate::wire::Compression;
use crate::migrate::{Container, Destination, Error, Failed, Now, Options, interrupt, report, settle, source};
use crate::runtime::{Store, chain};

/// Exit code for a command line that makes no sense.
pub const MISUSED: u8 = 2;
/// Exit code for "nobody knows yet" (EX_TEMPFAIL of sysexits.h).
const UNKNOWN: u8 = 75;

/// Move a running container to another host
///
/// Exit codes: 0, it runs at the destination (or, with --check, could). 1: it was not moved; if it ran, it runs on here.
/// 2: the command line makes no sense. 75: the connection broke at the moment of the hand-over, and the container is frozen here until
/// `lmrun migrate --settle` has found out whether it runs there.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Verify both ends, tell what was found, and stop
    #[arg(long)]
    check: bool,
    /// Stop, copy, start: for what cannot be moved while it runs
    #[arg(long, conflicts_with_all = ["post_copy", "downtime_target"])]
    offline: bool,
    /// Let it go on at the destination before all of its memory is there, if it does not get there otherwise. If either host or
    /// the connection fails before the end, the container is lost
    #[arg(long)]
    post_copy: bool,
    /// How long it may stand still, in milliseconds: give up what would take more than twice as long [default: 20 if its
    /// memory allows that, and never more than a second]
    #[arg(long, value_name = "MS", value_parser = milliseconds)]
    downtime_target: Option<Duration>,
    /// Give up after so many seconds (with --post-copy: let it go on there)
    #[arg(long, value_name = "S", value_parser = seconds)]
    max_time: Option<Duration>,
    /// Most bytes per second that go over the connection: 50M, 1.5G, 400Mbit
    #[arg(long, value_name = "RATE", value_parser = rate_of)]
    bandwidth: Option<u64>,
    /// Connections that pages go over
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16))]
    streams: u32,
    /// How pages are compressed where that makes them shorter
    #[arg(long, value_enum, default_value_t = Compress::Auto)]
    compress: Compress,
    /// Keep the container here, stopped, after the move
    #[arg(long)]
    keep_source: bool,
    /// Move named volumes of the engine, too
    #[arg(long)]
    volumes: bool,
    /// Where the bundle is at the destination, if lmrun shall not choose
    #[arg(long, value_name = "PATH")]
    bundle: Option<PathBuf>,
    /// Take established TCP connections along; false: refuse a container that has any
    #[arg(long, value_name = "BOOL", default_value_t = true, num_args = 0..=1, require_equals = true,
        default_missing_value = "true", action = clap::ArgAction::Set)]
    tcp_established: bool,
    /// Command for sh(1) at the moment when the container goes on there (to switch a load balancer); its time counts
    #[arg(long, value_name = "CMD")]
    on_commit: Option<String>,
    /// Print what happens as lines of JSON (docs/migrate-events.md)
    #[arg(long)]
    json: bool,
    /// Write a page about the move
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
    /// Find out what became of a move whose end was not heard of, and act on it
    #[arg(long, conflicts_with = "destination")]
    settle: bool,
    /// An id of lmrun's, docker://NAME, podman://NAME or containerd://NAMESPACE/NAME
    #[arg(value_name = "CONTAINER")]
    container: Container,
    /// ssh://[USER@]HOST[:PORT][/PATH/OF/LMRUN] or tls://HOST:PORT
    #[arg(value_name = "DESTINATION", required_unless_present = "settle")]
    destination: Option<Destination>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Compress {
    /// LZ4 while the link is so slow that it saves time
    Auto,
    Lz4,
    /// For slow links: a fifth as fast, and much shorter
    Zstd,
    None,
}

fn milliseconds(text: &str) -> Result<Duration, std::num::ParseIntError> {
    text.parse().map(|ms: u32| Duration::from_millis(ms.into()))
}

fn seconds(text: &str) -> Result<Duration, std::num::ParseIntError> {
    text.parse().map(|s: u32| Duration::from_secs(s.into()))
}

fn rate_of(text: &str) -> Result<u64, Malformed> {
    rate(text)
}

impl Args {
    pub fn run(&self, store: &Store) -> Result<u8, Failure> {
        let Some(destination) = &self.destination else {
            let what = || format!("cannot settle the migration of {}", self.container);
            let settled = settle::here(store, &self.container);
            println!("{}", settled.map_err(|failed| failure(what(), failed))?);
            return Ok(0);
        };
        let told = Arc::new(Told { journal: Mutex::default(), json: self.json, report: self.report.clone() });
        let interrupted = Arc::clone(&told);
        let what = || format!("cannot migrate container {} to {destination}", self.container);
        interrupt::watch(move || {
            interrupted.event(Event::Failed { error: Error::Interrupted.to_string(), container: "running".into() });
            interrupted.end();
            eprintln!("lmrun: interrupted: the container runs on here");
        })
        .map_err(|e| Failure::new(what(), e))?;
        let observer = |event: Event| told.event(event);
        let done = source::run(store, &self.container, destination, &self.options(), &observer);
        if let Err(failed) = &done {
            told.event(end_of(failed));
        }
        told.end();
        done.map(|_| 0).map_err(|failed| failure(what(), failed))
    }

    fn options(&self) -> Options {
        Options {
            check: self.check,
            offline: self.offline,
            post_copy: self.post_copy,
            downtime_target: self.downtime_target,
            max_time: self.max_time,
            bandwidth: self.bandwidth,
            streams: self.streams,
            compression: match self.compress {
                Compress::Auto => Compression::Auto,
                Compress::Lz4 => Compression::Lz4,
                Compress::Zstd => Compression::Zstd,
                Compress::None => Compression::None,
            },
            keep_source: self.keep_source,
            volumes: self.volumes,
            tcp_established: self.tcp_established,
            on_commit: self.on_commit.clone(),
            bundle: self.bundle.clone(),
        }
    }
}

/// What has happened so far, and who is told.
struct Told {
    journal: Mutex<(Journal, Ticker)>,
    json: bool,
    report: Option<PathBuf>,
}

impl Told {
    fn event(&self, event: Event) {
        let (journal, ticker) = &mut *self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = journal.note(event);
        if self.json {
            println!("{}", entry.json());
        } else {
            ticker.show(&entry.event);
        }
    }

    /// Nothing more will come.
    fn end(&self) {
        let (journal, ticker) = &mut *self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        ticker.wipe();
        if let Some(path) = &self.report
            && let Err(error) = std::fs::write(path, report::html(&journal.entries))
        {
            // The move is what counts.
            tracing::warn!(path = %path.display(), %error, "cannot write the report");
        }
    }
}

/// The last event of a migration that failed.
fn end_of(failed: &Failed) -> Event {
    let error = chain(&failed.error);
    match &failed.now {
        Now::Frozen { settle } => Event::Unknown { error, settle: settle.clone() },
        Now::Running => Event::Failed { error, container: "running".into() },
        Now::Untouched => Event::Failed { error, container: "untouched".into() },
    }
}

fn failure(what: String, failed: Failed) -> Failure {
    let failure = Failure::new(what, failed.error);
    match failed.now {
        Now::Untouched => failure,
        Now::Running => failure.container("runs on here"),
        Now::Frozen { settle } => failure
            .container(format!("frozen here, and perhaps running at the destination; to find out: {settle}"))
            .exit_code(UNKNOWN),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Cli, Command};
    use super::*;
    use clap::Parser;

    fn parse(line: &str) -> Result<Box<Args>, clap::Error> {
        let argv = line.split_whitespace();
        Cli::try_parse_from(["lmrun", "migrate"].into_iter().chain(argv)).map(|cli| match cli.command {
            Command::Migrate(args) => args,
            other => panic!("{other:?}"),
        })
    }

    #[test]
    fn every_option() {
        let args = parse(
            "--post-copy --downtime-target 30 --max-time 60 --bandwidth 100Mbit --streams 4 --compress none --keep-source \
             --volumes --bundle /b --tcp-established=false --on-commit true --json --report r.html web1 ssh://b",
        );
        let args = args.unwrap();
        let expected = Options {
            post_copy: true,
            downtime_target: Some(Duration::from_millis(30)),
            max_time: Some(Duration::from_secs(60)),
            bandwidth: Some(12_500_000),
            streams: 4,
            compression: Compression::None,
            keep_source: true,
            volumes: true,
            tcp_established: false,
            on_commit: Some("true".into()),
            bundle: Some("/b".into()),
            ..Options::default()
        };
        assert_eq!(args.options(), expected);
        assert!(args.json && args.report.is_some());
    }

    #[test]
    fn what_is_not_said_is_the_default() {
        assert_eq!(parse("docker://web tls://b:1").unwrap().options(), Options::default());
        assert_eq!(parse("--tcp-established web1 ssh://b").unwrap().options(), Options::default());
    }

    #[test]
    fn nonsense_is_refused() {
        for wrong in
            ["web1", "web1 b", "a/b ssh://b", "--streams 0 a ssh://b", "--settle a ssh://b", "--bandwidth x a ssh://b"]
        {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        assert!(parse("--offline --post-copy a ssh://b").is_err());
        assert!(parse("--settle web1").is_ok());
    }

    #[test]
    fn exit_codes_tell_where_it_runs() {
        let failed = |now| failure(String::new(), Failed { error: Error::Interrupted, now }).code();
        assert_eq!(failed(Now::Untouched), 1);
        assert_eq!(failed(Now::Running), 1);
        assert_eq!(failed(Now::Frozen { settle: String::new() }), 75);
    }
}
