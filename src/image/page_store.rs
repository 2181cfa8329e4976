//! Pages into an image directory: `pagemap-PID.img` says which, `pages-N.img` holds them one
//! after the other.

use std::fs::File;
use std::num::NonZero;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use super::dir::{ImageDir, ImageWriter, create_new};
use super::format::{self, ImageFile, pages_name};
use super::pages::{PAGE_SIZE, PageReader, PageRun, PageSink, PagesOf, Written};
use super::records::mm::{PagemapEntry, PagemapHead, pe};
use super::{Error, Result};

/// What one thread carries at a time. Measured: it still fits the cache between being
/// read and being written; 128 KiB and 2 MiB are slower.
const CHUNK: u64 = 512 << 10;

/// Below this many bytes a second thread costs more than it saves.
const WORTH_A_THREAD: u64 = 2 << 20;

/// More threads than these wait for each other at the lock of the pages file.
const MAX_THREADS: usize = 4;

/// Puts pages into an image directory that is being written.
pub struct LocalPages<'a> {
    images: &'a ImageWriter,
    next_pages_id: u32,
}

impl<'a> LocalPages<'a> {
    pub fn new(images: &'a ImageWriter) -> Self {
        Self { images, next_pages_id: 1 }
    }
}

impl PageSink for LocalPages<'_> {
    fn has_parent(&mut self, of: PagesOf) -> Result<bool> {
        has_pagemap(self.images.parent(), of)
    }

    fn write(&mut self, of: PagesOf, runs: &[PageRun], from: &dyn PageReader) -> Result<Written> {
        let layout = Layout::new(of, runs)?;
        let pages_id = self.next_pages_id;
        self.next_pages_id += 1;

        let (kind, id) = pagemap_of(of);
        let mut pagemap = self.images.records(kind, id)?;
        pagemap.record(&PagemapHead { pages_id })?;
        for run in runs {
            let flags = if run.in_parent { pe::PARENT } else { pe::PRESENT };
            pagemap.record(&pagemap_entry(run.vaddr, run.pages, flags))?;
        }
        pagemap.finish()?;

        let path = self.images.path().join(pages_name(pages_id));
        let file = create_new(&path).map_err(Error::io(&path))?;
        copy(&layout, from, &file, &path)?;
        Ok(layout.written())
    }

    /// Pages become durable with the rest of the directory.
    fn finish(&mut self) -> Result<()> {
        Ok(())
    }
}

/// The pagemap of `of`, as a kind of file and an id.
pub fn pagemap_of(of: PagesOf) -> (&'static ImageFile<PagemapEntry>, u64) {
    match of {
        PagesOf::Task(pid) => (&format::PAGEMAP, pid.into()),
        PagesOf::Shmem(id) => (&format::PAGEMAP_SHMEM, id),
    }
}

/// Whether there is an image `parent`, and it knows `of`.
pub fn has_pagemap(parent: Option<&ImageDir>, of: PagesOf) -> Result<bool> {
    let (kind, id) = pagemap_of(of);
    parent.map_or(Ok(false), |dir| dir.exists(kind, id))
}

/// A record as current CRIU writes it.
pub fn pagemap_entry(vaddr: u64, pages: u64, flags: u32) -> PagemapEntry {
    PagemapEntry {
        vaddr,
        compat_nr_pages: u32::try_from(pages).unwrap_or(u32::MAX),
        in_parent: None,
        flags: Some(flags),
        nr_pages: Some(pages),
    }
}

/// The runs of one target whose bytes are taken, and where each one's bytes come to lie when
/// they are put one after the other.
pub struct Layout {
    of: PagesOf,
    /// Address, offset of its first byte.
    starts: Vec<(u64, u64)>,
    bytes: u64,
    in_parent: u64,
}

impl Layout {
    /// # Errors
    /// [`Error::Runs`] where runs are empty, not aligned, not ascending or overlap.
    pub fn new(of: PagesOf, runs: &[PageRun]) -> Result<Self> {
        let mut layout = Self { of, starts: Vec::with_capacity(runs.len()), bytes: 0, in_parent: 0 };
        let mut free = 0;
        for run in runs {
            let end = run.pages.checked_mul(PAGE_SIZE).and_then(|bytes| run.vaddr.checked_add(bytes));
            free = end
                .filter(|_| run.pages > 0 && run.vaddr >= free && run.vaddr.is_multiple_of(PAGE_SIZE))
                .ok_or(Error::Runs { of, vaddr: run.vaddr })?;
            if run.in_parent {
                layout.in_parent += run.pages;
            } else {
                layout.starts.push((run.vaddr, layout.bytes));
                layout.bytes += run.pages * PAGE_SIZE;
            }
        }
        Ok(layout)
    }

    pub fn written(&self) -> Written {
        Written { pages: self.bytes / PAGE_SIZE, in_parent: self.in_parent }
    }

    /// Reads what lies at `offset` until `buf` is full.
    fn read(&self, offset: u64, buf: &mut [u8], from: &dyn PageReader) -> Result<()> {
        let mut at = self.starts.partition_point(|start| start.1 <= offset) - 1;
        let mut done = 0;
        while done < buf.len() {
            let (vaddr, start) = self.starts[at];
            let end = self.starts.get(at + 1).map_or(self.bytes, |next| next.1);
            let skip = offset + done as u64 - start;
            let len = (buf.len() - done).min((end - start - skip) as usize);
            let vaddr = vaddr + skip;
            from.read(vaddr, &mut buf[done..done + len]).map_err(|source| Error::Memory {
                of: self.of,
                vaddr,
                source,
            })?;
            done += len;
            at += 1;
        }
        Ok(())
    }
}

/// Copies all bytes of a layout to `file`. Several threads take one chunk after the other.
fn copy(layout: &Layout, from: &dyn PageReader, file: &File, path: &Path) -> Result<()> {
    let next = AtomicU64::new(0);
    let carry = || {
        let mut buf = vec![0; CHUNK.min(layout.bytes) as usize];
        loop {
            let offset = next.fetch_add(CHUNK, Ordering::Relaxed);
            if offset >= layout.bytes {
                return Ok(());
            }
            let chunk = &mut buf[..CHUNK.min(layout.bytes - offset) as usize];
            let done = layout
                .read(offset, chunk, from)
                .and_then(|()| file.write_all_at(chunk, offset).map_err(Error::io(path)));
            if done.is_err() {
                // Nothing is left for the others either.
                next.store(layout.bytes, Ordering::Relaxed);
                return done;
            }
        }
    };
    let cpus = thread::available_parallelism().map_or(1, NonZero::get);
    let threads = cpus.min(MAX_THREADS).min((layout.bytes / WORTH_A_THREAD) as usize + 1);
    thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(carry)).collect();
        let mine = carry();
        others.into_iter().map(|other| other.join().expect("carrying pages does not panic")).fold(mine, Result::and)
    })
}

#[cfg(test)]
#[path = "page_store_tests.rs"]
mod tests;
