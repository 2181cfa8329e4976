//! Registers: general purpose, floating point and the whole xsave area.

use crate::engine::{Error, Result, Why};
use crate::image::records::core::{ThreadInfoX86, UserX86FpregsEntry, UserX86RegsEntry, UserX86XsaveEntry};
use crate::sys::ptrace::{self, Regs};
use crate::tracee::{RestartBlock, Thread, resumable};

/// Code segment of a 64-bit task (arch/x86/include/asm/segment.h, __USER_CS).
const USER_CS: u64 = 0x33;

/// Reads the floating point state of a stopped thread.
pub fn collect_xstate(thread: &Thread) -> Result<Vec<u8>> {
    ptrace::xstate(thread.tid).map_err(|e| Error::proc(thread.tid, e))
}

/// The record of a thread that is to go on elsewhere. `abort`: where it goes on if it was stopped inside a
/// restartable sequence.
pub fn record(
    thread: &Thread,
    xstate: &[u8],
    tid_address: u64,
    signalled: bool,
    abort: Option<u64>,
) -> Result<ThreadInfoX86> {
    if thread.regs.cs != USER_CS {
        return Err(Error::refused(thread.tid, Why::Compat));
    }
    let mut r = resumable(&thread.regs, RestartBlock::Lost, signalled);
    r.rip = abort.unwrap_or(r.rip);
    Ok(ThreadInfoX86 { clear_tid_addr: tid_address, gpregs: to_record(&r), fpregs: fp_record(xstate), tls: Vec::new() })
}

fn to_record(r: &Regs) -> UserX86RegsEntry {
    UserX86RegsEntry {
        r15: r.r15,
        r14: r.r14,
        r13: r.r13,
        r12: r.r12,
        bp: r.rbp,
        bx: r.rbx,
        r11: r.r11,
        r10: r.r10,
        r9: r.r9,
        r8: r.r8,
        ax: r.rax,
        cx: r.rcx,
        dx: r.rdx,
        si: r.rsi,
        di: r.rdi,
        orig_ax: r.orig_rax,
        ip: r.rip,
        cs: r.cs,
        flags: r.eflags,
        sp: r.rsp,
        ss: r.ss,
        fs_base: r.fs_base,
        gs_base: r.gs_base,
        ds: r.ds,
        es: r.es,
        fs: r.fs,
        gs: r.gs,
        mode: None,
    }
}

/// Registers as ptrace takes them.
pub fn from_record(e: &UserX86RegsEntry) -> Regs {
    let mut r = ptrace::zeroed_regs();
    (r.r15, r.r14, r.r13, r.r12) = (e.r15, e.r14, e.r13, e.r12);
    (r.rbp, r.rbx, r.r11, r.r10, r.r9, r.r8) = (e.bp, e.bx, e.r11, e.r10, e.r9, e.r8);
    (r.rax, r.rcx, r.rdx, r.rsi, r.rdi) = (e.ax, e.cx, e.dx, e.si, e.di);
    (r.rip, r.cs, r.eflags, r.rsp, r.ss) = (e.ip, e.cs, e.flags, e.sp, e.ss);
    (r.fs_base, r.gs_base, r.ds, r.es, r.fs, r.gs) = (e.fs_base, e.gs_base, e.ds, e.es, e.fs, e.gs);
    // CRIU leaves interrupted calls to the restorer.
    r.orig_rax = e.orig_ax;
    resumable(&r, RestartBlock::Lost, false)
}

/// Offsets in the standard format of the xsave area (Intel SDM volume 1, 13.4).
const ST_SPACE: usize = 32;
const XMM_SPACE: usize = 160;
const PADDING: usize = 416;
const SW_RESERVED: usize = 464;
const XSTATE_BV: usize = 512;
const YMMH: usize = 576;
const YMMH_LEN: usize = 256;
/// Components x87, SSE and AVX.
const LEGACY_AND_AVX: u64 = 7;

