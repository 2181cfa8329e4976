//! `make bench-engine`: what the engine's parts cost, as a table in Markdown.

use std::process::ExitCode;

use runtime_tests::bench::engine::{Plan, run};

fn main() -> ExitCode {
    let mut plan = Plan { sizes: vec![64, 1024], threads: vec![1, 10, 100], repetitions: 5 };
    let mut words = std::env::args().skip(1);
    while let Some(flag) = words.next() {
        let value = words.next().unwrap_or_default();
        let numbers = || value.split(',').map(str::parse).collect::<Result<Vec<usize>, _>>();
        let known = match flag.as_str() {
            "--mib" => numbers().map(|n| plan.sizes = n).is_ok(),
            "--threads" => numbers().map(|n| plan.threads = n).is_ok(),
            "--reps" => value.parse().map(|n| plan.repetitions = n).is_ok(),
            _ => false,
        };
        if !known {
            eprintln!("usage: bench_engine [--mib N,...] [--threads N,...] [--reps N]");
            return ExitCode::from(2);
        }
    }
    match run(&plan) {
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("bench_engine: {e}");
            ExitCode::FAILURE
        }
    }
}
