//! The address space of a puppet: unmap what it is not to have, map what it is, fill it.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};

use super::{Built, Site};
use crate::engine::collect::Remote;
use crate::engine::fill::{self, Piece, Way, cut};
use crate::engine::plan::is_file_mapping;
use crate::engine::res::mm::{self, Content};
use crate::engine::res::sysv;
use crate::engine::res::task::thread;
use crate::engine::tree::Alive;
use crate::engine::{Error, Result};
use crate::image::page_source::Extent;
use crate::image::pages::{PAGE_SIZE, PagesOf, Span};
use crate::image::records::mm::{MmEntry, VmaEntry, vma_status};
use crate::sys::pidfd::PidFd;
use crate::sys::uffd::{self, Uffd};
use crate::sys::{file, proc};
use crate::tracee::batch::Batch;

/// End of the address space that mappings without a hint can be in (47 bits, less a guard page).
const SPACE_END: u64 = 0x7fff_ffff_f000;
/// arch_prctl(2), since 4.8: maps vvar and vdso at an address.
const ARCH_MAP_VDSO_64: u64 = 0x2003;
/// Less than this is written as fast as it is filled.
const WORTH_A_UFFD: u64 = 64;

/// Makes the address space of process `of` in `built`. `from` is the address space that it was made with: that of
/// the process which made it, None for the first puppet.
pub fn shape(site: &mut Site, built: &mut Built, of: u32, alive: &Alive, from: Option<&MmEntry>) -> Result<()> {
    let kept = kept(&alive.mm, from);
    let spans: Vec<Span> = kept.iter().map(|v| Span::between(v.start, v.end)).collect();
    unmap(site, built, &alive.mm, from, &spans)?;
    let is_kept = |v: &&VmaEntry| spans.iter().any(|k| k.vaddr == v.start);
    let pieces: Vec<VmaEntry> = alive.mm.vmas.iter().filter(|v| !is_kept(v)).cloned().collect();
    let protections: Vec<(Span, u32)> = kept.iter().map(|v| (Span::between(v.start, v.end), v.prot)).collect();
    map(site, built, alive, &pieces, &protections)?;
    check_vdso(built, &alive.mm)?;
    built.inherited = spans;
    if site.plan.pages.is_none() {
        return Ok(());
    }
    let extents = site.plan.extents(PagesOf::Task(of)).to_vec();
    let inherited = from.map(|_| &kept[..]).unwrap_or(&[]);
    site.report.pages += fill_private(built, &alive.mm, &extents, inherited)?;
    drop_holes(built, &extents, inherited)
}

/// Makes the address space of a process that has one of mine what it is by now; `was` is what it has. `same` tells
/// whether two mappings that overlap show the same there. Gives what of it is still the same.
pub fn reshape(
    site: &mut Site,
    built: &mut Built,
    alive: &Alive,
    was: &MmEntry,
    same: &dyn Fn(&VmaEntry, &VmaEntry) -> bool,
) -> Result<Vec<Span>> {
    let (mut kept, mut pieces, mut protections) = (Vec::new(), Vec::new(), Vec::new());
    for v in alive.mm.vmas.iter().filter(|v| mm::content(v) != Content::Special) {
        let mut at = v.start;
        let piece = |start: u64, end: u64| {
            let pgoff = if is_anonymous(v) { v.pgoff } else { v.pgoff + (start - v.start) };
            VmaEntry { start, end, pgoff, ..v.clone() }
        };
        for old in was.vmas.iter().filter(|old| old.start < v.end && v.start < old.end && same(old, v)) {
            let span = Span::between(v.start.max(old.start), v.end.min(old.end));
            if at < span.vaddr {
                pieces.push(piece(at, span.vaddr));
            }
            at = span.end();
            if old.prot != v.prot {
                protections.push((span, v.prot));
            }
            kept.push(span);
        }
        if at < v.end {
            pieces.push(piece(at, v.end));
        }
    }
    unmap(site, built, &alive.mm, Some(was), &kept)?;
    map(site, built, alive, &pieces, &protections)?;
    check_vdso(built, &alive.mm)?;
    Ok(kept)
}

