//! Descriptors of processes: pidfd_open(2), pidfd_getfd(2), kcmp(2).
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use libc::{c_int, pid_t};

/// One process, whatever becomes of its number.
#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl PidFd {
    pub fn open(pid: pid_t) -> io::Result<PidFd> {
        // SAFETY: no pointers; the result is a new descriptor that nobody else owns.
        unsafe {
            let fd = libc::syscall(libc::SYS_pidfd_open, pid, 0);
            if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(PidFd(OwnedFd::from_raw_fd(fd as c_int))) }
        }
    }

    /// A duplicate of the process's descriptor `fd`: the same open file description.
    pub fn get(&self, fd: c_int) -> io::Result<OwnedFd> {
        // SAFETY: as above.
        unsafe {
            let fd = libc::syscall(libc::SYS_pidfd_getfd, self.0.as_raw_fd(), fd, 0);
            if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd as c_int)) }
        }
    }

    pub fn kill(&self, signal: c_int) -> io::Result<()> {
        // SAFETY: no pointers but a null siginfo.
        let r = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.0.as_raw_fd(), signal, 0, 0) };
        if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Waits until the process has ended; false when `timeout` passed first.
    pub fn wait_end(&self, timeout: Duration) -> io::Result<bool> {
        let mut p = [nix::poll::PollFd::new(self.0.as_fd(), nix::poll::PollFlags::POLLIN)];
        let ms = nix::poll::PollTimeout::try_from(timeout).unwrap_or(nix::poll::PollTimeout::MAX);
        Ok(nix::poll::poll(&mut p, ms)? > 0)
    }
}

/// One that was handed over.
impl From<OwnedFd> for PidFd {
    fn from(fd: OwnedFd) -> PidFd {
        PidFd(fd)
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What two tasks may share (include/uapi/linux/kcmp.h).
#[derive(Debug, Clone, Copy)]
pub enum Shared {
    Vm = 1,
    Files = 2,
    Fs = 3,
}

/// Whether two tasks share `what`.
pub fn same(a: pid_t, b: pid_t, what: Shared) -> io::Result<bool> {
    kcmp(a, b, what as c_int, 0, 0)
}

/// Whether two descriptors refer to the same open file description.
pub fn same_file(a: (pid_t, c_int), b: (pid_t, c_int)) -> io::Result<bool> {
    const KCMP_FILE: c_int = 0;
    kcmp(a.0, b.0, KCMP_FILE, a.1 as u64, b.1 as u64)
}

fn kcmp(a: pid_t, b: pid_t, what: c_int, x: u64, y: u64) -> io::Result<bool> {
    // SAFETY: only numbers.
    let r = unsafe { libc::syscall(libc::SYS_kcmp, a, b, what, x, y) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(r == 0) }
}
