//! The birth of a container's init: one clone3(2), and no waiting for cgroups.
//!
//! libcontainer by itself forks twice and looks up and moves each process in every hierarchy anew; what init does from its
//! root's mounts on is libcontainer's. With a user namespace there is one process between: [`porter`].

use std::convert::Infallible;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::rc::Rc;

use caps::Capability;
use libcontainer::container::State;
use libcontainer::hooks::run_hooks;
use libcontainer::process::args::ContainerArgs;
use libcontainer::process::channel::{self, ChannelError, InitReceiver, MainSender};
use libcontainer::process::container_main_process::ProcessError;
use libcontainer::process::init::container_init_process;
use nix::errno::Errno;
use nix::libc;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl;
use nix::unistd::{chdir, fchdir, pivot_root, setgroups};
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};

use super::bundle::namespace;
use super::cgroup::{Birthplace, Cgroup};
use super::create::why;
use super::mounts::Mounts;
use super::porter::{self, Asking};
use super::process::note_pid_outside;
use super::systemd::Unit;
use super::users::{self, Users};
use super::{Error, Result, chain};
use crate::sys::{mount as kernel, netns};

pub(super) const CLONE_NEWTIME: CloneFlags = CloneFlags::from_bits_retain(libc::CLONE_NEWTIME);

/// What is to be done as soon as init is in its namespaces, whose pid it gets.
pub(super) type Born<'a> = &'a dyn Fn(i32) -> Result<()>;

/// Forks init, into its cgroup and namespaces, and runs the hooks of create; `born` comes before them, and gets init's pid.
/// Init waits for `start` when this returns.
///
/// # Errors
/// What went wrong, in init or outside. Init may live on then, in the container's cgroup.
pub(super) fn give_birth(
    mut args: ContainerArgs,
    mounts: Option<Mounts>,
    cgroup: &Cgroup,
    unit: Option<&Unit>,
    rootless: bool,
    born: Born<'_>,
) -> Result<i32> {
    let resources = args.spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let birthplace = cgroup.make(resources, unit, rootless)?;
    let users = Users::of(&args.spec)?;
    // Without the right to enter init's mount namespace, which only init has then.
    let opens = users.is_some() && users::may(Capability::CAP_SYS_ADMIN);
    let (spec, namespaces) = without_namespaces(&args.spec, mounts.is_some(), users.is_some());
    let whole = std::mem::replace(&mut args.spec, Rc::new(spec));

    let (mut to_main, mut from_init) = channel::main_channel().map_err(channel_error)?;
    let (mut to_init, mut from_main) = channel::init_channel().map_err(channel_error)?;
    let mut init = |asking: Option<Asking>| {
        let birthplace = users.is_none().then_some(&birthplace);
        let asking_main = asking.as_ref().filter(|_| opens);
        let born = be_born(&mut args, birthplace, &namespaces, mounts.as_ref(), asking_main);
        drop(asking);
        let Err(why) = born.and_then(|()| become_init(&args, &mut to_main, &mut from_main));
        let _ = to_main.exec_failed(why);
        255
    };
    let pid = match &users {
        Some(users) => porter::fork_init(users, &whole, &birthplace, mounts.as_ref(), |asking| init(Some(asking)))?,
        None => {
            let outside = Outside::leave(&whole)?;
            let pid = birthplace.fork(outside.namespaces, || init(None));
            pid.map_err(|e| Error::Init(format!("fork: {e}")))?.as_raw()
        }
    };
    for closed in [to_main.close(), from_main.close()] {
        closed.map_err(channel_error)?;
    }
    if let Some(hooks) = args.spec.hooks() {
        from_init.wait_for_hook_request().map_err(channel_error)?;
        born(pid)?;
        let state = args.container.as_ref().map(|container| State { pid: Some(pid), ..container.state.clone() });
        for list in [hooks.prestart(), hooks.create_runtime()] {
            run_hooks(list.as_ref(), state.as_ref(), None, None, None).map_err(|e| Error::Hook(chain(&e)))?;
        }
        to_init.hook_done().map_err(channel_error)?;
    }
    from_init.wait_for_init_ready().map_err(channel_error)?;
    if args.spec.hooks().is_none() {
        born(pid)?;
    }
    for closed in [to_init.close(), from_init.close()] {
        closed.map_err(channel_error)?;
    }
    Ok(pid)
}

