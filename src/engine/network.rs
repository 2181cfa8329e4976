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
use super::res::fd::udp;
use super::tree::{self, Tree};
use super::{Error, Fate, Result, Subject};
use crate::image::records::lmrun::LmrunSocket;
use crate::image::records::sockets::InetSkEntry;
use crate::sys;
use crate::sys::netns;
use crate::sys::pidfd::PidFd;
use crate::sys::segment::RawTcp;

/// How long the peers of a container that has left meet silence instead of a reset, if nobody restores it here.
const HOLD: Duration = Duration::from_secs(300);

/// The same where the host's filter does it.
const HOLD_AT_BRIDGES: Duration = Duration::from_secs(60);

/// What is made ready before the freeze, so that the bracket is short.
#[derive(Debug)]
pub struct Watch(Option<Tools>);

#[derive(Debug)]
struct Tools {
    id: String,
    guard: Guard,
    nft: Nft,
    at_bridges: bool,
}

impl Watch {
    /// With `at_bridges`, peers are held silent on the host, too, once the container has left.
    pub fn prepare(subject: &Subject, keep_established: bool, at_bridges: bool) -> Result<Watch> {
        if !keep_established {
            return Ok(Watch(None));
        }
        let guard = Guard::spawn()?;
        let nft = Nft::open(netns_of(subject.init)?.as_fd())?;
        guard.keep(nft.as_fd())?;
        Ok(Watch(Some(Tools { id: subject.id.clone(), guard, nft, at_bridges })))
    }

    /// Locks the container's connections out and reads them. They stay locked out if the container is to end here.
    pub fn enter(self, all: &mut Collection, fate: Fate) -> Result<Bracket> {
        let mut connections = Vec::new();
        let mut sockets = Vec::new();
        for e in all.files.all.files.iter().filter_map(|f| f.isk.as_ref()).filter(|e| !udp::is_udp(e)) {
            let failed = |source| Error::Socket { id: e.id, source };
            if Kind::of(e).map_err(failed)?.has_peer() {
                connections.push(tcp::connection(e).map_err(failed)?);
                sockets.extend(all.files.sockets.remove(&e.id).map(|socket| (e.id, socket)));
            }
        }
        let (Some(tools), false) = (self.0, connections.is_empty()) else { return Ok(Bracket(None)) };
        let watched: Vec<BorrowedFd> = sockets.iter().map(|(_, s)| s.as_fd()).collect();
        tools.guard.watch(&watched)?;
        let lock = tools.nft.lock(&tools.id, &connections)?;
        for (id, socket) in &sockets {
            read(*id, socket.as_fd(), all)?;
        }
        if fate == Fate::Resume {
            lock.release()?;
            return Ok(Bracket(None));
        }
        let Tools { id, guard, at_bridges, .. } = tools;
        Ok(Bracket(Some(Locked { id, guard, lock, connections, sockets, at_bridges })))
    }
}

/// Reads one connection into `all`.
fn read(id: u32, socket: BorrowedFd<'_>, all: &mut Collection) -> Result<()> {
    let entry = all.files.all.files.iter_mut().find(|f| f.id == id).and_then(|f| f.isk.as_mut());
    let Some(entry) = entry else { return Ok(()) };
    let stream = tcp_stream::read(socket, entry).map_err(|source| Error::Socket { id, source })?;
    if let Some(Stream { entry: stream, inq, outq }) = stream {
        all.tree.streams.insert(entry.ino, (stream, [inq, outq].concat()));
    }
    Ok(())
}

/// The time in which peers are locked out, so that nothing is acknowledged that is not in the image. Dropped, it ends.
#[derive(Debug)]
pub struct Bracket(Option<Locked>);

#[derive(Debug)]
struct Locked {
    id: String,
    guard: Guard,
    lock: NetLock,
    connections: Vec<Connection>,
    sockets: Vec<(u32, OwnedFd)>,
    at_bridges: bool,
}

impl Bracket {
    /// Whose connections a restore finds held, for `lmrun.bin`.
    pub fn table(&self) -> Option<String> {
        self.0.as_ref().map(|l| l.id.clone())
    }

