//! Live migration: a container goes on at another host.

pub mod address;
pub mod capture;
pub mod conntrack;
pub mod destination;
pub mod disk;
pub mod engines;
pub mod events;
pub mod handover;
pub mod interrupt;
pub mod ledger;
mod network;
pub mod options;
mod outlet;
pub mod pairing;
mod place;
pub mod preflight;
pub mod report;
pub mod settle;
pub mod source;
pub mod stop;
mod subject;
pub mod transport;
mod urgency;
pub mod wire;

use crate::{engine, runtime};
use wire::message::Finding;

pub use events::Event;
pub use options::{Container, Options};
pub use transport::Destination;

/// Why a container was not moved.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Wire(#[from] wire::Error),
    #[error(transparent)]
    Transport(#[from] transport::Error),
    #[error(transparent)]
    Runtime(#[from] runtime::Error),
    #[error(transparent)]
    Engine(#[from] engine::Error),
    #[error(transparent)]
    Ledger(#[from] ledger::Error),
    #[error(transparent)]
    Disk(#[from] disk::Error),
    #[error(transparent)]
    Network(#[from] address::Error),
    #[error(transparent)]
    Owner(#[from] engines::Error),
    /// The checks found what blocks.
    #[error("{}", blocking(.0))]
    Refused(Vec<Finding>),
    #[error("it was interrupted")]
    Interrupted,
    #[error("{0}")]
    Other(String),
}

pub type Result<T> = std::result::Result<T, Error>;

fn blocking(findings: &[Finding]) -> String {
    let each = findings.iter().filter(|f| f.blocks).map(|f| format!("{}: {} ({})", f.place, f.what, f.remedy));
    each.collect::<Vec<_>>().join("; ")
}

/// How the container at the source is after a migration that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Now {
    /// Nothing was done to it.
    Untouched,
    /// It was frozen or prepared, and runs on.
    Running,
    /// It is frozen, and whether it runs at the destination is not known; the command finds out.
    Frozen { settle: String },
}

/// A migration that did not come to its end.
#[derive(Debug)]
pub struct Failed {
    pub error: Error,
    pub now: Now,
}

impl Failed {
    /// Before anything was done to the container.
    pub fn untouched(error: impl Into<Error>) -> Self {
        Failed { error: error.into(), now: Now::Untouched }
    }
}

/// A migration that did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Moved,
    /// Only checks were asked for, and nothing blocks.
    Checked,
}

/// Whom events are told to; from any thread.
pub type Observer<'a> = &'a (dyn Fn(Event) + Sync);
