//! Borrowing the threads of a live process for remote system calls, so that each survives the death of
//! lmrun at any instant.
//!
//! A tracer that dies leaves its tracees running with whatever registers they have. So the registers of a borrowed
//! thread always point into a *slot*: a `syscall` instruction followed by a routine that undoes what was
//! under way and gives the thread its own registers and signal mask back. The order is what makes it safe:
//! the slot is written first; then the registers point to its routine; then all signals are blocked; then calls are
//! made. On the way back the routine comes first again, then the mask, then the thread's own registers.
//!
//! The leader's slot lies in the zero tail of the vdso's last page, so that nothing has to be mapped to begin
//! with. Three places are used in turn: a signal handler that runs on top of a routine whose lmrun
//! died may return into it later. The slots of the other threads, the batch table and its data lie in a
//! scratch mapping. If lmrun dies after that was handed out, the mapping stays behind in the process.

use libc::{c_int, c_long, pid_t};

use super::batch::{Arg, Batch, Space};
use super::{At, Error, RestartBlock, Result, Thread, next_stop, resumable};
use crate::sys::code;
use crate::sys::mem::Memory;
use crate::sys::proc::{self, Vma};
use crate::sys::ptrace::{self, Regs, Status};

/// Marks a slot that has been used: "lmrunslt".
const MAGIC: u64 = u64::from_le_bytes(*b"lmrunslt");
const ROTATION: u64 = 3;
const PAGE: u64 = 4096;
/// Room for a slot in the scratch mapping.
const SLOT: u64 = 512;
/// Signals that are ignored unless caught: a tracee stops for them, a task without a tracer does not.
const QUIET_SIGNALS: [c_int; 3] = [libc::SIGURG, libc::SIGWINCH, libc::SIGCHLD];

/// The part of a call to take back if lmrun dies before it has used the result.
#[derive(Debug, Clone, Copy)]
pub enum Undo {
    Nothing,
    /// The result is a descriptor: close it.
    Close,
    /// The result is a mapping of this length: unmap it.
    Unmap(u64),
}

impl Undo {
    fn call(self) -> (u64, u64) {
        match self {
            Undo::Nothing => (libc::SYS_getpid as u64, 0),
            Undo::Close => (libc::SYS_close as u64, 0),
            Undo::Unmap(len) => (libc::SYS_munmap as u64, len),
        }
    }
}

/// A slot's bytes for `thread`.
fn slot(thread: &Thread, generation: u64, signalled: bool) -> Vec<u8> {
    let r = resumable(&thread.regs, RestartBlock::Kept, signalled);
    // The trap flag would fault in the middle of the routine.
    let flags = r.eflags & !0x100;
    let (undo, undo_arg) = Undo::Nothing.call();
    let context = [
        MAGIC,
        generation,
        undo,
        undo_arg,
        u64::MAX,
        thread.mask,
        flags,
        r.rip,
        r.rsp,
        r.rax,
        r.rbx,
        r.rcx,
        r.rdx,
        r.rsi,
        r.rdi,
        r.rbp,
        r.r8,
        r.r9,
        r.r10,
        r.r11,
        r.r12,
        r.r13,
        r.r14,
        r.r15,
    ];
    let mut bytes = code::slot().to_vec();
    let at = code::slot_context();
    assert_eq!(bytes.len() - at, size_of_val(&context));
    for (place, value) in bytes[at..].chunks_exact_mut(8).zip(context) {
        place.copy_from_slice(&value.to_ne_bytes());
    }
    bytes
}

/// Where the slots of a process's leader are: the zero tail of its vdso.
#[derive(Debug, Clone, Copy)]
pub struct VdsoTail {
    start: u64,
    slot: u64,
}

impl VdsoTail {
    fn find(pid: pid_t, maps: &[Vma], memory: &Memory) -> Result<VdsoTail> {
        let unexpected = |what: &str| Error::Unexpected { tid: pid, what: what.into() };
        let vdso = maps.iter().find(|v| v.name == b"[vdso]").ok_or_else(|| unexpected("has no [vdso] to work from"))?;
        let slot = (code::slot().len() as u64).next_multiple_of(8);
        let tail = ROTATION * slot;
        let start = vdso.end - tail;
        let bytes = memory.read_vec(start, tail as usize).at(pid, "read the end of the vdso")?;
        let used = |s: &[u8]| s[code::slot_context()..][..8] == MAGIC.to_ne_bytes();
        let free = |s: &[u8]| s.iter().all(|&b| b == 0);
        if bytes.chunks_exact(slot as usize).all(|s| used(s) || free(s)) {
            Ok(VdsoTail { start, slot })
        } else {
            Err(unexpected("the vdso has no room at its end"))
        }
    }

