//! The execution domain of the calling process: personality(2).
#![allow(unsafe_code)]

use nix::errno::Errno;
use nix::libc;

/// Sets the domain; see `PER_*` in linux/personality.h.
pub fn set(domain: u32) -> nix::Result<()> {
    // SAFETY: takes a number.
    Errno::result(unsafe { libc::personality(domain.into()) }).map(drop)
}
