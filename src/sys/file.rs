//! Open files: stat, owner, flags, opening inside another root.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use libc::{c_int, pid_t};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// include/uapi/asm-generic/fcntl.h
pub const F_SETSIG: c_int = 10;
const F_GETSIG: c_int = 11;
pub const F_SETOWN_EX: c_int = 15;
const F_GETOWN_EX: c_int = 16;

/// The part of stat(2) that tells files apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileStat {
    pub dev: u64,
    pub inode: u64,
    pub mode: u32,
    pub links: u64,
    pub size: u64,
    pub rdev: u64,
}

impl FileStat {
    /// S_IFREG and so on.
    pub fn kind(&self) -> u32 {
        self.mode & libc::S_IFMT
    }

    pub fn is_same_file(&self, other: &FileStat) -> bool {
        (self.dev, self.inode) == (other.dev, other.inode)
    }
}

pub fn stat(fd: impl AsFd) -> io::Result<FileStat> {
    let s = nix::sys::stat::fstat(fd)?;
    Ok(FileStat {
        dev: s.st_dev,
        inode: s.st_ino,
        mode: s.st_mode,
        links: s.st_nlink,
        size: s.st_size as u64,
        rdev: s.st_rdev,
    })
}

/// Who gets SIGIO: (F_OWNER_*, pid in our namespace or 0, signal or 0 for the default).
pub fn owner(fd: impl AsFd) -> io::Result<(c_int, pid_t, c_int)> {
    let fd = fd.as_fd().as_raw_fd();
    let mut owner = [0i32; 2];
    // SAFETY: F_GETOWN_EX fills struct f_owner_ex, two ints; F_GETSIG takes no argument.
    let (a, signal) = unsafe { (libc::fcntl(fd, F_GETOWN_EX, owner.as_mut_ptr()), libc::fcntl(fd, F_GETSIG)) };
    match io::Error::last_os_error() {
        // O_PATH descriptors have neither.
        e if (a < 0 || signal < 0) && e.raw_os_error() == Some(libc::EBADF) => Ok((0, 0, 0)),
        e if a < 0 || signal < 0 => Err(e),
        _ => Ok((owner[0], owner[1], signal)),
    }
}

/// Sets the status flags that may change after open(2).
pub fn set_flags(fd: impl AsFd, flags: u32) -> io::Result<()> {
    // SAFETY: F_SETFL takes a number.
    let r = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_SETFL, flags as c_int) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

pub fn pipe_size(fd: impl AsFd) -> io::Result<u32> {
    // SAFETY: F_GETPIPE_SZ takes no argument.
    let r = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_GETPIPE_SZ) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(r as u32) }
}

pub fn set_pipe_size(fd: impl AsFd, size: u32) -> io::Result<()> {
    // SAFETY: F_SETPIPE_SZ takes a number.
    let r = unsafe { libc::fcntl(fd.as_fd().as_raw_fd(), libc::F_SETPIPE_SZ, size as c_int) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Opens `path` as a process with the root directory `root` would: no symbolic link leads out of it (openat2(2)).
pub fn open_in(root: impl AsFd, path: &[u8], flags: u32) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct How {
        flags: u64,
        mode: u64,
        resolve: u64,
    }
    const RESOLVE_NO_MAGICLINKS: u64 = 2;
    const RESOLVE_IN_ROOT: u64 = 0x10;
    let path = CString::new(path)?;
    let flags = u64::from(flags) | libc::O_CLOEXEC as u64;
    let how = How { flags, mode: 0, resolve: RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS };
    let mut tries = 0;
    loop {
        // SAFETY: path and how live across the call; the result is a descriptor of ours alone.
        let fd = unsafe {
            libc::syscall(libc::SYS_openat2, root.as_fd().as_raw_fd(), path.as_ptr(), &raw const how, size_of::<How>())
        };
        if fd >= 0 {
            // SAFETY: as above.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd as c_int) });
        }
        let error = io::Error::last_os_error();
        // Something was renamed or mounted on this machine while `..` was walked: the kernel cannot tell whether that led out.
        tries += 1;
        if error.raw_os_error() != Some(libc::EAGAIN) || tries == MOST_TRIES {
            return Err(error);
        }
        std::thread::yield_now();
    }
}

/// How often a walk is begun anew: more than that is no coincidence.
const MOST_TRIES: u32 = 1000;

/// Opens the same file once more: a new open file description.
pub fn reopen(fd: impl AsFd, flags: u32) -> io::Result<OwnedFd> {
    let path = CString::new(format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()))?;
    // SAFETY: the path lives across the call; the result is a descriptor of ours alone.
    unsafe {
        let new = libc::open(path.as_ptr(), flags as c_int | libc::O_CLOEXEC);
        if new < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(new)) }
    }
}

