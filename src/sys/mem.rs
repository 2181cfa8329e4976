//! Another task's memory: `/proc/PID/mem` and process_vm_writev(2).
//!
//! Not process_vm_readv(2): it pins the pages it reads, and a page that parent and child share by copy on write is
//! copied before it is pinned (gup_must_unshare in mm/gup.c, since 5.19). To read a pre-forked server that way would
//! take from it what its workers share. `/proc/PID/mem` only looks, at about the same speed.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use libc::pid_t;

/// Reads and writes the memory of one task. `mem` reaches what the task itself cannot: PROT_NONE
/// mappings, and writes to read-only private ones (FOLL_FORCE, for the tracer).
#[derive(Debug)]
pub struct Memory {
    pid: pid_t,
    mem: File,
}

impl Memory {
    /// Opens the memory that `pid` has *now*: after its next execve(2) the value refers to the old one.
    pub fn open(pid: pid_t) -> io::Result<Memory> {
        let mem = File::options().read(true).write(true).open(format!("/proc/{pid}/mem"))?;
        Ok(Memory { pid, mem })
    }

    /// Fills `buf` from `addr`.
    pub fn read(&self, addr: u64, buf: &mut [u8]) -> io::Result<()> {
        self.mem.read_exact_at(buf, addr)
    }

    /// Reads a plain value.
    pub fn read_vec(&self, addr: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut v = vec![0; len];
        self.read(addr, &mut v)?;
        Ok(v)
    }

    pub fn read_u64(&self, addr: u64) -> io::Result<u64> {
        let mut b = [0; 8];
        self.read(addr, &mut b)?;
        Ok(u64::from_ne_bytes(b))
    }

    /// Writes where the task itself may write.
    pub fn write(&self, addr: u64, buf: &[u8]) -> io::Result<()> {
        let local = libc::iovec { iov_base: buf.as_ptr().cast_mut().cast(), iov_len: buf.len() };
        let remote = libc::iovec { iov_base: addr as *mut _, iov_len: buf.len() };
        // SAFETY: `local` describes `buf`, which the call only reads; `remote` is checked by the kernel.
        let n = unsafe { libc::process_vm_writev(self.pid, &local, 1, &remote, 1, 0) };
        if n == buf.len() as isize { Ok(()) } else { self.force_write(addr, buf) }
    }

    /// Writes whatever the protection is. A page of a private mapping is copied first, as by a write of the task.
    pub fn force_write(&self, addr: u64, buf: &[u8]) -> io::Result<()> {
        self.mem.write_all_at(buf, addr)
    }
}