fn u16_at(b: &[u8], at: usize) -> u32 {
    u32::from(u16::from_le_bytes([b[at], b[at + 1]]))
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(b[at..at + 8].try_into().expect("eight bytes"))
}

fn words(b: &[u8]) -> Vec<u32> {
    b.chunks_exact(4).map(|c| u32::from_le_bytes(c.try_into().expect("four bytes"))).collect()
}

/// CRIU's record of the part that every reader knows; the whole area is in `lmrun.bin`.
fn fp_record(x: &[u8]) -> UserX86FpregsEntry {
    let xsave = (x.len() >= YMMH + YMMH_LEN).then(|| UserX86XsaveEntry {
        xstate_bv: u64_at(x, XSTATE_BV) & LEGACY_AND_AVX,
        ymmh_space: words(&x[YMMH..YMMH + YMMH_LEN]),
        ..UserX86XsaveEntry::default()
    });
    UserX86FpregsEntry {
        cwd: u16_at(x, 0),
        swd: u16_at(x, 2),
        twd: u16_at(x, 4),
        fop: u16_at(x, 6),
        rip: u64_at(x, 8),
        rdp: u64_at(x, 16),
        mxcsr: words(&x[24..28])[0],
        mxcsr_mask: words(&x[28..32])[0],
        st_space: words(&x[ST_SPACE..XMM_SPACE]),
        xmm_space: words(&x[XMM_SPACE..PADDING]),
        padding: words(&x[PADDING..SW_RESERVED]),
        xsave,
    }
}

/// An xsave area as ptrace takes it, from a record alone: `like` is an area of this kernel.
pub fn xstate_from_record(e: &UserX86FpregsEntry, like: &[u8]) -> Vec<u8> {
    let mut x = like.to_vec();
    x[XSTATE_BV..].fill(0);
    x[..8].copy_from_slice(&[e.cwd, e.swd, e.twd, e.fop].map(|v| (v as u16).to_le_bytes()).concat());
    x[8..16].copy_from_slice(&e.rip.to_le_bytes());
    x[16..24].copy_from_slice(&e.rdp.to_le_bytes());
    x[24..28].copy_from_slice(&e.mxcsr.to_le_bytes());
    let mut put = |at: usize, end: usize, words: &[u32]| {
        for (place, w) in x[at..end].chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&w.to_le_bytes());
        }
    };
    put(ST_SPACE, XMM_SPACE, &e.st_space);
    put(XMM_SPACE, PADDING, &e.xmm_space);
    let mut present = 3u64;
    if let Some(xsave) = &e.xsave {
        put(YMMH, YMMH + YMMH_LEN, &xsave.ymmh_space);
        present = xsave.xstate_bv & LEGACY_AND_AVX;
    }
    x[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&present.to_le_bytes());
    x
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn general_registers_survive_the_record() {
        let mut r = ptrace::zeroed_regs();
        (r.r15, r.rip, r.eflags, r.fs_base, r.gs, r.orig_rax) = (1, 2, 0x246, 4, 5, u64::MAX);
        let back = from_record(&to_record(&r));
        assert_eq!((back.r15, back.rip, back.eflags, back.fs_base, back.gs), (1, 2, 0x246, 4, 5));
    }

    #[test]
    fn legacy_state_survives_the_record() {
        let area: Vec<u8> = (0..832u32).map(|i| (i % 251) as u8).collect();
        let mut like = vec![0; 1088];
        like[XSTATE_BV] = 0xff;
        let back = xstate_from_record(&fp_record(&area), &like);
        assert_eq!(back[..28], area[..28]);
        assert_eq!(back[ST_SPACE..PADDING], area[ST_SPACE..PADDING]);
        assert_eq!(back[YMMH..YMMH + YMMH_LEN], area[YMMH..YMMH + YMMH_LEN]);
        assert!(back[YMMH + YMMH_LEN..].iter().all(|&b| b == 0));
    }
}
