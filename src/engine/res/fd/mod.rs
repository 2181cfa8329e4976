//! Kinds of open files. Each has a file here with every verb in it; the table at the end makes them known.

pub mod address;
pub mod epoll;
pub mod eventfd;
pub mod ghost;
pub mod inet;
pub mod inotify;
pub mod lock;
pub mod pipe;
pub mod regular;
pub mod signalfd;
pub mod sockopts;
pub mod tcp;
pub mod tcp_stream;
pub mod timerfd;
pub mod tty;
pub mod udp;
pub mod unix;

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;

use libc::{c_int, pid_t};

use crate::engine::collect::Depth;
use crate::engine::network::Revival;
use crate::engine::{Error, Result, Why};
use crate::image::records::files::{FdTypes, FileEntry, FownEntry, PipeDataEntry};
use crate::image::records::fsnotify::InotifyFileEntry;
use crate::image::records::lmrun::LmrunSocket;
use crate::image::records::sockets::SkPacketEntry;
use crate::image::records::tty::TtyInfoEntry;
use crate::sys::file::{self, FileStat};
use crate::sys::pidfd::PidFd;
use crate::sys::proc::{self, FdInfo};
use crate::tracee::batch::Batch;

/// What the kernel shows of one descriptor.
#[derive(Debug)]
pub struct FdFacts {
    /// Host pid of a process that has it.
    pub pid: pid_t,
    pub fd: c_int,
    pub link: Vec<u8>,
    pub info: FdInfo,
    pub stat: FileStat,
    /// Our own duplicate.
    pub dup: OwnedFd,
}

impl FdFacts {
    pub fn collect(pidfd: &PidFd, pid: pid_t, fd: c_int) -> Result<FdFacts> {
        let read = || -> std::io::Result<FdFacts> {
            let link = proc::link(pid, &format!("fd/{fd}"))?.as_bytes().to_vec();
            let dup = pidfd.get(fd)?;
            Ok(FdFacts { pid, fd, link, info: proc::fd_info(pid, fd)?, stat: file::stat(&dup)?, dup })
        };
        read().map_err(|e| Error::proc(pid, e))
    }

    /// O_* flags of the open file description alone.
    pub fn flags(&self) -> u32 {
        self.info.flags & !(libc::O_CLOEXEC as u32)
    }

    pub fn refuse<T>(&self, why: impl Into<String>, remedy: &'static str) -> Result<T> {
        let link = String::from_utf8_lossy(&self.link).into_owned();
        Err(Error::refused(self.pid, Why::File { fd: self.fd, link, why: why.into(), remedy }))
    }

    /// A line of fdinfo that this kind always has.
    pub fn line(&self, key: &str) -> Result<&str> {
        self.info.get(key).map_err(|e| Error::proc(self.pid, e))
    }

    /// As [`FdFacts::line`], as a number.
    pub fn number(&self, key: &str, radix: u32) -> Result<u64> {
        let text = self.line(key)?;
        u64::from_str_radix(text, radix).map_err(|_| Error::BadFdInfo { pid: self.pid, fd: self.fd, line: text.into() })
    }

    /// Who is sent SIGIO for it.
    pub fn owner(&self) -> Result<FownEntry> {
        let (kind, pid, signal) = file::owner(&self.dup).map_err(|e| Error::proc(self.pid, e))?;
        let inside = match pid {
            0 => 0,
            _ => proc::status(pid).and_then(|s| s.innermost("NSpid")).map_err(|e| Error::proc(pid, e))?,
        };
        Ok(FownEntry { uid: 0, euid: 0, signum: signal as u32, pid_type: kind as u32, pid: inside })
    }
}

/// What kinds share while files are collected.
#[derive(Debug)]
pub struct Collected {
    /// Mounts of the container: id and mount point.
    pub mounts: HashMap<i32, String>,
    /// The container's root directory.
    pub root: OwnedFd,
    /// Links of files that a restore gets replaced.
    pub external: Vec<Vec<u8>>,
    pub depth: Depth,
    pub files: Vec<FileEntry>,
    pub pipe_data: Vec<(PipeDataEntry, Vec<u8>)>,
    pub socket_queues: Vec<(SkPacketEntry, Vec<u8>)>,
    pub locks: lock::Seen,
    pub ghosts: ghost::Found,
    pub terminal: Option<tty::Seen>,
    pub watched: inotify::Watched,
    pub socket_extras: Vec<LmrunSocket>,
    pub(crate) pipes: BTreeMap<u32, pipe::Seen>,
    pub(crate) unix: unix::Seen,
}

impl Collected {
    /// Whether connections may be refused for being established.
    pub fn keep_established(&self) -> bool {
        self.depth != Depth::Whole { keep_established: false }
    }

    /// Whether what is on its way counts.
    pub fn is_whole(&self) -> bool {
        matches!(self.depth, Depth::Whole { .. })
    }
}

/// What kinds share while files are created.
#[derive(Debug)]
pub struct Workshop {
    /// The root directory of the container that is being built.
    pub root: OwnedFd,
    /// Files from outside, by the link that they had.
    pub external: HashMap<Vec<u8>, OwnedFd>,
    pub ghosts: ghost::Ghosts,
    pub terminals: Vec<TtyInfoEntry>,
    /// inotify instances without their watches.
    pub unarmed: Vec<(OwnedFd, InotifyFileEntry)>,
    pub pipe_data: Vec<(PipeDataEntry, Vec<u8>)>,
    pub network: Revival,
    /// Host pids of the container's processes, by their pids in it.
    pub pids: HashMap<u32, pid_t>,
    /// Nanoseconds of real time since the checkpoint.
    pub elapsed: u64,
    pub(crate) pipes: HashMap<u32, pipe::Ends>,
    pub unix: unix::Wiring,
}

