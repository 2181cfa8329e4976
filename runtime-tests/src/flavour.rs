//! The ways in which a container goes through a checkpoint.

use crate::container::{Checkpoint, Container, complete};
use crate::needs;

/// Takes `workload` through `flavour`, checking it wherever it is alive.
#[track_caller]
pub fn carry(workload: &str, flavour: fn(&Container)) {
    if !needs::root() {
        return;
    }
    let container = Container::of_workload(workload);
    container.run().ok();
    if container.ready() {
        flavour(&container);
    }
}

/// No checkpoint at all: shows that the workload itself holds.
pub fn control(c: &Container) {
    c.check(1);
    c.check(2);
}

fn plain(images: &'static str) -> Checkpoint<'static> {
    Checkpoint { images, tcp_established: true, ..Checkpoint::default() }
}

#[track_caller]
fn restored(c: &Container, images: &std::path::Path) {
    assert!(!c.alive(), "{}: processes are left after its checkpoint", c.id);
    c.restore(images, true).ok();
}

/// Checkpoint, restore.
pub fn restore(c: &Container) {
    c.checkpoint(&plain("final")).ok();
    restored(c, &c.images("final"));
    c.check(1);
}

/// A move, with what it takes of rounds.
pub fn migrate(c: &Container) {
    c.migrate(&[]).ok();
    c.check(1);
}

/// There and back.
pub fn migrate_twice(c: &Container) {
    c.migrate(&[]).ok();
    c.check(1);
    c.migrate(&[]).ok();
    c.check(2);
}

/// Twice in a row: a restored container is like any other.
pub fn twice(c: &Container) {
    c.checkpoint(&plain("first")).ok();
    restored(c, &c.images("first"));
    c.check(1);
    c.checkpoint(&plain("second")).ok();
    restored(c, &c.images("second"));
    c.check(2);
}

/// The original goes on, and does not notice.
pub fn leave_running(c: &Container) {
    c.checkpoint(&Checkpoint { leave_running: true, ..plain("final") }).ok();
    c.check(1);
    c.checkpoint(&Checkpoint { leave_running: true, ..plain("again") }).ok();
    c.check(2);
}

/// The original went on, then ended; its image lives.
pub fn leave_then_restore(c: &Container) {
    c.checkpoint(&Checkpoint { leave_running: true, ..plain("final") }).ok();
    c.perform(c.lmrun().args(["delete", "--force", &c.id])).ok();
    restored(c, &c.images("final"));
    c.check(1);
}

/// Two rounds of pre-copy, then the rest.
pub fn pre_copy(c: &Container) {
    c.checkpoint(&Checkpoint { pre_dump: true, ..plain("pre1") }).ok();
    c.checkpoint(&Checkpoint { pre_dump: true, parent: Some("pre1"), ..plain("pre2") }).ok();
    c.checkpoint(&Checkpoint { parent: Some("pre2"), ..plain("final") }).ok();
    restored(c, &c.images("final"));
    c.check(1);
}

/// Two rounds of pre-copy with the workload's steps between them.
pub fn pre_copy_with_steps(c: &Container) {
    c.checkpoint(&Checkpoint { pre_dump: true, ..plain("pre1") }).ok();
    c.step(1);
    c.checkpoint(&Checkpoint { pre_dump: true, parent: Some("pre1"), ..plain("pre2") }).ok();
    c.step(2);
    c.checkpoint(&Checkpoint { parent: Some("pre2"), ..plain("final") }).ok();
    restored(c, &c.images("final"));
    c.check(1);
    // What the tracking left behind must not show in the next checkpoint.
    c.step(3);
    c.checkpoint(&plain("later")).ok();
    restored(c, &c.images("later"));
    c.check(2);
}

/// The steps alone, without any checkpoint.
pub fn control_with_steps(c: &Container) {
    (1..=2).for_each(|n| c.step(n));
    c.check(1);
    c.step(3);
    c.check(2);
}

/// Sends a checkpoint's pages to a page server, and completes the server's directory with the other images.
#[track_caller]
pub fn by_page_server(c: &Container, checkpoint: &Checkpoint) -> std::path::PathBuf {
    let server = c.page_server(checkpoint.images, checkpoint.parent);
    c.checkpoint(&Checkpoint { page_server: Some(server.port), ..checkpoint.clone() }).ok();
    let received = server.done();
    let local = c.images(checkpoint.images);
    let names = std::fs::read_dir(&local).expect("a checkpoint leaves its directory").flatten();
    let pages = names.into_iter().find(|e| e.file_name().to_string_lossy().starts_with("pages-"));
    assert!(pages.is_none(), "pages were written locally too: {pages:?}");
    complete(&local, &received);
    received
}

/// Pages go to a page server.
pub fn page_server(c: &Container) {
    let images = by_page_server(c, &plain("final"));
    restored(c, &images);
    c.check(1);
}

/// All rounds go to page servers; steps between them.
pub fn pre_copy_to_page_server_with_steps(c: &Container) {
    by_page_server(c, &Checkpoint { pre_dump: true, ..plain("pre1") });
    c.step(1);
    by_page_server(c, &Checkpoint { pre_dump: true, parent: Some("pre1"), ..plain("pre2") });
    c.step(2);
    let images = by_page_server(c, &Checkpoint { parent: Some("pre2"), ..plain("final") });
    restored(c, &images);
    c.check(1);
}

/// All rounds go to page servers.
pub fn pre_copy_to_page_server(c: &Container) {
    by_page_server(c, &Checkpoint { pre_dump: true, ..plain("pre1") });
    by_page_server(c, &Checkpoint { pre_dump: true, parent: Some("pre1"), ..plain("pre2") });
    let images = by_page_server(c, &Checkpoint { parent: Some("pre2"), ..plain("final") });
    restored(c, &images);
    c.check(1);
}

/// Scenarios for workloads, each through every flavour: `carried! { tree, tree_sessions }` makes a module of tests
/// for each. Names are the workloads', with underscores.
///
/// `stay: a, b;` in front names those that do not take part in moves: what they look at is the host's, or they
/// write faster than rounds of pre-copy can follow on a small machine.
#[macro_export]
macro_rules! carried {
    (stay: $($stays:ident),*; $($workload:ident),* $(,)?) => {
        $(mod $stays {
            $crate::carried!(@ $stays control restore twice leave_running leave_then_restore pre_copy page_server
                pre_copy_to_page_server);
        })*
        $crate::carried! { $($workload),* }
    };
    ($($workload:ident),* $(,)?) => { $(
        mod $workload {
            $crate::carried!(@ $workload control restore twice leave_running leave_then_restore pre_copy page_server
                pre_copy_to_page_server migrate migrate_twice);
        }
    )* };
    (@ $workload:ident $($flavour:ident)*) => { $(
        #[test]
        fn $flavour() {
            $crate::flavour::carry(&stringify!($workload).replace('_', "-"), $crate::flavour::$flavour);
        }
    )* };
}
