//! Unix sockets: pairs, and those with names, as long as both sides are in the container.
//!
//! Who is connected to whom shows only when all are known: `dump` notes each, [`finish`] looks at all of them. A restore
//! has it the other way round: when the first is wanted, [`wiring`] makes all of them.

mod queue;
mod wiring;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use libc::{SOL_SOCKET, c_int, pid_t};
use nix::sys::socket::{UnixAddr, getsockname};

use super::{Collected, FdFacts, FdKind, Workshop, part, sockopts};
use crate::engine::{Error, Result};
use crate::image::records::files::{FdTypes, FileEntry, FownEntry};
use crate::image::records::lmrun::{LmrunSockOpt, LmrunSocket};
use crate::image::records::sockets::{FilePermsEntry, SkShutdown, SkUcredEntry, UnixSkEntry};
use crate::sys::proc;
use crate::sys::tcp::state;
use crate::sys::unix_socket::{self, Facts};
use crate::sys::{file, netns, sockopt};
use crate::tracee::batch::Batch;

pub use wiring::Wiring;

pub struct UnixSocket;

/// The unix sockets that have been seen while files were collected.
#[derive(Debug)]
pub struct Seen {
    /// A process of the container.
    init: pid_t,
    /// All of the container's network namespace, once asked for.
    known: Option<HashMap<u32, Facts>>,
    /// Those of the container.
    sockets: BTreeMap<u32, Socket>,
}

#[derive(Debug)]
struct Socket {
    facts: FdFacts,
    record: UnixSkEntry,
    /// SO_PEEK_OFF.
    peek_offset: c_int,
    /// Its file was deleted, and there is another one at the path.
    displaced: bool,
}

impl Seen {
    pub fn of(init: pid_t) -> Seen {
        Seen { init, known: None, sockets: BTreeMap::new() }
    }

    /// What the kernel tells of the sockets of the container's network namespace.
    fn known(&mut self) -> Result<&HashMap<u32, Facts>> {
        if self.known.is_none() {
            let netns = File::open(format!("/proc/{}/ns/net", self.init)).map_err(|e| Error::proc(self.init, e))?;
            let all = netns::within(netns.as_fd(), unix_socket::all).and_then(|r| r);
            let all = all.map_err(Error::system("ask the kernel for its unix sockets (CONFIG_UNIX_DIAG)"))?;
            self.known = Some(all.into_iter().map(|f| (f.inode, f)).collect());
        }
        Ok(self.known.as_ref().expect("was just asked for"))
    }
}

impl FdKind for UnixSocket {
    const NAME: &'static str = "unix socket";
    const TYPE: FdTypes = FdTypes::Unixsk;

    fn claims(f: &FdFacts) -> bool {
        let is_unix = |(family, ..): (c_int, c_int, c_int)| family == libc::AF_UNIX;
        f.link.starts_with(b"socket:[") && file::socket_kind(&f.dup).is_some_and(is_unix)
    }

