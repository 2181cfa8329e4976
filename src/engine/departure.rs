//! A container that leaves while it runs: rounds of pre-copy to an [`Outlet`], then the last one inside the freeze.
//!
//! A round is always the same: the container is stopped for a moment and read whole (`collect`), so that the other side
//! can follow its processes and mappings; what it holds in memory is sent while it runs on. Of each piece of memory the
//! other side is told which pages there are (what is not named is a hole), and gets those that are new. In the last round
//! the container stays stopped.
//!
//! Writes to private memory are noted by the kernel (`track`). Shared memory objects can be written to by ways that leave no
//! note; of their pages we keep digests of what was sent.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use xxhash_rust::xxh3::xxh3_128;

use super::collect::{Collection, Depth, Host, collect};
use super::dump::write_tmpfs;
use super::freeze::Frozen;
use super::mappings::Mappings;
use super::memory::{Round as Scan, Running, Shmem, is_untracked, runs};
use super::network::{Bracket, Watch};
use super::plan::is_file_mapping;
use super::res::mm::{self, Content};
use super::res::{fd::ghost, tmpfs};
use super::track::Session;
use super::tree::Tree;
use super::{Error, Fate, Freezer, Result, Subject, Why};
use crate::image::dir::ImageWriter;
use crate::image::pages::{PAGE_SIZE, PageReader, PageRun, PagesOf, Span};
use crate::image::records::mm::VmaEntry;
use crate::sys::mem::Memory;
use crate::sys::pagemap::Pagemap;
use crate::sys::{proc, sysv};

/// Bytes of pages in one piece.
const PIECE: u64 = 256 << 10;
/// How often a container is stopped that has something on its way which cannot be carried.
const STOP_TRIES: u32 = 20;
/// More than this in the container's tmpfs mounts goes along in the first round and the last alone.
const SMALL_TMPFS: u64 = 8 << 20;

/// Takes what a departure sends; at the other end is a [`Standby`](super::standby::Standby).
pub trait Outlet {
    /// Brings the other side's file systems up to date. Those of the last round are all there are.
    fn files(&mut self, busy: &[BusyFile]) -> io::Result<()>;
    /// The records of a round: the files in `dir`.
    fn images(&mut self, dir: &Path) -> io::Result<()>;
    /// All pages that `of` has, ascending. What is in none of them is a hole.
    fn present(&mut self, of: PagesOf, spans: &[Span]) -> io::Result<()>;
    /// Content of pages, at most 256 KiB.
    fn pages(&mut self, of: PagesOf, vaddr: u64, bytes: &[u8]) -> io::Result<()>;
}

/// Slows a container down while it runs. Dropped, it does so no more.
pub trait Brake: std::fmt::Debug {
    /// It gets `percent` of the processor time that it took of its own accord.
    fn press(&mut self, percent: u32) -> io::Result<()>;
    /// It gets what it wants, and can stop at once.
    fn release(&mut self) -> io::Result<()>;
}

/// What a round did.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sent {
    /// How long the tasks were stopped; in the last round until now.
    pub frozen: Duration,
    /// Until every task had stopped, a part of `frozen`.
    pub freezing: Duration,
    /// Reading the kernel's state, a part of `frozen`.
    pub collecting: Duration,
    pub pages_present: u64,
    pub pages_sent: u64,
    pub took: Duration,
}

/// A file in the container's file systems that it may write to without anybody being told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BusyFile {
    /// As the container sees it.
    pub path: PathBuf,
    /// There is a writable, shared mapping of it; otherwise it is just open for writing.
    pub mapped: bool,
}

fn busy(tree: &Tree) -> Vec<BusyFile> {
    let alive = tree.processes.iter().filter_map(|p| p.alive.as_ref());
    let mapped: BTreeSet<u32> =
        alive.flat_map(|a| &a.mm.vmas).filter(|v| mm::content(v) == Content::File).map(|v| v.shmid as u32).collect();
    let writable = |flags: u32| flags & libc::O_ACCMODE as u32 != libc::O_RDONLY as u32;
    let files = tree.files.iter().filter_map(|f| f.reg.as_ref()).filter(|r| writable(r.flags));
    files.map(|r| BusyFile { path: OsStr::from_bytes(&r.name).into(), mapped: mapped.contains(&r.id) }).collect()
}

/// What the other side lacks by its own account.
pub type Missing = [(PagesOf, Span)];

