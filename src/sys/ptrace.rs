//! ptrace(2) requests, typed. All act on a task that the calling *thread* has seized.
#![allow(unsafe_code)]

use std::io;
use std::mem::size_of;

use libc::{c_int, c_long, c_uint, pid_t};

pub use libc::user_regs_struct as Regs;

// include/uapi/linux/ptrace.h
const SEIZE: c_uint = 0x4206;
const INTERRUPT: c_uint = 0x4207;
const GETREGSET: c_uint = 0x4204;
const SETREGSET: c_uint = 0x4205;
const PEEKSIGINFO: c_uint = 0x4209;
const GETSIGMASK: c_uint = 0x420a;
const SETSIGMASK: c_uint = 0x420b;
const SECCOMP_GET_FILTER: c_uint = 0x420c;
const SECCOMP_GET_METADATA: c_uint = 0x420d;
const GET_RSEQ_CONFIGURATION: c_uint = 0x420f;

/// include/uapi/linux/elf.h
const NT_PRSTATUS: usize = 1;
const NT_X86_XSTATE: usize = 0x202;

/// Seize options. `EXITKILL`: the tracee dies with its tracer.
pub const O_TRACESYSGOOD: usize = 1;
pub const O_TRACEFORK: usize = 1 << 1;
pub const O_TRACEVFORK: usize = 1 << 2;
pub const O_TRACECLONE: usize = 1 << 3;
pub const O_EXITKILL: usize = 1 << 20;
/// Since 4.3: filters do not run while the task is traced. Needs CAP_SYS_ADMIN.
pub const O_SUSPEND_SECCOMP: usize = 1 << 21;

pub const EVENT_STOP: c_int = 128;

fn request(req: c_uint, tid: pid_t, addr: usize, data: usize) -> io::Result<c_long> {
    // SAFETY: every caller below passes, for the request it names, an `addr`/`data` pair that is either
    // a plain number or the address of a live object of the size the request expects.
    let r = unsafe { libc::ptrace(req as _, tid, addr, data) };
    if r < 0 { Err(io::Error::last_os_error()) } else { Ok(r) }
}

/// Attaches without stopping the task.
pub fn seize(tid: pid_t, options: usize) -> io::Result<()> {
    request(SEIZE, tid, 0, options).map(drop)
}

pub fn set_options(tid: pid_t, options: usize) -> io::Result<()> {
    request(libc::PTRACE_SETOPTIONS, tid, 0, options).map(drop)
}

/// Asks a seized task to stop; the stop is reported as [`EVENT_STOP`].
pub fn interrupt(tid: pid_t) -> io::Result<()> {
    request(INTERRUPT, tid, 0, 0).map(drop)
}

/// Resumes, delivering `signal` (0: none).
pub fn cont(tid: pid_t, signal: c_int) -> io::Result<()> {
    request(libc::PTRACE_CONT, tid, 0, signal as usize).map(drop)
}

/// Resumes until the next entry to or exit from a system call.
pub fn syscall(tid: pid_t) -> io::Result<()> {
    request(libc::PTRACE_SYSCALL, tid, 0, 0).map(drop)
}

pub fn detach(tid: pid_t, signal: c_int) -> io::Result<()> {
    request(libc::PTRACE_DETACH, tid, 0, signal as usize).map(drop)
}

/// The number that goes with the last event: the new task's pid for a fork or clone.
pub fn event_message(tid: pid_t) -> io::Result<u64> {
    let mut m = 0u64;
    request(libc::PTRACE_GETEVENTMSG, tid, 0, &raw mut m as usize)?;
    Ok(m)
}

/// Registers that are all zero.
pub fn zeroed_regs() -> Regs {
    // SAFETY: Regs is plain integers; all zeroes is a value of it.
    unsafe { std::mem::zeroed() }
}

pub fn regs(tid: pid_t) -> io::Result<Regs> {
    let mut r = zeroed_regs();
    let mut iov = libc::iovec { iov_base: (&raw mut r).cast(), iov_len: size_of::<Regs>() };
    request(GETREGSET, tid, NT_PRSTATUS, &raw mut iov as usize)?;
    Ok(r)
}

pub fn set_regs(tid: pid_t, r: &Regs) -> io::Result<()> {
    let mut iov = libc::iovec { iov_base: (&raw const *r).cast_mut().cast(), iov_len: size_of::<Regs>() };
    request(SETREGSET, tid, NT_PRSTATUS, &raw mut iov as usize).map(drop)
}

/// The whole xsave area in the kernel's (non-compacted) layout; its size is the kernel's choice.
pub fn xstate(tid: pid_t) -> io::Result<Vec<u8>> {
    let mut size = 16 * 1024;
    loop {
        let mut buf = vec![0u8; size];
        let mut iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
        request(GETREGSET, tid, NT_X86_XSTATE, &raw mut iov as usize)?;
        if iov.iov_len < size {
            buf.truncate(iov.iov_len);
            return Ok(buf);
        }
        size *= 2;
    }
}

