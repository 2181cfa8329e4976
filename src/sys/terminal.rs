//! Terminals: pty(7), ioctl_tty(2).
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

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

/// Gives a terminal `rows` and `columns`.
pub fn set_size(terminal: impl AsFd, rows: u16, columns: u16) -> nix::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the kernel reads one winsize.
    let result = unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    Errno::result(result).map(drop)
}

/// The other side of a pseudoterminal's master, unlocked and opened without going by any path.
pub fn open_slave(master: impl AsFd) -> nix::Result<OwnedFd> {
    let master = master.as_fd().as_raw_fd();
    let unlocked: libc::c_int = 0;
    // SAFETY: the kernel reads one int.
    Errno::result(unsafe { libc::ioctl(master, libc::TIOCSPTLCK, &raw const unlocked) })?;
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: takes a number; the result is a new descriptor that nobody else knows.
    unsafe {
        let slave = Errno::result(libc::ioctl(master, libc::TIOCGPTPEER, flags))?;
        Ok(OwnedFd::from_raw_fd(slave))
    }
}

/// Makes the terminal that of the calling session, whose leader the caller is.
pub fn make_controlling(terminal: impl AsFd) -> nix::Result<()> {
    // SAFETY: takes a number: 0 steals the terminal from nobody.
    Errno::result(unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSCTTY, 0) }).map(drop)
}

/// `struct termios2` (include/uapi/asm-generic/termbits.h).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Modes {
    pub input: u32,
    pub output: u32,
    pub control: u32,
    pub local: u32,
    pub line: u8,
    pub characters: [u8; 19],
    pub input_speed: u32,
    pub output_speed: u32,
}

const _: () = assert!(size_of::<Modes>() == 44);
const TCGETS2: libc::c_ulong = 0x802c_542a;
const TCSETS2: libc::c_ulong = 0x402c_542b;

/// How a terminal is set.
pub fn modes(terminal: impl AsFd) -> nix::Result<Modes> {
    let mut modes = Modes::default();
    // SAFETY: the kernel writes one struct termios2 into ours, which is live and exclusive.
    Errno::result(unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), TCGETS2 as _, &raw mut modes) })?;
    Ok(modes)
}

/// Sets a terminal.
pub fn set_modes(terminal: impl AsFd, modes: &Modes) -> nix::Result<()> {
    // SAFETY: the kernel reads one struct termios2.
    Errno::result(unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), TCSETS2 as _, std::ptr::from_ref(modes)) })
        .map(drop)
}

/// Rows and columns.
pub fn size(terminal: impl AsFd) -> nix::Result<(u16, u16)> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the kernel writes one winsize into ours, which is live and exclusive.
    Errno::result(unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) })?;
    Ok((size.ws_row, size.ws_col))
}
