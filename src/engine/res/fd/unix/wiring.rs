//! Making unix sockets and connecting them: those that have a name first, as others are reached by it.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, lchown};
use std::os::unix::net::UnixListener;
use std::path::Path;

use libc::{SOL_SOCKET, pid_t};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{
    AddressFamily, Backlog, Shutdown, SockFlag, SockType, UnixAddr, bind, connect, getsockname, listen, shutdown,
    socket, socketpair,
};
use nix::unistd::{Uid, chroot, fchdir, fchown};

use super::{is_datagram, must_be_paired, name_of};
use crate::engine::res::fd::sockopts;
use crate::engine::tree::Tree;
use crate::engine::{Error, Result};
use crate::image::records::lmrun::LmrunSocket;
use crate::image::records::sockets::{SkPacketEntry, SkShutdown, UnixSkEntry};
use crate::sys::tcp::state;
use crate::sys::unix_socket::{self, Sender};
use crate::sys::{file, identity, netns, sockopt};

/// The unix sockets of a container that is being built.
#[derive(Debug)]
pub struct Wiring {
    records: BTreeMap<u32, UnixSkEntry>,
    extras: HashMap<u32, LmrunSocket>,
    queues: HashMap<u32, Vec<(SkPacketEntry, Vec<u8>)>>,
    /// All of them by inode number, once the first has been asked for.
    made: BTreeMap<u32, OwnedFd>,
}

impl Wiring {
    pub fn prepare(tree: &mut Tree) -> Wiring {
        let all: BTreeMap<u32, UnixSkEntry> =
            tree.files.iter().filter_map(|f| f.usk.clone()).map(|r| (r.ino, r)).collect();
        let inside = |r: &UnixSkEntry| r.peer == 0 || all.contains_key(&r.peer);
        let records = all.iter().filter(|(_, r)| inside(r)).map(|(i, r)| (*i, r.clone())).collect();
        let extras = tree.extra.sockets.iter().map(|s| (s.id, s.clone())).collect();
        let mut queues: HashMap<u32, Vec<_>> = HashMap::new();
        for (packet, data) in std::mem::take(&mut tree.socket_queues) {
            queues.entry(packet.id_for).or_default().push((packet, data));
        }
        Wiring { records, extras, queues, made: BTreeMap::new() }
    }

    /// A socket of the container with the root directory `root`, the network namespace `netns`, and processes with
    /// these pids here, by their pids in the container.
    pub fn open(
        &mut self,
        r: &UnixSkEntry,
        root: BorrowedFd<'_>,
        netns: BorrowedFd<'_>,
        pids: &HashMap<u32, pid_t>,
    ) -> Result<OwnedFd> {
        if self.made.is_empty() {
            let make = || {
                // Names are paths of the container: for this thread alone, its root is the root.
                let enter = || {
                    unshare(CloneFlags::CLONE_FS)?;
                    fchdir(root)?;
                    chroot(".")
                };
                enter().map_err(|e| Error::system("enter the container's root directory")(e.into()))?;
                Maker::new(self, pids).make()
            };
            let made = netns::within(netns, make).map_err(Error::system("enter the container's network namespace"))?;
            self.made = made?;
        }
        let fd = self.made.get(&r.ino).ok_or_else(|| Error::BadRecord {
            what: format!("unix socket {:#x} is connected to one outside the container, and nothing replaces it", r.id),
        })?;
        fd.try_clone().map_err(failed("duplicate", r))
    }

    /// Forgets what was made.
    pub fn close(&mut self) {
        self.made.clear();
    }
}

fn failed<E: Into<io::Error>>(what: &str, r: &UnixSkEntry) -> impl FnOnce(E) -> Error {
    let what = format!("{what} unix socket {:#x} {}", r.id, name_of(r).escape_ascii());
    move |e| Error::System { what, source: e.into() }
}

fn bad<T>(r: &UnixSkEntry, what: &str) -> Result<T> {
    Err(Error::BadRecord { what: format!("unix socket {:#x} {what}", r.id) })
}

fn kind(r: &UnixSkEntry) -> Result<SockType> {
    match r.r#type as libc::c_int {
        libc::SOCK_STREAM => Ok(SockType::Stream),
        libc::SOCK_DGRAM => Ok(SockType::Datagram),
        libc::SOCK_SEQPACKET => Ok(SockType::SeqPacket),
        _ => bad(r, "is of an unknown type"),
    }
}

/// Nothing here is to wait: whatever is waited for is there.
const FLAGS: SockFlag = SockFlag::SOCK_CLOEXEC.union(SockFlag::SOCK_NONBLOCK);

