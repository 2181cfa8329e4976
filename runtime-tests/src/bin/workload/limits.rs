//! Limits, priorities, and a process's wishes about its relatives.

use crate::kernel::{raw, sys};
use crate::memory_map::{Map, PAGE};
use crate::procfs;
use crate::stage::{Check, Fallible, Setup, Stage, eventually, fork, same, sleep_for_good};
use crate::threads::Answerer;

pub const WORKLOADS: &[(&str, Setup)] = &[
    ("limits", limits),
    ("limits-oom-score", oom_score),
    ("priorities", priorities),
    ("affinity", affinity),
    ("prctl-values", prctl_values),
    ("subreaper", subreaper),
    ("parent-death-signal", parent_death_signal),
];

/// Every resource limit, lowered: soft alone, and soft and hard.
fn limits(stage: &mut Stage) -> Fallible<Check> {
    fn lower(hard_too: bool) -> Fallible<Check> {
        let mut expected = Vec::new();
        for resource in 0..16u32 {
            let mut limit: libc::rlimit = unsafe { std::mem::zeroed() };
            sys!(getrlimit(resource, &mut limit))?;
            // A file size or address space that is too small would end the workload, not test it.
            let target = match resource {
                libc::RLIMIT_STACK => 16 << 20,
                libc::RLIMIT_NOFILE => 500 + u64::from(resource),
                libc::RLIMIT_NPROC | libc::RLIMIT_SIGPENDING => 5000,
                libc::RLIMIT_NICE | libc::RLIMIT_RTPRIO => 0,
                libc::RLIMIT_CPU => 100_000,
                _ => (1 << 40) + (u64::from(resource) << 20),
            };
            if target < limit.rlim_max {
                limit.rlim_max = if hard_too { target + 3 } else { limit.rlim_max };
            }
            limit.rlim_cur = target.min(limit.rlim_max);
            sys!(setrlimit(resource, &limit)).map_err(|e| format!("limit {resource}: {e}"))?;
            expected.push((resource, limit.rlim_cur, limit.rlim_max));
        }
        Ok(Box::new(move || {
            for (resource, cur, max) in &expected {
                let mut now: libc::rlimit = unsafe { std::mem::zeroed() };
                sys!(getrlimit(*resource, &mut now))?;
                same(format!("limit {resource}"), (*cur, *max), (now.rlim_cur, now.rlim_max))?;
            }
            Ok(())
        }))
    }
    stage.member("soft", |_| lower(false))?;
    stage.member("hard", |_| lower(true))?;
    Ok(Box::new(|| Ok(())))
}

fn oom_score(stage: &mut Stage) -> Fallible<Check> {
    fn start(score: &'static str) -> Fallible<Check> {
        std::fs::write("/proc/self/oom_score_adj", score).map_err(|e| e.to_string())?;
        Ok(Box::new(move || same("oom_score_adj", score, procfs::text("/proc/self/oom_score_adj")?.trim())))
    }
    stage.member("a", |_| start("300"))?;
    stage.member("b", |_| start("1000"))?;
    start("100")
}

/// Niceness and scheduling policy of each thread, timer slack, I/O priority.
fn priorities(stage: &mut Stage) -> Fallible<Check> {
    type Look = (i64, i64, i64, i64, Vec<i64>);
    fn look() -> Fallible<Look> {
        // getpriority: 20 - nice. 19, 41: priority and policy in stat.
        let tid = raw!(SYS_gettid)?;
        let stat = procfs::stat("thread-self", &[19, 40, 41])?;
        let slack = sys!(prctl(libc::PR_GET_TIMERSLACK))?;
        let io = raw!(SYS_ioprio_get, 1, 0)?;
        Ok((raw!(SYS_getpriority, 0, tid)?, raw!(SYS_sched_getscheduler, 0)?, slack, io, stat))
    }
    fn set(nice: i32, policy: i32) -> Fallible<Look> {
        let tid = raw!(SYS_gettid)?;
        raw!(SYS_setpriority, 0, tid, nice)?;
        let parameters = libc::sched_param { sched_priority: 0 };
        raw!(SYS_sched_setscheduler, 0, policy, &raw const parameters)?;
        sys!(prctl(libc::PR_SET_TIMERSLACK, 123_456 + i64::from(nice)))?;
        // IOPRIO_CLASS_BE, by level.
        raw!(SYS_ioprio_set, 1, 0, 2 << 13 | (nice % 8))?;
        look()
    }
    fn keeps(nice: i32, policy: i32) -> Fallible<Check> {
        let before = set(nice, policy)?;
        Ok(Box::new(move || same("nice, policy, timer slack, I/O priority", &before, &look()?)))
    }
    stage.member("batch", |_| keeps(5, libc::SCHED_BATCH))?;
    stage.member("idle", |_| keeps(19, libc::SCHED_IDLE))?;
    let threads = [
        Answerer::start(|| set(7, libc::SCHED_OTHER).map(drop))?,
        Answerer::start(|| set(9, libc::SCHED_BATCH).map(drop))?,
    ];
    let expected = [(13, libc::SCHED_OTHER), (11, libc::SCHED_BATCH)];
    let mut own = keeps(3, libc::SCHED_OTHER)?;
    Ok(Box::new(move || {
        own()?;
        for (thread, (priority, policy)) in threads.iter().zip(expected) {
            thread.ask(move || {
                let now = look()?;
                same("a thread's nice and policy", (priority, i64::from(policy)), (now.0, now.1))
            })?;
        }
        Ok(())
    }))
}

