//! The OCI validation suite (opencontainers/runtime-tools), run against lmrun and beside it against other runtimes: what
//! fails for all is the suite's or the host's affair, what fails for lmrun alone is a loss.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Error, Result};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use crate::bench::Table;
use crate::command::{self, Done};

mod explained;
use explained::{RACES, explanation};

/// No test takes so long unless it hangs.
const LIMIT: Duration = Duration::from_secs(60);

/// How cgroups are mounted for a test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum View {
    /// As on the host.
    Host,
    /// The unified hierarchy alone.
    Unified,
}

impl View {
    /// All that differ on this host.
    pub fn all() -> Vec<View> {
        let unified = statfs("/sys/fs/cgroup").is_ok_and(|fs| fs.filesystem_type() == CGROUP2_SUPER_MAGIC);
        if unified { vec![View::Host] } else { vec![View::Host, View::Unified] }
    }

    fn name(self) -> &'static str {
        match self {
            View::Host => "as on the host",
            View::Unified => "cgroup v2",
        }
    }

    /// A program that sees cgroups so. Some tests make containers without a mount namespace: what those mount must not
    /// stay on the host.
    fn command(self, program: &Path) -> Command {
        let script = match self {
            View::Host => "exec \"$0\"",
            View::Unified => "umount -R /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup && exec \"$0\"",
        };
        let mut command = Command::new("unshare");
        command.args(["-m", "--propagation", "private", "sh", "-c", script]).arg(program);
        command
    }
}

/// What is to be run.
#[derive(Debug)]
pub struct Plan {
    /// What build.sh made.
    pub suite: PathBuf,
    /// Name and program; the first is the one in question.
    pub runtimes: Vec<(String, PathBuf)>,
    /// These tests alone; all where empty.
    pub only: Vec<String>,
    /// Tests at a time.
    pub jobs: usize,
}

/// Runs the suite. The tables as Markdown, and the losses, one line each.
///
/// # Errors
/// When the suite is not there or a runtime cannot be called.
pub fn run(plan: &Plan) -> Result<(String, Vec<String>)> {
    let tests = tests(plan)?;
    let scratch = std::env::temp_dir().join(format!("lmrun-conformance-{}", std::process::id()));
    fs::create_dir_all(&scratch)?;
    let mut text = String::new();
    let mut losses = Vec::new();
    for view in View::all() {
        let mut results = Vec::new();
        for (name, program) in &plan.runtimes {
            let wrapper = wrapper(&scratch, name, program)?;
            results.push(run_all(plan, view, &wrapper, &tests));
        }
        text += &format!("Cgroups {}:\n\n{}\n", view.name(), table(plan, view, &tests, &results));
        losses.extend(
            find_losses(view, &tests, &results).into_iter().map(|loss| format!("cgroups {}: {loss}", view.name())),
        );
    }
    let _ = fs::remove_dir_all(&scratch);
    Ok((text, losses))
}

/// The names of the tests.
fn tests(plan: &Plan) -> Result<Vec<String>> {
    let dir = plan.suite.join("validation");
    let entries = fs::read_dir(&dir).map_err(|e| Error::other(format!("{}: {e}", dir.display())))?;
    let mut names: Vec<_> = entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.retain(|name| dir.join(name).join(format!("{name}.t")).is_file());
    names.retain(|name| plan.only.is_empty() || plan.only.contains(name));
    names.sort();
    Ok(names)
}

/// The suite takes a program without arguments: one that keeps its state in a directory of its own.
fn wrapper(scratch: &Path, name: &str, program: &Path) -> Result<PathBuf> {
    let program = program.canonicalize()?;
    let path = scratch.join(name);
    let root = scratch.join(format!("{name}-state"));
    fs::write(&path, format!("#!/bin/sh\nexec {} --root {} \"$@\"\n", program.display(), root.display()))?;
    fs::set_permissions(&path, PermissionsExt::from_mode(0o755))?;
    Ok(path)
}

/// How one test ended: None is well.
type Verdict = Option<String>;

fn run_all(plan: &Plan, view: View, runtime: &Path, tests: &[String]) -> BTreeMap<String, Verdict> {
    let once = |name: &str| {
        let mut command = view.command(&plan.suite.join("validation").join(name).join(format!("{name}.t")));
        let done = command::run(command.current_dir(&plan.suite).env("RUNTIME", runtime), LIMIT);
        if std::env::var_os("LMRUN_CONFORMANCE_VERBOSE").is_some() {
            eprintln!("{name}: {done}");
        }
        verdict(&done)
    };
    let run = |name: &str| {
        let again = if RACES.contains(&name) { 3 } else { 0 };
        (0..again).fold(once(name), |verdict, _| verdict.and_then(|_| once(name)))
    };
    // Tests of cgroups have one that they share.
    let (alone, together): (Vec<_>, Vec<_>) =
        tests.iter().cloned().partition(|name| name.contains("cgroups") || name.contains("resources"));
    let results = Mutex::new(BTreeMap::new());
    let next = Mutex::new(together.into_iter());
    let take = || next.lock().expect("nobody panics with it").next();
    let put = |name: String, verdict| results.lock().expect("nobody panics with it").insert(name, verdict);
    std::thread::scope(|scope| {
        for _ in 0..plan.jobs.max(1) {
            scope.spawn(|| {
                while let Some(name) = take() {
                    let verdict = run(&name);
                    put(name, verdict);
                }
            });
        }
    });
    for name in alone {
        let verdict = run(&name);
        put(name, verdict);
    }
    results.into_inner().expect("nobody panics with it")
}

