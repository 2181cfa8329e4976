//! Puppets: tasks without a program that are built into those of a checkpoint. They die with lmrun.
//!
//! All puppets of a container have the *stage* at the same address, one that no mapping of the checkpoint uses: a page of code, a
//! table for a batch and room for its data. The first one maps it, the others inherit it.

use libc::{c_long, pid_t};

use super::batch::{Batch, Space};
use super::{At, Error, Result, next_stop};
use crate::sys::code;
use crate::sys::mem::Memory;
use crate::sys::proc::{self, Vma};
use crate::sys::ptrace::{self, Regs, Status};

const PAGE: u64 = 4096;
const CODE: u64 = PAGE;
const ENTRIES: usize = 4096;
const TABLE: u64 = ENTRIES as u64 * 64;
const DATA: u64 = 512 * 1024;
/// `syscall; int3` follows the interpreter.
const TRAP: u64 = 1024;

/// Everything but SIGTRAP, which ends a batch.
const ALL_BUT_TRAP: u64 = !(1 << (libc::SIGTRAP - 1));

const OPTIONS: usize = ptrace::O_TRACESYSGOOD
    | ptrace::O_TRACECLONE
    | ptrace::O_TRACEFORK
    | ptrace::O_TRACEVFORK
    | ptrace::O_EXITKILL
    | ptrace::O_SUSPEND_SECCOMP;

/// Where the stage is, in every puppet of a container.
#[derive(Debug, Clone, Copy)]
pub struct Stage {
    pub start: u64,
}

impl Stage {
    pub const LEN: u64 = CODE + TABLE + DATA;

    /// The lowest place that none of `taken` (start, end) touches.
    pub fn find(mut taken: Vec<(u64, u64)>) -> Stage {
        const GAP: u64 = 64 * 1024;
        taken.sort_unstable();
        let mut start = GAP;
        for (s, e) in taken {
            if s >= start + Self::LEN + GAP {
                break;
            }
            start = start.max(e + GAP);
        }
        Stage { start }
    }

    pub fn end(self) -> u64 {
        self.start + Self::LEN
    }

    /// Room for the data of calls, unused between batches.
    pub fn data(self) -> u64 {
        self.space().data
    }

    fn space(self) -> Space {
        let table = self.start + CODE;
        Space { table, entries: ENTRIES, data: table + TABLE, data_len: DATA as usize }
    }
}

/// One thread of a puppet, stopped between two calls.
#[derive(Debug)]
pub struct Puppet {
    pub tid: pid_t,
    stage: Stage,
    regs: Regs,
}

