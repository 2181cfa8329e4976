//! Restore is create with another executor: the same namespaces, mounts and limits from the
//! bundle, and an init that waits for the engine to make it what was dumped.
//!
//! Either in one go, or in two: a container whose configuration names a checkpoint
//! ([`Settings::checkpoint_to_restore`](super::settings::Settings::checkpoint_to_restore)) gets its puppet from
//! `create` and its processes from `start`, so that every engine can restore. So does one whose processes arrive from
//! another host ([`standby`]).

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use oci_spec::runtime::LinuxNamespaceType;
use serde::{Deserialize, Serialize};

use super::birth::Born;
use super::bundle::{Bundle, namespace};
use super::checkpoint::{absolute, made, write_log};
use super::create::{CreateOptions, HalfMade};
use super::puppet::PuppetExecutor;
use super::run::{Attachment, Foreground, own_console};
use super::settings::Settings;
use super::state::{State, Status, Store};
use super::{Error, Result, standby, start, streams};
use crate::engine::{self, ClockOffsets, Plan, Puppet, RestoreRequest};
use crate::sys::pidfd::PidFd;

/// A restore as asked for on the command line.
#[derive(Debug, Clone, Default)]
pub struct RestoreOptions {
    pub create: CreateOptions,
    pub images: PathBuf,
    /// None: the image directory.
    pub work: Option<PathBuf>,
    pub tcp_established: bool,
    pub attachment: Attachment,
}

/// A restore of which `create` has made the container, and `start` is to make the processes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Pending {
    from: Origin,
    /// The waiting init's copy of the driver's end of the puppet's socket.
    control: i32,
}

/// Where the processes are to come from.
#[derive(Debug, Clone, Serialize, Deserialize)]
enum Origin {
    Images(PathBuf),
    /// The directory of a [`standby`].
    Standby(PathBuf),
}

/// Makes container `id` from a checkpoint. Attached, waits for its end like [`run`](super::run::run).
///
/// # Errors
/// [`Error::NoPidNamespace`], or why the checkpoint cannot be restored here; nothing of the container remains then.
pub fn restore(store: &Store, id: &str, options: &RestoreOptions) -> Result<i32> {
    let bundle = Bundle::load(&options.create.bundle)?;
    let settings = Settings::of(&bundle.annotations())?;
    let images = absolute(&options.images)?;
    let work = made(options.work.as_deref().unwrap_or(&images))?;
    let tcp_established = options.tcp_established || settings.tcp_established;
    let restored: Result<_> = (|| {
        let plan = plan(&bundle, &images, &work, tcp_established)?;
        hold_peers_there(&plan, &bundle)?;
        let mut signals = Foreground::prepare(options.attachment)?;
        let mut container = HalfMade::begin(store, id, &bundle)?;
        let mut create = options.create.clone();
        let socket = own_console(&bundle, &mut create, options.attachment, container.dir())?;
        let control =
            raise_puppet(&mut container, &bundle, plan.clock_offsets(), &create, &hold_peers(&plan, &bundle))?;
        if let Some(signals) = &mut signals {
            signals.join(socket)?;
        }
        let init = container.state().init.ok_or(Error::PuppetLost)?;
        rebuild(plan, &images, container.dir(), init.pid, control, &work)?;
        let init = container.finish(Status::Running, options.create.pid_file.as_deref())?;
        Ok((signals, init))
    })();
    if let Err(error) = &restored {
        write_log(&work, "restore.log", &format!("cannot restore container {id}: {}", super::chain(error)));
    }
    let (signals, init) = restored?;
    signals.map_or(Ok(0), |signals| signals.stay_with(store, id, init))
}

/// The first half of a restore by `create` and `start`: the container, with a puppet that waits.
pub(super) fn prepare(
    container: &mut HalfMade,
    bundle: &Bundle,
    images: PathBuf,
    options: &CreateOptions,
) -> Result<()> {
    // Planned again by `start`: here it tells the clocks, and what is wrong while the caller listens.
    let plan = plan(bundle, &images, container.dir(), true)?;
    hold_peers_there(&plan, bundle)?;
    let control = raise_puppet(container, bundle, plan.clock_offsets(), options, &hold_peers(&plan, bundle))?;
    container.restores(Pending { from: Origin::Images(images), control: control.as_raw_fd() });
    Ok(())
}

/// The same for a container whose processes arrive from another host.
pub(super) fn prepare_standby(
    container: &mut HalfMade,
    bundle: &Bundle,
    (standby, clocks): (PathBuf, ClockOffsets),
    options: &CreateOptions,
) -> Result<()> {
    if !bundle.makes_namespace(LinuxNamespaceType::Pid) {
        return Err(Error::NoPidNamespace);
    }
    let control = raise_puppet(container, bundle, clocks, options, &|_| Ok(()))?;
    container.restores(Pending { from: Origin::Standby(standby), control: control.as_raw_fd() });
    Ok(())
}

