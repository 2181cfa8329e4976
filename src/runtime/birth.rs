//! The birth of a container's init: one clone3(2), and one move through the cgroups.
//!
//! libcontainer by itself forks twice and looks up and moves each process in every hierarchy anew. It does so still for a
//! container with a user namespace or with network devices, which take a process between; what init does from
//! there on is libcontainer's in either case.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;

use libcontainer::container::State;
use libcontainer::hooks::run_hooks;
use libcontainer::process::args::ContainerArgs;
use libcontainer::process::channel::{self, ChannelError, InitReceiver, MainSender};
use libcontainer::process::container_main_process::ProcessError;
use libcontainer::process::init::container_init_process;
use nix::libc;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl;
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use super::bundle::{makes_namespace, namespace};
use super::cgroup::Cgroup;
use super::create::why;
use super::{Error, Result, chain};
use crate::sys::{clone, netns};

const CLONE_NEWTIME: CloneFlags = CloneFlags::from_bits_retain(libc::CLONE_NEWTIME);

/// Whether a container with this spec is born here and not by libcontainer.
pub(super) fn is_direct(spec: &Spec) -> bool {
    let devices = spec.linux().as_ref().and_then(|linux| linux.net_devices().as_ref());
    namespace(spec, LinuxNamespaceType::User).is_none() && devices.is_none_or(|devices| devices.is_empty())
}

/// Forks init, into its cgroup and namespaces, and runs the hooks of create. Init waits for `start` when this
/// returns.
///
/// # Errors
/// What went wrong, in init or outside. Init may live on then, in the container's cgroup.
pub(super) fn give_birth(mut args: ContainerArgs, cgroup: &Cgroup) -> Result<i32> {
    let resources = args.spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let birthplace = cgroup.make(&args.cgroup_config.container_name, resources)?;
    let new_network = makes_namespace(&args.spec, LinuxNamespaceType::Network);
    let outside = Outside::leave(&args.spec)?;
    if new_network {
        args.spec = Rc::new(without_network(&args.spec));
    }

    let (mut to_main, mut from_init) = channel::main_channel().map_err(channel_error)?;
    let (mut to_init, mut from_main) = channel::init_channel().map_err(channel_error)?;
    let (gate, waiting) = UnixStream::pair().map_err(|e| Error::io("socketpair", e))?;
    let gate = RefCell::new(Some(gate));
    let init = || {
        gate.take();
        let Err(why) = be_born(&mut args, new_network, &waiting, &mut to_main, &mut from_main);
        let _ = to_main.exec_failed(why);
        255
    };
    let pid = clone::child(outside.namespaces, birthplace.as_ref().map(AsFd::as_fd), init)
        .map_err(|e| Error::Init(format!("fork: {e}")))?
        .as_raw();
    drop(outside);
    drop(waiting);
    for closed in [to_main.close(), from_main.close()] {
        closed.map_err(channel_error)?;
    }
    cgroup.admit(pid, birthplace.is_some())?;
    if let Some(mut gate) = gate.take() {
        gate.write_all(b"!").map_err(|e| Error::io("init", e))?;
    }
    if let Some(hooks) = args.spec.hooks() {
        from_init.wait_for_hook_request().map_err(channel_error)?;
        let state = args.container.as_ref().map(|container| State { pid: Some(pid), ..container.state.clone() });
        for list in [hooks.prestart(), hooks.create_runtime()] {
            run_hooks(list.as_ref(), state.as_ref(), None, None, None).map_err(|e| Error::Hook(chain(&e)))?;
        }
        to_init.hook_done().map_err(channel_error)?;
    }
    from_init.wait_for_init_ready().map_err(channel_error)?;
    for closed in [to_init.close(), from_init.close()] {
        closed.map_err(channel_error)?;
    }
    Ok(pid)
}

fn channel_error(error: ChannelError) -> Error {
    why(&ProcessError::Channel(error))
}

/// Init's side. Comes back only when something went wrong.
fn be_born(
    args: &mut ContainerArgs,
    new_network: bool,
    gate: &UnixStream,
    to_main: &mut MainSender,
    from_main: &mut InitReceiver,
) -> std::result::Result<std::convert::Infallible, String> {
    let named = |what: &'static str| move |e: io::Error| format!("{what}: {e}");
    let _ = prctl::set_name(c"lmrun:init");
    // The hooks of create that run in here get the pid that they see.
    if let Some(container) = &mut args.container {
        container.state.pid = Some(std::process::id().cast_signed());
    }
    if new_network {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|e| format!("make a network namespace: {e}"))?;
        netns::raise_own_loopback().map_err(named("raise the loopback interface"))?;
    }
    // The other end closes without a word when lmrun dies before it has put this process into its cgroups.
    (&*gate).read_exact(&mut [0]).map_err(named("wait for the cgroups"))?;
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
fn write_offsets(spec: &Spec) -> Result<()> {
    let offsets = spec.linux().as_ref().and_then(|linux| linux.time_offsets().as_ref());
    let lines = offsets
        .into_iter()
        .flatten()
        .map(|(clock, offset)| format!("{clock} {} {}\n", offset.secs().unwrap_or(0), offset.nanosecs().unwrap_or(0)));
    let text: String = lines.collect();
    let path = "/proc/self/timens_offsets";
    if text.is_empty() { Ok(()) } else { fs::write(path, text).map_err(|e| Error::io(path, e)) }
}

/// The spec for an init that has its network namespace already.
fn without_network(spec: &Spec) -> Spec {
    let mut spec = spec.clone();
    if let Some(namespaces) = spec.linux_mut().as_mut().and_then(|linux| linux.namespaces_mut().as_mut()) {
        namespaces.retain(|namespace| namespace.typ() != LinuxNamespaceType::Network);
    }
    spec
}
