//! How page contents travel: `engine` names the runs and reads the memory, a
//! [`PageSink`] (the local page store, or the page-server client of `transfer`)
//! decides where the bytes go and how many threads carry them.

use std::fmt;
use std::io;

/// Bytes of one page. x86_64 has no other base page size.
pub const PAGE_SIZE: u64 = 4096;

/// Whose memory a pagemap describes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PagesOf {
    /// Private memory of a task, by its pid inside the container (`pagemap-PID.img`).
    Task(u32),
    /// A shared memory object by its id; addresses are offsets in it (`pagemap-shmem-ID.img`).
    Shmem(u64),
}

impl fmt::Display for PagesOf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Task(pid) => write!(f, "pid {pid}"),
            Self::Shmem(id) => write!(f, "shared memory {id}"),
        }
    }
}

/// Consecutive pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Address of the first page, a multiple of [`PAGE_SIZE`].
    pub vaddr: u64,
    pub pages: u64,
}

impl Span {
    /// The pages in [start, end), both multiples of the page size.
    pub fn between(start: u64, end: u64) -> Span {
        Span { vaddr: start, pages: end.saturating_sub(start) / PAGE_SIZE }
    }

    pub fn of(run: &PageRun) -> Span {
        Span { vaddr: run.vaddr, pages: run.pages }
    }

    /// Address after the last page.
    pub fn end(self) -> u64 {
        self.vaddr + self.pages * PAGE_SIZE
    }

    /// The pages that are in both.
    pub fn cut(self, other: Span) -> Option<Span> {
        let (start, end) = (self.vaddr.max(other.vaddr), self.end().min(other.end()));
        (start < end).then(|| Span::between(start, end))
    }

    /// The address of each page.
    pub fn addresses(self) -> impl Iterator<Item = u64> {
        (self.vaddr..self.end()).step_by(PAGE_SIZE as usize)
    }
}

/// Consecutive pages that share one fate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    /// Address of the first page, a multiple of [`PAGE_SIZE`].
    pub vaddr: u64,
    /// Number of pages, at least 1.
    pub pages: u64,
    /// The content is that of the parent image: no bytes follow.
    pub in_parent: bool,
}

/// Reads the memory that a set of runs names. Used from several threads at once.
pub trait PageReader: Sync {
    /// Fills all of `buf` with the memory at `vaddr` (both multiples of the page size).
    fn read(&self, vaddr: u64, buf: &mut [u8]) -> io::Result<()>;
}

/// What a sink did with the runs it was given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Pages whose bytes were taken.
    pub pages: u64,
    /// Pages left to the parent image.
    pub in_parent: u64,
}

/// Takes the pages of one checkpoint, target by target.
pub trait PageSink {
    /// Whether `of` has a parent image that runs `in_parent` may refer to. Where it
    /// has not, the caller sends everything.
    fn has_parent(&mut self, of: PagesOf) -> crate::image::Result<bool>;

    /// Takes all runs of one target, in ascending order and without overlap; called once per target.
    fn write(&mut self, of: PagesOf, runs: &[PageRun], from: &dyn PageReader) -> crate::image::Result<Written>;

    /// All targets are written: make them durable (or have the peer confirm that it did).
    fn finish(&mut self) -> crate::image::Result<()>;
}
