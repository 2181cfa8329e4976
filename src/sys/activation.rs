//! Sockets that systemd has opened for us: sd_listen_fds(3).
#![allow(unsafe_code)]

use std::net::TcpListener;
use std::os::fd::FromRawFd;
use std::sync::atomic::{AtomicBool, Ordering};

use libc::c_int;

use super::sockopt;

/// SD_LISTEN_FDS_START: the first of them.
const FIRST: c_int = 3;

/// The listening TCP socket that this process was started with, if it was; the first call takes it.
///
/// # Errors
/// There are other or more sockets than one.
pub fn listener() -> std::io::Result<Option<TcpListener>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u32>().ok());
    // Whoever inherits the variables does not inherit the sockets.
    if number("LISTEN_PID") != Some(std::process::id()) || TAKEN.swap(true, Ordering::SeqCst) {
        return Ok(None);
    }
    let wrong = |what| Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, what));
    match number("LISTEN_FDS") {
        None | Some(0) => return Ok(None),
        Some(1) => {}
        Some(_) => return wrong("systemd has passed several sockets; one is expected"),
    }
    // SAFETY: by the protocol of sd_listen_fds(3), which the variables speak of, the descriptor is ours; the flag above
    // is why it is owned once.
    let listener = unsafe { TcpListener::from_raw_fd(FIRST) };
    let option = |name| sockopt::get_int(std::os::fd::AsFd::as_fd(&listener), libc::SOL_SOCKET, name);
    if option(libc::SO_ACCEPTCONN)? == 0 || option(libc::SO_PROTOCOL)? != libc::IPPROTO_TCP {
        return wrong("the socket that systemd has passed is not a listening TCP socket; hint: Accept=no");
    }
    // It was left open for us alone.
    nix::fcntl::fcntl(&listener, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
    listener.set_nonblocking(false)?;
    Ok(Some(listener))
}