    /// Whether an instruction pointer lies in a slot.
    fn contains(&self, rip: u64) -> bool {
        (self.start..self.start + ROTATION * self.slot).contains(&rip)
    }

    /// The place that was used the longest ago and the generation to give it.
    fn oldest(&self, pid: pid_t, memory: &Memory) -> Result<(u64, u64)> {
        let mut generations = [0; ROTATION as usize];
        for (i, g) in generations.iter_mut().enumerate() {
            let at = self.start + i as u64 * self.slot + code::slot_context() as u64;
            let read = |a| memory.read_u64(a).at(pid, "read the end of the vdso");
            *g = if read(at)? == MAGIC { read(at + 8)? } else { 0 };
        }
        let newest = generations.iter().copied().max().unwrap_or(0);
        let index = (0..ROTATION as usize).min_by_key(|&i| generations[i]).unwrap_or(0);
        Ok((self.start + index as u64 * self.slot, newest + 1))
    }
}

/// Lets a thread that was stopped inside the routine of an earlier, dead lmrun run out of it, and returns
/// it as it is then. `maps` are the process's mappings.
pub fn run_out(mut thread: Thread, pid: pid_t, maps: &[Vma], memory: &Memory) -> Result<Thread> {
    let tail = VdsoTail::find(pid, maps, memory)?;
    let left_behind = |rip: u64| {
        let in_scratch = maps.iter().find(|v| (v.start..v.end).contains(&rip)).is_some_and(|v| {
            let mut head = vec![0; code::batch().len()];
            v.inode == 0 && !v.is_special() && memory.read(v.start, &mut head).is_ok() && head == code::batch()
        });
        tail.contains(rip) || in_scratch
    };
    for _ in 0..200 {
        let rip = resumable(&thread.regs, RestartBlock::Kept, false).rip;
        if !left_behind(thread.regs.rip) && !left_behind(rip) {
            return Ok(thread);
        }
        ptrace::cont(thread.tid, 0).at(thread.tid, "resume")?;
        std::thread::sleep(std::time::Duration::from_micros(200));
        ptrace::interrupt(thread.tid).at(thread.tid, "interrupt")?;
        while !matches!(next_stop(thread.tid)?, Status::Event(ptrace::EVENT_STOP, _)) {
            ptrace::cont(thread.tid, 0).at(thread.tid, "resume")?;
        }
        thread = Thread::read(thread.tid)?;
    }
    Err(Error::Unexpected { tid: thread.tid, what: "does not leave the routine of an earlier attachment".into() })
}

/// One borrowed thread.
#[derive(Debug)]
struct Loan {
    thread: Thread,
    slot: u64,
    signalled: bool,
    /// Signals that came while it was ours although they cannot be blocked.
    stops: Vec<c_int>,
}

impl Loan {
    fn take(thread: Thread, slot: u64, allowed: Option<c_int>, signalled: bool) -> Result<Loan> {
        let mut loan = Loan { thread, slot, signalled, stops: Vec::new() };
        loan.rest()?;
        let open = allowed.map_or(0, |s| 1u64 << (s - 1));
        ptrace::set_sigmask(loan.thread.tid, !open).at(loan.thread.tid, "block signals")?;
        Ok(loan)
    }

    fn point(&mut self, rip: u64, set: impl FnOnce(&mut Regs)) -> Result<()> {
        let mut r = self.thread.regs;
        r.rip = rip;
        r.orig_rax = u64::MAX;
        r.eflags &= !0x500; // trap and direction flag
        set(&mut r);
        ptrace::set_regs(self.thread.tid, &r).at(self.thread.tid, "set registers")
    }

    /// Points into the routine, with a result that no undo takes for one.
    fn rest(&mut self) -> Result<()> {
        self.point(self.slot + code::slot_back(), |r| r.rax = u64::MAX)
    }

    fn call(&mut self, nr: c_long, args: [u64; 6]) -> Result<i64> {
        let tid = self.thread.tid;
        let [a, b, c, d, e, f] = args;
        self.point(self.slot, |r| {
            r.rax = nr as u64;
            (r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9) = (a, b, c, d, e, f);
        })?;
        let mut stops = 0;
        while stops < 2 {
            ptrace::syscall(tid).at(tid, "run a system call")?;
            match next_stop(tid)? {
                Status::SyscallStop => stops += 1,
                Status::Signal(s) => self.stops.push(s),
                _ => {}
            }
        }
        Ok(ptrace::regs(tid).at(tid, "read registers")?.rax as i64)
    }

