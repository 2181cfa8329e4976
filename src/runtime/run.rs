//! create and start in one, and what lmrun does while a container runs in its foreground.

use nix::sys::prctl;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::SignalFd;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

use super::bundle::Bundle;
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
}

/// Makes and starts container `id`. Attached, waits for its end, deletes it, and gives its exit code
/// (128 + n for signal n); detached gives 0.
pub fn run(store: &Store, id: &str, options: &CreateOptions, attachment: Attachment) -> Result<i32> {
    let bundle = Bundle::load(&options.bundle)?;
    check_terminal(&bundle, options)?;
    let signals = Foreground::prepare(attachment)?;
    let mut container = HalfMade::begin(store, id, &bundle)?;
    container.build_workload(&bundle, options)?;
    let init = container.finish(Status::Created, options.pid_file.as_deref())?;

    let locked = store.lock(id)?;
    let mut state = locked.load()?;
    if let Err(error) = start_locked(&locked, &mut state) {
        delete::remove(locked, &state)?;
        return Err(error);
    }
    drop(locked);
    signals.map_or(Ok(0), |signals| signals.stay_with(store, id, init))
}

/// All signals, taken instead of acted upon.
#[derive(Debug)]
pub(super) struct Foreground {
    signals: SignalFd,
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
        let signals = SignalFd::new(&all).map_err(errno("signalfd"))?;
        Ok(Some(Foreground { signals }))
    }

    /// Forwards every signal to `init`, reaps every child, and deletes the container when init has ended.
    pub fn stay_with(self, store: &Store, id: &str, init: Process) -> Result<i32> {
        let code = self.wait_for(init)?;
        // A checkpoint or a delete may have been faster.
        match delete::delete(store, id, true) {
            Ok(()) | Err(Error::NotFound) => Ok(code),
            Err(error) => Err(error),
        }
    }

    fn wait_for(&self, init: Process) -> Result<i32> {
        let errno = |what| move |e| Error::Foreground { what, errno: e };
        let pidfd = PidFd::open(init.pid).map_err(|source| Error::Signal { pid: init.pid, source })?;
        loop {
            if let Some(code) = reap(init.pid) {
                return Ok(code);
            }
            let Some(signal) = self.signals.read_signal().map_err(errno("read a signal"))? else { continue };
            let number = signal.ssi_signo.cast_signed();
            if number != Signal::SIGCHLD as i32 && number != Signal::SIGURG as i32 {
                let _ = pidfd.kill(number);
            }
        }
    }
}

/// Reaps whatever has ended; init's exit code when it is among them.
fn reap(init: i32) -> Option<i32> {
    loop {
        match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) if pid.as_raw() == init => return Some(code),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid.as_raw() == init => return Some(128 + signal as i32),
            Ok(WaitStatus::StillAlive) | Err(nix::Error::ECHILD) => return None,
            _ => {}
        }
    }
}
