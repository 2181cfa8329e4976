//! From a checkpoint to what has to be done: pure, nothing is touched.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::fd::{BorrowedFd, OwnedFd};

use super::res::fd::ghost::Ghosts;
use super::res::mm::{self, Content};
use super::res::tmpfs;
use super::tree::{Process, Tree};
use super::{ClockOffsets, Error, RestoreRequest, Result, network};
use crate::image::dir::ImageDir;
use crate::image::page_source::{Extent, page_extents};
use crate::image::pages::PagesOf;
use crate::image::records::core::task_state;
use crate::sys::clock;
use crate::tracee::puppet::Stage;

/// How a process comes to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Birth {
    /// Made by its parent, in its parent's session of that time.
    Child { before_setsid: bool },
    /// Made by `maker`, a member of its session, as a sibling (CLONE_PARENT): both have the same parent.
    Sibling { maker: u32 },
    /// Its session's leader is gone: made by a stand-in for it, as a sibling.
    Orphan { session: u32 },
}

/// A checkpoint that can be restored.
#[derive(Debug)]
pub struct Plan {
    pub(super) tree: Tree,
    pub(super) births: HashMap<u32, Birth>,
    pub(super) stage: Stage,
    /// Where all pages are; None: they come by themselves, to a standby.
    pub(super) pages: Option<BTreeMap<PagesOf, Vec<Extent>>>,
    pub(super) external: HashMap<Vec<u8>, OwnedFd>,
    pub(super) ghosts: Ghosts,
    /// The content of the container's own tmpfs mounts.
    pub(super) tmpfs: Option<std::fs::File>,
    pub(super) work: std::path::PathBuf,
}

/// Reads a checkpoint and finds out how to restore it, and whether that can be done.
pub fn plan(req: RestoreRequest) -> Result<Plan> {
    let dir = ImageDir::open(&req.images)?;
    let mut plan = Plan::of_records(&dir, req.work)?;
    if !plan.tree.streams.is_empty() && !req.tcp_established {
        let what = format!("holds {} established TCP connections; use --tcp-established", plan.tree.streams.len());
        return Err(Error::BadImage { path: req.images, what });
    }
    plan.pages = Some(pages(&dir, &plan.tree)?);
    Ok(plan)
}

fn pages(dir: &ImageDir, tree: &Tree) -> Result<BTreeMap<PagesOf, Vec<Extent>>> {
    let mut pages = BTreeMap::new();
    for (pid, alive) in tree.processes.iter().filter_map(|p| Some((p.entry.pid, p.alive.as_ref()?))) {
        let of = PagesOf::Task(pid);
        pages.insert(of, page_extents(dir, of)?);
        for v in &alive.mm.vmas {
            if let Content::Shmem(id) = mm::content(v) {
                let of = PagesOf::Shmem(id);
                if let std::collections::btree_map::Entry::Vacant(e) = pages.entry(of) {
                    e.insert(page_extents(dir, of)?);
                }
            }
        }
    }
    for segment in &tree.sysv {
        let of = PagesOf::Shmem(segment.desc.id.into());
        pages.insert(of, page_extents(dir, of)?);
    }
    Ok(pages)
}

impl Plan {
    /// A plan for a standby: of the records alone. `work`: where `stats-restore` goes.
    pub fn of_records(dir: &ImageDir, work: std::path::PathBuf) -> Result<Plan> {
        let tree = Tree::read(dir)?;
        let bad = |what: String| Error::BadImage { path: dir.path().to_owned(), what };
        check(&tree).map_err(&bad)?;
        let births = births(&tree.processes).map_err(&bad)?;
        let stage = Stage::find(mappings(&tree).collect());
        let ghosts = Ghosts::read(dir)?;
        let tmpfs = dir.file_if_there(tmpfs::ARCHIVE)?;
        Ok(Plan { births, stage, pages: None, external: HashMap::new(), ghosts, tmpfs, work, tree })
    }

    /// The pages of a task or an object, as far as they are in images.
    pub(super) fn extents(&self, of: PagesOf) -> &[Extent] {
        self.pages.as_ref().and_then(|pages| pages.get(&of)).map_or(&[], |extents| extents)
    }

