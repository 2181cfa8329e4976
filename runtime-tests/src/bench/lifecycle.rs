//! What a container's life costs: lmrun, and beside it runc and crun, interleaved.

use std::fs::{self, File};
use std::io::{Error, Result};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lmrun::sys::pidfd::PidFd;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::wait::{WaitPidFlag, waitpid};
use serde_json::{Value, json};

use super::{Table, machine, median};
use crate::host::InMemory;
use crate::{command, needs};

/// What is to be measured.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Name and program; the first is lmrun.
    pub runtimes: Vec<(String, PathBuf)>,
    pub repetitions: usize,
    pub cgroups: Cgroups,
}

/// How cgroups are mounted for the bench. Beside version 1 with the unified hierarchy, crun does not start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cgroups {
    AsOnHost,
    Version1,
    Version2,
}

impl Cgroups {
    pub fn parse(word: &str) -> Option<Self> {
        match word {
            "host" => Some(Cgroups::AsOnHost),
            "v1" => Some(Cgroups::Version1),
            "v2" => Some(Cgroups::Version2),
            _ => None,
        }
    }

    /// Shows the caller, and whom it starts, cgroups so.
    fn enter(self) -> Result<()> {
        let script = match self {
            Cgroups::AsOnHost => return Ok(()),
            Cgroups::Version1 => "umount /sys/fs/cgroup/unified",
            Cgroups::Version2 => "umount -R /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup",
        };
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
        command::run(Command::new("sh").args(["-ec", script]), LIMIT).ok();
        Ok(())
    }
}

/// The rows of the table, and how they are measured.
const MEASURES: [(&str, Measure); 9] = [
    ("create, start, wait, delete: minimal", |b| b.life(Kind::Minimal)),
    ("create, start, wait, delete: docker-like", |b| b.life(Kind::Docker)),
    ("run: minimal", |b| b.run(Kind::Minimal)),
    ("run: docker-like", |b| b.run(Kind::Docker)),
    ("exec: minimal", |b| b.exec(Kind::Minimal)),
    ("exec: docker-like", |b| b.exec(Kind::Docker)),
    ("state", |b| b.timed(b.runtime().args(["state", &b.standing(Kind::Minimal)]))),
    ("--version", |b| b.timed(Command::new(&b.program).arg("--version"))),
    ("peak memory of run: minimal, KiB", |b| b.peak()),
];

type Measure = fn(&Bench) -> Result<f64>;

#[derive(Debug, Clone, Copy)]
enum Kind {
    Minimal,
    Docker,
}

/// Measures, and returns the table: medians in ms, and the ratio of the first runtime to each other.
///
/// # Errors
/// When a runtime cannot do what is measured in a first try; what fails later is said.
pub fn run(plan: &Plan) -> Result<String> {
    plan.cgroups.enter()?;
    // Containers that their runtime has left are ours to reap.
    prctl::set_child_subreaper(true)?;
    // /run is in memory, and so are the states of containers.
    let memory = InMemory::mount(std::env::temp_dir().join(format!("lmrun-lifecycle-{}", std::process::id())))?;
    let base = &memory.dir;
    let benches: Vec<Bench> =
        plan.runtimes.iter().map(|(name, program)| Bench::prepare(base, name, program)).collect::<Result<_>>()?;
    let mut head = vec![String::new()];
    head.extend(benches.iter().map(|b| b.version.clone()));
    head.extend(benches[1..].iter().map(|b| format!("lmrun / {}", b.name)));
    let mut table = Table::new(&head.iter().map(String::as_str).collect::<Vec<_>>());
    for (name, measure) in MEASURES {
        let mut values = vec![Vec::new(); benches.len()];
        // The first round warms caches. The order goes round, so that nobody always follows the same.
        let mut able = vec![true; benches.len()];
        for round in 0..=plan.repetitions {
            for n in 0..benches.len() {
                let at = (n + round) % benches.len();
                if !able[at] {
                    continue;
                }
                match measure(&benches[at]) {
                    Ok(value) if round > 0 => values[at].push(value),
                    Ok(_) => {}
                    Err(e) => {
                        eprintln!("{name}: {}: {e}", benches[at].name);
                        able[at] = round > 0;
                    }
                }
            }
        }
        let medians: Vec<Option<f64>> = values.iter().map(|of| median(of)).collect();
        let number = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.2}"));
        let mut row = vec![name.to_owned()];
        row.extend(medians.iter().map(|m| number(*m)));
        row.extend(medians[1..].iter().map(|m| number(medians[0].zip(*m).map(|(own, other)| own / other))));
        table.row(row);
    }
    drop(benches);
    let cgroups = plan.cgroups;
    Ok(format!("{}\n\nmedians of {}, ms, cgroups {cgroups:?}\n\n{table}", machine(), plan.repetitions))
}

