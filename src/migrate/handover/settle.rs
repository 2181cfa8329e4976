//! Finding out afterwards, by whoever asks, as often as one likes.

use super::Verdict;
use super::{destination, source};

/// What is to be seen at the source when no migration is under way any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AtSource {
    /// The note is there.
    pub note: bool,
    /// The cgroup is frozen.
    pub frozen: bool,
    /// The container's init is alive.
    pub alive: bool,
}

/// Whether the destination must be asked first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Next {
    Ask,
    /// It is known without.
    Do(Vec<source::Action>),
}

impl AtSource {
    /// What to do first.
    pub fn begin(self) -> Next {
        match self {
            AtSource { note: false, .. } => Next::Do(vec![]),
            // It was ended because it runs there, or has died in its sleep: what is left of it goes, too.
            AtSource { alive: false, .. } => Next::Do(vec![source::Action::EndContainer, source::Action::RemoveNote]),
            // The commit is only said when the container is frozen; or it was thawed because the verdict was known.
            // Whoever thawed it may have been killed before it was heard again.
            AtSource { frozen: false, .. } => Next::Do(vec![source::Action::ThawCgroup, source::Action::RemoveNote]),
            _ => Next::Ask,
        }
    }
}

/// What to do when the destination has answered.
pub fn at_source(verdict: Verdict) -> Vec<source::Action> {
    use source::Action::*;
    match verdict {
        Verdict::Running => vec![EndContainer, RemoveNote, SayDone],
        Verdict::Aborted => vec![ThawCgroup, RemoveNote],
    }
}

/// What is to be seen of a migration at the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Entry {
    /// Not decided, or it was not when one looked.
    Open,
    Running,
    /// Decided; something may still be there.
    Aborted,
    /// There is none.
    Gone,
}

/// What to do at the destination, whose process for this migration is still there or not, and what to answer then.
/// An open entry must be decided first: [`destination::Action::DecideAborted`].
pub fn at_destination(decided: Entry, process: bool) -> (Vec<destination::Action>, Verdict) {
    use destination::Action::*;
    match decided {
        // Thawed once more by its own process, or by the next who asks, it does no harm.
        Entry::Running => (vec![Thaw, SyncEntry], Verdict::Running),
        // The process finds out and cleans up.
        Entry::Open | Entry::Aborted if process => (vec![], Verdict::Aborted),
        Entry::Open | Entry::Aborted => (vec![Unmake, RemoveEntry], Verdict::Aborted),
        // Entries that say Running are removed only when the source knows.
        Entry::Gone => (vec![], Verdict::Aborted),
    }
}
