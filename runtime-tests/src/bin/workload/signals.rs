//! Signal actions, masks, alternate stacks, pending signals.

use std::sync::atomic::{AtomicI32, AtomicU64, AtomicUsize, Ordering};

use crate::kernel::{raw, sys};
use crate::memory_map::{Map, PAGE};
use crate::procfs;
use crate::stage::{Check, Fallible, Setup, Stage, eventually, holds, same};
use crate::threads::Answerer;

pub const WORKLOADS: &[(&str, Setup)] = &[
    ("signal-actions", actions),
    ("signal-masks", masks),
    ("signal-stacks", stacks),
    ("signal-in-handler", in_handler),
    ("signal-pending", pending),
    ("signal-pending-thread", pending_thread),
    ("signal-pending-member", pending_member),
    ("signal-stopped", stopped),
];

/// The kernel's `struct sigaction`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Action {
    handler: usize,
    flags: u64,
    restorer: usize,
    mask: u64,
}

fn action_of(signal: i32) -> Fallible<Action> {
    let mut action = Action::default();
    raw!(SYS_rt_sigaction, signal, 0, &raw mut action, 8)?;
    Ok(action)
}

fn set_action(signal: i32, action: &Action) -> Fallible {
    raw!(SYS_rt_sigaction, signal, &raw const *action, 0, 8).map(drop)
}

extern "C" fn ignore(_: i32) {}

/// A restorer that the C library's own sigaction(2) put in.
fn restorer() -> Fallible<usize> {
    unsafe { libc::signal(libc::SIGUSR1, ignore as *const () as usize) };
    Ok(action_of(libc::SIGUSR1)?.restorer)
}

/// Every signal that can have an action gets another one: handler, flags, mask.
fn actions(stage: &mut Stage) -> Fallible<Check> {
    fn all_different(turn: u64) -> Fallible<Check> {
        const SA_RESTORER: u64 = 0x0400_0000;
        let restorer = restorer()?;
        let mut expected = Vec::new();
        for signal in (1..=64).filter(|s| ![libc::SIGKILL, libc::SIGSTOP, libc::SIGTERM].contains(s)) {
            let n = signal as u64 + turn;
            let flags = [libc::SA_RESTART, libc::SA_NODEFER, libc::SA_ONSTACK, libc::SA_RESETHAND, libc::SA_SIGINFO];
            let mut bits =
                flags.iter().enumerate().filter(|(bit, _)| n >> bit & 1 == 1).fold(0, |all, (_, f)| all | *f);
            if signal == libc::SIGCHLD {
                bits |= libc::SA_NOCLDSTOP | if turn > 0 { libc::SA_NOCLDWAIT } else { 0 };
            }
            let handler = match n % 5 {
                0 => libc::SIG_DFL,
                1 => libc::SIG_IGN,
                _ => ignore as *const () as usize,
            };
            let mask =
                n.wrapping_mul(0x0123_4567_89ab_cdef) & !(1 << (libc::SIGKILL - 1)) & !(1 << (libc::SIGSTOP - 1));
            let action = Action { handler, flags: bits as u32 as u64 | SA_RESTORER, restorer, mask };
            set_action(signal, &action)?;
            same("what was just set", action, action_of(signal)?)?;
            expected.push((signal, action));
        }
        Ok(Box::new(move || {
            expected.iter().try_for_each(|(signal, action)| {
                same(format!("action of signal {signal}"), *action, action_of(*signal)?)
            })
        }))
    }
    stage.member("child", |_| all_different(1))?;
    all_different(0)
}

