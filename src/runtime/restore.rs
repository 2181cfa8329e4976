//! Restore is create with another executor: the same namespaces, mounts and limits from the
//! bundle, and an init that waits for the engine to make it what was dumped.

use std::fs;
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use oci_spec::runtime::LinuxNamespaceType;

use super::bundle::Bundle;
use super::checkpoint::{DESCRIPTORS, absolute, made};
use super::create::{CreateOptions, HalfMade};
use super::puppet::PuppetExecutor;
use super::run::{Attachment, Foreground};
use super::state::{Status, Store};
use super::{Error, Result, start};
use crate::engine::{self, Puppet, RestoreRequest};

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

/// Makes container `id` from a checkpoint. Attached, waits for its end like [`run`](super::run::run).
///
/// # Errors
/// [`Error::NoPidNamespace`], or why the checkpoint cannot be restored here; nothing of the container remains then.
pub fn restore(store: &Store, id: &str, options: &RestoreOptions) -> Result<i32> {
    let bundle = Bundle::load(&options.create.bundle)?;
    if !bundle.makes_namespace(LinuxNamespaceType::Pid) {
        return Err(Error::NoPidNamespace);
    }
    let images = absolute(&options.images)?;
    let plan = engine::plan(RestoreRequest {
        work: made(options.work.as_deref().unwrap_or(&images))?,
        tcp_established: options.tcp_established,
        external: own_streams(&images)?,
        images,
    })
    .map_err(Error::Engine)?;

    let signals = Foreground::prepare(options.attachment)?;
    let mut container = HalfMade::begin(store, id, &bundle)?;
    let puppet = raise_puppet(&mut container, &bundle, plan.clock_offsets(), &options.create)?;
    plan.rebuild(puppet).map_err(Error::Engine)?;
    let init = container.finish(Status::Running, options.create.pid_file.as_deref())?;
    signals.map_or(Ok(0), |signals| signals.stay_with(store, id, init))
}

/// Builds the container around a puppet and waits until that is ready.
fn raise_puppet(
    container: &mut HalfMade,
    bundle: &Bundle,
    clocks: engine::ClockOffsets,
    options: &CreateOptions,
) -> Result<Puppet> {
    let (executor, mut control) =
        PuppetExecutor::new(container.keyring(options)).map_err(|e| Error::io("socketpair", e))?;
    // The terminal is the dumped tasks' affair, and so are descriptors handed down.
    let options = CreateOptions { console_socket: None, preserve_fds: 0, ..options.clone() };
    container.build(bundle.spec_for_puppet(clocks)?, Box::new(executor.clone()), &options)?;
    executor.release();
    start::go(container.dir())?;
    wait_ready(&mut control)?;
    let init = container.state().init.ok_or(Error::PuppetLost)?;
    Ok(Puppet { pid: init.pid, control })
}

fn wait_ready(control: &mut UnixStream) -> Result<()> {
    match control.read_exact(&mut [0]) {
        Err(e) if e.kind() == ErrorKind::UnexpectedEof => Err(Error::PuppetLost),
        read => read.map_err(|e| Error::io("puppet", e)),
    }
}

/// What takes the place of the standard streams that the dumped init had from outside: ours. A path is not
/// taken for one of the host's where the container has a file of that name (/dev/null).
fn own_streams(images: &Path) -> Result<Vec<(String, OwnedFd)>> {
    let path = images.join(DESCRIPTORS);
    let links: Vec<String> = match fs::read(&path) {
        Ok(json) => serde_json::from_slice(&json).map_err(|e| Error::io(&path, e.into()))?,
        Err(e) if e.kind() == ErrorKind::NotFound => Vec::new(),
        Err(e) => return Err(Error::io(&path, e)),
    };
    let own = |fd: usize| match fd {
        0 => io::stdin().as_fd().try_clone_to_owned(),
        1 => io::stdout().as_fd().try_clone_to_owned(),
        _ => io::stderr().as_fd().try_clone_to_owned(),
    };
    let mut streams: Vec<(String, OwnedFd)> = Vec::new();
    for (fd, link) in links.into_iter().enumerate().take(3) {
        if link != "/dev/null" && !streams.iter().any(|(known, _)| *known == link) {
            streams.push((link, own(fd).map_err(|e| Error::io("standard streams", e))?));
        }
    }
    Ok(streams)
}