/// The next offset from `from` at which the file has data, and where that ends; None: no more.
pub fn next_data(fd: impl AsFd, from: u64) -> io::Result<Option<(u64, u64)>> {
    use nix::unistd::{Whence, lseek};
    let fd = fd.as_fd();
    let start = match lseek(fd, from as i64, Whence::SeekData) {
        Ok(at) => at as u64,
        Err(nix::errno::Errno::ENXIO) => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    Ok(Some((start, lseek(fd, start as i64, Whence::SeekHole)? as u64)))
}

/// Domain, type and protocol; None: no socket.
pub fn socket_kind(fd: impl AsFd) -> Option<(c_int, c_int, c_int)> {
    let get = |option| {
        let mut value: c_int = 0;
        let mut len = size_of::<c_int>() as libc::socklen_t;
        // SAFETY: `value` and `len` live across the call and agree.
        let r = unsafe {
            libc::getsockopt(fd.as_fd().as_raw_fd(), libc::SOL_SOCKET, option, (&raw mut value).cast(), &raw mut len)
        };
        (r == 0).then_some(value)
    };
    Some((get(libc::SO_DOMAIN)?, get(libc::SO_TYPE)?, get(libc::SO_PROTOCOL)?))
}

/// An eventfd with this count.
pub fn eventfd(count: u64, semaphore: bool) -> io::Result<OwnedFd> {
    let flags = libc::EFD_CLOEXEC | if semaphore { libc::EFD_SEMAPHORE } else { 0 };
    // SAFETY: no pointers; the result is a descriptor of ours alone.
    let fd = unsafe {
        let fd = libc::eventfd(0, flags);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        OwnedFd::from_raw_fd(fd)
    };
    if count > 0 {
        nix::unistd::write(&fd, &count.to_ne_bytes())?;
    }
    Ok(fd)
}

/// A time and an interval, in seconds and nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TimerValue {
    pub left: (u64, u64),
    pub interval: (u64, u64),
}

/// include/uapi/linux/timerfd.h, since 3.16 with CONFIG_CHECKPOINT_RESTORE.
const TFD_IOC_SET_TICKS: libc::c_ulong = 0x4008_5400;

/// Has the kernel count what a periodic timerfd with `ticks` unread expirations has missed since the first of them:
/// it does that when it is read, and takes the number back.
pub fn count_missed(fd: impl AsFd, ticks: u64) -> io::Result<()> {
    let set = |ticks: u64| {
        // SAFETY: `ticks` lives across the call.
        let r = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), TFD_IOC_SET_TICKS as _, &raw const ticks) };
        if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    // Before anything is taken: can it be given back?
    set(ticks)?;
    let mut missed = [0; 8];
    nix::unistd::read(&fd, &mut missed)?;
    set(u64::from_ne_bytes(missed))
}

/// A timerfd that expires after `value.left` and has `ticks` unread expirations.
///
/// `flags` are those of timerfd_settime(2); with TFD_TIMER_ABSTIME the time left is counted from now.
pub fn timerfd(clock: c_int, value: TimerValue, flags: c_int, ticks: u64) -> io::Result<OwnedFd> {
    const NANOS: i64 = 1_000_000_000;
    let spec = |(s, ns)| libc::timespec { tv_sec: s as i64, tv_nsec: ns as i64 };
    // A periodic timer that nobody has read since it expired shows no time left; set so it would never run again.
    let waits = ticks > 0 && value.left == (0, 0) && value.interval != (0, 0);
    let left = if waits { (0, 1) } else { value.left };
    let mut spec = libc::itimerspec { it_interval: spec(value.interval), it_value: spec(left) };
    if flags & libc::TFD_TIMER_ABSTIME != 0 && left != (0, 0) {
        let now = nix::time::clock_gettime(nix::time::ClockId::from_raw(clock))?;
        let nanos = spec.it_value.tv_nsec + now.tv_nsec();
        spec.it_value.tv_sec += now.tv_sec() + nanos / NANOS;
        spec.it_value.tv_nsec = nanos % NANOS;
    }
    // SAFETY: `spec` and `ticks` live across the calls; the descriptor is ours alone.
    unsafe {
        let fd = libc::timerfd_create(clock, libc::TFD_CLOEXEC);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let fd = OwnedFd::from_raw_fd(fd);
        if libc::timerfd_settime(fd.as_raw_fd(), flags, &raw const spec, std::ptr::null_mut()) < 0 {
            return Err(io::Error::last_os_error());
        }
        // It has expired already: the count that this made is replaced.
        if waits {
            poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], PollTimeout::from(100u8))?;
        }
        if ticks > 0 && libc::ioctl(fd.as_raw_fd(), TFD_IOC_SET_TICKS as _, &raw const ticks) < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(fd)
    }
}

/// A signalfd for a set of signals: signal n is bit n - 1.
pub fn signalfd(signals: u64) -> io::Result<OwnedFd> {
    // SAFETY: the kernel reads the eight bytes of its set during the call; the result is a descriptor of ours alone.
    unsafe {
        let fd = libc::syscall(libc::SYS_signalfd4, -1, &raw const signals, size_of::<u64>(), libc::SFD_CLOEXEC);
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd as c_int)) }
    }
}

pub fn epoll() -> io::Result<OwnedFd> {
    // SAFETY: no pointers; the result is a descriptor of ours alone.
    unsafe {
        let fd = libc::epoll_create1(libc::EPOLL_CLOEXEC);
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd)) }
    }
}
