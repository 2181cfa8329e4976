//! A process by pid and start time: a pid alone may come to mean somebody else.

use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use crate::sys::proc;

/// One process of this boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Process {
    pub pid: i32,
    /// Clock ticks since boot.
    pub start_time: u64,
}

impl Process {
    /// The process that `pid` names now; None where it has ended, be it reaped or not.
    pub fn of(pid: i32) -> Option<Process> {
        let stat = proc::stat(pid).ok()?;
        (!matches!(stat.state, 'Z' | 'X')).then_some(Process { pid, start_time: stat.start_time })
    }

    /// The calling process.
    pub fn own() -> Process {
        let pid = std::process::id().cast_signed();
        Process::of(pid).unwrap_or(Process { pid, start_time: 0 })
    }

    /// Whether this very process still runs.
    pub fn is_alive(&self) -> bool {
        Process::of(self.pid) == Some(*self)
    }
}

static PID_OUTSIDE: OnceLock<i32> = OnceLock::new();

/// Notes by which pid the caller is known where it came from, as long as that /proc is to be seen.
pub(super) fn note_pid_outside() {
    let own = std::fs::read_link("/proc/self").ok().and_then(|link| link.to_str()?.parse().ok());
    own.map(|pid| PID_OUTSIDE.set(pid));
}

/// What was [noted](note_pid_outside).
pub(super) fn pid_outside() -> Option<i32> {
    PID_OUTSIDE.get().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_caller_lives_and_a_wrong_start_time_does_not() {
        let own = Process::own();
        assert!(own.is_alive());
        assert!(!Process { start_time: own.start_time + 1, ..own }.is_alive());
    }
}
