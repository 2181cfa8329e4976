//! System V shared memory (shmget(2)) of the container's own IPC namespace. Who made a segment, and when it was used, is
//! not carried.

use libc::pid_t;

use super::mm::{self, Content};
use crate::engine::tree::Process;
use crate::engine::{Error, Result, Why, fill};
use crate::image::page_source::Extent;
use crate::image::pages::PAGE_SIZE;
use crate::image::records::mm::VmaEntry;
use crate::image::records::ns::{IpcDescEntry, IpcShmEntry};
use crate::sys::sysv::{self, SHM_DEST, Segment};
use crate::tracee::batch::Batch;

/// The records of all segments; their content is in pagemaps of their own, by id.
pub fn collect(init: pid_t) -> Result<Vec<IpcShmEntry>> {
    let segments = sysv::segments(init).map_err(|e| Error::proc(init, e))?;
    Ok(segments.iter().map(record).collect())
}

fn record(s: &Segment) -> IpcShmEntry {
    let desc = IpcDescEntry {
        key: s.key.cast_unsigned(),
        uid: s.uid,
        gid: s.gid,
        cuid: s.cuid,
        cgid: s.cgid,
        mode: s.mode,
        id: s.id.cast_unsigned(),
    };
    IpcShmEntry { desc, size: s.size, in_pagemaps: Some(true), hugetlb_flag: None }
}

fn segment(e: &IpcShmEntry) -> Segment {
    Segment {
        key: e.desc.key.cast_signed(),
        id: e.desc.id.cast_signed(),
        mode: e.desc.mode,
        size: e.size,
        uid: e.desc.uid,
        gid: e.desc.gid,
        cuid: e.desc.cuid,
        cgid: e.desc.cgid,
    }
}

/// Attaching maps a whole segment: what was changed in parts cannot be had again.
pub fn check<'a>(processes: impl Iterator<Item = (pid_t, &'a Process)>, known: &[IpcShmEntry]) -> Result<()> {
    for (pid, process) in processes {
        for v in process.alive.iter().flat_map(|alive| &alive.mm.vmas) {
            let Content::Sysv(id) = mm::content(v) else { continue };
            let size = known.iter().find(|s| u64::from(s.desc.id) == id).map(|s| s.size.next_multiple_of(PAGE_SIZE));
            let why = match size {
                None => "is a System V segment of another IPC namespace",
                Some(size) if v.pgoff != 0 || v.end - v.start != size => "is a part of a System V segment",
                Some(_) => continue,
            };
            let (name, remedy) = (format!("shmid {id}"), "stop and start the container instead");
            return Err(Error::refused(
                pid,
                Why::Mapping { start: v.start, end: v.end, name, why: why.into(), remedy },
            ));
        }
    }
    Ok(())
}

/// Makes a segment in the IPC namespace of `init`; gives the number of pages that it was filled with.
pub fn create(init: pid_t, e: &IpcShmEntry, extents: &[Extent]) -> Result<u64> {
    let what = || format!("System V segment {} (key {:#x})", e.desc.id, e.desc.key);
    let object = sysv::create(init, &segment(e)).map_err(Error::system(what()))?;
    fill::fill_object(extents, &object).map_err(Error::system(what()))
}

/// Attaches a segment where it was.
pub fn attach(v: &VmaEntry, b: &mut Batch) {
    let prot = v.prot.cast_signed();
    let flags = if prot & libc::PROT_WRITE == 0 { libc::SHM_RDONLY } else { 0 }
        | if prot & libc::PROT_EXEC != 0 { libc::SHM_EXEC } else { 0 };
    b.call("shmat", libc::SYS_shmat, [v.shmid.into(), v.start.into(), flags.into()]);
    b.call("mprotect", libc::SYS_mprotect, [v.start.into(), (v.end - v.start).into(), v.prot.into()]);
}

/// Once all have attached it: a segment that goes away with its last user.
pub fn finish(init: pid_t, e: &IpcShmEntry) -> Result<()> {
    if e.desc.mode & SHM_DEST == 0 {
        return Ok(());
    }
    sysv::remove(init, e.desc.id.cast_signed()).map_err(Error::system("mark a System V segment as removed"))
}
