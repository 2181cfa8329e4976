//! The final checkpoint: freeze, collect, pages, connections, write, commit.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::collect::{Collection, Depth, collect};
use super::freeze::Frozen;
use super::mappings::Mappings;
use super::memory::{self, Shmem};
use super::network::{Bracket, Watch};
use super::res::mm::{self, Content};
use super::res::tmpfs;
use super::track::Tracking;
use super::{DumpReport, DumpRequest, Error, Fate, Result, Why};
use crate::image::dir::{self, ImageWriter};
use crate::image::format;
use crate::image::page_store::LocalPages;
use crate::image::pages::{PageReader, PageRun, PageSink, PagesOf, Written};
use crate::image::records::stats::{DumpStatsEntry, StatsEntry};
use crate::sys::{proc, sysv};

/// Makes the final checkpoint of a container.
///
/// # Errors
/// Whatever is refused is refused before anything is written, and after an error the container runs on as if nothing
/// had happened. Nothing is left under the name of the image directory.
pub fn dump(mut req: DumpRequest<'_>) -> Result<DumpReport> {
    let writer = ImageWriter::create(&req.images, req.parent.as_deref())?;
    let tracking = Tracking::of_parent(&req.subject, writer.parent())?;
    let watch = Watch::prepare(&req.subject, req.tcp_established, req.hold_at_bridges)?;
    let mut sink: Box<dyn PageSink> = match req.pages.take() {
        Some(elsewhere) => elsewhere,
        None => Box::new(LocalPages::new(&writer)),
    };

    let mut frozen = Frozen::freeze(req.subject.init, req.paused)?;
    frozen.run_out()?;
    for visitor in &frozen.visitors {
        let name = proc::status(visitor.pid).and_then(|s| s.field("Name").map(str::to_owned)).unwrap_or_default();
        tracing::warn!("process {} ({name}) was started by exec: it is not in the checkpoint", visitor.pid);
    }
    let mut all =
        collect(&frozen, &req.subject, &Mappings::default(), Depth::Whole { keep_established: req.tcp_established })?;
    let started = Instant::now();
    let mut report = DumpReport { freezing: frozen.freezing, ..DumpReport::default() };
    write_pages(req.subject.init, &all, tracking.is_some(), &mut *sink, &mut report, req.progress)?;
    let memory = started.elapsed();
    sink.finish()?;
    write_tmpfs(req.subject.init, &all.tmpfs, &writer)?;
    all.files.all.ghosts.write(&writer)?;

    // Read last: the kernel goes on queueing what peers send, and the lock is short.
    let bracket: Bracket = watch.enter(&mut all, req.fate)?;
    all.take_records();
    all.tree.extra.network_lock = bracket.table();
    all.tree.write(&writer)?;
    for (name, content) in &req.extra_files {
        writer.raw_file(name, content)?;
    }
    drop(sink);
    match req.fate {
        // It need not wait for the disk.
        Fate::Resume => {
            report.frozen = frozen.frozen_for();
            drop(std::mem::take(&mut all.files.all.watched));
            drop(frozen);
            drop(bracket);
            writer.commit()?;
        }
        Fate::Kill => {
            writer.commit()?;
            report.frozen = frozen.frozen_for();
            bracket.commit(req.subject.init)?;
            frozen.kill()?;
            bracket.hold()?;
        }
    }
    write_stats(&req.work, &report, memory)?;
    Ok(report)
}

fn write_pages(
    init: libc::pid_t,
    all: &Collection,
    tracked: bool,
    sink: &mut dyn PageSink,
    report: &mut DumpReport,
    progress: Option<&dyn Fn(u64, u64)>,
) -> Result<()> {
    let mut work: Vec<(PagesOf, Vec<PageRun>, Box<dyn PageReader + '_>)> = Vec::new();
    let mut shmem: BTreeSet<u64> = BTreeSet::new();
    let alive = all.tree.processes.iter().filter_map(|p| p.alive.as_ref());
    for (host, process) in all.hosts.iter().zip(alive) {
        let of = PagesOf::Task(host.inside);
        work.push((of, memory::process_runs(host, &process.mm, tracked)?, Box::new(&host.memory)));
        for v in &process.mm.vmas {
            let Content::Shmem(id) = mm::content(v) else { continue };
            if shmem.insert(id) {
                let object = Shmem::open(host.pid, v.start, v.end).map_err(|e| Error::proc(host.pid, e))?;
                let runs = object.runs().map_err(|e| Error::proc(host.pid, e))?;
                work.push((PagesOf::Shmem(id), runs, Box::new(object)));
            }
        }
    }
    for segment in &all.tree.sysv {
        let id = segment.desc.id;
        let object = sysv::open(init, id.cast_signed()).map_err(|e| Error::proc(init, e))?;
        // A segment's id is an inode number too, as that of a shared mapping is.
        if !shmem.insert(id.into()) {
            let why = format!("two shared memory objects have the number {id}");
            return Err(Error::refused(init, Why::Other { why, remedy: "stop and start the container instead" }));
        }
        let object = Shmem::of(object);
        let runs = object.runs().map_err(|e| Error::proc(init, e))?;
        work.push((PagesOf::Shmem(id.into()), runs, Box::new(object)));
    }
    write_all(work, sink, report, progress)
}

pub(super) fn write_tmpfs(init: libc::pid_t, mounts: &[PathBuf], writer: &ImageWriter) -> Result<()> {
    if mounts.is_empty() {
        return Ok(());
    }
    let archive = writer.new_file(tmpfs::ARCHIVE)?;
    tmpfs::dump(init, mounts, archive).map_err(Error::system("archive the container's tmpfs mounts"))
}

/// Sends all runs and adds up what was done.
pub(super) fn write_all(
    work: Vec<(PagesOf, Vec<PageRun>, Box<dyn PageReader + '_>)>,
    sink: &mut dyn PageSink,
    report: &mut DumpReport,
    progress: Option<&dyn Fn(u64, u64)>,
) -> Result<()> {
    let pages = |runs: &[PageRun]| runs.iter().map(|r| r.pages).sum::<u64>();
    report.pages_scanned = work.iter().map(|(_, runs, _)| pages(runs)).sum();
    let mut done = 0;
    for (of, mut runs, reader) in work {
        // Asked last: a page server has one target open at a time.
        if runs.iter().any(|r| r.in_parent) && !sink.has_parent(of)? {
            runs.iter_mut().for_each(|r| r.in_parent = false);
        }
        let Written { pages: written, in_parent } = sink.write(of, &runs, &*reader)?;
        report.pages_written += written;
        report.pages_in_parent += in_parent;
        done += pages(&runs);
        if let Some(progress) = progress {
            progress(done, report.pages_scanned);
        }
    }
    Ok(())
}

pub(super) fn write_stats(work: &Path, report: &DumpReport, memory: Duration) -> Result<()> {
    let micros = |d: Duration| u32::try_from(d.as_micros()).unwrap_or(u32::MAX);
    let entry = DumpStatsEntry {
        freezing_time: micros(report.freezing),
        frozen_time: micros(report.frozen),
        memdump_time: micros(memory),
        memwrite_time: 0,
        pages_scanned: report.pages_scanned,
        pages_skipped_parent: report.pages_in_parent,
        pages_written: report.pages_written,
        ..DumpStatsEntry::default()
    };
    let stats = StatsEntry { dump: Some(entry), restore: None };
    Ok(dir::write_stats(work, &format::STATS_DUMP, &stats)?)
}