/// A container that is leaving. Dropped, it stays as it is: only its writes are not noted any more.
#[derive(Debug)]
pub struct Departure {
    subject: Subject,
    session: Session,
    /// Digests of the pages of shared memory objects that the other side has.
    shared: HashMap<PagesOf, BTreeMap<u64, u128>>,
    mappings: Mappings,
    /// With the percentage.
    brake: Option<(Box<dyn Brake>, u32)>,
    rounds: u32,
}

impl Departure {
    /// Begins with a container that runs.
    pub fn begin(subject: Subject) -> Result<Departure> {
        // What an earlier pre-dump has noted does not count here.
        drop(Session::take(&subject)?);
        let (session, mappings) = (Session::default(), Mappings::open());
        Ok(Departure { subject, session, shared: HashMap::new(), mappings, brake: None, rounds: 0 })
    }

    /// Stops the container for a moment and looks whether it has anything that cannot be carried.
    pub fn verify(&self) -> Result<()> {
        let mut frozen = Frozen::freeze(self.subject.init, None)?;
        frozen.run_out()?;
        collect(&frozen, &self.subject, &self.mappings, Depth::Kinds).map(drop)
    }

    /// From now on the container is slowed down, but for the moments in which it is to stop, and for good.
    pub fn slow(&mut self, mut brake: Box<dyn Brake>, percent: u32) -> Result<()> {
        brake.press(percent).map_err(Error::system("throttle the container"))?;
        self.brake = Some((brake, percent));
        Ok(())
    }

    /// What [`Departure::slow`] was given, to be given again.
    pub fn brake(&mut self) -> Option<Box<dyn Brake>> {
        self.brake.take().map(|(brake, _)| brake)
    }

    /// A place for records on their way, which goes with the value.
    fn writer(&self, name: &str) -> Result<ImageWriter> {
        Ok(ImageWriter::create(&self.subject.dir.join(name), None)?)
    }

    /// One round of pre-copy, when the other side's file systems have what the records name.
    pub fn round(&mut self, missing: &Missing, out: &mut dyn Outlet) -> Result<Sent> {
        let started = Instant::now();
        let writer = self.writer("following")?;
        let mut sent = Sent::default();
        let (all, ghosts) = self.look(&mut sent)?;
        ghosts.write(&writer)?;
        out.files(&busy(&all.tree)).map_err(sending())?;
        if self.rounds == 0 || tmpfs::used(self.subject.init, &all.tmpfs) <= SMALL_TMPFS {
            write_tmpfs(self.subject.init, &all.tmpfs, &writer)?;
        }
        all.tree.write(&writer)?;
        out.images(writer.path()).map_err(sending())?;
        drop(writer);
        self.rounds += 1;
        self.send_memory(&all, &ghosts, Scan::Track, missing, &mut sent, out)?;
        sent.took = started.elapsed();
        Ok(sent)
    }

    /// Stops the container for as long as it takes to read it.
    fn look(&mut self, sent: &mut Sent) -> Result<(Collection, ghost::Found)> {
        // A task that has used up its share would not come to stop.
        if let Some((brake, _)) = &mut self.brake {
            brake.release().map_err(Error::system("end the container's throttle"))?;
        }
        let mut frozen = Frozen::freeze(self.subject.init, None)?;
        frozen.run_out()?;
        let at = Instant::now();
        let mut all = collect(&frozen, &self.subject, &self.mappings, Depth::Memory)?;
        for task in frozen.tasks.iter().filter(|t| !t.is_zombie()) {
            let memory = Memory::open(task.pid).map_err(|e| Error::proc(task.pid, e))?;
            let vmas = proc::maps(task.pid).map_err(|e| Error::proc(task.pid, e))?;
            self.session.ensure(task, &vmas, &memory)?;
        }
        all.take_records();
        let ghosts = std::mem::take(&mut all.files.all.ghosts);
        // What else we hold of its files must not outlive its own use of them.
        all.files.sockets.clear();
        drop(std::mem::take(&mut all.files.all.watched));
        (sent.freezing, sent.collecting, sent.frozen) = (frozen.freezing, at.elapsed(), frozen.frozen_for());
        drop(frozen);
        if let Some((brake, percent)) = &mut self.brake {
            brake.press(*percent).map_err(Error::system("throttle the container"))?;
        }
        Ok((all, ghosts))
    }

