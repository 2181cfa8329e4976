//! Containers as units of systemd (`--systemd-cgroup`): a transient scope, which has the container's cgroup.
//!
//! systemd is spoken to over D-Bus ([`bus`], [`wire`]). It makes a scope only around a process, so one waits in it until
//! init has been born there.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{Pid, pipe2};
use oci_spec::runtime::LinuxResources;
use serde::{Deserialize, Serialize};

use super::cgroup::hierarchies;
use super::{Error, Result, chain, users};
use crate::sys::fork;

mod bus;
mod properties;
mod wire;

pub use bus::BusError;

use bus::Connection;
use wire::{Property, Value, Writer};

/// A container's unit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Unit {
    /// With its suffix.
    name: String,
    slice: String,
    /// It belongs to the manager of the user, not to that of the system.
    user: bool,
    /// What annotations of the container ask for.
    #[serde(skip)]
    extra: Vec<Property>,
}

/// A unit that has been started, with the process that keeps it until there is another one.
#[derive(Debug)]
pub struct Kept {
    keeper: Pid,
}

impl Drop for Kept {
    fn drop(&mut self) {
        let _ = kill(self.keeper, Signal::SIGKILL);
        let _ = waitpid(self.keeper, None);
    }
}

impl Unit {
    /// The unit of container `id`, for `slice:prefix:name` of config.json, or where that says nothing for one of
    /// lmrun's naming; with the path of its cgroup.
    ///
    /// # Errors
    /// [`Error::Config`] for a path of another form, [`Error::Systemd`] where no systemd answers.
    pub fn of_container<'a>(
        configured: Option<&Path>,
        id: &str,
        annotations: impl IntoIterator<Item = (&'a String, &'a String)>,
    ) -> Result<(Unit, PathBuf)> {
        let user = users::is_rootless();
        let configured = configured.and_then(Path::to_str).unwrap_or_default();
        let (slice, prefix, name) = match configured.split(':').collect::<Vec<_>>()[..] {
            [""] => ("", "lmrun", id),
            [slice, prefix, name] if !name.is_empty() && !configured.contains('/') => (slice, prefix, name),
            _ => {
                let what = format!(
                    "linux.cgroupsPath {configured:?} is not of the form slice:prefix:name, which --systemd-cgroup takes"
                );
                return Err(Error::Config(what));
            }
        };
        let slice = match slice {
            "" if user => "user.slice",
            "" => "system.slice",
            slice => slice,
        };
        let path =
            slice_path(slice).ok_or_else(|| Error::Config(format!("linux.cgroupsPath: {slice:?} is no slice")))?;
        // What is a slice by its name is made as one, and takes no processes.
        if name.ends_with(".slice") {
            return Err(Error::Config(format!("linux.cgroupsPath: a container cannot be the slice {name:?}")));
        }
        let name = if prefix.is_empty() { format!("{name}.scope") } else { format!("{prefix}-{name}.scope") };
        let extra = properties::of_annotations(annotations)
            .map_err(|name| Error::Config(format!("annotation org.systemd.property.{name} is not understood")))?;
        let root = Connection::open(user)?.property("ControlGroup")?;
        let path = Path::new("/").join(root.trim_start_matches('/')).join(path).join(&name);
        Ok((Unit { name, slice: slice.to_owned(), user, extra }, path))
    }

    /// Starts the unit, with its limits. What is left of an earlier one of its name, which failed, goes.
    pub fn start(&self, id: &str, resources: Option<&LinuxResources>) -> Result<Kept> {
        let keeper = fork::child(|| {
            let _ = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL);
            nix::unistd::pause();
            0
        });
        let kept = Kept { keeper: keeper.map_err(Error::Fork)? };
        let properties = self.properties(id, kept.keeper, resources);
        self.start_over(&mut Connection::open(self.user)?, &properties)?;
        Ok(kept)
    }

    fn start_over(&self, connection: &mut Connection, properties: &[Property]) -> bus::Result<()> {
        connection.subscribe()?;
        match self.start_once(connection, properties) {
            Err(error) if error.is("UnitExists") => {
                connection.call("ResetFailedUnit", "s", self.named())?;
                self.start_once(connection, properties)
            }
            started => started,
        }
    }

    fn start_once(&self, connection: &mut Connection, properties: &[Property]) -> bus::Result<()> {
        let mut body = self.named();
        body.text("replace");
        body.properties(properties);
        body.array(8, &[(); 0], |_, ()| {}); // no other units
        let job = connection.call("StartTransientUnit", "ssa(sv)a(sa(sv))", body)?;
        connection.wait_for_job(&job.body().text()?, &self.name)
    }

    fn properties(&self, id: &str, keeper: Pid, resources: Option<&LinuxResources>) -> Vec<Property> {
        let version2 = is_version2();
        let mut all = vec![
            ("Description".to_owned(), Value::Text(format!("lmrun container {id}"))),
            ("Slice".to_owned(), Value::Text(self.slice.clone())),
            ("Delegate".to_owned(), Value::Bool(true)),
            ("PIDs".to_owned(), Value::Uints(vec![keeper.as_raw().cast_unsigned()])),
            // It ends when the container does, and not in the order in which the host's services do.
            ("DefaultDependencies".to_owned(), Value::Bool(false)),
        ];
        let input_output = if version2 { "IOAccounting" } else { "BlockIOAccounting" };
        for name in ["MemoryAccounting", "CPUAccounting", "TasksAccounting", input_output] {
            all.push((name.to_owned(), Value::Bool(true)));
        }
        all.extend(resources.map(|resources| properties::of(resources, version2)).unwrap_or_default());
        for extra in &self.extra {
            all.retain(|(name, _)| *name != extra.0);
            all.push(extra.clone());
        }
        all
    }

    /// Tells systemd of other limits.
    pub fn update(&self, resources: &LinuxResources) -> Result<()> {
        let properties = properties::of(resources, is_version2());
        if properties.is_empty() {
            return Ok(());
        }
        let mut body = self.named();
        body.bool(true); // until the next boot
        body.properties(&properties);
        Connection::open(self.user)?.call("SetUnitProperties", "sba(sv)", body)?;
        Ok(())
    }

    /// Forks a child, as [`fork::child_in`] does, which goes on when systemd has moved it into the unit: for who may not put
    /// a process there.
    pub fn fork(&self, namespaces: u64, work: impl FnOnce() -> i32) -> io::Result<Pid> {
        let (moved, tell) = pipe2(OFlag::O_CLOEXEC)?;
        let mut tell = Some(File::from(tell));
        let mut moved = File::from(moved);
        let child = fork::child_in(namespaces, None, || {
            drop(tell.take());
            // The end of the pipe without a word: it could not be moved, or lmrun has died.
            if moved.read_exact(&mut [0]).is_err() {
                return 101;
            }
            drop(moved);
            work()
        })?;
        let attached = self.attach(child.as_raw()).map_err(|error| io::Error::other(chain(&error)));
        let told = attached.and_then(|()| tell.iter_mut().try_for_each(|tell| tell.write_all(&[1])));
        drop(tell);
        if told.is_err() {
            let _ = waitpid(child, None);
        }
        told.map(|()| child)
    }

    fn attach(&self, pid: i32) -> Result<()> {
        let mut body = self.named();
        body.text("");
        body.array(4, &[pid.cast_unsigned()], |w, pid| w.uint(*pid));
        Connection::open(self.user)?.call("AttachProcessesToUnit", "ssau", body)?;
        Ok(())
    }

    /// Ends the unit, if it has not ended with its last process, and forgets that it may have failed.
    pub fn stop(&self) -> Result<()> {
        Ok(self.stop_over(&mut Connection::open(self.user)?)?)
    }

    fn stop_over(&self, connection: &mut Connection) -> bus::Result<()> {
        connection.subscribe()?;
        let mut body = self.named();
        body.text("replace");
        match connection.call("StopUnit", "ss", body) {
            Ok(job) => connection.wait_for_job(&job.body().text()?, &self.name)?,
            Err(error) if error.is("NoSuchUnit") => return Ok(()),
            Err(error) => return Err(error),
        }
        match connection.call("ResetFailedUnit", "s", self.named()) {
            Err(error) if !error.is("NoSuchUnit") => Err(error),
            _ => Ok(()),
        }
    }

    fn named(&self) -> Writer {
        let mut body = Writer::default();
        body.text(&self.name);
        body
    }
}

