//! TCP connections: the bracket in which they are read, late and short, and their revival.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use libc::pid_t;

use super::collect::Collection;
use super::guard::Guard;
use super::netlock::{Connection, NetLock, Nft};
use super::res::fd::tcp::{self, Kind};
use super::res::fd::tcp_stream::{self, Silent, Stream};
use super::tree::{self, Tree};
use super::{Error, Result, Subject};
use crate::image::records::lmrun::LmrunSocket;
use crate::image::records::sockets::{InetSkEntry, SkOptsEntry};
use crate::sys::netns;
use crate::sys::segment::RawTcp;

/// How long the peers of a container that has left meet silence instead of a reset, if nobody restores it here.
const HOLD: Duration = Duration::from_secs(300);

/// What is made ready before the freeze, so that the bracket is short.
#[derive(Debug)]
pub struct Watch(Option<Tools>);

#[derive(Debug)]
struct Tools {
    id: String,
    guard: Guard,
    nft: Nft,
}

impl Watch {
    pub fn prepare(subject: &Subject, keep_established: bool) -> Result<Watch> {
        if !keep_established {
            return Ok(Watch(None));
        }
        let guard = Guard::spawn()?;
        let nft = Nft::open(netns_of(subject.init)?.as_fd())?;
        guard.keep(nft.as_fd())?;
        Ok(Watch(Some(Tools { id: subject.id.clone(), guard, nft })))
    }

    /// Locks the container's connections and reads them. All of them are silent until the bracket is left.
    pub fn enter(self, all: &mut Collection) -> Result<Bracket> {
        let mut connected: Vec<(u32, Connection, SkOptsEntry)> = Vec::new();
        for e in all.files.all.files.iter().filter_map(|f| f.isk.as_ref()) {
            if Kind::of(e).map_err(|source| Error::Socket { id: e.id, source })?.has_peer() {
                let c = tcp::connection(e).map_err(|source| Error::Socket { id: e.id, source })?;
                connected.push((e.id, c, e.opts.clone()));
            }
        }
        let (Some(tools), false) = (self.0, connected.is_empty()) else { return Ok(Bracket(None)) };
        let connections: Vec<Connection> = connected.iter().map(|(_, c, _)| *c).collect();
        let sockets: Vec<(OwnedFd, SkOptsEntry)> = connected
            .iter()
            .filter_map(|(id, _, opts)| Some((all.files.sockets.remove(id)?, opts.clone())))
            .collect();
        let held: Vec<BorrowedFd> = sockets.iter().map(|(s, _)| s.as_fd()).collect();
        tools.guard.watch(&held)?;
        let lock = tools.nft.lock(&tools.id, &connections)?;
        let mut locked = Locked { id: tools.id, guard: Some(tools.guard), lock: Some(lock), connections, sockets };
        locked.read(&connected, all)?;
        Ok(Bracket(Some(locked)))
    }
}

/// The time in which the connections are silent. Dropped, it lets them go on.
#[derive(Debug)]
pub struct Bracket(Option<Locked>);

#[derive(Debug)]
struct Locked {
    id: String,
    guard: Option<Guard>,
    lock: Option<NetLock>,
    connections: Vec<Connection>,
    sockets: Vec<(OwnedFd, SkOptsEntry)>,
}

impl Locked {
    fn read(&mut self, connected: &[(u32, Connection, SkOptsEntry)], all: &mut Collection) -> Result<()> {
        for ((id, ..), (socket, _)) in connected.iter().zip(&self.sockets) {
            let failed = |source| Error::Socket { id: *id, source };
            let entry = all.files.all.files.iter_mut().find(|f| f.id == *id).and_then(|f| f.isk.as_mut());
            let Some(entry) = entry else { continue };
            tcp_stream::enter_repair(socket.as_fd()).map_err(failed)?;
            if let Some(Stream { entry: stream, inq, outq }) = tcp_stream::read(socket.as_fd(), entry).map_err(failed)? {
                all.tree.streams.insert(entry.ino, (stream, [inq, outq].concat()));
            }
        }
        Ok(())
    }

    fn end_repair(&mut self) -> Result<()> {
        let mut first = Ok(());
        for (socket, opts) in self.sockets.drain(..) {
            let left = tcp_stream::leave_repair(socket.as_fd(), &opts).map_err(|source| Error::Socket { id: 0, source });
            first = first.and(left);
        }
        self.guard = None;
        first
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        // The guard is still there for what fails.
        let _ = self.end_repair();
    }
}

impl Bracket {
    /// Whose connections a restore finds held, for `lmrun.img`.
    pub fn table(&self) -> Option<String> {
        self.0.as_ref().map(|l| l.id.clone())
    }

    /// The connections go on here.
    pub fn leave(mut self) -> Result<()> {
        let Some(mut locked) = self.0.take() else { return Ok(()) };
        locked.end_repair()?;
        if let Some(lock) = locked.lock.take() {
            lock.release()?;
        }
        Ok(())
    }

