//! How a workload talks to its scenario: files in `/run-state`.
//!
//! | file | written by | means |
//! |---|---|---|
//! | `ready` | workload | set up; empty, or `skip: why`, or `fail: what` |
//! | `check`, `check2`, ... | scenario | verify everything now |
//! | `verdict`, `verdict2`, ... | workload | `ok` or `fail: what` |
//! | `panic` | workload | it fell over |
//!
//! Child processes that hold state of their own are *members*: they see the same `check` files, write
//! `verdict-NAME`, and their parent's verdict includes theirs.

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::kernel::sys;

/// A result whose error is a sentence for the verdict.
pub type Fallible<T = ()> = Result<T, String>;

/// Verifies all of a workload's state; may be asked several times.
pub type Check = Box<dyn FnMut() -> Fallible>;

/// Sets a workload up. An error that starts with `skip:` means that this kernel or host cannot run it.
pub type Setup = fn(&mut Stage) -> Fallible<Check>;

/// How long a member may take over its verdict.
const PATIENCE: Duration = Duration::from_secs(20);

pub struct Stage {
    /// Empty for the container's init, else `-NAME`.
    suffix: String,
    members: Vec<String>,
}

impl Stage {
    pub fn of_init() -> Stage {
        Stage { suffix: std::env::var("STAGE_MEMBER").unwrap_or_default(), members: Vec::new() }
    }

    /// Sets up, reports, and then answers checks until SIGTERM.
    pub fn perform(mut self, setup: impl FnOnce(&mut Stage) -> Fallible<Check>) -> ! {
        let suffix = self.suffix.clone();
        std::panic::set_hook(Box::new(move |info| write_at_once(&format!("panic{suffix}"), &info.to_string())));
        exit_on_sigterm();
        let mut check = match setup(&mut self) {
            Ok(check) => check,
            Err(e) => {
                let word = if e.starts_with("skip:") { e } else { format!("fail: set-up: {e}") };
                write_at_once(&format!("ready{}", self.suffix), &word);
                loop {
                    std::thread::sleep(Duration::from_secs(1));
                }
            }
        };
        write_at_once(&format!("ready{}", self.suffix), "");
        for round in 1.. {
            let round = if round == 1 { String::new() } else { round.to_string() };
            wait_for(&format!("check{round}"), Duration::MAX);
            let verdict = check().and_then(|()| self.verdicts_of_members(&round));
            let word = verdict.map_or_else(|e| format!("fail: {e}"), |()| "ok".into());
            write_at_once(&format!("verdict{}{round}", self.suffix), &word);
        }
        unreachable!("rounds do not end")
    }

    /// Forks a child with state of its own and waits until it is set up. Returns its pid.
    pub fn member(&mut self, name: &str, setup: impl FnOnce(&mut Stage) -> Fallible<Check>) -> Fallible<i32> {
        let stage = self.invite(name);
        let suffix = stage.suffix.clone();
        let pid = fork(move || stage.perform(setup))?;
        Self::wait_until_ready(&suffix)?;
        Ok(pid)
    }

    /// Makes room for a member that the caller starts itself (another clone, a grandchild, an exec).
    /// It is to call [`Stage::perform`]; follow with [`Stage::wait_for_member`].
    pub fn invite(&mut self, name: &str) -> Stage {
        let suffix = format!("{}-{name}", self.suffix);
        self.members.push(suffix.clone());
        Stage { suffix, members: Vec::new() }
    }

    pub fn wait_for_member(&self, name: &str) -> Fallible {
        Self::wait_until_ready(&format!("{}-{name}", self.suffix))
    }

    /// The environment entry by which an exec'ed workload knows that it is this member.
    pub fn environment(&self) -> String {
        format!("STAGE_MEMBER={}", self.suffix)
    }

    fn wait_until_ready(suffix: &str) -> Fallible {
        match wait_for(&format!("ready{suffix}"), PATIENCE).as_deref() {
            Some("") => Ok(()),
            Some(word) => Err(word.to_owned()),
            None => Err(format!("member {suffix} is not ready in time")),
        }
    }

    fn verdicts_of_members(&self, round: &str) -> Fallible {
        for suffix in &self.members {
            match wait_for(&format!("verdict{suffix}{round}"), PATIENCE).as_deref() {
                Some("ok") => {}
                Some(word) => return Err(format!("member {suffix}: {word}")),
                None => return Err(format!("member {suffix} gives no verdict")),
            }
        }
        Ok(())
    }
}

/// Forks; the child runs `body` and exits with 0. Call it while the process has one thread.
pub fn fork(body: impl FnOnce()) -> Fallible<i32> {
    let pid = sys!(fork())? as i32;
    if pid == 0 {
        body();
        unsafe { libc::_exit(0) }
    }
    Ok(pid)
}

/// Sleeps for good, whatever interrupts it.
pub fn sleep_for_good() -> ! {
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

/// Polls until `condition` holds.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) -> Fallible {
    let begin = Instant::now();
    while !condition() {
        if begin.elapsed() > Duration::from_secs(10) {
            return Err(format!("{what}: not within 10 s"));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Does `act(1)`, `act(2)`, ... on a thread as the scenario writes `step1`, `step2`, ..., and says `steppedN`: `ok`,
/// or what went wrong.
pub fn on_steps(mut act: impl FnMut(u32) -> Fallible + Send + 'static) {
    std::thread::spawn(move || {
        for n in 1.. {
            wait_for(&format!("step{n}"), Duration::MAX);
            let word = act(n).map_or_else(|e| format!("fail: step {n}: {e}"), |()| "ok".into());
            write_at_once(&format!("stepped{n}"), &word);
        }
    });
}

/// Compares what is with what was.
pub fn same<T: PartialEq + std::fmt::Debug>(what: impl std::fmt::Display, expected: T, got: T) -> Fallible {
    if expected == got { Ok(()) } else { Err(format!("{what}: expected {expected:?}, got {got:?}")) }
}

/// Demands that something be so.
pub fn holds(condition: bool, what: impl std::fmt::Display) -> Fallible {
    if condition { Ok(()) } else { Err(what.to_string()) }
}

fn path(name: &str) -> PathBuf {
    PathBuf::from("/run-state").join(name)
}

fn wait_for(name: &str, patience: Duration) -> Option<String> {
    let begin = Instant::now();
    let path = path(name);
    while begin.elapsed() < patience {
        if let Ok(word) = fs::read_to_string(&path) {
            return Some(word);
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    None
}

/// The file appears whole or not at all.
fn write_at_once(name: &str, word: &str) {
    let half = path(&format!(".{name}"));
    if fs::write(&half, word).and_then(|()| fs::rename(&half, path(name))).is_err() {
        eprintln!("workload: cannot write {name}: {word}");
    }
}

/// The kernel drops a pid namespace's init only by a signal that it handles.
fn exit_on_sigterm() {
    extern "C" fn leave(_: i32) {
        unsafe { libc::_exit(0) }
    }
    unsafe { libc::signal(libc::SIGTERM, leave as *const () as libc::sighandler_t) };
}
