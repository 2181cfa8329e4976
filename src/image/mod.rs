//! CRIU's image format: records, files, page store. Knows no kinds of kernel object.

#[cfg(test)]
mod criu_tests;
pub mod dir;
pub mod format;
pub mod page_source;
pub mod page_store;
pub mod pages;
pub mod records;
#[cfg(test)]
pub(crate) mod scratch;

use std::io;
use std::path::{Path, PathBuf};

use pages::PagesOf;

/// Why an image could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{path}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{path}: starts with {found:#010x} where {expected:#010x} was expected")]
    Magic { path: PathBuf, found: u32, expected: u32 },
    #[error("{path}: ends too early: at offset {offset}, {wanted} bytes wanted and {left} left")]
    Truncated { path: PathBuf, offset: u64, wanted: u64, left: u64 },
    #[error("{path}: record at offset {offset} has {bytes} bytes: more than any record has")]
    TooLong { path: PathBuf, offset: u64, bytes: u64 },
    #[error("{path}: {kind} at offset {offset}")]
    Record { path: PathBuf, offset: u64, kind: &'static str, source: format::RecordError },
    #[error("{path}: has {found} records where one was expected")]
    NotOne { path: PathBuf, found: usize },
    #[error("{path}: exists already and is not an empty directory")]
    Occupied { path: PathBuf },
    #[error("{path}: is not a relative path, as the link to a parent image has to be")]
    ParentNotRelative { path: PathBuf },
    #[error("{path}: is no image directory: it has no inventory.img, no lmrun.bin and no pagemaps")]
    NotImages { path: PathBuf },
    #[error("{path}: more than {limit} generations of parent images")]
    TooManyParents { path: PathBuf, limit: usize },
    #[error("{path}: is its own ancestor")]
    ParentCycle { path: PathBuf },
    #[error("{path}: is not a regular file")]
    NotAFile { path: PathBuf },
    #[error("{path}: a record announces {said} bytes and has {given}")]
    Payload { path: PathBuf, said: u64, given: u64 },
    #[error("{of}: the runs of pages are not in order at {vaddr:#x}")]
    Runs { of: PagesOf, vaddr: u64 },
    #[error("{path}: run at {vaddr:#x} {what}")]
    Pagemap { path: PathBuf, vaddr: u64, what: &'static str },
    #[error("{path}: {of}: the page at {vaddr:#x} should be in the parent image and is not")]
    NotInParent { path: PathBuf, of: PagesOf, vaddr: u64 },
    #[error("{of}: memory at {vaddr:#x}")]
    Memory { of: PagesOf, vaddr: u64, source: io::Error },
    /// Where pages go is not a directory here.
    #[error(transparent)]
    Elsewhere(Box<dyn std::error::Error + Send + Sync>),
}

impl Error {
    /// For `map_err`: an I/O error at `path`.
    pub(crate) fn io<E: Into<io::Error>>(path: &Path) -> impl FnOnce(E) -> Self {
        move |source| Self::Io { path: path.to_owned(), source: source.into() }
    }
}

pub type Result<T> = std::result::Result<T, Error>;
