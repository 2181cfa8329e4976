//! `make test-conformance`: the OCI validation suite against lmrun, and runc and crun beside it, as tables in Markdown.

use std::path::PathBuf;
use std::process::ExitCode;

use runtime_tests::conformance::{Plan, run};
use runtime_tests::needs;

const USAGE: &str = "usage: conformance --suite DIR [--runtime NAME=PATH]... [--only TEST,...] [--jobs N]";

fn main() -> ExitCode {
    match plan().map(|plan| run(&plan)) {
        None => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
        Some(Err(e)) => {
            eprintln!("conformance: {e}");
            ExitCode::FAILURE
        }
        Some(Ok((text, losses))) => {
            println!("{text}");
            for loss in &losses {
                println!("LOSS {loss}");
            }
            ExitCode::from(u8::from(!losses.is_empty()))
        }
    }
}

fn plan() -> Option<Plan> {
    let mut plan = Plan { suite: PathBuf::new(), runtimes: Vec::new(), only: Vec::new(), jobs: 4 };
    let mut others = Vec::new();
    let mut words = std::env::args().skip(1);
    while let Some(flag) = words.next() {
        let value = words.next()?;
        match flag.as_str() {
            "--suite" => plan.suite = PathBuf::from(value).canonicalize().ok()?,
            "--runtime" => others.push(value.split_once('=').map(|(name, path)| (name.to_owned(), path.into()))?),
            "--only" => plan.only = value.split(',').map(str::to_owned).collect(),
            "--jobs" => plan.jobs = value.parse().ok()?,
            _ => return None,
        }
    }
    if others.is_empty() {
        others.extend(needs::on_path("runc").map(|path| ("runc".to_owned(), path)));
    }
    plan.runtimes.push(("lmrun".to_owned(), needs::built("lmrun")));
    plan.runtimes.append(&mut others);
    (!plan.suite.as_os_str().is_empty()).then_some(plan)
}
