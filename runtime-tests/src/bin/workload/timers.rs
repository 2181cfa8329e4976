//! Interval timers and POSIX timers.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::kernel::{raw, sys};
use crate::stage::{Check, Fallible, Setup, Stage, eventually, holds, same};
use crate::threads::Answerer;

pub const WORKLOADS: &[(&str, Setup)] = &[
    ("timer-interval", interval),
    ("timer-posix", posix),
    ("timer-posix-delivers", delivers),
    ("timer-posix-overrun", overrun),
];

fn microseconds(t: libc::timeval) -> i64 {
    t.tv_sec * 1_000_000 + t.tv_usec
}

static RINGS: AtomicU64 = AtomicU64::new(0);

extern "C" fn ring(_: i32) {
    RINGS.fetch_add(1, Ordering::SeqCst);
}

/// ITIMER_REAL rings on; VIRTUAL and PROF keep what is left of them. Each process has its own.
fn interval(stage: &mut Stage) -> Fallible<Check> {
    fn start(seed: i64) -> Fallible<Check> {
        let time = |us: i64| libc::timeval { tv_sec: us / 1_000_000, tv_usec: us % 1_000_000 };
        unsafe { libc::signal(libc::SIGALRM, ring as *const () as usize) };
        let settings = [
            (libc::ITIMER_REAL, 10_000, 10_000 + seed),
            (libc::ITIMER_VIRTUAL, 500_000_000, 7_000_000 + seed),
            (libc::ITIMER_PROF, 600_000_000, 0),
        ];
        for (which, first, then) in settings {
            let value = libc::itimerval { it_value: time(first), it_interval: time(then) };
            sys!(setitimer(which, &value, std::ptr::null_mut()))?;
        }
        Ok(Box::new(move || {
            for (which, first, then) in settings {
                let mut now: libc::itimerval = unsafe { std::mem::zeroed() };
                sys!(getitimer(which, &mut now))?;
                same(format!("interval of timer {which}"), then, microseconds(now.it_interval))?;
                let left = microseconds(now.it_value);
                let most = first.max(then) + 20_000;
                // Processor time passes slowly in a workload that mostly sleeps.
                let least = if which == libc::ITIMER_REAL { 0 } else { first - 60_000_000 };
                holds((least..=most).contains(&left), format!("timer {which}: {left} us are left of {first}"))?;
            }
            let before = RINGS.load(Ordering::SeqCst);
            eventually("ITIMER_REAL rings on", || RINGS.load(Ordering::SeqCst) > before + 2)
        }))
    }
    stage.member("child", |_| start(111))?;
    start(0)
}

/// `struct sigevent` as the kernel has it: with a thread id where the C library hides it.
#[repr(C)]
struct Event {
    value: usize,
    signal: i32,
    notify: i32,
    tid: i32,
    _pad: [i32; 11],
}

const SIGEV_SIGNAL: i32 = 0;
const SIGEV_NONE: i32 = 1;
const SIGEV_THREAD_ID: i32 = 4;

fn create(clock: i32, notify: i32, signal: i32, value: usize, tid: i32) -> Fallible<i32> {
    let event = Event { value, signal, notify, tid, _pad: [0; 11] };
    let mut id = -1i32;
    raw!(SYS_timer_create, clock, &raw const event, &raw mut id)?;
    Ok(id)
}

fn arm(id: i32, first: Duration, then: Duration) -> Fallible {
    let time = |d: Duration| libc::timespec { tv_sec: d.as_secs() as i64, tv_nsec: d.subsec_nanos() as i64 };
    let value = libc::itimerspec { it_value: time(first), it_interval: time(then) };
    raw!(SYS_timer_settime, id, 0, &raw const value, 0).map(drop)
}

fn left(id: i32) -> Fallible<(Duration, Duration)> {
    let mut value: libc::itimerspec = unsafe { std::mem::zeroed() };
    raw!(SYS_timer_gettime, id, &raw mut value)?;
    let time = |t: libc::timespec| Duration::new(t.tv_sec as u64, t.tv_nsec as u32);
    Ok((time(value.it_value), time(value.it_interval)))
}

