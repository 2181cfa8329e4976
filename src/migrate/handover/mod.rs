//! Who may run the container: the hand-over in two phases, as state machines that do nothing themselves.
//!
//! A role feeds events in and carries out the actions that come back, in their order; if one fails it stops there and feeds in
//! [`source::Event::Failed`] or [`destination::Event::Failed`]. What must outlive the process is in [`super::ledger`]: the source's *note* says that
//! it has given up its right to run the container, and the destination's *entry* is where it is decided, once and for ever, whether
//! it runs there. `docs/protocol.md` has the pictures; `model` goes through all interleavings of both machines
//! with lost and late messages, crashes at every step, reboots of the destination, and settling by hand from either side.

pub mod destination;
#[cfg(test)]
mod model;
pub mod settle;
pub mod source;

/// What was decided at the destination. It does not change any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// It runs there, or did.
    Running,
    /// It never ran there and never will.
    Aborted,
}
