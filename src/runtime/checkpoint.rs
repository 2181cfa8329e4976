//! A running container's checkpoint: who is dumped, what comes from outside, what becomes of it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::cgroup::Cgroup;
use super::settings::Settings;
use super::state::{Status, Store};
use super::{Error, Result, delete, status};
use crate::engine::{self, DumpReport, DumpRequest, Fate, Freezer, Subject};
use crate::image::pages::PageSink;

/// The file in an image directory that names what init's descriptors 0, 1 and 2 were: a JSON list of
/// their links, as runc writes it.
pub(super) const DESCRIPTORS: &str = "descriptors.json";

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
    let links = standard_links(init.pid)?;
    let external = links.iter().filter(|link| link.comes_from_outside).map(|link| link.target.clone()).collect();
    let targets: Vec<_> = links.into_iter().map(|link| link.target).collect();
    let settings = Settings::of(&state.annotations)?;
    let work = made(options.work.as_deref().unwrap_or(locked.dir()))?;
    let fate = if options.leave_running || options.pre_dump { Fate::Resume } else { Fate::Kill };
    let cgroup = Cgroup::at(&state.cgroup);
    let request = DumpRequest {
        subject: Subject { id: id.to_owned(), init: init.pid, dir: locked.dir().to_owned(), external },
        images: absolute(&options.images)?,
        work: work.clone(),
        parent: options.parent,
        fate,
        paused: cgroup.is_frozen().then_some(&cgroup as &dyn Freezer),
        tcp_established: options.tcp_established || settings.tcp_established,
        extra_files: [(DESCRIPTORS.to_owned(), serde_json::json!(targets).to_string().into_bytes())]
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

/// One of init's standard streams.
struct Link {
    target: String,
    comes_from_outside: bool,
}

/// The links of init's descriptors 0, 1 and 2, those that are open. Pipes and sockets have an other end that is
/// not the container's to restore; a file comes from outside when its mount is not one of the container's.
fn standard_links(init: i32) -> Result<Vec<Link>> {
    let mounts = format!("/proc/{init}/mountinfo");
    let mounts = fs::read_to_string(&mounts).map_err(|e| Error::io(mounts, e))?;
    let mut links = Vec::new();
    for fd in 0..3 {
        let Ok(target) = fs::read_link(format!("/proc/{init}/fd/{fd}")) else {
            continue;
        };
        let target = target.to_string_lossy().into_owned();
        let fdinfo = fs::read_to_string(format!("/proc/{init}/fdinfo/{fd}")).unwrap_or_default();
        let mount = fdinfo.lines().find_map(|line| line.strip_prefix("mnt_id:")).map(str::trim);
        let inside = mount.is_some_and(|mount| mounts.lines().any(|line| line.split(' ').next() == Some(mount)));
        links.push(Link { target, comes_from_outside: !inside });
    }
    Ok(links)
}

pub(super) fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|e| Error::io(path, e))
}

/// The directory's absolute path; made where it is missing.
pub(super) fn made(dir: &Path) -> Result<PathBuf> {
    fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
    absolute(dir)
}
