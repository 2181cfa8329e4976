//! Dirty tracking from one checkpoint to the next, and the pre-dump that rests on it.
//!
//! The kernel notes writes to memory that is registered with a userfaultfd, for as long as somebody holds that. Between two
//! invocations of lmrun this is the *keeper*: a small process that holds the descriptors and waits for the
//! container's end. The file `tracking.json` beside the container's state says where it is and which image the notes go
//! back to. While a round is under way there is neither keeper nor file: if it is cut short, nothing is
//! trusted and the next one copies everything.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::Instant;

use libc::pid_t;
use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};

use super::collect::host_facts;
use super::dump::{write_all, write_stats};
use super::freeze::{Freezer, Frozen, Task};
use super::memory::{Round, Running, is_untracked, runs};
use super::{DumpReport, DumpRequest, Error, Result, Subject, checks};
use crate::image::dir::{ImageDir, ImageWriter};
use crate::image::format;
use crate::image::page_store::LocalPages;
use crate::image::pages::{PageReader, PageRun, PageSink, PagesOf};
use crate::image::records::lmrun::{LMRUN_VERSION, LmrunEntry};
use crate::sys::mem::Memory;
use crate::sys::pagemap::Pagemap;
use crate::sys::pidfd::PidFd;
use crate::sys::proc::{self, Vma};
use crate::sys::uffd::{self, Uffd};
use crate::sys::{fds, fork};
use crate::tracee::borrow::{Leader, Undo};

/// Whether this kernel can tell what was written since a pre-dump.
pub fn can_track() -> bool {
    Uffd::can_track()
}

/// Which process a userfaultfd belongs to: host pid and start time.
type Who = (pid_t, u64);

/// `tracking.json`
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    keeper: Who,
    /// The `dirty_token` of the image that the kernel's notes go back to.
    token: String,
    /// The keeper's descriptor for each process.
    uffds: Vec<(Who, i32)>,
}

fn note_path(subject: &Subject) -> PathBuf {
    subject.dir.join("tracking.json")
}

fn start_time(pid: pid_t) -> io::Result<u64> {
    proc::stat(pid).map(|s| s.start_time)
}

fn read_note(subject: &Subject) -> Result<Option<Note>> {
    let path = note_path(subject);
    match fs::read(&path) {
        // A note that cannot be read is a note of nothing.
        Ok(json) => {
            Ok(serde_json::from_slice::<Note>(&json).ok().filter(|n| start_time(n.keeper.0).ok() == Some(n.keeper.1)))
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::system(path.display())(e)),
    }
}

/// The token of an image directory; None: it was not made by a pre-dump of lmrun.
fn token_of(images: &ImageDir) -> Result<Option<String>> {
    if !images.exists(&format::LMRUN, 0)? {
        return Ok(None);
    }
    let entry: LmrunEntry = images.read_one(&format::LMRUN, 0)?;
    Ok(entry.dirty_token)
}

/// The kernel's notes go back to the parent image: what they do not name is unchanged since.
#[derive(Debug, Clone, Copy)]
pub struct Tracking;

impl Tracking {
    /// None: there is no parent, or another round has come between it and now.
    pub fn of_parent(subject: &Subject, parent: Option<&ImageDir>) -> Result<Option<Tracking>> {
        let Some(parent) = parent else { return Ok(None) };
        let (token, note) = (token_of(parent)?, read_note(subject)?);
        let same = token.is_some() && token == note.map(|n| n.token);
        if !same {
            tracing::warn!("the parent image is not the last pre-dump of this container: all pages are copied");
        }
        Ok(same.then_some(Tracking))
    }
}

/// The userfaultfds of a container's processes, in our hands for the length of a round.
#[derive(Debug, Default)]
pub(super) struct Session(HashMap<Who, Uffd>);

impl Session {
    /// Takes them over from the keeper, which ends. From now on nobody trusts the notes.
    pub fn take(subject: &Subject) -> Result<Session> {
        let Some(note) = read_note(subject)? else { return Ok(Session::default()) };
        let path = note_path(subject);
        fs::remove_file(&path).map_err(Error::system(path.display()))?;
        let mut all = HashMap::new();
        let keeper = PidFd::open(note.keeper.0).map_err(|e| Error::proc(note.keeper.0, e))?;
        for (who, fd) in note.uffds {
            all.insert(who, Uffd::adopt(keeper.get(fd).map_err(|e| Error::proc(note.keeper.0, e))?));
        }
        keeper.kill(libc::SIGKILL).map_err(|e| Error::proc(note.keeper.0, e))?;
        Ok(Session(all))
    }