    /// Stops the container until the value is dropped, or for good. `extra`: files of the runtime's for the records.
    ///
    /// # Errors
    /// What cannot be carried. What was just on its way (a connection that nobody has accepted yet) has been given time to
    /// arrive.
    pub fn stop(&mut self, extra: &[(String, Vec<u8>)]) -> Result<Stopped<'_>> {
        let watch = Watch::prepare(&self.subject, true, false)?;
        let writer = self.writer("leaving")?;
        for (name, content) in extra {
            writer.raw_file(name, content)?;
        }
        self.brake = None;
        let mut tried = 0;
        let (frozen, all, collecting) = loop {
            tried += 1;
            match self.try_stop() {
                Err(error @ Error::Refused { .. }) if tried < STOP_TRIES => {
                    tracing::info!(%error, "the container runs on for a moment");
                    std::thread::sleep(Duration::from_millis(5 << tried.min(5)));
                }
                stopped => break stopped?,
            }
        };
        for visitor in &frozen.visitors {
            tracing::warn!("process {} was started by exec: it is left behind", visitor.pid);
        }
        let sent = Sent { freezing: frozen.freezing, collecting, ..Sent::default() };
        Ok(Stopped { departure: self, all, frozen, watch, writer, sent })
    }

    fn try_stop(&self) -> Result<(Frozen<'static>, Collection, Duration)> {
        let mut frozen = Frozen::freeze(self.subject.init, None)?;
        frozen.run_out()?;
        let at = Instant::now();
        let all = collect(&frozen, &self.subject, &self.mappings, Depth::Whole { keep_established: true })?;
        Ok((frozen, all, at.elapsed()))
    }

    fn send_memory(
        &mut self,
        all: &Collection,
        ghosts: &ghost::Found,
        scan: Scan,
        missing: &Missing,
        sent: &mut Sent,
        out: &mut dyn Outlet,
    ) -> Result<()> {
        let alive = || all.hosts.iter().zip(all.tree.processes.iter().filter_map(|p| p.alive.as_ref()));
        let mut objects: BTreeMap<PagesOf, Shmem> = BTreeMap::new();
        for (host, process) in alive() {
            let of = PagesOf::Task(host.inside);
            if let Some(found) = self.private_runs(host, &process.mm.vmas, ghosts, scan)? {
                present(of, &found, sent, out)?;
                let from: &dyn PageReader = if scan == Scan::Track { &Running(&host.memory) } else { &&host.memory };
                let new = found.iter().filter(|r| !r.in_parent).map(Span::of);
                for span in new.chain(overlap(missing, of, &found)) {
                    send(of, span, from, sent, out)?;
                }
            }
            for v in &process.mm.vmas {
                let Content::Shmem(id) = mm::content(v) else { continue };
                // While the container runs, it may have been unmapped since.
                if let (false, Ok(object)) =
                    (objects.contains_key(&PagesOf::Shmem(id)), Shmem::open(host.pid, v.start, v.end))
                {
                    objects.insert(PagesOf::Shmem(id), object);
                }
            }
        }
        let init = self.subject.init;
        for segment in &all.tree.sysv {
            let id = segment.desc.id;
            let Ok(object) = sysv::open(init, id.cast_signed()) else { continue };
            // A segment's id is an inode number too, as that of a shared mapping is.
            if objects.insert(PagesOf::Shmem(id.into()), Shmem::of(object)).is_some() {
                let why = format!("two shared memory objects have the number {id}");
                return Err(Error::refused(init, Why::Other { why, remedy: "stop and start the container instead" }));
            }
        }
        self.shared.retain(|of, _| objects.contains_key(of));
        for (of, object) in &objects {
            let found = object.runs().map_err(|e| Error::proc(init, e))?;
            present(*of, &found, sent, out)?;
            let known = self.shared.entry(*of).or_default();
            let inside: BTreeSet<u64> = found.iter().flat_map(|r| Span::of(r).addresses()).collect();
            known.retain(|at, _| inside.contains(at));
            overlap(missing, *of, &found).flat_map(Span::addresses).for_each(|at| {
                known.remove(&at);
            });
            for run in &found {
                send_changed(*of, Span::of(run), object, known, sent, out)?;
            }
        }
        Ok(())
    }

    /// The pages of one process. None: it has ended, which only one that runs can.
    fn private_runs(
        &self,
        host: &Host,
        vmas: &[VmaEntry],
        ghosts: &ghost::Found,
        scan: Scan,
    ) -> Result<Option<Vec<PageRun>>> {
        let gone = |e: &io::Error| {
            scan == Scan::Track && matches!(e.raw_os_error(), Some(libc::ESRCH | libc::ENOENT)) || is_untracked(e)
        };
        let pages = match Pagemap::open(host.pid) {
            Err(e) if gone(&e) => return Ok(None),
            pages => pages.map_err(|e| Error::proc(host.pid, e))?,
        };
        let uffd = self.session.of(host.pid);
        let mut all = Vec::new();
        for v in vmas.iter().filter(|v| mm::content(v) == Content::Private) {
            let mut found = runs(&pages, v.start, v.end, is_file_mapping(v), scan);
            if found.as_ref().is_err_and(is_untracked) {
                // New, or moved here: all that it holds is new.
                let tracked = scan == Scan::Track && uffd.is_some_and(|uffd| uffd.track(v.start, v.end).is_ok());
                found =
                    runs(&pages, v.start, v.end, is_file_mapping(v), if tracked { Scan::Track } else { Scan::Full });
                found.iter_mut().flatten().for_each(|r| r.in_parent = false);
            }
            match found {
                Ok(mut found) => {
                    // The other side makes a nameless file anew in each round, and maps that.
                    if is_file_mapping(v) && ghosts.is_of(v.shmid as u32) {
                        found.iter_mut().for_each(|r| r.in_parent = false);
                    }
                    all.append(&mut found);
                }
                Err(e) if gone(&e) => {}
                Err(e) => return Err(Error::proc(host.pid, e)),
            }
        }
        Ok(Some(all))
    }
}

