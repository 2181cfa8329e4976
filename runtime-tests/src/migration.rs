//! A Redis that moves from one host to another, as one would do it by hand: by files or by page servers, with rounds of
//! pre-copy or without.

use std::fs;
use std::io::{BufRead, BufReader, Error, Read, Result, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::bundle::{self, Shape};
use crate::container::listens;
use crate::host::InMemory;
use crate::hosts::{CONTAINER, DESTINATION, Hosts};
use crate::redis::{self, Client};
use crate::runtimes::Runtime;
use crate::stats::{self, DumpStats};
use crate::{command, host};

const LIMIT: Duration = Duration::from_secs(120);
/// Page servers listen from here on, one port for each round.
const FIRST_PORT: u16 = 9870;
const COURIER_PORT: u16 = 9860;

/// How the pages of the last round travel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    ByServer,
    /// With the other images, once the checkpoint is made.
    AsFiles,
}

/// What one round did.
#[derive(Debug, Clone, Copy)]
pub struct Round {
    pub stats: DumpStats,
    pub took: Duration,
}

impl Round {
    pub fn bytes(&self) -> u64 {
        self.stats.pages_written * 4096
    }
}

/// The parts of the last round's time.
#[derive(Debug, Clone, Copy, Default)]
pub struct HandOver {
    pub checkpoint: Duration,
    /// The images other than pages, and the page server's end.
    pub transfer: Duration,
    pub address: Duration,
    pub restore: Duration,
}

/// One host's side of the container.
struct Side {
    runtime: Runtime,
    id: String,
    dir: PathBuf,
}

impl Side {
    fn new(runtime: &Runtime, base: &Path, name: &str, shape: &Shape) -> Result<Side> {
        let move_name = base.file_name().unwrap_or_default().to_string_lossy();
        let id = format!("{move_name}-{name}");
        let runtime = runtime.clone();
        let dir = base.join(name);
        for part in ["bundle", "images", "work"] {
            fs::create_dir_all(dir.join(part))?;
        }
        bundle::make(&dir.join("bundle"), &id, shape)?;
        Ok(Side { runtime, id, dir })
    }

    fn command(&self) -> Command {
        let mut command = self.runtime.command(&self.dir.join("state"));
        command.stdin(Stdio::null());
        command
    }

    /// A checkpoint into `images/NAME`, to which its flags and the container's id are to be added.
    fn checkpoint(&self, name: &str) -> Result<Command> {
        let mut checkpoint = self.command();
        fs::create_dir_all(self.work(name))?;
        checkpoint.arg("checkpoint").arg("--image-path").arg(self.images(name));
        checkpoint.arg("--work-path").arg(self.work(name));
        Ok(checkpoint)
    }

    /// A restore from `images/NAME`.
    fn restore(&self, name: &str, tcp_established: bool) -> Result<Command> {
        fs::create_dir_all(self.work("restore"))?;
        let mut restore = self.command();
        restore.args(["restore", "-d", "--image-path"]).arg(self.images(name));
        restore.arg("--work-path").arg(self.work("restore"));
        if tcp_established {
            restore.arg("--tcp-established");
        }
        restore.arg("--bundle").arg(self.dir.join("bundle")).arg(&self.id);
        Ok(restore)
    }

    fn work(&self, name: &str) -> PathBuf {
        self.dir.join("work").join(name)
    }

    fn images(&self, round: &str) -> PathBuf {
        self.dir.join("images").join(round)
    }

    /// A file for what a command says.
    fn log(&self, name: &str) -> Result<fs::File> {
        fs::File::options().create(true).append(true).open(self.dir.join(format!("{name}.log")))
    }

    /// Ends well, or the error is what was said.
    fn finish(&self, name: &str, child: &mut Child) -> Result<()> {
        match command::wait(child, LIMIT) {
            Some(status) if status.success() => Ok(()),
            status => {
                let said = fs::read_to_string(self.dir.join(format!("{name}.log"))).unwrap_or_default();
                Err(Error::other(format!("{name}: {status:?}\n{said}{}", self.errors())))
            }
        }
    }

    /// What CRIU's logs say of errors.
    fn errors(&self) -> String {
        let works = fs::read_dir(self.dir.join("work")).into_iter().flatten().flatten();
        let logs = works.flat_map(|work| ["dump.log", "restore.log"].map(|name| work.path().join(name)));
        let texts = logs.map(|log| fs::read(log).unwrap_or_default());
        let texts = texts.map(|text| String::from_utf8_lossy(&text).into_owned());
        texts
            .flat_map(|text| {
                text.lines().filter(|line| line.contains("Error")).map(|line| format!("{line}\n")).collect::<Vec<_>>()
            })
            .collect()
    }
}

