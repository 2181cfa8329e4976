//! The size of a terminal. ioctl_tty(2).
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::libc;

/// Gives the terminal `to` as many rows and columns as `from` has.
///
/// # Errors
/// `ENOTTY` where one of them is no terminal.
pub fn copy_size(from: impl AsFd, to: impl AsFd) -> nix::Result<()> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    let (from, to) = (from.as_fd().as_raw_fd(), to.as_fd().as_raw_fd());
    // SAFETY: the kernel writes one winsize into ours, which is live and exclusive.
    Errno::result(unsafe { libc::ioctl(from, libc::TIOCGWINSZ, &raw mut size) })?;
    // SAFETY: the kernel reads one winsize.
    Errno::result(unsafe { libc::ioctl(to, libc::TIOCSWINSZ, &raw const size) }).map(drop)
}