fn channel_error(error: ChannelError) -> Error {
    why(&ProcessError::Channel(error))
}

/// Init's side, up to where libcontainer takes over. `cgroup`: what is still to be entered; `asking`: who opens what is to be
/// bound, if not init itself.
fn be_born(
    args: &mut ContainerArgs,
    cgroup: Option<&Birthplace>,
    namespaces: &[LinuxNamespace],
    mounts: Option<&Mounts>,
    asking: Option<&Asking>,
) -> std::result::Result<(), String> {
    let _ = prctl::set_name(c"lmrun:init");
    note_pid_outside();
    // The hooks of create that run in here get the pid that they see.
    if let Some(container) = &mut args.container {
        container.state.pid = Some(std::process::id().cast_signed());
    }
    match setgroups(&[]) {
        Err(Errno::EPERM) => {} // without the right to it, which then the program has not either
        left => left.map_err(|e| format!("leave all groups: {e}"))?,
    }
    if let Some(cgroup) = cgroup {
        cgroup.enter_version1().map_err(|e| format!("enter the cgroups: {e}"))?;
    }
    namespaces.iter().try_for_each(enter)?;
    if let Some(mounts) = mounts {
        unshare(CloneFlags::CLONE_NEWNS).map_err(|e| format!("make a mount namespace: {e}"))?;
        take_root().map_err(|e| format!("leave the root directory that lmrun was called in: {e}"))?;
        match asking {
            None => mounts.make(&|number| mounts.open(number))?,
            Some(asking) => mounts.make(&|number| asking.open(number))?,
        }
    }
    Ok(())
}

/// Where lmrun was called in a chroot(2), that becomes the root of its new mount namespace: libcontainer joins this anew, which
/// leads back to its root (setns(2)), and pivot_root(2) wants a mount point there.
fn take_root() -> io::Result<()> {
    let directory = || File::options().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open("/");
    let here = directory()?;
    setns(File::open("/proc/self/ns/mnt")?, CloneFlags::CLONE_NEWNS)?;
    let [wanted, top] = [here.metadata()?, directory()?.metadata()?].map(|meta| (meta.dev(), meta.ino()));
    if wanted == top {
        return Ok(());
    }
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_SLAVE, None::<&str>)?;
    let root = kernel::copy(&here, true)?;
    kernel::put(&root, &here)?;
    fchdir(root)?;
    pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    chdir("/")?;
    Ok(())
}

/// Makes or joins one of [`TAKEN`].
fn enter(namespace: &LinuxNamespace) -> std::result::Result<(), String> {
    let kind = flag(namespace.typ());
    let entered = match namespace.path() {
        Some(path) => File::open(path).and_then(|file| setns(file, kind).map_err(io::Error::from)),
        None => unshare(kind).map_err(io::Error::from),
    };
    entered.map_err(|e| format!("enter the {:?} namespace: {e}", namespace.typ()))?;
    if namespace.path().is_none() && kind == CloneFlags::CLONE_NEWNET {
        return netns::raise_own_loopback().map_err(|e| format!("raise the loopback interface: {e}"));
    }
    Ok(())
}

/// CLONE_NEW* of a kind.
pub(super) fn flag(kind: LinuxNamespaceType) -> CloneFlags {
    match kind {
        LinuxNamespaceType::Mount => CloneFlags::CLONE_NEWNS,
        LinuxNamespaceType::Cgroup => CloneFlags::CLONE_NEWCGROUP,
        LinuxNamespaceType::Uts => CloneFlags::CLONE_NEWUTS,
        LinuxNamespaceType::Ipc => CloneFlags::CLONE_NEWIPC,
        LinuxNamespaceType::User => CloneFlags::CLONE_NEWUSER,
        LinuxNamespaceType::Pid => CloneFlags::CLONE_NEWPID,
        LinuxNamespaceType::Network => CloneFlags::CLONE_NEWNET,
        LinuxNamespaceType::Time => CLONE_NEWTIME,
    }
}

