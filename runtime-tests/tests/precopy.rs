//! Rounds of pre-copy, and what processes do between them.

use runtime_tests::bundle::Shape;
use runtime_tests::container::{Checkpoint, Container};
use runtime_tests::{needs, stats};

macro_rules! between_rounds {
    ($($workload:ident),* $(,)?) => { $(
        mod $workload {
            runtime_tests::carried!(@ $workload control_with_steps pre_copy_with_steps pre_copy_to_page_server_with_steps);
        }
    )* };
}

between_rounds! {
    precopy_idle, precopy_writes, precopy_kernel_writes, precopy_dontneed, precopy_free, precopy_shared,
    precopy_shared_unmapped, precopy_shared_punched, precopy_new_mapping, precopy_moved, precopy_replaced,
    precopy_resized, precopy_protected, precopy_file, precopy_huge, precopy_fork, precopy_fork_cow, precopy_exec,
    precopy_pid_reuse, precopy_threads, precopy_brk, precopy_stack,
}

const PLAIN: Checkpoint<'static> = Checkpoint {
    images: "final",
    parent: None,
    pre_dump: false,
    leave_running: false,
    tcp_established: false,
    page_server: None,
};

const ROUND: Checkpoint<'static> = Checkpoint { pre_dump: true, ..PLAIN };

fn started(workload: &str) -> Option<Container> {
    if !needs::root() {
        return None;
    }
    let c = Container::of_workload(workload);
    c.run().ok();
    c.ready().then_some(c)
}

fn restored(c: &Container) {
    c.restore(&c.images("final"), true).ok();
    c.check(1);
}

/// What nobody touched does not travel twice.
#[test]
fn idle_memory_travels_once() {
    let Some(c) = started("precopy-idle") else {
        return;
    };
    c.checkpoint(&Checkpoint { images: "pre1", ..ROUND }).ok();
    c.checkpoint(&Checkpoint { images: "pre2", parent: Some("pre1"), ..ROUND }).ok();
    c.checkpoint(&Checkpoint { parent: Some("pre2"), ..PLAIN }).ok();
    let pages = |name: &str| stats::dump(&c.work(name)).expect("stats-dump is written").pages_written;
    let (first, second, last) = (pages("pre1"), pages("pre2"), pages("final"));
    assert!(first >= 128 * 256, "the first round moves everything: {first} pages");
    assert!(second * 100 < first, "second round of an idle process: {second} of {first} pages");
    assert!(last * 100 < first, "final round of an idle process: {last} of {first} pages");
    restored(&c);
}

/// A round of pre-copy stops the container for a moment only.
#[test]
fn rounds_are_short() {
    let Some(c) = started("precopy-idle") else {
        return;
    };
    c.checkpoint(&Checkpoint { images: "pre1", ..ROUND }).ok();
    let stats = stats::dump(&c.work("pre1")).expect("stats-dump is written");
    // Memory is copied while the process runs; a loaded test machine gets a wide margin.
    assert!(stats.frozen.as_millis() < 100, "a pre-dump stopped the container for {:?}", stats.frozen);
}

/// A parent that does not exist: everything is copied, or the error says which directory is missing.
#[test]
fn parent_that_is_missing() {
    let Some(c) = started("precopy-writes") else {
        return;
    };
    let done = c.checkpoint(&Checkpoint { parent: Some("never-made"), ..PLAIN });
    if done.succeeded() {
        restored(&c);
    } else {
        assert!(done.err.contains("never-made"), "{done}");
        c.check(1);
    }
}

/// Rounds of another container are no parent of this one.
#[test]
fn parent_of_another_container() {
    let (Some(c), Some(other)) = (started("precopy-writes"), started("precopy-dontneed")) else {
        return;
    };
    other.checkpoint(&Checkpoint { images: "pre1", ..ROUND }).ok();
    std::fs::rename(other.images("pre1"), c.images("pre1")).unwrap();
    c.checkpoint(&Checkpoint { images: "own", ..ROUND }).ok();
    c.step(1);
    let done = c.checkpoint(&Checkpoint { parent: Some("pre1"), ..PLAIN });
    if done.succeeded() { restored(&c) } else { c.check(1) }
}

/// Tracking begins anew with each round: an earlier round than the last one cannot be the parent.
#[test]
fn parent_that_was_overtaken() {
    let Some(c) = started("precopy-writes") else {
        return;
    };
    c.checkpoint(&Checkpoint { images: "pre1", ..ROUND }).ok();
    c.step(1);
    c.checkpoint(&Checkpoint { images: "pre2", parent: Some("pre1"), ..ROUND }).ok();
    c.step(2);
    let done = c.checkpoint(&Checkpoint { parent: Some("pre1"), ..PLAIN });
    if done.succeeded() { restored(&c) } else { c.check(1) }
}

/// A round from before a restore says nothing of the container that was restored.
#[test]
fn parent_from_before_a_restore() {
    let Some(c) = started("precopy-writes") else {
        return;
    };
    c.checkpoint(&Checkpoint { images: "pre1", ..ROUND }).ok();
    c.checkpoint(&Checkpoint { images: "moved", ..PLAIN }).ok();
    c.restore(&c.images("moved"), false).ok();
    c.step(1);
    let done = c.checkpoint(&Checkpoint { parent: Some("pre1"), ..PLAIN });
    if done.succeeded() { restored(&c) } else { c.check(1) }
}

/// A restore from a chain whose first link is gone says so, and leaves nothing behind.
#[test]
fn chain_that_was_broken() {
    let Some(c) = started("precopy-writes") else {
        return;
    };
    c.checkpoint(&Checkpoint { images: "pre1", ..ROUND }).ok();
    c.checkpoint(&Checkpoint { parent: Some("pre1"), ..PLAIN }).ok();
    std::fs::rename(c.images("pre1"), c.images("hidden")).unwrap();
    let done = c.restore(&c.images("final"), false).failed();
    assert!(done.err.contains("parent"), "{done}");
    assert!(!c.alive(), "a failed restore leaves processes");
    std::fs::rename(c.images("hidden"), c.images("pre1")).unwrap();
    restored(&c);
}

/// The keeper of the tracking goes with its container, however that ends; and a round does not hold up a delete.
#[test]
fn nothing_outlives_the_container() {
    if !needs::root() {
        return;
    }
    for ending in ["delete", "checkpoint"] {
        let c = Container::new(&Shape { args: vec!["/workload".into(), "precopy-idle".into()], ..Shape::default() });
        c.run().ok();
        assert!(c.ready());
        c.checkpoint(&Checkpoint { images: "pre1", ..ROUND }).ok();
        match ending {
            "delete" => c.perform(c.lmrun().args(["delete", "--force", &c.id])).ok(),
            _ => c.checkpoint(&Checkpoint { parent: Some("pre1"), ..PLAIN }).ok(),
        };
        let root = c.root.to_string_lossy().into_owned();
        for _ in 0..100 {
            if runtime_tests::host::commands(&[&root]).is_empty() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        let left = runtime_tests::host::commands(&[&root]);
        assert!(left.is_empty(), "after {ending}: {left:?}");
        assert!(runtime_tests::host::cgroups(&c.id).is_empty(), "after {ending}: its cgroups are left");
    }
}
