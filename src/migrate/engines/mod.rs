//! Engines on both ends: Docker, Podman and containerd, spoken to by their own interfaces over their own sockets.
//!
//! The source *describes* a container in its engine's words; the destination's engine *prepares* one like it, not
//! started, and its *start* makes the container in which the processes arrive ([`crate::runtime::StandbySocket`]).
//! Once they run there, the source's engine *retires* its own. Between the two a [`Description`] travels.
//!
//! What is asked of an engine is asked in a process of its own, the [`Agent`]: it does no ptrace, may wait, and
//! outlives the migration's end by as much as it takes to undo what is half made.

use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::options::Container;
use super::wire::message::Finding;
use crate::runtime;

mod agent;
mod archive;
mod docker;
mod http;
mod inspect;
mod shim;

pub use agent::Agent;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{engine} does not answer at {}", path.display())]
    NoEngine { engine: &'static str, path: PathBuf, source: Box<http::Error> },
    #[error("{engine} has no container {name:?}")]
    NoContainer { engine: &'static str, name: String },
    #[error("container {name} does not run")]
    NotRunning { name: String },
    #[error("container {name} is not one of lmrun's: its runtime is {runtime}; make it anew with --runtime=lmrun")]
    NotLmrun { name: String, runtime: String },
    #[error("cannot find where lmrun keeps container {id}: {what}")]
    NotFound { id: String, what: String },
    #[error("{engine}")]
    Engine {
        engine: &'static str,
        #[source]
        source: Box<http::Error>,
    },
    #[error("{engine} says of container {name} nothing about {what}")]
    Missing { engine: &'static str, name: String, what: &'static str },
    #[error("the image's archive: {what}")]
    Archive { what: &'static str, source: io::Error },
    #[error("{engine} could not load the image: {what}")]
    Load { engine: &'static str, what: String },
    #[error("the engine did not kill container {name}: it stands still where it was; remove it there")]
    NotKilled { name: String },
    #[error("containers of {0} cannot be moved yet")]
    Unsupported(&'static str),
    /// As the agent tells it.
    #[error("{0}")]
    Told(String),
    #[error("the process that speaks to the engine")]
    Agent(#[source] io::Error),
    #[error(transparent)]
    Runtime(#[from] runtime::Error),
}

pub type Result<T> = std::result::Result<T, Error>;

/// A container as its engine knows it: all that another engine of the kind needs to make its like.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Description {
    /// As a [`Container`] is given on a command line: it names the engine, too.
    pub container: String,
    pub name: String,
    /// By which lmrun and the engine know it at the source.
    pub id: String,
    /// lmrun's `--root` there.
    pub root: PathBuf,
    pub bundle: PathBuf,
    pub rootfs: Rootfs,
    pub image: Image,
    pub networks: Vec<Network>,
    pub volumes: Vec<Volume>,
    /// The body of the request that makes the container, restart policy apart.
    pub create: Value,
    /// The restart policy in the engine's form; set when the container runs.
    pub restart: Value,
    /// What is not as one might think it is.
    pub notes: Vec<Note>,
}

/// The mount that the container's root is made of, at the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rootfs {
    pub mount: PathBuf,
    /// The directory with what the container has changed; none: it has no layers.
    pub upper: Option<PathBuf>,
    /// Upmost first.
    pub lower: Vec<PathBuf>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// As the container's configuration names it.
    pub reference: String,
    /// By digest.
    pub id: String,
    /// Digests of the layers' contents, lowest first.
    pub layers: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Network {
    pub name: String,
    /// The body of the request that makes the network; none: one that every host has (bridge, host, none).
    pub create: Option<Value>,
    /// How the container is attached, addresses included.
    pub endpoint: Value,
    pub addresses: Vec<IpAddr>,
    pub mac: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Volume {
    /// None: a directory of the host's is bound.
    pub name: Option<String>,
    /// The body of the request that makes the volume.
    pub create: Value,
    /// Where it is on the host.
    pub source: PathBuf,
    /// Where it is in the container.
    pub target: PathBuf,
}

impl Volume {
    /// Whether what is in it is this host's alone: neither a directory that is bound, nor another's storage.
    pub fn is_local(&self) -> bool {
        let options = self.create["DriverOpts"].as_object().is_some_and(|options| !options.is_empty());
        self.name.is_some() && self.create["Driver"] == "local" && !options
    }
}

/// A [`Finding`] that can be sent along.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    pub what: String,
    pub place: String,
    pub remedy: String,
    pub blocks: bool,
}

impl From<Note> for Finding {
    fn from(note: Note) -> Finding {
        let Note { what, place, remedy, blocks } = note;
        Finding { what, place, remedy, blocks }
    }
}

/// What was made for a container that is to arrive.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prepared {
    /// By which lmrun and the engine will know it here.
    pub id: String,
    /// The last components of the bundle's path, for [`crate::runtime::StandbySocket::bind`].
    pub bundle: PathBuf,
    pub networks: Vec<String>,
    /// Made here, with where they are.
    pub volumes: Vec<(String, PathBuf)>,
    /// The directory of an overlay that is not mounted yet, for what the container has changed.
    pub upper: PathBuf,
}

/// What an engine is asked for. All of it may take as long as the engine takes.
pub trait Engine {
    /// The container as it is.
    fn describe(&self, name: &str) -> Result<Description>;

    /// How many of the image's layers, counted from the lowest, are here; none: the whole image is.
    fn known_layers(&self, image: &Image) -> Result<Option<usize>>;

    /// Writes the image as an archive, without the content of the lowest `known` layers.
    fn export(&self, image: &Image, known: usize, to: &mut dyn Write) -> Result<()>;

    /// Takes such an archive.
    fn import(&self, image: &Image, from: &mut dyn Read) -> Result<()>;

    /// Those of its volumes that are not here, by name.
    fn missing_volumes(&self, wanted: &Description) -> Result<Vec<String>>;

    /// What stands in the way of a container like it here, and what will be different.
    fn check(&self, wanted: &Description) -> Result<Vec<Note>>;

    /// Makes the container, and the networks and volumes that it lacks. The image is here. When it fails, nothing of it
    /// stays.
    fn prepare(&self, wanted: &Description) -> Result<Prepared>;

    /// Starts it; comes back when it runs, which is when it has arrived, and then gives it its restart policy. Tells what
    /// is different from what was wanted.
    fn start(&self, wanted: &Description, prepared: &Prepared) -> Result<Vec<Note>>;

    /// Removes what [`Engine::prepare`] has made.
    fn discard(&self, prepared: &Prepared) -> Result<()>;

    /// Kills a container that has left, as the engine's own command would, so that it is not started again; removes it
    /// unless it is to be kept. One that is gone already is well.
    fn retire(&self, left: &Description, keep: bool) -> Result<()>;
}

/// The engine that has a container.
///
/// # Errors
/// [`Error::NoEngine`]; [`Error::Unsupported`] for a container without one.
pub fn open(container: &Container) -> Result<Box<dyn Engine>> {
    match container {
        Container::Docker(_) => Ok(Box::new(docker::Docker::open()?)),
        Container::Lmrun(_) => Err(Error::Unsupported("lmrun alone")),
        Container::Podman(_) => Err(Error::Unsupported("Podman")),
        Container::Containerd { .. } => Err(Error::Unsupported("containerd")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub fn description() -> Description {
        Description {
            container: "docker://web".into(),
            name: "web".into(),
            id: "c0ffee".into(),
            root: "/run/docker/runtime-runc/moby".into(),
            bundle: "/run/containerd/io.containerd.runtime.v2.task/moby/c0ffee".into(),
            rootfs: Rootfs { mount: "/merged".into(), upper: Some("/diff".into()), lower: vec!["/lower".into()] },
            image: Image { reference: "nginx".into(), id: "sha256:00".into(), layers: vec!["sha256:11".into()] },
            networks: Vec::new(),
            volumes: Vec::new(),
            create: Value::Null,
            restart: Value::Null,
            notes: Vec::new(),
        }
    }

    #[test]
    fn a_description_travels() {
        let json = serde_json::to_string(&description()).unwrap();
        assert_eq!(serde_json::from_str::<Description>(&json).unwrap(), description());
    }
}
