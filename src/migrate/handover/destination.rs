//! The destination's part.

/// How far the destination is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Destination {
    /// The standby is being filled. It is held by ptrace: if lmrun dies, it dies.
    Receiving,
    /// It has all, and waits for the commit.
    Complete,
    /// The commit has come.
    Deciding,
    /// Nothing will come of it.
    Aborting,
    /// It runs here; the source may still want to know.
    Running,
    /// The end: it runs here.
    Moved,
    /// The end: nothing is here.
    Aborted,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// All of the last round is in place.
    Complete,
    Commit,
    /// The answer to [`Action::DecideRunning`] and [`Action::DecideAborted`]: whether that is what is decided.
    Decided(bool),
    Abort,
    Done,
    /// The connection is lost, the other end is silent or talks nonsense, an action failed.
    Failed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    SayReady,
    /// Freeze the standby's cgroup, and let go of the tasks: from then on they are complete without us, and stand still.
    Detach,
    /// Only who is first decides ([`super::super::ledger`]).
    DecideRunning,
    DecideAborted,
    /// Thaw the cgroup: the container runs.
    Thaw,
    /// Put the decision where it survives a loss of power: the source must not end its copy before. Not done sooner, because
    /// it takes a disk's time; a destination that loses power in between has not run it for longer than that.
    SyncEntry,
    SayRunning,
    SayAbort,
    /// Remove all that was made.
    Unmake,
    /// Nobody will ask any more.
    RemoveEntry,
}

impl Destination {
    /// What follows from an event. What makes no sense in a state is a failure of the other end.
    #[must_use]
    pub fn on(self, event: Event) -> (Destination, Vec<Action>) {
        use Action::*;
        match (self, event) {
            (Destination::Receiving, Event::Complete) => (Destination::Complete, vec![SayReady]),
            (Destination::Complete, Event::Commit) => (Destination::Deciding, vec![Detach, DecideRunning]),
            (Destination::Deciding, Event::Decided(true)) => (Destination::Running, vec![Thaw, SyncEntry, SayRunning]),
            // Somebody has settled it in the meantime.
            (Destination::Deciding, Event::Decided(false)) => {
                (Destination::Aborted, vec![SayAbort, Unmake, RemoveEntry])
            }
            (Destination::Receiving | Destination::Complete | Destination::Deciding, _) => {
                (Destination::Aborting, vec![DecideAborted])
            }
            // True or not: nobody but us could have decided that it runs.
            (Destination::Aborting, Event::Decided(_)) => (Destination::Aborted, vec![SayAbort, Unmake, RemoveEntry]),
            (Destination::Aborting, _) => (Destination::Aborting, vec![]),
            (Destination::Running, Event::Done) => (Destination::Moved, vec![RemoveEntry]),
            // The entry stays for a source that has not heard of it.
            (Destination::Running, _) => (Destination::Moved, vec![]),
            (Destination::Moved | Destination::Aborted, _) => (self, vec![]),
        }
    }

    pub fn is_end(self) -> bool {
        matches!(self, Destination::Moved | Destination::Aborted)
    }
}
