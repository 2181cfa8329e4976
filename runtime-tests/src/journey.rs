//! A container that goes back and forth between two hosts by `lmrun migrate`, as often as one likes.
//!
//! Each host is a network namespace ([`Hosts`]) and a mount namespace with a small disk of its own, on which lmrun keeps its state and
//! its `/var/lib/lmrun`. They reach each other over their cable, by what stands in for ssh(1) ([`remote`](crate::remote)).

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Error, Result};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::bundle::{self, Shape};
use crate::command::{self, Done};
use crate::host::{self, InMemory};
use crate::hosts::{CONTAINER, DESTINATION, Hosts, SOURCE};
use crate::network::Namespace;
use crate::redis::{self, Client};
use crate::remote::Remote;
use crate::{container, needs};

/// No move takes this long unless it hangs.
pub const LIMIT: Duration = Duration::from_secs(120);

/// What travels.
#[derive(Debug, Clone)]
pub struct Load {
    pub args: Vec<String>,
    /// A root file system that both hosts have; it is not written to.
    pub shared: Option<PathBuf>,
    /// One that is copied to where the container starts, and goes along with it.
    pub own: Option<PathBuf>,
    /// uid and gid; none: root.
    pub user: Option<u32>,
    /// As config.json has them, behind the usual ones.
    pub mounts: Vec<Value>,
    /// Room at each host.
    pub disk_mib: u64,
}

impl Default for Load {
    fn default() -> Load {
        Load { args: Vec::new(), shared: None, own: None, user: None, mounts: Vec::new(), disk_mib: 64 }
    }
}

impl Load {
    /// A Redis from a root file system that [`redis::rootfs`] has made.
    pub fn redis(rootfs: &Path) -> Load {
        Load { args: redis::ARGS.map(str::to_owned).to_vec(), shared: Some(rootfs.to_owned()), ..Load::default() }
    }
}

/// A host of the two.
struct Side {
    dir: PathBuf,
    /// What is written at this host. Unmounted after all that lives in it has ended.
    disk: InMemory,
    /// A process that keeps the mount namespace.
    holder: Child,
    remote: Option<Remote>,
}

impl Side {
    fn new(base: &Path, name: &str, net: &Namespace, address: &str, mib: u64) -> Result<Side> {
        let dir = base.join(name);
        fs::create_dir_all(dir.join("bin"))?;
        symlink(needs::built("ssh_stand_in"), dir.join("bin/ssh"))?;
        let disk = InMemory::of_size(dir.join("disk"), &format!("{mib}m"))?;
        for part in ["state", "var", "bundle", "rootfs"] {
            fs::create_dir_all(disk.dir.join(part))?;
        }
        fs::create_dir_all("/var/lib/lmrun")?;
        let script = format!("mount --bind {}/var /var/lib/lmrun && echo && exec sleep 100000", disk.dir.display());
        let mut holder = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private", "sh", "-c", &script])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut ready = String::new();
        BufReader::new(holder.stdout.take().ok_or_else(|| Error::other("stdout"))?).read_line(&mut ready)?;
        let lmrun = format!("exec {} --root {}/state \"$@\"", needs::built("lmrun").display(), disk.dir.display());
        host::script(&dir.join("lmrun"), &lmrun);
        let mut side = Side { dir, disk, holder, remote: None };
        side.remote = Some(Remote::listen(net, address, side.enter(net), side.dir.join("receive.log"))?);
        Ok(side)
    }

    /// The words behind which a command is run at this host.
    fn enter(&self, net: &Namespace) -> Vec<String> {
        let mounts = format!("--mount=/proc/{}/ns/mnt", self.holder.id());
        vec!["nsenter".into(), mounts, format!("--net={}", net.path().display())]
    }

    fn bundle(&self) -> PathBuf {
        self.disk.dir.join("bundle")
    }

