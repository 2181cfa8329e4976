//! Making the processes: parents, children, sessions, groups, zombies.

use std::collections::{BTreeMap, BTreeSet};

use libc::{c_int, pid_t};

use super::{Built, Site, built, missing, space, threads};
use crate::engine::plan::{self, Birth};
use crate::engine::res::task::{creds, signals};
use crate::engine::tree::Process;
use crate::engine::{Error, Result};
use crate::sys::proc;
use crate::sys::ptrace::{self, Status};
use crate::tracee::puppet::Puppet;

/// Stand-ins for session and group leaders that are gone, by the pid that they hold.
#[derive(Debug, Default)]
pub struct StandIns {
    /// With the pid of the process that has to reap each.
    all: BTreeMap<u32, (Built, u32)>,
}

/// The first process, with its address space.
pub fn root(site: &mut Site, all: &mut BTreeMap<u32, Built>) -> Result<()> {
    let root = site.process(1)?;
    settle_space(site, all, &root, None)
}

/// Makes process `pid`, with its address space, and whoever must be there before it, unless they are.
pub fn bring(site: &mut Site, all: &mut BTreeMap<u32, Built>, stand_ins: &mut StandIns, pid: u32) -> Result<()> {
    if all.contains_key(&pid) {
        return Ok(());
    }
    let p = site.process(pid)?;
    let parent = p.entry.ppid;
    let (maker, flags) = match site.plan.births[&pid] {
        Birth::Child { before_setsid } => {
            bring(site, all, stand_ins, parent)?;
            if !before_setsid {
                lead(site, all, stand_ins, parent)?;
            }
            (parent, 0)
        }
        Birth::Sibling { maker } => {
            bring(site, all, stand_ins, maker)?;
            lead(site, all, stand_ins, maker)?;
            (maker, libc::CLONE_PARENT)
        }
        Birth::Orphan { session } => {
            bring(site, all, stand_ins, parent)?;
            stand_ins.session(site, all, session, parent)?;
            (session, libc::CLONE_PARENT)
        }
    };
    let maker_built = match stand_ins.all.get_mut(&maker) {
        Some((b, _)) => b,
        None => built(all, maker)?,
    };
    let child = fork(maker_built, pid, flags, site)?;
    all.insert(pid, child);
    // A stand-in has the memory of the process that made it.
    let shaped_by = stand_ins.all.get(&maker).map_or(maker, |(_, parent)| *parent);
    settle_space(site, all, &p, Some(shaped_by))
}

/// Begins the session of its own that a process has, with the children that it had before.
fn lead(site: &mut Site, all: &mut BTreeMap<u32, Built>, stand_ins: &mut StandIns, pid: u32) -> Result<()> {
    let p = site.process(pid)?;
    if p.entry.sid != pid || session(built(all, pid)?.pid)? == pid {
        return Ok(());
    }
    let births = &site.plan.births;
    let early = |c: &&Process| c.entry.ppid == pid && births[&c.entry.pid] == Birth::Child { before_setsid: true };
    let early: Vec<u32> = site.plan.tree.processes.iter().filter(early).map(|c| c.entry.pid).collect();
    early.into_iter().try_for_each(|child| bring(site, all, stand_ins, child))?;
    built(all, pid)?.main.call("setsid", libc::SYS_setsid, [])?;
    Ok(())
}

/// Makes all processes that are not there yet, with their sessions.
pub fn raise(site: &mut Site, all: &mut BTreeMap<u32, Built>, stand_ins: &mut StandIns) -> Result<()> {
    let pids: Vec<u32> = site.plan.tree.processes.iter().map(|p| p.entry.pid).collect();
    pids.iter().try_for_each(|pid| bring(site, all, stand_ins, *pid))?;
    pids.iter().try_for_each(|pid| lead(site, all, stand_ins, *pid))
}

/// Ends those that are gone or have other parents or sessions by now, and all below them. Whose memory is gone with them is
/// for the caller to see.
pub fn part(all: &mut BTreeMap<u32, Built>, before: &[Process], now: &[Process]) -> Result<()> {
    let mut leaving: BTreeSet<u32> = BTreeSet::new();
    // Children of who has ended are init's, here as there.
    let left = |pid: u32| now.iter().all(|p| p.entry.pid != pid);
    for p in before.iter().filter(|p| all.contains_key(&p.entry.pid)) {
        let parent = if left(p.entry.ppid) { 1 } else { p.entry.ppid };
        let same = now.iter().find(|n| n.entry.pid == p.entry.pid).is_some_and(|n| {
            let session = n.entry.sid == p.entry.sid || n.entry.sid == n.entry.pid;
            // What was made as a zombie has no memory of its own.
            let alive = p.alive.is_some() || n.alive.is_none();
            n.entry.pid == 1 || (n.entry.ppid == parent && session && alive)
        });
        if !same || (!left(p.entry.ppid) && leaving.contains(&p.entry.ppid)) {
            leaving.insert(p.entry.pid);
        }
    }
    for p in before.iter().rev().filter(|p| leaving.contains(&p.entry.pid)) {
        let Some(puppet) = all.remove(&p.entry.pid) else { continue };
        exit(puppet, 0)?;
        let parent = if all.contains_key(&p.entry.ppid) { p.entry.ppid } else { 1 };
        let wait = [u64::from(p.entry.pid), 0, libc::__WALL as u64, 0];
        built(all, parent)?.main.call("wait4", libc::SYS_wait4, wait)?;
    }
    Ok(())
}