/// A Redis that runs on the source and is to move.
pub struct Migration<'a> {
    hosts: &'a Hosts,
    /// Unmounted last.
    _files: InMemory,
    source: Side,
    destination: Side,
    rounds: u16,
}

impl<'a> Migration<'a> {
    /// Starts a Redis of `runtime`'s on the source, all of its files in memory.
    pub fn start(hosts: &'a Hosts, runtime: &Runtime) -> Result<Migration<'a>> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let base = std::env::temp_dir().join(format!("lmrun-move-{}-{n}", std::process::id()));
        let base = InMemory::mount(base)?;
        let rootfs = base.dir.join("rootfs");
        redis::rootfs(&rootfs)?;
        let shape = |network: PathBuf| Shape {
            args: redis::ARGS.map(str::to_owned).to_vec(),
            network: Some(network),
            rootfs: Some(rootfs.clone()),
            seccomp: None,
        };
        let source = Side::new(runtime, &base.dir, "source", &shape(hosts.container_at_source.path()))?;
        let destination = Side::new(runtime, &base.dir, "destination", &shape(hosts.container_at_destination.path()))?;
        let migration = Migration { hosts, _files: base, source, destination, rounds: 0 };
        let mut run = migration.source.command();
        run.args(["run", "-d", "--bundle"]).arg(migration.source.dir.join("bundle")).arg(&migration.source.id);
        let mut child = hosts.source.within(|| run.stdout(Stdio::null()).stderr(Stdio::null()).spawn())?;
        migration.source.finish("run", &mut child)?;
        Ok(migration)
    }

    /// A connection of the client's.
    pub fn connect(&self) -> Result<Client> {
        self.hosts.client.within(|| redis::wait_until_up(&format!("{CONTAINER}:6379")))
    }

    /// Bytes that have come to the destination so far.
    pub fn received(&self) -> u64 {
        fn size(dir: &Path) -> u64 {
            let entries = fs::read_dir(dir).into_iter().flatten().flatten();
            entries.map(|e| e.metadata().map_or(0, |m| if m.is_dir() { size(&e.path()) } else { m.len() })).sum()
        }
        size(&self.destination.dir.join("images"))
    }

