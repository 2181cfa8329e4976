//! Containers: create ... delete, their state, and what config.json asks for.
//!
//! Namespaces, mounts and limits are libcontainer's work, entered below its builder (this layer alone
//! imports it); what a container *is* between two commands is ours: [`state`].

use std::io;
use std::path::PathBuf;

pub mod arrival;
mod birth;
mod bundle;
mod caller;
mod cgroup;
mod cgroup_files;
mod checkpoint;
mod console;
mod copyup;
mod create;
mod delete;
pub mod departure;
mod devices;
mod events;
mod exec;
mod features;
mod hooks;
mod mounts;
mod netdevices;
mod passwd;
mod personality;
mod porter;
mod process;
mod processes;
mod puppet;
mod query;
mod rdt;
mod restore;
mod run;
mod seccomp;
mod selinux;
mod settings;
mod standby;
mod start;
mod state;
mod stats;
mod streams;
mod systemd;
mod throttle;
pub mod timestamp;
mod update;
mod users;
mod workload;

pub use bundle::check_bundle;
pub use checkpoint::{CheckpointOptions, checkpoint};
pub use create::{CreateOptions, create};
pub use delete::{delete, kill};
pub use events::events;
pub use exec::{Edits, ExecOptions, ProcessSource, exec};
pub use features::{MOUNT_OPTIONS, capabilities, seccomp_features};
pub use process::Process;
pub use processes::{column as process_column, processes};
pub use query::{list, pause, resume, status};
pub use restore::{RestoreOptions, restore};
pub use run::{Attachment, run};
pub use standby::{Arrived, StandbySocket};
pub use start::start;
pub use state::{State, Status, Store};
pub use update::{Schemata, update};

/// Why a command on a container failed. Its words are runc's where engines look for them.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("container does not exist")]
    NotFound,
    #[error("container with given ID already exists")]
    Exists,
    #[error("invalid container ID format: {0:?}")]
    InvalidId(String),
    #[error("config.json: {0}")]
    Config(String),
    /// What is to be exec'd is no process.
    #[error("{0}")]
    Process(String),
    #[error("unable to stat preserved-fd {0}: it is not open")]
    PreservedFd(i64),
    #[error("sub cgroup {0} does not exist in the container's")]
    SubCgroup(String),
    #[error("this host, or this container, has no {0}")]
    NoController(String),
    #[error(
        "cannot set the limit {0}: this user may not make the container's cgroup; leave linux.resources out, or have \
         systemd make it (--systemd-cgroup)"
    )]
    RootlessLimit(String),
    #[error("{0}")]
    Update(String),
    #[error("fork")]
    Fork(#[source] io::Error),
    #[error("{0}")]
    Terminal(&'static str),
    #[error("{0}")]
    WrongStatus(&'static str),
    #[error("container not running")]
    NotRunning,
    #[error("container is being moved already")]
    Leaving,
    #[error("cannot delete container {id} that is not stopped: {status}")]
    StillRunning { id: String, status: Status },
    #[error("signal pid {pid}")]
    Signal { pid: i32, source: io::Error },
    #[error("{what}")]
    Foreground {
        what: &'static str,
        #[source]
        errno: nix::Error,
    },
    #[error("restrict the devices of cgroup {}", path.display())]
    Devices {
        path: PathBuf,
        #[source]
        errno: nix::Error,
    },
    #[error("--systemd-cgroup")]
    Systemd(#[from] systemd::BusError),
    #[error("seccomp: {0}")]
    Seccomp(String),
    #[error("capabilities: {0}")]
    Capabilities(String),
    /// Said by the process inside the container.
    #[error("unable to start container process: {0}")]
    Init(String),
    #[error("hook: {0}")]
    Hook(String),
    #[error("{0}")]
    Libcontainer(String),
    #[error("cgroup path {} is not one that a container can have for itself", .0.display())]
    CgroupPath(PathBuf),
    #[error("container's cgroup {} is not empty: pids {pids:?}", path.display())]
    CgroupInUse { path: PathBuf, pids: Vec<i32> },
    #[error("cgroup {} does not get empty: pids {pids:?}", path.display())]
    CgroupBusy { path: PathBuf, pids: Vec<i32> },
    #[error("cgroup {} has no freezer", .0.display())]
    NoFreezer(PathBuf),
    #[error("freezer {}", path.display())]
    Freezer { path: PathBuf, source: io::Error },
    /// The line is not quoted: its reader may not be allowed to see it.
    #[error("{}, line {line}: {what}", file.display())]
    Settings { file: PathBuf, line: usize, what: String },
    #[error("checkpoint {} {why}", dir.display())]
    Checkpoint { dir: PathBuf, why: String },
    #[error("the container has no pid namespace of its own, which a restore needs to give every process its old pid")]
    NoPidNamespace,
    #[error("the container's init did not become ready to be restored")]
    PuppetLost,
    #[error("the container was to arrive from another host: {0}")]
    Standby(String),
    #[error(transparent)]
    Engine(crate::engine::Error),
}

impl Error {
    fn io(path: impl Into<PathBuf>, source: io::Error) -> Self {
        Error::Io { path: path.into(), source }
    }
}

pub type Result<T> = std::result::Result<T, Error>;

/// An error and its causes on one line, each said once.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let more = next.to_string();
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        cause = next.source();
    }
    text
}
