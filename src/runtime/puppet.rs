//! The executor of a restore: the container's init runs no program, but waits to be driven.

use std::cell::RefCell;
use std::convert::Infallible;
use std::ffi::CString;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;

use libcontainer::oci_spec::runtime::Spec;
use libcontainer::workload::{Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError};
use nix::sys::prctl;
use nix::unistd::{dup2_stdin, read, write};

use super::workload::join_session_keyring;
use crate::sys::{fds, signals};

/// Holds the puppet's end of the control socket until the container's init takes it.
#[derive(Clone)]
pub struct PuppetExecutor {
    control: Rc<RefCell<Option<UnixStream>>>,
    keyring: Option<CString>,
}

impl PuppetExecutor {
    /// A puppet and the driver's end of its socket. One byte arrives there when the puppet is ready; when the
    /// end is closed before anybody has taken the puppet over, it exits.
    ///
    /// `keyring` is as for a [`Workload`](super::workload::Workload).
    pub fn new(keyring: Option<CString>) -> std::io::Result<(Self, UnixStream)> {
        let (ours, puppets) = UnixStream::pair()?;
        Ok((PuppetExecutor { control: Rc::new(RefCell::new(Some(puppets))), keyring }, ours))
    }

    /// Closes this process's copy of the puppet's end, so that the driver sees its end.
    pub fn release(&self) {
        self.control.take();
    }

    /// From here on the process owns nothing but descriptor 0: libcontainer leaves others open, among
    /// them a handle on the host's procfs.
    fn become_puppet(&self) -> nix::Result<Infallible> {
        if let Some(name) = &self.keyring {
            join_session_keyring(name)?;
        }
        signals::reset_all();
        let control = self.control.take().ok_or(nix::Error::EBADF)?;
        dup2_stdin(&control)?;
        std::mem::forget(control); // closed with all others in the next line
        fds::close_from(1)?;
        prctl::set_pdeathsig(None)?;
        let stdin = std::io::stdin();
        write(stdin.as_fd(), b"!")?;
        let mut byte = [0];
        loop {
            match read(stdin.as_fd(), &mut byte) {
                Ok(0) => std::process::exit(0),
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(_) => std::process::exit(1),
            }
        }
    }
}

impl Executor for PuppetExecutor {
    fn exec(&self, _: &Spec) -> Result<(), ExecutorError> {
        let Err(errno) = self.become_puppet();
        Err(ExecutorError::Other(errno.to_string()))
    }

    fn validate(&self, _: &Spec) -> Result<(), ExecutorValidationError> {
        Ok(())
    }

    fn setup_envs(&self, _: std::collections::HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        Ok(())
    }
}