/// Whether a mapping has no file and no object that it shows a part of.
fn is_anonymous(v: &VmaEntry) -> bool {
    v.status & vma_status::ANON_PRIVATE != 0
}

/// The mappings that are the same as in the space it comes from: private, of the same file at the same place.
fn kept<'a>(mm: &'a MmEntry, from: Option<&MmEntry>) -> Vec<&'a VmaEntry> {
    let same = |a: &VmaEntry, b: &VmaEntry| {
        let shift = a.start.wrapping_sub(b.start);
        let offset = !is_file_mapping(a) || a.pgoff == b.pgoff.wrapping_add(shift);
        b.start <= a.start && a.end <= b.end && offset && (a.flags, a.shmid) == (b.flags, b.shmid)
    };
    let parents = from.map_or(&[][..], |m| &m.vmas[..]);
    mm.vmas
        .iter()
        .filter(|v| {
            mm::content(v) == Content::Private
                && parents.iter().any(|p| mm::content(p) == Content::Private && same(v, p))
        })
        .collect()
}

fn special_start(mm: &MmEntry) -> Option<u64> {
    mm.vmas.iter().filter(|v| mm::content(v) == Content::Special).map(|v| v.start).min()
}

/// Unmaps everything but the stage, what is kept, and a vdso that is in its place already.
fn unmap(site: &Site, built: &mut Built, mm: &MmEntry, from: Option<&MmEntry>, kept: &[Span]) -> Result<()> {
    let stage = site.plan.stage;
    let mut islands = vec![(stage.start, stage.end())];
    islands.extend(kept.iter().map(|v| (v.vaddr, v.end())));
    if from.is_some_and(|f| special_start(f) == special_start(mm)) {
        islands.extend(mm.vmas.iter().filter(|v| mm::content(v) == Content::Special).map(|v| (v.start, v.end)));
    }
    islands.sort_unstable();
    let mut calls = Vec::new();
    let mut at = 0;
    for (start, end) in islands.into_iter().chain([(SPACE_END, SPACE_END)]) {
        if at < start {
            calls.push(("munmap", libc::SYS_munmap, [at, start - at, 0]));
        }
        at = at.max(end);
    }
    if from.is_none() {
        let mut b = built.main.batch();
        thread::forget_rseq(built.main.tid, &mut b)?;
        built.main.run(&built.memory, &mut b)?;
    }
    built.run_all(&calls)
}

