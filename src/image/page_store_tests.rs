use std::fs;
use std::io;
use std::path::PathBuf;

use super::super::page_source::{Extent, page_extents};
use super::super::scratch::Scratch;
use super::*;

const TASK: PagesOf = PagesOf::Task(1);

/// Memory in which every page is filled with its number, plus the number of the generation.
struct Pattern(u64);

impl Pattern {
    fn page(&self, vaddr: u64) -> Vec<u8> {
        ((vaddr / PAGE_SIZE) << 8 | self.0).to_le_bytes().repeat(PAGE_SIZE as usize / 8)
    }
}

impl PageReader for Pattern {
    fn read(&self, vaddr: u64, buf: &mut [u8]) -> io::Result<()> {
        for (i, page) in buf.chunks_mut(PAGE_SIZE as usize).enumerate() {
            page.copy_from_slice(&self.page(vaddr + i as u64 * PAGE_SIZE));
        }
        Ok(())
    }
}

/// Run of `pages` pages from page number `first` on.
fn run(first: u64, pages: u64, in_parent: bool) -> PageRun {
    PageRun { vaddr: first * PAGE_SIZE, pages, in_parent }
}

fn image(scratch: &Scratch, generation: u64, runs: &[PageRun]) -> PathBuf {
    let path = scratch.path().join(generation.to_string());
    let link = format!("../{}", generation.wrapping_sub(1));
    let writer = ImageWriter::create(&path, (generation > 0).then_some(Path::new(&link))).unwrap();
    let mut sink = LocalPages::new(&writer);
    assert_eq!(sink.has_parent(TASK).unwrap(), generation > 0);
    assert!(!sink.has_parent(PagesOf::Shmem(1)).unwrap());
    let written = sink.write(TASK, runs, &Pattern(generation)).unwrap();
    let count = |parent| runs.iter().filter(|r| r.in_parent == parent).map(|r| r.pages).sum::<u64>();
    assert_eq!(written, Written { pages: count(false), in_parent: count(true) });
    sink.finish().unwrap();
    writer.commit().unwrap();
    path
}

fn extents(path: &Path) -> Result<Vec<Extent>> {
    page_extents(&ImageDir::open(path).unwrap(), TASK)
}

/// Page number, number of pages and generation of every extent; checks all bytes.
fn summary(path: &Path) -> Vec<(u64, u64, u64)> {
    let check = |extent: &Extent| {
        let mut bytes = vec![0; (extent.pages * PAGE_SIZE) as usize];
        extent.file.read_exact_at(&mut bytes, extent.offset).unwrap();
        let pattern = Pattern(bytes[0].into());
        let mut expected = vec![0; bytes.len()];
        pattern.read(extent.vaddr, &mut expected).unwrap();
        assert!(bytes == expected, "{extent:?}");
        (extent.vaddr / PAGE_SIZE, extent.pages, pattern.0)
    };
    extents(path).unwrap().iter().map(check).collect()
}

#[test]
fn adjacent_runs_are_one_extent() {
    let tmp = Scratch::new();
    let path = image(&tmp, 0, &[run(1, 2, false), run(3, 1, false), run(5, 1, false)]);
    assert_eq!(summary(&path), [(1, 3, 0), (5, 1, 0)]);
    assert_eq!(fs::metadata(path.join("pages-1.img")).unwrap().len(), 4 * PAGE_SIZE);
}

#[test]
fn several_threads_put_every_page_in_its_place() {
    let tmp = Scratch::new();
    // Single pages, then 40 MiB and a bit.
    let mut runs: Vec<_> = (0..1000).map(|i| run(2 * i, 1, false)).collect();
    runs.push(run(5000, 10_007, false));
    let path = image(&tmp, 0, &runs);
    assert_eq!(summary(&path).len(), 1001);
    assert_eq!(summary(&path)[1000], (5000, 10_007, 0));
}

#[test]
fn pages_come_from_the_generation_that_has_them() {
    let tmp = Scratch::new();
    image(&tmp, 0, &[run(0, 10, false), run(20, 10, false)]);
    image(&tmp, 1, &[run(0, 2, true), run(2, 2, false), run(4, 6, true), run(22, 5, true)]);
    let path =
        image(&tmp, 2, &[run(1, 6, true), run(8, 1, false), run(22, 1, true), run(23, 2, false), run(25, 2, true)]);
    assert_eq!(summary(&path), [(1, 1, 0), (2, 2, 1), (4, 3, 0), (8, 1, 2), (22, 1, 0), (23, 2, 2), (25, 2, 0)]);
}

#[test]
fn what_no_generation_has_is_named() {
    let tmp = Scratch::new();
    image(&tmp, 0, &[run(0, 4, false)]);
    let path = image(&tmp, 1, &[run(2, 4, true)]);
    match extents(&path).unwrap_err() {
        Error::NotInParent { path, of: TASK, vaddr } => {
            assert_eq!(vaddr, 4 * PAGE_SIZE);
            assert!(path.ends_with("parent/pagemap-1.img"));
        }
        other => panic!("{other}"),
    }
    fs::remove_file(path.join("parent")).unwrap();
    assert!(matches!(extents(&path), Err(Error::NotInParent { vaddr: 0x2000, .. })));
}

