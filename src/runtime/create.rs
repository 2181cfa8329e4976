//! Making a container: create, and the first half of run and restore.
//!
//! The state file is there before anything is forked, with the cgroup and the maker in it: whatever
//! instant lmrun is killed at, `delete --force` finds all that was made.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::SystemTime;

use libcontainer::container::{Container as HookContainer, ContainerStatus};
use libcontainer::notify_socket::NotifyListener;
use libcontainer::process::args::{ContainerArgs, ContainerType};
use libcontainer::process::channel::ChannelError;
use libcontainer::process::container_main_process::ProcessError;
use libcontainer::syscall::syscall::SyscallType;
use libcontainer::tty::setup_console_socket;
use libcontainer::workload::Executor;
use nix::fcntl::{OFlag, open};
use nix::sys::prctl;
use nix::sys::stat::Mode;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{geteuid, mkfifo};
use oci_spec::runtime::{Mount, Spec};

use super::birth::Born;
use super::bundle::Bundle;
use super::cgroup::Cgroup;
use super::mounts::{Mounts, Propagation};
use super::process::Process;
use super::rdt::Group;
use super::settings::Settings;
use super::state::{Locked, State, Status, Store, write_whole};
use super::systemd::Unit;
use super::timestamp::rfc3339_nanos;
use super::workload::Workload;
use super::{
    Error, Result, birth, caller, chain, copyup, delete, hooks, netdevices, passwd, restore, standby, streams,
};
use crate::sys::proc;

/// The name of libcontainer's socket on which init waits for `start`.
pub(super) const NOTIFY_SOCKET: &str = "notify.sock";
/// Where init reports why it could not become the workload; closed when it has.
pub(super) const START_REPORT: &str = "start.fifo";

/// What the commands that make a container have in common.
#[derive(Debug, Clone, Default)]
pub struct CreateOptions {
    pub bundle: PathBuf,
    /// Gets init's pid in decimal digits.
    pub pid_file: Option<PathBuf>,
    /// Gets the master of the container's terminal.
    pub console_socket: Option<PathBuf>,
    pub no_pivot: bool,
    /// Leave the container in the caller's session keyring.
    pub no_new_keyring: bool,
    /// Descriptors 3 .. 3 + n are handed down.
    pub preserve_fds: u32,
    /// Gets a pidfd of init.
    pub pidfd_socket: Option<PathBuf>,
}

/// Makes container `id` up to the point where `start` lets the workload go.
///
/// # Errors
/// Whatever makes the container impossible; nothing of it remains then.
pub fn create(store: &Store, id: &str, options: &CreateOptions) -> Result<()> {
    let bundle = Bundle::load(&options.bundle)?;
    check_terminal(&bundle, options)?;
    let mut container = HalfMade::begin(store, id, &bundle)?;
    container.build_workload(&bundle, options)?;
    container.finish(Status::Created, options.pid_file.as_deref()).map(drop)
}

/// lmrun goes away before the container does, so a terminal needs somebody to give it to.
pub(super) fn check_terminal(bundle: &Bundle, options: &CreateOptions) -> Result<()> {
    match (bundle.terminal(), &options.console_socket) {
        (true, None) => Err(Error::Terminal("cannot allocate tty if lmrun will detach without setting console socket")),
        (false, Some(_)) => Err(Error::Terminal("cannot use console socket if lmrun will not detach or allocate tty")),
        _ => Ok(()),
    }
}

/// A container that is being made. Dropping it unmakes it.
#[derive(Debug)]
pub struct HalfMade {
    /// None once the container is finished.
    locked: Option<Locked>,
    state: State,
    /// See [`Store::is_rootless`].
    rootless: bool,
}

