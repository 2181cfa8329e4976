//! Stopping a container's tasks, all of them, and letting them go again.
//!
//! By ptrace alone and not by the cgroup freezer: the kernel resumes the tracees of a tracer that dies, while a
//! frozen cgroup would stay frozen (docs/decisions/0002-freeze-by-ptrace.md).

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::time::{Duration, Instant};

use libc::{c_int, pid_t};

use super::res::task::signals;
use super::{Error, Result, Why};
use crate::sys::mem::Memory;
use crate::sys::pidfd::PidFd;
use crate::sys::proc;
use crate::sys::ptrace::{self, Status};
use crate::tracee::{Thread, borrow, hide_stop};

/// How long a task may take to stop before it is called stuck.
const PATIENCE: Duration = Duration::from_secs(2);

/// A process of the container, stopped.
#[derive(Debug)]
pub struct Task {
    /// Host pid.
    pub pid: pid_t,
    /// Host pid of the parent; None for the container's init.
    pub parent: Option<pid_t>,
    /// The leader first; empty for a zombie.
    pub threads: Vec<Thread>,
    /// Stopped by this signal before we came.
    pub stopped: Option<c_int>,
}

impl Task {
    pub fn is_zombie(&self) -> bool {
        self.threads.is_empty()
    }
}

/// The freezer of a container that was paused before its checkpoint.
pub trait Freezer: std::fmt::Debug {
    fn freeze(&self) -> io::Result<()>;
    fn thaw(&self) -> io::Result<()>;
}

/// All tasks of a container, stopped. They run on when the value is dropped, or are paused again.
#[derive(Debug)]
pub struct Frozen<'a> {
    /// Parents before their children.
    pub tasks: Vec<Task>,
    /// Processes that came into the container from outside (exec) and have no parent in it.
    pub visitors: Vec<Task>,
    /// Every thread that is attached.
    seized: BTreeSet<pid_t>,
    since: Instant,
    /// Time until every task had stopped.
    pub freezing: Duration,
    paused: Option<&'a dyn Freezer>,
}