    fn rootfs(&self) -> PathBuf {
        self.disk.dir.join("rootfs")
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        self.remote = None;
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// A container and its two hosts.
pub struct Journey<'a> {
    pub hosts: &'a Hosts,
    pub id: String,
    // Dropped in this order.
    sides: [Side; 2],
    base: InMemory,
    /// Where the container is: 0 or 1.
    at: usize,
    own: bool,
}

impl<'a> Journey<'a> {
    /// Starts a container at the first host.
    pub fn start(hosts: &'a Hosts, load: &Load) -> Result<Journey<'a>> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let id = format!("lmrun-journey-{}-{n}", std::process::id());
        let base = InMemory::mount(std::env::temp_dir().join(&id))?;
        let sides = [
            Side::new(&base.dir, "a", &hosts.source, SOURCE, load.disk_mib)?,
            Side::new(&base.dir, "b", &hosts.destination, DESTINATION, load.disk_mib)?,
        ];
        let journey = Journey { hosts, id, sides, base, at: 0, own: load.own.is_some() };
        if let Some(own) = &load.own {
            for entry in fs::read_dir(own)?.flatten() {
                let to = journey.sides[0].rootfs();
                command::run(Command::new("cp").arg("-a").arg(entry.path()).arg(to), LIMIT).ok();
            }
        }
        for at in 0..2 {
            journey.write_bundle(at, load)?;
        }
        let mut run = journey.lmrun(0);
        run.args(["run", "-d", "--bundle"]).arg(journey.sides[0].bundle()).arg(&journey.id);
        let done = command::run(&mut run, LIMIT);
        if done.succeeded() { Ok(journey) } else { Err(Error::other(done.to_string())) }
    }

