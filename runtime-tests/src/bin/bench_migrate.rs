//! `make bench-migrate`: what a client sees of a move of its Redis, by lmrun and by runc with CRIU, as a table in
//! Markdown.

use std::path::Path;
use std::process::ExitCode;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use runtime_tests::bench::by_hand::{self, Mode};
use runtime_tests::bench::migrate;
use runtime_tests::runtimes::Runtime;

const USAGE: &str =
    "usage: bench_migrate [--mib N,...] [--parts PART,...] [--reps N] [--flags FLAGS] [--runc PATH] [--criu PATH]
       bench_migrate --by-hand MODE,... [--mib N,...] [--reps N] [--runc PATH] [--criu PATH]
parts: redis, streams, files (all by default); flags: for lmrun migrate
modes (checkpoint, copy, restore): local, cold, page-server, pre-dump";

type Parsed<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    let (mut sizes, mut repetitions, mut flags) = (vec![64, 256, 1024, 4096], 20, Vec::new());
    let (mut runc, mut criu, mut modes) = (None, None, None);
    let mut parts = vec!["redis".to_owned(), "streams".to_owned(), "files".to_owned()];
    let mut words = std::env::args().skip(1);
    let mut parse = || -> Parsed<()> {
        while let Some(flag) = words.next() {
            let value = words.next().ok_or("a value is missing")?;
            let each = || value.split(',');
            match flag.as_str() {
                "--mib" => sizes = each().map(str::parse).collect::<Result<_, _>>()?,
                "--reps" => repetitions = value.parse()?,
                "--parts" => parts = each().map(str::to_owned).collect(),
                "--flags" => flags = value.split_whitespace().map(str::to_owned).collect(),
                "--by-hand" => modes = Some(each().map(str::parse::<Mode>).collect::<Result<Vec<_>, _>>()?),
                "--runc" => runc = Some(value.into()),
                "--criu" => criu = Some(value.into()),
                _ => return Err(format!("unknown flag {flag}").into()),
            }
        }
        match parts.iter().find(|part| !["redis", "streams", "files"].contains(&part.as_str())) {
            Some(unknown) => Err(format!("unknown part {unknown}").into()),
            None => Ok(()),
        }
    };
    if let Err(e) = parse() {
        eprintln!("{e}\n{USAGE}");
        return ExitCode::from(2);
    }
    let has = |part: &str| parts.iter().any(|known| known == part);
    let progress = |step: &str| eprintln!("{step}");
    let result = run_in_memory().and_then(|()| {
        let peer = Runtime::peer(runc, criu).map_err(|e| e.to_string());
        match modes {
            Some(modes) => by_hand::run(&by_hand::Plan { sizes, modes, repetitions, peer }, progress),
            None => {
                let (streams, files) = (has("streams"), has("files"));
                let sizes = if has("redis") { sizes } else { Vec::new() };
                migrate::run(&migrate::Plan { sizes, streams, files, repetitions, flags, peer }, progress)
            }
        }
    });
    match result {
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("bench_migrate: {e}");
            ExitCode::FAILURE
        }
    }
}

/// Sees to it that /run is in memory: CRIU keeps what it knows of the kernel there, and elsewhere it would find it out
/// again on every call.
fn run_in_memory() -> std::io::Result<()> {
    const NOTHING: Option<&Path> = None;
    if nix::sys::statfs::statfs("/run")?.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC {
        return Ok(());
    }
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(NOTHING, "/", NOTHING, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NOTHING)?;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), Some("mode=755"))?;
    Ok(())
}
