//! The source's part.

use super::Verdict;

/// How far the source is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Source {
    /// The container runs, but for moments.
    Copying,
    /// It is held by ptrace: if lmrun dies, it runs on.
    Frozen,
    /// The right to run is being given up.
    GivingUp,
    /// It is given up: only the destination knows now.
    Committed,
    /// The destination is being asked over another connection.
    Asking,
    /// The end: it runs there.
    Moved,
    /// The end: it runs here.
    RolledBack,
    /// The end: it stands still here, and `lmrun migrate --settle` finds out more.
    Unknown,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// All tasks are stopped for the last round.
    Frozen,
    /// The destination has all, and waits.
    Ready,
    /// Note and freezer are in place.
    GivenUp,
    /// The destination says that it runs.
    Running,
    /// The destination says that it does not and will not.
    Aborted,
    /// The answer to [`Action::Ask`].
    Verdict(Verdict),
    /// The connection is lost, the other end is silent or talks nonsense, an action failed, somebody has pressed Ctrl-C. Of the
    /// latter the source hears nothing any more once it has committed.
    Failed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// Put the note where it survives us. Before [`Action::FreezeCgroup`]: a container that is frozen says why.
    WriteNote,
    /// Have the kernel hold the container, whatever becomes of us.
    FreezeCgroup,
    SayCommit,
    ThawCgroup,
    RemoveNote,
    /// Give the tasks back to themselves; they run unless the cgroup is frozen.
    Release,
    /// The copy here ends. (With --keep-source what is kept is a stopped container.)
    EndContainer,
    SayAbort,
    SayDone,
    /// Connect anew, and say Settle.
    Ask,
}

impl Source {
    /// What follows from an event. What makes no sense in a state is a failure of the other end.
    #[must_use]
    pub fn on(self, event: Event) -> (Source, Vec<Action>) {
        use Action::*;
        let moved = (Source::Moved, vec![EndContainer, RemoveNote, SayDone]);
        let thawed = (Source::RolledBack, vec![ThawCgroup, RemoveNote, Release]);
        match (self, event) {
            (Source::Copying, Event::Frozen) => (Source::Frozen, vec![]),
            (Source::Frozen, Event::Ready) => (Source::GivingUp, vec![WriteNote, FreezeCgroup]),
            (Source::GivingUp, Event::GivenUp) => (Source::Committed, vec![SayCommit]),
            (Source::Committed, Event::Running) => moved,
            (Source::Committed, Event::Aborted) => thawed,
            (Source::Committed, _) => (Source::Asking, vec![Ask]),
            (Source::Asking, Event::Verdict(Verdict::Running)) => moved,
            (Source::Asking, Event::Verdict(Verdict::Aborted)) => thawed,
            (Source::Asking, _) => (Source::Unknown, vec![Release]),
            (Source::Copying | Source::Frozen, _) => (Source::RolledBack, vec![Release, SayAbort]),
            (Source::GivingUp, _) => (Source::RolledBack, vec![ThawCgroup, RemoveNote, Release, SayAbort]),
            (Source::Moved | Source::RolledBack | Source::Unknown, _) => (self, vec![]),
        }
    }

    /// Whether the right to run may be with the destination.
    pub fn has_committed(self) -> bool {
        matches!(self, Source::Committed | Source::Asking | Source::Moved | Source::Unknown)
    }

    pub fn is_end(self) -> bool {
        matches!(self, Source::Moved | Source::RolledBack | Source::Unknown)
    }
}
