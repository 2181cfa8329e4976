//! `linux.intelRdt`: the container's group in resctrl (Documentation/filesystems/resctrl.rst), which shares out caches and
//! memory bandwidth, and counts their use.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxIntelRdt, Spec};
use serde::{Deserialize, Serialize};

use super::{Error, Result};

/// Where a container is in resctrl. Written down before anything is made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Group {
    dir: PathBuf,
    /// The container's own below it, which counts.
    monitoring: Option<PathBuf>,
    /// `dir` is there for this container alone, and ends with it.
    own: bool,
}

/// Where resctrl is mounted.
fn mount_point() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").map_err(|e| Error::io("/proc/self/mounts", e))?;
    let at = mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        let (at, kind) = (words.next()?, words.next()?);
        (kind == "resctrl").then(|| PathBuf::from(at))
    });
    at.ok_or_else(|| Error::NoController("Intel RDT (resctrl is not mounted)".into()))
}

impl Group {
    /// The group that config.json asks for; None where it asks for none.
    ///
    /// # Errors
    /// [`Error::NoController`] where resctrl is not mounted.
    pub fn of(spec: &Spec, id: &str) -> Result<Option<Group>> {
        let Some(wanted) = spec.linux().as_ref().and_then(|linux| linux.intel_rdt().as_ref()) else {
            return Ok(None);
        };
        Group::below(&mount_point()?, wanted, id).map(Some)
    }

    /// One for a container that has been made without.
    pub fn own(id: &str) -> Result<Group> {
        Group::below(&mount_point()?, &LinuxIntelRdt::default(), id)
    }

    fn below(mount: &Path, wanted: &LinuxIntelRdt, id: &str) -> Result<Group> {
        let class = wanted.clos_id().as_deref().filter(|class| !class.is_empty());
        let dir = match class {
            Some("/") => mount.to_owned(),
            Some(class) if class.contains('/') || class == "." || class == ".." => {
                return Err(Error::Config(format!("linux.intelRdt.closID {class:?} is no name of a directory")));
            }
            class => mount.join(class.unwrap_or(id)),
        };
        let monitoring = wanted.enable_monitoring().unwrap_or(false).then(|| dir.join("mon_groups").join(id));
        let own = class.is_none() && !dir.exists();
        Ok(Group { dir, monitoring, own })
    }

    /// Makes what is missing of it, and writes what `wanted` shares out.
    ///
    /// # Errors
    /// A class that is not there and for which nothing is said; one that is there and shares out something else.
    pub fn make(&self, wanted: &LinuxIntelRdt) -> Result<()> {
        let lines = schemata(wanted)?;
        let named = wanted.clos_id().as_ref().is_some_and(|class| !class.is_empty());
        let there = self.dir.is_dir();
        if named && !there && lines.is_empty() {
            return Err(Error::Config(format!("linux.intelRdt.closID: {} does not exist", self.dir.display())));
        }
        if !there {
            fs::create_dir(&self.dir).map_err(|e| Error::io(&self.dir, e))?;
        }
        let file = self.dir.join("schemata");
        if named && there && !lines.is_empty() {
            let present = fs::read_to_string(&file).map_err(|e| Error::io(&file, e))?;
            if !holds(&present, &lines) {
                let text = format!("linux.intelRdt: {} shares out something else already", self.dir.display());
                return Err(Error::Config(text));
            }
        } else {
            write_schemata(&file, &lines)?;
        }
        match &self.monitoring {
            Some(dir) if !dir.is_dir() => fs::create_dir(dir).map_err(|e| Error::io(dir, e)),
            _ => Ok(()),
        }
    }

    /// Puts a process (0: the calling one) into it; what it forks later is there too.
    pub fn add(&self, pid: i32) -> Result<()> {
        for dir in [Some(&self.dir), self.monitoring.as_ref()].into_iter().flatten() {
            let tasks = dir.join("tasks");
            let mut options = fs::OpenOptions::new();
            let written = options.write(true).open(&tasks);
            let written = written.and_then(|mut file| std::io::Write::write_all(&mut file, pid.to_string().as_bytes()));
            written.map_err(|e| Error::io(&tasks, e))?;
        }
        Ok(())
    }

