//! Where a container arrives: in a bundle, by lmrun alone, or in a container that this host's engine makes for it.

use std::ffi::OsString;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use super::ledger::{self, Incoming};
use super::transport::{Input, Output};
use super::wire::message::{Accept, Finding, Offer};
use super::wire::{Reader, Writer};
use super::{Error, Result, disk, preflight};
use crate::engine::{ClockOffsets, Freezer, Puppet};
use crate::runtime::arrival::Arriving;
use crate::runtime::{self, Store};

mod engine;

use engine::{ByEngine, Started};

/// A place for a container, before it is one. What was made of it goes with the value, until it is [kept](Resident::keep).
pub enum Place {
    Bundle(Bundle),
    Engine(Box<ByEngine>),
}

impl Place {
    /// For what is offered.
    pub fn find(offer: &Offer) -> Result<Place> {
        Ok(match offer.engine.as_str() {
            "" => Place::Bundle(Bundle::find(offer)),
            description => Place::Engine(Box::new(ByEngine::begin(description)?)),
        })
    }

    /// A directory on the file system that its files will be on.
    pub fn dir(&self) -> &Path {
        match self {
            Place::Bundle(bundle) => &bundle.path,
            Place::Engine(engine) => engine.dir(),
        }
    }

    /// What is against it, `config` being the source's config.json.
    pub fn check(&mut self, store: &Store, offer: &Offer, config: &[u8]) -> Result<Vec<Finding>> {
        match self {
            Place::Bundle(bundle) => Ok(preflight::place(store, &offer.id, &bundle.path, config)),
            Place::Engine(engine) => engine.check(config, &offer.manner),
        }
    }

    /// What the source is to send.
    pub fn accept(&mut self) -> Result<Accept> {
        match self {
            Place::Bundle(bundle) => Ok(Accept { disk: !bundle.has_rootfs(), ..Accept::default() }),
            Place::Engine(engine) => engine.accept(),
        }
    }

    /// Makes what is missing but the content of file systems.
    pub fn make(
        &mut self,
        accepted: &Accept,
        config: &[u8],
        reader: &mut Reader<Input>,
        writer: &mut Writer<Output>,
    ) -> Result<()> {
        match self {
            Place::Bundle(bundle) => bundle.make(config),
            Place::Engine(engine) => engine.make(accepted.known_layers.is_some(), reader, writer),
        }
    }

    /// For that content; none: it is there.
    pub fn target(&self) -> Result<Option<disk::Target>> {
        match self {
            Place::Bundle(bundle) => bundle.target(),
            Place::Engine(engine) => engine.target().map(Some),
        }
    }

    /// The container, and its first puppet. `files` are those of [`Place::target`].
    pub fn raise(
        self,
        store: &Store,
        clocks: ClockOffsets,
        files: Option<&mut disk::Target>,
        writer: &mut Writer<Output>,
    ) -> Result<(Newcomer, Puppet)> {
        match self {
            Place::Bundle(bundle) => {
                let (arriving, puppet) = Arriving::begin(store, &bundle.id, &bundle.path, clocks)?;
                Ok((Newcomer::Bundle(Box::new(arriving), bundle, store.clone()), puppet))
            }
            Place::Engine(engine) => {
                let started = engine.start(clocks, files, writer)?;
                let puppet = started.puppet()?;
                Ok((Newcomer::Engine(Box::new(started)), puppet))
            }
        }
    }
}

/// A container whose processes arrive. Dropped before [`Newcomer::finish`], nothing of it is left.
pub enum Newcomer {
    Bundle(Box<Arriving>, Bundle, Store),
    Engine(Box<Started>),
}

impl Newcomer {
    /// What takes the place of the standard streams that came from outside. `images` has the records that were made last.
    pub fn external(&self, images: &Path) -> Result<Vec<(String, OwnedFd)>> {
        match self {
            Newcomer::Bundle(arriving, ..) => Ok(arriving.external(images)?),
            Newcomer::Engine(started) => started.external(images),
        }
    }

    /// The cgroup's freezer, which holds the container still without anybody.
    pub fn freezer(&self) -> Result<Box<dyn Freezer>> {
        match self {
            Newcomer::Bundle(arriving, ..) => Ok(arriving.freezer()),
            Newcomer::Engine(started) => started.freezer(),
        }
    }

