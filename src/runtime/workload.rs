//! The executor of create and run: the container's init becomes the program of config.json.
//!
//! libcontainer has built the namespaces, the root and the identity, and keeps the caller's
//! capabilities. What remains, in this order: the seccomp filter, the capability sets, the startContainer
//! hooks, signal handling as a program expects it, execve(2).

use std::cell::RefCell;
use std::collections::HashMap;
use std::convert::Infallible;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use caps::CapSet;
use libcontainer::container::State as HookState;
use libcontainer::hooks::run_hooks;
use libcontainer::oci_spec::runtime::{Hook, Process, Spec};
use libcontainer::workload::{Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError};
use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::stat::{fstat, stat};
use nix::unistd::{execve, fchown};

use super::bundle::{Bundle, CapabilitySets};
use super::personality::Persona;
use super::process::pid_outside;
use super::seccomp::{Agent, Filter, Listener};
use super::{Error, chain, passwd, selinux};
use crate::sys::{keyring, signals, terminal};

/// Everything the last steps need, prepared before anything is forked.
#[derive(Clone)]
pub struct Workload {
    args: Vec<String>,
    env: Vec<String>,
    capabilities: Option<CapabilitySets>,
    no_new_privileges: bool,
    seccomp: Option<Filter>,
    agent: Option<Agent>,
    hooks: Vec<Hook>,
    hook_state: HookState,
    /// The write end of the start report; closed by a successful execve.
    report: Rc<File>,
    uid: u32,
    /// The name of the container's session keyring; None leaves the caller's.
    keyring: Option<CString>,
    persona: Option<Persona>,
    /// The SELinux label of the program.
    label: Option<String>,
    /// Rows and columns of the terminal.
    console_size: Option<(u16, u16)>,
    /// Filled in inside the container.
    program: RefCell<PathBuf>,
    added_env: RefCell<Vec<String>>,
}

impl Workload {
    /// `report` is where `start` reads why execve failed; it must be close-on-exec.
    pub fn new(
        bundle: &Bundle,
        hook_state: HookState,
        keyring: Option<CString>,
        report: Rc<File>,
    ) -> super::Result<Self> {
        let process = bundle.process()?;
        let hooks = bundle.spec.hooks().as_ref().and_then(|hooks| hooks.start_container().clone());
        let seccomp = bundle.linux()?.seccomp().as_ref().map(Filter::compile).transpose()?;
        let listener = seccomp.as_ref().and_then(|filter| filter.listener.as_ref());
        let connect = |to: &Listener| Agent::connect(to).map_err(|e| Error::io(&to.path, e));
        let agent = listener.map(connect).transpose()?;
        Ok(Workload {
            args: process.args().clone().unwrap_or_default(),
            env: process.env().clone().unwrap_or_default(),
            capabilities: CapabilitySets::of(bundle)?,
            no_new_privileges: process.no_new_privileges().unwrap_or(false),
            seccomp,
            agent,
            hooks: hooks.unwrap_or_default(),
            hook_state,
            report,
            uid: process.user().uid(),
            keyring,
            persona: Persona::of(&bundle.spec)?,
            label: selinux::process_label(&bundle.spec)?,
            console_size: console_size(process),
            program: RefCell::default(),
            added_env: RefCell::default(),
        })
    }

