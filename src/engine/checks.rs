//! What a container may not have, found before anything is written.

use std::collections::{BTreeSet, HashMap};

use libc::pid_t;

use super::freeze::Frozen;
use super::{Error, Result, Subject, Why};
use crate::sys::pidfd::{self, Shared};
use crate::sys::{namespace, proc};

/// All tasks are in the namespaces of init.
pub fn namespaces(frozen: &Frozen) -> Result<()> {
    const KINDS: [&str; 8] = ["pid", "mnt", "net", "ipc", "uts", "user", "cgroup", "time"];
    let link = |pid, kind| match proc::link(pid, &format!("ns/{kind}")) {
        Ok(l) => Ok(Some(l)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::proc(pid, e)),
    };
    let init = frozen.tasks[0].pid;
    for kind in KINDS {
        let own = link(init, kind)?;
        for task in frozen.tasks.iter().skip(1).filter(|t| !t.is_zombie()) {
            for tid in task.threads.iter().map(|t| t.tid) {
                if link(tid, kind)? != own {
                    return Err(Error::refused(tid, Why::OtherNamespace { kind }));
                }
            }
        }
    }
    let ours = std::process::id() as pid_t;
    if link(init, "user")? != link(ours, "user")? {
        let why = "is in a user namespace of its own: its ids cannot be carried yet".into();
        return Err(Error::refused(init, Why::Other { why, remedy: "stop and start the container instead" }));
    }
    if link(init, "pid")? == link(ours, "pid")? {
        let why = "has the host's pid namespace: its pids could not be kept".into();
        let remedy = "give the container a pid namespace of its own";
        return Err(Error::refused(init, Why::Other { why, remedy }));
    }
    Ok(())
}

/// Threads share memory, files and directories with their leader, and processes with nobody.
pub fn sharing(frozen: &Frozen) -> Result<()> {
    const KINDS: [(Shared, &str); 3] =
        [(Shared::Vm, "memory"), (Shared::Files, "table of files"), (Shared::Fs, "directories")];
    let same = |a, b, what| pidfd::same(a, b, what).map_err(|e| Error::proc(a, e));
    let alive: Vec<_> = frozen.tasks.iter().filter(|t| !t.is_zombie()).collect();
    for (index, task) in alive.iter().enumerate() {
        for thread in task.threads.iter().skip(1) {
            for (kind, what) in KINDS.iter().skip(1) {
                if !same(task.pid, thread.tid, *kind)? {
                    return Err(Error::refused(task.pid, Why::SharedNotWithLeader { what, tid: thread.tid }));
                }
            }
        }
        // Sharing goes by clone(2), from parent to child or between siblings.
        for other in alive[..index].iter().filter(|o| Some(o.pid) == task.parent || o.parent == task.parent) {
            for (kind, what) in KINDS {
                if same(task.pid, other.pid, kind)? {
                    return Err(Error::refused(task.pid, Why::SharedWithProcess { what, other: other.pid }));
                }
            }
        }
    }
    Ok(())
}

/// Nobody is in the container's cgroup who is neither in its tree nor a visitor.
pub fn strangers(frozen: &Frozen) -> Result<()> {
    let init = frozen.tasks[0].pid;
    let known: BTreeSet<pid_t> = frozen.tasks.iter().chain(&frozen.visitors).map(|t| t.pid).collect();
    for pid in proc::cgroup_members(init).map_err(|e| Error::proc(init, e))? {
        // A zombie is nobody.
        if !known.contains(&pid) && proc::stat(pid).is_ok_and(|s| !matches!(s.state, 'Z' | 'X')) {
            return Err(Error::refused(pid, Why::OutsideTree));
        }
    }
    Ok(())
}

/// Nothing is mounted in the container that it was not made with, but what came to it from the host. `own`: its mounts of
/// file systems that the host has not mounted.
pub fn mounts(subject: &Subject, own: &[proc::Mount]) -> Result<()> {
    let known = |m: &proc::Mount| subject.mounts.is_empty() || subject.mounts.contains(&m.point);
    match own.iter().find(|m| !known(m)) {
        None => Ok(()),
        Some(m) => {
            let why = format!("has mounted {} at {} itself, which cannot be carried yet", m.fs_type, m.point);
            Err(Error::refused(
                subject.init,
                Why::Other { why, remedy: "unmount it, or put it into the container's configuration" },
            ))
        }
    }
}

/// No System V semaphore or message queue would be lost. Those of the host's namespace stay where they are.
/// False: the container is in that.
pub fn ipc(init: pid_t) -> Result<bool> {
    let own = |pid| proc::link(pid, "ns/ipc").map_err(|e| Error::proc(pid, e));
    if own(init)? == own(std::process::id() as pid_t)? {
        return Ok(false);
    }
    match namespace::ipc_objects(init).map_err(|e| Error::proc(init, e))?.first() {
        None => Ok(true),
        Some(object) => {
            let why = format!("its IPC namespace holds a System V object ({object}), which cannot be carried yet");
            Err(Error::refused(
                init,
                Why::Other { why, remedy: "remove it with ipcrm, or stop and start the container instead" },
            ))
        }
    }
}

/// Pids inside the container, by host pid.
pub fn pids(frozen: &Frozen) -> Result<HashMap<pid_t, u32>> {
    let inside = |pid| proc::status(pid).and_then(|s| s.innermost("NSpid")).map_err(|e| Error::proc(pid, e));
    frozen.tasks.iter().map(|t| Ok((t.pid, inside(t.pid)?))).collect()
}
