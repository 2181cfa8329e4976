//! Less processor time for a container while it leaves, so that it writes less than can be sent.
//!
//! The limit in its cgroup is put back by a process of its own, the *keeper*, as soon as nobody throttles any more: because the
//! [`Throttle`] was dropped, or because who had it was killed.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::sys::wait::waitpid;
use nix::unistd::{Pid, close, pipe2, setsid};

use super::cgroup::Cgroup;
use super::{Error, Result};
use crate::engine::departure::Brake;
use crate::sys::fork;

/// In which a container may use up its share: short, as it stands still for the rest.
const PERIOD: Duration = Duration::from_millis(50);
/// The kernel takes no less than a millisecond for a share.
const LEAST: Duration = Duration::from_millis(1);

/// The limit of a container's processor time.
#[derive(Debug)]
pub struct Throttle {
    /// Of the hierarchy with the processor controller.
    dir: PathBuf,
    /// Of all hierarchies.
    dirs: Vec<PathBuf>,
    /// Files of `dir` and what they have to say again, in this order.
    before: Vec<(&'static str, String)>,
    /// Processor time used until then.
    begun: (Duration, Instant),
    /// Percent of a processor that it took of its own accord; known once it was throttled.
    free: Option<f64>,
    keeper: Option<(OwnedFd, Pid)>,
}

impl Throttle {
    /// Begins to watch what a container uses: its share is never more than that. Nothing is changed yet.
    ///
    /// # Errors
    /// `NotFound`: its cgroup has no processor controller.
    pub fn of(cgroup: &Cgroup) -> Result<Throttle> {
        let dirs: Vec<PathBuf> = cgroup.dirs()?.into_iter().map(|(dir, _)| dir).collect();
        for dir in &dirs {
            let read = |name: &str| fs::read_to_string(dir.join(name)).map(|text| text.trim().to_owned());
            let before = match (read("cpu.max"), read("cpu.cfs_period_us"), read("cpu.cfs_quota_us")) {
                (Ok(max), ..) => vec![("cpu.max", max)],
                // No quota is above any period; and a quota below the least share of its period is none.
                (_, Ok(period), Ok(quota)) => {
                    vec![("cpu.cfs_quota_us", "-1".into()), ("cpu.cfs_period_us", period), ("cpu.cfs_quota_us", quota)]
                }
                _ => continue,
            };
            let begun = (used(&dirs)?, Instant::now());
            return Ok(Throttle { dir: dir.clone(), dirs, before, begun, free: None, keeper: None });
        }
        Err(Error::io(cgroup.path(), io::ErrorKind::NotFound.into()))
    }

    fn keep(&self) -> io::Result<(OwnedFd, Pid)> {
        let (end, ours) = pipe2(OFlag::O_CLOEXEC)?;
        let masters = ours.as_raw_fd();
        let keeper = fork::child(|| {
            // Its copy, without which it would never see the other end closed; and no Ctrl-C is meant for it.
            let _ = (close(masters), setsid());
            // Nothing is ever written.
            let _ = File::from(end).read(&mut [0]);
            i32::from(self.restore().is_err())
        });
        Ok((ours, keeper?))
    }

    fn restore(&self) -> io::Result<()> {
        self.before.iter().try_for_each(|(name, value)| write(&self.dir, name, value))
    }
}

impl Brake for Throttle {
    fn press(&mut self, percent: u32) -> io::Result<()> {
        let free = *self.free.get_or_insert_with(|| {
            let (used_then, then) = self.begun;
            let used = used(&self.dirs).unwrap_or(used_then).saturating_sub(used_then);
            used.as_secs_f64() / then.elapsed().as_secs_f64().max(1e-3)
        });
        if self.keeper.is_none() {
            self.keeper = Some(self.keep()?);
        }
        let share = PERIOD.mul_f64(free * f64::from(percent) / 100.0).max(LEAST).as_micros();
        let period = PERIOD.as_micros();
        if self.before.len() == 1 {
            return write(&self.dir, "cpu.max", &format!("{share} {period}"));
        }
        write(&self.dir, "cpu.cfs_quota_us", "-1")?;
        write(&self.dir, "cpu.cfs_period_us", &period.to_string())?;
        write(&self.dir, "cpu.cfs_quota_us", &share.to_string())
    }

    fn release(&mut self) -> io::Result<()> {
        self.restore()
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        if let Some((ours, keeper)) = self.keeper.take() {
            drop(ours);
            // A cgroup that is gone needs nothing any more.
            let _ = waitpid(keeper, None);
        }
    }
}

fn write(dir: &Path, name: &str, value: &str) -> io::Result<()> {
    let path = dir.join(name);
    fs::write(&path, value).map_err(|e| io::Error::other(Error::io(path, e)))
}

/// Processor time that a cgroup has used.
fn used(dirs: &[PathBuf]) -> Result<Duration> {
    let read = |dir: &PathBuf, name: &str| fs::read_to_string(dir.join(name)).unwrap_or_default();
    let time = dirs.iter().find_map(|dir| {
        // Version 2 counts it in every cgroup, version 1 in a hierarchy of its own or in that of the processor.
        let micros = read(dir, "cpu.stat").lines().find_map(|line| line.strip_prefix("usage_usec ")?.parse().ok());
        let nanos = || read(dir, "cpuacct.usage").trim().parse().ok().map(Duration::from_nanos);
        micros.map(Duration::from_micros).or_else(nanos)
    });
    time.ok_or_else(|| Error::io(dirs.first().cloned().unwrap_or_default(), io::ErrorKind::NotFound.into()))
}
