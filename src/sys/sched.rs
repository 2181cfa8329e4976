//! Scheduling attributes of a task: sched_getattr(2), sched_getaffinity(2), get_robust_list(2).
#![allow(unsafe_code)]

use std::io;
use std::mem::size_of;

use libc::pid_t;

/// `struct sched_attr`, include/uapi/linux/sched/types.h, without the utilisation clamps of 5.3.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Filled in where it is used.
    pub size: u32,
    pub policy: u32,
    pub flags: u64,
    pub nice: i32,
    pub priority: u32,
    pub runtime: u64,
    pub deadline: u64,
    pub period: u64,
}
const _: () = assert!(size_of::<Attributes>() == 48);

pub fn attributes(tid: pid_t) -> io::Result<Attributes> {
    let mut a = Attributes::default();
    // SAFETY: the kernel fills at most the size given.
    check(unsafe { libc::syscall(libc::SYS_sched_getattr, tid, &raw mut a, size_of::<Attributes>(), 0) })?;
    Ok(a)
}

pub fn set_attributes(tid: pid_t, mut a: Attributes) -> io::Result<()> {
    a.size = size_of::<Attributes>() as u32;
    // SAFETY: `a` lives across the call.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, tid, &raw const a, 0) })
}

/// The CPUs that the task may use, one bit each, as the kernel has them.
pub fn affinity(tid: pid_t) -> io::Result<Vec<u8>> {
    let mut mask = vec![0u8; 1024];
    // SAFETY: the length given is the buffer's.
    let n = unsafe { libc::syscall(libc::SYS_sched_getaffinity, tid, mask.len(), mask.as_mut_ptr()) };
    check(n)?;
    mask.truncate(n as usize);
    Ok(mask)
}

pub fn set_affinity(tid: pid_t, mask: &[u8]) -> io::Result<()> {
    // SAFETY: as above.
    check(unsafe { libc::syscall(libc::SYS_sched_setaffinity, tid, mask.len(), mask.as_ptr()) })
}

/// Head and length of the task's list of robust futexes.
pub fn robust_list(tid: pid_t) -> io::Result<(u64, u64)> {
    let (mut head, mut len) = (0u64, 0u64);
    // SAFETY: both are live u64s.
    check(unsafe { libc::syscall(libc::SYS_get_robust_list, tid, &raw mut head, &raw mut len) })?;
    Ok((head, len))
}

/// I/O class and priority of a task: ioprio_get(2).
pub fn io_priority(tid: pid_t) -> io::Result<u32> {
    // SAFETY: only numbers.
    let r = unsafe { libc::syscall(libc::SYS_ioprio_get, IOPRIO_WHO_PROCESS, tid) };
    check(r).map(|()| r as u32)
}

pub fn set_io_priority(tid: pid_t, priority: u32) -> io::Result<()> {
    // SAFETY: only numbers.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, tid, priority) })
}

/// include/uapi/linux/ioprio.h
const IOPRIO_WHO_PROCESS: libc::c_int = 1;

fn check(r: libc::c_long) -> io::Result<()> {
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
/// Gives the calling thread this nice value: setpriority(2), from -20 (first) to 19. To go down needs CAP_SYS_NICE.
pub fn set_own_nice(nice: i32) -> io::Result<()> {
    // SAFETY: plain numbers.
    let ret = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
