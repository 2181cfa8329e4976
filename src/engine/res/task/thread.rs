//! The rest of a thread: name, robust futexes, address to clear at its end, restartable sequences, parent death signal.

use libc::pid_t;

use crate::engine::{Error, Result};
use crate::image::records::core::ThreadCoreEntry;
use crate::image::records::task::RseqEntry;
use crate::sys::mem::Memory;
use crate::sys::{ptrace, sched};
use crate::tracee::Thread;
use crate::tracee::batch::Batch;

/// `struct rseq`: the address of the current critical section (include/uapi/linux/rseq.h).
const RSEQ_CS: u64 = 8;
/// Until 6.3 the registered size was always this, and the kernel reports it so for the original area.
const RSEQ_FLAG_UNREGISTER: u64 = 1;

#[derive(Debug, Clone, Copy)]
pub struct Asked {
    tid_address: u64,
    parent_death: u64,
}

pub fn ask(b: &mut Batch) -> Asked {
    let asked = Asked { tid_address: b.room(8), parent_death: b.room(8) };
    let prctl = |b: &mut Batch, name, option: i32, at: u64| b.call(name, libc::SYS_prctl, [option.into(), at.into()]);
    prctl(b, "prctl(PR_GET_TID_ADDRESS)", libc::PR_GET_TID_ADDRESS, asked.tid_address);
    prctl(b, "prctl(PR_GET_PDEATHSIG)", libc::PR_GET_PDEATHSIG, asked.parent_death);
    asked
}

/// The address that is cleared at the thread's end, and its parent death signal.
pub fn answer(asked: Asked, memory: &Memory) -> std::io::Result<(u64, u32)> {
    Ok((memory.read_u64(asked.tid_address)?, memory.read_u64(asked.parent_death)? as u32))
}

/// The name of a thread, without the end of line.
pub fn collect_name(tid: pid_t) -> Result<Vec<u8>> {
    let mut name = std::fs::read(format!("/proc/{tid}/comm")).map_err(|e| Error::proc(tid, e))?;
    name.pop_if(|b| *b == b'\n');
    Ok(name)
}

/// Robust futexes and restartable sequences. Returns where the thread must go on if it was stopped inside a critical
/// section: what the kernel does on its way back to user mode it cannot do for another task.
pub fn collect(thread: &Thread, memory: &Memory, core: &mut ThreadCoreEntry) -> Result<Option<u64>> {
    let tid = thread.tid;
    let (head, len) = sched::robust_list(tid).map_err(|e| Error::proc(tid, e))?;
    (core.futex_rla, core.futex_rla_len) = (head, len as u32);
    let rseq = ptrace::rseq(tid).map_err(|e| Error::proc(tid, e))?;
    if rseq.pointer == 0 {
        return Ok(None);
    }
    let section = memory.read_u64(rseq.pointer + RSEQ_CS).map_err(|e| Error::proc(tid, e))?;
    core.rseq_entry = Some(RseqEntry {
        rseq_abi_pointer: rseq.pointer,
        rseq_abi_size: rseq.size,
        signature: rseq.signature,
        rseq_cs_pointer: Some(section),
    });
    abort_of(thread.regs.rip, section, memory).map_err(|e| Error::proc(tid, e))
}

/// `struct rseq_cs`: version, flags, start, length, abort address.
fn abort_of(rip: u64, section: u64, memory: &Memory) -> std::io::Result<Option<u64>> {
    if section == 0 {
        return Ok(None);
    }
    let start = memory.read_u64(section + 8)?;
    let len = memory.read_u64(section + 16)?;
    let abort = memory.read_u64(section + 24)?;
    Ok((rip.wrapping_sub(start) < len).then_some(abort))
}

/// Undoes the registration that a puppet inherited from lmrun's own C library.
pub fn forget_rseq(tid: pid_t, b: &mut Batch) -> Result<()> {
    let rseq = ptrace::rseq(tid).map_err(|e| Error::proc(tid, e))?;
    if rseq.pointer != 0 {
        let args = [rseq.pointer.into(), rseq.size.into(), RSEQ_FLAG_UNREGISTER.into(), rseq.signature.into()];
        b.call("rseq", libc::SYS_rseq, args);
    }
    Ok(())
}

/// All of it but the parent death signal, which a change of credentials would clear.
pub fn apply(core: &ThreadCoreEntry, name: &[u8], tid_address: u64, b: &mut Batch) {
    b.call("set_robust_list", libc::SYS_set_robust_list, [core.futex_rla.into(), core.futex_rla_len.into()]);
    b.call("set_tid_address", libc::SYS_set_tid_address, [tid_address.into()]);
    let name = b.text(name);
    b.call("prctl(PR_SET_NAME)", libc::SYS_prctl, [libc::PR_SET_NAME.into(), name.into()]);
    if let Some(r) = &core.rseq_entry {
        let args = [r.rseq_abi_pointer.into(), r.rseq_abi_size.into(), 0.into(), r.signature.into()];
        b.call("rseq", libc::SYS_rseq, args);
    }
}

pub fn apply_parent_death(core: &ThreadCoreEntry, b: &mut Batch) {
    if let Some(signal) = core.pdeath_sig.filter(|s| *s != 0) {
        b.call("prctl(PR_SET_PDEATHSIG)", libc::SYS_prctl, [libc::PR_SET_PDEATHSIG.into(), signal.into()]);
    }
}