    /// Names the files that replace those in [`Subject::external`](super::Subject): the dumped link and the new file.
    pub fn replace(&mut self, external: Vec<(String, OwnedFd)>) {
        self.external = really_external(&self.tree, external);
    }

    /// Keeps the peers of its connections silent in a network namespace, until the plan is carried out there.
    ///
    /// # Errors
    /// What the packet filter says.
    pub fn hold_peers(&self, netns: BorrowedFd<'_>) -> Result<()> {
        network::hold_peers(&self.tree, netns)
    }

    /// What the clocks of the container's time namespace must be ahead of ours to go on where they were.
    pub fn clock_offsets(&self) -> ClockOffsets {
        let ahead = |dumped: &crate::image::records::ns::Timespec, now: i128| {
            let by = i128::from(dumped.tv_sec) * clock::NANOS + i128::from(dumped.tv_nsec) - now;
            (by.div_euclid(clock::NANOS) as i64, by.rem_euclid(clock::NANOS) as u32)
        };
        ClockOffsets {
            monotonic: ahead(&self.tree.time.monotonic, clock::monotonic()),
            boottime: ahead(&self.tree.time.boottime, clock::boottime()),
        }
    }
}

/// Keeps what really comes from outside: a pipe or a pair of sockets with both ends inside is the container's own, even
/// when init has one of them as a standard stream.
fn really_external(tree: &Tree, given: Vec<(String, OwnedFd)>) -> HashMap<Vec<u8>, OwnedFd> {
    let mut ends: HashMap<Vec<u8>, BTreeSet<u32>> = HashMap::new();
    for p in tree.files.iter().filter_map(|f| f.pipe.as_ref()) {
        ends.entry(format!("pipe:[{}]", p.pipe_id).into_bytes()).or_default().insert(p.flags & libc::O_ACCMODE as u32);
    }
    let pipe = |link: &[u8]| ends.get(link).is_some_and(|e| e.len() > 1 || e.contains(&(libc::O_RDWR as u32)));
    let sockets: BTreeMap<u32, u32> =
        tree.files.iter().filter_map(|f| f.usk.as_ref()).map(|s| (s.ino, s.peer)).collect();
    let socket = |link: &[u8]| {
        let own = sockets.iter().find(|(ino, _)| format!("socket:[{ino}]").as_bytes() == link);
        own.is_some_and(|(_, peer)| *peer == 0 || sockets.contains_key(peer))
    };
    let links = given.into_iter().map(|(link, fd)| (link.into_bytes(), fd));
    links.filter(|(link, _)| !pipe(link) && !socket(link)).collect()
}

/// Start and end of all mappings of all processes.
pub(super) fn mappings(tree: &Tree) -> impl Iterator<Item = (u64, u64)> {
    tree.processes.iter().filter_map(|p| p.alive.as_ref()).flat_map(|a| &a.mm.vmas).map(|v| (v.start, v.end))
}

fn check(tree: &Tree) -> std::result::Result<(), String> {
    let mut pids = BTreeSet::new();
    let files: BTreeSet<u32> = tree.files.iter().map(|f| f.id).collect();
    for (index, p) in tree.processes.iter().enumerate() {
        let e = &p.entry;
        let is_init = e.pid == 1 && e.ppid == 0;
        if (index == 0) != is_init || (index > 0 && !pids.contains(&e.ppid)) {
            return Err(format!("process {} with parent {} is out of place", e.pid, e.ppid));
        }
        if e.threads.first() != Some(&e.pid) || p.cores.len() != e.threads.len() {
            return Err(format!("process {} has no main thread", e.pid));
        }
        if !e.threads.iter().all(|t| pids.insert(*t)) {
            return Err(format!("process {} has a thread whose id is taken", e.pid));
        }
        let Some(alive) = &p.alive else { continue };
        let paths = [alive.mm.exe_file_id, alive.fs.cwd_id, alive.fs.root_id];
        let mapped = alive.mm.vmas.iter().filter(|v| is_file_mapping(v)).map(|v| v.shmid as u32);
        let all = alive.fds.iter().map(|f| f.id).chain(paths).chain(mapped);
        if let Some(missing) = all.into_iter().find(|id| !files.contains(id)) {
            return Err(format!("process {} has file {missing:#x}, of which there is no record", e.pid));
        }
        let mut end = 0;
        for v in &alive.mm.vmas {
            if v.start < end || v.end <= v.start || !(v.start | v.end).is_multiple_of(4096) {
                return Err(format!("process {} has a mapping {:x}-{:x} that is out of place", e.pid, v.start, v.end));
            }
            end = v.end;
        }
        for core in &p.cores {
            if core.thread_info.is_none() || core.thread_core.is_none() {
                return Err(format!("process {} has a thread without registers", e.pid));
            }
        }
    }
    Ok(())
}

