//! Tasks under control: stopped by ptrace, their registers borrowed for remote system calls.
//!
//! Two kinds of control, for two kinds of risk. A live container must survive the death of lmrun at any
//! instant, so its tasks are *borrowed* ([`borrow`]): whatever happens, each finds its way back by itself.
//! A half-made container must not survive it, so *puppets* ([`puppet`]) die with their tracer.

pub mod batch;
pub mod borrow;
pub mod puppet;

use std::io;

use libc::pid_t;

use crate::sys::mem::Memory;
use crate::sys::ptrace::{self, Regs, Status};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("task {tid}: {what}")]
    Task { tid: pid_t, what: &'static str, source: io::Error },
    #[error("task {tid} ended while it was under control ({status:?})")]
    Ended { tid: pid_t, status: Status },
    #[error("task {tid}: remote {what}")]
    Call { tid: pid_t, what: &'static str, source: io::Error },
    #[error("task {tid}: {what}")]
    Unexpected { tid: pid_t, what: String },
}

pub type Result<T> = std::result::Result<T, Error>;

/// Adds the task and the step to an [`io::Error`].
pub(crate) trait At<T> {
    fn at(self, tid: pid_t, what: &'static str) -> Result<T>;
}

impl<T> At<T> for io::Result<T> {
    fn at(self, tid: pid_t, what: &'static str) -> Result<T> {
        self.map_err(|source| Error::Task { tid, what, source })
    }
}

/// A thread in a ptrace stop, with the registers and the mask that it stopped with.
#[derive(Debug, Clone)]
pub struct Thread {
    pub tid: pid_t,
    pub regs: Regs,
    /// Blocked signals, bit n-1 for signal n.
    pub mask: u64,
}

impl Thread {
    /// Reads a stopped thread.
    pub fn read(tid: pid_t) -> Result<Thread> {
        let regs = ptrace::regs(tid).at(tid, "read registers")?;
        let mask = ptrace::sigmask(tid).at(tid, "read signal mask")?;
        Ok(Thread { tid, regs, mask })
    }

    /// Whether the thread was stopped inside a system call (that it has not returned from).
    pub fn in_syscall(&self) -> bool {
        self.regs.orig_rax as i64 >= 0
    }
}

/// What to do with a call that its stop interrupted and that the kernel could have restarted from state of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RestartBlock {
    /// The task is the one that made the call: go on where it was, restart_syscall(2).
    Kept,
    /// Another task goes on with it: make the call once more, with its whole time.
    Lost,
}

/// Bytes of the `syscall` instruction.
const LENGTH_OF_SYSCALL: u64 = 2;

/// The kernel's own return values for a system call that is to be restarted (include/linux/errno.h).
const ERESTARTSYS: i64 = -512;
const ERESTARTNOINTR: i64 = -513;
const ERESTARTNOHAND: i64 = -514;
const ERESTART_RESTARTBLOCK: i64 = -516;
const EINTR: i64 = -(libc::EINTR as i64);

/// Registers with which a thread that stopped with `r` may run on in user mode. What the kernel would
/// do on its way out of the stop (arch/x86/kernel/signal.c, arch_do_signal_or_restart) is done
/// here, because registers that were set are not looked at any more.
///
/// `signalled`: a signal waits that will run a handler: then EINTR is its own.
pub fn resumable(r: &Regs, block: RestartBlock, signalled: bool) -> Regs {
    let mut f = *r;
    if (r.orig_rax as i64) >= 0 {
        let again = match r.rax as i64 {
            ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND => Some(r.orig_rax),
            ERESTART_RESTARTBLOCK => Some(match block {
                RestartBlock::Kept => libc::SYS_restart_syscall as u64,
                // A call that was itself a restart has no arguments of its own left.
                RestartBlock::Lost if r.orig_rax == libc::SYS_restart_syscall as u64 => {
                    return interrupted(f);
                }
                RestartBlock::Lost => r.orig_rax,
            }),
            EINTR if !signalled && returns_eintr_from_stops(r.orig_rax as i64) => Some(r.orig_rax),
            _ => None,
        };
        if let Some(nr) = again {
            f.rax = nr;
            f.rip -= LENGTH_OF_SYSCALL;
        }
    }
    f.orig_rax = u64::MAX;
    f
}

/// A thread as it was before the kernel set it to go on from its restart block: with the number of the call that it made
/// first, which must be known to make it elsewhere. Other threads are returned as they are.
///
/// The kernel does not remember the number. It is found where compilers put it, right before the `syscall` instruction;
/// and a futex wait by its arguments, as it is usually made by a function that takes the number as one.
pub fn with_first_call(thread: &Thread, memory: &Memory) -> Thread {
    let mut t = thread.clone();
    let r = &mut t.regs;
    let restarting = libc::SYS_restart_syscall as u64;
    let interrupted = r.orig_rax == restarting && r.rax as i64 == ERESTART_RESTARTBLOCK;
    let about_to = (r.orig_rax as i64) < 0 && r.rax == restarting;
    let syscall = if interrupted { r.rip.wrapping_sub(LENGTH_OF_SYSCALL) } else { r.rip };
    if !interrupted && !about_to {
        return t;
    }
    let mut code = [0; 34];
    if memory.read(syscall.wrapping_sub(32), &mut code).is_err() || code[32..] != [0x0f, 0x05] {
        return t;
    }
    if let Some(nr) = first_call(&code[..32], r) {
        if interrupted {
            r.orig_rax = nr;
        } else {
            r.rax = nr;
        }
    }
    t
}

fn first_call(code: &[u8], r: &Regs) -> Option<u64> {
    /// All calls that use a restart block (kernel/time, kernel/futex, fs/select.c).
    const CALLS: [i64; 4] = [libc::SYS_poll, libc::SYS_nanosleep, libc::SYS_futex, libc::SYS_clock_nanosleep];
    // mov eax, imm32
    let loads = code.windows(5).rev().filter(|w| w[0] == 0xb8);
    let numbers = loads.map(|w| i64::from(u32::from_le_bytes([w[1], w[2], w[3], w[4]])));
    let loaded = numbers.into_iter().find(|nr| CALLS.contains(nr));
    let wait = |op: u64| {
        matches!(
            op as i32 & !(libc::FUTEX_PRIVATE_FLAG | libc::FUTEX_CLOCK_REALTIME),
            libc::FUTEX_WAIT | libc::FUTEX_WAIT_BITSET
        )
    };
    let is_futex = || r.rdi.is_multiple_of(4) && r.rdi > 0xffff && wait(r.rsi) && r.r10 > 0xffff;
    loaded.or_else(|| is_futex().then_some(libc::SYS_futex)).map(|nr| nr as u64)
}

fn interrupted(mut f: Regs) -> Regs {
    f.rax = EINTR as u64;
    f.orig_rax = u64::MAX;
    f
}

/// signal(7), "Interruption of system calls and library functions by stop signals": calls that
/// return EINTR after a stop although no handler ran.
fn returns_eintr_from_stops(nr: i64) -> bool {
    [
        libc::SYS_epoll_wait,
        libc::SYS_epoll_pwait,
        libc::SYS_epoll_pwait2,
        libc::SYS_semop,
        libc::SYS_semtimedop,
        libc::SYS_io_getevents,
        libc::SYS_msgrcv,
        libc::SYS_msgsnd,
        libc::SYS_rt_sigtimedwait,
    ]
    .contains(&nr)
}

/// Makes a stopped thread that was not borrowed run on as if it had not been stopped: some calls return EINTR after a
/// stop. `signalled` as in [`resumable`].
pub fn hide_stop(thread: &Thread, signalled: bool) -> Result<()> {
    let (r, own) = (&thread.regs, resumable(&thread.regs, RestartBlock::Kept, signalled));
    if r.rax as i64 == EINTR && own.rip != r.rip {
        ptrace::set_regs(thread.tid, &own).at(thread.tid, "set registers")?;
    }
    Ok(())
}

/// Waits for the next stop of a task that runs.
fn next_stop(tid: pid_t) -> Result<Status> {
    let status = ptrace::wait(tid, false).at(tid, "wait for a stop")?.expect("waited without WNOHANG");
    match status {
        Status::Exited(_) | Status::Killed(_) => Err(Error::Ended { tid, status }),
        s => Ok(s),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn regs(orig_rax: i64, rax: i64) -> Regs {
        let mut r = ptrace::zeroed_regs();
        (r.orig_rax, r.rax, r.rip) = (orig_rax as u64, rax as u64, 0x1002);
        r
    }

    #[test]
    fn interrupted_calls_are_made_again() {
        let r = resumable(&regs(0, ERESTARTSYS), RestartBlock::Kept, false);
        assert_eq!((r.rax, r.rip, r.orig_rax as i64), (0, 0x1000, -1));
        let r = resumable(&regs(35, ERESTART_RESTARTBLOCK), RestartBlock::Kept, false);
        assert_eq!((r.rax, r.rip), (219, 0x1000));
        let r = resumable(&regs(35, ERESTART_RESTARTBLOCK), RestartBlock::Lost, false);
        assert_eq!((r.rax, r.rip), (35, 0x1000));
        let r = resumable(&regs(219, ERESTART_RESTARTBLOCK), RestartBlock::Lost, false);
        assert_eq!((r.rax as i64, r.rip), (EINTR, 0x1002));
    }

    #[test]
    fn the_first_call_is_found_before_its_instruction() {
        let mut code = [0x90; 32];
        code[20..25].copy_from_slice(&[0xb8, 0xe6, 0, 0, 0]);
        assert_eq!(first_call(&code, &regs(219, ERESTART_RESTARTBLOCK)), Some(libc::SYS_clock_nanosleep as u64));
        let mut r = regs(219, ERESTART_RESTARTBLOCK);
        assert_eq!(first_call(&[0x90; 32], &r), None);
        (r.rdi, r.rsi, r.r10) = (0x7f00_0000_1000, 128, 0x7f00_0000_2000);
        assert_eq!(first_call(&[0x90; 32], &r), Some(libc::SYS_futex as u64));
    }

    #[test]
    fn an_honest_eintr_stays() {
        assert_eq!(resumable(&regs(232, EINTR), RestartBlock::Kept, false).rip, 0x1000);
        assert_eq!(resumable(&regs(232, EINTR), RestartBlock::Kept, true).rip, 0x1002);
        assert_eq!(resumable(&regs(0, EINTR), RestartBlock::Kept, false).rip, 0x1002);
        assert_eq!(resumable(&regs(-1, EINTR), RestartBlock::Kept, false).rip, 0x1002);
    }
}