    /// The container has ended here: its peers meet silence for a while.
    pub fn hold(mut self) -> Result<()> {
        let Some(mut locked) = self.0.take() else { return Ok(()) };
        if let Some(lock) = &locked.lock {
            lock.hold(&locked.id, &locked.connections, HOLD)?;
        }
        // Closed in repair mode: without a word to the peer.
        locked.sockets.clear();
        locked.guard = None;
        if let Some(lock) = locked.lock.take() {
            lock.release()?;
        }
        Ok(())
    }
}

fn netns_of(pid: pid_t) -> Result<File> {
    File::open(format!("/proc/{pid}/ns/net")).map_err(|e| Error::proc(pid, e))
}

/// The sockets of a container that is being built.
#[derive(Debug)]
pub struct Revival {
    netns: File,
    streams: BTreeMap<u32, tree::Stream>,
    extras: HashMap<u32, LmrunSocket>,
    silent: Vec<Silent>,
    quiet: Option<Quiet>,
}

/// Keeps peers away from connections that are not all there yet: the kernel would answer with a reset.
#[derive(Debug)]
struct Quiet {
    raw: RawTcp,
    lock: NetLock,
    /// Only to close the lock's socket, see [`Guard::keep`].
    guard: Guard,
    /// The container whose connections are held in this namespace since it left.
    held: Option<String>,
}

impl Quiet {
    fn prepare(netns: BorrowedFd<'_>, connections: &[Connection], held: Option<String>) -> Result<Quiet> {
        let raw = RawTcp::open(netns).map_err(Error::system("open raw sockets"))?;
        let guard = Guard::spawn()?;
        let nft = Nft::open(netns)?;
        guard.keep(nft.as_fd())?;
        Ok(Quiet { raw, lock: nft.lock("restore", connections)?, guard, held })
    }

    fn end(self, silent: Vec<Silent>) -> Result<()> {
        let nft = self.lock.release()?;
        if let Some(id) = self.held {
            nft.unhold(&id)?;
        }
        for silent in silent {
            let id = silent.id();
            silent.go_live(&self.raw).map_err(|source| Error::Socket { id, source })?;
        }
        self.guard.dismiss();
        Ok(())
    }
}

impl Revival {
    /// `first` is a process in the container's network namespace.
    pub fn prepare(first: pid_t, tree: &mut Tree) -> Result<Revival> {
        let netns = netns_of(first)?;
        let connections = tree
            .files
            .iter()
            .filter_map(|f| f.isk.as_ref())
            .filter(|e| Kind::of(e).is_ok_and(Kind::has_peer))
            .map(|e| tcp::connection(e).map_err(|source| Error::Socket { id: e.id, source }))
            .collect::<Result<Vec<Connection>>>()?;
        let quiet = match connections.is_empty() {
            true => None,
            false => Some(Quiet::prepare(netns.as_fd(), &connections, tree.extra.network_lock.clone())?),
        };
        let streams = std::mem::take(&mut tree.streams);
        let extras = tree.extra.sockets.iter().map(|s| (s.id, s.clone())).collect();
        Ok(Revival { netns, streams, extras, silent: Vec::new(), quiet })
    }

    /// The container's network namespace.
    pub fn netns(&self) -> BorrowedFd<'_> {
        self.netns.as_fd()
    }

    /// Makes a socket; a connected one stays silent until [`Revival::go_live`].
    pub fn create(&mut self, e: &InetSkEntry) -> Result<OwnedFd> {
        enum Made {
            Speaking(OwnedFd),
            Silent(Silent),
        }
        let failed = |source| Error::Socket { id: e.id, source };
        let more = self.extras.get(&e.id);
        let kind = Kind::of(e).map_err(failed)?;
        let stream = self.streams.remove(&e.ino).map(|(entry, mut inq)| {
            let outq = inq.split_off((entry.inq_len as usize).min(inq.len()));
            Stream { entry, inq, outq }
        });
        let make = || match (kind, stream) {
            (Kind::Connected, Some(stream)) => tcp_stream::create(e, more, stream).map(Made::Silent),
            (Kind::Connected, None) => Err(tcp::Error::Image("a connection without queues")),
            (Kind::Connecting, _) => tcp_stream::create_connecting(e, more).map(Made::Silent),
            (Kind::Listening, _) => tcp::create_listening(e, more).map(Made::Speaking),
            (Kind::Unconnected, _) => tcp::create_unconnected(e, more).map(Made::Speaking),
        };
        let made = netns::within(self.netns.as_fd(), make);
        match made.map_err(Error::system("enter the container's network namespace"))?.map_err(failed)? {
            Made::Speaking(fd) => Ok(fd),
            Made::Silent(silent) => {
                let fd = silent.fd().try_clone_to_owned().map_err(Error::system("duplicate a socket"))?;
                self.silent.push(silent);
                Ok(fd)
            }
        }
    }

    /// Lets all connections go on, and their peers know.
    pub fn go_live(&mut self) -> Result<()> {
        let silent = std::mem::take(&mut self.silent);
        self.quiet.take().map_or(Ok(()), |quiet| quiet.end(silent))
    }
}
