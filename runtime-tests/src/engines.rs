//! Container engines that drive the lmrun under test: Docker with its containerd, `ctr`, and Podman.
//!
//! They live in mount, pid and network namespaces of their own, with all their state below one directory, so that
//! nothing is left of them when this ends, and an engine that serves this machine is not touched.

use std::cell::RefCell;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::command::{self, Done};
use crate::needs;

/// No command of an engine takes this long unless it hangs.
const LIMIT: Duration = Duration::from_secs(60);

/// The name of the image with nothing but busybox in it.
pub const BUSYBOX: &str = "lmrun-busybox";
/// The name of an image that wants this machine's `/usr` as a volume, see [`HOST_USR`].
pub const HOST: &str = "lmrun-host";
/// Options with which containers of [`HOST`] have this machine's programs.
pub const HOST_USR: [&str; 2] = ["--volume", "/usr:/usr:ro"];

/// An engine with a command line of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    Docker,
    Podman,
}

impl Engine {
    pub const ALL: [Engine; 2] = [Engine::Docker, Engine::Podman];

    pub fn name(self) -> &'static str {
        match self {
            Engine::Docker => "docker",
            Engine::Podman => "podman",
        }
    }

    /// Whether its programs are here; says so where they are not.
    pub fn is_installed(self) -> bool {
        let programs: &[&str] = match self {
            Engine::Docker => &["docker", "dockerd", "containerd"],
            Engine::Podman => &["podman", "conmon"],
        };
        let missing = programs.iter().find(|program| needs::on_path(program).is_none());
        if let Some(program) = missing {
            println!("SKIP {}: no {program} (make test-engines installs it)", self.name());
        }
        missing.is_none()
    }
}

/// The namespaces with the daemons in them.
pub struct Engines {
    pub base: PathBuf,
    daemons: Child,
    /// The first process in there, as this machine counts.
    init: u32,
    history: RefCell<Vec<Done>>,
}