    /// Removes what was made for the container; its processes have ended.
    pub fn remove(&self) {
        let own = Some(&self.dir).filter(|_| self.own);
        for dir in self.monitoring.iter().chain(own) {
            match fs::remove_dir(dir) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    tracing::warn!(%error, dir = %dir.display(), "cannot remove a group of resctrl");
                }
                _ => {}
            }
        }
    }

    /// The file that says what is shared out.
    pub fn schemata_file(&self) -> PathBuf {
        self.dir.join("schemata")
    }
}

/// The lines for the file, in the order in which they are written. Where `memBwSchema` is given, it alone speaks of
/// memory bandwidth, as in runc.
pub(super) fn schemata(wanted: &LinuxIntelRdt) -> Result<Vec<String>> {
    let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    let (cache, bandwidth) = (given(wanted.l3_cache_schema()), given(wanted.mem_bw_schema()));
    if bandwidth.as_ref().is_some_and(|line| !line.starts_with("MB:") || line.contains('\n')) {
        return Err(Error::Config("linux.intelRdt.memBwSchema is one line that begins with MB:".into()));
    }
    let mut lines: Vec<String> = cache.iter().flat_map(|text| text.lines()).map(str::to_owned).collect();
    lines.retain(|line| bandwidth.is_none() || !line.trim_start().starts_with("MB:"));
    lines.extend(bandwidth);
    for line in wanted.schemata().iter().flatten() {
        if line.contains('\n') {
            return Err(Error::Config("linux.intelRdt.schemata: an element holds more than one line".into()));
        }
        lines.push(line.clone());
    }
    lines.retain(|line| !line.trim().is_empty());
    Ok(lines)
}

/// Line by line: the kernel names the one that it refuses by failing there.
pub(super) fn write_schemata(file: &Path, lines: &[String]) -> Result<()> {
    lines.iter().try_for_each(|line| fs::write(file, format!("{line}\n"))).map_err(|e| Error::io(file, e))
}

/// Whether `present`, as the kernel shows it, says what `lines` say.
fn holds(present: &str, lines: &[String]) -> bool {
    let present: BTreeMap<_, _> = present.lines().map(parse).collect();
    lines.iter().map(|line| parse(line)).all(|(name, wanted)| {
        let Some(has) = present.get(&name) else { return false };
        wanted.iter().all(|(domain, value)| has.get(domain) == Some(value))
    })
}