/// A mask of its own for every thread.
fn masks(stage: &mut Stage) -> Fallible<Check> {
    fn block(mask: u64) -> Fallible {
        raw!(SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const mask, 0, 8).map(drop)
    }
    fn blocked() -> Fallible<u64> {
        let mut mask = 0u64;
        raw!(SYS_rt_sigprocmask, libc::SIG_BLOCK, 0, &raw mut mask, 8)?;
        Ok(mask)
    }
    // SIGTERM must reach the workload, SIGKILL and SIGSTOP cannot be blocked.
    const OPEN: u64 = 1 << (libc::SIGTERM - 1) | 1 << (libc::SIGKILL - 1) | 1 << (libc::SIGSTOP - 1);
    let start = |mask: u64| -> Fallible<Check> {
        block(mask & !OPEN)?;
        Ok(Box::new(move || same("mask", format!("{:#x}", mask & !OPEN), format!("{:#x}", blocked()?))))
    };
    stage.member("everything", move |_| start(!0))?;
    stage.member("nothing", move |_| start(0))?;
    let mut threads = Vec::new();
    for n in 1..6u64 {
        let mask = n.wrapping_mul(0xfedc_ba98_7654_3211) & !OPEN;
        threads.push((Answerer::start(move || block(mask))?, mask));
    }
    let mut own = start(0x8000_0000_5555_0000)?;
    Ok(Box::new(move || {
        own()?;
        for (thread, mask) in &threads {
            let mask = *mask;
            thread.ask(move || same("a thread's mask", format!("{mask:#x}"), format!("{:#x}", blocked()?)))?;
        }
        Ok(())
    }))
}

static STACK_SEEN: AtomicUsize = AtomicUsize::new(0);

extern "C" fn note_stack(_: i32) {
    let here = 0u8;
    STACK_SEEN.store(&raw const here as usize, Ordering::SeqCst);
}

/// Alternate stacks, one for each thread, and handlers that run on them.
fn stacks(_: &mut Stage) -> Fallible<Check> {
    const SS_AUTODISARM: i32 = 1 << 31;
    fn set(map: Map, flags: i32) -> Fallible {
        let stack = libc::stack_t { ss_sp: map.addr as *mut _, ss_flags: flags, ss_size: map.len };
        sys!(sigaltstack(&stack, std::ptr::null_mut())).map(drop)
    }
    fn runs_on(map: Map, flags: i32) -> Fallible {
        let mut now: libc::stack_t = unsafe { std::mem::zeroed() };
        sys!(sigaltstack(std::ptr::null(), &mut now))?;
        same("alternate stack", (map.addr, map.len, flags), (now.ss_sp as usize, now.ss_size, now.ss_flags))?;
        STACK_SEEN.store(0, Ordering::SeqCst);
        sys!(raise(libc::SIGUSR2))?;
        let seen = STACK_SEEN.load(Ordering::SeqCst);
        holds((map.addr..map.addr + map.len).contains(&seen), format!("the handler ran at {seen:#x}, not on its stack"))
    }
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = note_stack as *const () as usize;
    action.sa_flags = libc::SA_ONSTACK;
    sys!(sigaction(libc::SIGUSR2, &action, std::ptr::null_mut()))?;
    let mut threads = Vec::new();
    for flags in [0, SS_AUTODISARM, 0] {
        let map = Map::private(8 * PAGE)?;
        threads.push((Answerer::start(move || set(map, flags))?, map, flags));
    }
    let own = Map::private(16 * PAGE)?;
    set(own, 0)?;
    runs_on(own, 0)?;
    Ok(Box::new(move || {
        runs_on(own, 0)?;
        threads.iter().try_for_each(|(thread, map, flags)| {
            let (map, flags) = (*map, *flags);
            thread.ask(move || runs_on(map, flags))
        })
    }))
}

/// A thread stopped inside of a handler, on its alternate stack, with the handler's mask; it returns later to
/// where the signal met it.
fn in_handler(_: &mut Stage) -> Fallible<Check> {
    static LET_GO: AtomicI32 = AtomicI32::new(0);
    static INSIDE: AtomicI32 = AtomicI32::new(0);
    extern "C" fn stay(_: i32) {
        let turn = INSIDE.fetch_add(1, Ordering::SeqCst);
        while LET_GO.load(Ordering::SeqCst) <= turn {
            unsafe { libc::usleep(1000) };
        }
    }
    let stack = Map::private(16 * PAGE)?;
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = stay as *const () as usize;
    action.sa_flags = libc::SA_ONSTACK;
    unsafe { libc::sigfillset(&mut action.sa_mask) };
    sys!(sigaction(libc::SIGUSR2, &action, std::ptr::null_mut()))?;
    let thread: &'static Answerer = Box::leak(Box::new(Answerer::start(move || {
        let alternate = libc::stack_t { ss_sp: stack.addr as *mut _, ss_flags: 0, ss_size: stack.len };
        sys!(sigaltstack(&alternate, std::ptr::null_mut())).map(drop)
    })?));
    let begin = move || -> Fallible<std::thread::JoinHandle<Fallible>> {
        let before = INSIDE.load(Ordering::SeqCst);
        let asked = std::thread::spawn(|| thread.ask(|| sys!(raise(libc::SIGUSR2)).map(drop)));
        eventually("the handler runs", || INSIDE.load(Ordering::SeqCst) > before)?;
        Ok(asked)
    };
    let mut asked = Some(begin()?);
    Ok(Box::new(move || {
        let blocked = procfs::status(&format!("self/task/{}", thread.tid), &["SigBlk"])?;
        // All but SIGKILL, SIGSTOP and the two of the C library's own.
        holds(blocked[0].ends_with("fffffffe7ffbfeff"), format!("mask within a handler: {}", blocked[0]))?;
        LET_GO.fetch_add(1, Ordering::SeqCst);
        asked.take().ok_or("asked")?.join().map_err(|_| "join")??;
        asked = Some(begin()?);
        Ok(())
    }))
}

