//! The running program's own file, put out of reach of the containers it enters (CVE-2019-5736: a
//! process in a container opens `/proc/PID/exe` of the runtime and writes to it once it has exited).
//!
//! The program executes itself again from a place that cannot be written to. Where it can, it does so before anything
//! else, at [`lmrun_entry`]: the C library's start takes half a millisecond in a virtual machine (it executes CPUID
//! some fifty times to learn about caches, and each goes to the hypervisor), and would be gone through twice.
#![allow(unsafe_code)]

use std::arch::naked_asm;
use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, FcntlArg, SealFlag, fcntl};
use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::statvfs::{FsFlags, fstatvfs};
use nix::unistd::execveat;

const EXE: &str = "/proc/self/exe";

/// Commands that fork what may become or enter a container; each ends with a zero byte, and the list with another.
static ENTERING: [u8; 33] = *b"create\0exec\0receive\0restore\0run\0\0";

/// Whether a process that lmrun forks may become or enter a container: whether a word of the command line is the name of such a
/// command. Asked before the command line is parsed: a container that is called like one of them costs an
/// execve(2), and that is all.
pub fn is_to_be_sealed(mut argv: impl Iterator<Item = OsString>) -> bool {
    let commands = || ENTERING.split(|byte| *byte == 0).filter(|command| !command.is_empty());
    argv.any(|word| commands().any(|command| word.as_bytes() == command))
}

/// Where the kernel enters the program (`build.rs` tells the linker): does what [`execute_sealed`] does first, if
/// it [`is_to_be_sealed`] and is not, and goes on to the C library's `_start`. It does so, too, where
/// anything fails: `main` tries again, and can say why.
///
/// Nothing is relocated yet and there is no C library, hence assembler: the stack has argc, argv and the environment (System V
/// ABI for AMD64, 3.4.1), registers hold nothing but rdx, which `_start` gets as it is.
///
/// # Safety
/// For the kernel alone.
#[unsafe(naked)]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lmrun_entry() -> ! {
    naked_asm!(
        "mov r12, rdx",
        "mov r13, rsp",
        "lea r14, [rsp + 8]", // argv, from its second word on
        "mov rax, [rsp]",
        "lea r15, [rsp + 8 * rax + 16]", // the environment
        "2:",
        "add r14, 8",
        "mov rsi, [r14]",
        "test rsi, rsi",
        "jz 9f",
        "lea rdi, [rip + {commands}]",
        "3:", // does the word at rsi equal the command at rdi?
        "xor ecx, ecx",
        "4:",
        "mov al, [rdi + rcx]",
        "cmp al, [rsi + rcx]",
        "jne 5f",
        "inc rcx",
        "test al, al",
        "jnz 4b",
        "jmp 6f",
        "5:", // no: the next command, or word
        "inc rdi",
        "cmp byte ptr [rdi - 1], 0",
        "jne 5b",
        "cmp byte ptr [rdi], 0",
        "jne 3b",
        "jmp 2b",
        "6:", // struct statfs, then struct mount_attr, are on the stack
        "sub rsp, 128",
        "lea rdi, [rip + {exe}]",
        "mov rsi, rsp",
        "mov eax, {statfs}",
        "syscall",
        "test rax, rax",
        "jnz 9f",
        "test byte ptr [rsp + {f_flags}], {read_only}",
        "jnz 9f",
        "mov edi, {at_cwd}",
        "lea rsi, [rip + {exe}]",
        "mov edx, {copy}",
        "mov eax, {open_tree}",
        "syscall",
        "test eax, eax",
        "js 9f",
        "mov ebx, eax",
        "mov qword ptr [rsp], {set_read_only}",
        "mov qword ptr [rsp + 8], 0",
        "mov qword ptr [rsp + 16], 0",
        "mov qword ptr [rsp + 24], 0",
        "mov edi, ebx",
        "lea rsi, [rip + {exe} + {end_of_exe}]", // ""
        "mov edx, {empty_path}",
        "mov r10, rsp",
        "mov r8d, 32",
        "mov eax, {mount_setattr}",
        "syscall",
        "test rax, rax",
        "jnz 8f",
        "mov edi, ebx",
        "lea rsi, [rip + {exe} + {end_of_exe}]",
        "lea rdx, [r13 + 8]",
        "mov r10, r15",
        "mov r8d, {empty_path}",
        "mov eax, {execveat}",
        "syscall",
        "8:",
        "mov edi, ebx",
        "mov eax, {close}",
        "syscall",
        "9:",
        "mov rsp, r13",
        "mov rdx, r12",
        "jmp {start}",
        commands = sym ENTERING,
        exe = sym EXE_PATH,
        end_of_exe = const EXE.len(),
        statfs = const libc::SYS_statfs,
        f_flags = const F_FLAGS,
        read_only = const libc::ST_RDONLY,
        at_cwd = const libc::AT_FDCWD,
        copy = const libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC,
        open_tree = const libc::SYS_open_tree,
        set_read_only = const libc::MOUNT_ATTR_RDONLY,
        empty_path = const libc::AT_EMPTY_PATH,
        mount_setattr = const libc::SYS_mount_setattr,
        execveat = const libc::SYS_execveat,
        close = const libc::SYS_close,
        start = sym _start,
    )
}

