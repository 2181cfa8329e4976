//! The benches, in short: each measures and prints its table. How fast it is depends on the machine.

use runtime_tests::bench::{by_hand, engine};
use runtime_tests::needs;

#[test]
fn of_moves_by_hand() {
    if !needs::root() {
        return;
    }
    if needs::on_path("redis-server").is_none() {
        return needs::skip("redis-server is not installed");
    }
    let plan = by_hand::Plan {
        sizes: vec![64],
        modes: by_hand::Mode::ALL.to_vec(),
        repetitions: 1,
        peer: Err("left out".into()),
    };
    let text = by_hand::run(&plan, |_| {}).expect("every mode works");
    for mode in by_hand::Mode::ALL {
        let wanted = format!("| 64 | {} |", mode.name());
        assert!(text.contains(&wanted), "{wanted}\n{text}");
    }
}

#[test]
fn of_the_engine() {
    if !needs::root() {
        return;
    }
    let plan = engine::Plan { sizes: vec![64], threads: vec![1, 10], repetitions: 1 };
    let text = engine::run(&plan).expect("every part works");
    for part in ["memcpy", "dump", "restore", "freeze", "remote call"] {
        assert!(text.contains(&format!("| {part}")), "{part}\n{text}");
    }
}
