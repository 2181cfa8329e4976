//! The guard: a small child that ends TCP_REPAIR if the driver cannot.
//!
//! The mode belongs to the socket: it stays when the process that set it is killed, and a connection in it is
//! silent for ever. So before the first socket enters the mode, a child holds it too. When the driver ends without
//! having dismissed it, the child lets the connections go on.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use libc::SOL_SOCKET;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use nix::sys::wait::waitpid;
use nix::unistd::{Pid, getpid, getppid, setsid};

use crate::sys::pidfd::PidFd;
use crate::sys::{fdpass, fds, fork, sockopt, tcp};

/// The guard could not be set up. No socket is in repair mode because of it.
#[derive(Debug, thiserror::Error)]
#[error("guard of the TCP connections: {what}")]
pub struct Error {
    what: &'static str,
    source: io::Error,
}

fn failed<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error {
        what,
        source: source.into(),
    }
}

/// A child that watches this process. Dropped, it goes away and touches nothing, like [`Guard::dismiss`].
#[derive(Debug)]
pub struct Guard {
    pid: Pid,
    socket: OwnedFd,
}

impl Guard {
    /// Forks the guard; the caller should have a single thread. Before any container is frozen.
    pub fn spawn() -> Result<Self, Error> {
        let (socket, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .map_err(failed("socketpair"))?;
        let driver = getpid();
        let pid = fork::child(|| watch(driver, theirs)).map_err(failed("fork"))?;
        Ok(Self { pid, socket })
    }

    /// Hands over `sockets`, which must not be in repair mode yet. When this returns they are safe.
    pub fn watch(&self, sockets: &[BorrowedFd<'_>]) -> Result<(), Error> {
        for some in sockets.chunks(fdpass::MAX_FDS) {
            fdpass::send(self.socket.as_fd(), &[0], some).map_err(failed("send"))?;
            let mut ack = [0];
            match recv(self.socket.as_raw_fd(), &mut ack, MsgFlags::empty()) {
                Ok(1) => {}
                Ok(_) => {
                    return Err(failed("has died")(io::Error::from(
                        io::ErrorKind::UnexpectedEof,
                    )));
                }
                Err(e) => return Err(failed("receive")(e)),
            }
        }
        Ok(())
    }

    /// Ends the guard: the sockets are out of repair mode, or shall stay in it until they are closed.
    pub fn dismiss(self) {}
}

impl Drop for Guard {
    fn drop(&mut self) {
        // Both can only say that the guard is gone already.
        let _ = kill(self.pid, Signal::SIGKILL);
        let _ = waitpid(self.pid, None);
    }
}

/// A socket that is watched, and its SO_REUSEADDR, which the end of the repair mode clears.
struct Watched {
    socket: OwnedFd,
    reuse: i32,
}

/// The guard's life; returns its exit status.
fn watch(driver: Pid, socket: OwnedFd) -> i32 {
    let mut watched = Vec::new();
    if follow(driver, socket.as_fd(), &mut watched).is_err() {
        return 1;
    }
    i32::from(watched.iter().map(restore).filter(Result::is_err).count() > 0)
}

/// Takes what is handed over, until the driver has ended.
fn follow(driver: Pid, socket: BorrowedFd<'_>, watched: &mut Vec<Watched>) -> io::Result<()> {
    fds::close_all_except(&[socket])?;
    // Whoever kills the driver's group or its terminal shall not kill its guard.
    setsid()?;
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None)?;
    nix::sys::prctl::set_name(c"lmrun-guard")?;
    // The socket is not enough: other children of the driver may hold its end, too.
    let life = PidFd::open(driver.as_raw())?;
    while getppid() == driver {
        let mut polled = [
            PollFd::new(socket, PollFlags::POLLIN),
            PollFd::new(life.as_fd(), PollFlags::POLLIN),
        ];
        poll(&mut polled, PollTimeout::NONE)?;
        if polled[1].any() == Some(true) {
            break;
        }
        let (len, sockets) = fdpass::receive(socket, &mut [0])?;
        if len == 0 {
            break;
        }
        for socket in sockets {
            let reuse = sockopt::get_int(socket.as_fd(), SOL_SOCKET, libc::SO_REUSEADDR)?;
            watched.push(Watched { socket, reuse });
        }
        send(socket.as_raw_fd(), &[0], MsgFlags::MSG_NOSIGNAL)?;
    }
    Ok(())
}

/// Lets the connection go on if it is silent.
fn restore(watched: &Watched) -> io::Result<()> {
    let socket = watched.socket.as_fd();
    if tcp::in_repair(socket)? {
        tcp::repair_off(socket)?;
        sockopt::set_int(socket, SOL_SOCKET, libc::SO_REUSEADDR, watched.reuse)?;
    }
    Ok(())
}