/// One runtime, with its bundles and a container of each that stands for `exec` and `state`.
struct Bench {
    name: String,
    version: String,
    program: PathBuf,
    base: PathBuf,
}

const LIMIT: Duration = Duration::from_secs(30);

impl Bench {
    fn prepare(base: &Path, name: &str, program: &Path) -> Result<Bench> {
        let base = base.join(name);
        let said = command::run(Command::new(program).arg("--version"), LIMIT).out;
        let version = said.lines().next().unwrap_or_default().replace("version ", "");
        let bench = Bench { name: name.to_owned(), version, program: program.canonicalize()?, base };
        for kind in [Kind::Minimal, Kind::Docker] {
            bench.make_bundle(kind, "life", &["/bin/true"])?;
            bench.make_bundle(kind, "standing", &["/bin/sleep", "1000"])?;
            let mut run = bench.runtime();
            run.args(["run", "-d", "--bundle"]).arg(bench.bundle(kind, "standing")).arg(bench.standing(kind));
            bench.timed(&mut run)?;
        }
        Ok(bench)
    }

    fn runtime(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--root").arg(self.base.join("state"));
        command
    }

    fn standing(&self, kind: Kind) -> String {
        format!("bench-{}-{kind:?}-{}", self.name, std::process::id()).to_lowercase()
    }

    fn bundle(&self, kind: Kind, role: &str) -> PathBuf {
        self.base.join(format!("{kind:?}-{role}"))
    }

    fn make_bundle(&self, kind: Kind, role: &str, args: &[&str]) -> Result<()> {
        let dir = self.bundle(kind, role);
        let bin = dir.join("rootfs/bin");
        fs::create_dir_all(&bin)?;
        let busybox = needs::on_path("busybox").ok_or_else(|| Error::other("no busybox"))?;
        fs::copy(busybox, bin.join("busybox"))?;
        for name in ["true", "sleep"] {
            symlink("busybox", bin.join(name))?;
        }
        let cgroup = format!("/lmrun-bench/{}-{kind:?}-{role}", self.name);
        let mut config = minimal(args, &cgroup);
        if matches!(kind, Kind::Docker) {
            like_docker(&mut config, &dir)?;
        }
        fs::write(dir.join("config.json"), config.to_string())
    }

    /// Milliseconds that a command takes; it must succeed.
    fn timed(&self, command: &mut Command) -> Result<f64> {
        let begin = Instant::now();
        let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status()?;
        let took = begin.elapsed();
        if !status.success() {
            return Err(Error::other(format!("{}: {status}", command::line(command))));
        }
        Ok(took.as_secs_f64() * 1000.0)
    }

    fn life(&self, kind: Kind) -> Result<f64> {
        let id = format!("{}-life", self.standing(kind));
        let pid_file = self.base.join("pid");
        let begin = Instant::now();
        let mut create = self.runtime();
        create.args(["create", "--pid-file"]).arg(&pid_file).arg("--bundle").arg(self.bundle(kind, "life")).arg(&id);
        self.timed(&mut create)?;
        let pid = fs::read_to_string(&pid_file)?.trim().parse().map_err(Error::other)?;
        let process = PidFd::open(pid)?;
        self.timed(self.runtime().args(["start", &id]))?;
        process.wait_end(LIMIT)?;
        let waited = begin.elapsed();
        // Reaped as an engine does, which deletes only then.
        let _ = waitpid(nix::unistd::Pid::from_raw(pid), None);
        let delete = self.timed(self.runtime().args(["delete", &id]))?;
        while waitpid(None, Some(WaitPidFlag::WNOHANG)).is_ok_and(|status| status.pid().is_some()) {}
        Ok(waited.as_secs_f64() * 1000.0 + delete)
    }

    fn run_command(&self, kind: Kind) -> Command {
        let mut run = self.runtime();
        let id = format!("{}-run", self.standing(kind));
        run.args(["run", "--bundle"]).arg(self.bundle(kind, "life")).arg(id);
        run
    }

    fn run(&self, kind: Kind) -> Result<f64> {
        self.timed(&mut self.run_command(kind))
    }

    fn exec(&self, kind: Kind) -> Result<f64> {
        self.timed(self.runtime().args(["exec", &self.standing(kind), "/bin/true"]))
    }

    /// The most that `run` has resident at a time, as the kernel counts it for time(1).
    fn peak(&self) -> Result<f64> {
        let mut run = Command::new("busybox");
        let inner = self.run_command(Kind::Minimal);
        run.args(["time", "-f", "%M"]).arg(inner.get_program()).args(inner.get_args());
        let done = command::run(&mut run, LIMIT);
        // busybox's time counts in units of its own, four to the KiB.
        let last = done.err.lines().last().unwrap_or_default();
        last.trim().parse::<f64>().map(|n| n / 4.0).map_err(|e| Error::other(format!("{done}: {e}")))
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        for kind in [Kind::Minimal, Kind::Docker] {
            let _ = command::run(self.runtime().args(["delete", "--force", &self.standing(kind)]), LIMIT);
        }
    }
}