/// A signal as sigtimedwait(2) hands it out.
#[derive(Debug, PartialEq, Clone)]
struct Delivered {
    signal: i32,
    code: i32,
    pid: i32,
    uid: u32,
    value: usize,
}

/// Takes every pending signal among `signals`, in the kernel's order.
fn take(signals: &[i32]) -> Fallible<Vec<Delivered>> {
    let set = set_of(signals);
    let mut all = Vec::new();
    loop {
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let no_time: libc::timespec = unsafe { std::mem::zeroed() };
        let signal = unsafe { libc::sigtimedwait(&set, &mut info, &no_time) };
        if signal < 0 {
            return Ok(all);
        }
        let (pid, uid, value) = unsafe { (info.si_pid(), info.si_uid(), info.si_value().sival_ptr as usize) };
        let value = if info.si_code == libc::SI_QUEUE { value } else { 0 };
        all.push(Delivered { signal, code: info.si_code, pid, uid, value });
    }
}

fn set_of(signals: &[i32]) -> libc::sigset_t {
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in signals {
            libc::sigaddset(&mut set, *signal);
        }
        set
    }
}

fn block(signals: &[i32]) -> Fallible {
    let set = set_of(signals);
    same("pthread_sigmask", 0, unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) })
}

fn queue(signal: i32, value: usize) -> Fallible {
    sys!(sigqueue(libc::getpid(), signal, libc::sigval { sival_ptr: value as *mut _ })).map(drop)
}

const SENT: [i32; 6] = [libc::SIGUSR1, libc::SIGUSR2, libc::SIGHUP, 40, 41, 64];

/// Sends the process a fixed set of signals; what comes out must not depend on a checkpoint in between.
fn send_to_process() -> Fallible {
    sys!(kill(libc::getpid(), libc::SIGUSR1))?;
    queue(libc::SIGUSR2, 0xdead_beef_0000_0001)?;
    sys!(kill(libc::getpid(), 41))?;
    for n in 0..20 {
        queue(40, 1000 + n)?;
    }
    queue(64, usize::MAX)?;
    queue(41, 7)
}

/// Signals that wait for the whole process, several of the same number among them.
fn pending(_: &mut Stage) -> Fallible<Check> {
    block(&SENT)?;
    send_to_process()?;
    let expected = take(&SENT)?;
    same("number of signals", 25, expected.len())?;
    send_to_process()?;
    Ok(Box::new(move || {
        same("pending signals", &expected, &take(&SENT)?)?;
        send_to_process()
    }))
}

