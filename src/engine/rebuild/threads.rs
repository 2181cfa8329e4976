//! Threads, and all that is a task's own: dressed as the dumped ones were, and let go.

use libc::pid_t;

use super::{Built, family, missing};
use crate::engine::plan;
use crate::engine::res::mm;
use crate::engine::res::task::{creds, regs, sched, seccomp, signals, thread, timers};
use crate::engine::tree::{Alive, Process};
use crate::engine::{Error, Result};
use crate::image::records::core::{CoreEntry, TaskCoreEntry, ThreadCoreEntry};
use crate::image::records::task::SeccompEntry;
use crate::sys::{proc, ptrace};
use crate::tracee::batch::Batch;
use crate::tracee::puppet::{Puppet, Stage, find_syscall};

/// What a thread shares with its process.
const THREAD: i32 = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM;

/// Makes all threads but the main one.
pub fn make(built: &mut Built, p: &Process) -> Result<()> {
    let stage = built.main.stage();
    for some in p.entry.threads[1..].chunks(500) {
        let mut b = built.main.batch();
        for tid in some {
            let set_tid = b.bytes(&tid.to_ne_bytes());
            let args = family::clone_args(THREAD as u64, 0, set_tid);
            let at = b.bytes(&args);
            b.call("clone3", libc::SYS_clone3, [at.into(), args.len().into()]);
        }
        for tid in built.main.run_forking(&built.memory, &mut b)? {
            built.others.push(Puppet::adopt(tid, stage)?);
        }
    }
    Ok(())
}

/// The capabilities that a puppet has, and all others like it.
pub fn capabilities(puppet: pid_t) -> Result<u64> {
    proc::status(puppet).and_then(|s| s.mask("CapPrm")).map_err(|e| Error::proc(puppet, e))
}

fn parts(core: &CoreEntry) -> Result<(&ThreadCoreEntry, u64)> {
    let t = core.thread_core.as_ref().zip(core.thread_info.as_ref());
    let t = t.ok_or_else(|| Error::BadRecord { what: "a thread has no record of its own".into() })?;
    Ok((t.0, t.1.clear_tid_addr))
}

/// Everything but memory, files, timers and registers. Returns what this host could not give.
pub fn dress(built: &mut Built, p: &Process, alive: &Alive, filters: &SeccompEntry, has: u64) -> Result<Vec<String>> {
    let tc = p.cores[0].tc.as_ref().ok_or_else(|| missing(p.entry.pid))?;
    let mut missed = dress_process(built, tc)?;
    let Built { main, memory, others, .. } = built;
    let puppets = std::iter::once(main).chain(others);
    for ((puppet, core), tid) in puppets.zip(&p.cores).zip(&p.entry.threads) {
        let (own, tid_address) = parts(core)?;
        missed.extend(sched::apply(puppet.tid, own, alive.thread(*tid))?);
        let mut b = puppet.batch();
        let name = own.comm.as_deref().unwrap_or(&tc.comm);
        thread::apply(own, name, tid_address, &mut b);
        if let Some(stack) = &own.sas {
            signals::apply_stack(stack, &mut b);
        }
        if let Some(pending) = &own.signals_p {
            signals::apply_pending(pending, p.entry.pid, *tid, false, &mut b);
        }
        let chain = seccomp::chain(own, filters);
        let chain =
            chain.ok_or_else(|| Error::BadRecord { what: format!("thread {tid} has an unknown seccomp filter") })?;
        seccomp::apply(&chain, &mut b);
        if let Some(c) = &own.creds {
            creds::apply(c, has, *tid, &mut b)?;
        }
        thread::apply_parent_death(own, &mut b);
        puppet.run(memory, &mut b)?;
    }
    Ok(missed)
}

fn dress_process(built: &mut Built, tc: &TaskCoreEntry) -> Result<Vec<String>> {
    let mut missed = Vec::new();
    let mut b = built.main.batch();
    signals::apply_actions(&tc.sigactions, &mut b);
    b.call("personality", libc::SYS_personality, [tc.personality.into()]);
    if tc.child_subreaper == Some(true) {
        b.call("prctl(PR_SET_CHILD_SUBREAPER)", libc::SYS_prctl, [libc::PR_SET_CHILD_SUBREAPER.into(), 1.into()]);
    }
    for command in (0..31).map(|bit| 1u32 << bit).filter(|c| tc.membarrier_registration_mask.unwrap_or(0) & c != 0) {
        b.call("membarrier", libc::SYS_membarrier, [command.into(), 0.into(), 0.into()]);
    }
    if let Some(queue) = &tc.signals_s {
        // The siginfo names the receiver only by the queue it goes to.
        let pid = proc::status(built.pid).and_then(|s| s.innermost("NStgid")).map_err(|e| Error::proc(built.pid, e))?;
        signals::apply_pending(queue, pid, pid, true, &mut b);
    }
    missed.extend(limits(built.pid, tc, &mut b)?);
    built.main.run(&built.memory, &mut b)?;
    if let Some(adj) = tc.oom_score_adj {
        let path = format!("/proc/{}/oom_score_adj", built.pid);
        let now = std::fs::read_to_string(&path).map_err(|e| Error::proc(built.pid, e))?;
        if now.trim() != adj.to_string() && std::fs::write(&path, adj.to_string()).is_err() {
            missed.push(format!("task {}: oom_score_adj {adj} is below what this host allows", built.pid));
        }
    }
    Ok(missed)
}