/// The second half: `init`, which waits in libcontainer's last step, becomes the checkpoint's, or whoever receives
/// the container makes it what it was elsewhere.
pub(super) fn complete(dir: &Path, state: &State, init: i32, pending: &Pending) -> Result<()> {
    let waiting = PidFd::open(init).map_err(|e| Error::io("init", e))?;
    let control = waiting.get(pending.control).map_err(|e| Error::io("the puppet's socket", e))?;
    let mut control = UnixStream::from(control);
    let images = match &pending.from {
        Origin::Images(images) => images.clone(),
        Origin::Standby(standby) => {
            // A puppet has none any more.
            let streams = (0..3).filter_map(|n| Some((n, waiting.get(n).ok()?))).collect();
            start::go(dir)?;
            wait_ready(&mut control)?;
            let State { bundle, rootfs, .. } = state;
            return standby::report(standby, standby::Made { init, dir, bundle, rootfs, control, streams });
        }
    };
    let request = RestoreRequest { work: dir.to_owned(), tcp_established: true, images: images.clone() };
    let plan = engine::plan(request).map_err(Error::Engine)?;
    rebuild(plan, &images, dir, init, control, dir)
}

fn plan(bundle: &Bundle, images: &Path, work: &Path, tcp_established: bool) -> Result<Plan> {
    if !bundle.makes_namespace(LinuxNamespaceType::Pid) {
        return Err(Error::NoPidNamespace);
    }
    let request = RestoreRequest { work: work.to_owned(), tcp_established, images: images.to_owned() };
    engine::plan(request).map_err(Error::Engine)
}

/// In a network namespace that others have made and may have connected already: as early as can be.
fn hold_peers_there(plan: &Plan, bundle: &Bundle) -> Result<()> {
    let joined = namespace(&bundle.spec, LinuxNamespaceType::Network).and_then(|netns| netns.path().as_ref());
    joined.map_or(Ok(()), |path| hold_peers_in(plan, path))
}

/// In one of the container's own: before a hook, or an engine behind `create`, connects it.
fn hold_peers(plan: &Plan, bundle: &Bundle) -> impl Fn(i32) -> Result<()> {
    let own = bundle.makes_namespace(LinuxNamespaceType::Network);
    move |init| if own { hold_peers_in(plan, Path::new(&format!("/proc/{init}/ns/net"))) } else { Ok(()) }
}

fn hold_peers_in(plan: &Plan, netns: &Path) -> Result<()> {
    let file = File::open(netns).map_err(|e| Error::io(netns, e))?;
    plan.hold_peers(file.as_fd()).map_err(Error::Engine)
}

/// Builds the container around an init that becomes a puppet as soon as it is started; gives the driver's end
/// of its socket.
pub(super) fn raise_puppet(
    container: &mut HalfMade,
    bundle: &Bundle,
    clocks: ClockOffsets,
    options: &CreateOptions,
    born: Born<'_>,
) -> Result<UnixStream> {
    let (executor, control) =
        PuppetExecutor::new(container.keyring(options)).map_err(|e| Error::io("socketpair", e))?;
    // Descriptors handed down are the dumped tasks' affair.
    let options = CreateOptions { preserve_fds: 0, ..options.clone() };
    container.build(bundle.spec_for_puppet(clocks)?, Box::new(executor.clone()), &options, born)?;
    executor.release();
    Ok(control)
}

/// Starts the puppet and makes it what was dumped. The container's directory is `dir`.
fn rebuild(mut plan: Plan, images: &Path, dir: &Path, init: i32, mut control: UnixStream, work: &Path) -> Result<()> {
    // The standard streams of the container are those of its init, which may be a terminal that was made for it.
    let waiting = PidFd::open(init).map_err(|e| Error::io("init", e))?;
    plan.replace(streams::replaced(images, &|fd| waiting.get(fd))?);
    start::go(dir)?;
    wait_ready(&mut control)?;
    let report = plan.rebuild(Puppet { pid: init, control }).map_err(Error::Engine)?;
    for missed in &report.missed {
        tracing::warn!("{missed}");
    }
    let said = format!("restored {} pages in {:?}\n{}", report.pages, report.total, report.missed.join("\n"));
    write_log(work, "restore.log", &said);
    Ok(())
}

pub(super) fn wait_ready(control: &mut UnixStream) -> Result<()> {
    match control.read_exact(&mut [0]) {
        Err(e) if e.kind() == ErrorKind::UnexpectedEof => Err(Error::PuppetLost),
        read => read.map_err(|e| Error::io("puppet", e)),
    }
}
