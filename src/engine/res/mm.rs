//! Address spaces: their mappings, and the numbers of `struct mm_struct`.

use std::os::fd::AsFd;

use libc::pid_t;

use crate::engine::collect::{Files, Remote};
use crate::engine::res::fd::ghost;
use crate::engine::{Error, Result, Why};
use crate::image::records::lmrun::LmrunRange;
use crate::image::records::mm::{MmEntry, VmaEntry, vma_status};
use crate::sys::file;
use crate::sys::pagemap::{Pagemap, Query};
use crate::sys::proc::{self, Vma};
use crate::tracee::batch::Batch;

/// `VmFlags` of smaps and the advice that sets them (madvise(2)).
pub const ADVICE: [(&[u8; 2], i32); 8] = [
    (b"dc", libc::MADV_DONTFORK),
    (b"dd", libc::MADV_DONTDUMP),
    (b"hg", libc::MADV_HUGEPAGE),
    (b"nh", libc::MADV_NOHUGEPAGE),
    (b"mg", libc::MADV_MERGEABLE),
    (b"wf", libc::MADV_WIPEONFORK),
    (b"rr", libc::MADV_RANDOM),
    (b"sr", libc::MADV_SEQUENTIAL),
];

/// Recorded with MAP_LOCKED for memory locked with MLOCK_ONFAULT, which no flag of mmap(2) asks for.
const ON_FAULT: i32 = libc::MAP_NONBLOCK;

/// Flags that stand for what cannot be carried, and how to call it.
const FOREIGN: [(&[u8; 2], &str); 7] = [
    (b"ht", "huge pages of hugetlbfs"),
    (b"io", "memory of a device"),
    (b"pf", "memory of a device"),
    (b"mm", "memory of a device"),
    (b"ss", "a shadow stack"),
    (b"um", "memory with a userfaultfd of its own"),
    (b"sl", "sealed memory (mseal)"),
];

/// What a mapping is, as far as its content goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// The kernel provides it.
    Special,
    /// Private: what was written is the task's own.
    Private,
    /// A shared memory object; its inode number is its id.
    Shmem(u64),
    /// A System V segment, by its id.
    Sysv(u64),
    /// The file has it.
    File,
}

/// Whose content a recorded mapping shows.
pub fn content(v: &VmaEntry) -> Content {
    match v.status {
        s if s & (vma_status::VDSO | vma_status::VVAR | vma_status::VSYSCALL) != 0 => Content::Special,
        s if s & vma_status::SYSVIPC != 0 => Content::Sysv(v.shmid),
        s if s & vma_status::ANON_SHARED != 0 => Content::Shmem(v.shmid),
        s if s & vma_status::FILE_SHARED != 0 => Content::File,
        _ => Content::Private,
    }
}

fn refuse<T>(pid: pid_t, v: &Vma, why: impl Into<String>, remedy: &'static str) -> Result<T> {
    let name = String::from_utf8_lossy(&v.name).into_owned();
    Err(Error::refused(pid, Why::Mapping { start: v.start, end: v.end, name, why: why.into(), remedy }))
}

/// The record of one mapping. None: it is everywhere the same ([vsyscall]).
fn vma(pid: pid_t, v: &Vma, files: &mut Files) -> Result<Option<VmaEntry>> {
    if v.name == b"[vsyscall]" {
        return Ok(None);
    }
    let mut e = VmaEntry {
        start: v.start,
        end: v.end,
        pgoff: v.offset,
        prot: v.prot,
        flags: if v.shared { libc::MAP_SHARED } else { libc::MAP_PRIVATE } as u32,
        status: vma_status::REGULAR,
        fd: -1,
        ..VmaEntry::default()
    };
    if v.is_special() {
        e.status |= if v.name == b"[vdso]" { vma_status::VDSO } else { vma_status::VVAR };
        return Ok(Some(e));
    }
    if let Some((_, what)) = FOREIGN.iter().find(|(flag, _)| v.has(flag)) {
        return refuse(pid, v, format!("{what} cannot be carried"), "stop and start the container instead");
    }
    let flag = |f, bit: i32| if v.has(f) { bit as u32 } else { 0 };
    e.flags |= flag(b"gd", libc::MAP_GROWSDOWN) | flag(b"lo", libc::MAP_LOCKED) | flag(b"nr", libc::MAP_NORESERVE);
    e.flags |= flag(b"lf", ON_FAULT);
    e.madv = Some(ADVICE.iter().filter(|(f, _)| v.has(f)).map(|(_, advice)| 1 << advice).sum()).filter(|m| *m != 0);
    if v.inode == 0 && !v.shared {
        e.flags |= libc::MAP_ANONYMOUS as u32;
        e.pgoff = 0;
        e.status |= vma_status::ANON_PRIVATE;
        match &v.name[..] {
            b"[heap]" => e.status |= vma_status::HEAP,
            b"[stack]" => e.status |= vma_status::STACK,
            _ => {}
        }
    } else if v.shared && v.major == 0 && v.name == b"/dev/zero (deleted)" {
        e.flags |= libc::MAP_ANONYMOUS as u32;
        e.shmid = v.inode;
        e.status |= vma_status::ANON_SHARED;
    } else if v.shared && v.major == 0 && v.name.starts_with(b"/SYSV") && v.name.ends_with(b" (deleted)") {
        e.shmid = v.inode;
        e.status |= vma_status::SYSVIPC;
    } else {
        let writable = v.shared && v.has(b"mw") && v.has(b"sh") && may_write(pid, v);
        e.shmid = u64::from(mapped_file(pid, v, writable, files)?);
        e.status |= if v.shared { vma_status::FILE_SHARED } else { vma_status::FILE_PRIVATE };
    }
    Ok(Some(e))
}