    /// A page server on the destination that is ready for the next round, and that round's number and parent.
    fn page_server(&mut self, name: &str) -> Result<(Child, u16)> {
        let port = FIRST_PORT + self.rounds;
        let parent = self.parent();
        let mut serve = self.destination.runtime.page_server(
            &self.destination.images(name),
            parent.as_deref(),
            DESTINATION,
            port,
        )?;
        serve.stdin(Stdio::null());
        let log = self.destination.log("page-server")?;
        let mut server = self.hosts.destination.within(|| serve.stdout(log.try_clone()?).stderr(log).spawn())?;
        let begin = Instant::now();
        while !self.hosts.destination.within(|| listens(port)) {
            if begin.elapsed() > Duration::from_secs(10) || server.try_wait()?.is_some() {
                let _ = server.kill();
                self.destination.finish("page-server", &mut server)?;
                return Err(Error::other("the page server does not listen"));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok((server, port))
    }

    fn parent(&self) -> Option<String> {
        (self.rounds > 0).then(|| format!("../round{}", self.rounds))
    }

    /// The checkpoint command of the next round; `port`: of the page server that gets the pages.
    fn checkpoint(&self, name: &str, port: Option<u16>) -> Result<Command> {
        let mut checkpoint = self.source.checkpoint(name)?;
        checkpoint.arg("--tcp-established");
        if let Some(port) = port {
            self.source.runtime.send_pages(&mut checkpoint, DESTINATION, port);
        }
        if let Some(parent) = self.parent() {
            checkpoint.arg("--parent-path").arg(parent);
        }
        Ok(checkpoint)
    }

    fn stats(&self, name: &str) -> Result<DumpStats> {
        stats::dump(&self.source.work(name)).ok_or_else(|| Error::other("no stats-dump"))
    }

    /// One round of pre-copy. `watch` is called while it goes on.
    pub fn pre_dump(&mut self, mut watch: impl FnMut(&Migration)) -> Result<Round> {
        let name = format!("round{}", self.rounds + 1);
        let (mut server, port) = self.page_server(&name)?;
        let mut checkpoint = self.checkpoint(&name, Some(port))?;
        checkpoint.arg("--pre-dump").arg(&self.source.id);
        let log = self.source.log("pre-dump")?;
        let begin = Instant::now();
        let mut child = self.hosts.source.within(|| checkpoint.stdout(log.try_clone()?).stderr(log).spawn())?;
        while child.try_wait()?.is_none() && begin.elapsed() < LIMIT {
            watch(self);
            std::thread::sleep(Duration::from_millis(20));
        }
        self.source.finish("pre-dump", &mut child).inspect_err(|_| end(&mut server))?;
        self.destination.finish("page-server", &mut server)?;
        let took = begin.elapsed();
        self.rounds += 1;
        Ok(Round { stats: self.stats(&name)?, took })
    }

    /// The last round: the container stops here, and goes on there with its address.
    pub fn hand_over(&mut self, pages: Pages) -> Result<(Round, HandOver)> {
        let name = "final";
        let mut server = match pages {
            Pages::ByServer => Some(self.page_server(name)?),
            Pages::AsFiles => None,
        };
        let target = self.destination.images(name);
        fs::create_dir_all(&target)?;
        let mut checkpoint = self.checkpoint(name, server.as_ref().map(|(_, port)| *port))?;
        checkpoint.arg(&self.source.id);
        let courier = Courier::open(self.hosts)?;
        let mut moving = self.hosts.prepare_move();
        let log = self.source.log("checkpoint")?;

        let begin = Instant::now();
        let mut child = self.hosts.source.within(|| checkpoint.stdout(log.try_clone()?).stderr(log).spawn())?;
        self.source.finish("checkpoint", &mut child).inspect_err(|_| {
            if let Some((server, _)) = &mut server {
                end(server);
            }
        })?;
        let mut parts = HandOver { checkpoint: begin.elapsed(), ..HandOver::default() };

        let at = Instant::now();
        if let Some((server, _)) = &mut server {
            self.destination.finish("page-server", server)?;
        }
        courier.carry(&self.source.images(name), &target)?;
        parts.transfer = at.elapsed();

        let at = Instant::now();
        moving.make(self.hosts);
        parts.address = at.elapsed();

        let at = Instant::now();
        let mut restore = self.destination.restore(name, true)?;
        let mut child = self
            .hosts
            .destination
            .within(|| restore.stdout(Stdio::null()).stderr(self.destination.log("restore")?).spawn())?;
        self.destination.finish("restore", &mut child)?;
        parts.restore = at.elapsed();
        Ok((Round { stats: self.stats(name)?, took: begin.elapsed() }, parts))
    }

    /// The whole move by `lmrun migrate`, with these flags besides; gives what it said with `--json`, line by line.
    ///
    /// Destination and source are reached as by ssh(1), for which a script stands in that enters the destination's network
    /// namespace.
    pub fn migrate(&self, flags: &[&str]) -> Result<Vec<String>> {
        self.migrate_to(&self.url(), flags)
    }

    fn migrate_to(&self, url: &str, flags: &[&str]) -> Result<Vec<String>> {
        let mut migrate = self.migrate_command()?;
        migrate.arg("--json").args(flags);
        migrate.arg(&self.source.id).arg(url).env("LMRUN_PKI", self.source.dir.join("pki"));
        let out = self.source.dir.join("migrate.json");
        let log = self.source.log("migrate")?;
        let mut child = self.hosts.source.within(|| migrate.stdout(fs::File::create(&out)?).stderr(log).spawn())?;
        let ended = self.source.finish("migrate", &mut child);
        let said = fs::read_to_string(out)?;
        ended.map_err(|e| Error::other(format!("{e}\n{said}")))?;
        Ok(said.lines().map(str::to_owned).collect())
    }

    /// As [`Migration::migrate`], over TLS: the two hosts are paired, and one listens.
    pub fn migrate_over_tls(&self, flags: &[&str]) -> Result<Vec<String>> {
        let pki = [&self.source, &self.destination].map(|side| side.dir.join("pki"));
        let address = format!("{DESTINATION}:7677");
        let mut wait = self.destination.command();
        wait.args(["pair", "--name", "there", "--listen", &address]).env("LMRUN_PKI", &pki[1]);
        let waiting = wait.stdout(Stdio::piped()).stderr(self.destination.log("pair")?);
        let mut waiting = self.hosts.destination.within(|| waiting.spawn())?;
        let mut said = BufReader::new(waiting.stdout.take().ok_or_else(|| Error::other("stdout"))?).lines();
        // What it prints is what one types at the other host.
        let typed = said.by_ref().map_while(Result::ok).find(|line| line.trim().starts_with("lmrun pair "));
        let typed = typed.ok_or_else(|| Error::other("lmrun pair --listen says what to do"))?;
        let mut pair = self.source.command();
        pair.args(typed.split_whitespace().skip(1)).args(["--name", "here"]).env("LMRUN_PKI", &pki[0]);
        let mut pair = self.hosts.source.within(|| pair.stdout(Stdio::null()).spawn())?;
        self.source.finish("pair", &mut pair)?;
        self.destination.finish("pair", &mut waiting)?;

        let mut receive = self.destination.command();
        receive.args(["receive", "--listen", &address]).env("LMRUN_PKI", &pki[1]);
        let receive = receive.stdout(Stdio::null()).stderr(self.destination.log("receive")?);
        let mut receiving = self.hosts.destination.within(|| receive.spawn())?;
        let moved = self.hosts.source.within(|| {
            let start = Instant::now();
            while TcpStream::connect(&address).is_err() {
                if start.elapsed() > LIMIT {
                    return Err(Error::other("nobody listens"));
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            Ok(())
        });
        let moved = moved.and_then(|()| self.migrate_to(&format!("tls://{address}"), flags));
        receiving.kill()?;
        receiving.wait()?;
        moved
    }

    fn url(&self) -> String {
        format!("ssh://destination{}", self.destination.dir.join("lmrun").display())
    }

    /// `lmrun migrate` at the source, to which flags, container and destination are to be added.
    fn migrate_command(&self) -> Result<Command> {
        let bin = self.source.dir.join("bin");
        fs::create_dir_all(&bin)?;
        let netns = self.hosts.destination.path();
        // ssh -T ... -- HOST COMMAND...
        let ssh = format!(
            "while [ \"$1\" != -- ]; do shift; done\nshift 2\nexec nsenter --net={} sh -c \"$*\"",
            netns.display()
        );
        host::script(&bin.join("ssh"), &ssh);
        let state = self.destination.dir.join("state");
        let lmrun = crate::needs::built("lmrun");
        let there = format!("exec {} --root {} \"$@\"", lmrun.display(), state.display());
        host::script(&self.destination.dir.join("lmrun"), &there);
        let mut path = bin.into_os_string();
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        let mut command = self.source.command();
        command.env("PATH", path).arg("migrate").arg("--bundle").arg(self.destination.dir.join("bundle"));
        Ok(command)
    }

    /// Checkpoint and restore on the source alone, without connections; returns what each took.
    pub fn there_and_back(&mut self) -> Result<(Duration, Duration)> {
        let mut checkpoint = self.source.checkpoint("local")?;
        checkpoint.arg(&self.source.id);
        let log = self.source.log("checkpoint")?;
        let begin = Instant::now();
        let mut child = checkpoint.stdout(log.try_clone()?).stderr(log).spawn()?;
        self.source.finish("checkpoint", &mut child)?;
        let stopped = begin.elapsed();
        let mut restore = self.source.restore("local", false)?;
        let at = Instant::now();
        let mut child = restore.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        self.source.finish("restore", &mut child)?;
        Ok((stopped, at.elapsed()))
    }
}

impl Drop for Migration<'_> {
    fn drop(&mut self) {
        for side in [&self.source, &self.destination] {
            let _ = command::run(side.command().args(["delete", "--force", &side.id]), LIMIT);
            host::sweep(&side.id);
        }
    }
}

/// A page server that nobody will speak to any more.
fn end(server: &mut Child) {
    let _ = server.kill();
    let _ = server.wait();
}

/// A connection from source to destination for image files.
struct Courier {
    from: TcpStream,
    to: TcpStream,
}

impl Courier {
    fn open(hosts: &Hosts) -> Result<Courier> {
        let listener = hosts.destination.within(|| TcpListener::bind((DESTINATION, COURIER_PORT)))?;
        let from = hosts.source.within(|| TcpStream::connect((DESTINATION, COURIER_PORT)))?;
        let (to, _) = listener.accept()?;
        from.set_nodelay(true)?;
        Ok(Courier { from, to })
    }

    /// Sends the regular files in `from_dir`; those that `to_dir` lacks are written there.
    fn carry(self, from_dir: &Path, to_dir: &Path) -> Result<()> {
        let Courier { mut from, to } = self;
        let dir = from_dir.to_owned();
        let sender = std::thread::spawn(move || -> Result<()> {
            for entry in fs::read_dir(dir)?.flatten() {
                let about = entry.metadata()?;
                if !about.is_file() {
                    continue;
                }
                let name = entry.file_name().to_string_lossy().into_owned();
                let head = [(name.len() as u64).to_le_bytes(), about.len().to_le_bytes()];
                from.write_all(&head.concat())?;
                from.write_all(name.as_bytes())?;
                std::io::copy(&mut fs::File::open(entry.path())?, &mut from)?;
            }
            Ok(())
        });
        let mut to = BufReader::with_capacity(1 << 20, to);
        let mut head = [0; 16];
        loop {
            match to.read_exact(&mut head) {
                Ok(()) => {}
                Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => break,
                Err(e) => return Err(e),
            }
            let length = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("8 bytes"));
            let mut name = vec![0; length(0) as usize];
            to.read_exact(&mut name)?;
            let target = to_dir.join(String::from_utf8_lossy(&name).into_owned());
            let mut content = (&mut to).take(length(8));
            if target.exists() {
                std::io::copy(&mut content, &mut std::io::sink())?;
            } else {
                std::io::copy(&mut content, &mut fs::File::create(target)?)?;
            }
        }
        sender.join().map_err(|_| Error::other("courier"))?
    }
}