impl HalfMade {
    /// Takes the id and writes down what is about to be made.
    ///
    /// # Errors
    /// [`Error::CgroupInUse`]: what is in a container's cgroup is killed with it, so nobody else may be.
    pub fn begin(store: &Store, id: &str, bundle: &Bundle) -> Result<Self> {
        let rdt = Group::of(&bundle.spec, id)?;
        let configured = bundle.linux()?.cgroups_path().as_deref();
        let (unit, cgroup) = if store.has_systemd() {
            let (unit, path) = Unit::of_container(configured, id, &bundle.annotations())?;
            (Some(unit), Cgroup::at(&path))
        } else {
            (None, Cgroup::of_container(configured, id)?)
        };
        let uid = geteuid().as_raw();
        let state = State {
            oci_version: bundle.spec.version().clone(),
            id: id.to_owned(),
            status: Status::Creating,
            bundle: bundle.path.clone(),
            rootfs: bundle.rootfs(),
            created: rfc3339_nanos(SystemTime::now()),
            annotations: bundle.annotations(),
            owner: passwd::user(Path::new("/etc/passwd"), uid).map(|user| user.name).unwrap_or_default(),
            init: None,
            streams: Vec::new(),
            mounts: Vec::new(),
            creator: Process::own(),
            cgroup: cgroup.path().to_owned(),
            unit,
            hooks: bundle.spec.hooks().clone(),
            restore: None,
            no_new_keyring: false,
            rdt,
        };
        let locked = store.create(id)?;
        let pids = cgroup.pids()?;
        if !pids.is_empty() {
            locked.remove()?;
            let path = cgroup.path().to_owned();
            return Err(Error::CgroupInUse { path, pids });
        }
        let container = HalfMade { locked: Some(locked), state, rootless: store.is_rootless() };
        container.locked().save(&container.state)?;
        if let (Some(group), Some(wanted)) = (&container.state.rdt, bundle.linux()?.intel_rdt()) {
            group.make(wanted)?;
        }
        Ok(container)
    }

    /// Forks init and leaves it waiting for `start`, about to become the workload: a program, what a checkpoint holds,
    /// or what arrives from another host.
    pub fn build_workload(&mut self, bundle: &Bundle, options: &CreateOptions) -> Result<()> {
        caller::keep_descriptors(options.preserve_fds)?;
        if let Some(standby) = standby::awaited(&self.state.id, &bundle.path)? {
            return restore::prepare_standby(self, bundle, standby, options);
        }
        if let Some(images) = Settings::of(&self.state.annotations)?.checkpoint_to_restore(bundle)? {
            return restore::prepare(self, bundle, images, options);
        }
        let report = Rc::new(self.start_report(options.preserve_fds)?);
        let hook_state = hooks::state(&self.state, ContainerStatus::Created);
        let workload = Workload::new(bundle, hook_state, self.keyring(options), report)?;
        self.build(bundle.spec_for_workload()?, Box::new(workload), options, &|_| Ok(()))
    }

