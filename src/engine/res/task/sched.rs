//! Scheduling: policy, nice, affinity, timer slack.

use std::io;

use libc::pid_t;

use crate::engine::{Error, Result};
use crate::image::records::core::ThreadCoreEntry;
use crate::image::records::lmrun::LmrunThread;
use crate::sys::sched;

/// Reads a thread's scheduling into its two records.
pub fn collect(tid: pid_t, core: &mut ThreadCoreEntry, extra: &mut LmrunThread) -> Result<()> {
    let read = || -> io::Result<_> { Ok((sched::attributes(tid)?, sched::affinity(tid)?)) };
    let (a, affinity) = read().map_err(|e| Error::proc(tid, e))?;
    (core.sched_policy, core.sched_nice, core.sched_prio) = (Some(a.policy), Some(a.nice), Some(a.priority));
    extra.affinity = Some(affinity);
    extra.io_priority = Some(sched::io_priority(tid).map_err(|e| Error::proc(tid, e))?);
    let slack = std::fs::read_to_string(format!("/proc/{tid}/timerslack_ns"));
    extra.timerslack = slack.ok().and_then(|s| s.trim().parse().ok());
    Ok(())
}

/// Applies them to a puppet's thread (host tid). Returns what could not be had here, for the report.
pub fn apply(tid: pid_t, core: &ThreadCoreEntry, extra: Option<&LmrunThread>) -> Result<Vec<String>> {
    let mut missed = Vec::new();
    if let Some(policy) = core.sched_policy {
        let mut a = sched::attributes(tid).map_err(|e| Error::proc(tid, e))?;
        a.nice = core.sched_nice.unwrap_or(0);
        let set = |a| {
            sched::set_attributes(tid, a)
                .map_err(Error::system(format!("task {tid}: set its scheduling policy {policy}")))
        };
        if policy == libc::SCHED_IDLE as u32 {
            // Has a nice value like any other, but does not take one.
            set(a)?;
        }
        (a.policy, a.priority) = (policy, core.sched_prio.unwrap_or(0));
        set(a)?;
    }
    if let Some(mask) = extra.and_then(|x| x.affinity.as_ref()) {
        let here = sched::affinity(tid).map_err(|e| Error::proc(tid, e))?;
        // The default is all CPUs, however many there are: leave that as it is here.
        if mask != &here && sched::set_affinity(tid, mask).is_err() {
            missed.push(format!("task {tid}: none of the CPUs that it was bound to exists here"));
        }
    }
    if let Some(slack) = extra.and_then(|x| x.timerslack) {
        std::fs::write(format!("/proc/{tid}/timerslack_ns"), slack.to_string())
            .map_err(Error::system(format_args!("task {tid}: set its timer slack")))?;
    }
    if let Some(priority) = extra.and_then(|x| x.io_priority) {
        let here = sched::io_priority(tid).map_err(|e| Error::proc(tid, e))?;
        if priority != here && sched::set_io_priority(tid, priority).is_err() {
            missed.push(format!("task {tid}: I/O priority {priority} is more than this host allows"));
        }
    }
    Ok(missed)
}
