//! `vm_flags` of mappings, from an iterator over them in the kernel (Documentation/bpf/bpf_iterators.rst, since 5.12; of one
//! task, since 6.1). `/proc/PID/smaps` says the same, but walks the page tables for it.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsRawFd, OwnedFd};

use libc::pid_t;

use super::bpf::{Instruction, bpf};
use super::btf::Btf;

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

/// A mapping: its bounds, and `vm_flags`, whose bits are the kernel's own affair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RawVma {
    pub start: u64,
    pub end: u64,
    pub flags: u64,
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
        Ok(VmaFlags { program: unsafe { bpf(BPF_PROG_LOAD, &load) }? })
    }

    /// All mappings of a process in ascending order, without `[vsyscall]`, which is none of its own.
    ///
    /// None for a process that is gone.
    ///
    /// # Errors
    /// What bpf(2) says; `InvalidData` where there are so many that they cannot be read at once.
    pub fn read(&self, pid: pid_t) -> io::Result<Vec<RawVma>> {
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
    use crate::sys::proc;

    #[test]
    fn flags_tell_apart_what_smaps_tells_apart() {
        let flags = match VmaFlags::open() {
            Ok(flags) => flags,
            Err(e) => {
                println!("SKIP no iterators over mappings: {e}");
                return;
            }
        };
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id().cast_signed();
        // Past its exec, and its start.
        let mut before = Vec::new();
        let (raw, smaps) = loop {
            let (raw, smaps) = (flags.read(pid), proc::smaps(pid).unwrap());
            match raw {
                Ok(raw) if raw == before && !smaps.is_empty() => break (raw, smaps),
                raw => before = raw.unwrap_or_default(),
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        };
        child.kill().unwrap();
        child.wait().unwrap();
        let own: Vec<_> = smaps.iter().filter(|v| v.name != b"[vsyscall]").collect();
        let bounds: Vec<_> = own.iter().map(|v| (v.start, v.end)).collect();
        assert!(raw.iter().map(|v| (v.start, v.end)).eq(bounds.iter().copied()), "{raw:x?}\n{bounds:x?}");
        for (a, x) in raw.iter().zip(&own) {
            for (b, y) in raw.iter().zip(&own) {
                if a.flags == b.flags {
                    assert_eq!(x.flags, y.flags, "{a:x?} {b:x?}");
                }
            }
        }
        assert_eq!(flags.read(i32::MAX).unwrap(), []);
    }

    /// More than the kernel's buffer holds are read whole, or not at all.
    #[test]
    fn many_mappings() {
        use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, mprotect, munmap};
        let Ok(flags) = VmaFlags::open() else { return };
        let len = 6000 * 4096usize;
        // SAFETY: memory that only this test knows.
        unsafe {
            let at =
                mmap_anonymous(None, len.try_into().unwrap(), ProtFlags::PROT_READ, MapFlags::MAP_PRIVATE).unwrap();
            for page in (0..len).step_by(8192) {
                mprotect(at.byte_add(page), 4096, ProtFlags::PROT_NONE).unwrap();
            }
            let (raw, maps) =
                (flags.read(std::process::id().cast_signed()), proc::maps(std::process::id().cast_signed()));
            munmap(at, len).unwrap();
            match raw {
                Ok(raw) => assert!(raw.len() > 6000 && raw.len() >= maps.unwrap().len() - 1),
                Err(e) => assert_eq!(e.kind(), ErrorKind::InvalidData, "{e}"),
            }
        }
    }
}