/// Signals that wait for one thread, beside those that wait for the process.
fn pending_thread(_: &mut Stage) -> Fallible<Check> {
    block(&SENT)?;
    let mut threads = Vec::new();
    for n in 0..3 {
        threads.push((Answerer::start(|| Ok(()))?, n));
    }
    fn send(thread: &Answerer, n: usize) -> Fallible {
        let pid = unsafe { libc::getpid() };
        raw!(SYS_tgkill, pid, thread.tid, libc::SIGUSR2)?;
        for value in 0..5usize {
            let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
            (info.si_signo, info.si_code) = (40, libc::SI_QUEUE);
            // si_pid, si_uid, si_value of the kernel's layout.
            unsafe {
                let words = (&raw mut info).cast::<u32>();
                words.add(4).write(pid as u32);
                words.add(6).cast::<usize>().write(100 * n + value);
            }
            raw!(SYS_rt_tgsigqueueinfo, pid, thread.tid, 40, &raw const info)?;
        }
        Ok(())
    }
    type Told = Vec<(i32, i32, usize)>;
    fn take_on(thread: &Answerer) -> Fallible<Told> {
        let (tell, told) = std::sync::mpsc::channel();
        thread.ask(move || {
            let got = take(&[libc::SIGUSR2, 40])?;
            tell.send(got.iter().map(|d| (d.signal, d.code, d.value)).collect()).map_err(|e| e.to_string())
        })?;
        told.recv().map_err(|e| e.to_string())
    }
    let send_all = move |threads: &[(Answerer, usize)]| -> Fallible {
        threads.iter().try_for_each(|(thread, n)| send(thread, *n))?;
        sys!(kill(libc::getpid(), libc::SIGUSR1))?;
        queue(41, 9)
    };
    threads.iter().try_for_each(|(thread, n)| send(thread, *n))?;
    let expected = threads.iter().map(|(thread, _)| take_on(thread)).collect::<Fallible<Vec<Told>>>()?;
    same("values", (0..5).map(|v| 200 + v).collect(), expected[2][1..].iter().map(|s| s.2).collect::<Vec<_>>())?;
    send_all(&threads)?;
    Ok(Box::new(move || {
        for ((thread, n), expected) in threads.iter().zip(&expected) {
            same(format!("signals pending for thread {n}"), expected, &take_on(thread)?)?;
        }
        let rest: Vec<_> = take(&SENT)?.iter().map(|d| (d.signal, d.value)).collect();
        same("signals pending for the process", vec![(libc::SIGUSR1, 0), (41, 9)], rest)?;
        send_all(&threads)
    }))
}

/// A pending SIGCHLD, and a pending signal from a timer, of a child.
fn pending_member(stage: &mut Stage) -> Fallible<Check> {
    stage.member("child", |_| {
        block(&[libc::SIGCHLD, libc::SIGALRM])?;
        let begin = || -> Fallible<i32> {
            let child = crate::stage::fork(|| unsafe { libc::_exit(9) })?;
            sys!(alarm(1))?;
            let is_pending = |signal: i32| {
                let mut set = set_of(&[]);
                unsafe { libc::sigpending(&mut set) == 0 && libc::sigismember(&set, signal) == 1 }
            };
            eventually("SIGCHLD and SIGALRM are pending", || is_pending(libc::SIGCHLD) && is_pending(libc::SIGALRM))?;
            Ok(child)
        };
        let mut child = begin()?;
        Ok(Box::new(move || {
            let got = take(&[libc::SIGCHLD, libc::SIGALRM])?;
            let told: Vec<_> = got.iter().map(|d| (d.signal, d.code)).collect();
            same("pending", vec![(libc::SIGALRM, libc::SI_KERNEL), (libc::SIGCHLD, libc::CLD_EXITED)], told)?;
            same("sender of SIGCHLD", child, got[1].pid)?;
            sys!(waitpid(child, std::ptr::null_mut(), 0))?;
            child = begin()?;
            Ok(())
        }))
    })?;
    Ok(Box::new(|| Ok(())))
}

/// A child that job control has stopped: it stays stopped, and goes on when told.
fn stopped(_: &mut Stage) -> Fallible<Check> {
    let beats = Map::shared(PAGE)?;
    let child = crate::stage::fork(move || {
        loop {
            beats.word(0).fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    })?;
    let stop = move || -> Fallible<u64> {
        sys!(kill(child, libc::SIGSTOP))?;
        eventually("stopped", || {
            procfs::status(&child.to_string(), &["State"]).is_ok_and(|s| s[0].contains("T (stopped)"))
        })?;
        Ok(beats.word(0).load(Ordering::SeqCst))
    };
    let at = AtomicU64::new(stop()?);
    Ok(Box::new(move || {
        let state = procfs::status(&child.to_string(), &["State"])?;
        holds(state[0].contains("T (stopped)"), format!("a stopped process is {}", state[0]))?;
        same("beats of a stopped process", at.load(Ordering::SeqCst), beats.word(0).load(Ordering::SeqCst))?;
        sys!(kill(child, libc::SIGCONT))?;
        let before = at.load(Ordering::SeqCst);
        eventually("it goes on", || beats.word(0).load(Ordering::SeqCst) > before)?;
        at.store(stop()?, Ordering::SeqCst);
        Ok(())
    }))
}