    /// From here on the container ends, and its connections with it, without a word to their peers.
    pub fn commit(&self, init: pid_t) -> Result<()> {
        let Some(locked) = &self.0 else { return Ok(()) };
        let init = PidFd::open(init).map_err(|e| Error::proc(init, e))?;
        Ok(locked.guard.commit(&init)?)
    }

    /// Keeps peers in silence even if we die, until [`Bracket::relent`] or for [`HOLD`].
    pub fn persist(&self) -> Result<()> {
        let Some(locked) = &self.0 else { return Ok(()) };
        Ok(locked.lock.hold(&locked.id, &locked.connections, HOLD)?)
    }

    /// Takes [`Bracket::persist`] back.
    pub fn relent(&self) -> Result<()> {
        let Some(locked) = &self.0 else { return Ok(()) };
        locked.lock.unhold(&locked.id)?;
        Ok(())
    }

    /// The container has ended: its peers meet silence for a while.
    pub fn hold(self) -> Result<()> {
        let Some(locked) = self.0 else { return Ok(()) };
        for (id, socket) in locked.sockets {
            tcp_stream::silence(socket.as_fd()).map_err(|source| Error::Socket { id, source })?;
        }
        locked.lock.hold(&locked.id, &locked.connections, HOLD)?;
        if locked.at_bridges {
            let held =
                Nft::here().and_then(|nft| nft.hold_at_bridges(&locked.id, &locked.connections, HOLD_AT_BRIDGES));
            // The container has left already, and may come back without a peer that resets.
            if let Err(error) = held {
                tracing::warn!(
                    ?error,
                    id = locked.id,
                    "a segment that comes before a restore does may be answered with a reset"
                );
            }
        }
        locked.guard.dismiss();
        locked.lock.release()?;
        Ok(())
    }
}

/// Lets the peers of a container hear from it again, which was left silent ([`Bracket::persist`]).
pub fn take_back(init: pid_t, id: &str) -> Result<()> {
    Nft::open(netns_of(init)?.as_fd())?.unhold(id)?;
    Ok(())
}

/// Lets segments pass the host's bridges that were kept from container `id`, and removes what has expired of others'.
pub fn leave_bridges(id: Option<&str>) {
    if let Err(error) = Nft::here().and_then(|nft| nft.unhold_at_bridges(id)) {
        // Who may not filter has not filtered.
        tracing::debug!(?error, id, "cannot look for packet filters of lmrun at the host's bridges");
    }
}

/// Lets the connections of a container go on whose rebuilder died after [`Ready::detach`](super::Ready::detach). What was sent
/// and not acknowledged has died with it; a connection that had such data ends by its peer's timers.
pub fn revive(pids: &[pid_t]) -> Result<()> {
    for pid in pids {
        let failed = |e| Error::proc(*pid, e);
        let process = PidFd::open(*pid).map_err(failed)?;
        for number in sys::proc::descriptors(*pid).map_err(failed)? {
            let Ok(file) = process.get(number) else { continue };
            if sys::tcp::in_repair(file.as_fd()).is_ok_and(|repair| repair) {
                sys::tcp::repair_off(file.as_fd()).map_err(failed)?;
            }
        }
    }
    Ok(())
}

/// Has the peers of an image's connections meet silence in `netns` from now on, until the [`Revival`] is done: the connections
/// are not there yet, and who is not known is answered with a reset. Nothing where the connections were left behind alive.
pub fn hold_peers(tree: &Tree, netns: BorrowedFd<'_>) -> Result<()> {
    let (Some(id), connections) = (&tree.extra.network_lock, connections(tree)?) else { return Ok(()) };
    if !connections.is_empty() {
        Nft::open(netns)?.hold(id, &connections, HOLD)?;
    }
    Ok(())
}

fn connections(tree: &Tree) -> Result<Vec<Connection>> {
    let sockets = tree.files.iter().filter_map(|f| f.isk.as_ref());
    sockets
        .filter(|e| !udp::is_udp(e) && Kind::of(e).is_ok_and(Kind::has_peer))
        .map(|e| tcp::connection(e).map_err(|source| Error::Socket { id: e.id, source }))
        .collect()
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
    /// None: somebody else does.
    lock: Option<Lock>,
    /// The container whose connections are held in this namespace since it left.
    held: Option<String>,
}

