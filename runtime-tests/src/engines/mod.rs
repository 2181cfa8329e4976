//! Container engines that drive the lmrun under test: Docker with its containerd, `ctr`, and Podman.
//!
//! They live in mount, pid and network namespaces of their own, with all their state below one directory, so that
//! nothing is left of them when this ends, and an engine that serves this machine is not touched. Their programs are
//! this machine's, or those in a tree of a newer Debian, which is then the root of the mount namespace.

use std::cell::RefCell;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::command::{self, Done};
use crate::needs;

mod configuration;
mod images;

pub use images::host as host_rootfs;
mod pair;

pub use pair::Pair;

/// No command of an engine takes this long unless it hangs.
const LIMIT: Duration = Duration::from_secs(60);

/// The name of the image with nothing but busybox in it.
pub const BUSYBOX: &str = "lmrun-busybox";
/// The name of an image that wants this machine's `/usr` as a volume, see [`Engines::host_usr`].
pub const HOST: &str = "lmrun-host";

/// The network namespace that containers of `ctr` may join, and its address; the daemons' side has [`GATEWAY`].
pub const JOINED: &str = "/run/netns/joined";
pub const JOINED_ADDRESS: &str = "10.99.9.2";
const GATEWAY: &str = "10.99.9.1";

/// An engine with a command line of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    Docker,
    /// By `ctr`.
    Containerd,
    Podman,
}

impl Engine {
    pub const ALL: [Engine; 3] = [Engine::Docker, Engine::Containerd, Engine::Podman];

    /// Its command.
    pub fn name(self) -> &'static str {
        match self {
            Engine::Docker => "docker",
            Engine::Containerd => "ctr",
            Engine::Podman => "podman",
        }
    }

    /// Whether its programs are on this machine; says so where they are not.
    pub fn is_installed(self) -> bool {
        Programs::Installed.have(self)
    }

    fn programs(self) -> &'static [&'static str] {
        match self {
            Engine::Docker => &["docker", "dockerd", "containerd"],
            Engine::Containerd => &["ctr", "containerd", "dockerd"],
            Engine::Podman => &["podman", "conmon"],
        }
    }
}

/// Where the programs of engines come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Programs {
    Installed,
    /// The root of a tree that `tools.sh newer-engines` makes.
    Tree(PathBuf),
}

impl Programs {
    /// The tree, wherever it is on this machine.
    pub fn newer() -> Programs {
        let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache"));
        let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(home).unwrap_or_default();
        Programs::Tree(cache.join("lmrun-engines/tree"))
    }

    fn has(&self, program: &str) -> bool {
        match self {
            Programs::Installed => needs::on_path(program).is_some(),
            Programs::Tree(root) => ["usr/bin", "usr/sbin"].iter().any(|dir| root.join(dir).join(program).is_file()),
        }
    }

    /// Whether an engine is here; says so where it is not.
    pub fn have(&self, engine: Engine) -> bool {
        let missing = engine.programs().iter().find(|program| !self.has(program));
        if let Some(program) = missing {
            let place = match self {
                Programs::Installed => "",
                Programs::Tree(_) => "newer ",
            };
            println!("SKIP {place}{}: no {program} (make test-engines installs it)", engine.name());
        }
        missing.is_none()
    }
}

/// The namespaces with the daemons in them.
pub struct Engines {
    pub base: PathBuf,
    programs: Programs,
    daemons: Child,
    /// The first process in there, as this machine counts.
    init: u32,
    history: RefCell<Vec<Done>>,
}

impl Engines {
    /// Starts this machine's daemons, those that are installed, and waits until they answer.
    pub fn start(name: &str) -> Engines {
        Engines::start_from(name, Programs::Installed)
    }