impl<'a> Frozen<'a> {
    /// Stops the tree of processes below `init` (a host pid). Of a paused container nobody runs before it stops here.
    pub fn freeze(init: pid_t, paused: Option<&'a dyn Freezer>) -> Result<Frozen<'a>> {
        let since = Instant::now();
        let mut me = Frozen {
            tasks: Vec::new(),
            visitors: Vec::new(),
            seized: BTreeSet::new(),
            since,
            freezing: Duration::ZERO,
            paused: None,
        };
        // The cgroup is quick to read. Who is not in it, or has just been made, is found in the tree once that stands still.
        let known = cgroup_tree(init)?;
        me.stop(&[known.as_slice(), &visitors(init, &known)?].concat(), paused)?;
        let tree = loop {
            let tree = tree(init)?;
            if !me.stop(&[tree.as_slice(), &visitors(init, &tree)?].concat(), None)? {
                break tree;
            }
        };
        me.describe(init, &tree)?;
        Ok(me)
    }

    /// How long the tasks have been stopped, the time to stop them included.
    pub fn frozen_for(&self) -> Duration {
        self.since.elapsed()
    }

    /// Stops the threads of these processes that were not yet; false: there are none. What is frozen stops only as it
    /// thaws, and before it runs any code of its own.
    fn stop(&mut self, pids: &[pid_t], paused: Option<&'a dyn Freezer>) -> Result<bool> {
        let mut new = Vec::new();
        for &pid in pids {
            let tids = match proc::threads(pid) {
                Ok(tids) => tids,
                Err(e) if is_gone(&e) => continue,
                Err(e) => return Err(Error::proc(pid, e)),
            };
            for tid in tids {
                if !self.seized.contains(&tid) && seize(pid, tid)? {
                    self.seized.insert(tid);
                    new.push((pid, tid));
                }
            }
        }
        if let Some(freezer) = paused {
            freezer.thaw().map_err(Error::system("thaw the paused container"))?;
            self.paused = paused;
        }
        let mut stopped = Vec::new();
        for &(pid, tid) in &new {
            match wait_stopped(tid, self.since + PATIENCE)? {
                Some(signal) => stopped.push((pid, tid, signal)),
                None => drop(self.seized.remove(&tid)),
            }
        }
        if !stopped.is_empty() {
            self.freezing = self.since.elapsed();
        }
        for (pid, tid, signal) in stopped {
            let stopped = Some(signal).filter(|s| *s != libc::SIGTRAP);
            self.tasks.push(Task { pid, parent: None, threads: vec![Thread::read(tid)?], stopped });
        }
        Ok(!new.is_empty())
    }

    /// Merges what was found thread by thread, and adds parents, order and zombies.
    fn describe(&mut self, init: pid_t, tree: &[pid_t]) -> Result<()> {
        let mut found: HashMap<pid_t, (Vec<Thread>, Option<c_int>)> = HashMap::new();
        for mut task in std::mem::take(&mut self.tasks) {
            let (threads, stopped) = found.entry(task.pid).or_default();
            threads.append(&mut task.threads);
            *stopped = stopped.or(task.stopped);
        }
        for &pid in tree {
            let stat = proc::stat(pid).map_err(|e| Error::proc(pid, e))?;
            let (mut threads, stopped) = found.remove(&pid).unwrap_or_default();
            threads.sort_by_key(|t| (t.tid != pid, t.tid));
            if threads.first().is_some_and(|t| t.tid != pid) {
                return Err(Error::refused(pid, Why::LeaderGone));
            }
            self.tasks.push(Task { pid, parent: (pid != init).then_some(stat.ppid), threads, stopped });
        }
        let visitor = |(pid, (threads, stopped))| Task { pid, parent: None, threads, stopped };
        self.visitors = found.into_iter().map(visitor).collect();
        Ok(())
    }

    /// Lets threads that an earlier lmrun left in the middle of a remote call come out of it.
    pub fn run_out(&mut self) -> Result<()> {
        for task in self.tasks.iter_mut().filter(|t| !t.is_zombie()) {
            let memory = Memory::open(task.pid).map_err(|e| Error::proc(task.pid, e))?;
            let maps = proc::maps(task.pid).map_err(|e| Error::proc(task.pid, e))?;
            for thread in &mut task.threads {
                *thread = borrow::run_out(thread.clone(), task.pid, &maps, &memory)?;
            }
        }
        Ok(())
    }

    /// The container ends here: kills every task and waits until its init is gone.
    pub fn kill(mut self) -> Result<()> {
        let mut tasks = std::mem::take(&mut self.tasks);
        tasks.append(&mut self.visitors);
        self.seized.clear();
        let fds: Vec<PidFd> = tasks.iter().filter_map(|t| PidFd::open(t.pid).ok()).collect();
        for fd in &fds {
            match fd.kill(libc::SIGKILL) {
                Ok(()) => {}
                Err(e) if e.raw_os_error() == Some(libc::ESRCH) => {}
                Err(e) => return Err(Error::proc(tasks[0].pid, e)),
            }
        }
        // A tracer is told of the end of its tracees; until it has heard it they stay, and so does who waits for
        // them: init's last thread for all the others, a leader for its threads. So in whatever order they end.
        let mut left: Vec<pid_t> = tasks.iter().flat_map(|t| t.threads.iter().map(|thread| thread.tid)).collect();
        // A visitor's parent is somebody else, who may not care for it.
        let deadline = Instant::now() + 5 * PATIENCE;
        while !left.is_empty() && Instant::now() < deadline {
            left.retain(|tid| match ptrace::wait(*tid, true) {
                Ok(status) => !matches!(status, Some(Status::Exited(_) | Status::Killed(_))),
                Err(_) => false,
            });
            std::thread::sleep(Duration::from_micros(50));
        }
        Ok(())
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        // Before they are let go, so that nobody runs.
        if let Some(Err(error)) = self.paused.filter(|_| !self.seized.is_empty()).map(Freezer::freeze) {
            tracing::warn!(%error, "the container was paused before its checkpoint and runs now");
        }
        // Children first, so that nobody sees a stopped child; errors mean that the task is gone.
        for thread in self.tasks.iter().chain(&self.visitors).flat_map(|t| &t.threads) {
            let _ = hide_stop(thread, is_signalled(thread).unwrap_or(true));
        }
        for tid in self.seized.iter().rev() {
            let _ = ptrace::detach(*tid, 0);
        }
    }
}

/// Whether a signal waits that the thread does not block.
fn is_signalled(thread: &Thread) -> Result<bool> {
    let (own, shared) = (signals::collect_pending(thread.tid, false)?, signals::collect_pending(thread.tid, true)?);
    Ok(signals::is_signalled(&own, &shared, thread.mask))
}

/// The members of init's cgroup that are its descendants, and init.
fn cgroup_tree(init: pid_t) -> Result<Vec<pid_t>> {
    let members = proc::cgroup_members(init).map_err(|e| Error::proc(init, e))?;
    let parents: HashMap<pid_t, pid_t> = members.iter().filter_map(|p| Some((*p, proc::stat(*p).ok()?.ppid))).collect();
    let descends = |pid: &pid_t| {
        let line = std::iter::successors(Some(*pid), |p| parents.get(p).copied().filter(|_| *p != init));
        line.take(parents.len() + 1).any(|p| p == init)
    };
    let mut all: Vec<pid_t> = parents.keys().copied().filter(|p| *p != init).filter(descends).collect();
    all.insert(0, init);
    Ok(all)
}

/// The living members of init's cgroup and pid namespace that are not of its tree.
fn visitors(init: pid_t, tree: &[pid_t]) -> Result<Vec<pid_t>> {
    let members = proc::cgroup_members(init).map_err(|e| Error::proc(init, e))?;
    let own = proc::link(init, "ns/pid").map_err(|e| Error::proc(init, e))?;
    let others = members.into_iter().filter(|pid| !tree.contains(pid));
    Ok(others.filter(|pid| proc::link(*pid, "ns/pid").is_ok_and(|theirs| theirs == own)).collect())
}

/// The processes of the tree, parents before children.
fn tree(init: pid_t) -> Result<Vec<pid_t>> {
    let mut all = vec![init];
    let mut next = 0;
    while next < all.len() {
        match proc::children(all[next]) {
            Ok(children) => all.extend(children),
            Err(e) if is_gone(&e) => {}
            Err(e) => return Err(Error::proc(all[next], e)),
        }
        next += 1;
    }
    let mut seen = BTreeSet::new();
    all.retain(|pid| seen.insert(*pid));
    Ok(all)
}

/// False: the task has ended, or is a zombie.
fn seize(pid: pid_t, tid: pid_t) -> Result<bool> {
    let options = ptrace::O_TRACESYSGOOD | ptrace::O_SUSPEND_SECCOMP;
    let done = ptrace::seize(tid, options).and_then(|()| ptrace::interrupt(tid));
    match done {
        Ok(()) => Ok(true),
        Err(e) if is_gone(&e) => Ok(false),
        Err(e) => {
            let stat = proc::stat(tid);
            match stat {
                Ok(s) if s.state == 'Z' || s.state == 'X' => Ok(false),
                Err(gone) if is_gone(&gone) => Ok(false),
                _ => Err(Error::refused(pid, Why::CannotSeize { tid, source: e })),
            }
        }
    }
}

fn is_gone(e: &io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::ESRCH | libc::ENOENT))
}

/// The signal of the stop: SIGTRAP, or that of a group stop. None: the task has ended.
fn wait_stopped(tid: pid_t, deadline: Instant) -> Result<Option<c_int>> {
    let mut tries = 0u32;
    loop {
        let status = match ptrace::wait(tid, true) {
            Ok(status) => status,
            Err(e) if e.raw_os_error() == Some(libc::ECHILD) => return Ok(None),
            Err(e) => return Err(Error::proc(tid, e)),
        };
        match status {
            Some(Status::Event(ptrace::EVENT_STOP, signal)) => return Ok(Some(signal)),
            Some(Status::Exited(_) | Status::Killed(_)) => return Ok(None),
            Some(Status::Signal(signal)) => ptrace::cont(tid, signal).map_err(|e| Error::proc(tid, e))?,
            Some(_) => ptrace::cont(tid, 0).map_err(|e| Error::proc(tid, e))?,
            None if Instant::now() > deadline => {
                let state = proc::stat(tid).map_or('?', |s| s.state);
                return Err(Error::refused(tid, Why::DoesNotStop { state }));
            }
            None if tries < 100 => std::thread::yield_now(),
            None => std::thread::sleep(Duration::from_micros(50)),
        }
        tries += 1;
    }
}