fn sending() -> impl FnOnce(io::Error) -> Error {
    Error::system("send to the destination")
}

/// What of `missing` there is.
fn overlap<'a>(missing: &'a Missing, of: PagesOf, found: &'a [PageRun]) -> impl Iterator<Item = Span> + 'a {
    let wanted = missing.iter().filter(move |(whose, _)| *whose == of).map(|(_, span)| *span);
    wanted.flat_map(move |wanted| found.iter().filter_map(move |r| wanted.cut(Span::of(r))))
}

fn present(of: PagesOf, found: &[PageRun], sent: &mut Sent, out: &mut dyn Outlet) -> Result<()> {
    let mut spans: Vec<Span> = Vec::new();
    for span in found.iter().map(Span::of) {
        sent.pages_present += span.pages;
        match spans.last_mut() {
            Some(last) if last.end() == span.vaddr => last.pages += span.pages,
            _ => spans.push(span),
        }
    }
    out.present(of, &spans).map_err(sending())
}

fn send(of: PagesOf, span: Span, from: &dyn PageReader, sent: &mut Sent, out: &mut dyn Outlet) -> Result<()> {
    let mut bytes = vec![0; (span.end() - span.vaddr).min(PIECE) as usize];
    for at in (span.vaddr..span.end()).step_by(PIECE as usize) {
        let bytes = &mut bytes[..(span.end() - at).min(PIECE) as usize];
        from.read(at, bytes).map_err(Error::system(format!("read memory of {of} at {at:#x}")))?;
        out.pages(of, at, bytes).map_err(sending())?;
        sent.pages_sent += bytes.len() as u64 / PAGE_SIZE;
    }
    Ok(())
}

/// Those pages of an object whose digest is not the known one.
fn send_changed(
    of: PagesOf,
    span: Span,
    object: &Shmem,
    known: &mut BTreeMap<u64, u128>,
    sent: &mut Sent,
    out: &mut dyn Outlet,
) -> Result<()> {
    let mut bytes = vec![0; (span.end() - span.vaddr).min(PIECE) as usize];
    for start in (span.vaddr..span.end()).step_by(PIECE as usize) {
        let bytes = &mut bytes[..(span.end() - start).min(PIECE) as usize];
        object.read(start, bytes).map_err(Error::system(format!("read {of} at {start:#x}")))?;
        let pages = (start..).step_by(PAGE_SIZE as usize).zip(bytes.chunks_exact(PAGE_SIZE as usize));
        let changed: Vec<bool> = pages
            .map(|(at, page)| {
                let digest = xxh3_128(page);
                known.insert(at, digest) != Some(digest)
            })
            .collect();
        let mut at = 0;
        for same in changed.chunk_by(|a, b| a == b) {
            let (from, to) = (at * PAGE_SIZE as usize, (at + same.len()) * PAGE_SIZE as usize);
            if same[0] {
                out.pages(of, start + from as u64, &bytes[from..to]).map_err(sending())?;
                sent.pages_sent += same.len() as u64;
            }
            at += same.len();
        }
    }
    Ok(())
}

