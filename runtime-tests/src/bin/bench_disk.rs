//! `make bench-disk`: what a container's files add to the freeze, as a table in Markdown.

use std::process::ExitCode;

use runtime_tests::bench::disk::{Plan, run};

fn main() -> ExitCode {
    let mut plan = Plan { before: 200, rate: 5, gap: 100, repetitions: 9 };
    let mut words = std::env::args().skip(1);
    while let Some(flag) = words.next() {
        let value = words.next().unwrap_or_default();
        let known = match flag.as_str() {
            "--mib" => value.parse().map(|n| plan.before = n).is_ok(),
            "--rate" => value.parse().map(|n| plan.rate = n).is_ok(),
            "--gap" => value.parse().map(|n| plan.gap = n).is_ok(),
            "--reps" => value.parse().map(|n| plan.repetitions = n).is_ok(),
            _ => false,
        };
        if !known {
            eprintln!("usage: bench_disk [--mib N] [--rate MIB_PER_SECOND] [--gap MS] [--reps N]");
            return ExitCode::from(2);
        }
    }
    match run(&plan) {
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("bench_disk: {e}");
            ExitCode::FAILURE
        }
    }
}
