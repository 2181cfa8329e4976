//! From a plan and one puppet to a running container.
//!
//! `family` makes the processes, each with its address space before it has children, so that what parent and child share
//! stays shared; `files` gives them their files, `threads` their threads and all that is a thread's own. The commit is
//! the detach: until then all of them die with lmrun.

pub(super) mod family;
mod files;
pub(super) mod space;
mod threads;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use libc::pid_t;

use super::network::{Peers, Revival};
use super::plan::{self, Plan};
use super::res::fd::{Workshop, inotify, unix};
use super::res::{sysv, tmpfs};
use super::tree::Process;
use super::{Error, Freezer, Puppet as FirstPuppet, Result};
use crate::image::dir;
use crate::image::format;
use crate::image::pages::{PagesOf, Span};
use crate::image::records::stats::{RestoreStatsEntry, StatsEntry};
use crate::sys::mem::Memory;
use crate::sys::{clock, ptrace};
use crate::tracee::puppet::Puppet;

/// What a restore did.
#[derive(Debug, Clone, Default)]
pub struct RestoreReport {
    /// Until all processes were there, with their memory.
    pub forking: Duration,
    pub total: Duration,
    pub pages: u64,
    /// Attributes that this host cannot give, in words.
    pub missed: Vec<String>,
}

/// A process that is being built.
#[derive(Debug)]
pub(super) struct Built {
    /// Host pid.
    pub pid: pid_t,
    pub main: Puppet,
    pub memory: Memory,
    /// All threads but the main one, in the order of the record.
    pub others: Vec<Puppet>,
    /// What it has of the memory of the process that made it.
    pub inherited: Vec<Span>,
}

impl Built {
    pub fn adopt(pid: pid_t, main: Puppet) -> Result<Built> {
        let memory = Memory::open(pid).map_err(|e| Error::proc(pid, e))?;
        Ok(Built { pid, main, memory, others: Vec::new(), inherited: Vec::new() })
    }
}

/// What is shared while a container is built.
#[derive(Debug)]
pub(super) struct Site {
    pub plan: Plan,
    pub control: UnixStream,
    /// The descriptor at which every puppet has its end of `control`; above it is room for others in passing.
    pub parking: i32,
    pub shop: Workshop,
    /// Open files by id.
    pub files: HashMap<u32, OwnedFd>,
    /// Shared memory objects by id.
    pub objects: HashMap<u64, OwnedFd>,
    /// Files that have had their first holder do its part.
    pub linked: HashSet<u32>,
    pub report: RestoreReport,
}

impl Plan {
    /// Builds the container around its first puppet and lets it run.
    ///
    /// # Errors
    /// After an error no task of the container is left but what its pid namespace's init takes with it: the caller kills that.
    pub fn rebuild(self, first: FirstPuppet) -> Result<RestoreReport> {
        let start = Instant::now();
        let (mut site, init) = Site::begin(self, first)?;
        site.shop.network = Revival::prepare(init.pid, &mut site.plan.tree, Peers::Hear)?;
        let mut all = BTreeMap::from([(1, init)]);
        let mut stand_ins = family::StandIns::default();
        family::root(&mut site, &mut all)?;
        family::raise(&mut site, &mut all, &mut stand_ins)?;
        family::settle(&site, &mut all, stand_ins)?;
        site.report.forking = start.elapsed();
        let ready = site.finish(all)?;
        let mut report = ready.go()?;
        report.total = start.elapsed();
        Ok(report)
    }
}

impl Site {
    /// Everything that comes before the processes; gives the first puppet, ready to be driven.
    pub fn begin(mut plan: Plan, first: FirstPuppet) -> Result<(Site, Built)> {
        let highest =
            plan.tree.processes.iter().filter_map(|p| p.alive.as_ref()).flat_map(|a| &a.fds).map(|f| f.fd).max();
        // A standby's processes may open more until they are built.
        let margin = if plan.pages.is_none() { STANDBY_FDS } else { 0 };
        let parking = highest.unwrap_or(0) as i32 + 1 + margin;
        let shop = workshop(first.pid, &mut plan)?;
        let mut report = RestoreReport::default();
        fill_tmpfs(first.pid, &mut plan)?;
        for segment in &plan.tree.sysv {
            report.pages += sysv::create(first.pid, segment, plan.extents(PagesOf::Shmem(segment.desc.id.into())))?;
        }
        let main = Puppet::seize(first.pid, plan.stage)?;
        let mut init = Built::adopt(first.pid, main)?;
        init.settle(parking)?;
        let site = Site {
            plan,
            control: first.control,
            parking,
            shop,
            files: HashMap::new(),
            objects: HashMap::new(),
            linked: HashSet::new(),
            report,
        };
        Ok((site, init))
    }

    /// The record of a process.
    pub fn process(&self, pid: u32) -> Result<Process> {
        self.plan.tree.processes.iter().find(|p| p.entry.pid == pid).cloned().ok_or_else(|| missing(pid))
    }

