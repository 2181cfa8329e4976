//! What lmrun's caller gives it beside words: descriptors to hand down, sockets to send something to.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::{Error, Result};
use crate::sys::pidfd::PidFd;
use crate::sys::{fdpass, fds};

/// Whether descriptors 3 .. 3 + n are the caller's.
pub(super) fn check_descriptors(n: u32) -> Result<()> {
    let mut all = 3..3 + n.cast_signed();
    all.find(|fd| !fds::is_inherited(*fd)).map_or(Ok(()), |missing| Err(Error::PreservedFd(missing)))
}

pub(super) fn connect(path: &Path) -> Result<UnixStream> {
    UnixStream::connect(path).map_err(|e| Error::io(path, e))
}

/// Sends a pidfd of `pid` with the word that runc sends: `standard` for a container's init, `setns` for a process that is
/// exec'd.
pub(super) fn send_pidfd(socket: &UnixStream, pid: i32, word: &str) -> io::Result<()> {
    fdpass::send(socket.as_fd(), word.as_bytes(), &[PidFd::open(pid)?.as_fd()])
}
