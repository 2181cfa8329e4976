//! Reading and writing that does not wait for ever.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// How long one read or write of a connection may take. Clones share it; it can be changed at any time, and holds from the
/// next read or write.
#[derive(Clone, Debug)]
pub struct Patience {
    /// In milliseconds.
    limit: Arc<AtomicU64>,
    /// Where the kernel does the waiting.
    socket: Option<Arc<TcpStream>>,
}

impl Patience {
    pub(super) fn new(limit: Duration) -> Self {
        let patience = Patience { limit: Arc::default(), socket: None };
        patience.set(limit);
        patience
    }

    pub(super) fn of_socket(socket: &TcpStream, limit: Duration) -> io::Result<Self> {
        let patience = Patience { limit: Arc::default(), socket: Some(Arc::new(socket.try_clone()?)) };
        patience.set(limit);
        Ok(patience)
    }

    /// From now on it takes so long to be taken for silence; at least a millisecond.
    pub fn set(&self, limit: Duration) {
        let limit = limit.max(Duration::from_millis(1));
        self.limit.store(limit.as_millis() as u64, Ordering::Relaxed);
        if let Some(socket) = &self.socket {
            // Fails for a timeout of zero alone.
            let _ = socket.set_read_timeout(Some(limit));
            let _ = socket.set_write_timeout(Some(limit));
        }
    }

    pub(super) fn reader(&self, from: OwnedFd) -> PatientReader {
        PatientReader { from: from.into(), patience: self.clone() }
    }

    /// The descriptor becomes one that does not block.
    pub(super) fn writer(&self, to: OwnedFd) -> io::Result<PatientWriter> {
        let flags = OFlag::from_bits_retain(fcntl(&to, FcntlArg::F_GETFL)?);
        fcntl(&to, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(PatientWriter { to: to.into(), patience: self.clone() })
    }

    fn wait(&self, fd: impl AsFd, until: PollFlags) -> io::Result<()> {
        let limit = PollTimeout::try_from(self.limit.load(Ordering::Relaxed)).unwrap_or(PollTimeout::MAX);
        loop {
            match poll(&mut [PollFd::new(fd.as_fd(), until)], limit) {
                Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

pub(super) struct PatientReader {
    from: File,
    patience: Patience,
}

impl Read for PatientReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            self.patience.wait(&self.from, PollFlags::POLLIN)?;
            match self.from.read(buf) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                done => return done,
            }
        }
    }
}

pub(super) struct PatientWriter {
    to: File,
    patience: Patience,
}

impl Write for PatientWriter {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        loop {
            match self.to.write(buf) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.patience.wait(&self.to, PollFlags::POLLOUT)?,
                done => return done,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
