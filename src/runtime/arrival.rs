//! A container that comes from elsewhere: built as by `create`, with an init that is driven.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use oci_spec::runtime::LinuxNamespaceType;

use super::bundle::Bundle;
use super::cgroup::Cgroup;
use super::create::{CreateOptions, HalfMade};
use super::process::Process;
use super::restore::{raise_puppet, wait_ready};
use super::state::{Status, Store};
use super::{Error, Result, start, streams};
use crate::engine::{ClockOffsets, Freezer, Puppet};
use crate::sys::file;

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
        let mut control = raise_puppet(&mut container, &bundle, clocks, &CreateOptions::default(), &|_| Ok(()))?;
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
        let root = format!("/proc/{}/root", self.init.pid);
        let root = File::open(&root).map_err(|e| Error::io(root, e))?;
        streams::replaced(images, &|_| null(root.as_fd()))
    }

    /// The cgroup's freezer, which holds the container still without anybody.
    pub fn freezer(&self) -> Box<dyn Freezer> {
        Box::new(Cgroup::at(&self.container.state().cgroup))
    }

    /// It is complete; from now on it is one like any other, to be removed by `delete`.
    pub fn finish(mut self) -> Result<Process> {
        self.container.forget_streams();
        self.container.finish(Status::Running, None)
    }
}

/// The container's own /dev/null, so that it is nothing from outside any more; the host's where it has made another thing of
/// it.
fn null(root: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    const NULL: u64 = libc::makedev(1, 3);
    let flags = libc::O_RDWR | libc::O_NONBLOCK | libc::O_NOCTTY;
    let own = file::open_in(root, b"/dev/null", libc::O_PATH as u32)?;
    match file::stat(&own)? {
        s if s.kind() == libc::S_IFCHR && s.rdev == NULL => {}
        _ => return File::options().read(true).write(true).open("/dev/null").map(OwnedFd::from),
    }
    file::reopen(&own, flags as u32)
}