/// Maps `pieces`, protects what is mapped already, and sets what else there is to an address space.
fn map(
    site: &mut Site,
    built: &mut Built,
    alive: &Alive,
    pieces: &[VmaEntry],
    protections: &[(Span, u32)],
) -> Result<()> {
    let mut wanted: Vec<u32> = pieces.iter().filter(|v| is_file_mapping(v)).map(|v| v.shmid as u32).collect();
    wanted.push(alive.mm.exe_file_id);
    wanted.sort_unstable();
    wanted.dedup();
    let mut shmem: Vec<u64> = pieces
        .iter()
        .filter_map(|v| match mm::content(v) {
            Content::Shmem(id) => Some(id),
            _ => None,
        })
        .collect();
    shmem.sort_unstable();
    shmem.dedup();
    for id in &shmem {
        site.make_object(*id, built)?;
    }
    for id in &wanted {
        site.open(*id)?;
    }
    let files: Vec<BorrowedFd> = wanted.iter().map(|id| site.files[id].as_fd()).collect();
    let objects = shmem.iter().map(|id| site.objects[id].as_fd());
    let sources: Vec<BorrowedFd> = files.into_iter().chain(objects).collect();
    let remote = built.deliver(&site.control, site.parking, &sources)?;
    let file_fd: HashMap<u64, Remote> = wanted.iter().map(|id| u64::from(*id)).zip(remote.iter().copied()).collect();
    let object_fd: HashMap<u64, Remote> = shmem.iter().copied().zip(remote[wanted.len()..].iter().copied()).collect();

    let mut b = built.main.batch();
    let present = proc::maps(built.pid).map_err(|e| Error::proc(built.pid, e))?;
    if let Some(start) = special_start(&alive.mm).filter(|s| !present.iter().any(|v| v.start == *s && v.is_special())) {
        b.call("arch_prctl(ARCH_MAP_VDSO_64)", libc::SYS_arch_prctl, [ARCH_MAP_VDSO_64.into(), start.into()]);
    }
    for (span, prot) in protections {
        if !b.fits(2, 0) {
            built.main.run(&built.memory, &mut b)?;
            b = built.main.batch();
        }
        b.call("mprotect", libc::SYS_mprotect, [span.vaddr.into(), (span.end() - span.vaddr).into(), (*prot).into()]);
    }
    for v in pieces {
        if !b.fits(2, 0) {
            built.main.run(&built.memory, &mut b)?;
            b = built.main.batch();
        }
        let len = v.end - v.start;
        let fd = match mm::content(v) {
            Content::Special => continue,
            Content::Sysv(_) => {
                sysv::attach(v, &mut b);
                continue;
            }
            Content::Shmem(id) => object_fd[&id].fd,
            _ if is_file_mapping(v) => file_fd[&v.shmid].fd,
            _ => -1,
        };
        let anonymous = if fd < 0 { libc::MAP_ANONYMOUS } else { 0 };
        let shared = v.flags & (libc::MAP_SHARED | libc::MAP_PRIVATE) as u32;
        let kept_flags = v.flags & (libc::MAP_GROWSDOWN | libc::MAP_NORESERVE) as u32;
        let flags = shared | kept_flags | (anonymous | libc::MAP_FIXED_NOREPLACE) as u32;
        let args = [v.start.into(), len.into(), v.prot.into(), flags.into(), fd.into(), v.pgoff.into()];
        b.call("mmap", libc::SYS_mmap, args);
    }
    built.main.run(&built.memory, &mut b)?;
    let mut b = built.main.batch();
    let exe = file_fd[&u64::from(alive.mm.exe_file_id)];
    let program = file::stat(&site.files[&alive.mm.exe_file_id]).map_err(Error::system("the program"))?;
    let now =
        File::open(format!("/proc/{}/exe", built.pid)).and_then(file::stat).map_err(|e| Error::proc(built.pid, e))?;
    mm::apply(&alive.mm, (!now.is_same_file(&program)).then_some(exe), &mut b);
    built.main.run(&built.memory, &mut b)?;
    built.forget_parked(site.parking)
}

/// The kernel's vdso must lie as the dumped one did: programs have addresses in it.
fn check_vdso(built: &Built, mm: &MmEntry) -> Result<()> {
    let Some(dumped) = mm.vmas.iter().find(|v| v.status & vma_status::VDSO != 0) else { return Ok(()) };
    let maps = proc::maps(built.pid).map_err(|e| Error::proc(built.pid, e))?;
    match maps.iter().find(|v| v.name == b"[vdso]") {
        Some(v) if (v.start, v.end) == (dumped.start, dumped.end) => Ok(()),
        _ => Err(Error::BadRecord {
            what: "this kernel's vdso is laid out in another way than that of the source".into(),
        }),
    }
}

fn fill_private(built: &mut Built, mm: &MmEntry, extents: &[Extent], inherited: &[&VmaEntry]) -> Result<u64> {
    let is_inherited = |v: &VmaEntry| inherited.iter().any(|k| k.start == v.start);
    let mut pieces = Vec::new();
    let mut fillable = Vec::new();
    let mut rest = extents.iter().peekable();
    for v in mm.vmas.iter().filter(|v| mm::content(v) == Content::Private) {
        let way = match () {
            () if is_inherited(v) => Way::Differing,
            () if v.status & vma_status::ANON_PRIVATE != 0 => Way::Missing,
            () => Way::Over,
        };
        while rest.next_if(|e| e.end() <= v.start).is_some() {}
        let mut pages = 0;
        for e in rest.clone().take_while(|e| e.vaddr < v.end) {
            if let Some(extent) = cut(e, v.start, v.end) {
                pages += extent.pages;
                pieces.push(Piece { extent, way });
            }
        }
        if way == Way::Missing && pages > 0 {
            fillable.push((v, pages));
        }
    }
    let missing: u64 = fillable.iter().map(|(_, pages)| pages).sum();
    let uffd = if missing >= WORTH_A_UFFD { Some(open_uffd(built)?) } else { None };
    if let Some(uffd) = &uffd {
        for (v, _) in &fillable {
            uffd.fillable(v.start, v.end).map_err(Error::system("register memory with userfaultfd"))?;
        }
    }
    fill::fill(&pieces, &built.memory, uffd.as_ref())
}

