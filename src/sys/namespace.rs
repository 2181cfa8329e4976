//! What can only be seen from inside a namespace (namespaces(7)): read by a thread that enters it for that.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use libc::pid_t;
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{Gid, Uid, setresgid, setresuid};

use super::fork;
use super::pidfd::PidFd;

/// Runs `work` in a thread of its own inside `pid`'s namespace `name` (as in `/proc/PID/ns`).
fn inside<T: Send>(
    pid: pid_t,
    name: &str,
    kind: CloneFlags,
    work: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    let ns = File::open(format!("/proc/{pid}/ns/{name}"))?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            if kind == CloneFlags::CLONE_NEWNS {
                // setns(2): root and working directory would change for all who share them.
                unshare(CloneFlags::CLONE_FS)?;
            }
            setns(ns.as_fd(), kind)?;
            work()
        });
        thread.join().map_err(|_| io::Error::other("the thread in the namespace panicked"))?
    })
}

/// Runs `work` with the mounts that a task sees; `/` is the root of its mount namespace.
pub fn in_mounts_of<T: Send>(pid: pid_t, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    inside(pid, "mnt", CloneFlags::CLONE_NEWNS, work)
}

/// Takes the calling process, which has one thread, to the mounts that a task sees, and where that has another user
/// namespace makes it root there. setns(2) with a pidfd, since Linux 5.8.
pub fn enter_as_root(pid: pid_t) -> io::Result<()> {
    let task = PidFd::open(pid)?;
    let id = |of: &str| fs::metadata(format!("/proc/{of}/ns/user")).map(|file| (file.dev(), file.ino()));
    if id("self")? == id(&pid.to_string())? {
        return Ok(setns(&task, CloneFlags::CLONE_NEWNS)?);
    }
    setns(&task, CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS)?;
    let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
    setresgid(gid, gid, gid)?;
    Ok(setresuid(uid, uid, uid)?)
}

/// A user namespace with these mappings, as in `/proc/PID/uid_map` and `gid_map`; nobody is in it.
pub fn mapped_users(uids: &str, gids: &str) -> io::Result<OwnedFd> {
    let pid = fork::child_in(CloneFlags::CLONE_NEWUSER.bits() as u64, None, || {
        nix::unistd::pause();
        0
    })?;
    let namespace = (|| {
        fs::write(format!("/proc/{pid}/uid_map"), uids)?;
        fs::write(format!("/proc/{pid}/gid_map"), gids)?;
        File::open(format!("/proc/{pid}/ns/user"))
    })();
    nix::sys::signal::kill(pid, nix::sys::signal::SIGKILL)?;
    nix::sys::wait::waitpid(pid, None)?;
    namespace.map(OwnedFd::from)
}

/// Node and domain name of a task's UTS namespace.
pub fn uts_names(pid: pid_t) -> io::Result<(String, String)> {
    inside(pid, "uts", CloneFlags::CLONE_NEWUTS, || {
        let u = nix::sys::utsname::uname()?;
        let text = |s: &std::ffi::OsStr| s.to_string_lossy().into_owned();
        Ok((text(u.nodename()), text(u.domainname())))
    })
}

/// Runs `work` in a task's IPC namespace.
pub fn in_ipc_of<T: Send>(pid: pid_t, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    inside(pid, "ipc", CloneFlags::CLONE_NEWIPC, work)
}

/// The semaphores and message queues (sysvipc(7)) of a task's IPC namespace, as lines of `/proc/sysvipc`.
pub fn ipc_objects(pid: pid_t) -> io::Result<Vec<String>> {
    in_ipc_of(pid, || {
        let mut all = Vec::new();
        for kind in ["sem", "msg"] {
            // Bound to the opener's namespace.
            match std::fs::read_to_string(format!("/proc/sysvipc/{kind}")) {
                Ok(text) => all.extend(text.lines().skip(1).map(|l| format!("{kind} {}", l.trim()))),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(e),
            }
        }
        Ok(all)
    })
}