/// Whether the file was open for writing when it was mapped: the kernel's link to it says so.
fn may_write(pid: pid_t, v: &Vma) -> bool {
    let link = format!("/proc/{pid}/map_files/{:x}-{:x}", v.start, v.end);
    std::fs::symlink_metadata(link)
        .is_ok_and(|m| std::os::unix::fs::PermissionsExt::mode(&m.permissions()) & 0o200 != 0)
}

/// A restore will map the file by its path: it must lead to the same file now.
fn mapped_file(pid: pid_t, v: &Vma, writable: bool, files: &mut Files) -> Result<u32> {
    let foreign = [&b"/memfd:"[..], b"/SYSV", b"/[aio]", b"anon_inode:", b"socket:", b"/dmabuf:"];
    if foreign.iter().any(|p| v.name.starts_with(p)) || !v.name.starts_with(b"/") {
        return refuse(pid, v, "mappings of this kind cannot be carried yet", "stop and start the container instead");
    }
    let access = if writable { libc::O_RDWR } else { libc::O_RDONLY } as u32;
    let link = format!("/proc/{pid}/map_files/{:x}-{:x}", v.start, v.end);
    let mapped = std::fs::File::options().read(true).custom_flags_path().open(&link).and_then(file::stat);
    let mapped = mapped.map_err(|e| Error::proc(pid, e))?;
    if let Some(name) = ghost::last_name(&v.name, &mapped) {
        let id = std::fs::File::open(&link).and_then(|file| files.nameless(name, access, file.into()));
        return id.map_err(|e| Error::proc(pid, e));
    }
    let root = files.all.root.as_fd();
    match file::open_in(root, &v.name, libc::O_PATH as u32).and_then(file::stat) {
        Ok(s) if s.is_same_file(&mapped) => {}
        Ok(_) => {
            return refuse(pid, v, "its path leads to another file now", "restart the program, or put the file back");
        }
        Err(e) => {
            return refuse(
                pid,
                v,
                format!("its path cannot be opened: {e}"),
                "restart the program, or put the file back",
            );
        }
    }
    Ok(files.by_path(&v.name, access, mapped.mode, Some(mapped.size)))
}

trait OPath {
    fn custom_flags_path(&mut self) -> &mut Self;
}

impl OPath for std::fs::OpenOptions {
    fn custom_flags_path(&mut self) -> &mut Self {
        std::os::unix::fs::OpenOptionsExt::custom_flags(self, libc::O_PATH)
    }
}

/// Guard regions (madvise(2), MADV_GUARD_INSTALL), where the kernel shows them (6.15 and later).
pub fn guard_regions(pid: pid_t, vmas: &[Vma]) -> Result<Vec<LmrunRange>> {
    let pages = Pagemap::open(pid).map_err(|e| Error::proc(pid, e))?;
    let guard = pages.guard();
    let query = Query { flags: 0, all: guard, none: 0, any: 0, report: guard };
    let mut found = Vec::new();
    for v in vmas.iter().filter(|v| guard != 0 && !v.is_special()) {
        let regions = pages.scan(v.start, v.end, query).map_err(|e| Error::proc(pid, e))?;
        found.extend(regions.iter().map(|r| LmrunRange { start: r.start, end: r.end }));
    }
    Ok(found)
}

#[derive(Debug, Clone, Copy)]
pub struct Asked {
    brk: usize,
    dumpable: usize,
    thp: usize,
}

pub fn ask(b: &mut Batch) -> Asked {
    let prctl = |b: &mut Batch, name, option: i32| {
        b.call(name, libc::SYS_prctl, [option.into(), 0.into(), 0.into(), 0.into(), 0.into()])
    };
    Asked {
        brk: b.call("brk", libc::SYS_brk, [0.into()]),
        dumpable: prctl(b, "prctl(PR_GET_DUMPABLE)", libc::PR_GET_DUMPABLE),
        thp: prctl(b, "prctl(PR_GET_THP_DISABLE)", libc::PR_GET_THP_DISABLE),
    }
}

