//! One workload in one engine: what a user does with a container, in the words of each engine.

use std::cell::{Cell, RefCell};
use std::fs;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use runtime_tests::command::{self, Done};
use runtime_tests::engines::{BUSYBOX, Engine, Engines, HOST, JOINED, JOINED_ADDRESS};

use crate::workloads::{Question, Sign, Workload};

/// No workload needs longer to show that it is at work.
const PATIENCE: Duration = Duration::from_secs(60);
const ID: &str = "subject";
const NETWORK: &str = "lmrun-net";
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const GIB: &str = "1073741824";

/// Waits for the terminal's size: engines send it when the process runs.
const SIZED: &str = "for i in $(seq 50); do test \"$(stty size)\" = '33 77' && break; sleep 0.1; done; stty size";

/// How directories are named in which the files of a former container are.
const MOUNTED: &str = "mounted";

/// What an operation came to.
pub enum Verdict {
    Passed,
    /// The engine has no such operation.
    Absent,
}

pub type Outcome = Result<Verdict, String>;

/// How a container is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    /// With a network of its own, volumes, and clients.
    Bridged,
    /// On a terminal, below an init, with a root that is read only.
    Bare,
    /// With the network of the host.
    Host,
    /// To be started again when it ends, looked after, and with little memory.
    Watched,
}

pub struct Subject<'a> {
    pub engines: &'a Engines,
    pub engine: Engine,
    pub workload: &'a Workload,
    life: Cell<Life>,
    /// The last number that it counted to.
    count: Cell<u64>,
    /// To name things that must be new.
    serial: Cell<u32>,
    /// The image that the container is made of next.
    image: RefCell<String>,
    /// Where the files of a former container of `ctr` are mounted, and their name.
    mounted: RefCell<Option<(String, String)>>,
}

/// `ctr exec --user` of 1.6 mounts the container's files once more to look the user up, after which overlayfs writes nothing.
fn become_user(user: &str) -> [String; 4] {
    ["setpriv".to_owned(), format!("--reuid={user}"), format!("--regid={user}"), "--clear-groups".to_owned()]
}

fn passed(_: String) -> Verdict {
    Verdict::Passed
}

fn expect(what: &str, said: &str, right: bool) -> Outcome {
    if right { Ok(Verdict::Passed) } else { Err(format!("{what}: {said:?}")) }
}

