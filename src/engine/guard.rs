//! The guard: a small process beside the driver that puts back what the driver changes of a container's sockets, if the
//! driver cannot.
//!
//! TCP_REPAIR and SO_PEEK_OFF belong to the socket: they stay when the process that set them is killed, and a connection
//! in repair mode is silent for ever. So before the first socket is changed, the guard holds it too. When the driver ends
//! without having dismissed it, the guard lets the sockets go on as they were. The kernel closes the files of a process
//! that dies before it lets its tracees go, so the guard has a head start on them; who wants more keeps the mode short.
//!
//! What takes the kernel long to close is its business as well ([`Guard::keep`]): it outlives the driver by that.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use libc::SOL_SOCKET;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use nix::unistd::{chdir, getpid, setsid};

use crate::sys::pidfd::PidFd;
use crate::sys::{fdpass, fds, fork, sockopt, tcp};

/// The guard could not be set up. No socket has been changed because of it.
#[derive(Debug, thiserror::Error)]
#[error("guard of the sockets: {what}")]
pub struct Error {
    what: &'static str,
    source: io::Error,
}

fn failed<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error { what, source: source.into() }
}

/// The driver's messages, one byte each. The guard answers all but the last with the same byte.
const WATCH: u8 = b'w';
const KEEP: u8 = b'k';
const COMMIT: u8 = b'c';
const DISMISS: u8 = b'd';

/// A process that watches this one. Dropped, it goes away and touches nothing, like [`Guard::dismiss`].
#[derive(Debug)]
pub struct Guard(OwnedFd);

impl Guard {
    /// Forks the guard; the caller should have a single thread.
    pub fn spawn() -> Result<Self, Error> {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .map_err(failed("socketpair"))?;
        let driver = PidFd::open(getpid().as_raw()).map_err(failed("pidfd_open"))?;
        fork::orphan(|| watch(&driver, theirs.as_fd())).map_err(failed("fork"))?;
        Ok(Self(ours))
    }

    /// Hands over `sockets` as they are to be left. When this returns they are safe.
    pub fn watch(&self, sockets: &[BorrowedFd<'_>]) -> Result<(), Error> {
        sockets.chunks(fdpass::MAX_FDS).try_for_each(|some| self.hand_over(WATCH, some))
    }

    /// Hands over a duplicate of something that the kernel takes long to close when nobody else has it any more.
    pub fn keep(&self, slow: BorrowedFd<'_>) -> Result<(), Error> {
        self.hand_over(KEEP, &[slow])
    }

    fn hand_over(&self, message: u8, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        fdpass::send(self.0.as_fd(), &[message], fds).map_err(failed("send"))?;
        match recv(self.0.as_raw_fd(), &mut [0], MsgFlags::empty()) {
            Ok(1) => Ok(()),
            Ok(_) => Err(failed("has died")(io::Error::from(io::ErrorKind::UnexpectedEof))),
            Err(e) => Err(failed("receive")(e)),
        }
    }

    /// The container is to end: if the driver ends before, the guard ends it, and its connections in silence.
    pub fn commit(&self, init: &PidFd) -> Result<(), Error> {
        self.hand_over(COMMIT, &[init.as_fd()])
    }

    /// Ends the guard: the sockets are as they were, or shall stay as they are until they are closed.
    pub fn dismiss(self) {}
}

impl Drop for Guard {
    fn drop(&mut self) {
        // It can only fail if the guard is gone already.
        let _ = fdpass::send(self.0.as_fd(), &[DISMISS], &[]);
    }
}

/// A socket that is watched, with its SO_REUSEADDR, which the end of the repair mode clears, and of a unix socket
/// SO_PEEK_OFF.
struct Watched {
    socket: OwnedFd,
    reuse: i32,
    peek_offset: Option<i32>,
}

/// The guard's life; returns its exit status.
fn watch(driver: &PidFd, socket: BorrowedFd<'_>) -> i32 {
    let mut watched = Vec::new();
    let end = follow(driver, socket, &mut watched);
    let each = |act: fn(&Watched) -> io::Result<()>| watched.iter().map(act).filter(|done| done.is_err()).count();
    let failed = match end {
        Ok(End::Dismissed) => 0,
        Ok(End::AloneAfterCommit(init)) => {
            // The connections first: nothing is to be heard of the end.
            each(|w| tcp::repair_on(w.socket.as_fd())) + usize::from(init.kill(libc::SIGKILL).is_err())
        }
        Ok(End::Alone) | Err(_) => each(go_on),
    };
    i32::from(failed > 0)
}

/// Why there is nothing to follow any more.
enum End {
    Dismissed,
    /// The driver has ended without a word.
    Alone,
    /// So it has, and the container with this init is to follow it.
    AloneAfterCommit(PidFd),
}

/// Takes what is handed over.
fn follow(driver: &PidFd, socket: BorrowedFd<'_>, watched: &mut Vec<Watched>) -> io::Result<End> {
    fds::close_from_except(0, &[socket, driver.as_fd()])?;
    // Whoever kills the driver's group or its terminal shall not kill its guard.
    setsid()?;
    chdir("/")?;
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), None)?;
    nix::sys::prctl::set_name(c"lmrun-guard")?;
    let mut kept = Vec::new();
    let mut alone = End::Alone;
    loop {
        // The socket is not enough: other children of the driver may hold its end, too.
        let mut polled = [socket, driver.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        poll(&mut polled, PollTimeout::NONE)?;
        if polled[0].any() != Some(true) {
            return Ok(alone);
        }
        let mut message = [0];
        let (len, fds) = fdpass::receive(socket, &mut message)?;
        match (len, message[0]) {
            (0, _) => return Ok(alone),
            (_, COMMIT) => {
                let init = fds.into_iter().next().ok_or(io::ErrorKind::InvalidData)?;
                alone = End::AloneAfterCommit(PidFd::from(init));
            }
            (_, DISMISS) => return Ok(End::Dismissed),
            (_, WATCH) => {
                for socket in fds {
                    let reuse = sockopt::get_int(socket.as_fd(), SOL_SOCKET, libc::SO_REUSEADDR)?;
                    let unix = sockopt::get_int(socket.as_fd(), SOL_SOCKET, libc::SO_DOMAIN)? == libc::AF_UNIX;
                    let peek_offset = || sockopt::get_int(socket.as_fd(), SOL_SOCKET, libc::SO_PEEK_OFF);
                    let peek_offset = unix.then(peek_offset).transpose()?;
                    watched.push(Watched { socket, reuse, peek_offset });
                }
            }
            (_, _) => kept.extend(fds),
        }
        send(socket.as_raw_fd(), &message, MsgFlags::MSG_NOSIGNAL)?;
    }
}

/// Lets the socket go on as it was.
fn go_on(watched: &Watched) -> io::Result<()> {
    let socket = watched.socket.as_fd();
    if let Some(offset) = watched.peek_offset {
        return sockopt::set_int(socket, SOL_SOCKET, libc::SO_PEEK_OFF, offset);
    }
    if tcp::in_repair(socket)? {
        tcp::repair_off(socket)?;
        sockopt::set_int(socket, SOL_SOCKET, libc::SO_REUSEADDR, watched.reuse)?;
    }
    Ok(())
}
