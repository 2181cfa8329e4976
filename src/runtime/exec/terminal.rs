//! A terminal for the process, made from the container's own devpts.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;

use nix::libc;
use nix::sys::stat::makedev;
use nix::sys::statfs::{FsType, fstatfs};
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout};
use oci_spec::runtime::Process;

use super::super::workload::console_size;
use super::super::{Error, Result};
use crate::sys::{fdpass, terminal};

/// include/uapi/linux/magic.h
const DEVPTS_SUPER_MAGIC: FsType = FsType(0x1cd1);

/// Makes a terminal the calling session's, and its standard streams; the master goes over `socket`, with the name
/// that runc sends.
pub(super) fn open(process: &Process, socket: &UnixStream) -> io::Result<()> {
    let master = open_master()?;
    let slave = terminal::open_slave(&master)?;
    if let Some((rows, columns)) = console_size(process) {
        terminal::set_size(&slave, rows, columns)?;
    }
    fdpass::send(socket.as_fd(), b"/dev/ptmx", &[master.as_fd()])?;
    terminal::make_controlling(&slave)?;
    dup2_stdin(&slave)?;
    dup2_stdout(&slave)?;
    dup2_stderr(&slave)?;
    Ok(())
}

/// The container says what its files are: only a true devpts makes a terminal (CVE-2025-52565).
fn open_master() -> io::Result<File> {
    let flags = libc::O_NOCTTY | libc::O_NOFOLLOW | libc::O_CLOEXEC;
    let master = File::options().read(true).write(true).custom_flags(flags).open("/dev/pts/ptmx")?;
    let file = master.metadata()?;
    let true_one = file.file_type().is_char_device()
        && file.rdev() == makedev(5, 2)
        && fstatfs(&master)?.filesystem_type() == DEVPTS_SUPER_MAGIC;
    if true_one { Ok(master) } else { Err(io::Error::other("/dev/pts/ptmx is not what makes terminals")) }
}

/// The parent's end: what [`open`] has sent.
pub(super) fn receive_master(socket: &UnixStream) -> Result<OwnedFd> {
    let (_, fds) = fdpass::receive(socket.as_fd(), &mut [0; 64]).map_err(|e| Error::io("console", e))?;
    fds.into_iter().next().ok_or_else(|| Error::io("console", io::ErrorKind::UnexpectedEof.into()))
}
