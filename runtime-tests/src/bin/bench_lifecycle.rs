//! `make bench-lifecycle`: what a container's life costs, beside runc and crun, as a table in Markdown.

use std::process::ExitCode;

use runtime_tests::bench::lifecycle::{Cgroups, Plan, run};
use runtime_tests::needs;

fn main() -> ExitCode {
    let mut plan =
        Plan { runtimes: vec![("lmrun".into(), needs::built("lmrun"))], repetitions: 40, cgroups: Cgroups::AsOnHost };
    let mut others = ["runc", "crun"].map(|name| (name, needs::on_path(name)));
    let mut words = std::env::args().skip(1);
    while let Some(flag) = words.next() {
        let value = words.next().unwrap_or_default();
        let known = match flag.as_str() {
            "--runc" => others[0].1.insert(value.into()).is_file(),
            "--crun" => others[1].1.insert(value.into()).is_file(),
            "--cgroups" => Cgroups::parse(&value).map(|cgroups| plan.cgroups = cgroups).is_some(),
            "--reps" => value.parse().map(|n| plan.repetitions = n).is_ok(),
            _ => false,
        };
        if !known {
            eprintln!("usage: bench_lifecycle [--runc PATH] [--crun PATH] [--reps N] [--cgroups host|v1|v2]");
            return ExitCode::from(2);
        }
    }
    plan.runtimes.extend(others.into_iter().filter_map(|(name, path)| Some((name.to_owned(), path?))));
    match run(&plan) {
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("bench_lifecycle: {e}");
            ExitCode::FAILURE
        }
    }
}
