//! userfaultfd(2): asynchronous write protection for dirty tracking, and filling of missing pages.
//! Structures: include/uapi/linux/userfaultfd.h. The descriptor is made by the task itself (a
//! remote call) and used here from outside.
#![allow(unsafe_code)]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

const API: u64 = 0xaa;
const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const FEATURE_WP_ASYNC: u64 = 1 << 15;

const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFDIO_REGISTER: libc::c_ulong = 0xc020_aa00;
const UFFDIO_COPY: libc::c_ulong = 0xc028_aa03;

const REGISTER_MODE_MISSING: u64 = 1;
const REGISTER_MODE_WP: u64 = 2;

#[repr(C)]
struct ApiArg {
    api: u64,
    features: u64,
    ioctls: u64,
}
#[repr(C)]
struct RegisterArg {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}
#[repr(C)]
struct CopyArg {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}
const _: () = assert!(size_of::<ApiArg>() == 24 && size_of::<RegisterArg>() == 32 && size_of::<CopyArg>() == 40);

/// UFFD_USER_MODE_ONLY, since 5.11: without it a task needs CAP_SYS_PTRACE. No fault is ever sent to us: writes
/// to protected pages are resolved by the kernel itself, and nobody touches pages that are being filled.
const USER_MODE_ONLY: u64 = 1;
/// The flags with which the task has to call userfaultfd(2).
pub const OPEN_FLAGS: u64 = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64 | USER_MODE_ONLY;

/// A task's userfaultfd.
#[derive(Debug)]
pub struct Uffd(OwnedFd);

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Uffd {
    /// Whether this kernel can track writes as [`Uffd::tracking`] asks for.
    pub fn can_track() -> bool {
        Uffd::open().is_ok_and(|fd| Uffd::tracking(fd).is_ok())
    }

    /// For memory of our own, as [`OPEN_FLAGS`] are for that of another.
    pub(super) fn open() -> io::Result<OwnedFd> {
        // SAFETY: no pointers; the result is a descriptor of ours alone.
        unsafe {
            let fd = libc::syscall(libc::SYS_userfaultfd, OPEN_FLAGS);
            if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd as libc::c_int)) }
        }
    }

    /// For dirty tracking: writes to protected pages go on at once and are remembered.
    pub fn tracking(fd: OwnedFd) -> io::Result<Uffd> {
        Uffd(fd).api(FEATURE_WP_ASYNC | FEATURE_WP_UNPOPULATED | FEATURE_WP_HUGETLBFS_SHMEM | FEATURE_PAGEFAULT_FLAG_WP)
    }

    /// For filling pages that are missing.
    pub fn filling(fd: OwnedFd) -> io::Result<Uffd> {
        Uffd(fd).api(0)
    }

    /// Takes a descriptor on which [`Uffd::tracking`] was called before, by whomever.
    pub fn adopt(fd: OwnedFd) -> Uffd {
        Uffd(fd)
    }

    fn api(self, features: u64) -> io::Result<Uffd> {
        let mut arg = ApiArg { api: API, features, ioctls: 0 };
        self.ioctl(UFFDIO_API, &mut arg)?;
        Ok(self)
    }

    /// Tracks writes in [start, end), which must not cross a mapping that cannot be tracked.
    /// ESRCH: the task has executed another program or ended since.
    pub fn track(&self, start: u64, end: u64) -> io::Result<()> {
        self.ioctl(UFFDIO_REGISTER, &mut RegisterArg { start, len: end - start, mode: REGISTER_MODE_WP, ioctls: 0 })
    }

    /// Makes [start, end) fillable.
    pub fn fillable(&self, start: u64, end: u64) -> io::Result<()> {
        self.ioctl(
            UFFDIO_REGISTER,
            &mut RegisterArg { start, len: end - start, mode: REGISTER_MODE_MISSING, ioctls: 0 },
        )
    }

    /// Maps copies of `src` at `dst`, where no page may be present.
    pub fn copy(&self, dst: u64, src: &[u8]) -> io::Result<()> {
        let mut done = 0;
        while done < src.len() {
            let rest = &src[done..];
            let mut arg =
                CopyArg { dst: dst + done as u64, src: rest.as_ptr() as u64, len: rest.len() as u64, mode: 0, copy: 0 };
            match self.ioctl(UFFDIO_COPY, &mut arg) {
                Ok(()) => done += rest.len(),
                // The mapping was changed under us, or a signal came: `copy` tells how far it got.
                Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => done += arg.copy.max(0) as usize,
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn ioctl<T>(&self, request: libc::c_ulong, arg: &mut T) -> io::Result<()> {
        // SAFETY: each request above goes with the structure that the kernel's header names for it.
        let r = unsafe { libc::ioctl(self.0.as_raw_fd(), request as _, std::ptr::from_mut(arg)) };
        if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}