/// Ids, clocks, notifications, what is left, intervals; also timers that are not armed.
fn posix(_: &mut Stage) -> Fallible<Check> {
    const HOUR: Duration = Duration::from_secs(3600);
    let nothing = Duration::ZERO;
    let thread = Answerer::start(|| Ok(()))?;
    let mut all = Vec::new();
    for (n, clock) in
        [libc::CLOCK_REALTIME, libc::CLOCK_MONOTONIC, libc::CLOCK_BOOTTIME, libc::CLOCK_PROCESS_CPUTIME_ID]
            .into_iter()
            .enumerate()
    {
        all.push((create(clock, SIGEV_SIGNAL, 40 + n as i32, 0x1234_5678_9abc_0000 + n, 0)?, HOUR, nothing));
        // An id that is given back leaves a hole.
        raw!(SYS_timer_delete, create(clock, SIGEV_NONE, 0, 0, 0)?)?;
        all.push((create(clock, SIGEV_NONE, 0, n, 0)?, HOUR, Duration::from_millis(1234)));
        all.push((create(clock, SIGEV_THREAD_ID, 50, n, thread.tid)?, nothing, nothing));
    }
    for (id, first, then) in &all {
        arm(*id, *first, *then)?;
    }
    let list = || crate::procfs::text("/proc/self/timers");
    let before = list().ok();
    Ok(Box::new(move || {
        let _ = &thread;
        for (id, first, then) in &all {
            let (value, interval) = left(*id)?;
            same(format!("interval of timer {id}"), *then, interval)?;
            let least = first.saturating_sub(Duration::from_secs(120));
            holds((least..=*first).contains(&value), format!("timer {id}: {value:?} are left of {first:?}"))?;
        }
        match &before {
            Some(before) => same("/proc/self/timers", before, &list()?),
            None => Ok(()),
        }
    }))
}

/// Timers that are due after: one-shot and periodic, to the process and to one thread, with their values.
fn delivers(_: &mut Stage) -> Fallible<Check> {
    static SEEN: [AtomicU64; 3] = [const { AtomicU64::new(0) }; 3];
    static WRONG_THREAD: AtomicU64 = AtomicU64::new(0);
    static TID: AtomicU64 = AtomicU64::new(0);
    extern "C" fn on_signal(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        let value = unsafe { (*info).si_value().sival_ptr as usize };
        let good = unsafe { (*info).si_code == libc::SI_TIMER } && (7001..=7003).contains(&value);
        if good {
            SEEN[value - 7001].fetch_add(1, Ordering::SeqCst);
        }
        let here = unsafe { libc::syscall(libc::SYS_gettid) } as u64;
        if !good || value == 7003 && here != TID.load(Ordering::SeqCst) {
            WRONG_THREAD.store(value as u64 | 1 << 32, Ordering::SeqCst);
        }
    }
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_signal as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
    sys!(sigaction(45, &action, std::ptr::null_mut()))?;
    let thread = Answerer::start(|| Ok(()))?;
    TID.store(thread.tid as u64, Ordering::SeqCst);
    let once = create(libc::CLOCK_MONOTONIC, SIGEV_SIGNAL, 45, 7001, 0)?;
    let often = create(libc::CLOCK_REALTIME, SIGEV_SIGNAL, 45, 7002, 0)?;
    let to_thread = create(libc::CLOCK_BOOTTIME, SIGEV_THREAD_ID, 45, 7003, thread.tid)?;
    let start = Duration::from_millis(1200);
    arm(once, start, Duration::ZERO)?;
    arm(often, Duration::from_millis(20), Duration::from_millis(20))?;
    arm(to_thread, Duration::from_millis(20), Duration::from_millis(20))?;
    let mut turns = 0;
    Ok(Box::new(move || {
        let _ = &thread;
        turns += 1;
        let before = [SEEN[1].load(Ordering::SeqCst), SEEN[2].load(Ordering::SeqCst)];
        eventually("periodic timers ring", || (1..3).all(|n| SEEN[n].load(Ordering::SeqCst) > before[n - 1] + 2))?;
        eventually("a one-shot timer rings", || SEEN[0].load(Ordering::SeqCst) >= turns)?;
        same("rings of a one-shot timer", turns, SEEN[0].load(Ordering::SeqCst))?;
        same("signals with a wrong value or to a wrong thread", 0, WRONG_THREAD.load(Ordering::SeqCst))?;
        arm(once, start, Duration::ZERO)
    }))
}

/// A periodic timer whose signal is blocked: the signal waits, and the timer counts its overruns on. (How many there
/// were before the checkpoint is the one thing that no call can put back.)
fn overrun(_: &mut Stage) -> Fallible<Check> {
    let set = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigaddset(&mut set, 46);
        set
    };
    same("pthread_sigmask", 0, unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) })?;
    let id = create(libc::CLOCK_MONOTONIC, SIGEV_SIGNAL, 46, 99, 0)?;
    arm(id, Duration::from_millis(1), Duration::from_millis(1))?;
    std::thread::sleep(Duration::from_millis(100));
    let take = move || -> Fallible<i64> {
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let wait = libc::timespec { tv_sec: 5, tv_nsec: 0 };
        let signal = sys!(sigtimedwait(&set, &mut info, &wait))? as i32;
        same("the timer's signal", (46, libc::SI_TIMER), (signal, info.si_code))?;
        same("value", 99, unsafe { info.si_value().sival_ptr as usize })?;
        raw!(SYS_timer_getoverrun, id)
    };
    Ok(Box::new(move || {
        take()?;
        std::thread::sleep(Duration::from_millis(300));
        let count = take()?;
        holds(count >= 200, format!("overruns of a 1 ms timer in more than 300 ms: {count}"))
    }))
}