/// Reads the Test Anything Protocol. Some tests report failures by an `error` behind no result at all.
fn verdict(done: &Done) -> Verdict {
    let first = |text: &str| text.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or_default().to_owned();
    let failed = |line: &&str| line.trim_start().starts_with("not ok") && !line.contains("# TODO");
    if let Some(line) = done.out.lines().find(failed) {
        return Some(line.trim().to_owned());
    }
    match done.status {
        None => return Some(format!("took longer than {} s", LIMIT.as_secs())),
        Some(status) if !status.success() => return Some(format!("{status}: {}", first(&done.err))),
        Some(_) => {}
    }
    let plan = done.out.lines().find(|line| line.starts_with("1.."));
    let error = done.out.lines().find_map(|line| line.split_once("\"error\":\""));
    match (plan, error) {
        (Some("1..0"), Some((_, error))) => Some(error.trim_end_matches(['}', '"']).to_owned()),
        (None, _) if done.out.contains("TAP version") => Some("ends before its plan".into()),
        _ => None,
    }
}

fn table(plan: &Plan, view: View, tests: &[String], results: &[BTreeMap<String, Verdict>]) -> String {
    let mut head = vec!["test"];
    head.extend(plan.runtimes.iter().map(|(name, _)| name.as_str()));
    head.push("");
    let mut table = Table::new(&head);
    for test in tests {
        let word = |verdict: &Verdict| if verdict.is_some() { "FAIL" } else { "pass" }.to_owned();
        let mut row = vec![test.clone()];
        row.extend(results.iter().map(|of| word(&of[test])));
        let failed = results[0][test].is_some();
        row.push(if failed { explanation(test, view).unwrap_or_default().to_owned() } else { String::new() });
        table.row(row);
    }
    let mut sums = vec!["passed".to_owned()];
    sums.extend(results.iter().map(|of| of.values().filter(|verdict| verdict.is_none()).count().to_string()));
    sums.push(format!("of {}", tests.len()));
    table.row(sums);
    table.to_string()
}

/// What the first runtime fails, and another passes or nobody can explain.
fn find_losses(view: View, tests: &[String], results: &[BTreeMap<String, Verdict>]) -> Vec<String> {
    let (own, others) = results.split_first().expect("there is one runtime at least");
    let losses = tests.iter().filter_map(|test| {
        let why = own[test].as_ref()?;
        let passed_elsewhere = others.iter().any(|of| of[test].is_none());
        let passed_elsewhere = passed_elsewhere && !RACES.contains(&test.as_str());
        (passed_elsewhere || explanation(test, view).is_none()).then(|| format!("{test}: {why}"))
    });
    losses.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;

    fn ended(code: i32, out: &str) -> Done {
        let status = Some(ExitStatus::from_raw(code << 8));
        Done { line: String::new(), status, out: out.into(), err: "why\n".into(), took: Duration::ZERO }
    }

    #[test]
    fn verdicts() {
        assert_eq!(verdict(&ended(0, "TAP version 13\nok 1 - a\n1..1\n")), None);
        assert_eq!(verdict(&ended(0, "TAP version 13\nok 1 - a\nnot ok 2 - b\n1..2\n")).unwrap(), "not ok 2 - b");
        assert_eq!(verdict(&ended(0, "TAP version 13\nnot ok 1 - # TODO b\n1..1\n")), None);
        assert_eq!(verdict(&ended(1, "")).unwrap(), "exit status: 1: why");
        assert_eq!(verdict(&ended(0, "")), None, "what must not become a container");
        assert!(verdict(&ended(0, "TAP version 13\nok 1 - a\n")).is_some(), "died inside");
        let hook = "TAP version 13\n  ---\n  {\"error\":\"too early\"}\n  ...\n1..0\n";
        assert_eq!(verdict(&ended(0, hook)).unwrap(), "too early");
        let expected = "TAP version 13\nok 1 - a\n  ---\n  {\"error\":\"x\"}\n  ...\n1..1\n";
        assert_eq!(verdict(&ended(0, expected)), None, "an error that was asked for");
    }

    #[test]
    fn what_others_pass_is_a_loss() {
        let of = |verdict: &[(&str, Verdict)]| -> BTreeMap<String, Verdict> {
            verdict.iter().map(|(name, verdict)| ((*name).to_owned(), verdict.clone())).collect()
        };
        let bad = Some("bad".to_owned());
        let tests = ["state", "hooks", "kill"].map(str::to_owned);
        let own = of(&[("state", bad.clone()), ("hooks", bad.clone()), ("kill", None)]);
        let other = of(&[("state", bad.clone()), ("hooks", bad.clone()), ("kill", bad.clone())]);
        assert_eq!(
            find_losses(View::Host, &tests, &[own.clone(), other.clone()]),
            ["state: bad"],
            "hooks is explained"
        );
        let better = of(&[("state", None), ("hooks", None), ("kill", bad)]);
        assert_eq!(find_losses(View::Host, &tests, &[own, other, better]), ["state: bad", "hooks: bad"]);
    }
}
