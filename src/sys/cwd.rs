//! The working directory, asked of the kernel and not of the C library, which helps itself by other means where
//! the kernel cannot say.
#![allow(unsafe_code)]

use nix::errno::Errno;
use nix::libc;

/// Whether the working directory can be reached from the root directory. getcwd(2): outside of it the path that
/// the kernel gives does not begin with a slash; a directory that was removed has none at all.
pub fn is_below_root() -> bool {
    let mut path = vec![0_u8; libc::PATH_MAX as usize];
    // SAFETY: the kernel writes at most the length given.
    let result = unsafe { libc::syscall(libc::SYS_getcwd, path.as_mut_ptr(), path.len()) };
    Errno::result(result).is_ok() && path[0] == b'/'
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_run_below_the_root() {
        assert!(is_below_root());
    }
}