pub fn set_xstate(tid: pid_t, area: &[u8]) -> io::Result<()> {
    let mut iov = libc::iovec { iov_base: area.as_ptr().cast_mut().cast(), iov_len: area.len() };
    request(SETREGSET, tid, NT_X86_XSTATE, &raw mut iov as usize).map(drop)
}

/// Signal mask, bit n-1 for signal n.
pub fn sigmask(tid: pid_t) -> io::Result<u64> {
    let mut m = 0u64;
    request(GETSIGMASK, tid, size_of::<u64>(), &raw mut m as usize)?;
    Ok(m)
}

pub fn set_sigmask(tid: pid_t, mask: u64) -> io::Result<()> {
    request(SETSIGMASK, tid, size_of::<u64>(), &raw const mask as usize).map(drop)
}

/// Bytes of `siginfo_t`.
pub const SIGINFO_SIZE: usize = 128;

/// Pending signals in queue order, without dequeueing them; `shared`: those of the process, else of the thread.
pub fn pending_signals(tid: pid_t, shared: bool) -> io::Result<Vec<[u8; SIGINFO_SIZE]>> {
    #[repr(C)]
    struct Args {
        off: u64,
        flags: u32,
        nr: i32,
    }
    const BATCH: usize = 32;
    let mut all = Vec::new();
    loop {
        let args = Args { off: all.len() as u64, flags: shared as u32, nr: BATCH as i32 };
        let mut buf = [[0u8; SIGINFO_SIZE]; BATCH];
        let n = request(PEEKSIGINFO, tid, &raw const args as usize, &raw mut buf as usize)? as usize;
        all.extend_from_slice(&buf[..n]);
        if n < BATCH {
            return Ok(all);
        }
    }
}

/// `struct ptrace_rseq_configuration`, since 5.13. `pointer` 0: not registered.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rseq {
    pub pointer: u64,
    pub size: u32,
    pub signature: u32,
    pub flags: u32,
    pad: u32,
}
const _: () = assert!(size_of::<Rseq>() == 24);

pub fn rseq(tid: pid_t) -> io::Result<Rseq> {
    let mut c = Rseq::default();
    request(GET_RSEQ_CONFIGURATION, tid, size_of::<Rseq>(), &raw mut c as usize)?;
    Ok(c)
}

/// One installed seccomp program: `struct sock_filter`s as bytes, and its SECCOMP_FILTER_FLAG_* flags.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeccompFilter {
    pub program: Vec<u8>,
    pub flags: u32,
}

/// All programs of a task, the oldest first. Needs CAP_SYS_ADMIN and no filter on the caller.
pub fn seccomp_filters(tid: pid_t) -> io::Result<Vec<SeccompFilter>> {
    let mut all = Vec::new();
    loop {
        let index = all.len();
        let count = match request(SECCOMP_GET_FILTER, tid, index, 0) {
            Ok(n) => n as usize,
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => return Ok(all),
            Err(e) => return Err(e),
        };
        let mut program = vec![0u8; count * 8];
        request(SECCOMP_GET_FILTER, tid, index, program.as_mut_ptr() as usize)?;
        #[repr(C)]
        struct Metadata {
            filter_off: u64,
            flags: u64,
        }
        let mut meta = Metadata { filter_off: index as u64, flags: 0 };
        request(SECCOMP_GET_METADATA, tid, size_of::<Metadata>(), &raw mut meta as usize)?;
        all.push(SeccompFilter { program, flags: meta.flags as u32 });
    }
}

/// What waitpid(2) said of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Exited(c_int),
    Killed(c_int),
    /// Entry to or exit from a system call (with `O_TRACESYSGOOD`).
    SyscallStop,
    /// A ptrace event (`PTRACE_EVENT_*`) with the signal that came with it.
    Event(c_int, c_int),
    /// About to receive this signal.
    Signal(c_int),
}

fn decode(status: c_int) -> Status {
    if libc::WIFEXITED(status) {
        Status::Exited(libc::WEXITSTATUS(status))
    } else if libc::WIFSIGNALED(status) {
        Status::Killed(libc::WTERMSIG(status))
    } else {
        match (status >> 16, libc::WSTOPSIG(status)) {
            (0, s) if s == libc::SIGTRAP | 0x80 => Status::SyscallStop,
            (0, s) => Status::Signal(s),
            (e, s) => Status::Event(e, s),
        }
    }
}

/// Waits for one task. `None` only with `nohang`, when nothing has happened yet.
pub fn wait(tid: pid_t, nohang: bool) -> io::Result<Option<Status>> {
    let mut status = 0;
    let flags = libc::__WALL | if nohang { libc::WNOHANG } else { 0 };
    loop {
        // SAFETY: `status` is a live c_int.
        match unsafe { libc::waitpid(tid, &mut status, flags) } {
            0 => return Ok(None),
            n if n > 0 => return Ok(Some(decode(status))),
            _ => {
                let e = io::Error::last_os_error();
                if e.kind() != io::ErrorKind::Interrupted {
                    return Err(e);
                }
            }
        }
    }
}