pub fn open_uffd(built: &mut Built) -> Result<Uffd> {
    let fd = built.main.call("userfaultfd", libc::SYS_userfaultfd, [uffd::OPEN_FLAGS])?;
    let ours = PidFd::open(built.pid).and_then(|p| p.get(fd as i32)).and_then(Uffd::filling);
    built.main.call("close", libc::SYS_close, [fd])?;
    ours.map_err(Error::system("take a puppet's userfaultfd"))
}

/// Pages that the parent has and the child has not, in what they share.
fn drop_holes(built: &mut Built, extents: &[Extent], inherited: &[&VmaEntry]) -> Result<()> {
    let mut calls = Vec::new();
    for v in inherited {
        let mut at = v.start;
        for e in extents.iter().filter_map(|e| cut(e, v.start, v.end)) {
            if at < e.vaddr {
                calls.push(("madvise", libc::SYS_madvise, [at, e.vaddr - at, libc::MADV_DONTNEED as u64]));
            }
            at = e.end();
        }
        if at < v.end {
            calls.push(("madvise", libc::SYS_madvise, [at, v.end - at, libc::MADV_DONTNEED as u64]));
        }
    }
    built.run_all(&calls)
}

impl Site {
    /// Makes a shared memory object: the kernel's own kind, which only mmap(2) makes. The puppet maps it for
    /// a moment, we take it from there.
    fn make_object(&mut self, id: u64, maker: &mut Built) -> Result<()> {
        if self.objects.contains_key(&id) {
            return Ok(());
        }
        let of_object = |v: &&VmaEntry| mm::content(v) == Content::Shmem(id);
        let alive = self.plan.tree.processes.iter().filter_map(|p| p.alive.as_ref());
        let mapped = alive.flat_map(|a| &a.mm.vmas).filter(of_object).map(|v| v.pgoff + (v.end - v.start)).max();
        let extents = self.plan.extents(PagesOf::Shmem(id));
        let size = mapped.into_iter().chain(extents.last().map(Extent::end)).max().unwrap_or(PAGE_SIZE);
        let prot = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        let flags = (libc::MAP_SHARED | libc::MAP_ANONYMOUS) as u64;
        let at = maker.main.call("mmap", libc::SYS_mmap, [0, size, prot, flags, u64::MAX, 0])?;
        let path = format!("/proc/{}/map_files/{at:x}-{:x}", maker.pid, at + size);
        let object = File::options().read(true).write(true).open(&path);
        maker.main.call("munmap", libc::SYS_munmap, [at, size])?;
        let object = object.map_err(Error::system(path))?;
        self.report.pages += fill::fill_object(extents, &object).map_err(Error::system("fill shared memory"))?;
        self.objects.insert(id, object.into());
        Ok(())
    }
}

/// Advice, locks and guard regions, once nobody is made from this space any more.
pub fn finish(built: &mut Built, alive: &Alive) -> Result<()> {
    let mut calls = Vec::new();
    mm::apply_late(&alive.mm, &alive.extra.guard_regions, &mut calls);
    built.run_all(&calls)
}

/// A batch cannot hold any number of calls.
impl Built {
    fn run_all(&mut self, calls: &[(&'static str, libc::c_long, [u64; 3])]) -> Result<()> {
        for some in calls.chunks(2000) {
            let mut b: Batch = self.main.batch();
            for (name, nr, args) in some {
                b.call(name, *nr, args.map(Into::into));
            }
            self.main.run(&self.memory, &mut b)?;
        }
        Ok(())
    }
}