/// systemd.slice(5): `a-b.slice` lies inside `a.slice`; `-.slice` is the root. None for what is no slice.
fn slice_path(slice: &str) -> Option<PathBuf> {
    let stem = slice.strip_suffix(".slice").filter(|stem| !stem.is_empty() && !stem.contains('/'))?;
    if stem == "-" {
        return Some(PathBuf::new());
    }
    if stem.split('-').any(str::is_empty) {
        return None;
    }
    let ends = stem.match_indices('-').map(|(at, _)| at).chain([stem.len()]);
    Some(ends.map(|end| format!("{}.slice", &stem[..end])).collect())
}

/// Whether systemd has its limits from version 2, rather than from controllers of version 1.
fn is_version2() -> bool {
    hierarchies().is_ok_and(|all| all.iter().all(|hierarchy| hierarchy.unified))
}

#[cfg(test)]
mod tests {
    use super::wire::{Kind, Message, answer};
    use super::*;
    use std::os::unix::net::UnixStream;

    /// What a peer is asked for, and with what it answers: a job's path, or an error.
    type Step = (&'static str, &'static str, std::result::Result<&'static str, &'static str>);

    /// A connection to somebody who checks what comes, on a thread of its own; that gives the bodies.
    fn peer(bus: bool, steps: Vec<Step>) -> (Connection, std::thread::JoinHandle<Vec<Vec<u8>>>) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let thread = std::thread::spawn(move || {
            let mut hello = [0; 29];
            theirs.read_exact(&mut hello).unwrap();
            assert_eq!(hello, *b"\0AUTH EXTERNAL\r\nDATA\r\nBEGIN\r\n");
            theirs.write_all(b"DATA\r\nOK 0123456789abcdef\r\n").unwrap();
            let mut bodies = Vec::new();
            for (member, signature, result) in steps {
                let call = Message::read(&mut theirs).unwrap();
                assert_eq!((call.kind, call.member.as_str(), call.signature.as_str()), (Kind::Call, member, signature));
                bodies.push(call.body().rest().to_vec());
                let mut body = Writer::default();
                body.text(result.unwrap_or("words"));
                let sent = match result {
                    Ok(_) => answer(Kind::Return, call.serial(), "", "o", body),
                    Err(name) => answer(Kind::Error, call.serial(), name, "s", body),
                };
                if let Ok(job) = result {
                    // One's own end may be told before the answer, and others' at any time.
                    for (job, result) in [("/job/other", "failed"), (job, "done")] {
                        let mut body = Writer::default();
                        body.uint(1);
                        [job, "lm-c.scope", result].iter().for_each(|text| body.text(text));
                        theirs.write_all(&answer(Kind::Signal, 0, "JobRemoved", "uoss", body)).unwrap();
                    }
                }
                theirs.write_all(&sent).unwrap();
            }
            bodies
        });
        (Connection::begin(ours, bus).unwrap(), thread)
    }

    fn unit() -> Unit {
        Unit { name: "lm-c.scope".into(), slice: "a.slice".into(), user: false, extra: Vec::new() }
    }

    #[test]
    fn a_scope_is_started_with_these_messages() {
        let steps = vec![
            ("Hello", "", Ok("/")),
            ("AddMatch", "s", Ok("/")),
            ("Subscribe", "", Err("org.freedesktop.systemd1.AlreadySubscribed")),
            ("StartTransientUnit", "ssa(sv)a(sa(sv))", Err("org.freedesktop.systemd1.UnitExists")),
            ("ResetFailedUnit", "s", Ok("/")),
            ("StartTransientUnit", "ssa(sv)a(sa(sv))", Ok("/job/7")),
        ];
        let (mut connection, thread) = peer(true, steps);
        let resources = serde_json::from_str(r#"{"pids": {"limit": 5}}"#).unwrap();
        let properties = unit().properties("c", Pid::from_raw(42), Some(&resources));
        unit().start_over(&mut connection, &properties).unwrap();
        let bodies = thread.join().unwrap();
        let named: Vec<&str> = properties.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(named[..5], ["Description", "Slice", "Delegate", "PIDs", "DefaultDependencies"]);
        assert!(properties.contains(&("PIDs".into(), Value::Uints(vec![42]))));
        assert!(properties.contains(&("TasksMax".into(), Value::Ulong(5))));
        let mut expected = Writer::default();
        ["lm-c.scope", "replace"].iter().for_each(|text| expected.text(text));
        expected.properties(&properties);
        expected.array(8, &[(); 0], |_, ()| {});
        assert_eq!(bodies[5], expected.bytes());
        assert_eq!(bodies[3], bodies[5]);
    }

    #[test]
    fn a_scope_is_stopped_with_these_messages() {
        let steps = vec![
            ("Subscribe", "", Ok("/")),
            ("StopUnit", "ss", Ok("/job/8")),
            ("ResetFailedUnit", "s", Err("org.freedesktop.systemd1.NoSuchUnit")),
        ];
        let (mut connection, thread) = peer(false, steps);
        unit().stop_over(&mut connection).unwrap();
        thread.join().unwrap();
        let gone = vec![("Subscribe", "", Ok("/")), ("StopUnit", "ss", Err("org.freedesktop.systemd1.NoSuchUnit"))];
        let (mut connection, thread) = peer(false, gone);
        unit().stop_over(&mut connection).unwrap();
        thread.join().unwrap();
        let refused = vec![("Subscribe", "", Err("org.freedesktop.DBus.Error.AccessDenied"))];
        let (mut connection, thread) = peer(false, refused);
        let error = unit().stop_over(&mut connection).unwrap_err();
        assert_eq!(error.to_string(), "systemd: Subscribe: words (org.freedesktop.DBus.Error.AccessDenied)");
        thread.join().unwrap();
    }

    #[test]
    fn slices_lie_in_one_another() {
        let path = |slice| slice_path(slice).map(|path| path.display().to_string());
        assert_eq!(path("system.slice").as_deref(), Some("system.slice"));
        assert_eq!(path("a-b-c.slice").as_deref(), Some("a.slice/a-b.slice/a-b-c.slice"));
        assert_eq!(path("-.slice").as_deref(), Some(""));
        for bad in ["", "a", ".slice", "-a.slice", "a--b.slice", "a/b.slice"] {
            assert_eq!(path(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_path_must_have_the_form_that_systemd_takes() {
        for bad in ["/a/b", "a:b", "a.slice:b:", "a:b:c", "a.slice:b:c.slice"] {
            let error = Unit::of_container(Some(Path::new(bad)), "c", &std::collections::HashMap::new()).unwrap_err();
            assert!(matches!(error, Error::Config(_)), "{bad}: {error}");
        }
    }
}
