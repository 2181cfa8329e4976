//! exec: one more process in a container.
//!
//! lmrun enters the container's pid namespace, which takes effect for its children only, and forks: so the process is
//! a child of ours and can be waited for. The child makes its way in ([`entry`]): cgroup, namespaces, terminal,
//! working directory, identity. It ends as every workload does ([`super::workload`]): with the seccomp filter, the
//! capabilities and execve(2).

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use libcontainer::container::ContainerStatus;
use nix::fcntl::OFlag;
use nix::sys::prctl;
use nix::sys::wait::waitpid;
use nix::unistd::pipe2;

use super::bundle::Bundle;
use super::console::Console;
use super::create::keyring;
use super::process::Process;
use super::run::{Attachment, Foreground};
use super::state::{Locked, State, Status, Store, write_whole};
use super::workload::Workload;
use super::{Error, Result, caller, hooks, status};
use crate::sys::fds;

mod attributes;
mod door;
mod entry;
mod namespaces;
mod process;
mod terminal;

pub use process::{Edits, ProcessSource};

use door::Door;
use entry::Entry;
use namespaces::Namespaces;

/// An exec as asked for on the command line.
#[derive(Debug, Clone, Default)]
pub struct ExecOptions {
    pub process: ProcessSource,
    /// Below the container's cgroup: `[CONTROLLER[,CONTROLLER]...:]PATH`, as runc has it.
    pub cgroups: Vec<String>,
    /// Enter a paused container; the process runs when that is resumed, and so does lmrun.
    pub ignore_paused: bool,
    /// Return as soon as the process runs.
    pub detach: bool,
    /// Gets the process's pid in decimal digits.
    pub pid_file: Option<PathBuf>,
    /// Gets the master of the process's terminal.
    pub console_socket: Option<PathBuf>,
    /// Gets a pidfd of the process.
    pub pidfd_socket: Option<PathBuf>,
    /// Descriptors 3 .. 3 + n are handed down.
    pub preserve_fds: u32,
}

/// Runs a process in container `id`. Attached, waits for its end and gives its exit code (128 + n for signal n);
/// detached gives 0.
///
/// # Errors
/// [`Error::WrongStatus`] for a container that is paused or not there to be entered, [`Error::Init`] with what kept
/// the process from running.
pub fn exec(store: &Store, id: &str, options: &ExecOptions) -> Result<i32> {
    let locked = if options.ignore_paused { None } else { wait_turn(store, id)? };
    let state = store.load(id)?;
    let init = enterable(&state, options.ignore_paused)?;
    caller::keep_descriptors(options.preserve_fds)?;
    let bundle = process::bundle(&state.bundle, &options.process)?;
    check_terminal(&bundle, options)?;
    let foreground = Foreground::prepare(Attachment { detach: options.detach, no_subreaper: true, keep: true })?;
    let (pid, console) = start(&state, init, &bundle, options, store.is_rootless())?;
    drop(locked);

    if let Some(path) = &options.pid_file {
        write_whole(path, pid.to_string().as_bytes()).map_err(|e| Error::io(path, e))?;
    }
    let Some(mut foreground) = foreground else {
        return Ok(0);
    };
    foreground.console = console.map(|master| Console::join(File::from(master)));
    foreground.wait_for(pid)
}

