//! What the forked child does: its way into the container, up to the point where it is like any workload.

use std::collections::HashMap;
use std::convert::Infallible;
use std::env::set_current_dir;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::rc::Rc;

use caps::CapSet;
use libcontainer::workload::Executor;
use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Uid, getpid, setgroups, setresgid, setresuid, setsid};
use oci_spec::runtime::{Process, Spec, User};

use super::super::caller::send_pidfd;
use super::super::process::note_pid_outside;
use super::super::rdt::Group;
use super::super::workload::{Workload, words};
use super::super::{chain, selinux};
use super::door::Door;
use super::namespaces::Namespaces;
use super::{attributes, terminal};
use crate::sys::{cwd, fds};

/// Everything that the child needs, prepared before the fork.
pub(super) struct Entry<'a> {
    pub spec: &'a Spec,
    pub door: &'a Door,
    pub resctrl: Option<&'a Group>,
    pub namespaces: &'a Namespaces,
    pub workload: Workload,
    /// Where the master of the process's terminal goes; None: no terminal.
    pub console: Option<UnixStream>,
    pub pidfd_socket: Option<UnixStream>,
    /// Where the parent reads why it failed; closed by a successful execve.
    pub report: Rc<File>,
    pub preserve_fds: u32,
}

impl Entry<'_> {
    /// The child's whole life in lmrun.
    pub fn go(&self) -> i32 {
        let Err(why) = self.enter();
        let _ = (&*self.report).write_all(why.as_bytes());
        255
    }

    fn enter(&self) -> Result<Infallible, String> {
        let process = self.spec.process().as_ref().ok_or("there is no process")?;
        note_pid_outside();
        self.door.enter_version1().map_err(|e| format!("join the container's cgroup: {e}"))?;
        if let Some(group) = self.resctrl {
            group.add(0).map_err(|e| chain(&e))?;
        }
        setsid().map_err(|e| format!("setsid: {}", words(e)))?;
        attributes::set(self.spec, process)?;
        let label = Label::prepare(self.spec, process)?;
        self.close_others(label.as_ref())?;

        self.namespaces.enter_all().map_err(|e| format!("join the container's namespaces: {}", words(e)))?;
        if let Some(socket) = &self.console {
            terminal::open(process, socket).map_err(|e| format!("make a terminal: {e}"))?;
        }
        // A directory may be root's to enter, or only the user's.
        let early = set_current_dir(process.cwd());
        become_user(process.user())?;
        if early.is_err() {
            set_current_dir(process.cwd()).map_err(|e| chdir_failed(process.cwd(), &e))?;
        }
        // What the kernel still names from outside is a way out (CVE-2024-21626).
        if !cwd::is_below_root() {
            return Err(
                "current working directory is outside of container mount namespace root -- possible container \
                        breakout detected"
                    .into(),
            );
        }
        if let Some(label) = label {
            label.set()?;
        }
        if let Some(socket) = &self.pidfd_socket {
            send_pidfd(socket, getpid().as_raw(), "setns").map_err(|e| format!("send a pidfd: {e}"))?;
        }
        self.workload.setup_envs(HashMap::new()).map_err(|e| e.to_string())?;
        self.workload.find_program()?;
        self.workload.exec(self.spec).map_err(|e| e.to_string())?;
        Err("exec came back".into())
    }

    /// Nothing that was open in lmrun, or where lmrun was called, comes along.
    fn close_others(&self, label: Option<&Label>) -> Result<(), String> {
        let own = [Some(self.report.as_fd()), self.console.as_ref().map(AsFd::as_fd)];
        let own = own.into_iter().chain([
            self.pidfd_socket.as_ref().map(AsFd::as_fd),
            label.map(|l| l.file.as_fd()),
            self.workload.agent(),
        ]);
        let kept: Vec<BorrowedFd<'_>> = own.flatten().chain(self.namespaces.descriptors()).collect();
        fds::close_from_except(3 + self.preserve_fds, &kept).map_err(|e| format!("close descriptors: {}", words(e)))
    }
}

/// An AppArmor profile or SELinux label for the program to be executed.
struct Label {
    text: String,
    /// The host's /proc/self/attr: the container's may be anything (CVE-2025-52881).
    file: File,
}

impl Label {
    /// None where nothing is asked for.
    fn prepare(spec: &Spec, process: &Process) -> Result<Option<Label>, String> {
        let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        let (file, text) = if let Some(profile) = given(process.apparmor_profile()) {
            let own = "/proc/self/attr/apparmor/exec";
            (if Path::new(own).exists() { own } else { "/proc/self/attr/exec" }, format!("exec {profile}"))
        } else if let Some(label) = selinux::process_label(spec).map_err(|e| e.to_string())? {
            ("/proc/self/attr/exec", label)
        } else {
            return Ok(None);
        };
        let file = File::options().write(true).open(file).map_err(|e| format!("{file}: {e}"))?;
        Ok(Some(Label { text, file }))
    }

    fn set(mut self) -> Result<(), String> {
        self.file.write_all(self.text.as_bytes()).map_err(|e| format!("apply the label {:?}: {e}", self.text))
    }
}

/// Takes the ids and keeps the capabilities, all of them in effect: [`Workload`] drops what is too much.
fn become_user(user: &User) -> Result<(), String> {
    let failed = |what: &str| {
        let what = what.to_owned();
        move |e: Errno| format!("{what}: {}", words(e))
    };
    prctl::set_keepcaps(true).map_err(failed("keep capabilities"))?;
    let groups: Vec<Gid> = user.additional_gids().iter().flatten().map(|gid| Gid::from_raw(*gid)).collect();
    match setgroups(&groups) {
        // A user namespace without the right to it: user_namespaces(7), /proc/PID/setgroups.
        Err(Errno::EPERM) if groups.is_empty() => {}
        set => set.map_err(failed("setgroups"))?,
    }
    let (uid, gid) = (Uid::from_raw(user.uid()), Gid::from_raw(user.gid()));
    setresgid(gid, gid, gid).map_err(failed(&format!("setgid {gid}")))?;
    setresuid(uid, uid, uid).map_err(failed(&format!("setuid {uid}")))?;
    prctl::set_keepcaps(false).map_err(failed("keep capabilities"))?;
    caps::read(None, CapSet::Permitted)
        .and_then(|all| caps::set(None, CapSet::Effective, &all))
        .map_err(|e| format!("capabilities: {e}"))?;
    umask(Mode::from_bits_truncate(user.umask().unwrap_or(0o022)));
    Ok(())
}

fn chdir_failed(cwd: &Path, error: &io::Error) -> String {
    let why = error.raw_os_error().map_or(error.to_string(), |errno| words(Errno::from_raw(errno)));
    format!("chdir to cwd ({:?}) set in config.json failed: {why}", cwd.display().to_string())
}