    /// Forks init with libcontainer and leaves it waiting for [`go`](super::start::go), about to
    /// enter `executor`.
    pub(super) fn build(
        &mut self,
        mut spec: Spec,
        executor: Box<dyn Executor>,
        options: &CreateOptions,
        born: Born<'_>,
    ) -> Result<()> {
        let dir = self.dir().to_owned();
        caller::keep_descriptors(options.preserve_fds)?;
        let pidfd_socket = options.pidfd_socket.as_deref().map(caller::connect).transpose()?;
        self.state.no_new_keyring = options.no_new_keyring;
        let copied_up = copyup::take(&mut spec);
        let devices = netdevices::take(&mut spec);
        let cgroup = Cgroup::at(&self.state.cgroup);
        let console = match &options.console_socket {
            Some(path) => Some(console_socket(&dir, path)?),
            None => None,
        };
        let notify_listener =
            NotifyListener::new(&dir.join(NOTIFY_SOCKET)).map_err(|e| Error::Libcontainer(chain(&e)))?;
        let own = OwnAttributes::lend(spec.process().as_ref().and_then(|process| process.oom_score_adj()))?;
        let executor = Propagation::before(executor, &spec);
        let mounts = Mounts::take(&mut spec, &self.state.bundle, &cgroup)?;
        if mounts.is_none() {
            refuse_mappings(&spec)?;
        }
        let args = ContainerArgs {
            container_type: ContainerType::InitContainer,
            syscall: SyscallType::default(),
            rootfs: self.state.rootfs.clone(),
            console_socket: console.as_ref().map(AsRawFd::as_raw_fd),
            notify_listener,
            preserve_fds: options.preserve_fds.cast_signed(),
            // The hooks of create come after step 2 of the lifecycle, behind which a container is `created`.
            container: Some(HookContainer { state: hooks::state(&self.state, ContainerStatus::Created), root: dir }),
            user_ns_config: None, // see `users`
            cgroup_config: cgroup.config(&self.state.id),
            detached: true,
            executor,
            no_pivot: options.no_pivot,
            stdin: None,
            stdout: None,
            stderr: None,
            as_sibling: false,
            pid_file: None, // the library's is neither atomic nor checked
            spec: Rc::new(spec),
        };
        let resources = args.spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        let kept = self.state.unit.as_ref().map(|unit| unit.start(&self.state.id, resources)).transpose()?;
        let init = birth::give_birth(args, mounts, &cgroup, self.state.unit.as_ref(), self.rootless, born);
        drop((own, kept));
        let pid = init?;
        self.state.init = Process::of(pid);
        if self.state.init.is_none() {
            return Err(Error::Init("init died while the container was made".into()));
        }
        self.state.streams = streams::of(pid)?;
        let mounts = proc::mounts(pid).map_err(|e| Error::io(format!("/proc/{pid}/mountinfo"), e))?;
        self.state.mounts = mounts.into_iter().map(|m| m.point).collect();
        self.locked().save(&self.state)?;
        if let Some(socket) = pidfd_socket {
            caller::send_pidfd(&socket, pid, "standard").map_err(|e| Error::io("pidfd socket", e))?;
        }
        if let Some(group) = &self.state.rdt {
            group.add(pid)?;
        }
        netdevices::give(&devices, pid)?;
        copied_up.iter().try_for_each(|mount| copyup::copy(pid, &self.state.rootfs, mount))
    }

    /// Nothing of its standard streams comes from outside.
    pub fn forget_streams(&mut self) {
        self.state.streams.clear();
    }

    /// The container is made: saves its status and writes the pid file.
    pub fn finish(mut self, status: Status, pid_file: Option<&Path>) -> Result<Process> {
        self.state.status = status;
        self.locked().save(&self.state)?;
        let init = self.state.init.ok_or_else(|| Error::Init("there is no init".into()))?;
        if let Some(path) = pid_file {
            write_whole(path, init.pid.to_string().as_bytes()).map_err(|e| Error::io(path, e))?;
        }
        self.locked = None;
        Ok(init)
    }

    /// What `start` is to restore.
    pub fn restores(&mut self, pending: restore::Pending) {
        self.state.restore = Some(pending);
    }

    /// The name of the container's session keyring.
    pub fn keyring(&self, options: &CreateOptions) -> Option<CString> {
        keyring(&self.state.id, options.no_new_keyring)
    }

    pub fn dir(&self) -> &Path {
        self.locked().dir()
    }

    pub fn state(&self) -> &State {
        &self.state
    }

    fn locked(&self) -> &Locked {
        self.locked.as_ref().expect("only `finish` takes the lock, and takes self with it")
    }

    /// Makes the fifo and opens init's end of it, above the descriptors that are handed down.
    fn start_report(&self, preserve_fds: u32) -> Result<File> {
        let path = self.dir().join(START_REPORT);
        let io = |errno: nix::Error| Error::io(&path, errno.into());
        mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).map_err(io)?;
        let mut low = Vec::new();
        loop {
            let end = open(&path, OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty()).map_err(io)?;
            if end.as_raw_fd() >= 3 + preserve_fds.cast_signed() {
                return Ok(File::from(end));
            }
            low.push(end);
        }
    }
}

