//! Putting pages where they belong, from the image files, without a second copy in our own memory.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::{Error, Result};
use crate::image::page_source::Extent;
use crate::image::pages::PAGE_SIZE;
use crate::sys::mem::Memory;
use crate::sys::uffd::Uffd;
use crate::sys::window::Window;

/// Bytes that one thread maps of an image at a time.
const CHUNK: u64 = 4 << 20;

/// How the pages of one extent get into the task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Anonymous memory that has no pages yet.
    Missing,
    /// Whatever is there, by a forced write.
    Over,
    /// As `Over`, but only where the content differs: the rest stays shared with the parent.
    Differing,
}

/// A piece of work: pages of an image and where they go.
#[derive(Debug, Clone)]
pub struct Piece {
    pub extent: Extent,
    pub way: Way,
}

/// Cuts an extent to [start, end); None: they do not overlap.
pub fn cut(e: &Extent, start: u64, end: u64) -> Option<Extent> {
    let (from, to) = (e.vaddr.max(start), e.end().min(end));
    (from < to).then(|| Extent {
        vaddr: from,
        pages: (to - from) / PAGE_SIZE,
        file: e.file.clone(),
        offset: e.offset + (from - e.vaddr),
    })
}

/// Pieces of at most [`CHUNK`] bytes.
fn chunks(pieces: &[Piece]) -> Vec<Piece> {
    let split = |p: &Piece| {
        let (p, end) = (p.clone(), p.extent.end());
        (p.extent.vaddr..end)
            .step_by(CHUNK as usize)
            .filter_map(move |at| Some(Piece { extent: cut(&p.extent, at, (at + CHUNK).min(end))?, way: p.way }))
    };
    pieces.iter().flat_map(split).collect()
}

/// Does all pieces, on as many threads as there are processors. `uffd` is needed for [`Way::Missing`].
/// Returns the number of pages written.
pub fn fill(pieces: &[Piece], memory: &Memory, uffd: Option<&Uffd>) -> Result<u64> {
    let work = chunks(pieces);
    let next = AtomicUsize::new(0);
    let written = AtomicUsize::new(0);
    let failed: Mutex<Option<Error>> = Mutex::new(None);
    let run = || {
        while let Some(piece) = work.get(next.fetch_add(1, Ordering::Relaxed)) {
            match put(piece, memory, uffd) {
                Ok(pages) => drop(written.fetch_add(pages, Ordering::Relaxed)),
                Err(source) => {
                    let what = format!("put {} pages at {:#x}", piece.extent.pages, piece.extent.vaddr);
                    *failed.lock().unwrap_or_else(|e| e.into_inner()) = Some(Error::System { what, source });
                    next.store(work.len(), Ordering::Relaxed);
                }
            }
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(work.len());
    std::thread::scope(|s| {
        for _ in 1..threads {
            s.spawn(run);
        }
        run();
    });
    match failed.into_inner().unwrap_or_else(|e| e.into_inner()) {
        Some(e) => Err(e),
        None => Ok(written.into_inner() as u64),
    }
}

fn put(piece: &Piece, memory: &Memory, uffd: Option<&Uffd>) -> io::Result<usize> {
    let e = &piece.extent;
    let bytes = Window::map(&e.file, e.offset, (e.pages * PAGE_SIZE) as usize)?;
    match (piece.way, uffd) {
        (Way::Missing, Some(uffd)) => uffd.copy(e.vaddr, &bytes)?,
        (Way::Missing | Way::Over, _) => memory.force_write(e.vaddr, &bytes)?,
        (Way::Differing, _) => return put_differing(e.vaddr, &bytes, memory),
    }
    Ok(e.pages as usize)
}

pub fn put_differing(vaddr: u64, bytes: &[u8], memory: &Memory) -> io::Result<usize> {
    let mut there = vec![0; bytes.len()];
    memory.read(vaddr, &mut there)?;
    let mut written = 0;
    let pages = bytes.chunks_exact(PAGE_SIZE as usize).zip(there.chunks_exact(PAGE_SIZE as usize));
    for (i, (new, _)) in pages.enumerate().filter(|(_, (new, old))| new != old) {
        memory.force_write(vaddr + i as u64 * PAGE_SIZE, new)?;
        written += 1;
    }
    Ok(written)
}

/// Writes the content of a shared memory object.
pub fn fill_object(extents: &[Extent], object: &File) -> io::Result<u64> {
    let mut pages = 0;
    for e in extents {
        for at in (e.vaddr..e.end()).step_by(CHUNK as usize) {
            let Some(part) = cut(e, at, at + CHUNK) else { continue };
            let bytes = Window::map(&part.file, part.offset, (part.pages * PAGE_SIZE) as usize)?;
            object.write_all_at(&bytes, part.vaddr)?;
            pages += part.pages;
        }
    }
    Ok(pages)
}
