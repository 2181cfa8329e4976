//! Mappings with their flags, from an iterator over them in the kernel (Documentation/bpf/bpf_iterators.rst, since 5.12; of one
//! task, since 6.1). `/proc/PID/smaps` says the same, but walks the page tables for it, and holds the mappings' lock meanwhile.
//!
//! What a bit of `vm_flags` means is the kernel's own affair, so it is asked: smaps names the bits that are set in ascending
//! order (show_smap_vma_flags of fs/proc/task_mmu.c), and what our own small mappings are called tells the names of all bits in them.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsRawFd, OwnedFd};

use libc::pid_t;

use super::bpf::{Instruction, bpf};
use super::btf::Btf;
use super::proc::{self, Vma};
use super::uffd::Uffd;

// enum bpf_cmd, bpf_prog_type, bpf_attach_type; include/uapi/linux/bpf.h.
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_ITER_CREATE: libc::c_int = 33;
const BPF_PROG_TYPE_TRACING: u32 = 26;
const BPF_TRACE_ITER: u32 = 28;
/// bpf_seq_write
const SEQ_WRITE: i32 = 127;

/// The kernel's own buffer for an iterator (kernel/bpf/bpf_iter.c), in bytes: for some 1300 mappings.
const ONE_READ: usize = 32 << 10;

/// A mapping: its bounds, and `vm_flags`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct RawVma {
    start: u64,
    end: u64,
    flags: u64,
}

/// union bpf_attr for BPF_PROG_LOAD, as far as it is needed.
#[repr(C)]
#[derive(Default)]
struct Load {
    prog_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log: [u32; 4],
    kernel_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    interface: u32,
    expected_attach_type: u32,
    prog_btf: u32,
    function_record: u32,
    functions: u64,
    function_count: u32,
    line_record: u32,
    lines: u64,
    line_count: u32,
    attach_btf_id: u32,
    attach_program: u32,
    relocations: u32,
}
const _: () = assert!(size_of::<Load>() == 120);

/// union bpf_attr for BPF_LINK_CREATE.
#[repr(C)]
struct Link {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
    iterator: u64,
    iterator_size: u32,
    rest: u32,
}
const _: () = assert!(size_of::<Link>() == 32);

/// Reads mappings of any process.
#[derive(Debug)]
pub struct VmaFlags {
    program: OwnedFd,
    /// By the bit's number.
    names: BTreeMap<u32, [u8; 2]>,
}

impl VmaFlags {
    /// Loads the program, which takes some 10 ms.
    ///
    /// # Errors
    /// `EPERM` without CAP_BPF and CAP_PERFMON; `NotFound` or what bpf(2) says where the kernel cannot do it.
    pub fn open() -> io::Result<VmaFlags> {
        let kernel = Btf::of_kernel()?;
        let lacking = || io::Error::from(ErrorKind::Unsupported);
        let offset = |member| kernel.offset("vm_area_struct", member).ok_or_else(lacking);
        let program = program(offset("vm_start")?, offset("vm_end")?, offset("vm_flags")?);
        let load = Load {
            prog_type: BPF_PROG_TYPE_TRACING,
            instruction_count: program.len() as u32,
            instructions: program.as_ptr() as u64,
            // The kernel gives bpf_seq_write to no other; so these few lines may be used by the GPL's terms, too.
            license: c"Dual MIT/GPL".as_ptr() as u64,
            expected_attach_type: BPF_TRACE_ITER,
            attach_btf_id: kernel.function("bpf_iter_task_vma").ok_or_else(lacking)?,
            ..Load::default()
        };
        // SAFETY: the kernel reads the attributes, and through them the program and the license, which live until the
        // call returns.
        let mut this = VmaFlags { program: unsafe { bpf(BPF_PROG_LOAD, &load) }?, names: BTreeMap::new() };
        this.learn()?;
        Ok(this)
    }

    /// Learns the names of bits from mappings of our own that have as many of them as can be had.
    fn learn(&mut self) -> io::Result<()> {
        let own = std::process::id().cast_signed();
        let samples = Samples::make()?;
        let (raw, smaps) = (self.raw(own)?, proc::smaps(own)?);
        drop(samples);
        for vma in smaps {
            let Some(raw) = raw.iter().find(|raw| (raw.start, raw.end) == (vma.start, vma.end)) else { continue };
            let bits: Vec<u32> = (0..u64::BITS).filter(|bit| raw.flags >> bit & 1 != 0).collect();
            // A bit without a name would shift those above it.
            if bits.len() == vma.flags.len() {
                self.names.extend(bits.into_iter().zip(vma.flags));
            }
        }
        Ok(())
    }

