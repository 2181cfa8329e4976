//! What can go wrong, and what a container has that lmrun cannot carry.

use std::fmt;
use std::io;
use std::path::PathBuf;

use libc::{c_int, pid_t};

use super::res::fd::{sockopts, tcp};
use super::{guard, netlock};
use crate::{image, tracee};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("task {pid}: {why}{}", Hint(.why))]
    Refused { pid: pid_t, why: Why },
    #[error("task {pid}: /proc")]
    Proc { pid: pid_t, source: io::Error },
    #[error("{what}")]
    System { what: String, source: io::Error },
    #[error(transparent)]
    Tracee(#[from] tracee::Error),
    #[error(transparent)]
    Image(#[from] image::Error),
    #[error("socket {id:#x}")]
    Socket { id: u32, source: tcp::Error },
    #[error("socket {id:#x}")]
    SocketOption { id: u32, source: sockopts::Error },
    #[error(transparent)]
    Guard(#[from] guard::Error),
    #[error(transparent)]
    NetLock(#[from] netlock::Error),
    #[error("task {pid}: fdinfo of descriptor {fd} has an unexpected line {line:?}")]
    BadFdInfo { pid: pid_t, fd: c_int, line: String },
    #[error("the checkpoint cannot be restored: {what}")]
    BadRecord { what: String },
    /// The image contradicts itself or asks for what this lmrun does not know.
    #[error("image {path}: {what}")]
    BadImage { path: PathBuf, what: String },
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn proc(pid: pid_t, source: io::Error) -> Error {
        Error::Proc { pid, source }
    }

    pub(crate) fn refused(pid: pid_t, why: Why) -> Error {
        Error::Refused { pid, why }
    }

    pub(crate) fn system(what: impl fmt::Display) -> impl FnOnce(io::Error) -> Error {
        let what = what.to_string();
        move |source| Error::System { what, source }
    }
}

/// A fact that a checkpoint cannot carry.
#[derive(Debug)]
pub enum Why {
    LeaderGone,
    CannotSeize { tid: pid_t, source: io::Error },
    DoesNotStop { state: char },
    OutsideTree,
    OtherNamespace { kind: &'static str },
    SharedWithProcess { what: &'static str, other: pid_t },
    SharedNotWithLeader { what: &'static str, tid: pid_t },
    Compat,
    StrictSeccomp,
    File { fd: c_int, link: String, why: String, remedy: &'static str },
    Mapping { start: u64, end: u64, name: String, why: String, remedy: &'static str },
    Other { why: String, remedy: &'static str },
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Why::LeaderGone => f.write_str("its main thread has ended while others go on"),
            Why::CannotSeize { tid, source } => write!(f, "cannot attach to thread {tid}: {source}"),
            Why::DoesNotStop { state } => write!(f, "does not stop (state {state})"),
            Why::OutsideTree => f.write_str("is in the container's cgroup but not in its pid namespace"),
            Why::OtherNamespace { kind } => write!(f, "is in another {kind} namespace than the container's init"),
            Why::SharedWithProcess { what, other } => write!(f, "shares its {what} with process {other}"),
            Why::SharedNotWithLeader { what, tid } => write!(f, "its thread {tid} has its own {what}"),
            Why::Compat => f.write_str("runs 32-bit code"),
            Why::StrictSeccomp => f.write_str("is in seccomp's strict mode"),
            Why::File { fd, link, why, .. } => write!(f, "fd {fd} -> {link}: {why}"),
            Why::Mapping { start, end, name, why, .. } => write!(f, "mapping {start:x}-{end:x} {name}: {why}"),
            Why::Other { why, .. } => f.write_str(why),
        }
    }
}

impl Why {
    /// What the user can do.
    pub fn remedy(&self) -> &'static str {
        match self {
            Why::LeaderGone | Why::Compat | Why::StrictSeccomp => "stop the container instead",
            Why::CannotSeize { .. } => {
                "needs root with CAP_SYS_PTRACE and CAP_SYS_ADMIN, and no other tracer (gdb, strace) on the task"
            }
            Why::DoesNotStop { .. } => "try again; a task in state D waits for a device or for a child made by vfork",
            Why::OutsideTree => "end it, or move it to another cgroup, first",
            Why::OtherNamespace { .. } => "end that process first; nested containers cannot be carried",
            Why::SharedWithProcess { .. } | Why::SharedNotWithLeader { .. } => "end that process first",
            Why::File { remedy, .. } | Why::Mapping { remedy, .. } | Why::Other { remedy, .. } => remedy,
        }
    }
}

struct Hint<'a>(&'a Why);

impl fmt::Display for Hint<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "; hint: {}", self.0.remedy())
    }
}
