//! One container under test: its bundle, its state, and what lmrun is asked to do with it.

use std::cell::{Cell, RefCell};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::bundle::{self, Shape};
use crate::command::{self, Done};
use crate::{host, needs};

/// No command of a scenario takes this long unless it hangs.
const LIMIT: Duration = Duration::from_secs(30);

/// A container and all that belongs to it. Dropping it removes everything, and prints what happened when the
/// scenario failed.
pub struct Container {
    pub id: String,
    /// Bundle, images, logs.
    pub base: PathBuf,
    /// Where lmrun keeps its state, until the first move.
    pub root: PathBuf,
    /// How many moves there were.
    moves: Cell<u32>,
    lmrun: PathBuf,
    through: Vec<String>,
    history: RefCell<Vec<Done>>,
}

/// A checkpoint to be made; `Default` is a plain one, which ends the container.
#[derive(Debug, Clone, Default)]
pub struct Checkpoint<'a> {
    /// Name of the image directory.
    pub images: &'a str,
    /// Name of the parent's, beside it.
    pub parent: Option<&'a str>,
    pub pre_dump: bool,
    pub leave_running: bool,
    pub tcp_established: bool,
    /// The port of a page server on this host.
    pub page_server: Option<u16>,
}

impl Container {
    /// Prepares a bundle for `workload` under a name of its own.
    pub fn of_workload(workload: &str) -> Container {
        Container::new(&Shape { args: vec!["/workload".into(), workload.into()], ..Shape::default() })
    }

    pub fn new(shape: &Shape) -> Container {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let id = format!("lmrun-test-{}-{n}", std::process::id());
        let base = std::env::temp_dir().join(&id);
        for dir in ["bundle", "images", "server", "work"] {
            fs::create_dir_all(base.join(dir)).expect("the directory for temporary files can be written");
        }
        bundle::make(&base.join("bundle"), &id, shape).expect("a bundle can be made");
        let root = base.join("state");
        Container {
            id,
            base,
            root,
            moves: Cell::new(0),
            lmrun: needs::built("lmrun"),
            through: Vec::new(),
            history: RefCell::default(),
        }
    }

    /// From now on lmrun is called by this program, behind whose arguments its own command line comes.
    pub fn call_through(&mut self, words: &[&str]) {
        self.through = words.iter().map(|word| word.to_string()).collect();
    }

    /// All that is there becomes the user's and group's of this number, with an lmrun of their own, of which this gives
    /// the path.
    pub fn give_to(&self, user: u32) -> PathBuf {
        let program = self.base.join("lmrun");
        fs::copy(&self.lmrun, &program).expect("base is writable");
        give(&self.base, user);
        program
    }

    /// An lmrun command, with the state directory of this container.
    pub fn lmrun(&self) -> Command {
        let words = self.through.iter().map(OsStr::new);
        let mut words = words.chain([self.lmrun.as_os_str()]);
        let mut command = Command::new(words.next().unwrap_or_default());
        command.args(words);
        command.arg("--root").arg(self.root_after(self.moves.get()));
        command
    }

    /// Where lmrun keeps its state after so many moves.
    pub fn root_after(&self, moves: u32) -> PathBuf {
        if moves == 0 { self.root.clone() } else { self.base.join(format!("state{moves}")) }
    }

    fn bundle_after(&self, moves: u32) -> PathBuf {
        self.base.join(if moves == 0 { "bundle".to_owned() } else { format!("bundle{moves}") })
    }

    /// Moves the container with `lmrun migrate` to another place on this host: another directory of states,
    /// another cgroup, another root file system.
    pub fn migrate(&self, flags: &[&str]) -> Done {
        let moves = self.moves.get() + 1;
        let there = self.migrate_to(moves);
        let mut command = self.migrate_command(moves);
        command.args(flags).arg(&self.id).arg(format!("ssh://elsewhere{}", there.display()));
        let done = self.perform(&mut command);
        if done.succeeded() {
            self.moves.set(moves);
        }
        done
    }