    fn write_bundle(&self, at: usize, load: &Load) -> Result<()> {
        let side = &self.sides[at];
        let rootfs = load.shared.clone().unwrap_or_else(|| side.rootfs());
        let shape = Shape {
            args: load.args.clone(),
            network: Some(self.container_network(at).path()),
            rootfs: Some(rootfs),
            seccomp: None,
        };
        bundle::make(&side.bundle(), &self.cgroup(at), &shape)?;
        let path = side.bundle().join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path)?)?;
        config["root"]["readonly"] = load.shared.is_some().into();
        if let Some(user) = load.user {
            config["process"]["user"] = serde_json::json!({ "uid": user, "gid": user });
        }
        if let Some(mounts) = config["mounts"].as_array_mut() {
            mounts.extend(load.mounts.iter().cloned());
        }
        fs::write(path, config.to_string())
    }

    /// The cgroup of the container at a host, below `lmrun-test`.
    pub fn cgroup(&self, at: usize) -> String {
        format!("{}.{at}", self.id)
    }

    fn network(&self, at: usize) -> &Namespace {
        [&self.hosts.source, &self.hosts.destination][at]
    }

    pub fn container_network(&self, at: usize) -> &Namespace {
        [&self.hosts.container_at_source, &self.hosts.container_at_destination][at]
    }

    /// Where the container is: 0 or 1.
    pub fn at(&self) -> usize {
        self.at
    }

    /// It was found to be there.
    pub fn is_at(&mut self, at: usize) {
        self.at = at;
    }

    /// The directory that holds all that is written at a host.
    pub fn disk(&self, at: usize) -> &Path {
        &self.sides[at].disk.dir
    }

    /// An lmrun command at a host.
    pub fn lmrun(&self, at: usize) -> Command {
        let enter = self.sides[at].enter(self.network(at));
        let mut command = Command::new(&enter[0]);
        command.args(&enter[1..]).arg(needs::built("lmrun")).arg("--root").arg(self.disk(at).join("state"));
        let mut path = self.sides[at].dir.join("bin").into_os_string();
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        command.env("PATH", path).env("LMRUN_TEST_GARBAGE", self.garbage()).stdin(Stdio::null());
        command
    }

    /// What hostile peers say.
    pub fn garbage(&self) -> PathBuf {
        self.base.dir.join("garbage")
    }

    /// A connection of the client's to a Redis.
    pub fn connect(&self) -> Result<Client> {
        self.hosts.client.within(|| redis::wait_until_up(&format!("{CONTAINER}:6379")))
    }

    /// Where the lmrun at a host is that ssh is asked for.
    pub fn url(&self, at: usize) -> String {
        format!("ssh://{}{}", [SOURCE, DESTINATION][at], self.sides[at].dir.join("lmrun").display())
    }

    /// Begins a move to the other host.
    pub fn depart(&self, flags: &[&str]) -> Result<Moving> {
        let (from, to) = (self.at, 1 - self.at);
        if self.own {
            // What was left there is not the container's any more.
            let rootfs = self.sides[to].rootfs();
            fs::remove_dir_all(&rootfs)?;
            fs::create_dir(&rootfs)?;
        }
        let _ = fs::remove_file(self.sides[to].dir.join("receive.log"));
        let mut migrate = self.lmrun(from);
        migrate.args(["migrate", "--json", "--bundle"]).arg(self.sides[to].bundle());
        migrate.args(flags).arg(&self.id).arg(self.url(to));
        let log = self.sides[from].dir.join("migrate.log");
        let mut child = migrate.stdout(Stdio::piped()).stderr(fs::File::create(&log)?).spawn()?;
        let said = BufReader::new(child.stdout.take().ok_or_else(|| Error::other("stdout"))?);
        let (tell, events) = mpsc::channel();
        std::thread::spawn(move || {
            for line in said.lines().map_while(Result::ok) {
                let event = serde_json::from_str(&line).unwrap_or(Value::String(line));
                if tell.send((Instant::now(), event)).is_err() {
                    return;
                }
            }
        });
        Ok(Moving { child, events, heard: Vec::new(), log, begun: Instant::now() })
    }

    /// What the destination's lmrun has said to standard error in the last move to `at`.
    pub fn received(&self, at: usize) -> String {
        fs::read_to_string(self.sides[at].dir.join("receive.log")).unwrap_or_default()
    }

    /// The lmruns at work that were asked for by ssh.
    pub fn receiving(&self, at: usize) -> Vec<u32> {
        self.sides[at].remote.as_ref().map(Remote::at_work).unwrap_or_default()
    }

    /// A whole move to the other host.
    ///
    /// # Errors
    /// When lmrun says that it did not move; with all that it has said.
    pub fn migrate(&mut self, flags: &[&str]) -> Result<Moved> {
        let moving = self.depart(flags)?;
        self.complete(moving)
    }

    /// Waits until a move is at its end.
    ///
    /// # Errors
    /// As [`Journey::migrate`].
    pub fn complete(&mut self, mut moving: Moving) -> Result<Moved> {
        let to = 1 - self.at;
        let code = moving.wait();
        if code != Some(0) {
            return Err(Error::other(format!("migrate: {code:?}\n{}\nthere: {}", moving.said(), self.received(to))));
        }
        self.at = to;
        let summary = moving.heard.iter().rev().map(|(_, event)| event).find(|event| event["event"] == "moved");
        let summary = summary.cloned().unwrap_or_default();
        Ok(Moved { begun: moving.begun, summary, events: std::mem::take(&mut moving.heard) })
    }

    /// What `lmrun state` says at a host; none: it knows no such container.
    pub fn state(&self, at: usize) -> Option<Value> {
        let done = command::run(self.lmrun(at).args(["state", &self.id]), Duration::from_secs(20));
        done.succeeded().then(|| serde_json::from_str(&done.out).unwrap_or_default())
    }

    /// `running`, `paused`, `stopped`, or nothing.
    pub fn status(&self, at: usize) -> Option<String> {
        Some(self.state(at)?["status"].as_str()?.to_owned())
    }

    /// `lmrun migrate --settle` at a host.
    pub fn settle(&self, at: usize) -> Done {
        command::run(self.lmrun(at).args(["migrate", "--settle", &self.id]), Duration::from_secs(60))
    }

    /// The container's first process, as this machine counts.
    pub fn init(&self, at: usize) -> Option<i32> {
        i32::try_from(self.state(at)?["pid"].as_i64()?).ok().filter(|pid| *pid > 0)
    }

    /// What there is of this container and of lmrun at a host, by names that are the same at both.
    pub fn inventory(&self, at: usize) -> BTreeSet<String> {
        let mut all = BTreeSet::new();
        let side = &self.sides[at];
        let same = |text: String| text.replace(&*side.dir.to_string_lossy(), "").replace(&self.cgroup(at), "CGROUP");
        all.extend(self.mounts(at).into_iter().map(|mount| same(format!("mount {mount}"))));
        for dir in host::cgroups(&self.id) {
            if dir.ends_with(self.cgroup(at)) {
                all.insert(same(format!("cgroup {}", dir.display())));
            }
        }
        for (place, network) in [("host", self.network(at)), ("container", self.container_network(at))] {
            all.extend(network.tables().into_iter().map(|table| format!("{place}: {table}")));
        }
        for pid in self.processes(at) {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            all.insert(format!("process {}", name.trim()));
        }
        let part = |name: &str| side.disk.dir.join(name);
        for dir in [part("state"), part("var"), part("bundle")] {
            files(&dir, &mut |path| {
                all.insert(same(path.display().to_string()));
            });
        }
        all
    }

    /// Processes in a host's namespaces, and in those of the container there.
    pub fn processes(&self, at: usize) -> Vec<i32> {
        let link = |path: PathBuf| fs::read_link(path).ok();
        let id = |path: PathBuf| {
            use std::os::unix::fs::MetadataExt;
            fs::metadata(path).ok().map(|about| about.ino())
        };
        let of_proc =
            |text: &Path| text.to_string_lossy().trim_end_matches(']').rsplit('[').next()?.parse::<u64>().ok();
        let networks = [self.network(at), self.container_network(at)].map(|network| id(network.path()));
        let mounts = link(format!("/proc/{}/ns/mnt", self.sides[at].holder.id()).into());
        let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let here = |pid: &i32| {
            let of = |name: &str| link(format!("/proc/{pid}/ns/{name}").into());
            let network = of("net").and_then(|text| of_proc(&text));
            let mount = of("mnt");
            (network.is_some() && networks.contains(&network)) || (mount.is_some() && mount == mounts)
        };
        let pids = pids.filter(|pid| *pid != self.sides[at].holder.id() as i32 && *pid != std::process::id() as i32);
        pids.filter(here).collect()
    }

    /// What could grow with each move, of the running container.
    pub fn growth(&self) -> Vec<(&'static str, u64)> {
        let pid = self.init(self.at).unwrap_or_default();
        let count = |text: String| text.lines().count() as u64;
        let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap_or_default();
        let status = read("status");
        let kib = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key));
            line.and_then(|rest| rest.split_whitespace().next()?.parse().ok()).unwrap_or(0)
        };
        let disk = |at: usize| {
            let mut bytes = 0;
            files(self.disk(at), &mut |path| bytes += fs::symlink_metadata(path).map_or(0, |about| about.len()));
            bytes / 1024
        };
        let controllers = fs::read_to_string("/proc/cgroups").unwrap_or_default();
        let memory = controllers.lines().find_map(|line| line.strip_prefix("memory")).unwrap_or_default();
        vec![
            ("resident, KiB", kib("VmRSS:")),
            ("mapped, KiB", kib("VmSize:")),
            ("mappings", count(read("maps"))),
            ("descriptors", fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, |all| all.count() as u64)),
            ("threads", fs::read_dir(format!("/proc/{pid}/task")).map_or(0, |all| all.count() as u64)),
            ("mounts in the container", count(read("mountinfo"))),
            ("mounts at the hosts", (0..2).map(|at| self.mounts(at).len() as u64).sum()),
            ("nftables tables", (0..2).map(|at| self.container_network(at).tables().len() as u64).sum()),
            ("processes", (0..2).map(|at| self.processes(at).len() as u64).sum()),
            ("cgroups", host::cgroups(&self.id).len() as u64),
            (
                "memory cgroups of the machine",
                memory.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0),
            ),
            ("files, KiB", disk(0) + disk(1)),
        ]
    }

    /// What is mounted at a host for this container and for lmrun. Others come and go on this machine.
    fn mounts(&self, at: usize) -> Vec<String> {
        let path = format!("/proc/{}/mountinfo", self.sides[at].holder.id());
        let other = &self.sides[1 - at].dir;
        let text = fs::read_to_string(path).unwrap_or_default();
        let mounts = text.lines().filter_map(|line| {
            let mut words = line.split(' ').skip(3);
            let (root, mounted) = (words.next()?, words.next()?);
            let path = Path::new(mounted);
            let ours = path.starts_with(&self.base.dir) || path.starts_with("/var/lib/lmrun");
            (ours && !path.starts_with(other)).then(|| format!("{root} at {mounted}"))
        });
        mounts.collect()
    }
}

