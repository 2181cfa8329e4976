//! What lmrun's caller gives it beside words: descriptors to hand down, sockets to send something to.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::{Error, Result};
use crate::sys::pidfd::PidFd;
use crate::sys::{fdpass, fds};

/// Keeps descriptors 3 .. 3 + n of the caller's for who is executed from here on, and those of systemd's socket activation
/// before them; what else the caller has left open is for nobody.
pub(super) fn keep_descriptors(n: u32) -> Result<()> {
    let mut all = 3..3 + i64::from(n);
    let missing = all.find(|fd| !i32::try_from(*fd).is_ok_and(fds::is_inherited));
    if let Some(missing) = missing {
        return Err(Error::PreservedFd(missing));
    }
    let activated = std::env::var("LISTEN_FDS").ok().and_then(|n| n.parse().ok()).unwrap_or(0);
    let first = 3_u32.saturating_add(n).saturating_add(activated);
    fds::close_on_exec_from(first).map_err(|e| Error::io("descriptors", e.into()))
}

pub(super) fn connect(path: &Path) -> Result<UnixStream> {
    UnixStream::connect(path).map_err(|e| Error::io(path, e))
}

/// Sends a pidfd of `pid` with the word that runc sends: `standard` for a container's init, `setns` for a process that is
/// exec'd.
pub(super) fn send_pidfd(socket: &UnixStream, pid: i32, word: &str) -> io::Result<()> {
    fdpass::send(socket.as_fd(), word.as_bytes(), &[PidFd::open(pid)?.as_fd()])
}