impl Puppet {
    /// Takes control of the container's init, which waits in a system call, and sets up the stage in it.
    pub fn seize(pid: pid_t, stage: Stage) -> Result<Puppet> {
        ptrace::seize(pid, OPTIONS).at(pid, "seize")?;
        ptrace::interrupt(pid).at(pid, "interrupt")?;
        while !matches!(next_stop(pid)?, Status::Event(ptrace::EVENT_STOP, _)) {
            ptrace::cont(pid, 0).at(pid, "resume")?;
        }
        let mut me = Puppet::adopt(pid, stage)?;
        let memory = Memory::open(pid).at(pid, "open memory")?;
        let maps = proc::maps(pid).at(pid, "read maps")?;
        let syscall = find_syscall(pid, &maps, &memory)?;
        let protect = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE) as u64;
        me.call_at(syscall, "mmap", libc::SYS_mmap, [stage.start, Stage::LEN, protect, flags, u64::MAX, 0])?;
        let protect = (libc::PROT_READ | libc::PROT_EXEC) as u64;
        me.call_at(syscall, "mprotect", libc::SYS_mprotect, [stage.start, CODE, protect, 0, 0, 0])?;
        memory.force_write(stage.start, code::batch()).at(pid, "write to the stage")?;
        memory.force_write(stage.start + TRAP, &code::SYSCALL_TRAP).at(pid, "write to the stage")?;
        Ok(me)
    }

    /// Takes a new child or thread of a puppet, which is attached already and in its first stop.
    pub fn adopt(tid: pid_t, stage: Stage) -> Result<Puppet> {
        ptrace::set_sigmask(tid, ALL_BUT_TRAP).at(tid, "block signals")?;
        Ok(Puppet { tid, stage, regs: ptrace::regs(tid).at(tid, "read registers")? })
    }

    /// Where the stage is.
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// An empty batch for this puppet.
    pub fn batch(&self) -> Batch {
        Batch::new(self.stage.space())
    }

    /// One call, without a batch; an error of it is an error.
    pub fn call<const N: usize>(&mut self, name: &'static str, nr: c_long, args: [u64; N]) -> Result<u64> {
        let mut raw = [0; 6];
        raw[..N].copy_from_slice(&args);
        self.call_at(self.stage.start + TRAP, name, nr, raw)
    }

    /// As [`Puppet::call`], on a `syscall` instruction outside the stage.
    pub fn call_at(&mut self, syscall: u64, name: &'static str, nr: c_long, args: [u64; 6]) -> Result<u64> {
        let tid = self.tid;
        let mut r = self.regs;
        (r.rip, r.rax, r.orig_rax) = (syscall, nr as u64, u64::MAX);
        (r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9) = (args[0], args[1], args[2], args[3], args[4], args[5]);
        ptrace::set_regs(tid, &r).at(tid, "set registers")?;
        let mut stops = 0;
        while stops < 2 {
            ptrace::syscall(tid).at(tid, "run a system call")?;
            if next_stop(tid)? == Status::SyscallStop {
                stops += 1;
            }
        }
        match ptrace::regs(tid).at(tid, "read registers")?.rax as i64 {
            r @ ..0 => Err(Error::Call { tid, what: name, source: std::io::Error::from_raw_os_error(-r as i32) }),
            r => Ok(r as u64),
        }
    }

    /// Makes all calls of `batch`. `memory` is that of the puppet's process.
    pub fn run(&mut self, memory: &Memory, batch: &mut Batch) -> Result<()> {
        self.run_forking(memory, batch).map(drop)
    }

    /// As [`Puppet::run`], for a batch that makes tasks; returns their host pids in order, each in its first stop.
    pub fn run_forking(&mut self, memory: &Memory, batch: &mut Batch) -> Result<Vec<pid_t>> {
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        let tid = self.tid;
        batch.store(tid, memory, None)?;
        let mut r = self.regs;
        let space = self.stage.space();
        (r.rip, r.orig_rax) = (self.stage.start, u64::MAX);
        r.eflags &= !0x500; // trap and direction flag
        (r.rbx, r.r12, r.r13) = (space.table, batch.len() as u64, space.table);
        (r.r14, r.r15) = (self.stage.start + TRAP + 2, 0);
        ptrace::set_regs(tid, &r).at(tid, "set registers")?;
        let mut made = Vec::new();
        loop {
            ptrace::cont(tid, 0).at(tid, "run a batch")?;
            match next_stop(tid)? {
                Status::Signal(libc::SIGTRAP) => break,
                Status::Event(libc::PTRACE_EVENT_CLONE | libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK, _) => {
                    let child = ptrace::event_message(tid).at(tid, "read an event")? as pid_t;
                    next_stop(child)?;
                    made.push(child);
                }
                Status::Signal(s) => {
                    let at = ptrace::regs(tid).at(tid, "read registers")?;
                    let entry = at.rbx.wrapping_sub(space.table) / 64;
                    let what = format!("signal {s} in a batch, at {:#x}, entry {entry}", at.rip);
                    return Err(Error::Unexpected { tid, what });
                }
                _ => {}
            }
        }
        batch.load(tid, memory)?;
        Ok(made)
    }

    /// Gives the puppet its final registers and mask; it goes on with them once it is detached.
    pub fn finish(self, regs: &Regs, xstate: &[u8], mask: u64) -> Result<()> {
        ptrace::set_regs(self.tid, regs).at(self.tid, "set registers")?;
        ptrace::set_xstate(self.tid, xstate).at(self.tid, "set the floating point state")?;
        ptrace::set_sigmask(self.tid, mask).at(self.tid, "set the signal mask")
    }
}

/// A `syscall` instruction of the vdso, for when there is no stage.
pub fn find_syscall(pid: pid_t, maps: &[Vma], memory: &Memory) -> Result<u64> {
    let missing = || Error::Unexpected { tid: pid, what: "its vdso has no syscall instruction".into() };
    let vdso = maps.iter().find(|v| v.name == b"[vdso]").ok_or_else(missing)?;
    let bytes = memory.read_vec(vdso.start, (vdso.end - vdso.start) as usize).at(pid, "read the vdso")?;
    let at = bytes.windows(2).position(|w| w == [0x0f, 0x05]).ok_or_else(missing)?;
    Ok(vdso.start + at as u64)
}
