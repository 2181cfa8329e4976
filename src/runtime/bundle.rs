//! The bundle: config.json read, checked, and edited in memory for libcontainer.
//!
//! libcontainer is given a spec that keeps the caller's capabilities and has no seccomp profile and no
//! no_new_privs; [`super::workload`] or the restore engine brings those on last.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use caps::{CapSet, CapsHashSet};
use libcontainer::capabilities::CapabilityExt;
use libcontainer::utils::{validate_mount_options, validate_spec_for_net_devices};
use libcontainer::validator::Validator;
use nix::unistd::geteuid;
use oci_spec::runtime::{
    Capability, Linux, LinuxCapabilities, LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType, LinuxTimeOffset,
    Process, Spec, UserBuilder,
};

use serde_json::Value;

use super::cgroup::Cgroup;
use super::personality::Persona;
use super::seccomp::Filter;
use super::{Error, Result, selinux};
use crate::engine::ClockOffsets;

/// A bundle directory and what its config.json says.
#[derive(Debug, Clone)]
pub struct Bundle {
    /// Absolute, without symbolic links.
    pub path: PathBuf,
    /// As written, but for the path of the root file system, which is absolute.
    pub spec: Spec,
}

impl Bundle {
    /// Reads and checks `<path>/config.json`.
    ///
    /// # Errors
    /// A bundle that cannot be read, [`Error::Config`] for what is not a container of this platform.
    pub fn load(path: &Path) -> Result<Self> {
        let path = fs::canonicalize(path).map_err(|e| Error::io(path, e))?;
        let file = path.join("config.json");
        let json = fs::read(&file).map_err(|e| Error::io(&file, e))?;
        let config = |e: serde_json::Error| Error::Config(e.to_string());
        let mut json: Value = serde_json::from_slice(&json).map_err(config)?;
        as_oci_spec_has_it(&mut json);
        let mut spec: Spec = serde_json::from_value(json).map_err(config)?;
        check(&spec)?;
        spec.canonicalize_rootfs(&path).map_err(|e| Error::Config(format!("root.path: {e}")))?;
        Ok(Bundle { path, spec })
    }

    /// The bundle of a container that was made already, with its `process` edited.
    pub fn load_running(path: &Path, edit: impl FnOnce(&mut Value)) -> Result<Self> {
        let file = path.join("config.json");
        let json = fs::read(&file).map_err(|e| Error::io(&file, e))?;
        let config = |e: serde_json::Error| Error::Config(e.to_string());
        let mut json: Value = serde_json::from_slice(&json).map_err(config)?;
        edit(&mut json["process"]);
        as_oci_spec_has_it(&mut json);
        Ok(Bundle { path: path.to_owned(), spec: serde_json::from_value(json).map_err(config)? })
    }

    pub fn process(&self) -> Result<&Process> {
        self.spec.process().as_ref().ok_or_else(|| Error::Config("process is missing".into()))
    }

    pub fn linux(&self) -> Result<&Linux> {
        self.spec.linux().as_ref().ok_or_else(|| Error::Config("linux is missing".into()))
    }

    pub fn annotations(&self) -> HashMap<String, String> {
        self.spec.annotations().clone().unwrap_or_default()
    }

    pub fn rootfs(&self) -> PathBuf {
        self.spec.root().as_ref().map(|root| root.path().clone()).unwrap_or_default()
    }

    pub fn terminal(&self) -> bool {
        self.spec.process().as_ref().and_then(Process::terminal).unwrap_or(false)
    }

    /// Whether the container gets a new namespace of this kind, rather than joining one or having none.
    pub fn makes_namespace(&self, kind: LinuxNamespaceType) -> bool {
        makes_namespace(&self.spec, kind)
    }

    fn namespace(&self, kind: LinuxNamespaceType) -> Option<&LinuxNamespace> {
        namespace(&self.spec, kind)
    }

    /// The spec for a container whose init becomes the workload: [`super::workload`] takes over
    /// where libcontainer ends.
    pub fn spec_for_workload(&self) -> Result<Spec> {
        let mut process = self.process()?.clone();
        process.set_capabilities(Some(self.callers_capabilities()?));
        process.set_no_new_privileges(None);
        self.edited(process, |_| {})
    }

    /// The spec for a container whose init becomes the puppet of a restore: nothing that the dumped tasks bring
    /// with them, and a time namespace in which their clocks go on.
    pub fn spec_for_puppet(&self, clocks: ClockOffsets) -> Result<Spec> {
        let mut process = self.process()?.clone();
        process.set_capabilities(Some(self.callers_capabilities()?));
        process.set_no_new_privileges(None);
        process.set_rlimits(None);
        process.set_apparmor_profile(None);
        process.set_selinux_label(None);
        process.set_scheduler(None);
        process.set_oom_score_adj(None);
        process.set_cwd("/".into());
        let root = UserBuilder::default().uid(0_u32).gid(0_u32).build();
        process.set_user(root.map_err(|e| Error::Config(e.to_string()))?);
        let joins_clocks = self.namespace(LinuxNamespaceType::Time).is_some_and(|time| time.path().is_some());
        self.edited(process, |linux| {
            if !joins_clocks {
                own_clocks(linux, clocks);
            }
        })
    }

