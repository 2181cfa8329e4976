//! What is in a container's file systems, copied while it runs: an overlay's upper directory, a whole root, a volume, or an
//! image's layer.
//!
//! ```text
//! Source::open -> round(Live) ... round(Live) -> [frozen] round(Last)
//!      | Message                                        |
//! Target::create -> apply ...                      -> finish -> commit
//! ```
//! * The first round sends everything, each later one what has changed since; the last is made while nobody writes.
//! * What has changed is learned from inotify(7) and, for what it is not told, from the list of [`Busy`] files. Where a file
//!   system cannot be watched, every entry's stat(2) is compared.
//! * Of a file, blocks are compared by fingerprints that the source keeps; only those that differ are sent.
//! * Everything that stat(2) and listxattr(2) tell is kept but access and change times: whiteouts and opaque directories of an
//!   overlay, ACLs and file capabilities, hard links, holes, device nodes, owners. Inode flags (chattr(1)) are not.
//! * [`Busy`] files are listed for every round, the first too: one that was mapped then may have been unmapped since.
//! * Once an overlay is mounted on what is being built, what comes is done to [what is mounted](Target::mounted): the kernel
//!   remembers names that it has looked up.
//! * The destination builds below a directory of its own and removes it again unless it is told to [commit](Target::commit).
//!
//! The modules: [`message`] what goes over the wire, [`digest`] how both sides know that they have the same,
//! `layout` where a container's changes are, `shared` whether both hosts see one storage.

mod content;
pub mod digest;
mod layout;
pub mod message;
mod shared;
mod source;
mod target;
#[cfg(test)]
mod tests;
mod watch;

use std::io;
use std::path::{Path, PathBuf};

pub use layout::{Layout, layout, usage};
pub use message::{LIMIT, Malformed, Message};
pub use shared::Probe;
pub use source::{Busy, Round, Source, Stage, digest_of};
pub use target::Target;

/// A directory to copy with all below it, on one file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Root {
    /// What it is called in messages to people; both sides list their roots in the same order.
    pub name: String,
    pub path: PathBuf,
    /// For an overlay's upper directory: where the overlay is mounted. Until Linux 6.8 writes are told of there alone.
    pub view: Option<PathBuf>,
    /// Where it is in the container, `/` for its root: to find the [`Busy`] files in.
    pub inside: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot {doing} {path}")]
    Io { doing: &'static str, path: PathBuf, source: io::Error },
    #[error(
        "{path} changes while the container is frozen: another process writes there; end it, or leave the volume out"
    )]
    Changed { path: PathBuf },
    #[error("{path} is on another file system than {root}: unmount it, or name it as a volume of its own")]
    OtherFileSystem { path: PathBuf, root: PathBuf },
    #[error("{path} has more extended attributes than {limit} bytes", limit = message::XATTR_LIMIT)]
    TooManyXattrs { path: PathBuf },
    #[error("the directory {path} is not empty: remove what is there first")]
    NotEmpty { path: PathBuf },
    #[error(
        "{path} is an overlay whose directory {missing} cannot be found: it was mounted with a path that is not absolute"
    )]
    LayoutUnknown { path: PathBuf, missing: String },
    #[error("cannot watch files for changes")]
    Watch { source: io::Error },
    #[error("cannot send what changed in the file systems")]
    Emit { source: io::Error },
    #[error("the source sent a wrong message about files: {what}")]
    Hostile { what: String },
    #[error("{path} is not what it was made: {what}; the file system there cannot keep it")]
    NotKept { path: PathBuf, what: &'static str },
    #[error("the files differ from the source's: digest {ours}, not {theirs}")]
    Digest { ours: String, theirs: String },
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// For `map_err`.
    fn io(doing: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { doing, path: path.as_ref().to_owned(), source }
    }
}

/// The extended attributes of `path`, which is not followed, in order of their names. Empty where the file system has none.
fn xattrs(path: &Path) -> io::Result<Vec<message::Xattr>> {
    use std::os::unix::ffi::OsStringExt;
    let names = match xattr::list(path) {
        Ok(names) => names,
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let mut all = Vec::new();
    for name in names {
        // None: it was removed since.
        if let Some(value) = xattr::get(path, &name)? {
            all.push(message::Xattr { name: name.into_vec(), value });
        }
    }
    all.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    Ok(all)
}
