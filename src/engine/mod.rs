//! Checkpoint and restore of a tree of processes, from outside.
//!
//! Data flows one way: `collect` reads the kernel and returns plain values, one writer
//! writes them; one reader reads them, `plan` is pure, `rebuild` acts.

mod checks;
mod collect;
pub mod departure;
mod dump;
mod error;
mod fill;
mod freeze;
pub mod guard;
mod mappings;
mod memory;
pub mod netlock;
mod network;
mod plan;
mod rebuild;
pub mod res;
mod spans;
pub mod standby;
mod track;
mod tree;

pub use dump::dump;
pub use error::{Error, Result, Why};
pub use freeze::Freezer;
pub use network::{Peers, leave_bridges, revive, take_back};
pub use plan::{Plan, plan};
pub use rebuild::{Detached, Ready, RestoreReport};
pub use track::{can_track, pre_dump};

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use crate::image::pages::PageSink;

/// What the engine must know of a container to checkpoint it.
#[derive(Debug, Clone)]
pub struct Subject {
    /// The container's name, for messages and for the name of the network lock.
    pub id: String,
    /// Host pid of the container's first process.
    pub init: i32,
    /// The runtime's directory of this container; the keeper's socket lives there.
    pub dir: PathBuf,
    /// Links (`pipe:[123]`, `/path`) of the files that come from outside the container and
    /// that a restore gets replaced: the standard streams of init, as in `descriptors.json`.
    pub external: Vec<String>,
    /// Mount points that a restore makes anew; empty: not known.
    pub mounts: Vec<String>,
}

/// What is to become of the container after its state was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It ends here and goes on elsewhere.
    Kill,
    /// It goes on as if nothing had happened.
    Resume,
}

/// A checkpoint that is to be made.
pub struct DumpRequest<'a> {
    pub subject: Subject,
    /// The image directory, under its final name.
    pub images: PathBuf,
    /// Where `stats-dump` and `dump.log` go.
    pub work: PathBuf,
    /// The parent image directory, relative to `images`, as it is recorded in the link `parent`.
    pub parent: Option<PathBuf>,
    pub fate: Fate,
    /// The freezer of a container that is paused: it is thawed for the dump, without any task running, and frozen again
    /// if it goes on.
    pub paused: Option<&'a dyn Freezer>,
    pub tcp_established: bool,
    /// The container's engine will connect it again before it has it restored: peers are kept away at the host's bridges
    /// until then, though not for long.
    pub hold_at_bridges: bool,
    /// Files of the runtime that belong into the image directory: name and content.
    pub extra_files: Vec<(String, Vec<u8>)>,
    /// Where pages go: None is the image directory itself.
    pub pages: Option<Box<dyn PageSink>>,
    /// Called now and then with (pages done, pages in this round).
    pub progress: Option<&'a dyn Fn(u64, u64)>,
}

/// What a dump or a pre-dump did.
#[derive(Debug, Clone, Copy, Default)]
pub struct DumpReport {
    /// Time until every task had stopped.
    pub freezing: Duration,
    /// Time for which the tasks were stopped, the former included.
    pub frozen: Duration,
    pub pages_scanned: u64,
    pub pages_in_parent: u64,
    pub pages_written: u64,
}

/// A restore that is to be made.
pub struct RestoreRequest {
    pub images: PathBuf,
    /// Where `stats-restore` and `restore.log` go.
    pub work: PathBuf,
    pub tcp_established: bool,
}

/// The container's init before it is anybody: a task that runs no program, holds nothing open but its
/// end of `control` as descriptor 0, and waits in read(2) to be driven.
pub struct Puppet {
    /// Host pid.
    pub pid: i32,
    /// The driver's end; the puppet's end is its descriptor 0.
    pub control: UnixStream,
}

/// `timens_offsets(7)` of the time namespace in which the container must be built so that its
/// clocks go on where they were: (seconds, nanoseconds), nanoseconds in 0..1e9.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ClockOffsets {
    pub monotonic: (i64, u32),
    pub boottime: (i64, u32),
}