impl Engines {
    /// Starts the daemons that are installed, and waits until they answer.
    pub fn start(name: &str) -> Engines {
        let base = std::env::temp_dir().join(format!("lmrun-{name}-{}", std::process::id()));
        for dir in ["bin", "run", "checkpoints"] {
            fs::create_dir_all(base.join(dir)).expect("the directory for temporary files can be written");
        }
        for name in ["lmrun", "criu"] {
            symlink(needs::built("lmrun"), base.join("bin").join(name)).expect("links can be made");
        }
        configure(&base).expect("configuration can be written");
        let log = || fs::File::options().create(true).append(true).open(base.join("log")).expect("base is writable");
        let daemons = Command::new("unshare")
            .args(["--mount", "--net", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", DAEMONS])
            .env("BASE", &base)
            .env("PATH", path(&base))
            .stdin(Stdio::null())
            .stdout(log())
            .stderr(log())
            .spawn()
            .expect("unshare starts");
        let mut engines = Engines { base, daemons, init: 0, history: RefCell::default() };
        engines.await_init();
        if Engine::Docker.is_installed() {
            engines.await_docker();
        }
        engines
    }

    fn await_init(&mut self) {
        let children = format!("/proc/{0}/task/{0}/children", self.daemons.id());
        let begin = Instant::now();
        while self.init == 0 || !self.base.join("run/ready").exists() {
            let first = fs::read_to_string(&children).unwrap_or_default();
            self.init = first.split_whitespace().next().and_then(|pid| pid.parse().ok()).unwrap_or(0);
            assert!(begin.elapsed() < LIMIT, "no namespaces: {}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn await_docker(&self) {
        let begin = Instant::now();
        while !command::run(&mut self.command("docker", &["version"]), LIMIT).succeeded() {
            assert!(begin.elapsed() < LIMIT, "dockerd does not answer: {}", self.log());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.base.join("log")).unwrap_or_default()
    }

    /// A command in the namespaces of the daemons.
    pub fn command(&self, program: &str, words: &[&str]) -> Command {
        let base = |name: &str| self.base.join(name);
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.init.to_string(), "-m", "-n", "-p", "--", program]);
        match program {
            "podman" => drop(command.arg("--tmpdir").arg(base("run/libpod"))),
            "ctr" => drop(command.arg("--address").arg(base("run/containerd.sock"))),
            _ => {}
        }
        command.args(words);
        command.env("PATH", path(&self.base));
        command.env("DOCKER_HOST", format!("unix://{}", base("run/docker.sock").display()));
        command.env("CONTAINERS_CONF", base("containers.conf")).env("CONTAINERS_STORAGE_CONF", base("storage.conf"));
        command
    }

    /// Runs it to its end.
    pub fn perform(&self, program: &str, words: &[&str]) -> Done {
        let mut done = command::run(&mut self.command(program, words), LIMIT);
        done.line = format!("{program} {}", words.join(" "));
        self.history.borrow_mut().push(done.clone());
        done
    }

    /// Runs it to its end, which must be a good one; gives what it printed.
    #[track_caller]
    pub fn ok(&self, engine: Engine, words: &[&str]) -> String {
        self.perform(engine.name(), words).ok().out.trim().to_owned()
    }

    /// Makes an image of a directory.
    #[track_caller]
    pub fn import(&self, engine: Engine, name: &str, rootfs: &Path) {
        let tar = self.base.join(format!("{name}.tar"));
        if !tar.exists() {
            command::tool(&format!("tar -C {} -cf {} .", rootfs.display(), tar.display()));
        }
        self.ok(engine, &["import", &tar.display().to_string(), name]);
    }

    /// Makes [`BUSYBOX`]; gives its root file system.
    #[track_caller]
    pub fn import_busybox(&self, engine: Engine) -> PathBuf {
        let rootfs = self.base.join("busybox");
        if !rootfs.exists() {
            busybox(&rootfs).expect("a root file system can be made");
        }
        self.import(engine, BUSYBOX, &rootfs);
        rootfs
    }

    /// Makes [`HOST`], with `files` (name, content) at its root.
    #[track_caller]
    pub fn import_host(&self, engine: Engine, files: &[(&str, &str)]) {
        let rootfs = self.base.join("host");
        if !rootfs.exists() {
            host(&rootfs).expect("a root file system can be made");
        }
        for (name, content) in files {
            fs::write(rootfs.join(name), content).expect("base is writable");
        }
        self.import(engine, HOST, &rootfs);
    }

    /// Waits until a container's log has grown by a line that is not among `before`; gives all lines.
    #[track_caller]
    pub fn more_lines(&self, engine: Engine, id: &str, before: usize) -> Vec<String> {
        let begin = Instant::now();
        loop {
            let lines: Vec<String> = self.ok(engine, &["logs", id]).lines().map(str::to_owned).collect();
            if lines.len() > before {
                return lines;
            }
            assert!(begin.elapsed() < LIMIT / 4, "{id} says nothing more: {lines:?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Engines {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.history.borrow().iter().for_each(|done| println!("{done}"));
            println!("{}", self.log().lines().rev().take(20).collect::<Vec<_>>().join("\n"));
        }
        for engine in Engine::ALL.into_iter().filter(|engine| needs::on_path(engine.name()).is_some()) {
            let all = self.perform(engine.name(), &["ps", "--all", "--quiet"]).out;
            for id in all.split_whitespace() {
                self.perform(engine.name(), &["rm", "--force", id]);
            }
        }
        let _ = self.daemons.kill();
        let _ = self.daemons.wait();
        let _ = fs::remove_dir_all(&self.base);
    }
}

/// The first process in the namespaces. `/run` is its own: engines put sockets there.
const DAEMONS: &str = r#"
mount --make-rprivate / && mount -t tmpfs none /run && ip link set lo up || exit 1
mkdir -p /var/lib/lmrun/checkpoints && mount --bind "$BASE/checkpoints" /var/lib/lmrun/checkpoints || exit 1
command -v containerd >/dev/null && containerd -c "$BASE/containerd.toml" &
command -v dockerd >/dev/null && dockerd --config-file "$BASE/daemon.json" &
touch "$BASE/run/ready"
while :; do wait; sleep 1; done
"#;

fn path(base: &Path) -> String {
    format!("{}:{}:/usr/sbin:/sbin", base.join("bin").display(), std::env::var("PATH").unwrap_or_default())
}

fn configure(base: &Path) -> std::io::Result<()> {
    let at = |name: &str| base.join(name).display().to_string();
    let docker = json!({
        "experimental": true,
        "data-root": at("docker"), "exec-root": at("run/docker"), "pidfile": at("run/docker.pid"),
        "hosts": [format!("unix://{}", at("run/docker.sock"))], "containerd": at("run/containerd.sock"),
        "bridge": "none", "iptables": false, "exec-opts": ["native.cgroupdriver=cgroupfs"],
        "default-runtime": "lmrun", "runtimes": { "lmrun": { "path": at("bin/lmrun") } },
    });
    fs::write(base.join("daemon.json"), docker.to_string())?;
    let containerd = format!(
        "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
         [grpc]\naddress = {:?}\n",
        at("containerd"),
        at("run/containerd"),
        at("run/containerd.sock")
    );
    fs::write(base.join("containerd.toml"), containerd)?;
    // Limits that every root may set: Podman's own are higher than some machines allow.
    let podman = format!(
        "[containers]\ndefault_ulimits = [\"nofile=1024:4096\", \"nproc=1024:4096\"]\n\
         [engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"file\"\nruntime = \"lmrun\"\n\
         [engine.runtimes]\nlmrun = [{:?}]\n",
        at("bin/lmrun")
    );
    fs::write(base.join("containers.conf"), podman)?;
    let storage =
        format!("[storage]\ndriver = \"vfs\"\ngraphroot = {:?}\nrunroot = {:?}\n", at("podman"), at("run/podman"));
    fs::write(base.join("storage.conf"), storage)
}

fn busybox(rootfs: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    for dir in ["bin", "etc", "tmp", "root"] {
        fs::create_dir_all(rootfs.join(dir))?;
    }
    fs::set_permissions(rootfs.join("tmp"), PermissionsExt::from_mode(0o1777))?;
    fs::write(rootfs.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n")?;
    fs::write(rootfs.join("etc/group"), "root:x:0:\nuser:x:1000:\n")?;
    let program = needs::on_path("busybox").ok_or(std::io::ErrorKind::NotFound)?;
    fs::copy(&program, rootfs.join("bin/busybox"))?;
    let names = command::run(Command::new(&program).arg("--list"), LIMIT).out;
    names
        .lines()
        .filter(|name| *name != "busybox")
        .try_for_each(|name| symlink("busybox", rootfs.join("bin").join(name)))
}

fn host(rootfs: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    for dir in ["usr", "proc", "sys", "dev", "run", "tmp", "root", "srv", "var/tmp", "var/log", "var/lib"] {
        fs::create_dir_all(rootfs.join(dir))?;
    }
    for dir in ["tmp", "var/tmp", "var/lib"] {
        fs::set_permissions(rootfs.join(dir), PermissionsExt::from_mode(0o1777))?;
    }
    for link in ["bin", "sbin", "lib", "lib64"] {
        symlink(format!("usr/{link}"), rootfs.join(link))?;
    }
    command::tool(&format!("cp -a /etc {}", rootfs.join("etc").display()));
    let mtab = rootfs.join("etc/mtab");
    if mtab.is_symlink() { fs::remove_file(mtab) } else { Ok(()) }
}