static EXE_PATH: [u8; 15] = *b"/proc/self/exe\0";
/// Offset of `f_flags` in struct statfs (include/uapi/asm-generic/statfs.h, filled in since 2.6.36), in bytes.
const F_FLAGS: usize = 80;
const _: () = assert!(size_of::<libc::statfs>() <= 128 && size_of::<libc::mount_attr>() == 32);

unsafe extern "C" {
    /// The C library's.
    fn _start() -> !;
}

/// Whether nobody can write to the program through its own `/proc/PID/exe`: it runs from a read-only mount
/// or a sealed memfd.
///
/// # Errors
/// /proc is missing.
pub fn is_sealed() -> io::Result<bool> {
    let exe = File::open(EXE)?;
    let read_only = fstatvfs(&exe)?.flags().contains(FsFlags::ST_RDONLY);
    // Not a memfd: EINVAL.
    let seals = fcntl(&exe, FcntlArg::F_GET_SEALS).map_or(SealFlag::empty(), SealFlag::from_bits_truncate);
    Ok(read_only || seals.contains(SealFlag::F_SEAL_WRITE))
}

/// Executes the program again, with the same arguments and environment, from a place that
/// [`is_sealed`] holds for: a read-only mount of its file that is in no mount namespace, or where that cannot
/// be made a sealed copy in memory. Returns only on failure.
///
/// # Errors
/// Why neither could be made, or execve(2) failed.
pub fn execute_sealed() -> io::Error {
    match read_only_mount().or_else(|_| sealed_copy()) {
        Ok(exe) => execute(exe.as_fd()),
        Err(error) => error,
    }
}

/// open_tree(2) since Linux 5.2, mount_setattr(2) since 5.12; both need CAP_SYS_ADMIN.
fn read_only_mount() -> io::Result<OwnedFd> {
    let path = CString::new(EXE)?;
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    // SAFETY: the path lives until the call returns; the result is checked before it is taken for a descriptor.
    let tree = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    let tree = Errno::result(tree)? as i32;
    // SAFETY: the kernel has just given us this descriptor and nobody else knows it.
    let tree = unsafe { OwnedFd::from_raw_fd(tree) };
    let attributes = libc::mount_attr { attr_set: libc::MOUNT_ATTR_RDONLY, attr_clr: 0, propagation: 0, userns_fd: 0 };
    let size = size_of::<libc::mount_attr>();
    // SAFETY: an empty path with AT_EMPTY_PATH means the descriptor; the kernel reads `size` bytes of a live struct.
    let set = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size,
        )
    };
    Errno::result(set)?;
    Ok(tree)
}

fn sealed_copy() -> io::Result<OwnedFd> {
    let copy = memfd_create("lmrun", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?;
    let mut copy = File::from(copy);
    io::copy(&mut File::open(EXE)?, &mut copy)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_SEAL;
    fcntl(&copy, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(copy.into())
}

fn execute(exe: impl AsFd) -> io::Error {
    let strings = |words: Vec<Vec<u8>>| words.into_iter().map(CString::new).collect::<Result<Vec<_>, _>>();
    let bytes = |word: &OsStr| word.as_bytes().to_vec();
    let arguments = strings(std::env::args_os().map(|word| bytes(&word)).collect());
    let environment =
        strings(std::env::vars_os().map(|(name, value)| [bytes(&name), bytes(&value)].join(&b'=')).collect());
    let (arguments, environment) = match (arguments, environment) {
        (Ok(arguments), Ok(environment)) => (arguments, environment),
        (Err(e), _) | (_, Err(e)) => return e.into(),
    };
    match execveat(exe, c"", &arguments, &environment, AtFlags::AT_EMPTY_PATH) {
        Ok(never) => match never {},
        Err(errno) => errno.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_enters_a_container_is_sealed() {
        let asked = |line: &str| is_to_be_sealed(line.split(' ').map(OsString::from));
        for line in ["lmrun run -b B c", "lmrun --root /r create c", "lmrun exec c true", "lmrun receive"] {
            assert!(asked(line), "{line}");
        }
        for line in ["lmrun state c", "lmrun --version", "lmrun runs", "lmrun ex", "lmrun "] {
            assert!(!asked(line), "{line}");
        }
    }
}
