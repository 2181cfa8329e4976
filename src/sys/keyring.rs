//! Session keyrings. keyctl(2), session-keyring(7).
#![allow(unsafe_code)]

use std::ffi::CStr;

use nix::errno::Errno;
use nix::libc;

/// Leaves the session keyring that was inherited for a keyring called `name`, a new one unless there is
/// one that the caller may join.
///
/// # Errors
/// `ENOSYS` where the kernel has no keyrings, `EDQUOT` where the user has too many.
pub fn join_session(name: &CStr) -> nix::Result<()> {
    // SAFETY: the kernel reads a string that lives until the call returns.
    let result = unsafe { libc::syscall(libc::SYS_keyctl, libc::KEYCTL_JOIN_SESSION_KEYRING, name.as_ptr()) };
    Errno::result(result).map(drop)
}
