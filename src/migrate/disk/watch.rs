//! inotify(7) on directories: which of their entries something was done to.
//!
//! inotify and not fanotify(7): it says names, needs no file handles (which an overlay has since 6.6), and a directory's watch
//! stays with it wherever it is renamed to. Not told of: writes through a shared mapping and, but for an overlay's upper
//! directory, by io_submit(2).

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};

/// A directory: which root, its number.
pub type Dir = (u32, u64);

/// What was done.
#[derive(Debug, Default)]
pub struct Events {
    /// More than the kernel keeps: these are not all.
    pub missed: bool,
    /// Directories with those of their entries that something was done to; true: their content may have been written to.
    pub touched: HashMap<Dir, BTreeMap<OsString, bool>>,
    /// Directories that are watched no longer.
    pub unwatched: Vec<Dir>,
}

pub struct Watches {
    inotify: Inotify,
    dirs: HashMap<WatchDescriptor, Dir>,
    events: Events,
}

impl Watches {
    pub fn new() -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        Ok(Self { inotify, dirs: HashMap::new(), events: Events::default() })
    }

    /// From now on; false: the kernel's limits (fs.inotify.max_user_watches) are reached.
    pub fn add(&mut self, dir: Dir, fd: impl AsFd) -> io::Result<bool> {
        let written = AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CLOSE_WRITE;
        let moved = AddWatchFlags::IN_MOVED_FROM | AddWatchFlags::IN_MOVED_TO;
        let named = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_DELETE | moved;
        let mask = written | named | AddWatchFlags::IN_ATTRIB | AddWatchFlags::IN_ONLYDIR;
        let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
        match self.inotify.add_watch(path.as_str(), mask) {
            Ok(watch) => {
                self.dirs.insert(watch, dir);
                Ok(true)
            }
            Err(Errno::ENOSPC | Errno::ENOMEM) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// No more of these.
    pub fn remove(&mut self, gone: impl Fn(Dir) -> bool) {
        self.dirs.retain(|watch, dir| {
            let keep = !gone(*dir);
            if !keep {
                // It may have ended by itself.
                let _ = self.inotify.rm_watch(*watch);
            }
            keep
        });
    }

    /// Takes over what the kernel has to tell, which keeps fs.inotify.max_queued_events of it.
    pub fn collect(&mut self) -> io::Result<()> {
        loop {
            match self.inotify.read_events() {
                Ok(events) => events.into_iter().for_each(|event| self.note(event)),
                Err(Errno::EAGAIN) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn note(&mut self, event: InotifyEvent) {
        if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
            self.events.missed = true;
        } else if event.mask.contains(AddWatchFlags::IN_IGNORED) {
            self.events.unwatched.extend(self.dirs.remove(&event.wd));
        } else if let Some(&dir) = self.dirs.get(&event.wd) {
            let names = self.events.touched.entry(dir).or_default();
            if let Some(name) = event.name {
                let written = event.mask.intersects(AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CLOSE_WRITE);
                *names.entry(name).or_default() |= written;
            }
        }
    }

    /// What was done since the last call.
    pub fn take(&mut self) -> io::Result<Events> {
        self.collect()?;
        Ok(std::mem::take(&mut self.events))
    }
}