fn fresh(r: &UnixSkEntry) -> Result<OwnedFd> {
    socket(AddressFamily::Unix, kind(r)?, FLAGS, None).map_err(failed("make", r))
}

fn address(r: &UnixSkEntry) -> Result<UnixAddr> {
    let name = name_of(r);
    match name.split_first() {
        Some((0, name)) => UnixAddr::new_abstract(name).map_err(failed("name", r)),
        _ => UnixAddr::new(Path::new(OsStr::from_bytes(name))).map_err(failed("name", r)),
    }
}

/// Lets relative names be found.
fn enter(r: &UnixSkEntry) -> Result<()> {
    let directory = r.name_dir.as_deref().unwrap_or(b"/");
    std::env::set_current_dir(OsStr::from_bytes(directory)).map_err(failed("find the directory of", r))
}

struct Maker<'a> {
    all: &'a Wiring,
    pids: &'a HashMap<u32, pid_t>,
    made: BTreeMap<u32, OwnedFd>,
    /// The other ends of those whose peer is gone.
    gone: BTreeMap<u32, OwnedFd>,
    /// By type and name.
    listeners: HashMap<(u32, &'a [u8]), UnixListener>,
    /// Files of sockets that had been deleted.
    deleted: Vec<&'a UnixSkEntry>,
    /// A size of send buffer into which every queue fits, with what the kernel keeps beside each message.
    room: i32,
}

