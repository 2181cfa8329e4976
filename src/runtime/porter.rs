//! The process between lmrun and the init of a container with a user namespace.
//!
//! A namespace belongs to the user namespace in which it is made, and nobody comes back from one. So a *porter* is forked: it
//! joins what belongs to users further up, enters the user namespace (whose mapping lmrun writes from outside), makes and
//! joins the rest from there, forks init as a sibling of its own, and ends. Both ask lmrun, over a socket, for what takes lmrun's rights.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use nix::sys::wait::waitpid;
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use super::birth::{CLONE_NEWTIME, flag, write_offsets};
use super::bundle::makes_namespace;
use super::cgroup::Birthplace;
use super::mounts::Mounts;
use super::users::{self, Users};
use super::workload::words;
use super::{Error, Result};
use crate::sys::{fdpass, fork, namespace as namespaces};

/// No error is longer, in bytes.
const LONGEST: usize = 4096;

// What is said on the socket: one of these, and what belongs to it.
const MAP: u8 = b'm';
const INIT: u8 = b'i';
const OPEN: u8 = b'o';
const DONE: u8 = b'd';
const FAILED: u8 = b'f';

/// The end of a socket by which the porter or init asks lmrun.
pub(super) struct Asking(OwnedFd);

impl Asking {
    fn say(&self, what: u8, rest: &[u8]) -> io::Result<()> {
        fdpass::send(self.0.as_fd(), &[&[what], rest].concat(), &[])
    }

