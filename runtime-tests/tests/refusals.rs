//! What lmrun does not carry it refuses, before anything is stopped, by name; and the container does not notice.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;

use lmrun::sys::namespace;
use nix::mount::{MsFlags, mount, umount};
use runtime_tests::command::Done;
use runtime_tests::container::{Checkpoint, Container};
use runtime_tests::{host, needs};

const PLAIN: Checkpoint<'static> = Checkpoint {
    images: "final",
    parent: None,
    pre_dump: false,
    leave_running: false,
    tcp_established: false,
    page_server: None,
};

/// The container is as it was, and nothing was begun.
fn untouched(c: &Container) {
    assert!(!host::frozen(&c.id), "{}: its cgroup is frozen", c.id);
    let made: Vec<_> = std::fs::read_dir(c.base.join("images")).unwrap().flatten().map(|e| e.path()).collect();
    assert!(made.is_empty(), "images were begun: {made:?}");
}

/// The message names the task, the file or mapping, what it is (one of `words`), and what to do.
fn explained(done: &Done, words: &[&str]) {
    let said = done.err.to_lowercase();
    for demanded in ["cannot checkpoint container", "hint:", "container: still running"] {
        assert!(said.contains(demanded), "no {demanded:?} in: {done}");
    }
    assert!(said.contains("task ") || said.contains("pid "), "no task is named: {done}");
    assert!(words.iter().any(|w| said.contains(&w.to_lowercase())), "none of {words:?} is said: {done}");
}

fn refused(workload: &str, words: &[&str]) {
    if !needs::root() {
        return;
    }
    let c = Container::of_workload(workload);
    let socket = c.state_file("host.sock");
    let listener = UnixListener::bind(socket).unwrap();
    std::thread::spawn(move || {
        let (mut peer, _) = listener.accept()?;
        let mut byte = [0; 1];
        while peer.read(&mut byte)? == 1 {
            peer.write_all(&byte)?;
        }
        std::io::Result::Ok(())
    });
    c.run().ok();
    if !c.ready() {
        return;
    }
    let rounds = [PLAIN, Checkpoint { leave_running: true, ..PLAIN }, Checkpoint { pre_dump: true, ..PLAIN }];
    for (n, checkpoint) in (1..).zip(rounds) {
        let done = c.checkpoint(&checkpoint);
        // A round of pre-copy takes memory only; it may leave the verdict to the checkpoint proper.
        if checkpoint.pre_dump && done.succeeded() {
            continue;
        }
        let done = done.failed();
        explained(&done, words);
        untouched(&c);
        c.check(n);
    }
}

macro_rules! refused {
    ($($name:ident: $($word:literal)*,)*) => { $(
        #[test]
        fn $name() {
            refused(&format!("refuse-{}", stringify!($name).replace('_', "-")), &[$($word),*]);
        }
    )* };
}

refused! {
    inotify_unread: "inotify",
    fanotify: "fanotify",
    netlink: "netlink",
    packet: "packet",
    raw: "raw",
    udp_corked: "udp",
    unix_outside: "unix",
    memfd: "memfd",
    memfd_mapped: "memfd",
    deleted_directory: "deleted",
    io_uring: "io_uring",
    pidfd: "pidfd",
    pty: "/dev/pt" "terminal" "tty",
    uffd: "userfaultfd",
    lease: "lease",
    rights_in_flight: "scm_rights" "descriptor" "in flight" "unix",
    device: "ptmx" "device",
    namespace_file: "net:[" "namespace" "nsfs",
    other_namespace: "namespace",
}

/// What may be carried or refused, but never lost.
fn refused_or_carried(workload: &str, words: &[&str]) {
    if !needs::root() {
        return;
    }
    let c = Container::of_workload(workload);
    c.run().ok();
    if !c.ready() {
        return;
    }
    let done = c.checkpoint(&Checkpoint { tcp_established: true, ..PLAIN });
    if done.succeeded() {
        c.restore(&c.images("final"), true).ok();
    } else {
        explained(&done, words);
        untouched(&c);
    }
    c.check(1);
    c.check(2);
}

/// An empty message that a checkpoint has looked at is not shown to the next one, which must know that.
#[test]
fn message_that_cannot_be_seen_again() {
    if !needs::root() {
        return;
    }
    let c = Container::of_workload("unix-unread");
    c.run().ok();
    assert!(c.ready());
    let on = Checkpoint { leave_running: true, ..PLAIN };
    c.checkpoint(&on).ok();
    c.check(1);
    let done = c.checkpoint(&Checkpoint { images: "again", ..PLAIN });
    explained(&done.failed(), &["empty message"]);
    c.perform(c.lmrun().args(["delete", "--force", &c.id])).ok();
    c.restore(&c.images("final"), false).ok();
    c.check(2);
}

#[test]
fn fifo() {
    refused_or_carried("refuse-fifo", &["fifo", "named pipe"]);
}

#[test]
fn connection_that_nobody_accepted() {
    refused_or_carried("refuse-tcp-unaccepted", &["accept", "tcp"]);
}

/// An established connection needs the flag that says so, at both ends.
#[test]
fn established_without_the_flag() {
    if !needs::root() {
        return;
    }
    let c = Container::of_workload("tcp-loopback");
    c.run().ok();
    assert!(c.ready());
    let done = c.checkpoint(&PLAIN).failed();
    explained(&done, &["--tcp-established"]);
    untouched(&c);
    c.check(1);
    c.checkpoint(&Checkpoint { tcp_established: true, ..PLAIN }).ok();
    let done = c.restore(&c.images("final"), false).failed();
    assert!(done.err.contains("--tcp-established"), "{done}");
    assert!(!c.alive(), "a refused restore leaves processes");
    c.restore(&c.images("final"), true).ok();
    c.check(2);
}

/// Images that exist already are replaced by a checkpoint that succeeds, as engines want it, and by no other.
#[test]
fn images_that_exist() {
    if !needs::root() {
        return;
    }
    let c = Container::of_workload("tree");
    c.run().ok();
    assert!(c.ready());
    std::fs::create_dir(c.images("final")).unwrap();
    std::fs::write(c.images("final").join("inventory.img"), "precious").unwrap();
    let done = c.checkpoint(&PLAIN);
    let kept = std::fs::read(c.images("final").join("inventory.img")).unwrap();
    assert!(done.succeeded() || kept == b"precious", "the old images were spoilt by a checkpoint that failed: {done}");
    if !done.succeeded() {
        c.check(1);
    }
}

/// A file system that the container has mounted would be missing after a restore.
#[test]
fn mount_of_its_own() {
    if !needs::root() {
        return;
    }
    let c = Container::of_workload("tree");
    c.run().ok();
    if !c.ready() {
        return;
    }
    let mounted = namespace::in_mounts_of(c.pid(), || {
        std::fs::create_dir_all("/own")?;
        Ok(mount(Some("own"), "/own", Some("tmpfs"), MsFlags::empty(), None::<&str>)?)
    });
    mounted.expect("mount");
    let done = c.checkpoint(&PLAIN).failed();
    untouched(&c);
    explained(&done, &["tmpfs at /own"]);
    namespace::in_mounts_of(c.pid(), || Ok(umount("/own")?)).expect("unmount");
    c.checkpoint(&PLAIN).ok();
    c.restore(&c.images("final"), false).ok();
    c.check(1);
}