/// A mapping that shows a file of `files.img`.
pub(super) fn is_file_mapping(v: &crate::image::records::mm::VmaEntry) -> bool {
    use crate::image::records::mm::vma_status::{FILE_PRIVATE, FILE_SHARED};
    v.status & (FILE_PRIVATE | FILE_SHARED) != 0
}

/// Whether a process is a zombie.
pub(super) fn is_zombie(p: &Process) -> bool {
    p.alive.is_none()
}

/// Whether a process was stopped by job control.
pub(super) fn is_stopped(p: &Process) -> bool {
    p.cores[0].tc.as_ref().is_some_and(|tc| tc.task_state == task_state::STOPPED)
}

fn births(all: &[Process]) -> std::result::Result<HashMap<u32, Birth>, String> {
    let by_pid: HashMap<u32, &Process> = all.iter().map(|p| (p.entry.pid, p)).collect();
    // The session in which a process was before it made one of its own.
    let mut born_in: HashMap<u32, u32> = HashMap::new();
    let mut births = HashMap::new();
    for p in all {
        let e = &p.entry;
        let Some(parent) = by_pid.get(&e.ppid).map(|p| &p.entry) else {
            born_in.insert(e.pid, 0);
            continue;
        };
        let own = e.sid == e.pid;
        let before = born_in[&parent.pid];
        born_in.insert(e.pid, if own { parent.sid } else { e.sid });
        let birth = if own || e.sid == parent.sid {
            Birth::Child { before_setsid: false }
        } else if parent.sid == parent.pid && e.sid == before {
            Birth::Child { before_setsid: true }
        } else {
            match by_pid.get(&e.sid) {
                // Its leader was never a child of the same parent: nobody else can put it there.
                Some(leader) if leader.entry.ppid == e.ppid => Birth::Sibling { maker: e.sid },
                Some(_) => {
                    return Err(format!("process {} is in session {}, which lmrun cannot rebuild", e.pid, e.sid));
                }
                None => Birth::Orphan { session: e.sid },
            }
        };
        births.insert(e.pid, birth);
    }
    Ok(births)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::records::core::{CoreEntry, TaskCoreEntry};
    use crate::image::records::inventory::PstreeEntry;

    fn process(pid: u32, ppid: u32, sid: u32) -> Process {
        let entry = PstreeEntry { pid, ppid, pgid: pid, sid, threads: vec![pid] };
        let tc = TaskCoreEntry { task_state: task_state::DEAD, ..TaskCoreEntry::default() };
        // Alive or not decides only whether it can be a maker.
        Process { entry, cores: vec![CoreEntry { tc: Some(tc), ..CoreEntry::default() }], alive: None }
    }

    #[test]
    fn sessions_decide_who_makes_whom() {
        let tree = [process(1, 0, 1), process(2, 1, 1), process(3, 2, 3), process(4, 3, 1), process(5, 1, 9)];
        let b = births(&tree).unwrap();
        assert_eq!(b[&2], Birth::Child { before_setsid: false });
        assert_eq!(b[&3], Birth::Child { before_setsid: false });
        assert_eq!(b[&4], Birth::Child { before_setsid: true });
        assert_eq!(b[&5], Birth::Orphan { session: 9 });
    }
}
