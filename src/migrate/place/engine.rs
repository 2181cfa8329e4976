//! An engine's container that is to arrive: made by the engine of this host from what the source's says of its own.
//!
//! ```text
//! begin -> check, accept -> make: the image, the container -> target: its files, before an overlay is mounted on them
//!       -> start: the engine mounts and makes, and waits for us -> Started: processes arrive -> finish -> settle
//! ```
//! Whenever a value here is dropped before [`Started::finish`], the engine's container goes.

use std::fs::File;
use std::io::Write;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::super::address::Interfaces;
use super::super::disk::{self, Root};
use super::super::engines::{Agent, Description, Prepared};
use super::super::ledger::{self, Incoming};
use super::super::preflight;
use super::super::transport::{Input, Output};
use super::super::wire::message::{Accept, Finding, Keepalive, Manner};
use super::super::wire::{Reader, Writer};
use super::super::{Error, Result};
use crate::engine::{ClockOffsets, Freezer, Puppet};
use crate::runtime::{Arrived, StandbySocket};

/// How often the source is told that we are alive while the engine works.
const SIGN: Duration = Duration::from_secs(2);
/// How long an engine may take to start a container.
const TO_START: Duration = Duration::from_secs(120);
/// Where engines keep what they have, if they are not told otherwise: what is free there is asked for.
const STORE: &str = "/var/lib";

/// A container that an engine is to make, or has made and not started.
pub struct ByEngine {
    agent: Agent,
    wanted: Description,
    /// What is sent along of its volumes.
    volumes: Vec<String>,
    prepared: Prepared,
}

impl ByEngine {
    /// `description`: as the source offers it.
    pub fn begin(description: &str) -> Result<ByEngine> {
        let wanted = serde_json::from_str(description)
            .map_err(|e| Error::Other(format!("of the container's engine came {e}")))?;
        Ok(ByEngine { agent: Agent::spawn()?, wanted, volumes: Vec::new(), prepared: Prepared::default() })
    }

    pub fn dir(&self) -> &Path {
        Path::new(STORE)
    }

    /// What this host and its engine have against it.
    pub fn check(&mut self, config: &[u8], manner: &Manner) -> Result<Vec<Finding>> {
        let notes = self.agent.check(&self.wanted)?;
        let mut all: Vec<Finding> = notes.into_iter().map(Finding::from).collect();
        all.extend(preflight::kernel(config));
        let missing = self.agent.missing_volumes(&self.wanted)?;
        for volume in &self.wanted.volumes {
            let Some(name) = volume.name.as_ref().filter(|name| volume.is_local() && missing.contains(name)) else {
                continue;
            };
            if manner.volumes {
                self.volumes.push(name.clone());
                continue;
            }
            all.push(Finding {
                what: format!("volume {name}, at {}, is missing", volume.target.display()),
                place: "destination".into(),
                remedy: "--volumes sends it along; or make it there".into(),
                blocks: true,
            });
        }
        Ok(all)
    }

    /// What is to be sent.
    pub fn accept(&mut self) -> Result<Accept> {
        let known_layers = self.agent.known_layers(&self.wanted)?.map(|known| known as u32);
        Ok(Accept { disk: true, known_layers, volumes: self.volumes.clone() })
    }

    /// Takes the image, if it comes, and has the engine make the container. The source is told that its files may come.
    pub fn make(&mut self, image: bool, reader: &mut Reader<Input>, writer: &mut Writer<Output>) -> Result<()> {
        if image {
            let (ours, mut pipe) = std::io::pipe().map_err(|e| Error::Other(format!("pipe: {e}")))?;
            self.agent.begin_import(&self.wanted, ours)?;
            let mut open = true;
            loop {
                let bytes = reader.recv()?.expect_engine()?;
                if bytes.is_empty() {
                    break;
                }
                // If it does not take the rest, it has a reason to tell.
                open = open && pipe.write_all(&bytes).is_ok();
            }
            drop(pipe);
            await_answer(&self.agent, writer)?;
            self.agent.finished()?;
        }
        self.agent.begin_prepare(&self.wanted)?;
        await_answer(&self.agent, writer)?;
        self.prepared = self.agent.prepared()?;
        say(writer)
    }

    /// Where its files come to, in the order of [`Accept::volumes`] behind its root.
    pub fn target(&self) -> Result<disk::Target> {
        let root =
            |name: &str, path: &Path| Root { name: name.into(), path: path.into(), view: None, inside: "/".into() };
        let mut roots = vec![root("rootfs", &self.prepared.upper)];
        for name in &self.volumes {
            let made = self.prepared.volumes.iter().find(|(made, _)| made == name);
            let (_, path) =
                made.ok_or_else(|| Error::Other(format!("volume {name} was made by somebody else meanwhile")))?;
            roots.push(root(name, path));
        }
        Ok(disk::Target::replace(roots)?)
    }

