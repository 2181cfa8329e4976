//! inotify(7).
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use libc::c_int;

/// include/uapi/linux/inotify.h, since 4.16 with CONFIG_CHECKPOINT_RESTORE: the number of the next watch.
const INOTIFY_IOC_SETNEXTWD: libc::c_ulong = 0x4004_4900;

pub fn new() -> io::Result<OwnedFd> {
    // SAFETY: no pointers; the result is a descriptor of ours alone.
    unsafe {
        let fd = libc::inotify_init1(libc::IN_CLOEXEC);
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd)) }
    }
}

/// Watches the file behind `target`; gives the number of the watch.
pub fn add(instance: impl AsFd, target: impl AsFd, mask: u32) -> io::Result<c_int> {
    let path = CString::new(format!("/proc/self/fd/{}", target.as_fd().as_raw_fd()))?;
    // SAFETY: the path lives across the call.
    let wd = unsafe { libc::inotify_add_watch(instance.as_fd().as_raw_fd(), path.as_ptr(), mask) };
    if wd < 0 { Err(io::Error::last_os_error()) } else { Ok(wd) }
}

/// As [`add`], with a number of one's choice.
pub fn add_as(instance: impl AsFd, wd: c_int, target: impl AsFd, mask: u32) -> io::Result<()> {
    // SAFETY: takes a number.
    let set = unsafe { libc::ioctl(instance.as_fd().as_raw_fd(), INOTIFY_IOC_SETNEXTWD as _, wd) };
    if set < 0 {
        return Err(io::Error::last_os_error());
    }
    if add(instance, target, mask)? == wd { Ok(()) } else { Err(io::ErrorKind::AlreadyExists.into()) }
}
