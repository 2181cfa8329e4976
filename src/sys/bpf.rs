//! bpf(2), and programs that decide which devices a cgroup may use (BPF_PROG_TYPE_CGROUP_DEVICE, since Linux 4.15).
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;

/// One instruction of extended BPF (include/uapi/linux/bpf.h, struct bpf_insn).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Instruction {
    pub code: u8,
    /// Destination register in the low half, source register in the high half.
    pub registers: u8,
    pub offset: i16,
    pub immediate: i32,
}

const _: () = assert!(size_of::<Instruction>() == 8);

// enum bpf_cmd, bpf_prog_type, bpf_attach_type; flags of BPF_PROG_ATTACH.
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
const BPF_F_ALLOW_MULTI: u32 = 2;

/// The head of union bpf_attr for BPF_PROG_LOAD; the kernel takes what is not there for zero.
#[repr(C)]
struct LoadAttributes {
    prog_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    prog_flags: u32,
}

const _: () = assert!(size_of::<LoadAttributes>() == 48);

/// The head of union bpf_attr for BPF_PROG_ATTACH.
#[repr(C)]
struct AttachAttributes {
    target: i32,
    program: i32,
    attach_type: u32,
    flags: u32,
}

/// A command that gives a descriptor.
///
/// # Safety
/// `attributes` is what the command takes (union bpf_attr), and what it points to is readable.
pub(super) unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> nix::Result<OwnedFd> {
    // SAFETY: by the caller's word.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, command, &raw const *attributes, size_of::<T>()) };
    // SAFETY: the kernel has just given us this descriptor and nobody else knows it.
    Errno::result(fd).map(|fd| unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Has `program` decide about devices for the tasks in `cgroup`, a directory of a cgroup2
/// hierarchy, besides the programs that are there. It ends when the cgroup is removed.
///
/// # Errors
/// `EPERM` without CAP_BPF and CAP_NET_ADMIN (or CAP_SYS_ADMIN), `EINVAL` for a program that the verifier refuses.
pub fn attach_device_program(cgroup: impl AsFd, program: &[Instruction]) -> nix::Result<()> {
    let load = LoadAttributes {
        prog_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        instruction_count: u32::try_from(program.len()).map_err(|_| Errno::E2BIG)?,
        instructions: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log_buffer: 0,
        kernel_version: 0,
        prog_flags: 0,
    };
    // SAFETY: the kernel reads the attributes, and through them the program and the license, all of which live
    // until the call returns.
    let loaded = unsafe { bpf(BPF_PROG_LOAD, &load) }?;
    let attach = AttachAttributes {
        target: cgroup.as_fd().as_raw_fd(),
        program: loaded.as_raw_fd(),
        attach_type: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    // SAFETY: the kernel reads the attributes; both descriptors are open.
    let attached = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attach, size_of_val(&attach)) };
    Errno::result(attached).map(drop)
}
