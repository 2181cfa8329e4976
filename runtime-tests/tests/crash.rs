//! `kill -9` of lmrun at random moments. A container that is being checkpointed serves on; of one that is being
//! restored, `delete --force` leaves nothing.
//!
//! `LMRUN_CRASHES` is the number of kills for each kind of command (8 by default; `make soak` does 50), `LMRUN_SEED`
//! repeats a run's moments.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use runtime_tests::bundle::Shape;
use runtime_tests::container::{Checkpoint, Container, PageServer};
use runtime_tests::network::{Cable, INSIDE};
use runtime_tests::redis::{self, Client, Writer};
use runtime_tests::{host, needs};

/// A Redis with some memory, and a client that writes all the time.
struct Victim {
    // Dropped first: it lives in the network.
    container: Container,
    cable: Cable,
}

/// One root file system for all victims: they only read it.
fn rootfs() -> &'static Path {
    static MADE: OnceLock<PathBuf> = OnceLock::new();
    MADE.get_or_init(|| {
        let rootfs = std::env::temp_dir().join(format!("lmrun-test-redis-{}", std::process::id()));
        redis::rootfs(&rootfs).expect("a root file system for Redis");
        rootfs
    })
}

impl Victim {
    fn start() -> Option<Victim> {
        if !needs::root() {
            return None;
        }
        if needs::on_path("redis-server").is_none() {
            needs::skip("redis-server is not installed");
            return None;
        }
        let cable = Cable::new();
        let container = Container::new(&Shape {
            args: redis::ARGS.map(str::to_owned).to_vec(),
            network: Some(cable.container.path()),
            rootfs: Some(rootfs().to_owned()),
            ..Shape::default()
        });
        container.run().ok();
        let victim = Victim { container, cable };
        victim.connect().load(32, |_| {}).expect("Redis takes 32 MiB");
        Some(victim)
    }

    fn connect(&self) -> Client {
        let address = format!("{INSIDE}:6379");
        self.cable.outside.within(|| redis::wait_until_up(&address)).expect("Redis answers")
    }
}

/// Random moments, which `LMRUN_SEED` repeats.
struct Moments(u64);

impl Moments {
    fn new() -> Moments {
        let given = std::env::var("LMRUN_SEED").ok().and_then(|s| s.parse().ok());
        let clock = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(1, |d| d.as_nanos() as u64);
        let seed = given.unwrap_or(clock) | 1;
        println!("LMRUN_SEED={seed}");
        Moments(seed)
    }

    /// Some time before `limit`.
    fn before(&mut self, limit: Duration) -> Duration {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        limit.mul_f64((self.0 >> 11) as f64 / (1u64 << 53) as f64)
    }
}

fn crashes() -> u32 {
    std::env::var("LMRUN_CRASHES").ok().and_then(|n| n.parse().ok()).unwrap_or(8)
}

/// Starts lmrun, kills it after `delay`. True when it had ended well before that.
fn interrupt(command: &mut Command, delay: Duration) -> bool {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child: Child = command.spawn().expect("lmrun starts");
    std::thread::sleep(delay);
    let _ = kill(Pid::from_raw(child.id() as i32), Signal::SIGKILL);
    child.wait().is_ok_and(|status| status.success())
}

