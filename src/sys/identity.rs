//! The identity of the calling thread.
#![allow(unsafe_code)]

use std::io;

use libc::c_long;

fn set(call: c_long, effective: u32) -> io::Result<()> {
    // SAFETY: numbers only; -1 leaves the real and the saved id as they are. Not the C library's function: that one
    // changes all threads.
    let ret = unsafe { libc::syscall(call, u32::MAX, effective, u32::MAX) };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Runs `work` with other effective ids (setresuid(2), setresgid(2)) on this thread alone, files being reached as
/// before (setfsuid(2)). Needs CAP_SETUID and CAP_SETGID.
pub fn as_user<T>(uid: u32, gid: u32, work: impl FnOnce() -> T) -> io::Result<T> {
    let own = (nix::unistd::geteuid(), nix::unistd::getegid());
    set(libc::SYS_setresgid, gid)?;
    let become_user = set(libc::SYS_setresuid, uid);
    let result = become_user.map(|()| {
        nix::unistd::setfsuid(own.0);
        nix::unistd::setfsgid(own.1);
        work()
    });
    set(libc::SYS_setresuid, own.0.as_raw())?;
    set(libc::SYS_setresgid, own.1.as_raw())?;
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::sockopt;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_pair_is_somebody_elses() {
        if !nix::unistd::geteuid().is_root() {
            println!("SKIP needs root");
            return;
        }
        let (a, _b) = as_user(1234, 567, UnixStream::pair).unwrap().unwrap();
        let [_, uid, gid] = sockopt::get_words(a.as_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED).unwrap();
        assert_eq!((uid, gid), (1234, 567));
        assert_eq!(nix::unistd::geteuid().as_raw(), 0);
        assert_eq!(nix::unistd::getegid().as_raw(), 0);
    }
}
