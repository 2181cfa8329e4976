//! From a plan and one puppet to a running container.
//!
//! `family` makes the processes, each with its address space before it has children, so that what parent and child share
//! stays shared; `files` gives them their files, `threads` their threads and all that is a thread's own. The commit is
//! the detach: until then all of them die with lmrun.

mod family;
mod files;
mod space;
mod threads;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use libc::pid_t;

use super::network::Revival;
use super::plan::{self, Plan};
use super::res::fd::{Workshop, inotify, unix};
use super::res::{sysv, tmpfs};
use super::{Error, Puppet as FirstPuppet, Result};
use crate::image::dir;
use crate::image::format;
use crate::image::pages::PagesOf;
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
}

impl Built {
    pub fn adopt(pid: pid_t, main: Puppet) -> Result<Built> {
        let memory = Memory::open(pid).map_err(|e| Error::proc(pid, e))?;
        Ok(Built { pid, main, memory, others: Vec::new() })
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
    pub fn rebuild(mut self, first: FirstPuppet) -> Result<RestoreReport> {
        let start = Instant::now();
        let highest =
            self.tree.processes.iter().filter_map(|p| p.alive.as_ref()).flat_map(|a| &a.fds).map(|f| f.fd).max();
        let parking = highest.unwrap_or(0) as i32 + 1;
        let root = std::fs::File::open(format!("/proc/{}/root", first.pid)).map_err(|e| Error::proc(first.pid, e))?;
        let then = self.tree.extra.host.realtime.unwrap_or(0);
        let shop = Workshop {
            root: root.into(),
            external: std::mem::take(&mut self.external),
            ghosts: std::mem::take(&mut self.ghosts),
            terminals: self.tree.terminals.clone(),
            unarmed: Vec::new(),
            pipe_data: std::mem::take(&mut self.tree.pipe_data),
            elapsed: (clock::realtime() as u64).saturating_sub(then),
            network: Revival::prepare(first.pid, &mut self.tree)?,
            pids: HashMap::new(),
            pipes: HashMap::new(),
            unix: unix::Wiring::prepare(&mut self.tree),
        };
        if let Some(archive) = self.tmpfs.take() {
            tmpfs::restore(first.pid, archive).map_err(Error::system("fill the container's tmpfs mounts"))?;
        }
        let mut report = RestoreReport::default();
        for segment in &self.tree.sysv {
            let extents = self.pages.get(&PagesOf::Shmem(segment.desc.id.into())).map_or(&[][..], |e| &e[..]);
            report.pages += sysv::create(first.pid, segment, extents)?;
        }
        let main = Puppet::seize(first.pid, self.stage)?;
        let mut init = Built::adopt(first.pid, main)?;
        init.settle(parking)?;
        let mut site = Site {
            plan: self,
            control: first.control,
            parking,
            shop,
            files: HashMap::new(),
            objects: HashMap::new(),
            linked: HashSet::new(),
            report,
        };
        let mut all = family::raise(&mut site, init)?;
        site.plan.tree.sysv.iter().try_for_each(|segment| sysv::finish(first.pid, segment))?;
        site.report.forking = start.elapsed();
        site.finish(&mut all)?;
        site.report.total = start.elapsed();
        site.write_stats()?;
        Ok(site.report)
    }
}

impl Site {
    fn finish(&mut self, all: &mut BTreeMap<u32, Built>) -> Result<()> {
        let processes = std::mem::take(&mut self.plan.tree.processes);
        let alive = || processes.iter().filter_map(|p| Some((p, p.alive.as_ref()?)));
        self.shop.pids = all.iter().map(|(inside, built)| (*inside, built.pid)).collect();
        for (p, a) in alive() {
            files::place(self, all, p.entry.pid, a)?;
        }
        for (p, a) in alive() {
            let built = built(all, p.entry.pid)?;
            threads::make(built, p)?;
            files::link(self, built, p.entry.pid, a)?;
            space::finish(built, a)?;
        }
        let has = threads::capabilities(built(all, 1)?.pid)?;
        for (p, a) in alive() {
            let missed = threads::dress(built(all, p.entry.pid)?, p, a, &self.plan.tree.seccomp, has)?;
            self.report.missed.extend(missed);
        }
        for (p, a) in alive() {
            threads::undress(built(all, p.entry.pid)?, p, a, self.parking)?;
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
        self.shop.network.go_live()?;
        for tid in going {
            ptrace::detach(tid, 0).map_err(|e| Error::proc(tid, e))?;
        }
        self.plan.tree.processes = processes;
        Ok(())
    }

    fn write_stats(&self) -> Result<()> {
        let micros = |d: Duration| u32::try_from(d.as_micros()).unwrap_or(u32::MAX);
        let entry = RestoreStatsEntry {
            forking_time: micros(self.report.forking),
            restore_time: micros(self.report.total),
            pages_restored: Some(self.report.pages),
            ..RestoreStatsEntry::default()
        };
        let stats = StatsEntry { dump: None, restore: Some(entry) };
        Ok(dir::write_stats(&self.plan.work, &format::STATS_RESTORE, &stats)?)
    }
}

fn missing(pid: u32) -> Error {
    Error::BadRecord { what: format!("process {pid} was not built") }
}

fn built(all: &mut BTreeMap<u32, Built>, pid: u32) -> Result<&mut Built> {
    all.get_mut(&pid).ok_or_else(|| missing(pid))
}
