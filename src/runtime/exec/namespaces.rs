//! The namespaces of a container's init that are not lmrun's own.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

use nix::errno::Errno;
use nix::libc;
use nix::sched::{CloneFlags, setns};
use nix::unistd::{chroot, fchdir};

use super::super::process::Process;
use super::super::{Error, Result};
use crate::sys::pidfd::PidFd;

/// include/uapi/linux/sched.h
const CLONE_NEWTIME: CloneFlags = CloneFlags::from_bits_retain(libc::CLONE_NEWTIME);

/// By their names in /proc/PID/ns.
const KINDS: [(&str, CloneFlags); 8] = [
    ("cgroup", CloneFlags::CLONE_NEWCGROUP),
    ("ipc", CloneFlags::CLONE_NEWIPC),
    ("mnt", CloneFlags::CLONE_NEWNS),
    ("net", CloneFlags::CLONE_NEWNET),
    ("pid", CloneFlags::CLONE_NEWPID),
    ("time", CLONE_NEWTIME),
    ("user", CloneFlags::CLONE_NEWUSER),
    ("uts", CloneFlags::CLONE_NEWUTS),
];

/// The way into the namespaces of one process.
pub(super) struct Namespaces {
    init: PidFd,
    foreign: CloneFlags,
    /// Init's root directory, where a mount namespace that is ours too does not lead there.
    root: Option<OwnedFd>,
}

impl Namespaces {
    pub fn of(init: Process) -> Result<Self> {
        let signal = |source| Error::Signal { pid: init.pid, source };
        let pidfd = PidFd::open(init.pid).map_err(signal)?;
        let mut foreign = CloneFlags::empty();
        for (name, flag) in KINDS {
            let id = |of: &str| fs::metadata(format!("/proc/{of}/ns/{name}")).map(|file| (file.dev(), file.ino()));
            match (id("self"), id(&init.pid.to_string())) {
                (Ok(own), Ok(inits)) => foreign.set(flag, own != inits),
                // A kind that this kernel does not have.
                (Err(e), _) if e.kind() == io::ErrorKind::NotFound => {}
                (Err(e), _) | (_, Err(e)) => return Err(Error::io(format!("/proc/{}/ns/{name}", init.pid), e)),
            }
        }
        let root = if foreign.contains(CloneFlags::CLONE_NEWNS) {
            None
        } else {
            let path = format!("/proc/{}/root", init.pid);
            let open = File::options().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(&path);
            Some(open.map_err(|e| Error::io(path, e))?.into())
        };
        // All of this was about the process that the pidfd holds.
        if !init.is_alive() {
            return Err(Error::NotRunning);
        }
        Ok(Namespaces { init: pidfd, foreign, root })
    }

    /// Has the children of the calling process begin their lives in the pid namespace. Who has no right to that owns
    /// the user namespace, and enters it for it.
    pub fn enter_for_children(&self) -> Result<()> {
        match self.enter(CloneFlags::CLONE_NEWPID) {
            Err(Errno::EPERM) if self.foreign.contains(CloneFlags::CLONE_NEWUSER) => {
                self.enter(CloneFlags::CLONE_NEWUSER).and_then(|()| self.enter(CloneFlags::CLONE_NEWPID))
            }
            entered => entered,
        }
        .map_err(|errno| Error::Init(format!("join the pid namespace: {}", errno.desc())))
    }

    /// Takes the calling process into all other namespaces, and to the container's root directory. The user
    /// namespace comes last: others may belong to one further up.
    pub fn enter_all(&self) -> nix::Result<()> {
        let user = CloneFlags::CLONE_NEWUSER;
        self.enter(self.foreign.difference(user | CloneFlags::CLONE_NEWPID))?;
        match self.enter(user) {
            // The parent was there before us.
            Err(Errno::EINVAL) => {}
            entered => entered?,
        }
        if let Some(root) = &self.root {
            fchdir(root)?;
            chroot(".")?;
        }
        Ok(())
    }

    pub fn descriptors(&self) -> impl Iterator<Item = std::os::fd::BorrowedFd<'_>> {
        std::iter::once(self.init.as_fd()).chain(self.root.as_ref().map(AsFd::as_fd))
    }

    /// Those of `kinds` that are not our own. setns(2) with a pidfd, since Linux 5.8.
    fn enter(&self, kinds: CloneFlags) -> nix::Result<()> {
        let kinds = kinds.intersection(self.foreign);
        if kinds.is_empty() { Ok(()) } else { setns(&self.init, kinds) }
    }
}