/// One kind of open file.
pub trait FdKind {
    const NAME: &'static str;
    /// The type under which `files.img` has it.
    const TYPE: FdTypes;
    fn claims(f: &FdFacts) -> bool;
    /// The record of a file that is seen for the first time.
    fn dump(f: &FdFacts, id: u32, all: &mut Collected) -> Result<FileEntry>;
    /// Opens it anew, once per record.
    fn create(e: &FileEntry, shop: &mut Workshop) -> Result<OwnedFd>;
    /// Calls that a task which has it as `fd` must make itself, once all its files are in place.
    fn link(e: &FileEntry, fd: c_int, b: &mut Batch);
    /// The owner for SIGIO.
    fn owner(e: &FileEntry) -> Option<&FownEntry>;
}

/// The part of a record that its kind must have.
pub(crate) fn part<'a, T>(e: &FileEntry, kind: &'static str, part: Option<&'a T>) -> Result<&'a T> {
    part.ok_or_else(|| Error::BadRecord { what: format!("file {:#x} is a {kind} without the record of one", e.id) })
}

macro_rules! fd_kinds {
    ($($kind:ty),* $(,)?) => {
        /// The record of a file. Exactly one kind must claim it.
        pub fn dump(f: &FdFacts, id: u32, all: &mut Collected) -> Result<FileEntry> {
            let claims: Vec<&str> = [$((<$kind>::NAME, <$kind>::claims(f))),*]
                .into_iter().filter_map(|(name, claimed)| claimed.then_some(name)).collect();
            match claims[..] {
                [_] => {}
                [] => return refuse_unknown(f),
                _ => return f.refuse(format!("is claimed by {}", claims.join(" and ")), "report this as a bug of lmrun"),
            }
            $(if <$kind>::claims(f) { return <$kind>::dump(f, id, all); })*
            unreachable!("one kind claims it")
        }

        /// Opens a recorded file anew.
        pub fn create(e: &FileEntry, shop: &mut Workshop) -> Result<OwnedFd> {
            $(if e.r#type == <$kind>::TYPE as i32 { return <$kind>::create(e, shop); })*
            Err(Error::BadRecord { what: format!("file {:#x} is of type {}, which lmrun does not know", e.id, e.r#type) })
        }

        /// What a task must do itself with its new `fd`.
        pub fn link(e: &FileEntry, fd: c_int, b: &mut Batch) {
            $(if e.r#type == <$kind>::TYPE as i32 {
                <$kind>::link(e, fd, b);
                if let Some(o) = <$kind>::owner(e) { link_owner(o, fd, b) }
            })*
        }
    };
}

fn link_owner(o: &FownEntry, fd: c_int, b: &mut Batch) {
    if o.signum != 0 {
        b.call("fcntl(F_SETSIG)", libc::SYS_fcntl, [fd.into(), file::F_SETSIG.into(), o.signum.into()]);
    }
    if o.pid != 0 {
        let at = b.bytes(&[o.pid_type.to_ne_bytes(), o.pid.to_ne_bytes()].concat());
        b.call("fcntl(F_SETOWN_EX)", libc::SYS_fcntl, [fd.into(), file::F_SETOWN_EX.into(), at.into()]);
    }
}

fn refuse_unknown<T>(f: &FdFacts) -> Result<T> {
    if let Some((family, kind, protocol)) = file::socket_kind(&f.dup) {
        let what = match (family, kind) {
            (libc::AF_UNIX, _) => "unix",
            (libc::AF_NETLINK, _) => "netlink",
            (libc::AF_PACKET, _) => "packet",
            (libc::AF_INET | libc::AF_INET6, libc::SOCK_DGRAM) => "UDP",
            (libc::AF_INET | libc::AF_INET6, libc::SOCK_RAW) => "raw",
            _ => "these",
        };
        let why = format!("{what} sockets (family {family}, type {kind}, protocol {protocol}) cannot be carried yet");
        return f.refuse(why, "close it before the checkpoint, or stop and start the container instead");
    }
    // Its own kind of file since 6.9, an anonymous inode before.
    if f.link.starts_with(b"pidfd:[") || f.link == b"anon_inode:[pidfd]" {
        let why = match f.line("Pid")? {
            "-1" => "is a pidfd of a process that has ended: pidfds cannot be carried yet".into(),
            pid => format!("is a pidfd of process {pid} (as this host counts): pidfds cannot be carried yet"),
        };
        return f.refuse(why, "close it before the checkpoint, or stop and start the container instead");
    }
    f.refuse(
        "files of this kind cannot be carried",
        "close it before the checkpoint, or stop and start the container instead",
    )
}

fd_kinds! {
    regular::Regular,
    pipe::Pipe,
    eventfd::EventFd,
    epoll::Epoll,
    timerfd::TimerFd,
    inet::InetSocket,
    unix::UnixSocket,
    signalfd::SignalFd,
    tty::Tty,
    inotify::Inotify,
}

impl Workshop {
    /// Closes what was kept until all files are made.
    pub fn close(&mut self) {
        self.pipes.clear();
        self.unix.close();
        self.external.clear();
        self.ghosts.close();
    }

    /// The file that replaces one from outside the container.
    fn external(&self, link: &[u8]) -> Result<OwnedFd> {
        let name = String::from_utf8_lossy(link);
        let fd = self.external.get(link).ok_or_else(|| Error::BadRecord {
            what: format!("{name} was given to the container from outside and nothing replaces it"),
        })?;
        fd.try_clone().map_err(Error::system(name))
    }
}
