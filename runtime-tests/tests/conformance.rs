//! The OCI validation suite, in short: the tests that `make scenarios` has built, against lmrun alone. The whole of it, beside
//! other runtimes: `make test-conformance`.

use std::path::PathBuf;

use runtime_tests::conformance::{Plan, run};
use runtime_tests::needs;

#[test]
fn of_the_validation_suite_nothing_is_lost() {
    if !needs::root() {
        return;
    }
    let Some(suite) = std::env::var_os("LMRUN_SUITE").map(PathBuf::from) else {
        return needs::skip("LMRUN_SUITE names no validation suite");
    };
    let runtimes = vec![("lmrun".to_owned(), needs::built("lmrun"))];
    let (tables, losses) = run(&Plan { suite, runtimes, only: Vec::new(), jobs: 2 }).expect("the suite is built");
    println!("{tables}");
    assert!(tables.lines().filter(|line| line.contains("| pass ")).count() > 10, "{tables}");
    assert!(losses.is_empty(), "{losses:?}");
}