    /// All that is left when the processes are there with their memory. They stand still until [`Ready::go`].
    pub fn finish(mut self, mut all: BTreeMap<u32, Built>) -> Result<Ready> {
        let init = built(&mut all, 1)?.pid;
        self.plan.tree.sysv.iter().try_for_each(|segment| sysv::finish(init, segment))?;
        let processes = std::mem::take(&mut self.plan.tree.processes);
        let alive = || processes.iter().filter_map(|p| Some((p, p.alive.as_ref()?)));
        self.shop.pids = all.iter().map(|(inside, built)| (*inside, built.pid)).collect();
        for (p, a) in alive() {
            files::place(&mut self, &mut all, p.entry.pid, a)?;
        }
        for (p, a) in alive() {
            let built = built(&mut all, p.entry.pid)?;
            threads::make(built, p)?;
            files::link(&mut self, built, p.entry.pid, a)?;
            space::finish(built, a)?;
        }
        let has = threads::capabilities(built(&mut all, 1)?.pid)?;
        for (p, a) in alive() {
            let missed = threads::dress(built(&mut all, p.entry.pid)?, p, a, &self.plan.tree.seccomp, has)?;
            self.report.missed.extend(missed);
        }
        for (p, a) in alive() {
            threads::undress(built(&mut all, p.entry.pid)?, p, a, self.parking)?;
        }
        // From here on only we have what the puppets were given; a pipe's other end must not outlive them in us.
        self.files.clear();
        self.objects.clear();
        self.shop.close();
        inotify::arm(&mut self.shop)?;
        let mut going = Vec::new();
        for p in processes.iter().rev().filter(|p| !plan::is_zombie(p)) {
            let built = all.remove(&p.entry.pid).ok_or_else(|| missing(p.entry.pid))?;
            going.extend(threads::finish(built, p, self.plan.stage)?);
        }
        Ok(Ready { going, network: self.shop.network, report: self.report, work: self.plan.work })
    }
}

/// Descriptors that a container may open while its standby follows it.
const STANDBY_FDS: i32 = 4096;

/// What files are made with. The network's part is that of no connections.
pub(super) fn workshop(init: pid_t, plan: &mut Plan) -> Result<Workshop> {
    let root = std::fs::File::open(format!("/proc/{init}/root")).map_err(|e| Error::proc(init, e))?;
    let then = plan.tree.extra.host.realtime.unwrap_or(0);
    Ok(Workshop {
        root: root.into(),
        external: std::mem::take(&mut plan.external),
        ghosts: std::mem::take(&mut plan.ghosts),
        terminals: plan.tree.terminals.clone(),
        unarmed: Vec::new(),
        pipe_data: std::mem::take(&mut plan.tree.pipe_data),
        elapsed: (clock::realtime() as u64).saturating_sub(then),
        network: Revival::of_nothing(init)?,
        pids: HashMap::new(),
        pipes: HashMap::new(),
        unix: unix::Wiring::prepare(&mut plan.tree),
    })
}

pub(super) fn fill_tmpfs(init: pid_t, plan: &mut Plan) -> Result<()> {
    let Some(archive) = plan.tmpfs.take() else { return Ok(()) };
    tmpfs::restore(init, archive).map_err(Error::system("fill the container's tmpfs mounts"))
}

/// A container that is complete and stands still. Dropped, it is not let go: its tasks die with lmrun.
#[derive(Debug)]
pub struct Ready {
    going: Vec<pid_t>,
    network: Revival,
    report: RestoreReport,
    work: std::path::PathBuf,
}

impl Ready {
    /// Lets all tasks run, and their peers know.
    pub fn go(mut self) -> Result<RestoreReport> {
        self.network.go_live()?;
        self.let_go()?;
        write_stats(&self.work, &self.report)?;
        Ok(self.report)
    }

    /// Lets go of all tasks: from now on the container is complete without us, and its frozen cgroup holds it still, whatever
    /// becomes of us.
    pub fn detach(self, freezer: &dyn Freezer) -> Result<Detached> {
        freezer.freeze().map_err(Error::system("freeze the container's cgroup"))?;
        self.let_go()?;
        Ok(Detached { network: self.network, report: self.report })
    }

    fn let_go(&self) -> Result<()> {
        self.going.iter().try_for_each(|tid| ptrace::detach(*tid, 0).map_err(|e| Error::proc(*tid, e)))
    }
}

/// A container that is complete and whose cgroup is frozen. Its connections have not spoken yet; if this is dropped, they do not
/// before [`revive`](super::revive).
#[derive(Debug)]
pub struct Detached {
    network: Revival,
    report: RestoreReport,
}

impl Detached {
    /// Lets its connections go on; it runs when its cgroup is thawed.
    pub fn go_live(mut self) -> Result<RestoreReport> {
        self.network.go_live()?;
        Ok(self.report)
    }
}

fn write_stats(work: &std::path::Path, report: &RestoreReport) -> Result<()> {
    let micros = |d: Duration| u32::try_from(d.as_micros()).unwrap_or(u32::MAX);
    let entry = RestoreStatsEntry {
        forking_time: micros(report.forking),
        restore_time: micros(report.total),
        pages_restored: Some(report.pages),
        ..RestoreStatsEntry::default()
    };
    let stats = StatsEntry { dump: None, restore: Some(entry) };
    Ok(dir::write_stats(work, &format::STATS_RESTORE, &stats)?)
}

pub(super) fn missing(pid: u32) -> Error {
    Error::BadRecord { what: format!("process {pid} was not built") }
}

pub(super) fn built(all: &mut BTreeMap<u32, Built>, pid: u32) -> Result<&mut Built> {
    all.get_mut(&pid).ok_or_else(|| missing(pid))
}
