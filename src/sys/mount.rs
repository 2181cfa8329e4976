//! Mounts by descriptor: fsopen(2), fsmount(2), open_tree(2), mount_setattr(2), move_mount(2).
#![allow(unsafe_code)]

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use libc::{c_int, c_long};

/// include/uapi/linux/mount.h, struct mount_attr (MOUNT_ATTR_SIZE_VER0).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Attributes {
    pub set: u64,
    pub clear: u64,
    /// MS_SHARED and its kin; 0 leaves it.
    pub propagation: u64,
    /// With [`IDMAP`]: the user namespace whose mapping the mount gets.
    pub user_namespace: u64,
}

const _: () = assert!(size_of::<Attributes>() == 32);

// include/uapi/linux/mount.h
pub const RDONLY: u64 = 0x1;
pub const NOSUID: u64 = 0x2;
pub const NODEV: u64 = 0x4;
pub const NOEXEC: u64 = 0x8;
/// All that say when access times are written; relatime is 0.
pub const ATIME: u64 = 0x70;
pub const NOATIME: u64 = 0x10;
pub const STRICTATIME: u64 = 0x20;
pub const NODIRATIME: u64 = 0x80;
pub const IDMAP: u64 = 0x10_0000;
/// Since 5.14.
pub const NOSYMFOLLOW: u64 = 0x20_0000;

const AT_RECURSIVE: c_int = 0x8000;
const MOVE_MOUNT_F_EMPTY_PATH: c_int = 0x4;
const MOVE_MOUNT_T_EMPTY_PATH: c_int = 0x40;
const FSCONFIG_SET_FLAG: c_int = 0;
const FSCONFIG_SET_STRING: c_int = 1;
const FSCONFIG_CMD_CREATE: c_int = 6;

fn descriptor(result: c_long) -> io::Result<OwnedFd> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it, for nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(result as c_int) })
}

fn done(result: c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn c_string(text: &str) -> io::Result<CString> {
    CString::new(text).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// A new file system of type `kind`, mounted nowhere yet. `options` are the file system's own, with values or without.
pub fn new(kind: &str, source: &str, options: &[(String, Option<String>)]) -> io::Result<OwnedFd> {
    let kind = c_string(kind)?;
    // SAFETY: a string that lives until the call returns.
    let fs = descriptor(unsafe {
        libc::syscall(libc::SYS_fsopen, kind.as_ptr(), 1 /* FSOPEN_CLOEXEC */)
    })?;
    let configure = |command: c_int, key: Option<&CStr>, value: Option<&CStr>| {
        let key = key.map_or(std::ptr::null(), CStr::as_ptr);
        let value = value.map_or(std::ptr::null(), CStr::as_ptr);
        // SAFETY: strings that live until the call returns, or none.
        done(unsafe { libc::syscall(libc::SYS_fsconfig, fs.as_raw_fd(), command, key, value, 0) })
    };
    configure(FSCONFIG_SET_STRING, Some(c"source"), Some(&c_string(source)?))?;
    for (key, value) in options {
        let key = c_string(key)?;
        match value {
            None => configure(FSCONFIG_SET_FLAG, Some(&key), None)?,
            Some(value) => configure(FSCONFIG_SET_STRING, Some(&key), Some(&c_string(value)?))?,
        }
    }
    configure(FSCONFIG_CMD_CREATE, None, None)?;
    // SAFETY: no pointers.
    descriptor(unsafe {
        libc::syscall(libc::SYS_fsmount, fs.as_raw_fd(), 1 /* FSMOUNT_CLOEXEC */, 0)
    })
}

/// What is mounted at a place (O_PATH), and with `recursive` all below it, once more; mounted nowhere yet.
pub fn copy(of: impl AsFd, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = libc::OPEN_TREE_CLONE as c_int | libc::OPEN_TREE_CLOEXEC as c_int | libc::AT_EMPTY_PATH;
    if recursive {
        flags |= AT_RECURSIVE;
    }
    // SAFETY: an empty path, which lives for ever.
    descriptor(unsafe { libc::syscall(libc::SYS_open_tree, of.as_fd().as_raw_fd(), c"".as_ptr(), flags) })
}

/// Puts a mount at a place (O_PATH).
pub fn put(mount: impl AsFd, at: impl AsFd) -> io::Result<()> {
    let (from, to, empty) = (mount.as_fd().as_raw_fd(), at.as_fd().as_raw_fd(), c"".as_ptr());
    let flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH;
    // SAFETY: empty paths, which live for ever.
    done(unsafe { libc::syscall(libc::SYS_move_mount, from, empty, to, empty, flags) })
}

/// Changes what is said of a mount, and with `recursive` of all below it.
pub fn set(mount: impl AsFd, recursive: bool, attributes: &Attributes) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { AT_RECURSIVE } else { 0 };
    let (fd, size) = (mount.as_fd().as_raw_fd(), size_of_val(attributes));
    // SAFETY: the kernel reads a struct laid out as its own, of the size given.
    done(unsafe { libc::syscall(libc::SYS_mount_setattr, fd, c"".as_ptr(), flags, attributes, size) })
}