    fn edited(&self, mut process: Process, edit: impl FnOnce(&mut Linux)) -> Result<Spec> {
        // Where there is no HOME, libcontainer asks the name service, inside the container.
        process.env_mut().get_or_insert_default().push("HOME=/".into());
        let mut spec = self.spec.clone();
        let mut linux = self.linux()?.clone();
        linux.set_seccomp(None);
        linux.set_personality(None);
        linux.set_mount_label(selinux::mount_label(&self.spec));
        edit(&mut linux);
        spec.set_linux(Some(linux));
        spec.set_process(Some(process));
        // What runs at the end of libcontainer's work is reported by the executor, see `workload`.
        if let Some(hooks) = spec.hooks_mut() {
            hooks.set_start_container(None);
        }
        Ok(spec)
    }

    /// All that the caller may have: asking for more fails. In a new user namespace that is everything.
    fn callers_capabilities(&self) -> Result<LinuxCapabilities> {
        let all = if self.namespace(LinuxNamespaceType::User).is_some() {
            caps::all()
        } else {
            caps::read(None, CapSet::Permitted).map_err(|e| Error::Capabilities(e.to_string()))?
        };
        let all: std::collections::HashSet<_> = all.into_iter().map(Capability::from_cap).collect();
        let mut set = LinuxCapabilities::default();
        set.set_bounding(Some(all.clone()));
        set.set_effective(Some(all.clone()));
        set.set_permitted(Some(all.clone()));
        set.set_inheritable(Some(all));
        set.set_ambient(None);
        Ok(set)
    }
}

/// The five sets that config.json asks for, less what the caller cannot give (which the runtime
/// specification wants logged, not refused). A set that is missing is empty.
#[derive(Debug, Clone, Default)]
pub struct CapabilitySets {
    pub bounding: CapsHashSet,
    pub effective: CapsHashSet,
    pub permitted: CapsHashSet,
    pub inheritable: CapsHashSet,
    pub ambient: CapsHashSet,
}

impl CapabilitySets {
    /// None where config.json has no capabilities at all: then nothing is changed.
    pub fn of(bundle: &Bundle) -> Result<Option<Self>> {
        let Some(asked) = bundle.process()?.capabilities() else {
            return Ok(None);
        };
        let can = bundle.callers_capabilities()?.permitted().clone().unwrap_or_default();
        let set = |asked: &Option<std::collections::HashSet<Capability>>| -> CapsHashSet {
            let asked = asked.iter().flatten();
            asked
                .filter(|capability| {
                    let given = can.contains(capability);
                    if !given {
                        tracing::warn!(capability = %capability.to_cap(), "cannot be granted: the caller does not have it");
                    }
                    given
                })
                .map(CapabilityExt::to_cap)
                .collect()
        };
        Ok(Some(CapabilitySets {
            bounding: set(asked.bounding()),
            effective: set(asked.effective()),
            permitted: set(asked.permitted()),
            inheritable: set(asked.inheritable()),
            ambient: set(asked.ambient()),
        }))
    }
}

/// What config.json may say and the crate does not read.
fn as_oci_spec_has_it(config: &mut Value) {
    drop_unknown_capabilities(config);
    let flags = config.pointer_mut("/process/scheduler/flags").and_then(Value::as_array_mut);
    for flag in flags.into_iter().flatten() {
        let name = match flag.as_str() {
            Some("SCHED_FLAG_RESET_ON_FORK") => "SCHED_RESET_ON_FORK",
            Some("SCHED_FLAG_DL_OVERRUN") => "SCHED_FLAG_D_L_OVERRUN",
            _ => continue,
        };
        *flag = name.into();
    }
}

/// A capability that this kernel or lmrun has not heard of cannot be granted: logged, not refused.
fn drop_unknown_capabilities(config: &mut Value) {
    let sets = config.pointer_mut("/process/capabilities").and_then(Value::as_object_mut);
    for set in sets.into_iter().flat_map(|sets| sets.values_mut()).filter_map(Value::as_array_mut) {
        set.retain(|name| {
            let known = serde_json::from_value::<Capability>(name.clone()).is_ok();
            if !known {
                tracing::warn!(%name, "unknown capability");
            }
            known
        });
    }
}

/// Whether a container with this spec gets a new namespace of this kind.
pub fn makes_namespace(spec: &Spec, kind: LinuxNamespaceType) -> bool {
    namespace(spec, kind).is_some_and(|namespace| namespace.path().is_none())
}

