//! A moment of `make fuzz`.

use std::time::Duration;

use runtime_tests::container::{Checkpoint, Container};
use runtime_tests::fuzz::{Config, Images, PageServer, Seccomp, Target, run};
use runtime_tests::needs;

const MOMENT: Duration = Duration::from_millis(700);

fn moment(mut target: impl Target) {
    let rounds = run(&mut target, 1, MOMENT);
    assert!(rounds > 10, "{}: {rounds} rounds", target.name());
}

#[test]
fn config_json() {
    let config = Config::new();
    assert!(config.plain_is_good() || !nix::unistd::geteuid().is_root());
    moment(config);
}

#[test]
fn seccomp_profiles() {
    moment(Seccomp::default());
}

#[test]
fn page_server() {
    moment(PageServer::new());
}

#[test]
fn images() {
    if !needs::root() {
        return;
    }
    let c = Container::of_workload("tcp-loopback");
    c.run().ok();
    if !c.ready() {
        return;
    }
    c.checkpoint(&Checkpoint { images: "final", tcp_established: true, ..Checkpoint::default() }).ok();
    let images = Images::new(&c.images("final")).unwrap();
    images.plan().unwrap();
    moment(images);
}
