//! SCMP_ACT_NOTIFY: the descriptor on which an agent answers for the kernel.
//!
//! The agent listens on a socket of the host; it gets the descriptor with a message (runtime specification,
//! config-linux.md, "The Container Process State"). The process that installs the filter may not be allowed to send
//! it any more, nor to do anything else: a second thread, which has no filter, sends it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use libcontainer::container::State;
use serde_json::json;

use crate::sys::fdpass;

/// The agent of one profile, as config.json names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    pub path: PathBuf,
    pub metadata: String,
}

/// A connected agent.
#[derive(Clone, Debug)]
pub struct Agent {
    socket: Rc<UnixStream>,
    metadata: String,
}

impl AsFd for Agent {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Agent {
    /// Called outside of the container, where the path means something.
    pub fn connect(listener: &Listener) -> io::Result<Agent> {
        let socket = UnixStream::connect(&listener.path)?;
        Ok(Agent { socket: Rc::new(socket), metadata: listener.metadata.clone() })
    }

    /// Runs `install`, which gives the descriptor, and has that sent. `pid` is the host's for this process.
    pub fn introduce<E>(
        &self,
        state: &State,
        pid: Option<i32>,
        install: impl FnOnce() -> Result<OwnedFd, E>,
    ) -> io::Result<Result<(), E>> {
        let message = json!({
            "ociVersion": state.oci_version,
            "fds": ["seccompFd"],
            "pid": pid.unwrap_or(0),
            "metadata": self.metadata,
            "state": {
                "ociVersion": state.oci_version,
                "id": state.id,
                "status": state.status.to_string(),
                "pid": pid.unwrap_or(0),
                "bundle": state.bundle,
                "annotations": state.annotations,
            },
        });
        let message = message.to_string().into_bytes();
        let socket = self.socket.try_clone()?;
        let listener: OnceLock<Option<OwnedFd>> = OnceLock::new();
        let (sent, failed) = (AtomicBool::new(false), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let fd = loop {
                    match listener.get() {
                        Some(fd) => break fd,
                        None => std::thread::sleep(Duration::from_micros(50)),
                    }
                };
                let done = fd.as_ref().map_or(Ok(()), |fd| fdpass::send(socket.as_fd(), &message, &[fd.as_fd()]));
                failed.store(done.is_err(), Ordering::Relaxed);
                sent.store(true, Ordering::Release);
            });
            let (fd, installed) = match install() {
                Ok(fd) => (Some(fd), Ok(())),
                Err(error) => (None, Err(error)),
            };
            let _ = listener.set(fd);
            // Every system call may be one that the agent is to answer for, who does not know of it yet.
            while !sent.load(Ordering::Acquire) {
                std::hint::spin_loop();
            }
            if failed.load(Ordering::Relaxed) { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(installed) }
        })
    }
}
