//! Restore is create with another executor: the same namespaces, mounts and limits from the
//! bundle, and an init that waits for the engine to make it what was dumped.
//!
//! Either in one go, or in two: a container whose configuration names a checkpoint
//! ([`Settings::checkpoint_to_restore`](super::settings::Settings::checkpoint_to_restore)) gets its puppet from
//! `create` and its processes from `start`, so that every engine can restore.

use std::io::{ErrorKind, Read};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use oci_spec::runtime::LinuxNamespaceType;
use serde::{Deserialize, Serialize};

use super::bundle::Bundle;
use super::checkpoint::{absolute, made, write_log};
use super::create::{CreateOptions, HalfMade};
use super::puppet::PuppetExecutor;
use super::run::{Attachment, Foreground};
use super::settings::Settings;
use super::state::{Status, Store};
use super::streams::{self, Source};
use super::{Error, Result, start};
use crate::engine::{self, Plan, Puppet, RestoreRequest};
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
    images: PathBuf,
    /// The waiting init's copy of the driver's end of the puppet's socket.
    control: i32,
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
    let restored = (|| {
        let plan = plan(&bundle, &images, &work, tcp_established, &streams::own)?;
        let signals = Foreground::prepare(options.attachment)?;
        let mut container = HalfMade::begin(store, id, &bundle)?;
        let control = raise_puppet(&mut container, &bundle, &plan, &options.create)?;
        start::go(container.dir())?;
        let init = container.state().init.ok_or(Error::PuppetLost)?;
        rebuild(plan, init.pid, control, &work)?;
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
    if options.console_socket.is_some() {
        return Err(Error::Terminal("cannot restore a container that has a terminal"));
    }
    // Planned again by `start`: here it tells the clocks, and what is wrong while the caller listens.
    let plan = plan(bundle, &images, container.dir(), true, &streams::own)?;
    let control = raise_puppet(container, bundle, &plan, options)?;
    container.restores(Pending { images, control: control.as_raw_fd() });
    Ok(())
}

/// The second half: `init`, which waits in libcontainer's last step, becomes the checkpoint's.
pub(super) fn complete(dir: &Path, init: i32, pending: &Pending) -> Result<()> {
    let waiting = PidFd::open(init).map_err(|e| Error::io("init", e))?;
    let take = |fd| waiting.get(fd).map_err(|e| Error::io(format!("descriptor {fd} of init"), e));
    // The standard streams of the container are init's, not ours.
    let request = RestoreRequest {
        work: dir.to_owned(),
        tcp_established: true,
        external: streams::replaced(&pending.images, &|fd| waiting.get(fd))?,
        images: pending.images.clone(),
    };
    let plan = engine::plan(request).map_err(Error::Engine)?;
    let control = UnixStream::from(take(pending.control)?);
    start::go(dir)?;
    rebuild(plan, init, control, dir)
}

fn plan(bundle: &Bundle, images: &Path, work: &Path, tcp_established: bool, stream: Source<'_>) -> Result<Plan> {
    if !bundle.makes_namespace(LinuxNamespaceType::Pid) {
        return Err(Error::NoPidNamespace);
    }
    let request = RestoreRequest {
        work: work.to_owned(),
        tcp_established,
        external: streams::replaced(images, stream)?,
        images: images.to_owned(),
    };
    engine::plan(request).map_err(Error::Engine)
}

/// Builds the container around an init that becomes a puppet as soon as it is started; gives the driver's end
/// of its socket.
fn raise_puppet(container: &mut HalfMade, bundle: &Bundle, plan: &Plan, options: &CreateOptions) -> Result<UnixStream> {
    let (executor, control) =
        PuppetExecutor::new(container.keyring(options)).map_err(|e| Error::io("socketpair", e))?;
    // The terminal is the dumped tasks' affair, and so are descriptors handed down.
    let options = CreateOptions { console_socket: None, preserve_fds: 0, ..options.clone() };
    container.build(bundle.spec_for_puppet(plan.clock_offsets())?, Box::new(executor.clone()), &options)?;
    executor.release();
    Ok(control)
}

fn rebuild(plan: Plan, init: i32, mut control: UnixStream, work: &Path) -> Result<()> {
    wait_ready(&mut control)?;
    let report = plan.rebuild(Puppet { pid: init, control }).map_err(Error::Engine)?;
    for missed in &report.missed {
        tracing::warn!("{missed}");
    }
    let said = format!("restored {} pages in {:?}\n{}", report.pages, report.total, report.missed.join("\n"));
    write_log(work, "restore.log", &said);
    Ok(())
}

fn wait_ready(control: &mut UnixStream) -> Result<()> {
    match control.read_exact(&mut [0]) {
        Err(e) if e.kind() == ErrorKind::UnexpectedEof => Err(Error::PuppetLost),
        read => read.map_err(|e| Error::io("puppet", e)),
    }
}
