//! Threads: their ids, names, joins, thread-local storage.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use crate::kernel::raw;
use crate::procfs;
use crate::stage::{Check, Fallible, Setup, Stage, same};

pub const WORKLOADS: &[(&str, Setup)] = &[
    ("threads", threads),
    ("threads-hundred", hundred),
    ("threads-of-child", of_child),
    ("threads-join", join),
    ("threads-local", local),
    ("threads-born-later", born_later),
];

type Question = Box<dyn FnOnce() -> Fallible + Send>;

/// A thread that answers questions, each asked and answered over channels (futexes, that is).
pub struct Answerer {
    ask: mpsc::Sender<Question>,
    answer: Mutex<mpsc::Receiver<Fallible>>,
    pub tid: i32,
}

impl Answerer {
    pub fn start(set_up: impl FnOnce() -> Fallible + Send + 'static) -> Fallible<Answerer> {
        let (ask, questions) = mpsc::channel::<Question>();
        let (answers, answer) = mpsc::channel();
        let (born, birth) = mpsc::channel();
        std::thread::spawn(move || {
            let _ = born.send(set_up().and_then(|()| raw!(SYS_gettid)));
            for question in questions {
                let _ = answers.send(question());
            }
        });
        let tid = birth.recv().map_err(|e| e.to_string())?? as i32;
        Ok(Answerer { ask, answer: Mutex::new(answer), tid })
    }

    /// Runs `question` on this thread.
    pub fn ask(&self, question: impl FnOnce() -> Fallible + Send + 'static) -> Fallible {
        self.ask.send(Box::new(question)).map_err(|e| e.to_string())?;
        let answer = self.answer.lock().map_err(|e| e.to_string())?;
        answer.recv_timeout(Duration::from_secs(10)).map_err(|e| format!("thread {}: {e}", self.tid))?
    }
}

/// The tids of this process, ascending.
pub fn tids() -> Fallible<Vec<i32>> {
    let dir = std::fs::read_dir("/proc/self/task").map_err(|e| e.to_string())?;
    let mut all: Vec<i32> = dir.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
    all.sort_unstable();
    Ok(all)
}

fn name_thread(name: &str) {
    unsafe { libc::prctl(libc::PR_SET_NAME, crate::kernel::c(name).as_ptr()) };
}

fn start_named(count: usize) -> Fallible<Check> {
    let mut all = Vec::new();
    for n in 0..count {
        all.push(Answerer::start(move || {
            name_thread(&format!("worker {n}"));
            Ok(())
        })?);
        // A thread that ends leaves a hole among the ids.
        std::thread::spawn(|| {}).join().map_err(|_| "join")?;
    }
    crate::stage::eventually("ended threads leave", || tids().is_ok_and(|t| t.len() == count + 1))?;
    let before = tids()?;
    Ok(Box::new(move || {
        same("tids", &before, &tids()?)?;
        for (n, thread) in all.iter().enumerate() {
            let tid = thread.tid;
            thread.ask(move || same("gettid", i64::from(tid), raw!(SYS_gettid)?))?;
            let comm = procfs::text(&format!("/proc/self/task/{tid}/comm"))?;
            same("comm of a thread", format!("worker {n}\n"), comm)?;
        }
        Ok(())
    }))
}

fn threads(_: &mut Stage) -> Fallible<Check> {
    start_named(8)
}

fn hundred(_: &mut Stage) -> Fallible<Check> {
    start_named(100)
}

fn of_child(stage: &mut Stage) -> Fallible<Check> {
    stage.member("first", |_| start_named(3))?;
    stage.member("second", |_| start_named(3))?;
    start_named(3)
}

/// clear_child_tid: a join is woken by the kernel when the thread ends.
fn join(_: &mut Stage) -> Fallible<Check> {
    let stop = Arc::new(AtomicU32::new(0));
    let mut waiting = Vec::new();
    for n in 0..4u32 {
        let stop = stop.clone();
        waiting.push(std::thread::spawn(move || {
            while stop.load(Ordering::SeqCst) <= n {
                std::thread::sleep(Duration::from_millis(1));
            }
            n * 1000
        }));
    }
    waiting.reverse();
    let mut round = 0;
    Ok(Box::new(move || {
        round += 1;
        stop.store(round, Ordering::SeqCst);
        let Some(thread) = waiting.pop() else {
            return Ok(());
        };
        same("result of a thread", (round - 1) * 1000, thread.join().map_err(|_| "join")?)
    }))
}

thread_local! {
    static MARK: Cell<u64> = const { Cell::new(0) };
}

/// Thread-local variables (by the fs base), and a gs base.
fn local(_: &mut Stage) -> Fallible<Check> {
    const ARCH_SET_GS: i32 = 0x1001;
    const ARCH_GET_GS: i32 = 0x1004;
    fn gs() -> Fallible<u64> {
        let mut base = 0u64;
        raw!(SYS_arch_prctl, ARCH_GET_GS, &raw mut base)?;
        Ok(base)
    }
    let mut all = Vec::new();
    for n in 0..4u64 {
        all.push(Answerer::start(move || {
            MARK.set(n * 77);
            raw!(SYS_arch_prctl, ARCH_SET_GS, 0x10_0000 + n * 0x1000).map(drop)
        })?);
    }
    Ok(Box::new(move || {
        for (n, thread) in (0u64..).zip(&all) {
            thread.ask(move || {
                same("thread-local variable", n * 77, MARK.get())?;
                same("gs base", 0x10_0000 + n * 0x1000, gs()?)
            })?;
        }
        Ok(())
    }))
}

/// Threads are made and unmade all the time, also while the container is stopped and after.
fn born_later(_: &mut Stage) -> Fallible<Check> {
    static BORN: AtomicU32 = AtomicU32::new(0);
    static WRONG: AtomicBool = AtomicBool::new(false);
    std::thread::spawn(|| {
        loop {
            let n = BORN.fetch_add(1, Ordering::SeqCst);
            if std::thread::spawn(move || n).join().ok() != Some(n) {
                WRONG.store(true, Ordering::SeqCst);
            }
        }
    });
    Ok(Box::new(|| {
        let begin = BORN.load(Ordering::SeqCst);
        crate::stage::eventually("threads are born", || BORN.load(Ordering::SeqCst) > begin + 20)?;
        same("a thread lost its result", false, WRONG.load(Ordering::SeqCst))
    }))
}