    /// Leaves them to a new keeper.
    fn keep(self, subject: &Subject, token: String) -> Result<()> {
        let path = note_path(subject);
        let init = PidFd::open(subject.init).map_err(|e| Error::proc(subject.init, e))?;
        let failed = || Error::system("start the keeper");
        let (heard, word) = nix::unistd::pipe2(OFlag::O_CLOEXEC).map_err(|e| failed()(e.into()))?;
        fork::orphan(|| i32::from(self.stay(&init, &path, token, word.as_fd()).is_err())).map_err(failed())?;
        drop(word);
        // The next round may begin as soon as this one has ended: it must find the note.
        File::from(heard).read_exact(&mut [0]).map_err(failed())
    }

    /// The keeper's life. A byte on `word` says that its note is there.
    fn stay(&self, init: &PidFd, path: &Path, token: String, word: BorrowedFd<'_>) -> io::Result<()> {
        nix::unistd::setsid()?;
        nix::unistd::chdir("/")?;
        nix::sys::prctl::set_name(c"lmrun-keeper")?;
        let kept: Vec<_> = self.0.values().map(AsFd::as_fd).chain([init.as_fd(), word]).collect();
        fds::close_from_except(0, &kept)?;
        let me = std::process::id() as pid_t;
        let note = Note {
            keeper: (me, start_time(me)?),
            token,
            uffds: self.0.iter().map(|(who, u)| (*who, u.as_fd().as_raw_fd())).collect(),
        };
        let staging = path.with_extension("json.new");
        fs::write(&staging, serde_json::to_vec(&note)?)?;
        fs::rename(&staging, path)?;
        nix::unistd::write(word, &[0])?;
        while !init.wait_end(std::time::Duration::from_secs(3600))? {}
        // Not if a later round has put its own there.
        match fs::read(path).ok().and_then(|json| serde_json::from_slice::<Note>(&json).ok()) {
            Some(n) if n.keeper.0 == me => fs::remove_file(path),
            _ => Ok(()),
        }
    }

    /// The userfaultfd of a process.
    pub fn of(&self, pid: pid_t) -> Option<&Uffd> {
        self.0.get(&(pid, start_time(pid).ok()?))
    }

    /// The userfaultfd of a stopped process; made by it if we have none.
    pub fn ensure(&mut self, task: &Task, vmas: &[Vma], memory: &Memory) -> Result<Who> {
        let who = (task.pid, start_time(task.pid).map_err(|e| Error::proc(task.pid, e))?);
        if let Some(known) = self.0.get(&who) {
            // A program that was executed since has another address space; the old one answers ESRCH.
            let alive = vmas.iter().find(|v| is_trackable(v)).map(|v| known.track(v.start, v.end));
            if alive.is_some_and(|r| r.is_ok()) {
                return Ok(who);
            }
        }
        let mut leader = Leader::take(task.pid, &task.threads[0], vmas, memory, false, None)?;
        let fd = leader.call("userfaultfd", libc::SYS_userfaultfd, [uffd::OPEN_FLAGS.into()], Undo::Close)?;
        let ours = PidFd::open(task.pid).and_then(|p| p.get(fd as i32)).and_then(Uffd::tracking);
        leader.call("close", libc::SYS_close, [fd.into()], Undo::Nothing)?;
        leader.give_back()?;
        self.0.insert(who, ours.map_err(Error::system("take a task's userfaultfd"))?);
        Ok(who)
    }
}

/// Private memory whose pages a checkpoint holds. Shared memory is copied in the final checkpoint: others may write
/// to it by ways that leave no note.
fn is_trackable(v: &Vma) -> bool {
    !v.shared && !v.is_special()
}

/// A process that is to be read while it runs.
struct Target {
    who: Who,
    inside: u32,
    memory: Memory,
    pages: Pagemap,
    vmas: Vec<Vma>,
}