    /// All mappings of a process that stands still, as [`proc::smaps`] gives them.
    ///
    /// # Errors
    /// What bpf(2) or proc says; `InvalidData` where it cannot be known in this way.
    pub fn read(&self, pid: pid_t) -> io::Result<Vec<Vma>> {
        let raw = self.raw(pid)?;
        let mut all = proc::maps(pid)?;
        // `[vsyscall]`, which is none of its own, comes last.
        let own = all.iter_mut().filter(|vma| vma.name != b"[vsyscall]");
        let mut counted = 0;
        for (vma, raw) in own.zip(&raw) {
            counted += 1;
            let unknown = || io::Error::new(ErrorKind::InvalidData, format!("vm_flags {:#x}", raw.flags));
            if (vma.start, vma.end) != (raw.start, raw.end) {
                return Err(unknown());
            }
            let bits = (0..u64::BITS).filter(|bit| raw.flags >> bit & 1 != 0);
            vma.flags = bits.map(|bit| self.names.get(&bit).copied().ok_or_else(unknown)).collect::<io::Result<_>>()?;
        }
        if counted == raw.len() && all.len() <= counted + 1 { Ok(all) } else { Err(ErrorKind::InvalidData.into()) }
    }

    /// All mappings of a process in ascending order, without `[vsyscall]`. None for a process that is gone.
    fn raw(&self, pid: pid_t) -> io::Result<Vec<RawVma>> {
        // union bpf_iter_link_info: task.tid is its first word.
        let task: [u32; 4] = [pid.cast_unsigned(), 0, 0, 0];
        let link = Link {
            program: self.program.as_raw_fd().cast_unsigned(),
            target: 0,
            attach_type: BPF_TRACE_ITER,
            flags: 0,
            iterator: task.as_ptr() as u64,
            iterator_size: size_of_val(&task) as u32,
            rest: 0,
        };
        // SAFETY: the kernel reads the attributes, and through them `task`.
        let link = unsafe { bpf(BPF_LINK_CREATE, &link) }?;
        let iterator: [u32; 2] = [link.as_raw_fd().cast_unsigned(), 0];
        // SAFETY: the kernel reads two words.
        let mut file = File::from(unsafe { bpf(BPF_ITER_CREATE, &iterator) }?);
        let mut all: Vec<RawVma> = Vec::new();
        let mut room = vec![0; ONE_READ];
        loop {
            let len = file.read(&mut room)?;
            if len == 0 {
                return Ok(all);
            }
            let (records, rest) = room[..len].as_chunks::<24>();
            for record in records {
                let (words, _) = record.as_chunks::<8>();
                let [start, end, flags] = [0, 1, 2].map(|n| u64::from_ne_bytes(words[n]));
                // Where it goes on after a read, the kernel may begin too early.
                if !rest.is_empty() || all.last().is_some_and(|last| last.end > start) {
                    return Err(ErrorKind::InvalidData.into());
                }
                all.push(RawVma { start, end, flags });
            }
        }
    }
}

/// Mappings of our own, one with each flag that a program can ask for.
struct Samples {
    start: *mut libc::c_void,
    len: usize,
    /// Their marks go with them.
    uffds: Vec<Uffd>,
}

impl Samples {
    fn make() -> io::Result<Samples> {
        const PAGE: usize = 4096;
        let advice = [
            libc::MADV_RANDOM,
            libc::MADV_SEQUENTIAL,
            libc::MADV_DONTFORK,
            libc::MADV_DONTDUMP,
            libc::MADV_MERGEABLE,
            libc::MADV_HUGEPAGE,
            libc::MADV_NOHUGEPAGE,
            libc::MADV_WIPEONFORK,
        ];
        let kinds = [
            libc::MAP_PRIVATE | libc::MAP_NORESERVE,
            libc::MAP_PRIVATE | libc::MAP_GROWSDOWN,
            libc::MAP_SHARED,
            libc::MAP_DROPPABLE,
        ];
        // A hole between any two.
        let len = (advice.len() + kinds.len() + 3) * 2 * PAGE;
        let (none, all) = (libc::PROT_NONE, libc::PROT_READ | libc::PROT_WRITE);
        let anonymous = libc::MAP_ANONYMOUS | libc::MAP_PRIVATE;
        // SAFETY: a new mapping, where the kernel finds room.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, none, anonymous | libc::MAP_NORESERVE, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let mut samples = Samples { start, len, uffds: Vec::new() };
        let mut places = (0..len).step_by(2 * PAGE).map(|offset| start.wrapping_byte_add(offset));
        let mut place = |kind: libc::c_int| {
            let at = places.next()?;
            // SAFETY: a page of our own reservation is replaced, which nobody else knows. What the kernel cannot do is left out.
            let made = unsafe { libc::mmap(at, PAGE, all, kind | libc::MAP_ANONYMOUS | libc::MAP_FIXED, -1, 0) };
            (made == at).then_some(at)
        };
        for kind in kinds {
            place(kind);
        }
        for advice in advice {
            if let Some(at) = place(libc::MAP_PRIVATE) {
                // SAFETY: advice about a page of our own, without content.
                unsafe { libc::madvise(at, PAGE, advice) };
            }
        }
        if let Some(at) = place(libc::MAP_PRIVATE) {
            // SAFETY: as above; it ends with the mapping.
            unsafe { libc::mlock(at, PAGE) };
        }
        for tracked in [true, false] {
            let Some(at) = place(libc::MAP_PRIVATE).map(|at| at as u64) else { continue };
            let uffd = Uffd::open().and_then(if tracked { Uffd::tracking } else { Uffd::filling });
            let Ok(uffd) = uffd else { continue };
            let end = at + PAGE as u64;
            let _ = if tracked { uffd.track(at, end) } else { uffd.fillable(at, end) };
            samples.uffds.push(uffd);
        }
        Ok(samples)
    }
}

