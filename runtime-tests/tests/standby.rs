//! Containers that `create` and `start` make for processes from elsewhere: the puppet is handed over a socket, and
//! `start` returns when whoever received it says so.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use lmrun::engine::{self, ClockOffsets, RestoreRequest};
use lmrun::runtime::{Arrived, StandbySocket};
use runtime_tests::command;
use runtime_tests::container::{Checkpoint, Container};
use runtime_tests::{host, needs};

const LIMIT: Duration = Duration::from_secs(30);

fn create(c: &Container) {
    let file = |name: &str| File::options().append(true).create(true).open(c.base.join(name)).unwrap();
    let mut create = c.lmrun();
    create.args(["create", "--bundle"]).arg(c.bundle()).arg("--pid-file").arg(c.base.join("pid")).arg(&c.id);
    let mut child = create.stdin(Stdio::null()).stdout(file("out")).stderr(file("err")).spawn().unwrap();
    let status = command::wait(&mut child, LIMIT);
    assert!(status.is_some_and(|s| s.success()), "{status:?}: {}", c.stream("err"));
}

/// `start`, in the background.
fn start(c: &Container) -> Child {
    let log = File::create(c.base.join("start.err")).unwrap();
    c.lmrun().args(["start", &c.id]).stdin(Stdio::null()).stderr(log).spawn().unwrap()
}

fn said(c: &Container) -> String {
    c.stream("start.err")
}

/// Makes the processes of a checkpoint of the puppet.
fn fill(arrived: &Arrived, images: &Path, work: &Path) {
    let request = RestoreRequest { images: images.into(), work: work.into(), tcp_established: false };
    let mut plan = engine::plan(request).unwrap();
    let links: Vec<String> = serde_json::from_slice(&fs::read(images.join("descriptors.json")).unwrap()).unwrap();
    let streams = (0..).zip(links).filter(|(_, link)| link != "/dev/null");
    plan.replace(streams.map(|(n, link)| (link, arrived.stream(n).unwrap())).collect());
    plan.rebuild(arrived.puppet().unwrap()).unwrap();
}

#[test]
fn start_waits_for_the_container_to_arrive() {
    if !needs::root() {
        return;
    }
    let c = Container::of_workload("stdio");
    c.run().ok();
    if !c.ready() {
        return;
    }
    c.checkpoint(&Checkpoint { images: "last", ..Checkpoint::default() }).ok();

    let socket = StandbySocket::bind(&c.id, Path::new("bundle"), ClockOffsets::default()).unwrap();
    create(&c);
    assert_eq!(host::processes(&c.id).len(), 1);
    let mut starting = start(&c);
    let arrived = socket.accept(LIMIT).unwrap().expect("the container comes");
    assert_eq!((arrived.init, arrived.bundle.as_path()), (c.pid(), fs::canonicalize(c.bundle()).unwrap().as_path()));
    assert_eq!(arrived.dir, c.root.join(&c.id));
    assert!(starting.try_wait().unwrap().is_none(), "{}", said(&c));
    let state = c.simple("state").ok().out;
    assert!(state.contains("\"created\""), "{state}");
    fs::create_dir_all(c.work("restore")).unwrap();
    fill(&arrived, &c.images("last"), &c.work("restore"));
    assert!(arrived.is_waiting());
    arrived.release(Ok(())).unwrap();
    assert!(command::wait(&mut starting, LIMIT).unwrap().success(), "{}", said(&c));
    drop(socket);
    let state = c.simple("state").ok().out;
    assert!(state.contains("\"running\""), "{state}");
    c.check(1);
    // It is a container like any other.
    c.checkpoint(&Checkpoint { images: "again", ..Checkpoint::default() }).ok();
    c.restore(&c.images("again"), false).ok();
    c.check(2);
}

#[test]
fn what_does_not_arrive_leaves_nothing() {
    if !needs::root() {
        return;
    }
    let c = Container::of_workload("stdio");
    let socket = StandbySocket::bind(&c.id, Path::new("bundle"), ClockOffsets::default()).unwrap();
    for given_up in [Some("the link went down"), None] {
        create(&c);
        let mut starting = start(&c);
        let arrived = socket.accept(LIMIT).unwrap().expect("the container comes");
        match given_up {
            Some(why) => arrived.release(Err(why)).unwrap(),
            None => drop(arrived),
        }
        assert!(!command::wait(&mut starting, LIMIT).unwrap().success());
        assert!(said(&c).contains(given_up.unwrap_or("has gone")), "{}", said(&c));
        c.simple("delete").ok();
        assert!(!c.alive());
    }

    // Its start is killed: the receiver sees it, and nothing runs once it lets go.
    create(&c);
    let mut starting = start(&c);
    let arrived = socket.accept(LIMIT).unwrap().expect("the container comes");
    starting.kill().unwrap();
    starting.wait().unwrap();
    assert!(!arrived.is_waiting());
    drop(arrived);
    c.perform(c.lmrun().args(["delete", "--force", &c.id])).ok();
    assert!(!c.alive());

    // When nobody waits any more, it is the bundle's own program again.
    drop(socket);
    create(&c);
    assert!(command::wait(&mut start(&c), LIMIT).unwrap().success(), "{}", said(&c));
    assert!(c.ready());
    c.perform(c.lmrun().args(["delete", "--force", &c.id])).ok();
    assert!(!Path::new("/run/lmrun-standby").join(&c.id).exists());
}
