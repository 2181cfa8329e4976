//! The bench of the life cycle, in short. It reaps whatever ends, and so has a process to itself.

use runtime_tests::bench::lifecycle::{Cgroups, Plan, run};
use runtime_tests::needs;

#[test]
fn of_the_life_cycle() {
    if !needs::root() {
        return;
    }
    if needs::on_path("busybox").is_none() {
        return needs::skip("busybox is not installed");
    }
    let runtimes = vec![("lmrun".into(), needs::built("lmrun"))];
    let plan = Plan { runtimes, repetitions: 1, cgroups: Cgroups::AsOnHost };
    let text = run(&plan).expect("containers can be made");
    for part in ["create, start, wait, delete: docker-like", "run: minimal", "exec: minimal", "state", "peak memory"] {
        let row = text.lines().find(|line| line.starts_with(&format!("| {part}"))).unwrap_or_default();
        assert!(!row.is_empty() && !row.contains("| - |"), "{part}\n{text}");
    }
}
