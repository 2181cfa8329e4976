//! The user namespace of a container: one with the mapping of config.json, or one that is joined.

use std::fs::{self, File};
use std::io;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use caps::{CapSet, Capability};
use nix::unistd::{getegid, geteuid};
use oci_spec::runtime::{LinuxIdMapping, LinuxNamespaceType, Spec};

use super::bundle::namespace;
use super::{Error, Result};

/// Where a container's user namespace comes from.
#[derive(Debug)]
pub(super) enum Users {
    Join(File),
    Make { uids: Vec<Range>, gids: Vec<Range> },
}

/// One line of uid_map or gid_map: user_namespaces(7).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    inside: u32,
    outside: u32,
    count: u32,
}

/// uid_map or gid_map, with the set-user-ID program that writes it for those who may not (newuidmap(1)).
struct Map {
    file: &'static str,
    helper: &'static str,
    ranges: &'static str,
}

const UIDS: Map = Map { file: "uid_map", helper: "newuidmap", ranges: "/etc/subuid" };
const GIDS: Map = Map { file: "gid_map", helper: "newgidmap", ranges: "/etc/subgid" };

impl Users {
    /// None: the container has no user namespace but lmrun's own.
    ///
    /// # Errors
    /// [`Error::Config`] where there is no mapping, or a namespace to be joined that is not there.
    pub fn of(spec: &Spec) -> Result<Option<Users>> {
        let Some(users) = namespace(spec, LinuxNamespaceType::User) else {
            return Ok(None);
        };
        if let Some(path) = users.path() {
            return File::open(path).map(|file| Some(Users::Join(file))).map_err(|e| Error::io(path, e));
        }
        let linux = spec.linux().as_ref();
        let ranges = |list: Option<&Vec<LinuxIdMapping>>| list.into_iter().flatten().map(Range::from).collect();
        let uids: Vec<Range> = ranges(linux.and_then(|linux| linux.uid_mappings().as_ref()));
        let gids: Vec<Range> = ranges(linux.and_then(|linux| linux.gid_mappings().as_ref()));
        if uids.is_empty() || gids.is_empty() {
            let what = "a new user namespace takes linux.uidMappings and linux.gidMappings";
            return Err(Error::Config(what.into()));
        }
        Ok(Some(Users::Make { uids, gids }))
    }

    /// Gives a process that has just made its user namespace the mapping; what is joined has one.
    ///
    /// # Errors
    /// What the kernel or a helper says, with the remedy where an unprivileged user lacks something.
    pub fn map(&self, pid: i32) -> std::result::Result<(), String> {
        let Users::Make { uids, gids } = self else {
            return Ok(());
        };
        let own = |id: u32, ranges: &[Range]| matches!(ranges, [one] if one.outside == id && one.count == 1);
        if may(Capability::CAP_SETUID) || own(geteuid().as_raw(), uids) {
            UIDS.write(pid, uids)?;
        } else {
            UIDS.ask_helper(pid, uids)?;
        }
        if may(Capability::CAP_SETGID) {
            return GIDS.write(pid, gids);
        }
        if own(getegid().as_raw(), gids) {
            // user_namespaces(7): who maps a group that is only his own gives up setgroups(2) for it.
            let path = format!("/proc/{pid}/setgroups");
            fs::write(&path, "deny").map_err(|e| format!("{path}: {e}"))?;
            return GIDS.write(pid, gids);
        }
        GIDS.ask_helper(pid, gids)
    }
}

/// Whether the caller is somebody else than the host's root.
pub(super) fn is_rootless() -> bool {
    // The first user namespace maps all ids.
    !geteuid().is_root() || fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| !map.contains("4294967295"))
}

/// Whether the caller has a capability in the user namespace that it is in.
pub(super) fn may(capability: Capability) -> bool {
    caps::has_cap(None, CapSet::Effective, capability).unwrap_or(false)
}

impl Map {
    fn write(&self, pid: i32, ranges: &[Range]) -> std::result::Result<(), String> {
        let path = format!("/proc/{pid}/{}", self.file);
        let lines: String = ranges.iter().map(|r| format!("{} {} {}\n", r.inside, r.outside, r.count)).collect();
        fs::write(&path, &lines).map_err(|e| {
            let wanted = lines.trim_end().replace('\n', ", ");
            format!("map ids of the user namespace ({}: {wanted}): {e}", self.file)
        })
    }

    fn ask_helper(&self, pid: i32, ranges: &[Range]) -> std::result::Result<(), String> {
        let Map { helper, ranges: allowed, .. } = self;
        let program = on_path(helper).ok_or_else(|| {
            format!(
                "no {helper} on the PATH: an unprivileged user maps more than the own id with it (Debian: package \
                 uidmap), and with a line in {allowed}"
            )
        })?;
        let numbers = ranges.iter().flat_map(|r| [r.inside, r.outside, r.count]).map(|n| n.to_string());
        let asked = Command::new(&program).arg(pid.to_string()).args(numbers).stdin(Stdio::null()).output();
        let asked = asked.map_err(|e| format!("{}: {e}", program.display()))?;
        if asked.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&asked.stderr).trim().replace('\n', ": ");
        Err(format!("{helper} does not map the ids that config.json asks for (see {allowed}): {said}"))
    }
}

fn on_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|file| file.is_file())
}

impl From<&LinuxIdMapping> for Range {
    fn from(mapping: &LinuxIdMapping) -> Range {
        Range { inside: mapping.container_id(), outside: mapping.host_id(), count: mapping.size() }
    }
}

/// Enters the user namespace, alone; the mapping is still to come where it is new.
///
/// # Errors
/// setns(2), unshare(2)
pub(super) fn enter(users: &Users) -> io::Result<()> {
    use nix::sched::{CloneFlags, setns, unshare};
    match users {
        Users::Join(file) => setns(file, CloneFlags::CLONE_NEWUSER)?,
        Users::Make { .. } => unshare(CloneFlags::CLONE_NEWUSER)?,
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(linux: &str) -> Spec {
        serde_json::from_str(&format!(r#"{{"ociVersion": "1.0.2", "linux": {linux}}}"#)).unwrap()
    }

    #[test]
    fn a_new_one_takes_a_mapping() {
        assert!(Users::of(&spec(r#"{"namespaces": [{"type": "pid"}]}"#)).unwrap().is_none());
        let unmapped = Users::of(&spec(r#"{"namespaces": [{"type": "user"}]}"#)).unwrap_err();
        assert!(unmapped.to_string().contains("uidMappings"), "{unmapped}");
        let mapping = r#"[{"containerID": 0, "hostID": 100000, "size": 10}]"#;
        let linux =
            format!(r#"{{"namespaces": [{{"type": "user"}}], "uidMappings": {mapping}, "gidMappings": {mapping}}}"#);
        let Some(Users::Make { uids, gids }) = Users::of(&spec(&linux)).unwrap() else { panic!() };
        assert_eq!(uids, [Range { inside: 0, outside: 100_000, count: 10 }]);
        assert_eq!(uids, gids);
    }

    #[test]
    fn one_that_is_joined_must_be_there() {
        let join =
            |path: &str| Users::of(&spec(&format!(r#"{{"namespaces": [{{"type": "user", "path": "{path}"}}]}}"#)));
        assert!(matches!(join("/proc/self/ns/user"), Ok(Some(Users::Join(_)))));
        assert!(matches!(join("/nowhere"), Err(Error::Io { .. })));
    }
}
