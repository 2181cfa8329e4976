//! `make test-faults`: moves of a Redis that something happens to, at random moments. Ends with 1 when anything went wrong.

use std::process::ExitCode;

use runtime_tests::faults::{Chance, Fault, Plan, run};

const USAGE: &str = "usage: faults [--rounds N] [--faults FAULT,...] [--seed N] [--mib N]
faults: kill-source, kill-destination, kill-ssh, link-down, one-way, no-memory, disk-full, slow-link, hostile-bytes";

fn main() -> ExitCode {
    let mut plan = Plan { faults: Fault::ALL.to_vec(), rounds: 200, seed: Chance::seed(), mib: 32 };
    let mut words = std::env::args().skip(1);
    while let Some(flag) = words.next() {
        let value = words.next().unwrap_or_default();
        let known = match flag.as_str() {
            "--rounds" => value.parse().map(|n| plan.rounds = n).is_ok(),
            "--faults" => {
                let named: Result<Vec<_>, _> = value.split(',').map(str::parse).collect();
                named.map(|faults| plan.faults = faults).is_ok()
            }
            "--seed" => value.parse().map(|n| plan.seed = n).is_ok(),
            "--mib" => value.parse().map(|n| plan.mib = n).is_ok(),
            _ => false,
        };
        if !known || plan.faults.is_empty() {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    }
    println!("seed {}", plan.seed);
    match run(&plan, |step| println!("{step}")) {
        Ok(tally) => {
            println!("\n{tally}");
            println!("{} of {} rounds failed; seed {}", tally.failures.len(), plan.rounds, plan.seed);
            if tally.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(e) => {
            eprintln!("faults: {e}");
            ExitCode::FAILURE
        }
    }
}