fn mounted(kind: &str, at: &str, options: &[&str]) -> Value {
    json!({ "destination": at, "type": kind, "source": kind, "options": options })
}

fn minimal(args: &[&str], cgroup: &str) -> Value {
    let namespaces = ["pid", "mount", "ipc", "uts", "network"].map(|kind| json!({ "type": kind }));
    json!({
        "ociVersion": "1.0.2",
        "root": { "path": "rootfs" },
        "process": {
            "args": args,
            "env": ["PATH=/bin"],
            "cwd": "/",
            "user": { "uid": 0, "gid": 0 },
        },
        "mounts": [mounted("proc", "/proc", &[]), mounted("tmpfs", "/dev", &["nosuid", "mode=755", "size=65536k"])],
        "linux": {
            "cgroupsPath": cgroup,
            "namespaces": namespaces,
        },
    })
}

/// As `docker run` has it: 20 mounts, capabilities, seccomp, masked and read-only paths, limits.
fn like_docker(config: &mut Value, dir: &Path) -> Result<()> {
    let mut mounts = vec![
        mounted("proc", "/proc", &["nosuid", "noexec", "nodev"]),
        mounted("tmpfs", "/dev", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mounted("devpts", "/dev/pts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
        mounted("sysfs", "/sys", &["nosuid", "noexec", "nodev", "ro"]),
        mounted("cgroup", "/sys/fs/cgroup", &["ro", "nosuid", "noexec", "nodev"]),
        mounted("mqueue", "/dev/mqueue", &["nosuid", "noexec", "nodev"]),
        mounted("tmpfs", "/dev/shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=67108864"]),
    ];
    for n in mounts.len()..20 {
        let source = dir.join(format!("volume{n}"));
        if n % 2 == 0 {
            fs::create_dir_all(&source)?;
        } else {
            File::create(&source)?;
        }
        mounts.push(json!({ "destination": format!("/etc/volume{n}"), "type": "bind", "source": source,
            "options": ["rbind", "rprivate"] }));
    }
    config["mounts"] = json!(mounts);
    let capabilities = [
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FSETID",
        "CAP_FOWNER",
        "CAP_MKNOD",
        "CAP_NET_RAW",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SETFCAP",
        "CAP_SETPCAP",
        "CAP_NET_BIND_SERVICE",
        "CAP_SYS_CHROOT",
        "CAP_KILL",
        "CAP_AUDIT_WRITE",
    ];
    config["process"]["capabilities"] =
        json!({ "bounding": capabilities, "effective": capabilities, "permitted": capabilities });
    config["process"]["oomScoreAdj"] = json!(0);
    config["linux"]["sysctl"] = json!({ "net.ipv4.ip_unprivileged_port_start": "0" });
    config["linux"]["resources"] = json!({
        "devices": [
            { "allow": false, "access": "rwm" },
            { "allow": true, "type": "c", "major": 1, "minor": 5, "access": "rwm" },
            { "allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm" },
            { "allow": true, "type": "c", "major": 1, "minor": 9, "access": "rwm" },
            { "allow": true, "type": "c", "major": 1, "minor": 8, "access": "rwm" },
            { "allow": true, "type": "c", "major": 5, "minor": 0, "access": "rwm" },
            { "allow": true, "type": "c", "major": 5, "minor": 1, "access": "rwm" },
            { "allow": false, "type": "c", "major": 10, "minor": 229, "access": "rwm" },
        ],
    });
    let limits = json!({ "memory": { "limit": 256 << 20 }, "cpu": { "shares": 512 }, "pids": { "limit": 100 } });
    for (controller, limit) in limits.as_object().into_iter().flatten() {
        // A view of version 2 alone has the controllers that version 1 has left.
        let unified = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers");
        if unified.map_or(true, |controllers| controllers.split_whitespace().any(|name| name == controller)) {
            config["linux"]["resources"][controller] = limit.clone();
        }
    }
    config["linux"]["maskedPaths"] = json!([
        "/proc/asound",
        "/proc/acpi",
        "/proc/kcore",
        "/proc/keys",
        "/proc/latency_stats",
        "/proc/timer_list",
        "/proc/timer_stats",
        "/proc/sched_debug",
        "/proc/scsi",
        "/sys/firmware"
    ]);
    config["linux"]["readonlyPaths"] =
        json!(["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]);
    config["linux"]["seccomp"] = crate::profile::docker_like(u32::MAX);
    Ok(())
}
