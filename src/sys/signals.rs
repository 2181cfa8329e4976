//! What a program inherits of its parent's signal handling, undone.
#![allow(unsafe_code)]

use nix::libc;

/// Sets every signal to its default action and unblocks all. Rust's runtime ignores
/// SIGPIPE, and ignored signals survive execve(2): a workload must not inherit that.
pub fn reset_all() {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: SIG_DFL runs no code of ours. The signals that cannot be set (SIGKILL,
        // SIGSTOP, those libc keeps for itself) give an error that changes nothing.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // libc keeps two real-time signals to itself and leaves them out of its sets: the
    // kernel's own call, with the kernel's own set of 64 bits.
    let none = 0_u64;
    // SAFETY: the kernel reads 8 bytes from a live u64 and writes nothing back.
    unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const none,
            std::ptr::null_mut::<u64>(),
            8,
        )
    };
}
