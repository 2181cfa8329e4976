//! Moves that something happens to, and moves without end, in short. The long forms are `make test-faults` and
//! `make test-there-and-back`.

use runtime_tests::faults::{Chance, Fault, Plan, run};
use runtime_tests::{needs, there_and_back};

fn can_run() -> bool {
    if !needs::root() {
        return false;
    }
    let installed = needs::on_path("redis-server").is_some();
    if !installed {
        needs::skip("redis-server is not installed");
    }
    installed
}

/// One of each kind.
#[test]
fn exactly_one_runs_whatever_happens() {
    if !can_run() {
        return;
    }
    let plan = Plan { faults: Fault::ALL.to_vec(), rounds: Fault::ALL.len(), seed: Chance::seed(), mib: 16 };
    println!("LMRUN_SEED={}", plan.seed);
    let tally = run(&plan, |step| println!("{step}")).expect("a Redis can be moved");
    assert!(tally.failures.is_empty(), "{tally}");
}

#[test]
fn nothing_grows() {
    if !can_run() {
        return;
    }
    let growth = there_and_back::run(6, |_| ()).expect("a Redis goes back and forth");
    assert!(growth.is_good(), "{growth}");
}
