//! A Redis that moves from one host to another by pre-dumps to page servers, as one would do it by hand.

use std::fs;
use std::io::{Error, Read, Result, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::bundle::{self, Shape};
use crate::container::listens;
use crate::hosts::{CONTAINER, DESTINATION, Hosts};
use crate::redis::{self, Client};
use crate::stats::{self, DumpStats};
use crate::{command, host, needs};

const LIMIT: Duration = Duration::from_secs(120);
/// Page servers listen from here on, one port for each round.
const FIRST_PORT: u16 = 9870;
const COURIER_PORT: u16 = 9860;

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
    id: String,
    dir: PathBuf,
}

impl Side {
    fn new(base: &Path, name: &str, shape: &Shape) -> Result<Side> {
        let id = format!("lmrun-move-{}-{name}", std::process::id());
        let dir = base.join(name);
        for part in ["bundle", "images", "work"] {
            fs::create_dir_all(dir.join(part))?;
        }
        bundle::make(&dir.join("bundle"), &id, shape)?;
        Ok(Side { id, dir })
    }

    fn lmrun(&self) -> Command {
        let mut command = Command::new(needs::built("lmrun"));
        command.arg("--root").arg(self.dir.join("state"));
        command.stdin(Stdio::null());
        command
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
                Err(Error::other(format!("{name}: {status:?}\n{said}")))
            }
        }
    }
}

/// A Redis that runs on the source and is to move.
pub struct Migration<'a> {
    hosts: &'a Hosts,
    base: PathBuf,
    source: Side,
    destination: Side,
    rounds: u16,
}

