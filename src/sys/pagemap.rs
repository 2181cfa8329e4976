//! The PAGEMAP_SCAN ioctl of `/proc/PID/pagemap` (include/uapi/linux/fs.h, since 6.7).
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::AsRawFd;

use libc::pid_t;

/// Page categories.
pub const WRITTEN: u64 = 1 << 1;
pub const FILE: u64 = 1 << 2;
pub const PRESENT: u64 = 1 << 3;
pub const SWAPPED: u64 = 1 << 4;
pub const PFNZERO: u64 = 1 << 5;
/// Since 6.15: a guard region (MADV_GUARD_INSTALL).
pub const GUARD: u64 = 1 << 8;

/// Write-protect what matches, so that the next write makes it `WRITTEN` again.
pub const WP_MATCHING: u64 = 1;
/// EPERM where the range is not registered with userfaultfd in write-protect mode with WP_ASYNC.
pub const CHECK_WPASYNC: u64 = 2;

const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;

/// `struct page_region`: [start, end) and the categories asked for that it has.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Region {
    pub start: u64,
    pub end: u64,
    pub categories: u64,
}

/// `struct pm_scan_arg`
#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}
const _: () = assert!(size_of::<ScanArg>() == 96);

/// Which pages a scan reports: those that have all of `all`, none of `none`, and one of `any` (0: no condition).
#[derive(Debug, Clone, Copy)]
pub struct Query {
    pub flags: u64,
    pub all: u64,
    pub none: u64,
    pub any: u64,
    /// Categories reported; regions that differ in them are not merged.
    pub report: u64,
}

/// The page tables of one task.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    /// [`GUARD`], where the kernel knows it.
    guard: u64,
}

impl Pagemap {
    /// Opens the page tables that `pid` has now.
    pub fn open(pid: pid_t) -> io::Result<Pagemap> {
        let file = File::open(format!("/proc/{pid}/pagemap"))?;
        let mut me = Pagemap { file, guard: GUARD };
        // A page that nobody can have mapped.
        let probe = Query { flags: 0, all: GUARD, none: 0, any: 0, report: GUARD };
        match me.scan(0, 4096, probe) {
            Ok(_) => {}
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => me.guard = 0,
            Err(e) => return Err(e),
        }
        Ok(me)
    }

    /// [`GUARD`], or nothing where the kernel does not show guard regions.
    pub fn guard(&self) -> u64 {
        self.guard
    }

    /// Scans [start, end) in ascending order.
    pub fn scan(&self, start: u64, end: u64, query: Query) -> io::Result<Vec<Region>> {
        let mut found = Vec::new();
        let mut buf = vec![Region::default(); 1024];
        let mut at = start;
        while at < end {
            let mut arg = ScanArg {
                size: size_of::<ScanArg>() as u64,
                flags: query.flags,
                start: at,
                end,
                vec: buf.as_mut_ptr() as u64,
                vec_len: buf.len() as u64,
                category_inverted: query.none,
                category_mask: query.all | query.none,
                category_anyof_mask: query.any,
                return_mask: query.report,
                ..ScanArg::default()
            };
            // SAFETY: `arg` names `buf` with its true length; both live across the call.
            let n = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN as _, &mut arg) };
            if n < 0 {
                return Err(io::Error::last_os_error());
            }
            let regions = &buf[..n as usize];
            found.extend_from_slice(regions);
            // `walk_end` may lie before the last region: after a walk that came through, it says where the
            // kernel last emptied a buffer of its own, which holds 512 regions (seen on 6.18).
            at = regions.last().map_or(end, |last| last.end.max(arg.walk_end));
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::num::NonZero;

    use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

    /// Numbers of regions below, at and above what one call and the kernel's own buffer hold.
    #[test]
    fn every_region_is_found_once_and_in_order() {
        const PAGE: usize = 4096;
        for regions in [1, 511, 512, 513, 1023, 1024, 1025, 1537, 2048, 2500] {
            let bytes = NonZero::new(regions * 2 * PAGE).unwrap();
            // SAFETY: a new mapping; only its own pages are written, and it is unmapped at the end.
            let (start, found) = unsafe {
                let map =
                    mmap_anonymous(None, bytes, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE)
                        .unwrap();
                libc::madvise(map.as_ptr(), bytes.get(), libc::MADV_NOHUGEPAGE);
                (0..regions).for_each(|i| map.cast::<u8>().byte_add(i * 2 * PAGE).write_volatile(1));
                let start = map.as_ptr() as u64;
                let query = Query { flags: 0, all: 0, none: FILE | PFNZERO, any: PRESENT | SWAPPED, report: 0 };
                let pid = std::process::id() as pid_t;
                let found = Pagemap::open(pid).unwrap().scan(start, start + bytes.get() as u64, query).unwrap();
                munmap(map, bytes.get()).unwrap();
                (start, found)
            };
            let region = |i: usize| {
                let start = start + (i * 2 * PAGE) as u64;
                Region { start, end: start + PAGE as u64, categories: 0 }
            };
            assert!(found == (0..regions).map(region).collect::<Vec<_>>(), "{regions} regions: {}", found.len());
        }
    }
}
