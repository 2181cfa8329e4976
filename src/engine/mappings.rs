//! The mappings of processes, with their flags.

use std::io;

use libc::pid_t;

use crate::sys::proc::{self, Vma};
use crate::sys::vma_flags::VmaFlags;

/// How they are read. By default from smaps, which takes some 20 ms per GiB.
#[derive(Debug, Default)]
pub struct Mappings(Option<VmaFlags>);

impl Mappings {
    /// As quick as this kernel can, whatever the memory. To make ready takes some 10 ms.
    pub fn open() -> Mappings {
        Mappings(VmaFlags::open().inspect_err(|error| tracing::debug!(%error, "mappings are read from smaps")).ok())
    }

    /// All mappings of a process that stands still, in ascending order. `[vsyscall]`, which is everybody's, may have no flags.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn read(&self, pid: pid_t) -> io::Result<Vec<Vma>> {
        let Some(flags) = &self.0 else { return proc::smaps(pid) };
        flags.read(pid).or_else(|error| {
            tracing::debug!(pid, %error, "its mappings are read from smaps");
            proc::smaps(pid)
        })
    }
}
