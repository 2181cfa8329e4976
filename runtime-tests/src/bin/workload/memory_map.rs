//! A mapping with a pattern in it.

use crate::kernel::{noise, sys};
use crate::stage::Fallible;

pub const PAGE: usize = 4096;

#[derive(Clone, Copy)]
pub struct Map {
    pub addr: usize,
    pub len: usize,
}

impl Map {
    pub fn new(len: usize, prot: i32, flags: i32) -> Fallible<Map> {
        Map::of_file(len, prot, flags | libc::MAP_ANONYMOUS, -1, 0)
    }

    /// Private anonymous memory, readable and writable.
    pub fn private(len: usize) -> Fallible<Map> {
        Map::new(len, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE)
    }

    /// Shared anonymous memory, readable and writable.
    pub fn shared(len: usize) -> Fallible<Map> {
        Map::new(len, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED)
    }

    pub fn of_file(len: usize, prot: i32, flags: i32, fd: i32, offset: i64) -> Fallible<Map> {
        let addr = sys!(mmap(std::ptr::null_mut(), len, prot, flags, fd, offset))? as usize;
        Ok(Map { addr, len })
    }

    pub fn part(self, first_page: usize, pages: usize) -> Map {
        Map { addr: self.addr + first_page * PAGE, len: pages * PAGE }
    }

    pub fn pages(self) -> usize {
        self.len / PAGE
    }

    pub fn bytes(&self) -> &[u8] {
        unsafe { std::slice::from_raw_parts(self.addr as *const u8, self.len) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        unsafe { std::slice::from_raw_parts_mut(self.addr as *mut u8, self.len) }
    }

    /// Page `n` of the mapping gets the noise of `seed + n`.
    pub fn fill(mut self, seed: u64) {
        for (n, page) in self.bytes_mut().chunks_mut(PAGE).enumerate() {
            page.copy_from_slice(&noise(seed + n as u64, page.len()));
        }
    }

    /// Whether the pattern of `fill(seed)` is still there.
    pub fn holds(self, what: &str, seed: u64) -> Fallible {
        for (n, page) in self.bytes().chunks(PAGE).enumerate() {
            let expected = noise(seed + n as u64, page.len());
            if page != expected {
                let at = page.iter().zip(&expected).position(|(a, b)| a != b).unwrap_or(0);
                return Err(format!(
                    "{what}: page {n}, byte {at}: expected {:#x}, got {:#x}{}",
                    expected[at],
                    page[at],
                    if page.iter().all(|b| *b == 0) { " (page is all zeros)" } else { "" }
                ));
            }
        }
        Ok(())
    }

    pub fn is_zero(self, what: &str) -> Fallible {
        match self.bytes().iter().position(|b| *b != 0) {
            Some(at) => Err(format!("{what}: byte {at} is {:#x}, not zero", self.bytes()[at])),
            None => Ok(()),
        }
    }

    pub fn protect(self, prot: i32) -> Fallible {
        sys!(mprotect(self.addr as *mut _, self.len, prot)).map(drop)
    }

    pub fn advise(self, advice: i32) -> Fallible {
        sys!(madvise(self.addr as *mut _, self.len, advice)).map(drop)
    }

    /// A word of the mapping, as other processes and threads may change it.
    pub fn word(&self, index: usize) -> &std::sync::atomic::AtomicU64 {
        assert!(index * 8 < self.len);
        unsafe { &*((self.addr + index * 8) as *const std::sync::atomic::AtomicU64) }
    }

    /// Which pages are populated, by the present and swapped bits of `/proc/self/pagemap`.
    pub fn populated(self) -> Fallible<Vec<bool>> {
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::open("/proc/self/pagemap").map_err(|e| e.to_string())?;
        let mut raw = vec![0u8; self.pages() * 8];
        file.read_exact_at(&mut raw, (self.addr / PAGE * 8) as u64).map_err(|e| format!("pagemap: {e}"))?;
        Ok(raw.chunks(8).map(|entry| entry[7] & 0b1100_0000 != 0).collect())
    }

    /// Whether the kernel can read each page on the process's behalf, which a guard page forbids.
    pub fn readable(self) -> Fallible<Vec<bool>> {
        let mut out = [0u8; 1];
        Ok((0..self.pages())
            .map(|n| {
                let local = libc::iovec { iov_base: out.as_mut_ptr().cast(), iov_len: 1 };
                let remote = libc::iovec { iov_base: (self.addr + n * PAGE) as *mut _, iov_len: 1 };
                unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) == 1 }
            })
            .collect())
    }
}
