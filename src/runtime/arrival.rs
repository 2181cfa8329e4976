//! A container that comes from elsewhere: built as by `create`, with an init that is driven.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;

use oci_spec::runtime::LinuxNamespaceType;

use super::bundle::Bundle;
use super::create::{CreateOptions, HalfMade};
use super::process::Process;
use super::restore::{raise_puppet, wait_ready};
use super::state::{Status, Store};
use super::{Error, Result, start, streams};
use crate::engine::{ClockOffsets, Puppet};

/// A container of which there are namespaces, cgroup, mounts and a puppet. Dropped, it is unmade.
#[derive(Debug)]
pub struct Arriving {
    container: HalfMade,
    init: Process,
}

impl Arriving {
    /// Makes container `id` from the bundle; gives its first puppet, too. Its clocks are ahead of ours by `clocks`.
    ///
    /// # Errors
    /// [`Error::NoPidNamespace`], [`Error::Exists`] and all that `create` can fail for.
    pub fn begin(store: &Store, id: &str, bundle: &Path, clocks: ClockOffsets) -> Result<(Arriving, Puppet)> {
        let bundle = Bundle::load(bundle)?;
        if !bundle.makes_namespace(LinuxNamespaceType::Pid) {
            return Err(Error::NoPidNamespace);
        }
        let mut container = HalfMade::begin(store, id, &bundle)?;
        let mut control = raise_puppet(&mut container, &bundle, clocks, &CreateOptions::default())?;
        let init = container.state().init.ok_or(Error::PuppetLost)?;
        start::go(container.dir())?;
        wait_ready(&mut control)?;
        let puppet = Puppet { pid: init.pid, control };
        Ok((Arriving { container, init }, puppet))
    }

    /// Host pid of its first process.
    pub fn init(&self) -> i32 {
        self.init.pid
    }

    /// What takes the place of the standard streams that came from outside: nobody is there any more.
    ///
    /// `images` has the records that were made last.
    pub fn external(&self, images: &Path) -> Result<Vec<(String, OwnedFd)>> {
        let null = |_| File::options().read(true).write(true).open("/dev/null").map(OwnedFd::from);
        streams::replaced(images, &null)
    }

    /// It runs.
    pub fn finish(self) -> Result<Process> {
        self.container.finish(Status::Running, None)
    }
}