/// A container that stands still, and runs on when this is dropped.
#[derive(Debug)]
pub struct Stopped<'a> {
    departure: &'a mut Departure,
    all: Collection,
    frozen: Frozen<'static>,
    watch: Watch,
    writer: ImageWriter,
    sent: Sent,
}

impl Stopped<'_> {
    /// How long it has stood still, and what was sent of it.
    pub fn sent(&self) -> Sent {
        Sent { frozen: self.frozen.frozen_for(), ..self.sent }
    }

    /// Everything but the queues of connections. `missing` as in a round.
    pub fn send(&mut self, missing: &Missing, out: &mut dyn Outlet) -> Result<()> {
        self.all.tree.files.clone_from(&self.all.files.all.files);
        out.files(&busy(&self.all.tree)).map_err(sending())?;
        let ghosts = std::mem::take(&mut self.all.files.all.ghosts);
        let writer = self.departure.writer("following")?;
        write_tmpfs(self.departure.subject.init, &self.all.tmpfs, &writer)?;
        ghosts.write(&writer)?;
        // Socket queues and what else changes until the end is told again then.
        self.all.tree.write(&writer)?;
        out.images(writer.path()).map_err(sending())?;
        self.departure.send_memory(&self.all, &ghosts, Scan::Final, missing, &mut self.sent, out)
    }

    /// What the other side still lacks.
    pub fn send_missing(&mut self, missing: &Missing, out: &mut dyn Outlet) -> Result<()> {
        for (of, span) in missing {
            match of {
                PagesOf::Task(pid) => {
                    let host = self.all.hosts.iter().find(|h| h.inside == *pid);
                    let host = host.ok_or_else(|| Error::BadRecord { what: format!("there is no process {pid}") })?;
                    send(*of, *span, &&host.memory, &mut self.sent, out)?;
                }
                PagesOf::Shmem(_) => {
                    return Err(Error::BadRecord { what: format!("the destination lacks pages of {of}") });
                }
            }
        }
        Ok(())
    }

    /// Locks the connections and reads them, last of all: until now the kernel went on queueing what peers send.
    pub fn lock(mut self, out: &mut dyn Outlet) -> Result<Held> {
        let bracket = self.watch.enter(&mut self.all, Fate::Kill)?;
        self.all.take_records();
        self.all.tree.extra.network_lock = bracket.table();
        self.all.tree.write(&self.writer)?;
        out.images(self.writer.path()).map_err(sending())?;
        let init = self.departure.subject.init;
        Ok(Held { given_up: None, bracket, frozen: self.frozen, init, _files: self.all, sent: self.sent })
    }
}

/// A stopped container of which the other side has all. Dropped, it runs on here.
#[derive(Debug)]
pub struct Held {
    // The order in which they are dropped: nobody runs while connections are locked.
    given_up: Option<GivenUp>,
    bracket: Bracket,
    frozen: Frozen<'static>,
    init: libc::pid_t,
    _files: Collection,
    sent: Sent,
}

/// A cgroup that is frozen for the case that we die. Dropped, it is thawed.
#[derive(Debug)]
struct GivenUp(Box<dyn Freezer>);

impl Drop for GivenUp {
    fn drop(&mut self) {
        if let Err(error) = self.0.thaw() {
            tracing::warn!(%error, "the container's cgroup cannot be thawed");
        }
    }
}

impl Held {
    pub fn sent(&self) -> Sent {
        Sent { frozen: self.frozen.frozen_for(), ..self.sent }
    }

    /// From now on it neither runs nor is heard of even if we die.
    pub fn give_up(&mut self, freezer: Box<dyn Freezer>) -> Result<()> {
        // In this order: it must not run in a silence that nobody ends.
        let freeze = freezer.freeze();
        self.given_up = Some(GivenUp(freezer));
        freeze.map_err(Error::system("freeze the container's cgroup"))?;
        self.bracket.persist()
    }

    /// Takes [`Held::give_up`] back; dropped then, it runs on.
    pub fn take_back(&mut self) -> Result<()> {
        self.given_up = None;
        self.bracket.relent()
    }

    /// Leaves it as it is after [`Held::give_up`]: frozen and silent, for somebody else to decide.
    pub fn leave(mut self) {
        std::mem::forget(self.given_up.take());
    }

    /// The container ends here, and its connections without a word to their peers.
    pub fn end(mut self) -> Result<()> {
        self.bracket.commit(self.init)?;
        // Nobody runs: they are stopped by us, too.
        self.given_up = None;
        self.frozen.kill()?;
        self.bracket.hold()
    }
}