/// Comes back only when something went wrong.
fn become_init(
    args: &ContainerArgs,
    to_main: &mut MainSender,
    from_main: &mut InitReceiver,
) -> std::result::Result<Infallible, String> {
    let syscall = args.syscall.create_syscall();
    let process = args.spec.process().as_ref();
    for limit in process.and_then(|process| process.rlimits().as_ref()).into_iter().flatten() {
        syscall.set_rlimit(limit).map_err(|e| format!("error setting rlimit {:?}: {}", limit.typ(), chain(&e)))?;
    }
    match container_init_process(args, to_main, from_main) {
        Ok(()) => Err("init came back".into()),
        Err(error) => Err(chain(&error)),
    }
}

/// The caller, prepared to fork a child with other pid and time namespaces. Dropped, its next child is its own again.
struct Outside {
    /// CLONE_NEW* that are left for the fork.
    namespaces: u64,
    entered: Vec<(&'static str, CloneFlags)>,
}

impl Outside {
    fn leave(spec: &Spec) -> Result<Self> {
        let errno = |what: &str| {
            let what = what.to_owned();
            move |e: nix::Error| Error::Init(format!("{what}: {e}"))
        };
        let mut outside = Outside { namespaces: 0, entered: Vec::new() };
        if let Some(pid) = namespace(spec, LinuxNamespaceType::Pid) {
            match pid.path() {
                None => outside.namespaces |= CloneFlags::CLONE_NEWPID.bits() as u64,
                Some(path) => {
                    let file = File::open(path).map_err(|e| Error::io(path, e))?;
                    setns(file, CloneFlags::CLONE_NEWPID).map_err(errno("join a pid namespace"))?;
                    outside.entered.push(("/proc/self/ns/pid", CloneFlags::CLONE_NEWPID));
                }
            }
        }
        if let Some(time) = namespace(spec, LinuxNamespaceType::Time) {
            match time.path() {
                None => {
                    unshare(CLONE_NEWTIME).map_err(errno("make a time namespace"))?;
                    write_offsets(spec)?;
                }
                Some(path) => {
                    let file = File::open(path).map_err(|e| Error::io(path, e))?;
                    setns(file, CLONE_NEWTIME).map_err(errno("join a time namespace"))?;
                }
            }
            outside.entered.push(("/proc/self/ns/time", CLONE_NEWTIME));
        }
        Ok(outside)
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        for (path, kind) in &self.entered {
            let back = File::open(path).and_then(|own| setns(own, *kind).map_err(io::Error::from));
            if let Err(error) = back {
                tracing::warn!(path, %error, "cannot return to a namespace of one's own");
            }
        }
    }
}

/// time_namespaces(7): taken only before the namespace has its first process.
pub(super) fn write_offsets(spec: &Spec) -> Result<()> {
    let offsets = spec.linux().as_ref().and_then(|linux| linux.time_offsets().as_ref());
    let lines = offsets
        .into_iter()
        .flatten()
        .map(|(clock, offset)| format!("{clock} {} {}\n", offset.secs().unwrap_or(0), offset.nanosecs().unwrap_or(0)));
    let text: String = lines.collect();
    let path = "/proc/self/timens_offsets";
    if text.is_empty() { Ok(()) } else { fs::write(path, text).map_err(|e| Error::io(path, e)) }
}

/// What init enters before mounts are made: they show it.
const TAKEN: [LinuxNamespaceType; 3] =
    [LinuxNamespaceType::Network, LinuxNamespaceType::Ipc, LinuxNamespaceType::Cgroup];

/// The spec for an init that is in these namespaces already, and their entries. A mount namespace that it is in stays,
/// as one to join: libcontainer changes the root only where there is one, and another new one would take a copy. What is
/// joined is the [`porter`]'s affair where there is one.
fn without_namespaces(spec: &Spec, in_mounts: bool, porter: bool) -> (Spec, Vec<LinuxNamespace>) {
    let mut spec = spec.clone();
    let mut taken = Vec::new();
    if let Some(namespaces) = spec.linux_mut().as_mut().and_then(|linux| linux.namespaces_mut().as_mut()) {
        for mount in namespaces.iter_mut().filter(|ns| in_mounts && ns.typ() == LinuxNamespaceType::Mount) {
            mount.set_path(Some("/proc/self/ns/mnt".into()));
        }
        namespaces.retain(|namespace| {
            let joined = porter && namespace.path().is_some();
            let take = TAKEN.contains(&namespace.typ());
            taken.extend((take && !joined).then(|| namespace.clone()));
            !(take || joined && namespace.typ() == LinuxNamespaceType::Uts)
        });
    }
    (spec, taken)
}
