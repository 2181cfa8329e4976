//! create and start in one, and what lmrun does while a container runs in its foreground.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

use super::bundle::Bundle;
use super::console::{Console, ConsoleSocket};
use super::create::{CreateOptions, HalfMade, check_terminal};
use super::delete;
use super::process::Process;
use super::start::start_locked;
use super::state::{Status, Store};
use super::{Error, Result};
use crate::sys::pidfd::PidFd;

/// How `run` and `restore` leave the container to itself or stay with it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Attachment {
    /// Return as soon as the container runs.
    pub detach: bool,
    /// Do not adopt the processes that the container leaves behind.
    pub no_subreaper: bool,
    /// Leave the container, stopped, to be looked at and deleted by somebody else.
    pub keep: bool,
}

/// Makes and starts container `id`. Attached, waits for its end, deletes it, and gives its exit code
/// (128 + n for signal n); detached gives 0.
pub fn run(store: &Store, id: &str, options: &CreateOptions, attachment: Attachment) -> Result<i32> {
    let bundle = Bundle::load(&options.bundle)?;
    let mut options = options.clone();
    let mut foreground = Foreground::prepare(attachment)?;
    let mut container = HalfMade::begin(store, id, &bundle)?;
    let socket = own_console(&bundle, &mut options, attachment, container.dir())?;
    container.build_workload(&bundle, &options)?;
    if let Some(foreground) = &mut foreground {
        foreground.join(socket)?;
    }
    let init = container.finish(Status::Created, options.pid_file.as_deref())?;

    let locked = store.lock(id)?;
    let mut state = locked.load()?;
    if let Err(error) = start_locked(&locked, &mut state) {
        delete::remove(locked, &state)?;
        return Err(error);
    }
    drop(locked);
    foreground.map_or(Ok(0), |foreground| foreground.stay_with(store, id, init))
}

/// Listens for the container's terminal ourselves, where it has one and nobody else is named to get it.
///
/// # Errors
/// [`Error::Terminal`]: there is nobody to get it.
pub(super) fn own_console(
    bundle: &Bundle,
    options: &mut CreateOptions,
    attachment: Attachment,
    dir: &Path,
) -> Result<Option<ConsoleSocket>> {
    if attachment.detach || !bundle.terminal() || options.console_socket.is_some() {
        check_terminal(bundle, options)?;
        return Ok(None);
    }
    let socket = ConsoleSocket::listen(dir)?;
    options.console_socket = Some(socket.path().to_owned());
    Ok(Some(socket))
}

/// All signals, taken instead of acted upon, and the container's terminal if that is ours.
#[derive(Debug)]
pub(super) struct Foreground {
    signals: SignalFd,
    pub console: Option<Console>,
    keep: bool,
}

impl Foreground {
    /// Blocks all signals before the container is made, so that none falls between. None when
    /// detached. (The workload and the puppet unblock them for themselves.)
    pub fn prepare(attachment: Attachment) -> Result<Option<Self>> {
        if attachment.detach {
            return Ok(None);
        }
        let errno = |what| move |e| Error::Foreground { what, errno: e };
        if !attachment.no_subreaper {
            prctl::set_child_subreaper(true).map_err(errno("become a subreaper"))?;
        }
        let all = SigSet::all();
        sigprocmask(SigmaskHow::SIG_BLOCK, Some(&all), None).map_err(errno("block signals"))?;
        let signals =
            SignalFd::with_flags(&all, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK).map_err(errno("signalfd"))?;
        Ok(Some(Foreground { signals, console: None, keep: attachment.keep }))
    }

    /// Waits for `init`'s end, and deletes the container when init has ended.
    pub fn stay_with(mut self, store: &Store, id: &str, init: Process) -> Result<i32> {
        let code = self.wait_for(init.pid)?;
        if self.keep {
            return Ok(code);
        }
        // A checkpoint or a delete may have been faster.
        match delete::delete(store, id, true) {
            Ok(()) | Err(Error::NotFound) => Ok(code),
            Err(error) => Err(error),
        }
    }

    /// Takes the container's terminal, once it is built.
    pub fn join(&mut self, socket: Option<ConsoleSocket>) -> Result<()> {
        self.console = socket.map(ConsoleSocket::accept).transpose()?;
        Ok(())
    }

    /// Forwards every signal to child `pid`, reaps every child, and gives the exit code of that one.
    pub fn wait_for(&mut self, pid: i32) -> Result<i32> {
        let pidfd = PidFd::open(pid).map_err(|source| Error::Signal { pid, source })?;
        let (mut typing, mut showing) = (self.console.is_some(), self.console.is_some());
        loop {
            if let Some(code) = reap(pid) {
                if let Some(console) = &mut self.console {
                    console.show_rest();
                }
                return Ok(code);
            }
            let [signalled, typed, shown] = self.wait(typing, showing)?;
            if signalled {
                self.forward_signals(&pidfd)?;
            }
            if let Some(console) = &mut self.console {
                typing &= !typed || console.send_input();
                showing &= !shown || console.show_output();
            }
        }
    }

    /// Whether there is a signal, something typed, something to show.
    fn wait(&self, typing: bool, showing: bool) -> Result<[bool; 3]> {
        let stdin = io::stdin();
        let mut sources = vec![PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
        let typing_at = typing.then_some(sources.len());
        sources.extend(typing.then(|| PollFd::new(stdin.as_fd(), PollFlags::POLLIN)));
        let showing_at = showing.then_some(sources.len());
        let console = self.console.as_ref().filter(|_| showing);
        sources.extend(console.map(|console| PollFd::new(console.master(), PollFlags::POLLIN)));
        match poll(&mut sources, PollTimeout::NONE) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(errno) => {
                return Err(Error::Foreground { what: "poll", errno });
            }
        }
        let ready = |at: Option<usize>| at.is_some_and(|at| sources[at].any().unwrap_or(true));
        Ok([ready(Some(0)), ready(typing_at), ready(showing_at)])
    }

    fn forward_signals(&self, init: &PidFd) -> Result<()> {
        let errno = |errno| Error::Foreground { what: "read a signal", errno };
        while let Some(signal) = self.signals.read_signal().map_err(errno)? {
            match (Signal::try_from(signal.ssi_signo.cast_signed()), &self.console) {
                (Ok(Signal::SIGCHLD | Signal::SIGURG), _) => {}
                (Ok(Signal::SIGWINCH), Some(console)) => console.resize(),
                _ => drop(init.kill(signal.ssi_signo.cast_signed())),
            }
        }
        Ok(())
    }
}

/// Reaps whatever has ended; init's exit code when it is among them.
fn reap(init: i32) -> Option<i32> {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) if pid.as_raw() == init => return Some(code),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid.as_raw() == init => {
                return Some(128 + signal as i32);
            }
            Ok(WaitStatus::StillAlive) | Err(nix::Error::ECHILD) => return None,
            _ => {}
        }
    }
}