/// Limits as far as they can be had: a hard limit above our own takes CAP_SYS_RESOURCE.
fn limits(pid: pid_t, tc: &TaskCoreEntry, b: &mut Batch) -> Result<Vec<String>> {
    let mut missed = Vec::new();
    let here = proc::limits(pid).map_err(|e| Error::proc(pid, e))?;
    let may_raise = proc::status(pid).and_then(|s| s.mask("CapEff")).map_err(|e| Error::proc(pid, e))? & (1 << 24) != 0;
    let wanted = tc.rlimits.iter().flat_map(|r| &r.rlimits);
    for (resource, (want, have)) in wanted.zip(&here).enumerate() {
        let (mut soft, mut hard) = (want.cur, want.max);
        if hard > have.hard && !may_raise {
            missed.push(format!("task {pid}: limit {resource} stays at {} instead of {hard}", have.hard));
            (soft, hard) = (soft.min(have.hard), have.hard);
        }
        let at = b.bytes(&[soft, hard].map(u64::to_ne_bytes).concat());
        b.call("prlimit64", libc::SYS_prlimit64, [0.into(), resource.into(), at.into(), 0.into()]);
    }
    Ok(missed)
}

/// The last calls of a process: signal actions, timers, the flags that a change of credentials clears; and its end of the
/// control socket is closed.
pub fn undress(built: &mut Built, p: &Process, alive: &Alive, parking: i32) -> Result<()> {
    let tc = p.cores[0].tc.as_ref().ok_or_else(|| missing(p.entry.pid))?;
    let mut b = built.main.batch();
    let probe = timers::ask_restore_ids(&mut b);
    built.main.run(&built.memory, &mut b)?;
    let restore_ids = b.result(probe) >= 0;

    let mut b = built.main.batch();
    mm::apply_dumpable(&alive.mm, &mut b);
    b.call("close", libc::SYS_close, [parking.into()]);
    if let Some(t) = &tc.timers {
        timers::apply_create(t, restore_ids, &mut b);
        let own = p.cores.iter().filter_map(|c| c.thread_core.as_ref()?.signals_p.as_ref());
        let pending = own.chain(&tc.signals_s).flat_map(|q| &q.signals);
        let expired: Vec<u32> = pending.filter_map(signals::timer_of).collect();
        timers::apply_start(t, &expired, &mut b);
    }
    built.main.run(&built.memory, &mut b)?;
    if let Some(action) = signals::trap_action(&tc.sigactions) {
        let at = built.main.stage().data();
        built.memory.write(at, &action).map_err(|e| Error::proc(built.pid, e))?;
        built.main.call("rt_sigaction", libc::SYS_rt_sigaction, [libc::SIGTRAP as u64, at, 0, 8])?;
    }
    Ok(())
}

/// Takes the stage away and puts the final registers in. Returns the threads, to be detached in this order.
pub fn finish(mut built: Built, p: &Process, stage: Stage) -> Result<Vec<pid_t>> {
    let pid = built.pid;
    let maps = proc::maps(pid).map_err(|e| Error::proc(pid, e))?;
    let syscall = find_syscall(pid, &maps, &built.memory)?;
    built.main.call_at(syscall, "munmap", libc::SYS_munmap, [stage.start, Stage::LEN, 0, 0, 0, 0])?;
    let mut tids = Vec::new();
    let extra = p.alive.as_ref().map(|a| &a.extra.threads[..]).unwrap_or_default();
    for ((puppet, core), tid) in std::iter::once(built.main).chain(built.others).zip(&p.cores).zip(&p.entry.threads) {
        let (own, info) =
            core.thread_core.as_ref().zip(core.thread_info.as_ref()).ok_or_else(|| missing(p.entry.pid))?;
        let xsave = match extra.iter().find(|t| t.tid == *tid).and_then(|t| t.xsave.clone()) {
            Some(whole) => whole,
            None => {
                let like = ptrace::xstate(puppet.tid).map_err(|e| Error::proc(puppet.tid, e))?;
                regs::xstate_from_record(&info.fpregs, &like)
            }
        };
        tids.push(puppet.tid);
        let mask = own.blk_sigset.or_else(|| core.tc.as_ref().map(|tc| tc.blk_sigset)).unwrap_or(0);
        puppet.finish(&regs::from_record(&info.gpregs), &xsave, mask)?;
    }
    if plan::is_stopped(p) {
        family::kill(pid, libc::SIGSTOP)?;
    }
    tids.reverse();
    Ok(tids)
}
