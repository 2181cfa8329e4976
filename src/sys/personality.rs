//! The execution domain of the calling process: personality(2).
#![allow(unsafe_code)]

use nix::errno::Errno;
use nix::libc;

/// Sets domain and flags; see `PER_*` and the flags above them in linux/personality.h.
pub fn set(persona: u32) -> nix::Result<()> {
    // SAFETY: takes a number.
    Errno::result(unsafe { libc::personality(persona.into()) }).map(drop)
}