impl<'a> Maker<'a> {
    fn new(all: &'a Wiring, pids: &'a HashMap<u32, pid_t>) -> Maker<'a> {
        let room = all.queues.values().flatten().map(|(_, data)| data.len() + 4096).sum::<usize>().min(1 << 30) as i32;
        Maker {
            all,
            pids,
            made: BTreeMap::new(),
            gone: BTreeMap::new(),
            listeners: HashMap::new(),
            deleted: Vec::new(),
            room,
        }
    }

    fn make(mut self) -> Result<BTreeMap<u32, OwnedFd>> {
        let all = self.all;
        let records = || all.records.values();
        for r in records().filter(|r| r.state == state::LISTEN) {
            let fd = self.listening(r, r)?;
            self.made.insert(r.ino, fd);
        }
        for r in records().filter(|r| r.state != state::LISTEN) {
            if !self.made.contains_key(&r.ino) {
                self.make_one(r)?;
            }
        }
        for r in records() {
            self.fill(r)?;
        }
        self.connect_datagrams()?;
        for r in records() {
            self.dress(r)?;
        }
        for r in std::mem::take(&mut self.deleted) {
            enter(r)?;
            fs::remove_file(OsStr::from_bytes(name_of(r))).map_err(failed("remove the file of", r))?;
        }
        Ok(self.made)
    }

    fn peer(&self, r: &UnixSkEntry) -> Option<&'a UnixSkEntry> {
        self.all.records.get(&r.peer)
    }

    /// Does what the kernel remembers the caller of: whoever `r` is to take for its peer (SO_PEERCRED). That one's pid is
    /// not ours to have: it will be 0.
    fn as_peer_of<T>(&self, r: &UnixSkEntry, work: impl FnOnce() -> nix::Result<T>) -> Result<T> {
        let result = match self.all.extras.get(&r.id).and_then(|e| e.peer) {
            Some(p) => identity::as_user(p.uid, p.gid, work).map_err(failed("take the user of", r))?,
            None => work(),
        };
        result.map_err(failed("connect", r))
    }

    fn pair(&self, r: &UnixSkEntry) -> Result<(OwnedFd, OwnedFd)> {
        let kind = kind(r)?;
        self.as_peer_of(r, || socketpair(AddressFamily::Unix, kind, None, FLAGS))
    }

    /// Makes a socket, and its peer if they come together.
    fn make_one(&mut self, r: &'a UnixSkEntry) -> Result<()> {
        let connected = r.state == state::ESTABLISHED;
        let (fd, other) = match self.peer(r) {
            Some(p) if p.peer == r.ino && must_be_paired(r, p) => self.pair(r)?,
            Some(p) if p.peer == r.ino && !is_datagram(r) => {
                let (server, client) = self.by_role(r, p);
                let (accepted, connected) = self.connection(server, Some(client))?;
                if server.ino == r.ino { (accepted, connected) } else { (connected, accepted) }
            }
            None if connected && name_of(r).is_empty() => self.pair(r)?,
            None if connected && !is_datagram(r) => self.connection(r, None)?,
            _ => {
                let fd = fresh(r)?;
                self.bind(&fd, r)?;
                self.made.insert(r.ino, fd);
                return Ok(());
            }
        };
        match self.peer(r) {
            Some(p) => {
                // Names of stream sockets are there already.
                if is_datagram(r) {
                    self.bind(&fd, r)?;
                    self.bind(&other, p)?;
                }
                self.made.insert(p.ino, other);
            }
            None => drop(self.gone.insert(r.ino, other)),
        }
        self.made.insert(r.ino, fd);
        Ok(())
    }

    /// Of two connected sockets, the one that was accepted and the one that had asked to be: an accepted one has the name of its listener.
    fn by_role(&self, a: &'a UnixSkEntry, b: &'a UnixSkEntry) -> (&'a UnixSkEntry, &'a UnixSkEntry) {
        let listens = |r: &UnixSkEntry| self.listeners.contains_key(&(r.r#type, name_of(r)));
        if name_of(b).is_empty() || (listens(a) && !listens(b)) { (a, b) } else { (b, a) }
    }

    /// A listener with the name of `r`; `seen_by` knows who listens.
    fn listening(&mut self, r: &'a UnixSkEntry, seen_by: &UnixSkEntry) -> Result<OwnedFd> {
        let fd = fresh(r)?;
        self.bind(&fd, r)?;
        let backlog = Backlog::new(r.backlog.min(libc::SOMAXCONN as u32) as i32).map_err(failed("listen on", r))?;
        self.as_peer_of(seen_by, || listen(&fd, backlog))?;
        let known = fd.try_clone().map_err(failed("duplicate", r))?;
        self.listeners.insert((r.r#type, name_of(r)), known.into());
        Ok(fd)
    }

    /// A connection to the name of `server`: the accepted end, and the other.
    fn connection(&mut self, server: &'a UnixSkEntry, client: Option<&'a UnixSkEntry>) -> Result<(OwnedFd, OwnedFd)> {
        let key = (server.r#type, name_of(server));
        if !self.listeners.contains_key(&key) {
            // It was closed after it had accepted: a listener for now has to do.
            self.listening(server, client.unwrap_or(server))?;
        }
        let asking = fresh(server)?;
        if let Some(client) = client {
            self.bind(&asking, client)?;
        }
        enter(server)?;
        let to = address(server)?;
        self.as_peer_of(server, || connect(asking.as_raw_fd(), &to))?;
        let (accepted, _) = self.listeners[&key].accept().map_err(failed("accept", server))?;
        Ok((accepted.into(), asking))
    }

    fn bind(&mut self, fd: &OwnedFd, r: &'a UnixSkEntry) -> Result<()> {
        let name = name_of(r);
        if name.is_empty() {
            return Ok(());
        }
        let path = Path::new(OsStr::from_bytes(name));
        let on_disk = name[0] != 0;
        if on_disk {
            enter(r)?;
            // The file that the socket left behind.
            match fs::symlink_metadata(path) {
                Ok(m) if m.file_type().is_socket() && r.deleted != Some(true) => {
                    fs::remove_file(path).map_err(failed("remove the former file of", r))?;
                }
                Ok(_) => return bad(r, &format!("cannot be bound to {}: that is another file", path.display())),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(failed("find", r)(e)),
            }
        }
        bind(fd.as_raw_fd(), &address(r)?).map_err(failed("bind", r))?;
        if let Some(perms) = r.file_perms.as_ref().filter(|_| on_disk) {
            let mode = fs::Permissions::from_mode(perms.mode & 0o7777);
            lchown(path, Some(perms.uid), Some(perms.gid)).map_err(failed("own", r))?;
            fs::set_permissions(path, mode).map_err(failed("set the mode of", r))?;
        }
        if on_disk && r.deleted == Some(true) {
            self.deleted.push(r);
        }
        Ok(())
    }

    /// Puts back what the socket had received and not read.
    fn fill(&mut self, r: &'a UnixSkEntry) -> Result<()> {
        let Some(queue) = self.all.queues.get(&r.id) else { return Ok(()) };
        let by_name = is_datagram(r) && !name_of(r).is_empty();
        for (packet, data) in queue {
            let stranger;
            let from = packet.addr.as_deref().unwrap_or_default();
            let mut named = self.all.records.values().filter(|s| is_datagram(s) && !from.is_empty() && s.name == from);
            let sender = match (self.sender(r), named.find_map(|s| self.made.get(&s.ino))) {
                (Some(end), _) => end,
                (None, Some(named)) => named,
                (None, None) if by_name => {
                    stranger = fresh(r)?;
                    &stranger
                }
                (None, None) => return bad(r, "has received something that nobody can have sent"),
            };
            let room = sockopt::set_int(sender.as_fd(), SOL_SOCKET, libc::SO_SNDBUFFORCE, self.room);
            room.map_err(failed("fill", r))?;
            let to = if self.sender(r).is_some() { None } else { Some(address(r)?) };
            enter(r)?;
            let user = packet.ucred.map(|u| Sender {
                pid: self.pids.get(&u.pid).copied().unwrap_or(std::process::id() as pid_t),
                uid: u.uid,
                gid: u.gid,
            });
            unix_socket::send(sender.as_fd(), data, to.as_ref(), user).map_err(failed("fill", r))?;
        }
        Ok(())
    }

    /// The other end, if it is connected to this one by now.
    fn sender(&self, r: &UnixSkEntry) -> Option<&OwnedFd> {
        match self.peer(r) {
            Some(p) if p.peer == r.ino && (!is_datagram(r) || must_be_paired(r, p)) => self.made.get(&p.ino),
            Some(_) => None,
            None => self.gone.get(&r.ino),
        }
    }

    /// Connects the datagram sockets that were not made as pairs. A socket that is connected accepts no other's connection but its
    /// peer's: whoever is connected to by a third comes after that.
    fn connect_datagrams(&mut self) -> Result<()> {
        let separate = |r: &&UnixSkEntry| {
            let paired = self.peer(r).is_some_and(|p| p.peer == r.ino && must_be_paired(r, p));
            is_datagram(r) && r.state == state::ESTABLISHED && !paired && !self.gone.contains_key(&r.ino)
        };
        let mut left: Vec<&UnixSkEntry> = self.all.records.values().filter(separate).collect();
        while !left.is_empty() {
            let free = |r: &UnixSkEntry| left.iter().all(|w| w.peer != r.ino || r.peer == w.ino);
            let Some(at) = left.iter().position(|r| free(r)) else {
                return bad(left[0], "is connected in a circle");
            };
            let r = left.swap_remove(at);
            let passing;
            let to = match self.peer(r) {
                Some(p) => {
                    enter(p)?;
                    address(p)?
                }
                None => {
                    passing = fresh(r)?;
                    bind(passing.as_raw_fd(), &UnixAddr::new_unnamed())
                        .map_err(failed("name the former peer of", r))?;
                    getsockname(passing.as_raw_fd()).map_err(failed("name the former peer of", r))?
                }
            };
            connect(self.made[&r.ino].as_raw_fd(), &to).map_err(failed("connect", r))?;
        }
        Ok(())
    }

    /// Shuts down what was shut down, and sets options and flags. Nothing is sent any more.
    fn dress(&mut self, r: &UnixSkEntry) -> Result<()> {
        let fd = &self.made[&r.ino];
        let extra = self.all.extras.get(&r.id);
        let reset = |e: &LmrunSocket| e.options.iter().any(|o| o.name == libc::SO_ERROR as u32);
        if let Some(other) = self.gone.remove(&r.ino) {
            if extra.is_some_and(reset) {
                unix_socket::send(fd.as_fd(), b"\0", None, None).map_err(failed("reset", r))?;
            }
            drop(other);
        }
        let how = match r.shutdown {
            Some(how) if how == SkShutdown::Read as i32 => Some(Shutdown::Read),
            Some(how) if how == SkShutdown::Write as i32 => Some(Shutdown::Write),
            Some(how) if how == SkShutdown::Both as i32 => Some(Shutdown::Both),
            _ => None,
        };
        if let Some(how) = how {
            shutdown(fd.as_raw_fd(), how).map_err(failed("shut down", r))?;
        }
        let options = |source| Error::SocketOption { id: r.id, source };
        let fd = fd.as_fd();
        sockopts::restore_before_bind(fd, &r.opts).map_err(options)?;
        sockopts::set(fd, SOL_SOCKET, libc::SO_REUSEADDR, r.opts.reuseaddr.unwrap_or(false).into()).map_err(options)?;
        sockopts::restore(fd, &r.opts).map_err(options)?;
        if let Some(extra) = extra {
            sockopts::restore_more(fd, extra).map_err(options)?;
            fchown(fd, Some(Uid::from_raw(extra.uid)), None).map_err(failed("own", r))?;
        }
        sockopts::restore_buffer_locks(fd, &r.opts).map_err(options)?;
        file::set_flags(fd, r.flags).map_err(failed("set the flags of", r))
    }
}