    fn give_back(mut self) -> Result<()> {
        let tid = self.thread.tid;
        self.rest()?;
        ptrace::set_sigmask(tid, self.thread.mask).at(tid, "restore the signal mask")?;
        let own = resumable(&self.thread.regs, RestartBlock::Kept, self.signalled);
        ptrace::set_regs(tid, &own).at(tid, "restore registers")?;
        for signal in self.stops {
            let pid = nix::unistd::Pid::from_raw(tid);
            if let Ok(signal) = nix::sys::signal::Signal::try_from(signal) {
                nix::sys::signal::kill(pid, signal).map_err(std::io::Error::from).at(tid, "return a signal")?;
            }
        }
        Ok(())
    }
}

/// The leader of a process, borrowed for single calls. Dropped without [`Leader::give_back`] it finds its way by itself as soon as
/// it is detached.
#[derive(Debug)]
pub struct Leader<'a> {
    loan: Loan,
    pid: pid_t,
    memory: &'a Memory,
}

impl<'a> Leader<'a> {
    /// `signalled`: see [`resumable`]; `allowed`: a signal to leave unblocked.
    pub fn take(
        pid: pid_t,
        thread: &Thread,
        maps: &[Vma],
        memory: &'a Memory,
        signalled: bool,
        allowed: Option<c_int>,
    ) -> Result<Leader<'a>> {
        let tail = VdsoTail::find(pid, maps, memory)?;
        let (at, generation) = tail.oldest(pid, memory)?;
        memory.force_write(at, &slot(thread, generation, signalled)).at(pid, "write to the end of the vdso")?;
        Ok(Leader { loan: Loan::take(thread.clone(), at, allowed, signalled)?, pid, memory })
    }

    /// Makes one system call; an error of it is an error.
    pub fn call<const N: usize>(&mut self, name: &'static str, nr: c_long, args: [Arg; N], undo: Undo) -> Result<u64> {
        self.loan.rest()?;
        self.set_undo(undo)?;
        let mut raw = [0; 6];
        for (place, arg) in raw.iter_mut().zip(args) {
            let Arg::Value(v) = arg else { panic!("a single call has no entries to link to") };
            *place = v;
        }
        let r = self.loan.call(nr, raw)?;
        if r < 0 {
            let source = std::io::Error::from_raw_os_error(-r as i32);
            return Err(Error::Call { tid: self.loan.thread.tid, what: name, source });
        }
        Ok(r as u64)
    }

    /// From now on the result of the last call is in good hands.
    pub fn keep(&mut self) -> Result<()> {
        self.loan.rest()?;
        self.set_undo(Undo::Nothing)
    }

    fn set_undo(&self, undo: Undo) -> Result<()> {
        const UNDO: u64 = 16;
        let (nr, arg) = undo.call();
        let bytes = [nr.to_ne_bytes(), arg.to_ne_bytes()].concat();
        let at = self.loan.slot + code::slot_context() as u64 + UNDO;
        self.memory.force_write(at, &bytes).at(self.pid, "write to the end of the vdso")
    }

    pub fn give_back(mut self) -> Result<()> {
        self.keep()?;
        self.loan.give_back()
    }
}

/// A process whose threads are all borrowed: single calls of the leader, batches of every thread.
#[derive(Debug)]
pub struct Process<'a> {
    leader: Leader<'a>,
    others: Vec<Loan>,
    scratch: u64,
    scratch_len: u64,
    code_len: u64,
    /// Ends a batch; None: every batch is made of single calls.
    signal: Option<c_int>,
}

const TABLE: u64 = 32 * 1024;
const DATA: u64 = 64 * 1024;