impl Drop for Samples {
    fn drop(&mut self) {
        // SAFETY: our own reservation, to which nobody has a reference.
        unsafe { libc::munmap(self.start, self.len) };
    }
}

/// Writes three words for each mapping. The context is a struct bpf_iter__task_vma: meta, task, vma; meta's first member is
/// the file to write to.
fn program(start: u16, end: u16, flags: u16) -> Vec<Instruction> {
    let insn = |code: u8, dst: u8, src: u8, offset: i16, immediate: i32| Instruction {
        code,
        registers: src << 4 | dst,
        offset,
        immediate,
    };
    let load = |dst, src, offset| insn(0x79, dst, src, offset, 0);
    let store = |offset, src| insn(0x7b, 10, src, offset, 0);
    let set = |dst, value| insn(0xb7, dst, 0, 0, value);
    let copy = |dst, src| insn(0xbf, dst, src, 0, 0);
    let mut all = vec![copy(6, 1), load(7, 6, 16)];
    // At the end there is a call without a mapping: skip all up to the return value.
    all.push(insn(0x15, 7, 0, 12, 0));
    for (at, member) in [(-24, start), (-16, end), (-8, flags)] {
        all.extend([load(1, 7, member.cast_signed()), store(at, 1)]);
    }
    all.extend([load(1, 6, 0), load(1, 1, 0), copy(2, 10), insn(0x07, 2, 0, 0, -24), set(3, 24)]);
    all.extend([insn(0x85, 0, 0, 0, SEQ_WRITE), set(0, 0), insn(0x95, 0, 0, 0, 0)]);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open() -> Option<VmaFlags> {
        VmaFlags::open().inspect_err(|e| println!("SKIP no iterators over mappings: {e}")).ok()
    }

    #[test]
    fn what_smaps_says() {
        let Some(flags) = open() else { return };
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id().cast_signed();
        // Past its exec, and its start.
        let mut before = Vec::new();
        let (read, smaps) = loop {
            let smaps = proc::smaps(pid).unwrap();
            let read = flags.read(pid);
            if smaps == before {
                break (read, smaps);
            }
            before = smaps;
            std::thread::sleep(std::time::Duration::from_millis(20));
        };
        child.kill().unwrap();
        child.wait().unwrap();
        // `[vsyscall]` has none that we could know.
        let own = |all: Vec<Vma>| all.into_iter().filter(|v| v.name != b"[vsyscall]").collect::<Vec<_>>();
        assert_eq!(own(read.unwrap()), own(smaps));
        assert_eq!(flags.raw(i32::MAX).unwrap(), []);
    }

    #[test]
    fn every_flag_that_can_be_asked_for_has_a_name() {
        let Some(flags) = open() else { return };
        let names: Vec<[u8; 2]> = flags.names.values().copied().collect();
        for name in
            [b"rd", b"wr", b"ex", b"sh", b"gd", b"lo", b"sr", b"rr", b"dc", b"ac", b"nr", b"dd", b"wf", b"uw", b"um"]
        {
            assert!(
                names.contains(name),
                "{}: {}",
                String::from_utf8_lossy(name),
                String::from_utf8_lossy(&names.concat())
            );
        }
    }

    /// More than the kernel's buffer holds are read whole, or not at all.
    #[test]
    fn many_mappings() {
        use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, mprotect, munmap};
        let Some(flags) = open() else { return };
        let (len, own) = (6000 * 4096usize, std::process::id().cast_signed());
        // SAFETY: memory that only this test knows.
        unsafe {
            let at =
                mmap_anonymous(None, len.try_into().unwrap(), ProtFlags::PROT_READ, MapFlags::MAP_PRIVATE).unwrap();
            for page in (0..len).step_by(8192) {
                mprotect(at.byte_add(page), 4096, ProtFlags::PROT_NONE).unwrap();
            }
            let raw = flags.raw(own);
            munmap(at, len).unwrap();
            match raw {
                Ok(raw) => assert!(raw.len() > 6000),
                Err(e) => assert_eq!(e.kind(), ErrorKind::InvalidData, "{e}"),
            }
        }
    }
}
