//! Who comes first: while the container runs, it and its neighbours; while it stands still, its migration.

use crate::sys::sched;

/// Pages on their way take what the container leaves, though never nothing.
const BULK: i32 = 5;
/// Whatever the container waits for.
const URGENT: i32 = -20;

/// The calling thread's priority. Dropped, it is what it was by default.
#[derive(Debug)]
pub struct Urgency(());

impl Urgency {
    pub fn begin() -> Urgency {
        Urgency(())
    }

    /// The container runs.
    pub fn bulk(&self) {
        set(BULK);
    }

    /// The container stands still, or is about to.
    pub fn urgent(&self) {
        set(URGENT);
    }
}

impl Drop for Urgency {
    fn drop(&mut self) {
        set(0);
    }
}

/// A matter of speed alone: who may not, does without.
fn set(nice: i32) {
    if let Err(error) = sched::set_own_nice(nice) {
        tracing::debug!(%error, nice, "setpriority");
    }
}