    /// `lmrun migrate`, for which a script stands in for ssh(1) that runs its command here.
    pub fn migrate_command(&self, moves: u32) -> Command {
        let bin = self.base.join("bin");
        fs::create_dir_all(&bin).expect("base is writable");
        // ssh -T -- HOST COMMAND...
        host::script(&bin.join("ssh"), "while [ \"$1\" != -- ]; do shift; done\nshift 2\nexec sh -c \"$*\"");
        let mut path = bin.into_os_string();
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        let mut command = self.lmrun();
        command.env("PATH", path).arg("migrate").arg("--bundle").arg(self.bundle_after(moves));
        command
    }

    /// Prepares the place for move number `moves`; gives the path of its lmrun.
    pub fn migrate_to(&self, moves: u32) -> PathBuf {
        let bundle = self.bundle_after(moves);
        fs::create_dir_all(&bundle).expect("base is writable");
        let config = fs::read_to_string(self.bundle().join("config.json")).expect("there is a bundle");
        let cgroup = |moves| match moves {
            0 => format!("/lmrun-test/{}\"", self.id),
            _ => format!("/lmrun-test/{}.{moves}\"", self.id),
        };
        let rootfs = |moves| serde_json::json!(self.bundle_after(moves).join("rootfs")).to_string();
        let config = config.replace(&cgroup(0), &cgroup(moves)).replace(&rootfs(0), &rootfs(moves));
        fs::write(bundle.join("config.json"), config).expect("base is writable");
        let lmrun = self.base.join(format!("lmrun{moves}"));
        let root = self.root_after(moves);
        host::script(&lmrun, &format!("exec {} --root {} \"$@\"", self.lmrun.display(), root.display()));
        lmrun
    }

    /// Runs an lmrun command to its end.
    pub fn perform(&self, command: &mut Command) -> Done {
        let done = command::run(command, LIMIT);
        self.history.borrow_mut().push(done.clone());
        done
    }

    /// `lmrun WORD ID`
    pub fn simple(&self, word: &str) -> Done {
        self.perform(self.lmrun().args([word, &self.id]))
    }

    pub fn bundle(&self) -> PathBuf {
        self.base.join("bundle")
    }

    pub fn images(&self, name: &str) -> PathBuf {
        self.base.join("images").join(name)
    }

    pub fn work(&self, name: &str) -> PathBuf {
        self.base.join("work").join(name)
    }

    /// Runs a command that starts the container, whose standard streams are /dev/null and two files.
    fn start(&self, command: &mut Command) -> Done {
        let file = |name: &str| {
            File::options().append(true).create(true).open(self.base.join(name)).expect("base is writable")
        };
        let err_at = fs::metadata(self.base.join("err")).map_or(0, |m| m.len()) as usize;
        let begin = Instant::now();
        let line = command::line(command);
        let child = command.stdin(Stdio::null()).stdout(file("out")).stderr(file("err")).spawn();
        let status = command::wait(&mut child.unwrap_or_else(|e| panic!("{line}: {e}")), LIMIT);
        let err = fs::read(self.base.join("err")).unwrap_or_default();
        let err = String::from_utf8_lossy(err.get(err_at..).unwrap_or_default()).into_owned();
        let done = Done { line, status, out: String::new(), err, took: begin.elapsed() };
        self.history.borrow_mut().push(done.clone());
        done
    }

    /// The command line of `run -d`.
    pub fn run_command(&self) -> Command {
        let mut command = self.lmrun();
        command.args(["run", "-d", "--bundle"]).arg(self.bundle());
        command.arg("--pid-file").arg(self.base.join("pid")).arg(&self.id);
        command
    }

    pub fn run(&self) -> Done {
        self.start(&mut self.run_command())
    }

    /// The command line of a checkpoint.
    pub fn checkpoint_command(&self, c: &Checkpoint) -> Command {
        let mut command = self.lmrun();
        command.arg("checkpoint").arg("--image-path").arg(self.images(c.images));
        command.arg("--work-path").arg(self.work(c.images));
        if let Some(parent) = c.parent {
            command.arg("--parent-path").arg(format!("../{parent}"));
        }
        for (wanted, flag) in
            [(c.pre_dump, "--pre-dump"), (c.leave_running, "--leave-running"), (c.tcp_established, "--tcp-established")]
        {
            if wanted {
                command.arg(flag);
            }
        }
        if let Some(port) = c.page_server {
            command.arg("--page-server").arg(format!("127.0.0.1:{port}"));
        }
        command.arg(&self.id);
        command
    }