    /// Has the engine start it, up to the point where its processes are to arrive. The source is told.
    pub fn start(
        mut self,
        clocks: ClockOffsets,
        files: Option<&mut disk::Target>,
        writer: &mut Writer<Output>,
    ) -> Result<Started> {
        let socket = StandbySocket::bind(&self.prepared.id, &self.prepared.bundle, clocks)?;
        self.agent.begin_start()?;
        let begin = Instant::now();
        let arrived = loop {
            let [answered, came] = readable([self.agent.as_fd(), socket.as_fd()])?;
            if came && let Some(arrived) = socket.accept(Duration::ZERO)? {
                break arrived;
            }
            if answered {
                self.agent.started()?;
                self.agent.discard()?;
                let what = format!("the engine has started {} without asking for its processes", self.wanted.name);
                return Err(Error::Other(format!("{what}: is its lmrun another one than this?")));
            }
            if begin.elapsed() > TO_START {
                return Err(Error::Other(format!("the engine does not start {}", self.wanted.name)));
            }
            if !came {
                writer.say(&Keepalive {})?;
            }
        };
        self.check_addresses(arrived.init)?;
        if let Some(files) = files {
            files.mounted(0, &arrived.rootfs)?;
        }
        say(writer)?;
        let root = arrived.dir.parent().map(Path::to_owned).unwrap_or_default();
        let made = ledger::ByEngine { container: self.wanted.container, prepared: self.prepared, root };
        Ok(Started { arrived: Some(arrived), agent: self.agent, _socket: socket, made, name: self.wanted.name })
    }

    /// The engine leads what it publishes to the addresses that it has given: those have to be the ones that arrive. `init` is the first
    /// process.
    fn check_addresses(&self, init: i32) -> Result<()> {
        let wanted: Vec<IpAddr> = self.wanted.networks.iter().flat_map(|network| network.addresses.clone()).collect();
        if wanted.is_empty() {
            return Ok(());
        }
        let path = format!("/proc/{init}/ns/net");
        let netns = File::open(&path).map_err(|e| Error::Other(format!("{path}: {e}")))?;
        let given = Interfaces::read(netns.as_fd())?.addresses();
        match wanted.iter().find(|address| !given.contains(address)) {
            None => Ok(()),
            Some(lacking) => Err(Error::Other(format!(
                "{} is to have the address {lacking}, and the engine there gives it {given:?}; hint: the default bridge gives what it \
                 likes: put the container into a network of its own",
                self.wanted.name
            ))),
        }
    }
}

/// One that the engine starts for as long as its processes arrive.
///
/// The order of its fields is that in which they are dropped: the start fails, the engine's container is removed, and until then
/// nobody can start it otherwise.
pub struct Started {
    arrived: Option<Arrived>,
    agent: Agent,
    _socket: StandbySocket,
    made: ledger::ByEngine,
    name: String,
}

impl Started {
    fn arrived(&self) -> Result<&Arrived> {
        self.arrived.as_ref().ok_or_else(|| Error::Other(format!("{} runs already", self.name)))
    }

    pub fn puppet(&self) -> Result<Puppet> {
        self.arrived()?.puppet().map_err(|e| Error::Other(format!("the container's first process: {e}")))
    }

    /// See [`Arrived::freezer`].
    pub fn freezer(&self) -> Result<Box<dyn Freezer>> {
        Ok(self.arrived()?.freezer()?)
    }

    /// See [`Arrived::external`].
    pub fn external(&self, images: &Path) -> Result<Vec<(String, std::os::fd::OwnedFd)>> {
        Ok(self.arrived()?.external(images)?)
    }

    /// It is complete: the engine may know. From here on it stays if we are killed, for whoever settles the migration `token`.
    pub fn finish(&mut self, incoming: &Incoming, token: &str) -> Result<()> {
        incoming.made_by_engine(token, &self.made)?;
        let arrived = self.arrived.take().ok_or_else(|| Error::Other(format!("{} runs already", self.name)))?;
        let released = arrived.release(Ok(()));
        released.map_err(|e| Error::Other(format!("the engine has given up waiting for {}: {e}", self.name)))
    }

    /// It was not to be.
    pub fn remove(mut self) -> Result<()> {
        // What it has to say of it does not matter any more.
        let _ = self.agent.started();
        Ok(self.agent.discard()?)
    }

    /// The engine has done what it does afterwards.
    pub fn settle(mut self) {
        match self.agent.started() {
            Ok(notes) => notes.iter().for_each(|note| tracing::warn!("{}: {} ({})", self.name, note.what, note.remedy)),
            Err(error) => tracing::warn!("{} runs, but its engine says: {error}", self.name),
        }
    }
}

/// It is the source's turn.
fn say(writer: &mut Writer<Output>) -> Result<()> {
    writer.send_engine(&[])?;
    Ok(writer.flush()?)
}

/// Waits for the engine, and keeps the source waiting.
fn await_answer(agent: &Agent, writer: &mut Writer<Output>) -> Result<()> {
    while readable([agent.as_fd()])? == [false] {
        writer.say(&Keepalive {})?;
    }
    Ok(())
}

/// Which of them can be read, when one can or [`SIGN`] is over.
fn readable<const N: usize>(fds: [BorrowedFd<'_>; N]) -> Result<[bool; N]> {
    let mut polled = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN));
    let timeout = PollTimeout::try_from(SIGN).unwrap_or(PollTimeout::MAX);
    poll(&mut polled, timeout).map_err(|e| Error::Other(format!("wait for the engine: {e}")))?;
    Ok(polled.map(|fd| fd.any() == Some(true)))
}