impl<'a> Subject<'a> {
    pub fn new(engines: &'a Engines, engine: Engine, workload: &'a Workload) -> Subject<'a> {
        Subject {
            engines,
            engine,
            workload,
            life: Cell::new(Life::Bridged),
            count: Cell::new(0),
            serial: Cell::new(0),
            image: RefCell::new(workload.image.to_owned()),
            mounted: RefCell::default(),
        }
    }

    fn perform(&self, words: &[&str]) -> Done {
        self.engines.perform(self.engine.name(), words)
    }

    fn tell(&self, words: &[&str]) -> Result<String, String> {
        let mut done = self.perform(words);
        // An event that a program has not read yet, between two of its instructions.
        for _ in 0..4 {
            if !done.succeeded() && done.err.contains("hint: try again once") {
                done = self.perform(words);
            }
        }
        if done.succeeded() { Ok(done.out.trim().to_owned()) } else { Err(done.to_string()) }
    }

    fn on_terminal(&self, words: &[&str]) -> Done {
        command::run(&mut self.engines.on_terminal(self.engine.name(), words), PATIENCE)
    }

    fn base(&self, name: &str) -> String {
        self.engines.base.join(name).display().to_string()
    }

    fn fresh(&self, kind: &str) -> String {
        self.serial.set(self.serial.get() + 1);
        format!("{kind}-{}-{}", self.workload.name, self.serial.get())
    }

    /// The first three numbers of the addresses of the engine's own network.
    fn subnet(&self) -> &'static str {
        match self.engine {
            Engine::Docker => "10.99.7",
            Engine::Containerd => "10.99.9",
            Engine::Podman => "10.99.8",
        }
    }

    /// The container's address in a network.
    fn address(&self) -> String {
        if self.is_ctr() { JOINED_ADDRESS.to_owned() } else { format!("{}.2", self.subnet()) }
    }

    fn is_ctr(&self) -> bool {
        self.engine == Engine::Containerd
    }

    /// A shell's command in the container; gives what it printed.
    fn inside(&self, text: &str) -> Result<String, String> {
        let shell = if self.workload.image == HOST { "bash" } else { "sh" };
        if self.is_ctr() {
            let id = self.fresh("exec");
            let exec = ["tasks", "exec", "--exec-id", &id, ID];
            let become_user: Vec<String> = self.workload.user.map(become_user).into_iter().flatten().collect();
            let become_user: Vec<&str> = become_user.iter().map(String::as_str).collect();
            return self.tell(&[&exec[..], &become_user, &[shell, "-c", text]].concat());
        }
        self.tell(&["exec", ID, shell, "-c", text])
    }

    // Making one.

    /// `run` with the options of a life, and more of them.
    fn run_words(&self, life: Life, more: &[&str]) -> Vec<String> {
        let mut words: Vec<String> = Vec::new();
        let mut add = |list: &[&str]| words.extend(list.iter().map(|word| (*word).to_owned()));
        add(&["run", "--detach"]);
        let (bound, usr) = (self.base("bound"), self.engines.host_usr());
        if self.is_ctr() {
            add(&["--runc-binary", &self.base("bin/lmrun"), "--env", PATH]);
            add(&["--log-uri", &format!("file://{}", self.base("subject.log"))]);
            match life {
                Life::Bridged | Life::Bare => add(&["--with-ns", &format!("network:{JOINED}")]),
                Life::Host | Life::Watched => add(&["--net-host"]),
            }
            if life == Life::Bridged {
                add(&["--mount", &format!("type=bind,src={bound},dst=/bound,options=rbind:rw")]);
            }
            if life == Life::Bare {
                add(&["--read-only", "--mount", "type=tmpfs,src=tmpfs,dst=/tmp,options=mode=1777"]);
            }
            if life == Life::Watched {
                add(&["--memory-limit", "629145600"]);
            }
            if self.workload.image == HOST {
                add(&["--mount", &format!("type=bind,src={usr},dst=/usr,options=rbind:ro")]);
            }
        } else {
            add(&["--name", ID]);
            match life {
                Life::Bridged => {
                    add(&["--network", NETWORK, "--ip", &self.address(), "--volume", "named:/named"]);
                    add(&["--volume", &format!("{bound}:/bound")]);
                }
                Life::Bare => {
                    add(&["--interactive", "--tty", "--network", "none", "--init", "--read-only", "--tmpfs", "/tmp"]);
                    if self.workload.user.is_none() {
                        add(&["--user", "1000"]);
                    }
                }
                Life::Host => add(&["--network", "host"]),
                Life::Watched => {
                    add(&["--network", "host", "--restart", "always", "--memory", "600m", "--memory-swap", "600m"]);
                    add(&["--health-cmd", "test -e /dev/shm", "--health-interval", "1s"]);
                }
            }
            if let Some(user) = self.workload.user {
                add(&["--user", user]);
            }
            if self.workload.image == HOST {
                add(&["--volume", &format!("{usr}:/usr:ro")]);
            }
        }
        add(more);
        if self.is_ctr() {
            let image = self.image.borrow();
            // What was mounted of an earlier container's files, or an image.
            if image.starts_with('/') {
                add(&["--rootfs", &image, ID]);
            } else {
                add(&[&format!("docker.io/library/{image}:latest"), ID]);
            }
            if let Some(user) = self.workload.user {
                become_user(user).iter().for_each(|word| add(&[word]));
            }
        } else {
            add(&[&self.image.borrow()]);
        }
        add(self.workload.args);
        words
    }

    fn create(&self, life: Life, more: &[&str]) -> Result<String, String> {
        self.life.set(life);
        self.tell(&self.run_words(life, more).iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Runs it and loads it; it must be at work.
    pub fn run(&self, life: Life) -> Outcome {
        self.remove();
        self.image.replace(self.workload.image.to_owned());
        self.count.set(0);
        if life == Life::Bridged && !self.is_ctr() && self.tell(&["network", "inspect", NETWORK]).is_err() {
            self.tell(&["network", "create", "--subnet", &format!("{}.0/24", self.subnet()), NETWORK])?;
        }
        self.create(life, &[])?;
        self.loaded()
    }

    fn loaded(&self) -> Outcome {
        if let Some(load) = self.workload.load {
            self.eventually(|| self.inside(load).map(passed))?;
        }
        self.works()
    }

    pub fn remove(&self) {
        if self.is_ctr() {
            self.perform(&["tasks", "kill", "--signal", "SIGKILL", ID]);
            self.perform(&["tasks", "delete", "--force", ID]);
            self.perform(&["containers", "delete", ID]);
            if let Some((target, key)) = self.mounted.take() {
                self.engines.perform("umount", &[&target]);
                self.perform(&["snapshots", "remove", &key]);
            }
        } else {
            self.perform(&["rm", "--force", ID]);
        }
    }

    /// Removes what checkpoints have left, which is large: all but the container as it is now.
    pub fn tidy(&self) {
        let ours = |name: &str| name.contains(&format!("-{}-", self.workload.name));
        for dir in [self.engines.base.clone(), self.engines.base.join("checkpoints")] {
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                if ours(&name) && !name.starts_with(MOUNTED) {
                    let _ = fs::remove_dir_all(entry.path());
                }
            }
        }
        match self.engine {
            Engine::Docker => {
                for name in self.perform(&["checkpoint", "ls", ID]).out.split_whitespace().filter(|name| ours(name)) {
                    self.perform(&["checkpoint", "rm", ID, name]);
                }
            }
            Engine::Containerd => {
                for name in self.perform(&["images", "ls", "--quiet"]).out.lines().filter(|name| ours(name)) {
                    self.perform(&["images", "rm", "--sync", name]);
                }
            }
            Engine::Podman => {}
        }
    }

    fn eventually(&self, attempt: impl Fn() -> Outcome) -> Outcome {
        let begin = Instant::now();
        loop {
            match attempt() {
                Err(_) if begin.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(100)),
                outcome => return outcome,
            }
        }
    }

    /// Waits for a sign of life.
    fn works(&self) -> Outcome {
        self.eventually(|| match self.workload.sign {
            Sign::Counts => {
                let said = self.inside("cat /dev/shm/n")?;
                let before = self.count.get();
                let now = said.parse().map_err(|_| format!("no number: {said:?}"))?;
                self.count.set(now);
                if now < before {
                    self.count.set(u64::MAX);
                }
                expect(&format!("it was at {before}"), &said, before > 0 && now > before)
            }
            Sign::Says(text, expected) => {
                let said = self.inside(text)?;
                expect("it answers", &said, said == expected)
            }
        })
    }

    // A life.

    /// More than once where it must be: what a container says that ends at once, Podman loses at times, with runc too.
    pub fn run_it(&self) -> Outcome {
        self.eventually(|| self.run_it_once())
    }

    fn run_it_once(&self) -> Outcome {
        let text = &format!("{SIZED}; tty; cat /proc/net/dev | wc -l; exit 7");
        let done = if self.is_ctr() {
            let name = format!("docker.io/library/{BUSYBOX}:latest");
            let lmrun = self.base("bin/lmrun");
            self.on_terminal(&[
                "run",
                "--rm",
                "--tty",
                "--runc-binary",
                &lmrun,
                "--env",
                PATH,
                &name,
                "once",
                "sh",
                "-c",
                text,
            ])
        } else {
            self.on_terminal(&["run", "--rm", "-it", "--network", "none", BUSYBOX, "sh", "-c", text])
        };
        let code = done.status.and_then(|status| status.code());
        let right = done.out.contains("33 77") && done.out.contains("/dev/") && code == Some(7);
        // Two lines of headings, and `lo`.
        let lines = done.out.lines().any(|line| line.trim().trim_start_matches("^@") == "3");
        expect("run -it", &done.to_string(), right && lines)
    }

    pub fn exec(&self) -> Outcome {
        let said = self.inside("echo hello")?;
        expect("exec", &said, said == "hello")?;
        let failed = self.inside("exit 3");
        expect("exit 3", &format!("{failed:?}"), failed.is_err_and(|text| text.contains("exit status: 3")))
    }

    pub fn exec_it(&self) -> Outcome {
        let text = &format!("{SIZED}; tty; exit 7");
        let done = match self.engine {
            Engine::Containerd => {
                self.on_terminal(&["tasks", "exec", "--tty", "--exec-id", &self.fresh("exec"), ID, "sh", "-c", text])
            }
            _ => self.on_terminal(&["exec", "-it", ID, "sh", "-c", text]),
        };
        let code = done.status.and_then(|status| status.code());
        expect(
            "exec -it",
            &done.to_string(),
            done.out.contains("33 77") && done.out.contains("/dev/") && code == Some(7),
        )
    }

    pub fn logs(&self) -> Outcome {
        // Who became another by setpriv cannot open a pipe of root's again: PostgreSQL says something by itself.
        let by_itself = self.is_ctr() && self.workload.user.is_some();
        if !by_itself {
            self.inside("echo marker >/proc/1/fd/1")?;
        }
        self.eventually(|| {
            let text = if self.is_ctr() {
                fs::read_to_string(self.base("subject.log")).map_err(|e| e.to_string())?
            } else {
                let done = self.perform(&["logs", ID]);
                format!("{}{}", done.out, done.err)
            };
            let wanted = if by_itself { "ready to accept connections" } else { "marker" };
            expect("logs", &text, text.lines().any(|line| line.contains(wanted)))
        })
    }

    pub fn stats(&self) -> Outcome {
        let said = match self.engine {
            Engine::Containerd => self.tell(&["tasks", "metrics", "--format", "json", ID])?,
            _ => self.tell(&["stats", "--no-stream", "--format", "{{.MemUsage}}", ID])?,
        };
        let right =
            if self.is_ctr() { said.contains("usage") } else { said.contains("B / ") && !said.starts_with("0B") };
        expect("stats", &said, right)
    }

    pub fn top(&self) -> Outcome {
        let said = match self.engine {
            Engine::Containerd => self.tell(&["tasks", "ps", ID])?,
            _ => self.tell(&["top", ID])?,
        };
        expect("top", &said, said.lines().count() >= 2)
    }

    pub fn paused(&self) -> Outcome {
        let (pause, unpause): (&[&str], &[&str]) = match self.engine {
            Engine::Containerd => (&["tasks", "pause", ID], &["tasks", "resume", ID]),
            _ => (&["pause", ID], &["unpause", ID]),
        };
        self.tell(pause)?;
        let state = match self.engine {
            Engine::Containerd => self.tell(&["tasks", "ls"])?,
            _ => self.tell(&["inspect", "--format", "{{.State.Status}}", ID])?,
        };
        expect("state", &state, state.to_lowercase().contains("paused"))?;
        self.tell(unpause)?;
        self.works()
    }

    pub fn updated(&self) -> Outcome {
        if self.is_ctr() {
            return Ok(Verdict::Absent);
        }
        self.tell(&["update", "--memory", "1g", "--memory-swap", "2g", ID])?;
        let files = "cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null";
        let said = self.inside(&format!("{files}; true"))?;
        expect("the limit", &said, said == GIB)
    }

    pub fn volumes(&self) -> Outcome {
        let file = self.fresh("file");
        let named = if self.is_ctr() { "" } else { "; test -d /named" };
        let user = self.workload.user.is_some();
        // A user who owns neither can read what is there.
        if user || self.is_ctr() {
            fs::write(self.engines.base.join("bound").join(&file), "here").map_err(|e| e.to_string())?;
            let said = self.inside(&format!("cat /bound/{file}{named}"))?;
            return expect("bound", &said, said == "here");
        }
        self.inside(&format!("echo here >/bound/{file} && cp /bound/{file} /named/{file}"))?;
        let said = fs::read_to_string(self.engines.base.join("bound").join(&file)).unwrap_or_default();
        expect("bound", &said, said == "here\n")?;
        let again = ["run", "--rm", "--network", "none", "--volume", "named:/n:ro", BUSYBOX, "cat"];
        let said = self.tell(&[&again[..], &[&format!("/n/{file}")]].concat())?;
        expect("named", &said, said == "here")
    }

    pub fn bridged(&self) -> Outcome {
        let busybox = format!("{}/bin/busybox", self.base("busybox"));
        let address = self.address();
        self.eventually(|| {
            let done = self.engines.perform(&busybox, &["ping", "-c", "1", "-W", "2", &address]);
            expect("ping", &done.to_string(), done.succeeded())
        })
    }

    pub fn bare(&self) -> Outcome {
        let init = self.inside("cat /proc/1/comm")?;
        let user = self.inside("id -u")?;
        let root = self.inside("touch /file");
        self.inside("touch /tmp/file")?;
        let net = self.inside("cat /proc/net/dev | wc -l")?;
        expect("read-only", &format!("{root:?}"), root.is_err())?;
        if self.is_ctr() {
            return Ok(Verdict::Passed);
        }
        let inits = ["docker-init", "tini", "catatonit", "podman-init"];
        expect("init", &init, inits.contains(&init.as_str()))?;
        expect("network none", &net, net == "3")?;
        expect("user", &user, user != "0" && (self.workload.user.is_some() || user == "1000"))
    }

    pub fn host_network(&self) -> Outcome {
        let mine = self.engines.perform("readlink", &["/proc/1/ns/net"]).out;
        let said = self.inside("readlink /proc/self/ns/net")?;
        expect("the network", &said, said == mine.trim())
    }

    pub fn healthy(&self) -> Outcome {
        match self.engine {
            Engine::Containerd => Ok(Verdict::Absent),
            Engine::Docker => self.eventually(|| {
                let said = self.tell(&["inspect", "--format", "{{.State.Health.Status}}", ID])?;
                expect("health", &said, said == "healthy")
            }),
            Engine::Podman => self.tell(&["healthcheck", "run", ID]).map(passed),
        }
    }

    /// Its first process is killed; the engine starts it again.
    pub fn restarted(&self) -> Outcome {
        if self.is_ctr() {
            return Ok(Verdict::Absent);
        }
        let pid = self.tell(&["inspect", "--format", "{{.State.Pid}}", ID])?;
        let killed = self.engines.perform("sh", &["-c", &format!("kill -KILL {pid}")]);
        expect("kill", &killed.to_string(), killed.succeeded())?;
        self.eventually(|| {
            let now = self.tell(&["inspect", "--format", "{{.State.Pid}}", ID])?;
            expect("the pid", &now, now != pid && now != "0")
        })?;
        // Podman's /dev/shm is the one that it was.
        self.inside("rm -f /dev/shm/n")?;
        self.count.set(0);
        self.loaded()
    }

    /// Somebody else in the container takes too much memory and is killed, then an init does.
    pub fn out_of_memory(&self) -> Outcome {
        let greedy = self.inside("tail /dev/zero; echo ended: $?")?;
        expect("the greedy one", &greedy, greedy.contains("ended: 137"))?;
        self.works()?;
        if self.is_ctr() {
            return Ok(Verdict::Passed);
        }
        let _ = self.tell(&["rm", "--force", "greedy"]);
        let limit = ["--memory", "48m", "--memory-swap", "48m"];
        let run = [&["run", "--name", "greedy", "--network", "none"], &limit[..], &[BUSYBOX, "tail", "/dev/zero"]];
        let done = self.perform(&run.concat());
        let code = done.status.and_then(|status| status.code());
        let said = self.tell(&["inspect", "--format", "{{.State.OOMKilled}} {{.State.ExitCode}}", "greedy"])?;
        let _ = self.tell(&["rm", "--force", "greedy"]);
        // Podman 4 does not notice, with runc neither.
        let right = said == "true 137" || self.engine == Engine::Podman && said == "false 137";
        expect("inspect", &format!("{said} {done}"), code == Some(137) && right)
    }

    pub fn killed(&self) -> Outcome {
        if self.is_ctr() {
            self.tell(&["tasks", "kill", "--signal", "SIGKILL", ID])?;
            self.eventually(|| {
                let said = self.tell(&["tasks", "ls"])?;
                expect("state", &said, said.contains("STOPPED"))
            })?;
            let done = self.perform(&["tasks", "delete", ID]);
            return expect("delete", &done.to_string(), format!("{}{}", done.out, done.err).contains("137"));
        }
        self.tell(&["kill", "--signal", "KILL", ID])?;
        let said = self.tell(&["wait", ID])?;
        expect("wait", &said, said == "137")
    }

    pub fn stopped(&self) -> Outcome {
        if self.is_ctr() {
            return Ok(Verdict::Absent);
        }
        self.tell(&["stop", "--time", "2", ID])?;
        let said = self.tell(&["inspect", "--format", "{{.State.Status}}", ID])?;
        expect("state", &said, said == "exited")
    }

    // Checkpoints.

    pub fn left_running(&self) -> Outcome {
        let name = self.fresh("left");
        match self.engine {
            Engine::Docker => self.tell(&["checkpoint", "create", "--leave-running", ID, &name])?,
            Engine::Containerd => {
                let (images, work) = (self.base(&name), self.base("work"));
                self.tell(&["tasks", "checkpoint", "--image-path", &images, "--work-path", &work, ID])?
            }
            Engine::Podman => {
                self.tell(&["container", "checkpoint", "--leave-running", "--tcp-established", "--file-locks", ID])?
            }
        };
        self.works()
    }

    /// Checkpointed, removed where the engine can do that, and restored as the engine restores.
    pub fn restored(&self) -> Outcome {
        let name = self.fresh("final");
        match self.engine {
            Engine::Docker => {
                self.collected()?;
                self.tell(&["checkpoint", "create", ID, &name])?;
                let done = self.perform(&["start", "--checkpoint", &name, ID]);
                // Docker 28, without having called the runtime.
                if done.err.contains("/proc/0/ns/net") {
                    let id = self.tell(&["inspect", "--format", "{{.Id}}", ID])?;
                    let from = self.base(&format!("docker/containers/{id}/checkpoints/{name}"));
                    let to = self.base(&format!("checkpoints/{name}"));
                    command::tool(&format!("cp -a {from} {to}"));
                    self.made_anew(&name)?;
                } else if !done.succeeded() {
                    return Err(done.to_string());
                }
            }
            Engine::Containerd => {
                self.tell(&["containers", "checkpoint", "--image", "--task", "--rw", ID, &name])?;
                self.remove();
                self.tell(&["containers", "restore", "--live", "--rw", ID, &name])?;
            }
            Engine::Podman if self.life.get() == Life::Host => {
                self.tell(&["container", "checkpoint", "--tcp-established", "--file-locks", ID])?;
                self.tell(&["container", "restore", "--tcp-established", "--file-locks", ID])?;
            }
            Engine::Podman => {
                self.exported(&[])?;
                self.imported(&[])?;
            }
        }
        self.works()
    }

    /// Waits until containerd has collected what Docker's last checkpoint has left there. Part of it is the same in each
    /// checkpoint of a container, for which the next one fails when all is done ("already exists").
    fn collected(&self) -> Outcome {
        self.eventually(|| {
            let content = self.engines.perform("ctr", &["--namespace", "moby", "content", "ls", "--quiet"]);
            expect("content", &content.to_string(), content.succeeded() && content.out.trim().is_empty())
        })
    }

    fn exported(&self, more: &[&str]) -> Result<(), String> {
        let archive = self.base("subject.tar");
        let words =
            ["container", "checkpoint", "--tcp-established", "--file-locks", "--ignore-volumes", "--print-stats"];
        let said = self.tell(&[&words[..], more, &["--export", &archive, ID]].concat())?;
        expect("statistics", &said, said.contains("\"pages_written\": ") || said.contains("pages_written"))?;
        self.tell(&["rm", "--force", ID]).map(drop)
    }

    fn imported(&self, more: &[&str]) -> Result<(), String> {
        let archive = self.base("subject.tar");
        let words = ["container", "restore", "--tcp-established", "--file-locks", "--ignore-volumes"];
        self.tell(&[&words[..], more, &["--import", &archive]].concat()).map(drop)
    }

    /// A round of pre-copy, then what was written since.
    pub fn with_rounds(&self) -> Outcome {
        if self.engine != Engine::Podman {
            return Ok(Verdict::Absent);
        }
        let earlier = self.base("earlier.tar");
        self.tell(&["container", "checkpoint", "--pre-checkpoint", "--export", &earlier, ID])?;
        self.works()?;
        self.exported(&["--with-previous"])?;
        self.imported(&["--import-previous", &earlier])?;
        self.works()
    }

    /// A client's connection lives through a restore.
    pub fn with_client(&self) -> Outcome {
        let Some(question) = &self.workload.question else { return Ok(Verdict::Absent) };
        let mut client = Client::start(self, question)?;
        client.is_answered()?;
        // What `ctr containers checkpoint` leaves running must be killed, and says so to its clients.
        if self.is_ctr() {
            self.annotated()?;
        } else {
            self.restored()?;
        }
        client.is_answered().map(|()| Verdict::Passed)
    }

    /// Checkpointed, and restored by an annotation of a new container, or by a variable where there are none.
    pub fn annotated(&self) -> Outcome {
        // Podman keeps /dev/shm outside of the container, where PostgreSQL maps files: its archive has them, a checkpoint not.
        if self.engine == Engine::Podman && self.workload.name == "postgres" {
            return Ok(Verdict::Absent);
        }
        let name = self.fresh("annotated");
        let dir = self.base(&format!("checkpoints/{name}"));
        match self.engine {
            Engine::Docker => {
                self.collected()?;
                self.tell(&["checkpoint", "create", "--checkpoint-dir", &self.base("checkpoints"), ID, &name])?;
            }
            Engine::Containerd => {
                let work = self.base("work");
                self.tell(&["tasks", "checkpoint", "--exit", "--image-path", &dir, "--work-path", &work, ID])?;
            }
            Engine::Podman => {
                let archive = self.base("annotated.tar");
                let words = ["container", "checkpoint", "--tcp-established", "--file-locks", "--export", &archive, ID];
                self.tell(&words)?;
                fs::create_dir(&dir).map_err(|e| e.to_string())?;
                command::tool(&format!("tar -C {dir} --no-same-owner --strip-components=1 -xf {archive} checkpoint"));
            }
        }
        self.made_anew(&name)?;
        self.works()
    }

    /// A new container, with the files of the old one, of the checkpoint `name`.
    fn made_anew(&self, name: &str) -> Result<(), String> {
        let value = format!("dev.lmrun.restore=/var/lib/lmrun/checkpoints/{name}");
        if self.is_ctr() {
            let target = self.base(&self.fresh(MOUNTED));
            fs::create_dir(&target).map_err(|e| e.to_string())?;
            let info: serde_json::Value =
                serde_json::from_str(&self.tell(&["containers", "info", ID])?).map_err(|e| e.to_string())?;
            let key = info["SnapshotKey"].as_str().ok_or("the container has no files of its own")?.to_owned();
            // Or it is garbage when the container is gone.
            self.tell(&["snapshots", "label", &key, "containerd.io/gc.root=kept"])?;
            self.tell(&["tasks", "delete", "--force", ID])?;
            self.tell(&["containers", "delete", "--keep-snapshot", ID])?;
            let mount = self.tell(&["snapshots", "mounts", &target, &key])?;
            let done = self.engines.perform("sh", &["-c", &mount]);
            if !done.succeeded() {
                return Err(done.to_string());
            }
            self.image.replace(target.clone());
            self.mounted.replace(Some((target, key)));
        } else {
            let image = self.fresh("lmrun-anew");
            self.tell(&["commit", ID, &image])?;
            self.image.replace(image);
            self.remove();
        }
        // Docker has had annotations since 25.
        let old = self.engine == Engine::Docker && !self.perform(&["run", "--help"]).out.contains("--annotation");
        self.create(self.life.get(), &[if old { "--env" } else { "--annotation" }, &value]).map(drop)
    }
}