    /// It is complete: from now on it is one like any other, and the migration's entry says so.
    pub fn finish(self, incoming: &Incoming, token: &str) -> Result<Resident> {
        match self {
            Newcomer::Bundle(arriving, bundle, store) => {
                (*arriving).finish()?;
                Ok(Resident::Bundle(bundle, store))
            }
            Newcomer::Engine(mut started) => {
                started.finish(incoming, token)?;
                Ok(Resident::Engine(started))
            }
        }
    }
}

/// A container that is complete here.
pub enum Resident {
    Bundle(Bundle, Store),
    Engine(Box<Started>),
}

impl Resident {
    /// It was not to be.
    pub fn remove(self) -> Result<()> {
        match self {
            Resident::Bundle(bundle, store) => Ok(runtime::delete(&store, &bundle.id, true)?),
            Resident::Engine(started) => started.remove(),
        }
    }

    /// Its files are its own from now on: it is decided that it runs here.
    pub fn keep(&mut self) {
        if let Resident::Bundle(bundle, _) = self {
            bundle.made.clear();
        }
    }

    /// It runs: what is left takes time that does not count.
    pub fn settle(self) {
        if let Resident::Engine(started) = self {
            started.settle();
        }
    }
}

/// Bundles that came with their containers.
const BUNDLES: &str = "/var/lib/lmrun/bundles";

/// The container's bundle. What was made of it is removed when the value is dropped, unless it is kept.
pub struct Bundle {
    /// The container's.
    id: String,
    path: PathBuf,
    made: Vec<PathBuf>,
}

impl Bundle {
    /// Where the source wants it, or where it is at the source, if there is one; else where lmrun puts them.
    fn find(offer: &Offer) -> Bundle {
        let wanted = PathBuf::from(OsString::from_vec(offer.bundle.clone().unwrap_or_default()));
        let path = match wanted.is_dir() {
            true => wanted,
            false => Path::new(BUNDLES).join(&offer.id),
        };
        Bundle { id: offer.id.clone(), path, made: Vec::new() }
    }

    fn rootfs(&self) -> PathBuf {
        let config = fs::read(self.path.join("config.json")).ok();
        let config: Option<serde_json::Value> = config.and_then(|json| serde_json::from_slice(&json).ok());
        let path = config.as_ref().and_then(|c| c["root"]["path"].as_str()).unwrap_or("rootfs");
        self.path.join(path)
    }

    fn has_rootfs(&self) -> bool {
        let entries = fs::read_dir(self.rootfs()).map(|mut entries| entries.next().is_some());
        self.path.join("config.json").is_file() && entries.unwrap_or(false)
    }

    /// Makes what is missing but the root file system's content.
    fn make(&mut self, config: &[u8]) -> Result<()> {
        let failed = |path: &Path| {
            let path = path.display().to_string();
            move |e: std::io::Error| Error::Other(format!("{path}: {e}"))
        };
        if !self.path.is_dir() {
            fs::create_dir_all(&self.path).map_err(failed(&self.path))?;
            self.made.push(self.path.clone());
        }
        let file = self.path.join("config.json");
        if !file.is_file() {
            let mut config: serde_json::Value =
                serde_json::from_slice(config).map_err(|e| Error::Other(format!("the source's config.json: {e}")))?;
            config["root"]["path"] = "rootfs".into();
            self.made.push(file.clone());
            fs::write(&file, config.to_string()).map_err(failed(&file))?;
        }
        Ok(())
    }

    /// None: the root file system is there.
    fn target(&self) -> Result<Option<disk::Target>> {
        if self.has_rootfs() {
            return Ok(None);
        }
        let root = disk::Root { name: "rootfs".into(), path: self.rootfs(), view: None, inside: "/".into() };
        Ok(Some(disk::Target::create(vec![root])?))
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        for path in self.made.iter().rev() {
            let _ = if path.is_dir() { fs::remove_dir(path) } else { fs::remove_file(path) };
        }
    }
}

/// A directory for the records of a round, which goes with the value.
pub struct Records {
    pub dir: PathBuf,
}

impl Records {
    pub fn make(store: &Store, token: &str) -> Result<Records> {
        let dir = ledger::records(store.root(), token);
        fs::create_dir_all(&dir).map_err(|e| Error::Other(format!("{}: {e}", dir.display())))?;
        Ok(Records { dir })
    }

    pub fn empty(&self) -> Result<()> {
        fs::remove_dir_all(&self.dir)
            .and_then(|()| fs::create_dir(&self.dir))
            .map_err(|e| Error::Other(format!("{}: {e}", self.dir.display())))
    }
}

impl Drop for Records {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}