/// The entry of config.json for this kind.
pub(super) fn namespace(spec: &Spec, kind: LinuxNamespaceType) -> Option<&LinuxNamespace> {
    spec.linux().as_ref()?.namespaces().as_ref()?.iter().find(|namespace| namespace.typ() == kind)
}

/// time_namespaces(7): the offsets are set before the first task is in the namespace.
fn own_clocks(linux: &mut Linux, clocks: ClockOffsets) {
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    if !namespaces.iter().any(|namespace| namespace.typ() == LinuxNamespaceType::Time) {
        namespaces.extend(LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::Time).build());
    }
    linux.set_namespaces(Some(namespaces));
    let offset = |(seconds, nanoseconds): (i64, u32)| {
        let mut offset = LinuxTimeOffset::default();
        offset.set_secs(Some(seconds)).set_nanosecs(Some(nanoseconds));
        offset
    };
    let offsets = [("monotonic", clocks.monotonic), ("boottime", clocks.boottime)];
    linux.set_time_offsets(Some(HashMap::from(offsets.map(|(clock, by)| (clock.to_owned(), offset(by))))));
}

/// Whether a container could be made of a bundle, as far as that can be read: nothing is made.
///
/// # Errors
/// As those of making it.
pub fn check_bundle(path: &Path) -> Result<()> {
    let bundle = Bundle::load(path)?;
    bundle.linux()?.seccomp().as_ref().map(Filter::compile).transpose()?;
    CapabilitySets::of(&bundle)?;
    Cgroup::of_container(bundle.linux()?.cgroups_path().as_deref(), "check")?;
    bundle.spec_for_workload().map(drop)
}

/// What libcontainer's builder checks before it enters where we enter.
fn check(spec: &Spec) -> Result<()> {
    let config = |e: &dyn std::fmt::Display| Error::Config(e.to_string());
    if !spec.version().starts_with("1.") {
        return Err(Error::Config(format!("ociVersion {:?} is not 1.x", spec.version())));
    }
    Validator::validate_spec(spec).map_err(|e| config(&e))?;
    let syscall = libcontainer::syscall::syscall::create_syscall();
    if let Some(mounts) = spec.mounts() {
        validate_mount_options(mounts).map_err(|e| config(&e))?;
    }
    if !geteuid().is_root() && namespace(spec, LinuxNamespaceType::User).is_none() {
        let what = "a container of an unprivileged user takes a user namespace (`lmrun spec --rootless` writes one)";
        return Err(Error::Config(what.into()));
    }
    validate_spec_for_net_devices(spec, &*syscall).map_err(|e| config(&e))?;
    Persona::of(spec)?;
    selinux::process_label(spec)?;
    check_hooks(spec)?;
    let process = spec.process().as_ref().ok_or_else(|| Error::Config("process is missing".into()))?;
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(Error::Config("process.args is empty".into()));
    }
    if process.apparmor_profile().as_ref().is_some_and(|profile| !profile.is_empty())
        && !libcontainer::apparmor::is_enabled().unwrap_or(false)
    {
        return Err(Error::Config("process.apparmorProfile is set, but apparmor is not enabled on the host".into()));
    }
    Ok(())
}