    /// What must stay open until the seccomp filter is in.
    pub fn agent(&self) -> Option<BorrowedFd<'_>> {
        self.agent.as_ref().map(AsFd::as_fd)
    }

    /// Looks for the program in the root directory and as the user that will run it.
    pub fn find_program(&self) -> Result<(), String> {
        let path = self.env.iter().find_map(|pair| pair.strip_prefix("PATH=")).unwrap_or_default();
        let name = self.args.first().map(String::as_str).unwrap_or_default();
        *self.program.borrow_mut() = look_up(name, path).map_err(|why| format!("exec: {name:?}: {why}"))?;
        Ok(())
    }

    /// What libcontainer does not see to. A failure is told while the caller listens, and no filter is in yet.
    fn set_attributes(&self) -> Result<(), String> {
        if let Some((rows, columns)) = self.console_size {
            terminal::set_size(io::stdin(), rows, columns)
                .map_err(|e| format!("set the terminal's size: {}", words(e)))?;
        }
        if let Some(persona) = self.persona {
            persona.assume()?;
        }
        self.label.as_deref().map_or(Ok(()), selinux::label_next)
    }

    /// runc's words, which engines look for.
    fn become_workload(&self) -> Result<Infallible, String> {
        let env = self.environment();
        let strings = |list: &[String]| -> Result<Vec<CString>, String> {
            list.iter().map(|s| CString::new(s.as_bytes()).map_err(|_| "argument holds a NUL byte".into())).collect()
        };
        let (argv, envp) = (strings(&self.args)?, strings(&env)?);
        let program = self.program.borrow();
        let path = CString::new(program.as_os_str().as_encoded_bytes()).map_err(|_| "path holds a NUL byte")?;
        self.own_streams().map_err(|e| format!("change the owner of a standard stream: {}", words(e)))?;
        if let Some(name) = &self.keyring {
            join_session_keyring(name).map_err(|e| format!("join a session keyring: {}", words(e)))?;
        }
        if self.no_new_privileges {
            prctl::set_no_new_privs().map_err(|e| format!("set no_new_privs: {e}"))?;
        }
        // A filter needs a capability or no_new_privs; with the latter it may come last, where it need not
        // allow what dropping capabilities takes.
        if !self.no_new_privileges {
            self.install_seccomp()?;
        }
        self.drop_capabilities().map_err(|e| format!("unable to apply caps: {e}"))?;
        if self.no_new_privileges {
            self.install_seccomp()?;
        }
        self.run_hooks(&env)?;
        signals::reset_all();
        let Err(errno) = execve(&path, &argv, &envp);
        Err(format!("exec {}: {}", program.display(), words(errno)))
    }

    /// These hooks are the container's own programs: they get no more than the workload does.
    fn run_hooks(&self, env: &[String]) -> Result<(), String> {
        let pairs = env.iter().filter_map(|pair| pair.split_once('='));
        let env = pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        let (hooks, state) = (Some(&self.hooks), Some(&self.hook_state));
        run_hooks(hooks, state, None, None, Some(&env))
            .map_err(|e| format!("error running startContainer hook: {}", chain(&e)))
    }

    /// A workload of another user may want to open `/dev/stderr` anew.
    fn own_streams(&self) -> nix::Result<()> {
        let null = stat("/dev/null").map_or(0, |null| null.st_rdev);
        let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
        for stream in [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()] {
            let Ok(now) = fstat(stream) else { continue };
            if now.st_uid == self.uid || now.st_rdev == null && null != 0 {
                continue;
            }
            match fchown(stream, Some(self.uid.into()), None) {
                // Not to be had: sockets of old, users that are not mapped, read-only file systems.
                Ok(()) | Err(Errno::EINVAL | Errno::EPERM | Errno::EROFS) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    fn install_seccomp(&self) -> Result<(), String> {
        let Some(filter) = &self.seccomp else {
            return Ok(());
        };
        let installed = match &self.agent {
            None => filter.install(),
            Some(agent) => agent
                .introduce(&self.hook_state, pid_outside(), || filter.install_with_listener())
                .map_err(|e| format!("unable to reach the seccomp agent: {e}"))?,
        };
        installed.map_err(|e| format!("unable to install the seccomp filter: {}", words(e)))
    }

    /// The effective set goes before the permitted one that must contain it, the inheritable set while
    /// everything is still permitted, the ambient set after both that it depends on. capabilities(7).
    fn drop_capabilities(&self) -> Result<(), caps::errors::CapsError> {
        let Some(sets) = &self.capabilities else {
            return Ok(());
        };
        for capability in caps::all().difference(&sets.bounding) {
            if caps::has_cap(None, CapSet::Bounding, *capability).unwrap_or(false) {
                caps::drop(None, CapSet::Bounding, *capability)?;
            }
        }
        caps::set(None, CapSet::Inheritable, &sets.inheritable)?;
        caps::set(None, CapSet::Effective, &sets.effective)?;
        caps::set(None, CapSet::Permitted, &sets.permitted)?;
        caps::clear(None, CapSet::Ambient)?;
        for capability in &sets.ambient {
            caps::raise(None, CapSet::Ambient, *capability)?;
        }
        Ok(())
    }

    fn environment(&self) -> Vec<String> {
        let given = self.env.iter().filter(|pair| *pair != "HOME=");
        given.chain(self.added_env.borrow().iter()).cloned().collect()
    }
}

impl Executor for Workload {
    /// Does not return: what libcontainer would do with an error reaches nobody any more.
    fn exec(&self, _: &Spec) -> Result<(), ExecutorError> {
        let Err(why) = self.become_workload();
        let _ = (&*self.report).write_all(why.as_bytes());
        std::process::exit(255)
    }

    /// Runs inside the container's root, before `create` gets its answer.
    fn validate(&self, _: &Spec) -> Result<(), ExecutorValidationError> {
        self.find_program().and_then(|()| self.set_attributes()).map_err(ExecutorValidationError::ArgValidationError)
    }

    /// Keeps what is added to config.json's list, which itself keeps its order: HOME from the container's
    /// /etc/passwd, and libcontainer's LISTEN_FDS and LISTEN_PID.
    fn setup_envs(&self, envs: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        let mut added = Vec::new();
        if !self.env.iter().any(|pair| pair.starts_with("HOME=") && pair != "HOME=") {
            let home = passwd::user(Path::new("/etc/passwd"), self.uid).map(|user| user.home);
            added.push(format!("HOME={}", home.unwrap_or_else(|| "/".into()).display()));
        }
        for name in ["LISTEN_FDS", "LISTEN_PID"] {
            added.extend(envs.get(name).map(|value| format!("{name}={value}")));
        }
        *self.added_env.borrow_mut() = added;
        Ok(())
    }
}

/// Rows and columns that a process asks for. Without a terminal they mean nothing.
pub(super) fn console_size(process: &Process) -> Option<(u16, u16)> {
    let size = process.console_size().filter(|_| process.terminal().unwrap_or(false))?;
    let number = |n: u64| u16::try_from(n).unwrap_or(u16::MAX);
    Some((number(size.height()), number(size.width())))
}

/// The kernel may have none.
pub(super) fn join_session_keyring(name: &CString) -> nix::Result<()> {
    match keyring::join_session(name) {
        Err(Errno::ENOSYS) => Ok(()),
        joined => joined,
    }
}

/// The program that `name` means, by the rules of Go's exec.LookPath and in its words: runc's users
/// match on them.
fn look_up(name: &str, path: &str) -> Result<PathBuf, String> {
    if name.contains('/') {
        let file = PathBuf::from(name);
        return match executable(&file) {
            Ok(()) => Ok(file),
            Err(e) if e.kind() == ErrorKind::PermissionDenied => Err("permission denied".into()),
            Err(e) if e.kind() == ErrorKind::IsADirectory => Err("is a directory".into()),
            Err(e) => Err(format!(
                "stat {name}: {}",
                e.raw_os_error().map_or(e.to_string(), |n| words(nix::Error::from_raw(n)))
            )),
        };
    }
    let dirs = path.split(':').map(|dir| if dir.is_empty() { Path::new(".") } else { Path::new(dir) });
    let mut files = dirs.map(|dir| dir.join(name));
    files
        .find(|file| !name.is_empty() && executable(file).is_ok())
        .ok_or_else(|| "executable file not found in $PATH".into())
}

fn executable(file: &Path) -> std::io::Result<()> {
    let metadata = file.metadata()?;
    if metadata.is_dir() {
        return Err(ErrorKind::IsADirectory.into());
    }
    if metadata.permissions().mode() & 0o111 == 0 {
        return Err(ErrorKind::PermissionDenied.into());
    }
    Ok(())
}

/// An errno as Go prints it: "no such file or directory".
pub(super) fn words(errno: nix::Error) -> String {
    let text = errno.desc();
    let mut letters = text.chars();
    letters.next().map(|first| first.to_lowercase().chain(letters).collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_as_runc_finds_them() {
        assert_eq!(look_up("sh", "/nowhere:/bin").unwrap(), Path::new("/bin/sh"));
        assert_eq!(look_up("/bin/sh", "").unwrap(), Path::new("/bin/sh"));
        let why = |name, path| look_up(name, path).unwrap_err();
        assert_eq!(why("foo", "/bin"), "executable file not found in $PATH");
        assert_eq!(why("", "/bin"), "executable file not found in $PATH");
        assert_eq!(why("/foo", "/bin"), "stat /foo: no such file or directory");
        assert_eq!(why("/etc/passwd", ""), "permission denied");
        assert_eq!(why("/etc", ""), "is a directory");
    }
}
