//! `make bench-migrate`: what a client sees of a move of its Redis, by lmrun and by runc with CRIU, as a table in
//! Markdown.

use std::io::Result;
use std::path::Path;
use std::process::ExitCode;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use runtime_tests::bench::migrate::{Mode, Plan, run};
use runtime_tests::runtimes::Runtime;

const USAGE: &str = "usage: bench_migrate [--mib N,...] [--modes MODE,...] [--reps N] [--runc PATH] [--criu PATH]
modes: local, cold, page-server, pre-dump (all by default)";

fn main() -> ExitCode {
    let (mut sizes, mut modes, mut repetitions) = (vec![64, 256, 1024], Mode::ALL.to_vec(), 5);
    let (mut runc, mut criu) = (None, None);
    let mut words = std::env::args().skip(1);
    while let Some(flag) = words.next() {
        let value = words.next().unwrap_or_default();
        let parts = || value.split(',');
        let known = match flag.as_str() {
            "--mib" => parts().map(str::parse).collect::<std::result::Result<_, _>>().map(|n| sizes = n).is_ok(),
            "--modes" => parts().map(str::parse).collect::<std::result::Result<_, _>>().map(|m| modes = m).is_ok(),
            "--reps" => value.parse().map(|n| repetitions = n).is_ok(),
            "--runc" => {
                runc = Some(value.into());
                true
            }
            "--criu" => {
                criu = Some(value.into());
                true
            }
            _ => false,
        };
        if !known {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    }
    let result = run_in_memory().and_then(|()| {
        let peer = Runtime::peer(runc, criu).map_err(|e| e.to_string());
        let plan = Plan { sizes, modes, repetitions, peer };
        run(&plan, |step| eprintln!("{step}"))
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
fn run_in_memory() -> Result<()> {
    const NOTHING: Option<&Path> = None;
    if nix::sys::statfs::statfs("/run")?.filesystem_type() == nix::sys::statfs::TMPFS_MAGIC {
        return Ok(());
    }
    unshare(CloneFlags::CLONE_NEWNS)?;
    mount(NOTHING, "/", NOTHING, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NOTHING)?;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), Some("mode=755"))?;
    Ok(())
}