    pub fn checkpoint(&self, c: &Checkpoint) -> Done {
        self.perform(&mut self.checkpoint_command(c))
    }

    /// The command line of a restore from a directory.
    pub fn restore_command(&self, images: &Path, tcp_established: bool) -> Command {
        let mut command = self.lmrun();
        command.args(["restore", "-d", "--image-path"]).arg(images);
        command.arg("--work-path").arg(self.work("restore")).arg("--bundle").arg(self.bundle());
        command.arg("--pid-file").arg(self.base.join("pid"));
        if tcp_established {
            command.arg("--tcp-established");
        }
        command.arg(&self.id);
        command
    }

    pub fn restore(&self, images: &Path, tcp_established: bool) -> Done {
        self.start(&mut self.restore_command(images, tcp_established))
    }

    /// A page server that receives into `server/NAME`, ready to be connected to.
    pub fn page_server(&self, name: &str, parent: Option<&str>) -> PageServer {
        let (port, dir) = (free_port(), self.base.join("server").join(name));
        let mut command = self.lmrun();
        command.arg("page-server").arg("--image-path").arg(&dir);
        command.args(["--address", "127.0.0.1", "--port", &port.to_string()]);
        if let Some(parent) = parent {
            command.arg("--parent-path").arg(format!("../{parent}"));
        }
        self.serve(name, command, port, dir)
    }