/// The name of a container's session keyring.
pub(super) fn keyring(id: &str, no_new_keyring: bool) -> Option<CString> {
    if no_new_keyring { None } else { CString::new(format!("_ses.{id}")).ok() }
}

impl Drop for HalfMade {
    fn drop(&mut self) {
        let Some(locked) = self.locked.take() else {
            return;
        };
        if let Err(error) = delete::destroy_cgroup(&self.state) {
            tracing::warn!(%error, id = self.state.id, "cannot remove the cgroup of a container that could not be made");
        }
        if let Some(group) = &self.state.rdt {
            group.remove();
        }
        // libcontainer leaves its children behind when it fails.
        while waitpid(None, Some(WaitPidFlag::WNOHANG)).is_ok_and(|status| status.pid().is_some()) {}
        if let Err(error) = locked.remove() {
            tracing::warn!(%error, id = self.state.id, "cannot remove the state of a container that could not be made");
        }
    }
}

/// Attributes of lmrun itself that the container is born with, given back when dropped.
struct OwnAttributes {
    oom_score_adj: Option<String>,
}

const OOM_SCORE_ADJ: &str = "/proc/self/oom_score_adj";

impl OwnAttributes {
    fn lend(oom_score_adj: Option<i32>) -> Result<Self> {
        let io = |e| Error::io(OOM_SCORE_ADJ, e);
        let mut own = OwnAttributes { oom_score_adj: None };
        if let Some(score) = oom_score_adj {
            let before = fs::read_to_string(OOM_SCORE_ADJ).map_err(io)?;
            match fs::write(OOM_SCORE_ADJ, score.to_string()) {
                // Lowering it takes a capability: as it is, then, as under runc.
                Err(e) if e.kind() == ErrorKind::PermissionDenied && !geteuid().is_root() => {
                    tracing::warn!(score, "oom_score_adj stays as it is: this user may not lower it");
                }
                written => {
                    written.map_err(io)?;
                    own.oom_score_adj = Some(before);
                }
            }
        }
        // Nobody in a namespace that is being joined may look into the process that joins it.
        prctl::set_dumpable(false).map_err(|e| Error::Init(format!("set dumpable: {e}")))?;
        Ok(own)
    }
}

impl Drop for OwnAttributes {
    fn drop(&mut self) {
        let _ = prctl::set_dumpable(true);
        if let Some(before) = &self.oom_score_adj {
            let _ = fs::write(OOM_SCORE_ADJ, before);
        }
    }
}

/// libcontainer makes such mounts without a word, and without the mapping.
fn refuse_mappings(spec: &Spec) -> Result<()> {
    let mapped = |mount: &&Mount| {
        let options = mount.options().as_deref().unwrap_or_default();
        mount.uid_mappings().is_some()
            || mount.gid_mappings().is_some()
            || options.iter().any(|option| option == "idmap" || option == "ridmap")
    };
    spec.mounts().iter().flatten().find(mapped).map_or(Ok(()), |mount| {
        let place = mount.destination().display();
        Err(Error::Config(format!(
            "mount {place}: its ids cannot be mapped without a mount namespace of the container's own"
        )))
    })
}

fn console_socket(dir: &Path, path: &Path) -> Result<OwnedFd> {
    let path = std::path::absolute(path).map_err(|e| Error::io(path, e))?;
    setup_console_socket(dir, &path, "console").map_err(|e| Error::Libcontainer(chain(&e)))
}

/// The words of the process inside the container, without the library's around them.
pub(super) fn why(error: &ProcessError) -> Error {
    match error {
        ProcessError::Channel(ChannelError::ExecError(inside) | ChannelError::OtherError(inside)) => {
            // What precedes the words of our own `validate`.
            Error::Init(inside.strip_prefix("error in executing process : ").unwrap_or(inside).to_owned())
        }
        ProcessError::Hooks(hook) => Error::Hook(chain(hook)),
        other => Error::Libcontainer(chain(other)),
    }
}