impl<'a> Migration<'a> {
    /// Starts a Redis on the source. `base` becomes a file system in memory.
    pub fn start(hosts: &'a Hosts) -> Result<Migration<'a>> {
        let base = std::env::temp_dir().join(format!("lmrun-move-{}", std::process::id()));
        fs::create_dir_all(&base)?;
        command::tool(&format!("mount -t tmpfs -o mode=755 lmrun-move {}", base.display()));
        let rootfs = base.join("rootfs");
        redis::rootfs(&rootfs)?;
        let shape = |network: PathBuf| Shape {
            args: redis::ARGS.map(str::to_owned).to_vec(),
            network: Some(network),
            rootfs: Some(rootfs.clone()),
            seccomp: None,
        };
        let source = Side::new(&base, "source", &shape(hosts.container_at_source.path()))?;
        let destination = Side::new(&base, "destination", &shape(hosts.container_at_destination.path()))?;
        let migration = Migration { hosts, base, source, destination, rounds: 0 };
        let mut run = migration.source.lmrun();
        run.args(["run", "-d", "--bundle"]).arg(migration.source.dir.join("bundle")).arg(&migration.source.id);
        let null = || fs::File::options().write(true).open("/dev/null");
        let mut child = hosts.source.within(|| run.stdout(null()?).stderr(null()?).spawn())?;
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
        let mut serve = self.destination.lmrun();
        serve.arg("page-server").arg("--image-path").arg(self.destination.images(name));
        serve.args(["--address", DESTINATION, "--port", &port.to_string(), "--insecure"]);
        if let Some(parent) = self.parent() {
            serve.arg("--parent-path").arg(parent);
        }
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

    /// The checkpoint command of the next round.
    fn checkpoint(&self, name: &str, port: u16) -> Command {
        let mut checkpoint = self.source.lmrun();
        checkpoint.arg("checkpoint").arg("--image-path").arg(self.source.images(name));
        checkpoint.arg("--work-path").arg(self.source.dir.join("work").join(name));
        checkpoint.args(["--tcp-established", "--insecure", "--page-server", &format!("{DESTINATION}:{port}")]);
        if let Some(parent) = self.parent() {
            checkpoint.arg("--parent-path").arg(parent);
        }
        checkpoint
    }

    fn stats(&self, name: &str) -> Result<DumpStats> {
        stats::dump(&self.source.dir.join("work").join(name)).ok_or_else(|| Error::other("no stats-dump"))
    }

    /// One round of pre-copy. `watch` is called while it goes on.
    pub fn pre_dump(&mut self, mut watch: impl FnMut(&Migration)) -> Result<Round> {
        let name = format!("round{}", self.rounds + 1);
        let (mut server, port) = self.page_server(&name)?;
        let mut checkpoint = self.checkpoint(&name, port);
        checkpoint.arg("--pre-dump").arg(&self.source.id);
        let log = self.source.log("pre-dump")?;
        let begin = Instant::now();
        let mut child = self.hosts.source.within(|| checkpoint.stdout(log.try_clone()?).stderr(log).spawn())?;
        while child.try_wait()?.is_none() && begin.elapsed() < LIMIT {
            watch(self);
            std::thread::sleep(Duration::from_millis(20));
        }
        self.source.finish("pre-dump", &mut child)?;
        self.destination.finish("page-server", &mut server)?;
        let took = begin.elapsed();
        self.rounds += 1;
        Ok(Round { stats: self.stats(&name)?, took })
    }

    /// The last round: the container stops here, and goes on there with its address.
    pub fn hand_over(&mut self) -> Result<(Round, HandOver)> {
        let name = "final";
        let (mut server, port) = self.page_server(name)?;
        let mut checkpoint = self.checkpoint(name, port);
        checkpoint.arg(&self.source.id);
        let courier = Courier::open(self.hosts)?;
        let mut moving = self.hosts.prepare_move();
        let log = self.source.log("checkpoint")?;

        let begin = Instant::now();
        let mut child = self.hosts.source.within(|| checkpoint.stdout(log.try_clone()?).stderr(log).spawn())?;
        self.source.finish("checkpoint", &mut child)?;
        let mut parts = HandOver { checkpoint: begin.elapsed(), ..HandOver::default() };

        let at = Instant::now();
        let files = courier.carry(&self.source.images(name))?;
        self.destination.finish("page-server", &mut server)?;
        for (file, bytes) in files {
            let target = self.destination.images(name).join(file);
            if !target.exists() {
                fs::write(target, bytes)?;
            }
        }
        parts.transfer = at.elapsed();

        let at = Instant::now();
        moving.make(self.hosts);
        parts.address = at.elapsed();

        let at = Instant::now();
        let mut restore = self.destination.lmrun();
        restore.args(["restore", "-d", "--tcp-established", "--image-path"]).arg(self.destination.images(name));
        restore.arg("--work-path").arg(self.destination.dir.join("work/restore"));
        restore.arg("--bundle").arg(self.destination.dir.join("bundle")).arg(&self.destination.id);
        let log = self.destination.log("restore")?;
        let mut child = self.hosts.destination.within(|| restore.stdout(log.try_clone()?).stderr(log).spawn())?;
        self.destination.finish("restore", &mut child)?;
        parts.restore = at.elapsed();
        Ok((Round { stats: self.stats(name)?, took: begin.elapsed() }, parts))
    }
}

impl Drop for Migration<'_> {
    fn drop(&mut self) {
        for side in [&self.source, &self.destination] {
            let _ = command::run(side.lmrun().args(["delete", "--force", &side.id]), LIMIT);
            host::sweep(&side.id);
        }
        let mut unmount = Command::new("umount");
        command::run(unmount.arg("-l").arg(&self.base), LIMIT);
        let _ = fs::remove_dir(&self.base);
    }
}

/// A connection from source to destination for the small images.
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

    /// Sends the regular files in `dir`; returns what came out at the other end: (name, content).
    fn carry(mut self, dir: &Path) -> Result<Vec<(String, Vec<u8>)>> {
        let mut from = self.from;
        let dir = dir.to_owned();
        let sender = std::thread::spawn(move || -> Result<()> {
            for entry in fs::read_dir(dir)?.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_file())) {
                let (name, bytes) = (entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path())?);
                from.write_all(&[(name.len() as u64).to_le_bytes(), (bytes.len() as u64).to_le_bytes()].concat())?;
                from.write_all(name.as_bytes())?;
                from.write_all(&bytes)?;
            }
            Ok(())
        });
        let mut files = Vec::new();
        let mut head = [0; 16];
        loop {
            match self.to.read_exact(&mut head) {
                Ok(()) => {}
                Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => break,
                Err(e) => return Err(e),
            }
            let length = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("8 bytes")) as usize;
            let (mut name, mut bytes) = (vec![0; length(0)], vec![0; length(8)]);
            self.to.read_exact(&mut name)?;
            self.to.read_exact(&mut bytes)?;
            files.push((String::from_utf8_lossy(&name).into_owned(), bytes));
        }
        sender.join().map_err(|_| Error::other("courier"))??;
        Ok(files)
    }
}