    fn dump(f: &FdFacts, id: u32, all: &mut Collected) -> Result<FileEntry> {
        let ino = f.stat.inode as u32;
        let external = all.external.contains(&f.link);
        let facts = match all.unix.known()?.get(&ino) {
            Some(facts) => facts.clone(),
            None if external => Facts { inode: ino, peer: Some(OUTSIDE), ..Facts::default() },
            None => return refuse(f, "is of another network namespace", "close it before the checkpoint"),
        };
        let failed = |source| Error::SocketOption { id, source };
        let fd = f.dup.as_fd();
        let (_, kind, _) = file::socket_kind(fd).unwrap_or_default();
        let mut record = UnixSkEntry {
            id,
            ino,
            r#type: kind as u32,
            // A datagram socket counts as connected once another was connected to it.
            state: if facts.peer.is_none() && facts.state == state::ESTABLISHED { state::CLOSE } else { facts.state },
            flags: f.flags(),
            backlog: facts.backlog,
            peer: facts.peer.unwrap_or(0),
            fown: f.owner()?,
            opts: sockopts::dump(fd).map_err(failed)?,
            shutdown: shutdown(facts.shutdown).map(|s| s as i32),
            ..UnixSkEntry::default()
        };
        let displaced = name(f, &mut record, all)?;
        let uid = nix::sys::stat::fstat(fd).map_err(|e| Error::proc(f.pid, e.into()))?.st_uid;
        let more = sockopts::dump_more(fd, uid).map_err(failed)?;
        let peer = peer_credentials(f, all.unix.init)?;
        let peek_off = more.options.iter().find(|o| o.name == libc::SO_PEEK_OFF as u32).map(|o| o.value as c_int);
        all.socket_extras.push(LmrunSocket { id, peer, ..more });
        let facts = FdFacts {
            dup: f.dup.try_clone().map_err(|e| Error::proc(f.pid, e))?,
            link: f.link.clone(),
            info: f.info.clone(),
            ..*f
        };
        let socket = Socket { facts, record: record.clone(), peek_offset: peek_off.unwrap_or(-1), displaced };
        all.unix.sockets.insert(ino, socket);
        Ok(FileEntry { r#type: Self::TYPE as i32, id, usk: Some(record), ..FileEntry::default() })
    }

    fn create(e: &FileEntry, shop: &mut Workshop) -> Result<OwnedFd> {
        let r = part(e, Self::NAME, e.usk.as_ref())?;
        let link = format!("socket:[{}]", r.ino).into_bytes();
        if shop.external.contains_key(&link) {
            return shop.external(&link);
        }
        shop.unix.open(r, shop.root.as_fd(), shop.network.netns(), &shop.pids)
    }

    fn link(_: &FileEntry, _: c_int, _: &mut Batch) {}

    fn owner(e: &FileEntry) -> Option<&FownEntry> {
        e.usk.as_ref().map(|r| &r.fown)
    }
}

fn refuse<T>(f: &FdFacts, why: impl std::fmt::Display, remedy: &'static str) -> Result<T> {
    f.refuse(format!("is a unix socket that {why}"), remedy)
}

/// An inode number that no socket of the container has: the peer of one of which nothing is known.
const OUTSIDE: u32 = u32::MAX;

fn shutdown(bits: u32) -> Option<SkShutdown> {
    match bits & 3 {
        0 => None,
        1 => Some(SkShutdown::Read),
        2 => Some(SkShutdown::Write),
        _ => Some(SkShutdown::Both),
    }
}

/// Who was on the other side as the connection was made; of a listening socket, who listens.
fn peer_credentials(f: &FdFacts, init: pid_t) -> Result<Option<SkUcredEntry>> {
    let failed = |e| Error::proc(f.pid, e);
    let [pid, uid, gid] = sockopt::get_words(f.dup.as_fd(), SOL_SOCKET, libc::SO_PEERCRED).map_err(failed)?;
    let nobody = (pid, uid) == (0, u32::MAX);
    Ok(if nobody { None } else { Some(SkUcredEntry { uid, gid, pid: inside(init, pid as pid_t).map_err(failed)? }) })
}

/// The pid that a process of the container has in it; 0: there is no such process, or it is not of the container.
fn inside(init: pid_t, pid: pid_t) -> io::Result<u32> {
    let read = || match proc::link(pid, "ns/pid")? == proc::link(init, "ns/pid")? {
        true => proc::status(pid)?.innermost("NSpid"),
        false => Ok(0),
    };
    match read() {
        Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH) => Ok(0),
        result => result,
    }
}

/// The name as it is in `sun_path`, of a path without the NUL byte.
fn name_of(r: &UnixSkEntry) -> &[u8] {
    match r.name.split_first() {
        Some((0, _)) | None => &r.name,
        Some(_) => r.name.strip_suffix(b"\0").unwrap_or(&r.name),
    }
}

fn is_datagram(r: &UnixSkEntry) -> bool {
    r.r#type == libc::SOCK_DGRAM as u32
}

/// Whether two sockets cannot but be made as a pair: the only way to be connected to one that has no name.
fn must_be_paired(a: &UnixSkEntry, b: &UnixSkEntry) -> bool {
    let named = !a.name.is_empty() as u8 + !b.name.is_empty() as u8;
    if is_datagram(a) { named < 2 } else { named == 0 }
}

/// Fills in what the socket is bound to; returns whether its file had to make way for another.
fn name(f: &FdFacts, r: &mut UnixSkEntry, all: &Collected) -> Result<bool> {
    let address: UnixAddr = getsockname(f.dup.as_raw_fd()).map_err(|e| Error::proc(f.pid, e.into()))?;
    if let Some(name) = address.as_abstract() {
        r.name = [b"\0", name].concat();
    }
    let Some(path) = address.path() else { return Ok(false) };
    let path = path.as_os_str().as_encoded_bytes();
    r.name = [path, b"\0"].concat();
    let Some(bound) = unix_socket::file(f.dup.as_fd()).map_err(|e| Error::proc(f.pid, e))? else { return Ok(false) };
    let stat = nix::sys::stat::fstat(&bound).map_err(|e| Error::proc(f.pid, e.into()))?;
    r.file_perms = Some(FilePermsEntry { mode: stat.st_mode, uid: stat.st_uid, gid: stat.st_gid });
    r.deleted = (stat.st_nlink == 0).then_some(true);
    let now = proc::link(std::process::id() as pid_t, &format!("fd/{}", bound.as_raw_fd()));
    let now = now.map_err(|e| Error::proc(f.pid, e))?;
    let now = now.as_os_str().as_encoded_bytes();
    let now = if r.deleted.is_some() { now.strip_suffix(b" (deleted)").unwrap_or(now) } else { now };
    if !path.starts_with(b"/") {
        let directory = now.strip_suffix(path).filter(|d| d.ends_with(b"/"));
        let Some(directory) = directory else {
            let why = format!("is bound to {:?}, by which name it is not found again", path.escape_ascii().to_string());
            return refuse(f, why, "bind it to an absolute path");
        };
        r.name_dir = Some(directory.to_vec());
    }
    let full = [r.name_dir.as_deref().unwrap_or_default(), path].concat();
    let find = |path: &[u8]| file::open_in(&all.root, path, libc::O_PATH as u32).and_then(file::stat);
    let directory = &full[..=full.iter().rposition(|c| *c == b'/').unwrap_or(0)];
    match (find(&full), r.deleted.is_some()) {
        (Ok(there), false) if (there.dev, there.inode) == (stat.st_dev, stat.st_ino) => Ok(false),
        (Ok(_), true) => Ok(true),
        (Err(e), true) if e.kind() == io::ErrorKind::NotFound && find(directory).is_ok() => Ok(false),
        _ => refuse(f, "is bound to a file that is elsewhere now", "put the file back, or close the socket"),
    }
}

/// Once all descriptors are known: refuses sockets that lead out of the container, and reads the queues.
pub fn finish(all: &mut Collected) -> Result<()> {
    let sockets = std::mem::take(&mut all.unix.sockets);
    if sockets.is_empty() || !all.is_whole() {
        return Ok(());
    }
    let init = all.unix.init;
    let mut reader = queue::Reader::default();
    let names: BTreeSet<&[u8]> = sockets.values().map(|s| &s.record).filter(|r| is_datagram(r)).map(name_of).collect();
    let known = all.unix.known()?;
    let waiting: BTreeSet<u32> = known.values().flat_map(|f| &f.waiting).copied().collect();
    let mut queues = Vec::new();
    for (ino, s) in &sockets {
        let other = sockets.get(&s.record.peer);
        let peer = other.map(|p| &p.record);
        if peer.is_none() && s.record.peer != 0 && all.external.contains(&s.facts.link) {
            continue;
        }
        check(s, peer, &known.get(ino).cloned().unwrap_or_default(), waiting.contains(ino))?;
        let listens = |o: &&Socket| o.record.state == state::LISTEN && name_of(&o.record) == name_of(&s.record);
        if s.displaced && !sockets.values().any(|o| listens(&o) && !o.displaced) {
            let why = "is bound to a deleted file, and there is another one at its path";
            return refuse(&s.facts, why, "close the socket");
        }
        let messages = reader.read(s)?;
        queue::check_senders(s, peer, &names, &messages)?;
        if let Some(o) = other.filter(|o| o.record.peer == *ino && must_be_paired(&s.record, &o.record)) {
            queue::check_all_seen(s, o, &messages)?;
        }
        for m in messages {
            queues.push(m.record(&s.record, |pid| inside(init, pid)).map_err(|e| Error::proc(s.facts.pid, e))?);
        }
        if queue::has_error(&s.facts)? {
            let extra = all.socket_extras.iter_mut().find(|e| e.id == s.record.id);
            let error =
                LmrunSockOpt { level: SOL_SOCKET as u32, name: libc::SO_ERROR as u32, value: libc::ECONNRESET as u32 };
            extra.into_iter().for_each(|e| e.options.push(error));
        }
    }
    all.socket_queues.extend(queues);
    Ok(())
}

fn check(s: &Socket, peer: Option<&UnixSkEntry>, facts: &Facts, waits: bool) -> Result<()> {
    let (f, r) = (&s.facts, &s.record);
    if waits {
        return refuse(f, "waits to be accepted by the other side", "try again once it has been");
    }
    if !facts.waiting.is_empty() {
        let why = format!("has {} connections that wait to be accepted", facts.waiting.len());
        return refuse(f, why, "try again once the program has accepted them");
    }
    if f.number("scm_fds", 10)? > 0 {
        let why = "holds descriptors that were sent and not yet received";
        return refuse(f, why, "try again once the program has received them");
    }
    if peer.is_none() && r.peer != 0 {
        let why = "is connected to a socket outside the container";
        return refuse(f, why, "close the connection before the checkpoint");
    }
    let one_way = |p: &UnixSkEntry| p.peer != r.ino;
    if peer.is_some_and(|p| one_way(p) && (!is_datagram(r) || p.name.is_empty())) {
        return refuse(f, "is connected to a socket that is not connected to it", "close it before the checkpoint");
    }
    Ok(())
}
