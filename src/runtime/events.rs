//! Watching a container: what it uses, and when the kernel kills in it for want of memory.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use serde_json::{Value, json};

use super::cgroup_files::CgroupFiles;
use super::state::{Status, Store};
use super::stats::stats;
use super::{Error, Result, status};
use crate::sys::pidfd::PidFd;

/// Gives `event` the statistics of container `id`: once, or with an `interval` each time that it has passed, and every
/// OOM kill, until the container ends or `event` returns false.
///
/// # Errors
/// [`Error::NotRunning`]; what the kernel says when it is asked for notifications.
pub fn events(
    store: &Store,
    id: &str,
    interval: Option<Duration>,
    event: &mut dyn FnMut(&Value) -> bool,
) -> Result<()> {
    let state = store.load(id)?;
    let (Status::Created | Status::Running | Status::Paused, Some(init)) = (status(&state), state.init) else {
        return Err(Error::NotRunning);
    };
    let files = CgroupFiles::of(&state.cgroup)?;
    let statistics = || json!({ "type": "stats", "id": id, "data": stats(&files) });
    let Some(interval) = interval else {
        event(&statistics());
        return Ok(());
    };
    let pidfd = PidFd::open(init.pid).map_err(|source| Error::Signal { pid: init.pid, source })?;
    let mut kills = OomKills::watch(&files)?;
    let mut next = Instant::now() + interval;
    loop {
        let mut sources = vec![PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
        sources.extend(kills.as_ref().map(OomKills::source));
        let left = next.saturating_duration_since(Instant::now());
        let wait = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        match poll(&mut sources, wait) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(errno) => return Err(Error::io("poll", errno.into())),
        }
        let ended = sources[0].any().unwrap_or(true);
        let killed = kills.as_mut().is_some_and(OomKills::has_happened);
        let mut wanted = !killed || event(&json!({ "type": "oom", "id": id }));
        if Instant::now() >= next && !ended {
            wanted &= event(&statistics());
            next = Instant::now() + interval;
        }
        if ended || !wanted {
            return Ok(());
        }
    }
}

/// Where the kernel tells of OOM kills.
enum OomKills {
    /// Version 1 (cgroup-v1/memory.rst, 10): an eventfd, which also fires when the cgroup goes.
    Counter { fd: EventFd, control: PathBuf },
    /// Version 2 (cgroup-v2.rst, memory.events): a file that can be polled, with what it said last.
    File { file: File, path: PathBuf, kills: u64 },
}

impl OomKills {
    /// None where nobody limits memory.
    fn watch(files: &CgroupFiles) -> Result<Option<Self>> {
        if let Some(path) = files.find(&["memory.events"]) {
            let file = File::open(&path).map_err(|e| Error::io(&path, e))?;
            let mut watch = OomKills::File { file, path, kills: 0 };
            watch.has_happened();
            return Ok(Some(watch));
        }
        let Some(control) = files.find(&["memory.oom_control"]) else {
            return Ok(None);
        };
        let register = || -> io::Result<EventFd> {
            let fd = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
            let file = File::open(&control)?;
            let line = format!("{} {}", fd.as_fd().as_raw_fd(), file.as_raw_fd());
            fs::write(control.with_file_name("cgroup.event_control"), line)?;
            Ok(fd)
        };
        let fd = register().map_err(|e| Error::io(&control, e))?;
        Ok(Some(OomKills::Counter { fd, control }))
    }

    fn source(&self) -> PollFd<'_> {
        let (fd, events): (BorrowedFd<'_>, _) = match self {
            OomKills::Counter { fd, .. } => (fd.as_fd(), PollFlags::POLLIN),
            OomKills::File { file, .. } => (file.as_fd(), PollFlags::POLLPRI),
        };
        PollFd::new(fd, events)
    }

    /// Whether there was one since the last call.
    fn has_happened(&mut self) -> bool {
        match self {
            OomKills::Counter { fd, control } => fd.read().is_ok() && control.exists(),
            OomKills::File { file, path, kills } => {
                // The file that is polled must itself be read to its end for the next event.
                let mut text = String::new();
                let _ = io::Seek::rewind(file).and_then(|()| io::Read::read_to_string(file, &mut text));
                if text.is_empty() {
                    text = fs::read_to_string(path).unwrap_or_default();
                }
                let now = text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok()).unwrap_or(*kills);
                now > std::mem::replace(kills, now)
            }
        }
    }
}
