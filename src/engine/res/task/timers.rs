//! Interval timers (setitimer(2)) and POSIX timers (timer_create(2)).

use libc::pid_t;

use crate::engine::{Error, Result};
use crate::image::records::task::{ItimerEntry, PosixTimerEntry, TaskTimersEntry};
use crate::sys::mem::Memory;
use crate::sys::proc;
use crate::tracee::batch::{Arg, Batch};

/// `struct itimerval` and `struct itimerspec`: interval, then time left, each in seconds and a fraction.
const VALUE: usize = 32;
/// `struct sigevent`
const SIGEVENT: usize = 64;
const SIGEV_THREAD_ID: u32 = 4;
/// include/uapi/linux/prctl.h, since 6.15: timer_create takes the id that is asked for.
const PR_TIMER_CREATE_RESTORE_IDS: i64 = 77;

#[derive(Debug)]
pub struct Asked {
    intervals: u64,
    posix: Vec<(proc::Timer, u64, usize)>,
}

/// Asks for the time that all timers of the process have left.
pub fn ask(pid: pid_t, b: &mut Batch) -> Result<Asked> {
    let intervals = b.room(3 * VALUE);
    for which in 0..3u64 {
        let at = intervals + which * VALUE as u64;
        b.call("getitimer", libc::SYS_getitimer, [which.into(), at.into()]);
    }
    let timers = proc::timers(pid).map_err(|e| Error::proc(pid, e))?;
    let posix = timers.into_iter().map(|t| {
        let room = b.room(VALUE);
        let id = t.id;
        b.call("timer_gettime", libc::SYS_timer_gettime, [id.into(), room.into()]);
        let overrun = b.call("timer_getoverrun", libc::SYS_timer_getoverrun, [id.into()]);
        (t, room, overrun)
    });
    Ok(Asked { intervals, posix: posix.collect() })
}

pub fn answer(asked: Asked, pid: pid_t, b: &Batch, memory: &Memory) -> Result<TaskTimersEntry> {
    let read = |at| memory.read_vec(at, VALUE).map_err(|e| Error::proc(pid, e));
    let mut intervals = Vec::new();
    for which in 0..3 {
        let [isec, iusec, vsec, vusec] = fields(&read(asked.intervals + which * VALUE as u64)?);
        intervals.push(ItimerEntry { isec, iusec, vsec, vusec });
    }
    let [real, virt, prof] = intervals.try_into().expect("three of them");
    let mut posix = Vec::new();
    for (t, room, overrun) in asked.posix {
        let [isec, insec, vsec, vnsec] = fields(&read(room)?);
        let notify_thread_id = match t.notify & SIGEV_THREAD_ID {
            0 => None,
            _ => {
                Some(proc::status(t.target).and_then(|s| s.innermost("NSpid")).map_err(|e| Error::proc(pid, e))? as i32)
            }
        };
        posix.push(PosixTimerEntry {
            it_id: t.id,
            clock_id: t.clock,
            si_signo: t.signal,
            it_sigev_notify: t.notify,
            sival_ptr: t.value,
            overrun: b.result(overrun) as u32,
            isec,
            insec,
            vsec,
            vnsec,
            notify_thread_id,
        });
    }
    Ok(TaskTimersEntry { real, virt, prof, posix })
}

fn fields(raw: &[u8]) -> [u64; 4] {
    std::array::from_fn(|i| u64::from_ne_bytes(raw[i * 8..][..8].try_into().expect("eight bytes")))
}

/// Creates the POSIX timers, stopped. They get their old ids: on kernels that cannot be asked for one, ids
/// are given in ascending order, so those in between are created and deleted again.
pub fn apply_create(e: &TaskTimersEntry, restore_ids: bool, b: &mut Batch) {
    if e.posix.is_empty() {
        return;
    }
    let mut timers: Vec<_> = e.posix.iter().collect();
    timers.sort_by_key(|t| t.it_id);
    if restore_ids {
        b.call("prctl", libc::SYS_prctl, [PR_TIMER_CREATE_RESTORE_IDS.into(), 1.into(), 0.into(), 0.into(), 0.into()]);
    }
    let mut next = 0;
    for t in timers {
        let id = b.bytes(&t.it_id.to_ne_bytes());
        if !restore_ids {
            for unused in next..t.it_id {
                b.call("timer_create", libc::SYS_timer_create, [t.clock_id.into(), 0.into(), id.into()]);
                b.call("timer_delete", libc::SYS_timer_delete, [unused.into()]);
            }
            next = t.it_id + 1;
        }
        let mut event = [0; SIGEVENT];
        event[..8].copy_from_slice(&t.sival_ptr.to_ne_bytes());
        event[8..12].copy_from_slice(&t.si_signo.to_ne_bytes());
        event[12..16].copy_from_slice(&t.it_sigev_notify.to_ne_bytes());
        event[16..20].copy_from_slice(&t.notify_thread_id.unwrap_or(0).to_ne_bytes());
        let event = b.bytes(&event);
        b.call("timer_create", libc::SYS_timer_create, [t.clock_id.into(), event.into(), id.into()]);
    }
    if restore_ids {
        b.call("prctl", libc::SYS_prctl, [PR_TIMER_CREATE_RESTORE_IDS.into(), 0.into(), 0.into(), 0.into(), 0.into()]);
    }
}

/// Starts all timers with the time that they had left. `expired`: timers whose signal was pending, which send it at once.
pub fn apply_start(e: &TaskTimersEntry, expired: &[u32], b: &mut Batch) {
    for (which, t) in [&e.real, &e.virt, &e.prof].into_iter().enumerate() {
        // An interval timer whose signal has not been taken yet shows no time left; set so it would never run again.
        let waits = (t.vsec, t.vusec) == (0, 0) && (t.isec, t.iusec) != (0, 0);
        let left = if waits { 1 } else { t.vusec };
        let at = b.bytes(&[t.isec, t.iusec, t.vsec, left].map(u64::to_ne_bytes).concat());
        b.call("setitimer", libc::SYS_setitimer, [which.into(), at.into(), 0.into()]);
    }
    for t in &e.posix {
        let (sec, nsec) = if expired.contains(&t.it_id) { (0, 1) } else { (t.vsec, t.vnsec) };
        let at = b.bytes(&[t.isec, t.insec, sec, nsec].map(u64::to_ne_bytes).concat());
        b.call("timer_settime", libc::SYS_timer_settime, [t.it_id.into(), 0.into(), at.into(), 0.into()]);
    }
}

/// Whether this kernel's timer_create can be asked for an id; tried on the caller.
pub fn ask_restore_ids(b: &mut Batch) -> usize {
    const QUERY: Arg = Arg::Value(2);
    b.attempt("prctl", libc::SYS_prctl, [PR_TIMER_CREATE_RESTORE_IDS.into(), QUERY, 0.into(), 0.into(), 0.into()])
}