#[derive(Debug)]
struct Lock {
    lock: NetLock,
    /// Only to close the lock's socket, see [`Guard::keep`].
    guard: Guard,
}

/// Whether peers hear of a container that is being built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peers {
    /// They have to be kept away.
    Hear,
    /// Nothing passes between them and the container's network namespace until the connections go live, and what an earlier
    /// departure has left there was [taken back](take_back).
    AreKeptAway,
}

impl Quiet {
    fn prepare(netns: BorrowedFd<'_>, connections: &[Connection], held: Option<String>, peers: Peers) -> Result<Quiet> {
        let raw = RawTcp::open(netns).map_err(Error::system("open raw sockets"))?;
        if peers == Peers::AreKeptAway {
            return Ok(Quiet { raw, lock: None, held: None });
        }
        let guard = Guard::spawn()?;
        let nft = Nft::open(netns)?;
        guard.keep(nft.as_fd())?;
        Ok(Quiet { raw, lock: Some(Lock { lock: nft.lock("restore", connections)?, guard }), held })
    }

    fn end(self, silent: Vec<Silent>) -> Result<()> {
        let guard = match self.lock {
            Some(Lock { lock, guard }) => {
                if let Some(id) = &self.held {
                    lock.unhold(id)?;
                    leave_bridges(Some(id));
                }
                lock.release()?;
                Some(guard)
            }
            None => None,
        };
        for silent in silent {
            let id = silent.id();
            silent.go_live(&self.raw).map_err(|source| Error::Socket { id, source })?;
        }
        if let Some(guard) = guard {
            guard.dismiss();
        }
        Ok(())
    }
}

impl Revival {
    /// For sockets that have no peers.
    pub fn of_nothing(first: pid_t) -> Result<Revival> {
        let (streams, extras) = (BTreeMap::new(), HashMap::new());
        Ok(Revival { netns: netns_of(first)?, streams, extras, silent: Vec::new(), quiet: None })
    }

    /// `first` is a process in the container's network namespace.
    pub fn prepare(first: pid_t, tree: &mut Tree, peers: Peers) -> Result<Revival> {
        let netns = netns_of(first)?;
        let connections = connections(tree)?;
        let quiet = match connections.is_empty() {
            true => None,
            false => Some(Quiet::prepare(netns.as_fd(), &connections, tree.extra.network_lock.clone(), peers)?),
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
            Silent(Box<Silent>),
        }
        let failed = |source| Error::Socket { id: e.id, source };
        let more = self.extras.get(&e.id);
        if udp::is_udp(e) {
            let made = netns::within(self.netns.as_fd(), || udp::create(e, more));
            return made.map_err(Error::system("enter the container's network namespace"))?.map_err(failed);
        }
        let kind = Kind::of(e).map_err(failed)?;
        let stream = self.streams.remove(&e.ino).map(|(entry, mut inq)| {
            let outq = inq.split_off((entry.inq_len as usize).min(inq.len()));
            Stream { entry, inq, outq }
        });
        let make = || match (kind, stream) {
            (Kind::Connected, Some(stream)) => tcp_stream::create(e, more, stream).map(Box::new).map(Made::Silent),
            (Kind::Connected, None) => Err(tcp::Error::Image("a connection without queues")),
            (Kind::Connecting, _) => tcp_stream::create_connecting(e, more).map(Box::new).map(Made::Silent),
            (Kind::Listening, _) => tcp::create_listening(e, more).map(Made::Speaking),
            (Kind::Unconnected, _) => tcp::create_unconnected(e, more).map(Made::Speaking),
        };
        let made = netns::within(self.netns.as_fd(), make);
        match made.map_err(Error::system("enter the container's network namespace"))?.map_err(failed)? {
            Made::Speaking(fd) => Ok(fd),
            Made::Silent(silent) => {
                let fd = silent.fd().try_clone_to_owned().map_err(Error::system("duplicate a socket"))?;
                self.silent.push(*silent);
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
