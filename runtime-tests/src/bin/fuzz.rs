//! `fuzz SECONDS [ROUND]`: feeds each target for so long, from round ROUND on (by default one that the clock gives).

use std::time::{Duration, SystemTime};

use runtime_tests::container::{Checkpoint, Container};
use runtime_tests::fuzz::{Config, Images, PageServer, Seccomp, Target, run};

fn main() {
    let mut args = std::env::args().skip(1).map(|arg| arg.parse::<u64>().expect("fuzz SECONDS [ROUND]"));
    let seconds = args.next().unwrap_or(60);
    let clock = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |now| now.as_secs() << 20);
    let first = args.next().unwrap_or_else(clock);

    let c = Container::of_workload("tcp-loopback");
    c.run().ok();
    assert!(c.ready(), "the workload runs");
    c.checkpoint(&Checkpoint { images: "final", tcp_established: true, ..Checkpoint::default() }).ok();
    let images = Images::new(&c.images("final")).expect("there are images");
    drop(c);

    let targets: [Box<dyn Target>; 4] =
        [Box::new(Config::new()), Box::new(Seccomp::default()), Box::new(images), Box::new(PageServer::new())];
    for mut target in targets {
        let rounds = run(&mut *target, first, Duration::from_secs(seconds));
        println!("{}: {rounds} rounds from {first}, no panic", target.name());
    }
}
