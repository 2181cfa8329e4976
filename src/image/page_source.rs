//! Pages out of image directories: where the bytes of each page are, through any number of
//! generations of parent images.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use super::dir::ImageDir;
use super::format::pages_name;
use super::page_store::pagemap_of;
use super::pages::{PAGE_SIZE, PagesOf};
use super::records::mm::{PagemapEntry, PagemapHead, pe};
use super::{Error, Result};

/// Consecutive pages whose bytes lie one after the other in one file.
#[derive(Clone, Debug)]
pub struct Extent {
    /// Address of the first page; for shared memory its offset.
    pub vaddr: u64,
    pub pages: u64,
    /// A pages file.
    pub file: Arc<File>,
    /// Offset of the first page's bytes.
    pub offset: u64,
}

impl Extent {
    /// Address after the last page.
    pub fn end(&self) -> u64 {
        self.vaddr + self.pages * PAGE_SIZE
    }
}

/// Finds the bytes of all pages of `of`: extents in ascending order, as long as can be.
///
/// # Errors
/// Pagemaps that contradict themselves or the size of their pages file, flags that are not
/// known, and pages that are said to be in the parent and are not.
pub fn page_extents(images: &ImageDir, of: PagesOf) -> Result<Vec<Extent>> {
    let (kind, id) = pagemap_of(of);
    let mut extents: Vec<Extent> = Vec::new();
    let layer = Layer::read(images, of)?;
    let all: Vec<_> = layer.runs.iter().map(|run| (run.vaddr, run.end())).collect();
    let mut wanted = layer.satisfy(&all, &mut extents)?;
    let mut child: Option<ImageDir> = None;
    while let Some(&(vaddr, _)) = wanted.first() {
        let dir = child.as_ref().unwrap_or(images);
        let missing = || Error::NotInParent { path: dir.path().join(kind.name(id)), of, vaddr };
        let parent = dir.parent()?.ok_or_else(missing)?;
        if !parent.exists(kind, id)? {
            return Err(missing());
        }
        wanted = Layer::read(&parent, of)?.satisfy(&wanted, &mut extents)?;
        child = Some(parent);
    }
    extents.sort_unstable_by_key(|extent| extent.vaddr);
    extents.dedup_by(|next, extent| {
        let continues = extent.end() == next.vaddr
            && extent.offset + extent.pages * PAGE_SIZE == next.offset
            && Arc::ptr_eq(&extent.file, &next.file);
        if continues {
            extent.pages += next.pages;
        }
        continues
    });
    Ok(extents)
}

/// One directory's pagemap.
struct Layer {
    path: PathBuf,
    of: PagesOf,
    file: Arc<File>,
    /// Ascending, without overlap.
    runs: Vec<Run>,
}

/// A run of a pagemap.
struct Run {
    vaddr: u64,
    pages: u64,
    /// Where its bytes are in the pages file, unless they are the parent's.
    offset: Option<u64>,
}

impl Run {
    fn end(&self) -> u64 {
        self.vaddr + self.pages * PAGE_SIZE
    }
}

impl Layer {
    fn read(images: &ImageDir, of: PagesOf) -> Result<Self> {
        let (kind, id) = pagemap_of(of);
        let mut records = images.records(kind, id)?;
        let path = records.path().to_owned();
        let bad = |vaddr, what| Error::Pagemap { path: path.clone(), vaddr, what };
        let head: PagemapHead = records.record()?.ok_or_else(|| bad(0, "has no head"))?;
        let name = pages_name(head.pages_id);
        let file = images.file(&name)?;
        let size = file.metadata().map_err(Error::io(&images.path().join(&name)))?.len();

        let mut runs: Vec<Run> = Vec::new();
        let mut offset = 0u64;
        while let Some(entry) = records.record::<PagemapEntry>()? {
            let vaddr = entry.vaddr;
            let pages = entry.nr_pages.unwrap_or(entry.compat_nr_pages.into());
            let bytes = pages.checked_mul(PAGE_SIZE).ok_or_else(|| bad(vaddr, "has too many pages"))?;
            if vaddr.checked_add(bytes).is_none() {
                return Err(bad(vaddr, "ends past the last address"));
            }
            if pages == 0 || !vaddr.is_multiple_of(PAGE_SIZE) {
                return Err(bad(vaddr, "is empty or not aligned"));
            }
            let present = is_present(&entry).map_err(|what| bad(vaddr, what))?;
            runs.push(Run { vaddr, pages, offset: present.then_some(offset) });
            if present {
                offset = offset
                    .checked_add(bytes)
                    .filter(|end| *end <= size)
                    .ok_or_else(|| bad(vaddr, "goes beyond the end of the pages file"))?;
            }
        }
        // Bytes lie in the order of the records, which need not be that of the addresses.
        runs.sort_by_key(|run| run.vaddr);
        if let Some(pair) = runs.windows(2).find(|pair| pair[0].end() > pair[1].vaddr) {
            return Err(bad(pair[1].vaddr, "overlaps another"));
        }
        Ok(Self { path, of, file: Arc::new(file), runs })
    }

    /// Takes from this layer what is wanted; returns what its parent has to have.
    fn satisfy(&self, wanted: &[(u64, u64)], extents: &mut Vec<Extent>) -> Result<Vec<(u64, u64)>> {
        let mut inherited = Vec::new();
        for &(start, end) in wanted {
            let mut at = start;
            let first = self.runs.partition_point(|run| run.end() <= start);
            for run in &self.runs[first..] {
                if run.vaddr > at || at == end {
                    break;
                }
                let until = run.end().min(end);
                match run.offset {
                    Some(offset) => extents.push(Extent {
                        vaddr: at,
                        pages: (until - at) / PAGE_SIZE,
                        file: self.file.clone(),
                        offset: offset + (at - run.vaddr),
                    }),
                    None => inherited.push((at, until)),
                }
                at = until;
            }
            if at < end {
                return Err(Error::NotInParent { path: self.path.clone(), of: self.of, vaddr: at });
            }
        }
        Ok(inherited)
    }
}

/// Whether the bytes of a run are in this image (or in its parent).
fn is_present(entry: &PagemapEntry) -> std::result::Result<bool, &'static str> {
    match entry.flags.map(|flags| (flags & !pe::ALL, flags & (pe::PARENT | pe::PRESENT))) {
        // Before there were flags.
        None => Ok(!entry.in_parent.unwrap_or(false)),
        Some((0, pe::PARENT)) => Ok(false),
        Some((0, pe::PRESENT)) => Ok(true),
        Some((0, 0)) => Err("has its pages in neither this image nor its parent (left for lazy migration?)"),
        Some((0, _)) => Err("has its pages in this image and its parent"),
        Some(_) => Err("has flags that this version does not know"),
    }
}
