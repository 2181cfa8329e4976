//! What a program inherits of its parent's signal handling.
#![allow(unsafe_code)]

use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::libc;
use nix::sys::signal::{SigHandler, Signal, signal};

/// struct sigaction as the kernel has it on x86_64 (arch/x86/include/uapi/asm/signal.h).
#[repr(C)]
struct Action {
    handler: usize,
    flags: u64,
    restorer: usize,
    mask: u64,
}

const _: () = assert!(size_of::<Action>() == 32);

/// Sets every signal to its default action and unblocks all. Rust's runtime ignores
/// SIGPIPE, and ignored signals survive execve(2): a workload must not inherit that.
pub fn reset_all() {
    // By the kernel's own calls: libc keeps two real-time signals to itself, and whoever
    // started us may have had them ignored.
    let default = Action { handler: libc::SIG_DFL, flags: 0, restorer: 0, mask: 0 };
    let old = std::ptr::null_mut::<Action>();
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: the kernel reads a live struct laid out as its own and writes nothing back; SIG_DFL runs no
        // code of ours. SIGKILL and SIGSTOP give an error that changes nothing.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, &raw const default, old, 8) };
    }
    let (none, old) = (0_u64, std::ptr::null_mut::<u64>());
    let how = libc::SIG_SETMASK;
    // SAFETY: the kernel reads 8 bytes from a live u64 and writes nothing back.
    unsafe { libc::syscall(libc::SYS_rt_sigprocmask, how, &raw const none, old, 8) };
}

/// The program will ignore these signals, if it does not say otherwise itself.
pub fn ignore_in(command: &mut Command, signals: &'static [Signal]) {
    let ignore = move || {
        signals.iter().try_for_each(|&one| {
            // SAFETY: SIG_IGN runs no code of ours; sigaction(2) may be called between fork(2) and execve(2).
            unsafe { signal(one, SigHandler::SigIgn) }.map(drop).map_err(Into::into)
        })
    };
    // SAFETY: the closure makes system calls only: it allocates nothing and takes no locks.
    unsafe { command.pre_exec(ignore) };
}
