//! The container's terminal joined to lmrun's own: `run` in the foreground.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use super::{Error, Result};
use crate::sys::{fdpass, terminal};

/// Takes the place of the socket that an engine gives with `--console-socket`.
#[derive(Debug)]
pub(super) struct ConsoleSocket {
    path: PathBuf,
    listener: UnixListener,
}

impl ConsoleSocket {
    /// Listens in `dir`, the container's directory.
    pub fn listen(dir: &Path) -> Result<Self> {
        let path = dir.join("terminal.sock");
        // Socket addresses are short, directories need not be.
        let open = File::open(dir).map_err(|e| Error::io(dir, e))?;
        let short = format!("/proc/self/fd/{}/terminal.sock", open.as_raw_fd());
        let listener = UnixListener::bind(short).map_err(|e| Error::io(&path, e))?;
        Ok(ConsoleSocket { path, listener })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The console of a container that was built with this socket.
    pub fn accept(self) -> Result<Console> {
        let io = |e| Error::io(&self.path, e);
        let (stream, _) = self.listener.accept().map_err(io)?;
        let (_, fds) = fdpass::receive(stream.as_fd(), &mut [0; 256]).map_err(io)?;
        let master = fds.into_iter().next();
        let master = master.ok_or_else(|| io(io::ErrorKind::UnexpectedEof.into()))?;
        Ok(Console::join(File::from(master)))
    }
}

/// Our terminal is raw while this lives: what is typed goes to the container as it is.
#[derive(Debug)]
pub(super) struct Console {
    master: File,
    /// How our terminal was set, where standard input is one.
    before: Option<Termios>,
}

impl Console {
    /// The terminal with this master becomes ours to serve.
    pub fn join(master: File) -> Self {
        let before = tcgetattr(io::stdin()).ok();
        if let Some(before) = &before {
            let mut raw = before.clone();
            cfmakeraw(&mut raw);
            let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &raw);
        }
        let console = Console { master, before };
        console.resize();
        console
    }

    /// Follows our terminal's size.
    pub fn resize(&self) {
        let _ = terminal::copy_size(io::stdin(), &self.master);
    }

    pub fn master(&self) -> BorrowedFd<'_> {
        self.master.as_fd()
    }

    /// Copies what there is to read from standard input; false at its end.
    pub fn send_input(&mut self) -> bool {
        copy_some(&mut io::stdin().lock(), &mut self.master)
    }

    /// Copies what the container has written; false when nobody has the terminal open any more.
    pub fn show_output(&mut self) -> bool {
        copy_some(&mut self.master, &mut io::stdout().lock())
    }

    /// Shows what is left of a container that has ended.
    pub fn show_rest(&mut self) {
        let waiting = |master: &File| {
            let mut wait = [PollFd::new(master.as_fd(), PollFlags::POLLIN)];
            poll(&mut wait, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
        };
        while waiting(&self.master) && self.show_output() {}
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, before);
        }
    }
}

fn copy_some(from: &mut impl Read, to: &mut impl Write) -> bool {
    let mut buffer = [0; 8192];
    match from.read(&mut buffer) {
        Ok(0) | Err(_) => false,
        Ok(n) => to.write_all(&buffer[..n]).and_then(|()| to.flush()).is_ok(),
    }
}
