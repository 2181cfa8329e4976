//! Installing seccomp filters. seccomp(2), Documentation/userspace-api/seccomp_filter.rst.
#![allow(unsafe_code)]

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::libc;

/// One instruction of classic BPF (include/uapi/linux/filter.h, struct sock_filter).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    pub code: u16,
    /// Instructions to skip when the comparison holds.
    pub jt: u8,
    /// Instructions to skip when it does not.
    pub jf: u8,
    pub k: u32,
}

const _: () = assert!(size_of::<Instruction>() == size_of::<libc::sock_filter>());
const _: () = assert!(align_of::<Instruction>() == align_of::<libc::sock_filter>());

/// The kernel takes no longer program (include/uapi/linux/bpf_common.h).
pub const MAX_INSTRUCTIONS: usize = 4096;

/// Adds `program` to the filters of the calling thread, with SECCOMP_FILTER_FLAG_* `flags`. Does not set
/// no_new_privs: without it the caller needs CAP_SYS_ADMIN in its user namespace.
///
/// # Errors
/// `EINVAL` for a program or flag that the kernel does not take, `EACCES` for a caller that may not.
pub fn install(program: &[Instruction], flags: u64) -> nix::Result<()> {
    seccomp(program, flags).map(drop)
}

/// As [`install`]; the descriptor is that on which the kernel asks about calls whose verdict is SECCOMP_RET_USER_NOTIF.
/// seccomp_unotify(2), since 5.0.
///
/// # Errors
/// `EBUSY` where a filter with a listener is installed already.
pub fn install_with_listener(program: &[Instruction], flags: u64) -> nix::Result<OwnedFd> {
    const NEW_LISTENER: u64 = 1 << 3;
    let fd = seccomp(program, flags | NEW_LISTENER)?;
    // SAFETY: the kernel has just made it, for nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

fn seccomp(program: &[Instruction], flags: u64) -> nix::Result<libc::c_long> {
    let length = u16::try_from(program.len()).map_err(|_| Errno::EINVAL)?;
    let program = libc::sock_fprog { len: length, filter: program.as_ptr().cast_mut().cast() };
    // SAFETY: the kernel copies `len` instructions, which are laid out as its own (asserted above), from memory
    // that lives until the call returns, and writes nothing.
    Errno::result(unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) })
}