fn affinity(stage: &mut Stage) -> Fallible<Check> {
    fn allowed() -> Fallible<Vec<usize>> {
        let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
        raw!(SYS_sched_getaffinity, 0, size_of_val(&set), &raw mut set)?;
        Ok((0..1024).filter(|cpu| unsafe { libc::CPU_ISSET(*cpu, &set) }).collect())
    }
    fn pin(cpu: usize) -> Fallible {
        let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
        unsafe { libc::CPU_SET(cpu, &mut set) };
        raw!(SYS_sched_setaffinity, 0, size_of_val(&set), &raw const set).map(drop)
    }
    let all = allowed()?;
    let (first, last) = (all[0], all[all.len() - 1]);
    stage.member("pinned", move |_| {
        pin(last)?;
        Ok(Box::new(move || same("affinity", vec![last], allowed()?)))
    })?;
    let thread = Answerer::start(move || pin(first))?;
    Ok(Box::new(move || {
        thread.ask(move || same("a thread's affinity", vec![first], allowed()?))?;
        same("affinity", &all, &allowed()?)
    }))
}

/// Values that prctl(2) keeps and no file shows.
fn prctl_values(stage: &mut Stage) -> Fallible<Check> {
    fn get() -> Fallible<(i32, i64)> {
        let mut subreaper = 0i32;
        sys!(prctl(libc::PR_GET_CHILD_SUBREAPER, &mut subreaper))?;
        Ok((subreaper, sys!(prctl(libc::PR_GET_THP_DISABLE, 0, 0, 0, 0))?))
    }
    const WHAT: &str = "child subreaper, huge pages disabled";
    stage.member("set", |_| {
        sys!(prctl(libc::PR_SET_CHILD_SUBREAPER, 1))?;
        sys!(prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0))?;
        Ok(Box::new(|| same(WHAT, (1, 1), get()?)))
    })?;
    Ok(Box::new(|| same(WHAT, (0, 0), get()?)))
}

/// Orphans below a subreaper come to it, not to init.
fn subreaper(stage: &mut Stage) -> Fallible<Check> {
    stage.member("reaper", |_| {
        sys!(prctl(libc::PR_SET_CHILD_SUBREAPER, 1))?;
        // A child with a child of its own, for each round of checks.
        let place = Map::shared(PAGE)?;
        let mut pairs = Vec::new();
        for n in 0..3 {
            let child = fork(move || {
                let grandchild = fork(|| sleep_for_good()).unwrap_or(0);
                place.word(n).store(grandchild as u64, std::sync::atomic::Ordering::SeqCst);
                sleep_for_good()
            })?;
            let grandchild = || place.word(n).load(std::sync::atomic::Ordering::SeqCst) as i32;
            eventually("a grandchild", || grandchild() != 0)?;
            pairs.push((child, grandchild()));
        }
        let own = unsafe { i64::from(libc::getpid()) };
        Ok(Box::new(move || {
            let Some((child, grandchild)) = pairs.pop() else {
                return Ok(());
            };
            sys!(kill(child, libc::SIGKILL))?;
            sys!(waitpid(child, std::ptr::null_mut(), 0))?;
            eventually("the orphan comes to the subreaper", || {
                procfs::stat(&grandchild.to_string(), &[4]).is_ok_and(|s| s[0] == own)
            })
        }))
    })?;
    Ok(Box::new(|| Ok(())))
}

/// A child that wanted a signal at its parent's death gets it.
fn parent_death_signal(_: &mut Stage) -> Fallible<Check> {
    let place = Map::shared(PAGE)?;
    let word = move |n: usize| place.word(n).load(std::sync::atomic::Ordering::SeqCst) as i32;
    let mut pairs = Vec::new();
    for n in 0..3 {
        let parent = fork(move || {
            let child = fork(|| unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                sleep_for_good()
            });
            std::thread::sleep(std::time::Duration::from_millis(20));
            place.word(n).store(child.unwrap_or(0) as u64, std::sync::atomic::Ordering::SeqCst);
            sleep_for_good()
        })?;
        eventually("a child", || word(n) != 0)?;
        pairs.push((parent, word(n)));
    }
    Ok(Box::new(move || {
        let Some((parent, child)) = pairs.pop() else {
            return Ok(());
        };
        same("the child lives", 0, sys!(kill(child, 0))?)?;
        sys!(kill(parent, libc::SIGKILL))?;
        sys!(waitpid(parent, std::ptr::null_mut(), 0))?;
        let mut status = 0;
        eventually(
            "the child dies with its parent",
            || unsafe { libc::waitpid(child, &mut status, libc::WNOHANG) } == child,
        )?;
        same("signal at the parent's death", libc::SIGKILL, libc::WTERMSIG(status))
    }))
}