/// Process groups and zombies, once all processes are there.
pub fn settle(site: &Site, all: &mut BTreeMap<u32, Built>, mut stand_ins: StandIns) -> Result<()> {
    let processes = &site.plan.tree.processes;
    for p in processes.iter().filter(|p| p.entry.sid != 0) {
        let there = session(built(all, p.entry.pid)?.pid)?;
        if there != p.entry.sid {
            let what = format!("process {} is in session {there} instead of {}", p.entry.pid, p.entry.sid);
            return Err(Error::BadRecord { what });
        }
    }
    groups(site, all, &mut stand_ins, processes)?;
    stand_ins.dismiss(all)?;
    for p in processes.iter().filter(|p| plan::is_zombie(p)) {
        end(all, p)?;
    }
    drain(all, processes.len())
}

/// The parts of a new process that come before it has children.
fn settle_space(site: &mut Site, all: &mut BTreeMap<u32, Built>, p: &Process, maker: Option<u32>) -> Result<()> {
    let Some(alive) = &p.alive else { return Ok(()) };
    let from = maker.map(|m| site.process(m)).transpose()?.and_then(|p| p.alive).map(|a| a.mm);
    space::shape(site, built(all, p.entry.pid)?, p.entry.pid, alive, from.as_ref())
}

fn session(pid: pid_t) -> Result<u32> {
    proc::status(pid).and_then(|s| s.innermost("NSsid")).map_err(|e| Error::proc(pid, e))
}

/// clone3(2) with the pid that the new process is to have.
fn fork(maker: &mut Built, pid: u32, flags: c_int, site: &Site) -> Result<Built> {
    let mut b = maker.main.batch();
    let set_tid = b.bytes(&pid.to_ne_bytes());
    // CLONE_PARENT takes the exit signal of the maker.
    let exit_signal = if flags & libc::CLONE_PARENT != 0 { 0 } else { libc::SIGCHLD as u64 };
    let args = clone_args(flags as u64, exit_signal, set_tid);
    let at = b.bytes(&args);
    b.call("clone3", libc::SYS_clone3, [at.into(), args.len().into()]);
    let made = maker.main.run_forking(&maker.memory, &mut b).map_err(|e| in_use(e, pid))?;
    let [child] = made[..] else { return Err(missing(pid)) };
    Built::adopt(child, Puppet::adopt(child, site.plan.stage)?)
}

fn in_use(e: crate::tracee::Error, pid: u32) -> Error {
    match &e {
        crate::tracee::Error::Call { source, .. } if source.raw_os_error() == Some(libc::EEXIST) => {
            Error::BadRecord { what: format!("pid {pid} is in use in the new container's pid namespace") }
        }
        _ => e.into(),
    }
}

/// `struct clone_args`, all eleven words of it (include/uapi/linux/sched.h).
pub fn clone_args(flags: u64, exit_signal: u64, set_tid: u64) -> Vec<u8> {
    [flags, 0, 0, 0, exit_signal, 0, 0, 0, set_tid, 1, 0].map(u64::to_ne_bytes).concat()
}

impl StandIns {
    /// A leader for a session whose own is gone, as a child of `parent`.
    fn session(&mut self, site: &Site, all: &mut BTreeMap<u32, Built>, session: u32, parent: u32) -> Result<()> {
        if let Some((_, of)) = self.all.get(&session) {
            if *of != parent {
                let what = format!("session {session} has members with several parents, which lmrun cannot rebuild");
                return Err(Error::BadRecord { what });
            }
            return Ok(());
        }
        let mut leader = fork(built(all, parent)?, session, 0, site)?;
        leader.main.call("setsid", libc::SYS_setsid, [])?;
        self.all.insert(session, (leader, parent));
        Ok(())
    }

    /// A leader for a group whose own is gone, made by a member of its session.
    fn group(&mut self, site: &Site, all: &mut BTreeMap<u32, Built>, group: u32, member: u32) -> Result<()> {
        if self.all.contains_key(&group) {
            return Ok(());
        }
        let mut leader = fork(built(all, member)?, group, 0, site)?;
        leader.main.call("setpgid", libc::SYS_setpgid, [0, 0])?;
        self.all.insert(group, (leader, member));
        Ok(())
    }