impl<'a> Process<'a> {
    /// Borrows `threads`, the leader first. `signalled` as in [`resumable`], for each thread.
    pub fn take(pid: pid_t, threads: &[(Thread, bool)], maps: &[Vma], memory: &'a Memory) -> Result<Process<'a>> {
        let (first, first_signalled) = &threads[0];
        let signal = quiet_signal(pid, threads)?;
        let mut leader = Leader::take(pid, first, maps, memory, *first_signalled, signal)?;
        let code_len = (PAGE + threads.len() as u64 * SLOT).next_multiple_of(PAGE);
        let scratch_len = code_len + TABLE + DATA;
        let scratch = leader.call(
            "mmap",
            libc::SYS_mmap,
            [
                0.into(),
                scratch_len.into(),
                (libc::PROT_READ | libc::PROT_WRITE).into(),
                (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS).into(),
                (-1i64).into(),
                0.into(),
            ],
            Undo::Unmap(scratch_len),
        )?;
        let mut me = Process { leader, others: Vec::new(), scratch, scratch_len, code_len, signal };
        me.fill(threads)?;
        Ok(me)
    }

    fn fill(&mut self, threads: &[(Thread, bool)]) -> Result<()> {
        let (pid, memory) = (self.leader.pid, self.leader.memory);
        let mut text = vec![0; (self.code_len) as usize];
        text[..code::batch().len()].copy_from_slice(code::batch());
        for (i, (thread, signalled)) in threads.iter().enumerate() {
            let bytes = slot(thread, 0, *signalled);
            text[(PAGE + i as u64 * SLOT) as usize..][..bytes.len()].copy_from_slice(&bytes);
        }
        memory.write(self.scratch, &text).at(pid, "write to the scratch mapping")?;
        // mprotect's own result has nothing to undo, but until it is made the mapping can still go as a whole.
        let (at, len) = (self.scratch, self.code_len);
        let protect = (libc::PROT_READ | libc::PROT_EXEC) as u64;
        self.leader.keep()?;
        let leader = &mut self.leader;
        leader.call("mprotect", libc::SYS_mprotect, [at.into(), len.into(), protect.into()], Undo::Nothing)?;
        for (i, (thread, signalled)) in threads.iter().enumerate().skip(1) {
            self.others.push(Loan::take(thread.clone(), self.slot_of(i), self.signal, *signalled)?);
        }
        Ok(())
    }

    fn slot_of(&self, index: usize) -> u64 {
        self.scratch + PAGE + index as u64 * SLOT
    }

    /// Where a batch of this process goes.
    pub fn space(&self) -> Space {
        let table = self.scratch + self.code_len;
        Space { table, entries: (TABLE / 64) as usize, data: table + TABLE, data_len: DATA as usize }
    }

    pub fn memory(&self) -> &Memory {
        self.leader.memory
    }

    /// Has thread `index` make all calls of `batch`.
    pub fn run(&mut self, index: usize, batch: &mut Batch) -> Result<()> {
        let (pid, memory, text) = (self.leader.pid, self.leader.memory, self.scratch);
        let back = self.slot_of(index) + code::slot_back();
        let loan = if index == 0 { &mut self.leader.loan } else { &mut self.others[index - 1] };
        let tid = loan.thread.tid;
        let Some(signal) = self.signal else {
            return run_singly(loan, memory, batch);
        };
        let last = (libc::SYS_tgkill, [pid as u64, tid as u64, signal as u64]);
        let last = batch.store(tid, memory, Some(in_task(tid, last)?))?;
        let (table, len) = (batch.table(), batch.len() as u64);
        loan.point(text, |r| (r.rbx, r.r12, r.r13, r.r14, r.r15) = (table, len, table, back, last))?;
        loop {
            ptrace::cont(tid, 0).at(tid, "run a batch")?;
            match next_stop(tid)? {
                Status::Signal(s) if s == signal => break,
                Status::Signal(s) => loan.stops.push(s),
                _ => {}
            }
        }
        loan.point(back, |r| r.rax = u64::MAX)?;
        batch.load(tid, memory)
    }

    /// Gives every thread back and takes the scratch mapping away.
    pub fn give_back(mut self) -> Result<()> {
        for loan in self.others {
            loan.give_back()?;
        }
        let (at, len) = (self.scratch, self.scratch_len);
        self.leader.call("munmap", libc::SYS_munmap, [at.into(), len.into()], Undo::Nothing)?;
        self.leader.give_back()
    }
}

/// tgkill's numbers are those of the task's own pid namespace.
fn in_task(tid: pid_t, (nr, mut args): (c_long, [u64; 3])) -> Result<(c_long, [u64; 3])> {
    let status = proc::status(tid).at(tid, "read /proc/PID/status")?;
    let own = |field| status.innermost(field).at(tid, "read /proc/PID/status");
    (args[0], args[1]) = (own("NStgid")?.into(), own("NSpid")?.into());
    Ok((nr, args))
}

fn run_singly(loan: &mut Loan, memory: &Memory, batch: &mut Batch) -> Result<()> {
    let tid = loan.thread.tid;
    batch.store(tid, memory, None)?;
    for index in 0..batch.len() {
        let (nr, args) = batch.resolved(index);
        let result = loan.call(nr, args)?;
        if !batch.record(index, result) {
            break;
        }
    }
    loan.rest()?;
    batch.check(tid)
}

/// A signal that no thread blocks, none waits for, and nobody catches or ignores on purpose.
fn quiet_signal(pid: pid_t, threads: &[(Thread, bool)]) -> Result<Option<c_int>> {
    let status = proc::status(pid).at(pid, "read /proc/PID/status")?;
    let mask = |name| status.mask(name).at(pid, "read /proc/PID/status");
    let mut unfit = mask("SigCgt")? | mask("ShdPnd")?;
    for (thread, _) in threads {
        let own = proc::status(thread.tid).and_then(|s| s.mask("SigPnd"));
        unfit |= thread.mask | own.at(thread.tid, "read /proc/PID/status")?;
    }
    Ok(QUIET_SIGNALS.into_iter().find(|s| unfit & (1 << (s - 1)) == 0))
}