    /// Starts the daemons that are there, and waits until they answer.
    pub fn start_from(name: &str, programs: Programs) -> Engines {
        let base = std::env::temp_dir().join(format!("lmrun-{name}-{}", std::process::id()));
        for dir in ["bin", "run", "checkpoints", "bound", "root"] {
            fs::create_dir_all(base.join(dir)).expect("the directory for temporary files can be written");
        }
        fs::copy(needs::built("lmrun"), base.join("bin/lmrun")).expect("programs can be copied");
        symlink("lmrun", base.join("bin/criu")).expect("links can be made");
        configuration::write(&base).expect("configuration can be written");
        let log = || fs::File::options().create(true).append(true).open(base.join("log")).expect("base is writable");
        let tree = match &programs {
            Programs::Installed => Path::new(""),
            Programs::Tree(root) => root,
        };
        // They end with the thread that started them, even where that is killed.
        let daemons = Command::new("setpriv")
            .args([
                "--pdeathsig",
                "KILL",
                "unshare",
                "--mount",
                "--net",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
                "sh",
                "-c",
                DAEMONS,
            ])
            .env("BASE", &base)
            .env("TREE", tree)
            .env("JOINED", format!("{JOINED_ADDRESS}/24"))
            .env("GATEWAY", format!("{GATEWAY}/24"))
            .env("PATH", path(&base))
            .stdin(Stdio::null())
            .stdout(log())
            .stderr(log())
            .spawn()
            .expect("setpriv starts");
        let mut engines = Engines { base, programs, daemons, init: 0, history: RefCell::default() };
        engines.await_init();
        if engines.programs.have(Engine::Docker) {
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

    pub fn log(&self) -> String {
        fs::read_to_string(self.base.join("log")).unwrap_or_default()
    }

    /// Where this machine's `/usr` is for the engines, to be a volume at `/usr` of containers of [`HOST`].
    pub fn host_usr(&self) -> &'static str {
        match self.programs {
            Programs::Installed => "/usr",
            Programs::Tree(_) => "/host-usr",
        }
    }

    /// What an engine says that it is, like `28.5.2`.
    pub fn version(&self, engine: Engine) -> String {
        let words: &[&str] = match engine {
            Engine::Docker => &["version", "--format", "{{.Server.Version}}"],
            Engine::Containerd => &["--version"],
            Engine::Podman => &["version", "--format", "{{.Client.Version}}"],
        };
        self.ok(engine, words).split_whitespace().last().unwrap_or_default().to_owned()
    }

    /// A command in the namespaces of the daemons.
    pub fn command(&self, program: &str, words: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.init.to_string(), "-m", "-n", "-p", "--"]).args(self.line(program, words));
        self.surround(&mut command);
        command
    }

    /// A command in the namespaces of the daemons, on a terminal of 33 rows and 77 columns.
    pub fn on_terminal(&self, program: &str, words: &[&str]) -> Command {
        let quoted: Vec<String> =
            self.line(program, words).iter().map(|word| format!("'{}'", word.replace('\'', "'\\''"))).collect();
        let typed = format!("stty rows 33 cols 77; {}", quoted.join(" "));
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.init.to_string(), "-m", "-n", "-p", "--", "script", "-qec", &typed, "/dev/null"]);
        self.surround(&mut command);
        command
    }

    /// A command of this machine in the network namespace of the daemons.
    pub fn in_network(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.init.to_string(), "-n", "--", program]);
        command
    }

    fn line(&self, program: &str, words: &[&str]) -> Vec<String> {
        let base = |name: &str| self.base.join(name).display().to_string();
        let always = match program {
            "podman" => vec!["--tmpdir".to_owned(), base("run/libpod")],
            "ctr" => vec!["--address".to_owned(), base("run/containerd.sock")],
            _ => Vec::new(),
        };
        let words = words.iter().map(|word| (*word).to_owned());
        std::iter::once(program.to_owned()).chain(always).chain(words).collect()
    }

    fn surround(&self, command: &mut Command) {
        let base = |name: &str| self.base.join(name);
        command.env("PATH", path(&self.base)).env("SHELL", "/bin/sh");
        command.env("DOCKER_HOST", format!("unix://{}", base("run/docker.sock").display()));
        command.env("CONTAINERS_CONF", base("containers.conf")).env("CONTAINERS_STORAGE_CONF", base("storage.conf"));
        // There is no systemd here to time Podman's health checks, and what Podman says of old cgroups is known.
        command.env("DISABLE_HC_SYSTEMD", "true").env("PODMAN_IGNORE_CGROUPSV1_WARNING", "1");
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
        let saved = self.base.join(format!("{name}.image"));
        let [tar, saved] = [tar, saved].map(|path| path.display().to_string());
        if !Path::new(&tar).exists() {
            command::tool(&format!("tar -C {} -cf {tar} .", rootfs.display()));
        }
        match engine {
            Engine::Docker | Engine::Podman => drop(self.ok(engine, &["import", &tar, name])),
            // It takes images only: Docker makes one.
            Engine::Containerd => {
                self.ok(Engine::Docker, &["import", &tar, name]);
                self.ok(Engine::Docker, &["save", "--output", &saved, name]);
                self.ok(engine, &["images", "import", &saved]);
            }
        }
    }

    /// Makes [`BUSYBOX`]; gives its root file system.
    #[track_caller]
    pub fn import_busybox(&self, engine: Engine) -> PathBuf {
        let rootfs = self.base.join("busybox");
        if !rootfs.exists() {
            images::busybox(&rootfs).expect("a root file system can be made");
        }
        self.import(engine, BUSYBOX, &rootfs);
        rootfs
    }

    /// Makes [`HOST`], with `files` (name, content) at its root; gives its root file system.
    #[track_caller]
    pub fn import_host(&self, engine: Engine, files: &[(&str, &str)]) -> PathBuf {
        let rootfs = self.base.join("host");
        if !rootfs.exists() {
            images::host(&rootfs).expect("a root file system can be made");
        }
        for (name, content) in files {
            fs::write(rootfs.join(name), content).expect("base is writable");
        }
        self.import(engine, HOST, &rootfs);
        rootfs
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
        for engine in [Engine::Docker, Engine::Podman] {
            if !engine.programs().iter().all(|program| self.programs.has(program)) {
                continue;
            }
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

/// The first process in the namespaces. `/run`, `/dev/shm`, the addresses that
/// CNI has given away, and what is written to `/etc` are its own; with a tree, all
/// of the root is, and this machine's `/usr` is at `/host-usr`.
const DAEMONS: &str = r#"
mount --make-rprivate / && ip link set lo up || exit 1
over() { # over LOWER AT NAME: writes at AT go elsewhere
    mkdir -p "$BASE/root/$3/upper" "$BASE/root/$3/work" "$2" &&
        mount -t overlay -o "lowerdir=$1,upperdir=$BASE/root/$3/upper,workdir=$BASE/root/$3/work" none "$2"
}
mount -t tmpfs none "$BASE/root" || exit 1
if [ -n "$TREE" ]; then
    over "$TREE" "$BASE/root/new" all || exit 1
    cd "$BASE/root/new" && mkdir -p host-usr old ".$BASE" || exit 1
    for dir in proc sys dev; do mount --rbind /$dir $dir || exit 1; done
    mount --bind /usr host-usr && mount --bind "$BASE" ".$BASE" && pivot_root . old && cd / && umount -l /old || exit 1
else
    over /etc /etc etc || exit 1
fi
mkdir -p /var/lib/cni
for dir in /run /dev/shm /var/lib/cni; do mount -t tmpfs none $dir || exit 1; done
mkdir -p /var/lib/lmrun/checkpoints /etc/lmrun && mount --bind "$BASE/checkpoints" /var/lib/lmrun/checkpoints || exit 1
echo restore-by-environment >/etc/lmrun/lmrun.conf
if command -v containerd >/dev/null; then
    ip netns add joined && ip -n joined link set lo up && ip link add joined type veth peer name eth0 netns joined &&
        ip addr add "$GATEWAY" dev joined && ip link set joined up &&
        ip -n joined addr add "$JOINED" dev eth0 && ip -n joined link set eth0 up || exit 1
    containerd -c "$BASE/containerd.toml" &
fi
command -v dockerd >/dev/null && dockerd --config-file "$BASE/daemon.json" &
touch "$BASE/run/ready"
while :; do wait; sleep 1; done
"#;

fn path(base: &Path) -> String {
    format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", base.join("bin").display())
}