/// Calls `each` for everything below `dir`.
fn files(dir: &Path, each: &mut impl FnMut(&Path)) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        // The one stays with the container's directory, see `runtime::departure`. The other is what a destination must know
        // until the source has said that it will not ask: it may never hear that, see docs/protocol.md.
        let name = entry.file_name();
        if name != "departure.lock" && !name.to_string_lossy().ends_with(".running") {
            each(&entry.path());
        }
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            files(&entry.path(), each);
        }
    }
}

impl Drop for Journey<'_> {
    fn drop(&mut self) {
        for at in 0..2 {
            let _ = command::run(self.lmrun(at).args(["delete", "--force", &self.id]), LIMIT);
        }
        host::sweep(&self.id);
    }
}

/// A move that came to its end.
pub struct Moved {
    pub begun: Instant,
    /// The event `moved`.
    pub summary: Value,
    pub events: Vec<(Instant, Value)>,
}

/// A move that goes on.
pub struct Moving {
    child: Child,
    events: mpsc::Receiver<(Instant, Value)>,
    /// What was said so far, and when it was read.
    pub heard: Vec<(Instant, Value)>,
    log: PathBuf,
    pub begun: Instant,
}

impl Moving {
    /// The source's lmrun.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it has started to reach the destination by.
    pub fn transport(&self) -> Option<i32> {
        let pid = self.child.id();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
        let mut pids = children.split_whitespace().filter_map(|pid| pid.parse::<i32>().ok());
        pids.find(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "ssh"))
    }

    /// Waits until it says that a phase begins; false: it ended without.
    pub fn await_phase(&mut self, phase: &str) -> bool {
        while let Ok((at, event)) = self.events.recv_timeout(LIMIT) {
            let found = event["phase"] == phase;
            self.heard.push((at, event));
            if found {
                return true;
            }
        }
        false
    }

    /// Its exit status; none: it was killed, or did not end in time.
    pub fn wait(&mut self) -> Option<i32> {
        let status = command::wait(&mut self.child, LIMIT);
        while let Ok(event) = self.events.recv_timeout(Duration::from_secs(1)) {
            self.heard.push(event);
        }
        status.and_then(|status| status.code())
    }

    pub fn has_ended(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(_)))
    }

    /// All that it said.
    pub fn said(&self) -> String {
        let events: Vec<String> = self.heard.iter().map(|(_, event)| event.to_string()).collect();
        format!("{}\n{}", events.join("\n"), fs::read_to_string(&self.log).unwrap_or_default())
    }
}

impl Drop for Moving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits until somebody listens at a port of this thread's network namespace.
pub fn await_listener(port: u16) -> bool {
    let begin = Instant::now();
    while !container::listens(port) {
        if begin.elapsed() > Duration::from_secs(60) {
            return false;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    true
}