/// A checkpoint that is under way ends first, and none begins before the process is in (what waits for `resume` cannot keep
/// that from coming). But a hook may exec, too, while the command that runs it holds the lock: where nobody has stopped init
/// for a while, the lock is not waited for.
fn wait_turn(store: &Store, id: &str) -> Result<Option<Locked>> {
    const WHILE: Duration = Duration::from_secs(1);
    let init = enterable(&store.load(id)?, false)?;
    let mut untouched_since = Instant::now();
    loop {
        if let Some(locked) = store.try_lock(id)? {
            return Ok(Some(locked));
        }
        let status = fs::read_to_string(format!("/proc/{}/status", init.pid)).unwrap_or_default();
        if !status.contains("\nTracerPid:\t0\n") {
            untouched_since = Instant::now();
        } else if untouched_since.elapsed() > WHILE {
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The init of a container that can be entered.
fn enterable(state: &State, ignore_paused: bool) -> Result<Process> {
    match (status(state), state.init) {
        (Status::Running | Status::Created, Some(init)) => Ok(init),
        (Status::Paused, Some(init)) if ignore_paused => Ok(init),
        (Status::Paused, _) => {
            Err(Error::WrongStatus("cannot exec in a paused container (use --ignore-paused to override)"))
        }
        (Status::Stopped, _) => Err(Error::WrongStatus("cannot exec in a stopped container")),
        _ => Err(Error::NotRunning),
    }
}

/// lmrun goes away before a detached process does, so its terminal needs somebody to give it to.
fn check_terminal(bundle: &Bundle, options: &ExecOptions) -> Result<()> {
    match (bundle.terminal(), options.detach, &options.console_socket) {
        (true, true, None) => {
            Err(Error::Terminal("cannot allocate tty if lmrun will detach without setting console socket"))
        }
        (false, _, Some(_)) | (true, false, Some(_)) => {
            Err(Error::Terminal("cannot use console socket if lmrun will not detach or allocate tty"))
        }
        _ => Ok(()),
    }
}

/// The process up to its execve(2): its pid, and the master of its terminal if that is for us.
fn start(
    state: &State,
    init: Process,
    bundle: &Bundle,
    options: &ExecOptions,
    rootless: bool,
) -> Result<(i32, Option<OwnedFd>)> {
    let socket = |path: &Option<PathBuf>| path.as_deref().map(caller::connect).transpose();
    let mut own_console = None;
    let console = match (bundle.terminal(), socket(&options.console_socket)?) {
        (true, None) => {
            let (ours, childs) = UnixStream::pair().map_err(|e| Error::io("socketpair", e))?;
            own_console = Some(ours);
            Some(childs)
        }
        (_, given) => given,
    };
    let (report, childs_report) = pipe2(OFlag::O_CLOEXEC).map_err(|e| Error::io("pipe", e.into()))?;
    let childs_report = Rc::new(File::from(above(childs_report, options.preserve_fds)?));
    let hook_state = hooks::state(state, ContainerStatus::Running);
    let workload =
        Workload::new(bundle, hook_state, keyring(&state.id, state.no_new_keyring), Rc::clone(&childs_report))?;
    let door = Door::to(state, &options.cgroups, rootless)?;
    let namespaces = Namespaces::of(init)?;
    let entry = Entry {
        spec: &bundle.spec,
        door: &door,
        resctrl: state.rdt.as_ref(),
        namespaces: &namespaces,
        workload,
        console,
        pidfd_socket: socket(&options.pidfd_socket)?,
        report: childs_report,
        preserve_fds: options.preserve_fds,
    };
    attributes::initial_affinity(bundle.process()?)?;
    // Nobody in the container may look into the process that enters it.
    prctl::set_dumpable(false).map_err(|e| Error::Init(format!("set dumpable: {e}")))?;
    namespaces.enter_for_children()?;
    let child = door.fork(|| entry.go()).map_err(Error::Fork)?;
    drop(entry);
    let mut failure = String::new();
    let read = File::from(report).read_to_string(&mut failure);
    if let Err(e) = read.and_then(|_| if failure.is_empty() { Ok(()) } else { Err(io::ErrorKind::Other.into()) }) {
        let _ = waitpid(child, None);
        return Err(if failure.is_empty() { Error::io("pipe", e) } else { Error::Init(failure) });
    }
    let master = own_console.map(|socket| terminal::receive_master(&socket)).transpose()?;
    Ok((child.as_raw(), master))
}

/// The descriptor, above those that are handed down.
fn above(fd: OwnedFd, preserve_fds: u32) -> Result<OwnedFd> {
    let first = 3 + preserve_fds.cast_signed();
    if fd.as_raw_fd() >= first {
        return Ok(fd);
    }
    fds::duplicate_above(fd.as_fd(), first).map_err(|e| Error::io("pipe", e.into()))
}
