//! The process's own table of descriptors.
#![allow(unsafe_code)]

use nix::errno::Errno;
use nix::libc;

/// Closes every descriptor from `first` up. close_range(2), since Linux 5.9.
///
/// Only for a process that owns none of them any more in the sense of Rust: one that is about
/// to loop in plain system calls, such as the puppet of a restore.
///
/// # Errors
/// None that depends on the descriptors; `ENOSYS` on kernels before 5.9.
pub fn close_from(first: u32) -> nix::Result<()> {
    // SAFETY: takes no pointers. The caller gives up all descriptors from `first` on.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
    Errno::result(result).map(drop)
}
