//! Signals: actions, alternate stacks, what is pending.

use crate::engine::{Error, Result};
use crate::image::records::core::ThreadSasEntry;
use crate::image::records::task::{SaEntry, SiginfoEntry, SignalQueueEntry};
use crate::sys::mem::Memory;
use crate::sys::ptrace;
use crate::tracee::batch::Batch;

const NSIG: u64 = 64;
/// `struct kernel_sigaction`: handler, flags, restorer, mask.
const ACTION: usize = 32;
/// `stack_t`: sp, flags, size.
const STACK: usize = 24;
const SIGSET: u64 = 8;

/// Signals whose action cannot be set.
fn is_fixed(signal: u64) -> bool {
    signal == libc::SIGKILL as u64 || signal == libc::SIGSTOP as u64
}

/// Asks for the actions of all signals; the token is where the answers will be.
pub fn ask_actions(b: &mut Batch) -> u64 {
    let room = b.room(ACTION * NSIG as usize);
    for signal in (1..=NSIG).filter(|s| !is_fixed(*s)) {
        let at = room + (signal - 1) * ACTION as u64;
        b.call("rt_sigaction", libc::SYS_rt_sigaction, [signal.into(), 0.into(), at.into(), SIGSET.into()]);
    }
    room
}

/// The 62 actions in order of their signals, SIGKILL and SIGSTOP left out, as the record has it.
pub fn answer_actions(room: u64, memory: &Memory) -> std::io::Result<Vec<SaEntry>> {
    let raw = memory.read_vec(room, ACTION * NSIG as usize)?;
    Ok((1..=NSIG)
        .filter(|s| !is_fixed(*s))
        .map(|s| {
            let [sigaction, flags, restorer, mask] = words(&raw[(s as usize - 1) * ACTION..][..ACTION]);
            SaEntry { sigaction, flags, restorer, mask, compat_sigaction: None, mask_extended: None }
        })
        .collect())
}

/// The actions with their signals.
fn numbered(actions: &[SaEntry]) -> impl Iterator<Item = (u64, &SaEntry)> {
    (1..=NSIG).filter(|s| !is_fixed(*s)).zip(actions)
}

/// Sets all actions but that of SIGTRAP, which ends batches. Comes before anything is pending: to ignore a signal throws
/// away what is.
pub fn apply_actions(actions: &[SaEntry], b: &mut Batch) {
    for (signal, a) in numbered(actions).filter(|(s, _)| *s != libc::SIGTRAP as u64) {
        let at = b.bytes(&action_bytes(a));
        b.call("rt_sigaction", libc::SYS_rt_sigaction, [signal.into(), at.into(), 0.into(), SIGSET.into()]);
    }
}

/// The action of SIGTRAP, to be set by itself in the end.
pub fn trap_action(actions: &[SaEntry]) -> Option<[u8; ACTION]> {
    numbered(actions).find(|(s, _)| *s == libc::SIGTRAP as u64).map(|(_, a)| action_bytes(a))
}

fn action_bytes(a: &SaEntry) -> [u8; ACTION] {
    let mut out = [0; ACTION];
    for (place, v) in out.chunks_exact_mut(8).zip([a.sigaction, a.flags, a.restorer, a.mask]) {
        place.copy_from_slice(&v.to_ne_bytes());
    }
    out
}

pub fn ask_stack(b: &mut Batch) -> u64 {
    let room = b.room(STACK);
    b.call("sigaltstack", libc::SYS_sigaltstack, [0.into(), room.into()]);
    room
}

pub fn answer_stack(room: u64, memory: &Memory) -> std::io::Result<ThreadSasEntry> {
    let [ss_sp, flags, ss_size] = words(&memory.read_vec(room, STACK)?);
    Ok(ThreadSasEntry { ss_sp, ss_size, ss_flags: flags as u32 })
}

pub fn apply_stack(e: &ThreadSasEntry, b: &mut Batch) {
    // SS_ONSTACK is where the stack pointer is, not something to set.
    let flags = e.ss_flags & !(libc::SS_ONSTACK as u32);
    let bytes = [e.ss_sp, u64::from(flags), e.ss_size].map(u64::to_ne_bytes).concat();
    let at = b.bytes(&bytes);
    b.call("sigaltstack", libc::SYS_sigaltstack, [at.into(), 0.into()]);
}

fn words<const N: usize>(raw: &[u8]) -> [u64; N] {
    std::array::from_fn(|i| u64::from_ne_bytes(raw[i * 8..][..8].try_into().expect("eight bytes")))
}

/// What is queued for the thread, or, with `shared`, for its process.
pub fn collect_pending(tid: libc::pid_t, shared: bool) -> Result<SignalQueueEntry> {
    let all = ptrace::pending_signals(tid, shared).map_err(|e| Error::proc(tid, e))?;
    Ok(SignalQueueEntry { signals: all.into_iter().map(|s| SiginfoEntry { siginfo: s.to_vec() }).collect() })
}

/// The id of the POSIX timer that sent a signal. Such a signal belongs to its timer, which counts how often it expires
/// meanwhile: the timer sends it again.
pub fn timer_of(s: &SiginfoEntry) -> Option<u32> {
    const SI_TIMER: i32 = -2;
    let word = |at: usize| s.siginfo.get(at..at + 4).map(|b| i32::from_ne_bytes(b.try_into().expect("four bytes")));
    (word(8)? == SI_TIMER).then(|| word(16)).flatten().map(|id| id as u32)
}

/// Queues signals again. A task may send any siginfo to itself (rt_sigqueueinfo(2)), nobody else may.
/// `pid` and `tid` are those inside the container; with `shared` the process gets them.
pub fn apply_pending(queue: &SignalQueueEntry, pid: u32, tid: u32, shared: bool, b: &mut Batch) {
    for s in queue.signals.iter().filter(|s| timer_of(s).is_none()) {
        let signal = i32::from_ne_bytes(s.siginfo[..4].try_into().expect("four bytes"));
        let at = b.bytes(&s.siginfo);
        if shared {
            b.call("rt_sigqueueinfo", libc::SYS_rt_sigqueueinfo, [pid.into(), signal.into(), at.into()]);
        } else {
            let args = [pid.into(), tid.into(), signal.into(), at.into()];
            b.call("rt_tgsigqueueinfo", libc::SYS_rt_tgsigqueueinfo, args);
        }
    }
}

/// Throws away what puppets were sent while they were built: SIGCHLD of tasks that ended.
pub fn drain(b: &mut Batch, times: usize) {
    let all = b.bytes(&u64::MAX.to_ne_bytes());
    let none = b.room(16);
    for _ in 0..times {
        let args = [all.into(), 0.into(), none.into(), SIGSET.into()];
        b.attempt("rt_sigtimedwait", libc::SYS_rt_sigtimedwait, args);
    }
}

/// The signal mask, the signals it leaves that have something pending and run a handler: EINTR is then honest.
pub fn is_signalled(pending: &SignalQueueEntry, shared: &SignalQueueEntry, mask: u64) -> bool {
    pending.signals.iter().chain(&shared.signals).any(|s| {
        let signal = i32::from_ne_bytes(s.siginfo[..4].try_into().expect("four bytes"));
        mask & (1 << (signal - 1)) == 0
    })
}
