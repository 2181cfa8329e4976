//! System V shared memory.

use crate::kernel::sys;
use crate::memory_map::PAGE;
use crate::stage::{Check, Fallible, Setup, Stage, same};

pub const WORKLOADS: &[(&str, Setup)] = &[("sysv-shm", shared), ("sysv-removed", removed), ("sysv-idle", idle)];

const KEY: i32 = 0x1234;
const SIZE: usize = 3 * PAGE - 100;

fn segment(key: i32) -> Fallible<i32> {
    Ok(sys!(shmget(key, SIZE, 0o640 | libc::IPC_CREAT | libc::IPC_EXCL))? as i32)
}

fn attach(id: i32, flags: i32) -> Fallible<*mut u8> {
    Ok(sys!(shmat(id, std::ptr::null(), flags))? as *mut u8)
}

fn stat(id: i32) -> Fallible<libc::shmid_ds> {
    let mut ds: libc::shmid_ds = unsafe { std::mem::zeroed() };
    sys!(shmctl(id, libc::IPC_STAT, &raw mut ds))?;
    Ok(ds)
}

/// Attached twice, once to be read alone; found by its key, with its owner and mode.
fn shared(_: &mut Stage) -> Fallible<Check> {
    let id = segment(KEY)?;
    let mut ds = stat(id)?;
    (ds.shm_perm.uid, ds.shm_perm.mode) = (1000, 0o604);
    sys!(shmctl(id, libc::IPC_SET, &raw mut ds))?;
    let (writer, reader) = (attach(id, 0)? as usize, attach(id, libc::SHM_RDONLY)? as usize);
    let mut n = 1u8;
    unsafe { (writer as *mut u8).add(2 * PAGE).write_volatile(n) };
    Ok(Box::new(move || {
        same("id by key", id, sys!(shmget(KEY, 0, 0))? as i32)?;
        let ds = stat(id)?;
        same("owner", 1000, ds.shm_perm.uid)?;
        same("mode", 0o604, ds.shm_perm.mode & 0o777)?;
        same("size", SIZE, ds.shm_segsz)?;
        same("attached", 2, ds.shm_nattch as i32)?;
        same("content", n, unsafe { (reader as *const u8).add(2 * PAGE).read_volatile() })?;
        n += 1;
        unsafe { (writer as *mut u8).add(2 * PAGE).write_volatile(n) };
        same("what was just written", n, unsafe { (reader as *const u8).add(2 * PAGE).read_volatile() })
    }))
}

/// Removed while attached: it lives on until it is detached.
fn removed(_: &mut Stage) -> Fallible<Check> {
    let id = segment(libc::IPC_PRIVATE)?;
    let at = attach(id, 0)? as usize;
    sys!(shmctl(id, libc::IPC_RMID, std::ptr::null_mut()))?;
    unsafe { (at as *mut u8).write_volatile(7) };
    Ok(Box::new(move || {
        const SHM_DEST: u32 = 0o1000;
        same("content", 7, unsafe { (at as *const u8).read_volatile() })?;
        same("marked as removed", SHM_DEST, u32::from(stat(id)?.shm_perm.mode) & SHM_DEST)
    }))
}

/// Attached by nobody.
fn idle(_: &mut Stage) -> Fallible<Check> {
    let id = segment(KEY)?;
    let at = attach(id, 0)?;
    unsafe { at.add(PAGE).write_volatile(9) };
    sys!(shmdt(at.cast()))?;
    Ok(Box::new(move || {
        let at = attach(sys!(shmget(KEY, SIZE, 0))? as i32, 0)?;
        same("content", 9, unsafe { at.add(PAGE).read_volatile() })?;
        sys!(shmdt(at.cast()))?;
        same("attached", 0, stat(id)?.shm_nattch as i32)
    }))
}