/// Asks its question, ten times a second, on one connection.
struct Client {
    child: Child,
    answers: String,
}

const CLIENT: &str = "import socket, sys, time\n\
    s = socket.create_connection((sys.argv[1], int(sys.argv[2])), 15); s.settimeout(60)\n\
    greeting, text, answer = (a.encode().decode('unicode_escape').encode('latin1') for a in sys.argv[3:])\n\
    if greeting: s.sendall(greeting); s.recv(65536); time.sleep(0.2)\n\
    while True:\n    \
        s.sendall(text); said = s.recv(65536)\n    \
        if answer not in said: sys.exit('wrong: %r' % said)\n    \
        print('answered', flush=True); time.sleep(0.1)\n";

impl Client {
    fn start(subject: &Subject<'_>, question: &Question) -> Result<Client, String> {
        let answers = subject.base("answers");
        let file = fs::File::create(&answers).map_err(|e| e.to_string())?;
        let errors = file.try_clone().map_err(|e| e.to_string())?;
        let mut command = subject.engines.in_network("python3");
        command.args(["-c", CLIENT, &subject.address(), &question.port.to_string()]);
        command.args([question.greeting.unwrap_or_default(), question.text, question.answer]);
        let child = command.stdin(Stdio::null()).stdout(file).stderr(errors).spawn().map_err(|e| e.to_string())?;
        Ok(Client { child, answers })
    }

    fn is_answered(&mut self) -> Result<(), String> {
        let read = || fs::read_to_string(&self.answers).unwrap_or_default();
        let before = read().lines().count();
        let begin = Instant::now();
        while read().lines().count() < before + 3 {
            let ended = self.child.try_wait().ok().flatten();
            if ended.is_some() || begin.elapsed() > PATIENCE {
                let said = read();
                let last = said.lines().last().unwrap_or_default();
                return Err(format!("the client has {before} answers and no more ({ended:?}): {last}"));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