/// The record of an address space.
pub fn answer(asked: Asked, pid: pid_t, vmas: &[Vma], batch: &Batch, files: &mut Files) -> Result<MmEntry> {
    let s = proc::stat(pid).map_err(|e| Error::proc(pid, e))?;
    let auxv = std::fs::read(format!("/proc/{pid}/auxv")).map_err(|e| Error::proc(pid, e))?;
    let records: Result<Vec<_>> = vmas.iter().filter_map(|v| vma(pid, v, files).transpose()).collect();
    Ok(MmEntry {
        mm_start_code: s.start_code,
        mm_end_code: s.end_code,
        mm_start_data: s.start_data,
        mm_end_data: s.end_data,
        mm_start_stack: s.start_stack,
        mm_start_brk: s.start_brk,
        mm_brk: batch.result(asked.brk) as u64,
        mm_arg_start: s.arg_start,
        mm_arg_end: s.arg_end,
        mm_env_start: s.env_start,
        mm_env_end: s.env_end,
        exe_file_id: files.by_link(pid, "exe", libc::O_RDONLY as u32)?,
        mm_saved_auxv: auxv.chunks_exact(8).map(|c| u64::from_ne_bytes(c.try_into().expect("eight bytes"))).collect(),
        vmas: records?,
        dumpable: Some(batch.result(asked.dumpable) as i32),
        aios: Vec::new(),
        thp_disabled: Some(batch.result(asked.thp) != 0),
    })
}

/// `struct prctl_mm_map` (include/uapi/linux/prctl.h): eleven addresses, the brk among them, the auxiliary vector, the program.
/// `exe` None leaves the program as it is: the kernel refuses to change it while it is mapped, even to itself.
pub fn apply(e: &MmEntry, exe: Option<Remote>, b: &mut Batch) {
    const PR_SET_MM: i32 = 35;
    const PR_SET_MM_MAP: i32 = 14;
    let auxv: Vec<u8> = e.mm_saved_auxv.iter().flat_map(|w| w.to_ne_bytes()).collect();
    let at = b.bytes(&auxv);
    let words = [
        e.mm_start_code,
        e.mm_end_code,
        e.mm_start_data,
        e.mm_end_data,
        e.mm_start_brk,
        e.mm_brk,
        e.mm_start_stack,
        e.mm_arg_start,
        e.mm_arg_end,
        e.mm_env_start,
        e.mm_env_end,
        at,
    ];
    let mut map: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
    map.extend_from_slice(&(auxv.len() as u32).to_ne_bytes());
    map.extend_from_slice(&exe.map_or(u32::MAX, |r| r.fd as u32).to_ne_bytes());
    let map_at = b.bytes(&map);
    let args = [PR_SET_MM.into(), PR_SET_MM_MAP.into(), map_at.into(), map.len().into(), 0.into()];
    b.call("prctl(PR_SET_MM_MAP)", libc::SYS_prctl, args);
}

/// What would hinder the making of children and comes after it: advice, locks, guard regions.
pub fn apply_late(e: &MmEntry, guards: &[LmrunRange], b: &mut Vec<(&'static str, libc::c_long, [u64; 3])>) {
    const MADV_GUARD_INSTALL: u64 = 102;
    const MLOCK_ONFAULT: u64 = 1;
    for v in &e.vmas {
        let len = v.end - v.start;
        for (_, advice) in ADVICE.iter().filter(|(_, a)| v.madv.unwrap_or(0) & (1 << a) != 0) {
            b.push(("madvise", libc::SYS_madvise, [v.start, len, *advice as u64]));
        }
        if v.flags & libc::MAP_LOCKED as u32 != 0 {
            let flags = if v.flags & ON_FAULT as u32 != 0 { MLOCK_ONFAULT } else { 0 };
            b.push(("mlock2", libc::SYS_mlock2, [v.start, len, flags]));
        }
    }
    for g in guards {
        b.push(("madvise(MADV_GUARD_INSTALL)", libc::SYS_madvise, [g.start, g.end - g.start, MADV_GUARD_INSTALL]));
    }
}

/// The part that a change of credentials would undo.
pub fn apply_dumpable(e: &MmEntry, b: &mut Batch) {
    let prctl = |b: &mut Batch, name, option: i32, value: u64| {
        b.call(name, libc::SYS_prctl, [option.into(), value.into(), 0.into(), 0.into(), 0.into()]);
    };
    // 2 (only root may read) is not for setting; it is what a change of credentials gives.
    if let Some(dumpable) = e.dumpable.filter(|d| *d != 2) {
        prctl(b, "prctl(PR_SET_DUMPABLE)", libc::PR_SET_DUMPABLE, dumpable as u64);
    }
    if e.thp_disabled == Some(true) {
        prctl(b, "prctl(PR_SET_THP_DISABLE)", libc::PR_SET_THP_DISABLE, 1);
    }
}
