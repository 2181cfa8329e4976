//! A part of a file, mapped for reading.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::fd::AsRawFd;

/// [offset, offset + len) of a file. Mapped whole at once, and gone from our own resident set when dropped.
#[derive(Debug)]
pub struct Window {
    at: *mut libc::c_void,
    len: usize,
}

impl Window {
    /// Maps a part of `file`, which must be that long; `offset` is a multiple of the page size, `len` is not 0.
    pub fn map(file: &File, offset: u64, len: usize) -> io::Result<Window> {
        // SAFETY: a new mapping at a place of the kernel's choice; it aliases nothing of ours.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ,
                libc::MAP_SHARED | libc::MAP_POPULATE,
                file.as_raw_fd(),
                offset as i64,
            )
        };
        if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(Window { at, len }) }
    }
}

impl Deref for Window {
    type Target = [u8];

    /// The bytes. If somebody cuts the file short meanwhile, reading them is SIGBUS: image files have one
    /// writer, which is done.
    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping is `len` bytes long and lives as long as `self`.
        unsafe { std::slice::from_raw_parts(self.at.cast(), self.len) }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and nobody can have a reference into it any more.
        unsafe { libc::munmap(self.at, self.len) };
    }
}

/// What a process does to a file that it has mapped.
#[cfg(test)]
impl Window {
    pub(crate) fn map_writable(file: &File, len: usize) -> Window {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: as in `map`.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        assert_ne!(at, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        Window { at, len }
    }

    pub(crate) fn store(&self, at: usize, byte: u8) {
        assert!(at < self.len);
        // SAFETY: inside of the mapping, which is writable.
        unsafe { self.at.cast::<u8>().add(at).write_volatile(byte) };
    }
}
