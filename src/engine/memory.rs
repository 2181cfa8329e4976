//! Which pages of a process belong into a checkpoint, and reading them.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::collect::Host;
use super::plan::is_file_mapping;
use super::res::mm::{self, Content};
use super::{Error, Result};
use crate::image::pages::{PAGE_SIZE, PageReader, PageRun};
use crate::image::records::mm::MmEntry;
use crate::sys::file;
use crate::sys::mem::Memory;
use crate::sys::pagemap::{self, Pagemap, Query};

/// Private pages with content of their own: neither the file's nor the zero page. (A swapped-out page has
/// its content elsewhere; reading it brings it back.)
const OWN: Query =
    Query { flags: 0, all: 0, none: pagemap::PFNZERO, any: pagemap::PRESENT | pagemap::SWAPPED, report: 0 };

/// How the pages of a round are told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Round {
    /// All of them are new.
    Full,
    /// Those not written since the last round are in the parent image. Nothing is changed.
    Final,
    /// As `Final`, and from now on writes are noted anew.
    Track,
}

/// The runs of a private mapping, whose pages may be a file's, in ascending order. In a tracking round the mapping must be registered.
///
/// # Errors
/// EPERM: the mapping is not tracked (it is new, or was moved): everything in it is new.
pub fn runs(pages: &Pagemap, start: u64, end: u64, of_file: bool, round: Round) -> io::Result<Vec<PageRun>> {
    // To tell a file's pages from others the kernel looks at each page, not at the page table alone: some 20 ms per GiB.
    let foreign = if of_file { pagemap::FILE } else { 0 };
    // A guard region looks like a swapped-out page.
    let own = Query { none: OWN.none | foreign | pages.guard(), ..OWN };
    let query = match round {
        Round::Full => own,
        Round::Final => Query { flags: pagemap::CHECK_WPASYNC, report: pagemap::WRITTEN, ..own },
        Round::Track => Query { flags: pagemap::CHECK_WPASYNC | pagemap::WP_MATCHING, report: pagemap::WRITTEN, ..own },
    };
    let run = |r: pagemap::Region| PageRun {
        vaddr: r.start,
        pages: (r.end - r.start) / PAGE_SIZE,
        in_parent: round != Round::Full && r.categories & pagemap::WRITTEN == 0,
    };
    Ok(pages.scan(start, end, query)?.into_iter().map(run).collect())
}

/// All private runs of a process in a round that changes nothing. `tracked`: there is a parent image that
/// the kernel's notes go back to.
pub fn process_runs(host: &Host, mm: &MmEntry, tracked: bool) -> Result<Vec<PageRun>> {
    let io = |e| Error::proc(host.pid, e);
    let pages = Pagemap::open(host.pid).map_err(io)?;
    let round = if tracked { Round::Final } else { Round::Full };
    let mut all = Vec::new();
    for v in mm.vmas.iter().filter(|v| mm::content(v) == Content::Private) {
        let mut found = runs(&pages, v.start, v.end, is_file_mapping(v), round);
        if found.as_ref().is_err_and(is_untracked) {
            found = runs(&pages, v.start, v.end, is_file_mapping(v), Round::Full);
        }
        all.append(&mut found.map_err(io)?);
    }
    Ok(all)
}

pub fn is_untracked(e: &io::Error) -> bool {
    e.raw_os_error() == Some(libc::EPERM)
}

/// The memory of a stopped process.
impl PageReader for &Memory {
    fn read(&self, vaddr: u64, buf: &mut [u8]) -> io::Result<()> {
        Memory::read(self, vaddr, buf)
    }
}

/// The memory of a process that runs while it is read. A page that cannot be read is gone, and so is its place in
/// a later round: what is put there does not matter.
pub struct Running<'a>(pub &'a Memory);

impl PageReader for Running<'_> {
    fn read(&self, vaddr: u64, buf: &mut [u8]) -> io::Result<()> {
        if self.0.read(vaddr, buf).is_ok() {
            return Ok(());
        }
        for (i, page) in buf.chunks_mut(PAGE_SIZE as usize).enumerate() {
            if self.0.read(vaddr + i as u64 * PAGE_SIZE, page).is_err() {
                page.fill(0);
            }
        }
        Ok(())
    }
}

/// A shared memory object, through the mapping of one process. Offsets are its addresses.
pub struct Shmem(File);

impl Shmem {
    /// The object mapped at [start, end) in `pid`.
    pub fn open(pid: libc::pid_t, start: u64, end: u64) -> io::Result<Shmem> {
        File::open(format!("/proc/{pid}/map_files/{start:x}-{end:x}")).map(Shmem)
    }

    pub fn of(file: File) -> Shmem {
        Shmem(file)
    }

    /// The parts that have content.
    pub fn runs(&self) -> io::Result<Vec<PageRun>> {
        let mut all = Vec::new();
        let mut at = 0;
        while let Some((start, end)) = file::next_data(&self.0, at)? {
            let end = end.next_multiple_of(PAGE_SIZE);
            all.push(PageRun { vaddr: start, pages: (end - start) / PAGE_SIZE, in_parent: false });
            at = end;
        }
        Ok(all)
    }
}

impl PageReader for Shmem {
    fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        // A System V segment may end within a page.
        let inside = self.0.metadata()?.len().saturating_sub(offset).min(buf.len() as u64) as usize;
        buf[inside..].fill(0);
        self.0.read_exact_at(&mut buf[..inside], offset)
    }
}