/// `L3:0=0f;1=f0`: what is shared out, and for each domain how much of it. Zeros in front and blanks mean nothing.
fn parse(line: &str) -> (String, BTreeMap<String, String>) {
    let (name, rest) = line.split_once(':').unwrap_or((line, ""));
    let shares = rest.split(';').filter_map(|share| share.split_once('='));
    let bare = |text: &str| text.trim().trim_start_matches('0').to_ascii_lowercase();
    let shares = shares.map(|(domain, value)| (bare(domain), bare(value)));
    (name.trim().to_owned(), shares.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A resctrl that is plain files: the kernel would make them with each directory.
    struct Fake(PathBuf);

    impl Fake {
        fn new(name: &str) -> Fake {
            let dir = std::env::temp_dir().join(format!("lmrun-rdt-{}-{name}", std::process::id()));
            let _ = fs::remove_dir_all(&dir);
            fs::create_dir_all(dir.join("mon_groups")).unwrap();
            fs::write(dir.join("tasks"), "").unwrap();
            Fake(dir)
        }

        fn class(&self, name: &str, schemata: &str) {
            let dir = self.0.join(name);
            fs::create_dir_all(dir.join("mon_groups")).unwrap();
            fs::write(dir.join("schemata"), schemata).unwrap();
            fs::write(dir.join("tasks"), "").unwrap();
        }

        fn group(&self, json: &str) -> Result<(Group, LinuxIntelRdt)> {
            let wanted: LinuxIntelRdt = serde_json::from_str(json).unwrap();
            Ok((Group::below(&self.0, &wanted, "web1")?, wanted))
        }

        fn made(&self, json: &str) -> Result<Group> {
            let (group, wanted) = self.group(json)?;
            group.make(&wanted).map(|()| group)
        }

        fn read(&self, name: &str) -> String {
            fs::read_to_string(self.0.join(name)).unwrap()
        }
    }

    impl Drop for Fake {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn without_a_class_the_group_is_the_containers_own() {
        let fake = Fake::new("own");
        let group = fake.made(r#"{"l3CacheSchema": "L3:0=f", "schemata": ["L2:0=3"]}"#).unwrap();
        assert_eq!(group, Group { dir: fake.0.join("web1"), monitoring: None, own: true });
        assert_eq!(fake.read("web1/schemata"), "L2:0=3\n", "plain files keep the last line written");
        fs::remove_file(fake.0.join("web1/schemata")).unwrap();
        group.remove();
        assert!(!fake.0.join("web1").exists());
    }

    #[test]
    fn a_class_that_is_there_is_joined_and_stays() {
        let fake = Fake::new("class");
        fake.class("gold", "    L3:0=00f;1=0f0\n    MB:0= 70;1= 20\n");
        fs::create_dir_all(fake.0.join("gold/mon_groups/web1")).unwrap();
        fs::write(fake.0.join("gold/mon_groups/web1/tasks"), "").unwrap();
        let json =
            r#"{"closID": "gold", "l3CacheSchema": "L3:0=f;1=f0", "memBwSchema": "MB:0=70", "enableMonitoring": true}"#;
        let group = fake.made(json).unwrap();
        group.add(77).unwrap();
        assert_eq!((fake.read("gold/tasks"), fake.read("gold/mon_groups/web1/tasks")), ("77".into(), "77".into()));
        fs::remove_file(fake.0.join("gold/mon_groups/web1/tasks")).unwrap();
        group.remove();
        assert!(fake.0.join("gold").exists() && !fake.0.join("gold/mon_groups/web1").exists());
        for other in ["L3:0=ff", "L3:2=f", "L2:0=f"] {
            let error = fake.made(&format!(r#"{{"closID": "gold", "schemata": ["{other}"]}}"#)).unwrap_err();
            assert!(error.to_string().contains("something else already"), "{other}: {error}");
        }
    }

    #[test]
    fn a_class_that_is_not_there_is_made_when_it_is_said_what_it_shares_out() {
        let fake = Fake::new("made");
        let error = fake.made(r#"{"closID": "silver"}"#).unwrap_err().to_string();
        assert!(error.contains("silver does not exist"), "{error}");
        let group = fake.made(r#"{"closID": "silver", "schemata": ["L3:0=1"]}"#).unwrap();
        assert_eq!(fake.read("silver/schemata"), "L3:0=1\n");
        group.remove();
        assert!(fake.0.join("silver").exists(), "a named class is not lmrun's to remove");
    }

    #[test]
    fn the_default_class_is_the_mount_itself() {
        let fake = Fake::new("default");
        let (group, _) = fake.group(r#"{"closID": "/"}"#).unwrap();
        assert_eq!(group, Group { dir: fake.0.clone(), monitoring: None, own: false });
        group.add(5).unwrap();
        assert_eq!(fake.read("tasks"), "5");
        for bad in ["..", ".", "a/b"] {
            assert!(fake.group(&format!(r#"{{"closID": "{bad}"}}"#)).is_err(), "{bad}");
        }
    }

    #[test]
    fn lines_are_merged_as_in_runc() {
        let lines = |json: &str| schemata(&serde_json::from_str(json).unwrap());
        let both = r#"{"l3CacheSchema": "L3:0=f\nMB:0=10", "memBwSchema": "MB:0=20", "schemata": ["L2:0=1"]}"#;
        assert_eq!(lines(both).unwrap(), ["L3:0=f", "MB:0=20", "L2:0=1"]);
        assert_eq!(lines(r#"{"l3CacheSchema": "L3:0=f\nMB:0=10"}"#).unwrap(), ["L3:0=f", "MB:0=10"]);
        assert!(lines(r#"{"memBwSchema": "L3:0=f"}"#).is_err());
        assert!(lines(r#"{"schemata": ["a\nb"]}"#).is_err());
        assert!(lines("{}").unwrap().is_empty());
    }
}
