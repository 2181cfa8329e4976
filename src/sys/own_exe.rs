//! The running program's own file, put out of reach of the containers it enters (CVE-2019-5736: a
//! process in a container opens `/proc/PID/exe` of the runtime and writes to it once it has exited).
#![allow(unsafe_code)]

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, FcntlArg, SealFlag, fcntl};
use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::statvfs::{FsFlags, fstatvfs};
use nix::unistd::execveat;

const EXE: &str = "/proc/self/exe";

/// Whether nobody can write to the program through its own `/proc/PID/exe`: it runs from a read-only mount
/// or a sealed memfd.
///
/// # Errors
/// /proc is missing.
pub fn is_sealed() -> io::Result<bool> {
    let exe = File::open(EXE)?;
    let read_only = fstatvfs(&exe)?.flags().contains(FsFlags::ST_RDONLY);
    // Not a memfd: EINVAL.
    let seals = fcntl(&exe, FcntlArg::F_GET_SEALS).map_or(SealFlag::empty(), SealFlag::from_bits_truncate);
    Ok(read_only || seals.contains(SealFlag::F_SEAL_WRITE))
}

/// Executes the program again, with the same arguments and environment, from a place that
/// [`is_sealed`] holds for: a read-only mount of its file that is in no mount namespace, or where that cannot
/// be made a sealed copy in memory. Returns only on failure.
///
/// # Errors
/// Why neither could be made, or execve(2) failed.
pub fn execute_sealed() -> io::Error {
    match read_only_mount().or_else(|_| sealed_copy()) {
        Ok(exe) => execute(exe.as_fd()),
        Err(error) => error,
    }
}

/// open_tree(2) since Linux 5.2, mount_setattr(2) since 5.12; both need CAP_SYS_ADMIN.
fn read_only_mount() -> io::Result<OwnedFd> {
    let path = CString::new(EXE)?;
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    // SAFETY: the path lives until the call returns; the result is checked before it is taken for a descriptor.
    let tree = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    let tree = Errno::result(tree)? as i32;
    // SAFETY: the kernel has just given us this descriptor and nobody else knows it.
    let tree = unsafe { OwnedFd::from_raw_fd(tree) };
    let attributes = libc::mount_attr { attr_set: libc::MOUNT_ATTR_RDONLY, attr_clr: 0, propagation: 0, userns_fd: 0 };
    let size = size_of::<libc::mount_attr>();
    // SAFETY: an empty path with AT_EMPTY_PATH means the descriptor; the kernel reads `size` bytes of a live struct.
    let set = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size,
        )
    };
    Errno::result(set)?;
    Ok(tree)
}

fn sealed_copy() -> io::Result<OwnedFd> {
    let copy = memfd_create("lmrun", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    let mut copy = File::from(copy);
    io::copy(&mut File::open(EXE)?, &mut copy)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SEAL;
    fcntl(&copy, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(copy.into())
}

fn execute(exe: impl AsFd) -> io::Error {
    let strings = |words: Vec<Vec<u8>>| words.into_iter().map(CString::new).collect::<Result<Vec<_>, _>>();
    let bytes = |word: &OsStr| word.as_bytes().to_vec();
    let arguments = strings(std::env::args_os().map(|word| bytes(&word)).collect());
    let environment =
        strings(std::env::vars_os().map(|(name, value)| [bytes(&name), bytes(&value)].join(&b'=')).collect());
    let (arguments, environment) = match (arguments, environment) {
        (Ok(arguments), Ok(environment)) => (arguments, environment),
        (Err(e), _) | (_, Err(e)) => return e.into(),
    };
    match execveat(exe, c"", &arguments, &environment, AtFlags::AT_EMPTY_PATH) {
        Ok(never) => match never {},
        Err(errno) => errno.into(),
    }
}