/// Runtime specification, "POSIX-platform Hooks".
fn check_hooks(spec: &Spec) -> Result<()> {
    let Some(hooks) = spec.hooks() else { return Ok(()) };
    #[allow(deprecated)] // prestart: engines still use it
    let lists = [
        hooks.prestart(),
        hooks.create_runtime(),
        hooks.create_container(),
        hooks.start_container(),
        hooks.poststart(),
        hooks.poststop(),
    ];
    for hook in lists.into_iter().flatten().flatten() {
        let wrong = |why: &str| Err(Error::Config(format!("hook {}: {why}", hook.path().display())));
        if !hook.path().is_absolute() {
            return wrong("its path is not absolute");
        }
        if hook.timeout().is_some_and(|seconds| seconds <= 0) {
            return wrong("its timeout is not greater than zero");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// The words of the runtime specification, each where it stands.
    #[test]
    fn every_word_of_the_specification_is_read() {
        let words: [(&str, &[&str]); 10] = [
            (
                "/process/scheduler/flags/0",
                &[
                    "SCHED_FLAG_RESET_ON_FORK",
                    "SCHED_FLAG_RECLAIM",
                    "SCHED_FLAG_DL_OVERRUN",
                    "SCHED_FLAG_KEEP_POLICY",
                    "SCHED_FLAG_KEEP_PARAMS",
                    "SCHED_FLAG_UTIL_CLAMP_MIN",
                    "SCHED_FLAG_UTIL_CLAMP_MAX",
                ],
            ),
            (
                "/process/scheduler/policy",
                &["SCHED_OTHER", "SCHED_FIFO", "SCHED_RR", "SCHED_BATCH", "SCHED_ISO", "SCHED_IDLE", "SCHED_DEADLINE"],
            ),
            ("/process/ioPriority/class", &["IOPRIO_CLASS_RT", "IOPRIO_CLASS_BE", "IOPRIO_CLASS_IDLE"]),
            (
                "/process/rlimits/0/type",
                &[
                    "RLIMIT_AS",
                    "RLIMIT_CORE",
                    "RLIMIT_CPU",
                    "RLIMIT_DATA",
                    "RLIMIT_FSIZE",
                    "RLIMIT_LOCKS",
                    "RLIMIT_MEMLOCK",
                    "RLIMIT_MSGQUEUE",
                    "RLIMIT_NICE",
                    "RLIMIT_NOFILE",
                    "RLIMIT_NPROC",
                    "RLIMIT_RSS",
                    "RLIMIT_RTPRIO",
                    "RLIMIT_RTTIME",
                    "RLIMIT_SIGPENDING",
                    "RLIMIT_STACK",
                ],
            ),
            ("/linux/namespaces/0/type", &["pid", "network", "mount", "ipc", "uts", "user", "cgroup", "time"]),
            (
                "/linux/memoryPolicy/mode",
                &[
                    "MPOL_DEFAULT",
                    "MPOL_BIND",
                    "MPOL_INTERLEAVE",
                    "MPOL_WEIGHTED_INTERLEAVE",
                    "MPOL_PREFERRED",
                    "MPOL_PREFERRED_MANY",
                    "MPOL_LOCAL",
                ],
            ),
            ("/linux/memoryPolicy/flags/0", &["MPOL_F_NUMA_BALANCING", "MPOL_F_RELATIVE_NODES", "MPOL_F_STATIC_NODES"]),
            (
                "/linux/seccomp/architectures/0",
                &[
                    "SCMP_ARCH_X86",
                    "SCMP_ARCH_X86_64",
                    "SCMP_ARCH_X32",
                    "SCMP_ARCH_ARM",
                    "SCMP_ARCH_AARCH64",
                    "SCMP_ARCH_MIPS",
                    "SCMP_ARCH_MIPS64",
                    "SCMP_ARCH_MIPS64N32",
                    "SCMP_ARCH_MIPSEL",
                    "SCMP_ARCH_MIPSEL64",
                    "SCMP_ARCH_MIPSEL64N32",
                    "SCMP_ARCH_PPC",
                    "SCMP_ARCH_PPC64",
                    "SCMP_ARCH_PPC64LE",
                    "SCMP_ARCH_S390",
                    "SCMP_ARCH_S390X",
                    "SCMP_ARCH_PARISC",
                    "SCMP_ARCH_PARISC64",
                    "SCMP_ARCH_RISCV64",
                ],
            ),
            (
                "/linux/seccomp/defaultAction",
                &[
                    "SCMP_ACT_KILL",
                    "SCMP_ACT_KILL_PROCESS",
                    "SCMP_ACT_KILL_THREAD",
                    "SCMP_ACT_TRAP",
                    "SCMP_ACT_ERRNO",
                    "SCMP_ACT_TRACE",
                    "SCMP_ACT_ALLOW",
                    "SCMP_ACT_LOG",
                    "SCMP_ACT_NOTIFY",
                ],
            ),
            (
                "/linux/seccomp/flags/0",
                &[
                    "SECCOMP_FILTER_FLAG_TSYNC",
                    "SECCOMP_FILTER_FLAG_LOG",
                    "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
                    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
                ],
            ),
        ];
        let plain = json!({
            "ociVersion": "1.3.0",
            "process": { "cwd": "/", "user": { "uid": 0, "gid": 0 }, "scheduler": { "policy": "SCHED_OTHER", "flags": [""] },
                "ioPriority": { "class": "", "priority": 0 }, "rlimits": [{ "type": "", "soft": 0, "hard": 0 }] },
            "linux": { "namespaces": [{ "type": "" }], "memoryPolicy": { "mode": "", "flags": [""] },
                "seccomp": { "defaultAction": "", "architectures": [""], "flags": [""] } },
        });
        let mut missing = Vec::new();
        for (place, known) in words {
            for word in known {
                let mut config = plain.clone();
                words.iter().for_each(|(place, known)| *config.pointer_mut(place).unwrap() = json!(known[0]));
                *config.pointer_mut(place).unwrap() = json!(word);
                as_oci_spec_has_it(&mut config);
                if let Err(error) = serde_json::from_value::<Spec>(config) {
                    missing.push(format!("{place} {word}: {error}"));
                }
            }
        }
        assert!(missing.is_empty(), "{missing:#?}");
    }
}