    /// Starts a page server, and waits until it listens.
    pub fn serve(&self, name: &str, mut command: Command, port: u16, dir: PathBuf) -> PageServer {
        let log = self.base.join(format!("page-server-{name}.err"));
        let err = File::create(&log).expect("base is writable");
        let line = command::line(&command);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(err).spawn();
        let mut server = PageServer { child: child.unwrap_or_else(|e| panic!("{line}: {e}")), port, dir, line, log };
        let begin = Instant::now();
        while !listens(port) {
            let gone = server.child.try_wait().is_ok_and(|s| s.is_some());
            assert!(
                !gone && begin.elapsed() < Duration::from_secs(10),
                "{}: does not listen\n{}",
                server.line,
                server.errors()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        server
    }

    /// The pid of the container's init on the host.
    pub fn pid(&self) -> i32 {
        let text = fs::read_to_string(self.base.join("pid")).unwrap_or_default();
        text.trim().parse().unwrap_or_else(|_| panic!("pid file of {}: {text:?}", self.id))
    }

    pub fn alive(&self) -> bool {
        !host::processes(&self.id).is_empty()
    }

    /// A file in the workload's `/run-state`.
    pub fn state_file(&self, name: &str) -> PathBuf {
        self.bundle_after(self.moves.get()).join("rootfs/run-state").join(name)
    }

    /// What the container wrote to a standard stream: `out` or `err`.
    pub fn stream(&self, name: &str) -> String {
        fs::read_to_string(self.base.join(name)).unwrap_or_default()
    }

    /// Waits for a file of the workload's; panics when the workload fell over or takes too long.
    #[track_caller]
    pub fn wait_for(&self, name: &str) -> String {
        let begin = Instant::now();
        loop {
            if let Ok(word) = fs::read_to_string(self.state_file(name)) {
                return word;
            }
            let fallen = fs::read_dir(self.state_file("")).into_iter().flatten().flatten();
            if let Some(entry) = fallen.into_iter().find(|e| e.file_name().to_string_lossy().starts_with("panic")) {
                panic!("workload: {}", fs::read_to_string(entry.path()).unwrap_or_default());
            }
            assert!(self.alive(), "{}: no {name}, and no process is left", self.id);
            assert!(begin.elapsed() < Duration::from_secs(30), "{}: no {name} within 30 s", self.id);
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until the workload is set up. False when it cannot be on this host.
    #[track_caller]
    pub fn ready(&self) -> bool {
        let word = self.wait_for("ready");
        if let Some(reason) = word.strip_prefix("skip: ") {
            needs::skip(reason);
            return false;
        }
        assert!(word.is_empty(), "{word}");
        true
    }

    /// Has the workload verify itself for the `round`th time (from 1).
    #[track_caller]
    pub fn check(&self, round: u32) {
        let round = if round == 1 { String::new() } else { round.to_string() };
        fs::write(self.state_file(&format!("check{round}")), "").expect("run-state is writable");
        let verdict = self.wait_for(&format!("verdict{round}"));
        assert!(verdict == "ok", "{verdict}");
    }

    /// Has the workload do its `n`th step between rounds of pre-copy (from 1). Workloads without steps do not answer.
    #[track_caller]
    pub fn step(&self, n: u32) {
        fs::write(self.state_file(&format!("step{n}")), "").expect("run-state is writable");
        let word = self.wait_for(&format!("stepped{n}"));
        assert!(word == "ok", "{word}");
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for done in self.history.borrow().iter() {
                eprintln!("{done}");
            }
            let servers = fs::read_dir(&self.base).into_iter().flatten().flatten();
            let servers = servers.map(|e| e.file_name().to_string_lossy().into_owned());
            let streams = ["out", "err"].map(str::to_owned).into_iter();
            for name in streams.chain(servers.filter(|name| name.starts_with("page-server"))) {
                let text = self.stream(&name);
                let lines: Vec<_> = text.lines().collect();
                for line in &lines[lines.len().saturating_sub(40)..] {
                    eprintln!("  {name}: {line}");
                }
            }
        }
        for moves in 0..=self.moves.get() + 1 {
            let mut delete = Command::new(&self.lmrun);
            delete.arg("--root").arg(self.root_after(moves)).args(["delete", "--force", &self.id]);
            let _ = command::run(&mut delete, LIMIT);
        }
        host::sweep(&self.id);
        if std::env::var_os("LMRUN_TEST_KEEP").is_none() {
            let _ = fs::remove_dir_all(&self.base);
        }
    }
}

/// A running `lmrun page-server`; killed when dropped.
pub struct PageServer {
    child: Child,
    pub port: u16,
    pub dir: PathBuf,
    line: String,
    log: PathBuf,
}

impl PageServer {
    fn errors(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// It has received all and ended well.
    #[track_caller]
    pub fn done(mut self) -> PathBuf {
        let status = command::wait(&mut self.child, Duration::from_secs(20));
        assert!(status.is_some_and(|s| s.success()), "{}: {status:?}\n{}", self.line, self.errors());
        self.dir.clone()
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Waits for its end, whatever it is.
    pub fn ended(mut self) {
        command::wait(&mut self.child, Duration::from_secs(20));
    }
}

impl Drop for PageServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A port nobody uses now.
pub fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback has free ports");
    listener.local_addr().expect("a listener has an address").port()
}

/// Whether somebody listens on a port of this network namespace. (To connect would be to use a page server up.)
pub fn listens(port: u16) -> bool {
    let wanted = format!(":{port:04X}");
    ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"].iter().any(|file| {
        let text = fs::read_to_string(file).unwrap_or_default();
        text.lines().any(|line| {
            let words: Vec<_> = line.split_whitespace().collect();
            words.len() > 3 && words[1].ends_with(&wanted) && words[3] == "0A"
        })
    })
}

/// Copies what `from` has and `to` has not; links stay links.
pub fn complete(from: &Path, to: &Path) {
    for entry in fs::read_dir(from).expect("the local images exist").flatten() {
        let target = to.join(entry.file_name());
        if target.symlink_metadata().is_ok() {
            continue;
        }
        let kind = entry.file_type().expect("an entry has a type");
        if kind.is_symlink() {
            let link = fs::read_link(entry.path()).expect("it is a link");
            std::os::unix::fs::symlink(link, target).expect("the server's directory is writable");
        } else {
            fs::copy(entry.path(), target).expect("the server's directory is writable");
        }
    }
}

fn give(place: &Path, user: u32) {
    let meta = fs::symlink_metadata(place).expect("it was found there");
    if meta.is_symlink() {
        return;
    }
    // Not what is somebody else's, too.
    if meta.is_dir() || meta.nlink() == 1 {
        chown(place, Some(user), Some(user)).expect("this is root");
    }
    if meta.is_dir() {
        fs::read_dir(place).expect("a directory").flatten().for_each(|entry| give(&entry.path(), user));
    }
}