    fn dismiss(self, all: &mut BTreeMap<u32, Built>) -> Result<()> {
        for (pid, (stand_in, reaper)) in self.all {
            exit(stand_in, 0)?;
            // Init has inherited it if its maker has ended.
            let reaper = built(all, if all.contains_key(&reaper) { reaper } else { 1 })?;
            reaper.main.call("wait4", libc::SYS_wait4, [u64::from(pid), 0, libc::__WALL as u64, 0])?;
        }
        Ok(())
    }
}

/// Process groups, leaders first. Whoever is in none of the container (0) stays where it is.
fn groups(site: &Site, all: &mut BTreeMap<u32, Built>, stand_ins: &mut StandIns, processes: &[Process]) -> Result<()> {
    let joins = |p: &&Process| p.entry.pgid != 0 && p.entry.sid != p.entry.pid;
    for p in processes.iter().filter(joins).filter(|p| p.entry.pgid == p.entry.pid) {
        built(all, p.entry.pid)?.main.call("setpgid", libc::SYS_setpgid, [0, 0])?;
    }
    let leaders: BTreeSet<u32> = processes.iter().map(|p| p.entry.pid).collect();
    for p in processes.iter().filter(joins).filter(|p| p.entry.pgid != p.entry.pid) {
        if !leaders.contains(&p.entry.pgid) {
            stand_ins.group(site, all, p.entry.pgid, p.entry.pid)?;
        }
        built(all, p.entry.pid)?.main.call("setpgid", libc::SYS_setpgid, [0, u64::from(p.entry.pgid)])?;
    }
    Ok(())
}

/// Ends a puppet and waits for that; it is a zombie of its parent then.
fn exit(puppet: Built, code: u8) -> Result<()> {
    let pid = puppet.pid;
    let mut main = puppet.main;
    match main.call("exit_group", libc::SYS_exit_group, [u64::from(code)]) {
        Err(crate::tracee::Error::Ended { .. }) => Ok(()),
        Err(e) => Err(e.into()),
        Ok(_) => Err(Error::proc(pid, std::io::ErrorKind::Other.into())),
    }
}

/// Makes a puppet the zombie that was dumped.
fn end(all: &mut BTreeMap<u32, Built>, p: &Process) -> Result<()> {
    let status = p.cores[0].tc.as_ref().map_or(0, |tc| tc.exit_code);
    let mut zombie = all.remove(&p.entry.pid).ok_or_else(|| missing(p.entry.pid))?;
    let signal = (status & 0x7f) as c_int;
    if let Some(name) = p.cores[0].tc.as_ref().map(|tc| &tc.comm) {
        let mut b = zombie.main.batch();
        let at = b.text(name);
        b.call("prctl(PR_SET_NAME)", libc::SYS_prctl, [libc::PR_SET_NAME.into(), at.into()]);
        let none = b.room(16);
        // No core dump of a puppet.
        b.call("prlimit64", libc::SYS_prlimit64, [0.into(), libc::RLIMIT_CORE.into(), none.into(), 0.into()]);
        if let Some(c) = p.cores[0].thread_core.as_ref().and_then(|t| t.creds.as_ref()) {
            creds::apply(c, threads::capabilities(zombie.pid)?, p.entry.pid, &mut b)?;
            // Kernels of 2026 remember it beyond the end: who may see the exit code of a zombie.
            b.call("prctl(PR_SET_DUMPABLE)", libc::SYS_prctl, [libc::PR_SET_DUMPABLE.into(), 1.into()]);
        }
        zombie.main.run(&zombie.memory, &mut b)?;
    }
    if signal == 0 {
        return exit(zombie, (status >> 8) as u8);
    }
    let pid = zombie.pid;
    ptrace::set_sigmask(pid, 0).map_err(|e| Error::proc(pid, e))?;
    kill(pid, signal)?;
    // SIGKILL does not wait to be let through; any other signal does.
    let mut passed = if signal == libc::SIGKILL { Ok(()) } else { ptrace::cont(pid, 0) };
    loop {
        passed.map_err(|e| Error::proc(pid, e))?;
        passed = match ptrace::wait(pid, false).map_err(|e| Error::proc(pid, e))? {
            Some(Status::Killed(_) | Status::Exited(_)) | None => return Ok(()),
            Some(Status::Signal(s)) => ptrace::cont(pid, s),
            Some(_) => ptrace::cont(pid, 0),
        };
    }
}

pub fn kill(pid: pid_t, signal: c_int) -> Result<()> {
    let signal = nix::sys::signal::Signal::try_from(signal).map_err(|e| Error::proc(pid, e.into()))?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).map_err(|e| Error::proc(pid, e.into()))
}

/// Forgets the SIGCHLDs of stand-ins and zombies.
fn drain(all: &mut BTreeMap<u32, Built>, times: usize) -> Result<()> {
    for p in all.values_mut() {
        let mut b = p.main.batch();
        signals::drain(&mut b, times.min(64) + 1);
        p.main.run(&p.memory, &mut b)?;
    }
    Ok(())
}