/// Copies memory while the container runs; the next checkpoint can leave out what is not written after that.
/// The container is stopped only to find its processes and mappings.
pub fn pre_dump(mut req: DumpRequest<'_>) -> Result<DumpReport> {
    let writer = ImageWriter::create(&req.images, req.parent.as_deref())?;
    let tracking = Tracking::of_parent(&req.subject, writer.parent())?;
    let mut session = Session::take(&req.subject)?;
    let mut report = DumpReport::default();
    let targets = targets(&req.subject, req.paused, &mut session, &mut report)?;
    let started = Instant::now();
    {
        let mut sink: Box<dyn PageSink + '_> = match req.pages.take() {
            Some(elsewhere) => elsewhere,
            None => Box::new(LocalPages::new(&writer)),
        };
        let mut work: Vec<(PagesOf, Vec<PageRun>, Box<dyn PageReader + '_>)> = Vec::new();
        for t in &targets {
            let of = PagesOf::Task(t.inside);
            let runs = t.runs(&session.0[&t.who], tracking.is_some())?;
            work.push((of, runs, Box::new(Running(&t.memory))));
        }
        write_all(work, &mut *sink, &mut report, req.progress)?;
        sink.finish()?;
    }
    let memory = started.elapsed();
    let token = fs::read_to_string("/proc/sys/kernel/random/uuid").map_err(Error::system("make a token"))?;
    let token = token.trim().to_owned();
    let entry = LmrunEntry {
        version: LMRUN_VERSION,
        host: host_facts(),
        dirty_token: Some(token.clone()),
        ..LmrunEntry::default()
    };
    writer.write(&format::LMRUN, 0, &[entry])?;
    session.0.retain(|who, _| targets.iter().any(|t| t.who == *who));
    // A keeper of notes that go back to an image which never appears is believed by nobody.
    session.keep(&req.subject, token)?;
    write_stats(&req.work, &report, memory)?;
    writer.commit()?;
    Ok(report)
}

/// Stops the container for a moment.
fn targets(
    subject: &Subject,
    paused: Option<&dyn Freezer>,
    session: &mut Session,
    report: &mut DumpReport,
) -> Result<Vec<Target>> {
    let mut frozen = Frozen::freeze(subject.init, paused)?;
    frozen.run_out()?;
    checks::namespaces(&frozen)?;
    checks::sharing(&frozen)?;
    let inside = checks::pids(&frozen)?;
    let mut all = Vec::new();
    for task in frozen.tasks.iter().filter(|t| !t.is_zombie()) {
        let io = |e| Error::proc(task.pid, e);
        let memory = Memory::open(task.pid).map_err(io)?;
        let vmas = proc::maps(task.pid).map_err(io)?;
        let who = session.ensure(task, &vmas, &memory)?;
        all.push(Target { who, inside: inside[&task.pid], memory, pages: Pagemap::open(task.pid).map_err(io)?, vmas });
    }
    (report.freezing, report.frozen) = (frozen.freezing, frozen.frozen_for());
    Ok(all)
}

impl Target {
    /// What there is to copy; from now on writes to it are noted.
    fn runs(&self, uffd: &Uffd, has_parent: bool) -> Result<Vec<PageRun>> {
        let mut all = Vec::new();
        for v in self.vmas.iter().filter(|v| is_trackable(v)) {
            let mut found = runs(&self.pages, v.start, v.end, v.inode != 0, Round::Track);
            if found.as_ref().is_err_and(is_untracked) {
                // New, or moved here. It may have changed once more: then it is new in the next round.
                if uffd.track(v.start, v.end).is_err() {
                    continue;
                }
                found = runs(&self.pages, v.start, v.end, v.inode != 0, Round::Track);
            }
            match found {
                Ok(runs) => all.extend(runs.into_iter().map(|r| PageRun { in_parent: r.in_parent && has_parent, ..r })),
                Err(e) if is_untracked(&e) => {}
                // The process has ended, or executes another program.
                Err(e) if matches!(e.raw_os_error(), Some(libc::ESRCH | libc::ENOENT)) => break,
                Err(e) => return Err(Error::proc(self.who.0, e)),
            }
        }
        Ok(all)
    }
}
