//! A running container's checkpoint: who is dumped, what comes from outside, what becomes of it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::cgroup::Cgroup;
use super::settings::{self, Settings};
use super::state::{Status, Store};
use super::{Error, Result, delete, status, streams};
use crate::engine::{self, DumpReport, DumpRequest, Fate, Freezer, Subject};
use crate::image::pages::PageSink;

/// A file that containerd puts into the archive of an image directory and does not take out again, as its name is
/// that of a whiteout (OCI image specification, layers).
///
/// Docker stores the archive under its digest when it checkpoints, and again, made anew, when it restores; the two being
/// alike, the restore fails with "already exists" until the first has been collected. With this they are not.
const LEFT_IN_ARCHIVE: &str = ".wh.lmrun";

/// A checkpoint as asked for on the command line.
#[derive(Default)]
pub struct CheckpointOptions {
    pub images: PathBuf,
    /// None: the container's directory.
    pub work: Option<PathBuf>,
    /// Relative to `images`.
    pub parent: Option<PathBuf>,
    pub leave_running: bool,
    pub tcp_established: bool,
    /// A round of pre-copy: memory only, and the container runs on.
    pub pre_dump: bool,
    /// Where the pages go instead of `images`.
    pub pages: Option<Box<dyn PageSink>>,
}

/// Checkpoints container `id`. Unless it is left running, nothing of it remains afterwards but the
/// images; where the checkpoint fails it goes on as before.
pub fn checkpoint(
    store: &Store,
    id: &str,
    options: CheckpointOptions,
    progress: Option<&dyn Fn(u64, u64)>,
) -> Result<DumpReport> {
    let locked = store.lock(id)?;
    let state = locked.load()?;
    let (Status::Running | Status::Paused, Some(init)) = (status(&state), state.init) else {
        return Err(Error::NotRunning);
    };
    let external = state.streams.iter().filter(|s| s.from_outside).map(|s| s.link.clone()).collect();
    let settings = Settings::of(&state.annotations)?;
    let work = made(options.work.as_deref().unwrap_or(locked.dir()))?;
    let fate = if options.leave_running || options.pre_dump { Fate::Resume } else { Fate::Kill };
    let cgroup = Cgroup::at(&state.cgroup);
    let request = DumpRequest {
        subject: Subject {
            id: id.to_owned(),
            init: init.pid,
            dir: locked.dir().to_owned(),
            external,
            mounts: state.mounts.clone(),
        },
        images: absolute(&options.images)?,
        work: work.clone(),
        parent: options.parent,
        fate,
        paused: cgroup.is_frozen().then_some(&cgroup as &dyn Freezer),
        tcp_established: options.tcp_established || settings.tcp_established,
        hold_at_bridges: settings::by_podman(&state.annotations),
        extra_files: [(streams::FILE.to_owned(), streams::links(&state.streams))]
            .into_iter()
            .chain(settings.by_shim.then(|| (LEFT_IN_ARCHIVE.to_owned(), Vec::new())))
            .collect(),
        pages: options.pages,
        progress,
    };
    let dumped = if options.pre_dump { engine::pre_dump(request) } else { engine::dump(request) };
    let report = dumped.map_err(Error::Engine);
    let said = match &report {
        Ok(report) => format!(
            "checkpointed container {id}: {} of {} pages, frozen for {:?}",
            report.pages_written, report.pages_scanned, report.frozen
        ),
        Err(error) => format!("cannot checkpoint container {id}: {}", super::chain(error)),
    };
    write_log(&work, "dump.log", &said);
    let report = report?;
    if fate == Fate::Kill {
        delete::remove(locked, &state)?;
    }
    Ok(report)
}

/// Leaves a log where engines look for it and keep it. What it says was said to the caller, too.
pub(super) fn write_log(work: &Path, name: &str, said: &str) {
    let text = format!("{}\nlmrun {}\n", said.trim_end(), env!("CARGO_PKG_VERSION"));
    let path = work.join(name);
    if let Err(error) = fs::write(&path, text) {
        tracing::warn!(%error, path = %path.display(), "cannot write the log");
    }
}

impl Freezer for Cgroup {
    fn freeze(&self) -> io::Result<()> {
        self.freeze().map_err(io::Error::other)
    }

    fn thaw(&self) -> io::Result<()> {
        self.thaw().map_err(io::Error::other)
    }
}

pub(super) fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|e| Error::io(path, e))
}

/// The directory's absolute path; made where it is missing.
pub(super) fn made(dir: &Path) -> Result<PathBuf> {
    fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
    absolute(dir)
}
