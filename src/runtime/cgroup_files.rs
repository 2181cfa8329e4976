//! The files in a container's cgroups, found by their names in whichever hierarchy has them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::Result;
use super::cgroup::Cgroup;

#[derive(Debug)]
pub(super) struct CgroupFiles {
    pub dirs: Vec<PathBuf>,
}

impl CgroupFiles {
    pub fn of(cgroup: &Path) -> Result<Self> {
        Ok(CgroupFiles { dirs: Cgroup::at(cgroup).dirs()?.into_iter().map(|(dir, _)| dir).collect() })
    }

    /// The first of these that there is.
    pub fn find(&self, names: &[&str]) -> Option<PathBuf> {
        names.iter().find_map(|name| self.dirs.iter().map(|dir| dir.join(name)).find(|file| file.exists()))
    }

    pub fn has(&self, name: &str) -> bool {
        self.find(&[name]).is_some()
    }

    /// Without the newline at its end.
    pub fn text(&self, name: &str) -> Option<String> {
        fs::read_to_string(self.find(&[name])?).ok().map(|text| text.trim().to_owned())
    }

    /// `max` is the greatest number; None where there is no such file, or no number in it.
    pub fn number(&self, name: &str) -> Option<u64> {
        let text = self.text(name)?;
        if text == "max" { Some(u64::MAX) } else { text.parse().ok() }
    }

    /// Lines of a name and a number.
    pub fn table(&self, name: &str) -> BTreeMap<String, u64> {
        let text = self.text(name).unwrap_or_default();
        let pairs = text.lines().filter_map(|line| line.split_once(' '));
        pairs.filter_map(|(name, number)| Some((name.to_owned(), number.parse().ok()?))).collect()
    }
}