/// Polls, for what the kernel or a helper process does a moment later.
#[track_caller]
fn soon(what: &str, condition: impl Fn() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < Duration::from_secs(5), "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Processes of lmrun's that work on this container's state.
fn drivers(c: &Container) -> Vec<(i32, String)> {
    host::commands(&["--root", &c.root.to_string_lossy()])
}

/// All that must hold after lmrun was killed in a dump. Of a pre-dump the keeper may stay behind.
#[track_caller]
fn serves_on(victim: &Victim, writer: &Writer, images: &str, pre_dump: bool) {
    let c = &victim.container;
    let before = writer.acknowledged();
    soon("the client gets no answers any more", || writer.acknowledged() > before + 10 || !writer.goes_on());
    assert!(writer.goes_on(), "the client lost its connection");
    assert!(!host::frozen(&c.id), "its cgroup is frozen");
    soon("a network lock is left", || victim.cable.container.tables().is_empty());
    soon("processes of lmrun's are left", || drivers(c).len() <= usize::from(pre_dump));
    // lmrun may be killed between its commit and its end: then the images are whole.
    let made = c.images(images);
    assert!(!made.exists() || whole(&made, pre_dump), "a half-written image directory has its final name: {made:?}");
    let after = writer.acknowledged();
    soon("the client is held up", || writer.acknowledged() > after + 10);
}

/// What a checkpoint or a pre-dump writes last is there.
fn whole(images: &Path, pre_dump: bool) -> bool {
    images.join(if pre_dump { "lmrun.bin" } else { "inventory.img" }).exists()
}

/// Whether the container is gone or on its way; else it serves on.
fn ends(victim: &Victim, writer: &Writer) -> bool {
    let before = writer.acknowledged();
    let alive = || victim.container.alive();
    soon("the container neither ends nor goes on", || !alive() || writer.acknowledged() > before + 10);
    !alive()
}

/// Kills dumps of one kind. `page_server`: pages go to one.
fn kill_dumps(pre_dump: bool, page_server: bool) {
    let Some(victim) = Victim::start() else {
        return;
    };
    let c = &victim.container;
    let writer = Writer::start(victim.connect());
    let mut moments = Moments::new();
    let checkpoint = |images: &'static str, server: Option<&PageServer>| Checkpoint {
        images,
        pre_dump,
        tcp_established: true,
        page_server: server.map(|s| s.port),
        ..Checkpoint::default()
    };
    let again = |n: u32| {
        // The next checkpoint works; the container is left running.
        let whole = Checkpoint { images: "whole", leave_running: true, tcp_established: true, ..Checkpoint::default() };
        let done = c.checkpoint(&whole);
        assert!(done.succeeded(), "after kill {n}: {done}");
        fs::remove_dir_all(c.images("whole")).expect("images can be removed");
        done.took
    };
    let usual = again(0);
    let mut finished = 0;
    for n in 1..=crashes() {
        let server = page_server.then(|| c.page_server("crash", None));
        let mut command = c.checkpoint_command(&checkpoint("crash", server.as_ref()));
        let delay = moments.before(usual);
        let done = interrupt(&mut command, delay);
        println!("kill {n}: after {delay:?}{}", if done { ", it was done" } else { "" });
        let received = server.map(|server| {
            let dir = server.dir.clone();
            server.ended();
            dir
        });
        let images = c.images("crash");
        if done || whole(&images, pre_dump) && ends(&victim, &writer) {
            // Beyond the commit: the checkpoint is whole, and a container that was to end has ended.
            finished += 1;
            if !pre_dump {
                let from = received.clone().map_or(images.clone(), |dir| {
                    runtime_tests::container::complete(&images, &dir);
                    dir
                });
                let _ = c.perform(c.lmrun().args(["delete", "--force", &c.id]));
                c.restore(&from, true).ok();
            }
        } else {
            serves_on(&victim, &writer, "crash", pre_dump);
        }
        if pre_dump && images.exists() {
            // What was committed is a parent that the next round can build on.
            let next = Checkpoint { images: "next", parent: Some("crash"), ..checkpoint("next", None) };
            let done = c.checkpoint(&next);
            assert!(done.succeeded(), "after kill {n}: {done}");
            fs::remove_dir_all(c.images("next")).expect("images can be removed");
        }
        let _ = fs::remove_dir_all(&images);
        if let Some(dir) = received {
            let _ = fs::remove_dir_all(dir);
        }
        again(n);
    }
    println!("{} kills, {finished} of them too late", crashes());
    let record = writer.finish();
    assert_eq!(record.failure, None, "the client's connection");
    let audit = record.audit(&mut victim.connect()).expect("Redis answers");
    assert_eq!(audit, (0, 0, 0), "lost, doubled, wrong writes");
}

#[test]
fn checkpoint() {
    kill_dumps(false, false);
}

#[test]
fn checkpoint_to_page_server() {
    kill_dumps(false, true);
}

#[test]
fn pre_dump() {
    kill_dumps(true, false);
}

#[test]
fn pre_dump_to_page_server() {
    kill_dumps(true, true);
}

/// Of a restore that was killed, `delete --force` leaves nothing; and the images can still be restored.
#[test]
fn restore() {
    let Some(victim) = Victim::start() else {
        return;
    };
    let c = &victim.container;
    let writer = Writer::start(victim.connect());
    soon("the client writes", || writer.acknowledged() > 100);
    // What a restore that was done before it was killed took in would be lost with it: nobody writes any more.
    let record = writer.finish();
    c.checkpoint(&Checkpoint { images: "final", tcp_established: true, ..Checkpoint::default() }).ok();
    let mut moments = Moments::new();
    let mut usual = Duration::from_millis(150);
    for n in 1..=crashes() {
        let delay = moments.before(usual.mul_f64(1.2));
        let begin = Instant::now();
        let done = interrupt(&mut c.restore_command(&c.images("final"), true), delay);
        println!("kill {n}: after {delay:?}{}", if done { ", it was done" } else { "" });
        if done {
            usual = usual.min(begin.elapsed());
        }
        c.perform(c.lmrun().args(["delete", "--force", &c.id])).ok();
        soon("processes of the container's are left", || !c.alive());
        soon("processes of lmrun's are left", || drivers(c).is_empty());
        soon("cgroups are left", || host::cgroups(&c.id).is_empty());
        let state: Vec<_> = fs::read_dir(&c.root).into_iter().flatten().flatten().map(|e| e.path()).collect();
        assert!(state.is_empty(), "state is left: {state:?}");
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("/proc is mounted");
        let ours: Vec<_> = mounts.lines().filter(|line| line.contains(&c.id)).collect();
        assert!(ours.is_empty(), "mounts are left: {ours:?}");
        // The lock that the checkpoint left for the container's peers may be there; a restore's own may not.
        let own = format!("lmrun-{}-", c.id);
        soon("a network lock is left", || !victim.cable.container.tables().iter().any(|t| t.contains(&own)));
    }
    c.restore(&c.images("final"), true).ok();
    let audit = record.audit(&mut victim.connect()).expect("Redis answers");
    assert_eq!(audit, (0, 0, 0), "lost, doubled, wrong writes");
}