#[test]
fn runs_out_of_order_are_refused() {
    let tmp = Scratch::new();
    let writer = ImageWriter::create(&tmp.path().join("i"), None).unwrap();
    let unaligned = PageRun { vaddr: 5, pages: 1, in_parent: false };
    for runs in
        [&[run(4, 2, false), run(5, 1, false)][..], &[run(1, 0, false)], &[unaligned], &[run(1, u64::MAX, true)]]
    {
        let error = LocalPages::new(&writer).write(TASK, runs, &Pattern(0)).unwrap_err();
        assert!(matches!(error, Error::Runs { of: TASK, .. }));
    }
}

#[test]
fn memory_that_cannot_be_read_is_named() {
    struct Hole;
    impl PageReader for Hole {
        fn read(&self, vaddr: u64, buf: &mut [u8]) -> io::Result<()> {
            if vaddr + buf.len() as u64 > 1 << 30 { Err(io::Error::from_raw_os_error(libc::EFAULT)) } else { Ok(()) }
        }
    }
    let tmp = Scratch::new();
    let writer = ImageWriter::create(&tmp.path().join("i"), None).unwrap();
    let error = LocalPages::new(&writer).write(TASK, &[run(0, (1 << 18) + 9, false)], &Hole).unwrap_err();
    assert!(matches!(error, Error::Memory { of: TASK, vaddr: 0x4000_0000, .. }), "{error}");
}

/// A pagemap of these entries with a pages file of `pages` pages.
fn handmade(scratch: &Scratch, entries: &[PagemapEntry], pages: u64) -> Result<Vec<Extent>> {
    let path = scratch.path().join("handmade");
    let _ = fs::remove_dir_all(&path);
    let writer = ImageWriter::create(&path, None).unwrap();
    let mut pagemap = writer.records(&format::PAGEMAP, 1).unwrap();
    pagemap.record(&PagemapHead { pages_id: 9 }).unwrap();
    entries.iter().for_each(|entry| pagemap.record(entry).unwrap());
    pagemap.finish().unwrap();
    create_new(&writer.path().join("pages-9.img")).unwrap().set_len(pages * PAGE_SIZE).unwrap();
    writer.commit().unwrap();
    extents(&path)
}

#[test]
fn images_of_old_and_lazy_dumps_are_read() {
    let tmp = Scratch::new();
    let old = PagemapEntry { vaddr: 4096, compat_nr_pages: 3, ..Default::default() };
    let lazy = pagemap_entry(4 * 4096, 1, pe::PRESENT | pe::LAZY);
    let all = handmade(&tmp, &[old, lazy], 4).unwrap();
    assert_eq!((all.len(), all[0].pages), (1, 4));
    let inherited = PagemapEntry { in_parent: Some(true), ..old };
    assert!(matches!(handmade(&tmp, &[inherited], 0), Err(Error::NotInParent { .. })));
}

#[test]
fn pagemaps_are_not_believed() {
    let tmp = Scratch::new();
    let present = |first: u64, pages| pagemap_entry(first * 4096, pages, pe::PRESENT);
    let cases = [
        (vec![present(0, 5)], "goes beyond the end of the pages file"),
        (vec![present(1, 1), present(0, 2)], "overlaps another"),
        (vec![present(0, 0)], "is empty or not aligned"),
        (vec![pagemap_entry(1, 1, pe::PRESENT)], "is empty or not aligned"),
        (vec![present(0, u64::MAX)], "has too many pages"),
        (vec![present(u64::MAX >> 12, 1)], "ends past the last address"),
        (vec![pagemap_entry(0, 1, 8)], "has flags that this version does not know"),
        (
            vec![pagemap_entry(0, 1, pe::LAZY)],
            "has its pages in neither this image nor its parent (left for lazy migration?)",
        ),
    ];
    for (entries, expected) in cases {
        match handmade(&tmp, &entries, 4) {
            Err(Error::Pagemap { what, .. }) => assert_eq!(what, expected),
            other => panic!("{expected}: {other:?}"),
        }
    }
}

/// Any generations of any runs, against a plain map from page to generation.
#[test]
fn chains_of_parents_agree_with_a_model() {
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut next = |limit: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % limit
    };
    for _ in 0..20 {
        let tmp = Scratch::new();
        let mut model = std::collections::BTreeMap::new();
        for generation in 0..5 {
            let (mut at, mut runs, mut now) = (0, Vec::new(), std::collections::BTreeMap::new());
            while at < 60 {
                let pages = 1 + next(6);
                let known = |page: &u64| model.contains_key(page);
                match next(3) {
                    0 => {}
                    1 if (at..at + pages).all(|page| known(&page)) => {
                        runs.push(run(at, pages, true));
                        now.extend((at..at + pages).map(|page| (page, model[&page])));
                    }
                    _ => {
                        runs.push(run(at, pages, false));
                        now.extend((at..at + pages).map(|page| (page, generation)));
                    }
                }
                at += pages;
            }
            model = now;
            let found = summary(&image(&tmp, generation, &runs));
            let pages = found.iter().flat_map(|&(first, n, from)| (first..first + n).map(move |page| (page, from)));
            assert_eq!(pages.collect::<std::collections::BTreeMap<_, _>>(), model);
        }
    }
}