    /// The answer's descriptor, where it has one.
    fn ask(&self, what: u8, number: i32) -> io::Result<Option<OwnedFd>> {
        self.say(what, &number.to_ne_bytes())?;
        let mut answer = [0; LONGEST];
        let (length, fds) = fdpass::receive(self.0.as_fd(), &mut answer)?;
        match answer[..length].split_first() {
            Some((&DONE, _)) => Ok(fds.into_iter().next()),
            Some((_, why)) => Err(io::Error::other(String::from_utf8_lossy(why).into_owned())),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// The source of the bind mount with this number, opened with lmrun's rights in init's mount namespace.
    pub fn open(&self, number: usize) -> io::Result<OwnedFd> {
        let number = i32::try_from(number).map_err(io::Error::other)?;
        self.ask(OPEN, number)?.ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

/// Forks `init` into the namespaces that `spec` asks for, and serves it until it has dropped what it asks by. Gives its pid.
///
/// # Errors
/// What kept the porter from its work. What goes wrong in init, init says itself.
pub(super) fn fork_init(
    users: &Users,
    spec: &Spec,
    birthplace: &Birthplace,
    mounts: Option<&Mounts>,
    init: impl FnOnce(Asking) -> i32,
) -> Result<i32> {
    // Each has a socket of its own: nobody gets another's answer.
    let (porters, porter_asks) = pair()?;
    let (inits, init_asks) = pair()?;
    let work = || {
        let forked = carry(users, spec, birthplace, &porter_asks).and_then(|new| {
            fork::child_in(new.bits() as u64 | fork::SIBLING, None, || init(init_asks))
                .map_err(|e| format!("fork: {e}"))
        });
        let said = match &forked {
            Ok(pid) => porter_asks.say(INIT, &pid.as_raw().to_ne_bytes()),
            Err(why) => porter_asks.say(FAILED, shortened(why)),
        };
        i32::from(forked.is_err() || said.is_err())
    };
    let porter = birthplace.fork(0, work);
    let porter = porter.map_err(|e| Error::Init(format!("fork: {e}")))?;
    drop(porter_asks);
    let init = serve_porter(&porters, porter.as_raw(), users);
    let _ = waitpid(porter, None);
    let init = init?;
    serve_init(&inits, init, mounts)?;
    Ok(init)
}

/// The serving end, and the asking one.
fn pair() -> Result<(OwnedFd, Asking)> {
    let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC);
    pair.map(|(ours, theirs)| (ours, Asking(theirs))).map_err(|e| Error::io("socketpair", e.into()))
}

fn shortened(why: &str) -> &[u8] {
    &why.as_bytes()[..why.len().min(LONGEST - 1)]
}

/// The next thing that is said, with the number that belongs to it; None when the other end is closed.
fn next(socket: &OwnedFd) -> Result<Option<(u8, i32)>> {
    let io = |e| Error::io("the porter's socket", e);
    let mut said = [0; LONGEST];
    let (length, _) = fdpass::receive(socket.as_fd(), &mut said).map_err(io)?;
    match said[..length].split_first() {
        None => Ok(None),
        Some((&FAILED, why)) => Err(Error::Init(String::from_utf8_lossy(why).into_owned())),
        Some((what, number)) => {
            let number = number.try_into().map_err(|_| io(io::ErrorKind::InvalidData.into()))?;
            Ok(Some((*what, i32::from_ne_bytes(number))))
        }
    }
}

fn answer(socket: &OwnedFd, answer: std::result::Result<Option<OwnedFd>, String>) -> Result<()> {
    let sent = match &answer {
        Ok(fd) => fdpass::send(socket.as_fd(), &[DONE], &fd.iter().map(AsFd::as_fd).collect::<Vec<_>>()),
        Err(why) => fdpass::send(socket.as_fd(), &[&[FAILED], shortened(why)].concat(), &[]),
    };
    sent.map_err(|e| Error::io("the porter's socket", e))
}

/// Gives init's pid.
fn serve_porter(socket: &OwnedFd, porter: i32, users: &Users) -> Result<i32> {
    loop {
        match next(socket)? {
            Some((INIT, pid)) => return Ok(pid),
            Some(_) => answer(socket, users.map(porter).map(|()| None))?,
            None => return Err(Error::Init("the process that enters the user namespace has died".into())),
        }
    }
}

fn serve_init(socket: &OwnedFd, init: i32, mounts: Option<&Mounts>) -> Result<()> {
    while let Some((_, number)) = next(socket)? {
        let index = usize::try_from(number).unwrap_or(usize::MAX);
        let mounts = mounts.ok_or_else(|| Error::io("the porter's socket", io::ErrorKind::InvalidData.into()))?;
        let opened = namespaces::in_mounts_of(init, || mounts.open(index));
        answer(socket, opened.map(Some).map_err(|e| e.to_string()))?;
    }
    Ok(())
}

/// The porter's way, up to where it forks init, with the namespaces that this still has to make.
fn carry(
    users: &Users,
    spec: &Spec,
    birthplace: &Birthplace,
    asking: &Asking,
) -> std::result::Result<CloneFlags, String> {
    birthplace.enter_version1().map_err(|e| format!("enter the cgroups: {e}"))?;
    set_limits(spec)?;
    let mut joined = Vec::new();
    for namespace in spec.linux().iter().flat_map(|linux| linux.namespaces()).flatten() {
        let later = matches!(namespace.typ(), LinuxNamespaceType::User | LinuxNamespaceType::Mount);
        if let Some(path) = namespace.path().as_ref().filter(|_| !later) {
            let file = File::open(path).map_err(|e| format!("{}: {e}", path.display()))?;
            joined.push((path, file, flag(namespace.typ())));
        }
    }
    let join = |(path, file, kind): &(&PathBuf, File, CloneFlags)| -> std::result::Result<bool, String> {
        match setns(file, *kind) {
            Ok(()) => Ok(true),
            Err(Errno::EPERM) => Ok(false),
            Err(errno) => Err(format!("join the namespace {}: {}", path.display(), words(errno))),
        }
    };
    // Some belong to users further up, some to those of the container.
    let mut left = Vec::new();
    for namespace in joined {
        if !join(&namespace)? {
            left.push(namespace);
        }
    }
    users::enter(users).map_err(|e| format!("enter the user namespace: {e}"))?;
    if matches!(users, Users::Make { .. }) {
        // The files of /proc/PID are those of the caller only while it may be looked into; nobody else is in there yet.
        let dumpable = |on| prctl::set_dumpable(on).map_err(|e| format!("set dumpable: {e}"));
        dumpable(true)?;
        asking.ask(MAP, 0).map_err(|e| e.to_string())?;
        make_clocks(spec)?;
        dumpable(false)?;
    } else {
        make_clocks(spec)?;
    }
    let errno = |what| move |e: Errno| format!("{what} in the user namespace: {}", words(e));
    setresgid(Gid::from_raw(0), Gid::from_raw(0), Gid::from_raw(0)).map_err(errno("become group 0"))?;
    match setgroups(&[]) {
        // Denied to a namespace whose mapping an unprivileged user has written.
        Err(Errno::EPERM) => {}
        set => set.map_err(errno("leave all groups"))?,
    }
    setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0)).map_err(errno("become user 0"))?;
    for namespace in &left {
        if !join(namespace)? {
            return Err(format!("join the namespace {}: {}", namespace.0.display(), words(Errno::EPERM)));
        }
    }
    let new = makes_namespace(spec, LinuxNamespaceType::Pid);
    Ok(if new { CloneFlags::CLONE_NEWPID } else { CloneFlags::empty() })
}

fn make_clocks(spec: &Spec) -> std::result::Result<(), String> {
    if !makes_namespace(spec, LinuxNamespaceType::Time) {
        return Ok(());
    }
    unshare(CLONE_NEWTIME).map_err(|e| format!("make a time namespace: {}", words(e)))?;
    write_offsets(spec).map_err(|e| super::chain(&e))
}

/// As long as the rights to raise them are there.
fn set_limits(spec: &Spec) -> std::result::Result<(), String> {
    let process = spec.process().as_ref();
    let limits = process.and_then(|process| process.rlimits().as_ref()).into_iter().flatten();
    let syscall = libcontainer::syscall::syscall::create_syscall();
    for limit in limits {
        let set = syscall.set_rlimit(limit);
        set.map_err(|e| format!("error setting rlimit {:?}: {}", limit.typ(), super::chain(&e)))?;
    }
    Ok(())
}
