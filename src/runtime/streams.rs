//! The standard streams of a container's init: what they were when it was made, and what takes their place in a restore.
//!
//! A program may have moved them to other descriptors since (a shell does for each redirection), so they are noted early.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Error, Result};

/// The file in an image directory that names what init's descriptors 0, 1 and 2 were: a JSON list of
/// their links, as runc writes it.
pub const FILE: &str = "descriptors.json";

/// One of init's standard streams.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Stream {
    /// As `/proc/PID/fd/N` shows it.
    pub link: String,
    /// Pipes, sockets and terminals have an other end that is not the container's to restore; a file comes from outside
    /// when its mount is not one of the container's.
    pub from_outside: bool,
}

/// Those of a task, as far as they are open.
pub fn of(pid: i32) -> Result<Vec<Stream>> {
    let mounts = format!("/proc/{pid}/mountinfo");
    let mounts = fs::read_to_string(&mounts).map_err(|e| Error::io(mounts, e))?;
    let mut streams = Vec::new();
    for fd in 0..3 {
        let Ok(link) = fs::read_link(format!("/proc/{pid}/fd/{fd}")) else {
            continue;
        };
        let fdinfo = fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).unwrap_or_default();
        let mount = fdinfo.lines().find_map(|line| line.strip_prefix("mnt_id:")).map(str::trim);
        let inside = mount.is_some_and(|mount| mounts.lines().any(|line| line.split(' ').next() == Some(mount)));
        let inside = inside && !link.starts_with("/dev/pts/");
        streams.push(Stream { link: link.to_string_lossy().into_owned(), from_outside: !inside });
    }
    Ok(streams)
}

/// The content of [`FILE`].
pub fn links(streams: &[Stream]) -> Vec<u8> {
    let links: Vec<_> = streams.iter().map(|s| &s.link).collect();
    serde_json::json!(links).to_string().into_bytes()
}

/// What gives standard stream 0, 1 or 2 of a new container.
pub type Source<'a> = &'a dyn Fn(i32) -> io::Result<OwnedFd>;

/// What takes the place of the streams that the dumped init had from outside. A path is not taken for one of the host's
/// where the container has a file of that name (/dev/null).
pub fn replaced(images: &Path, stream: Source<'_>) -> Result<Vec<(String, OwnedFd)>> {
    let path = images.join(FILE);
    let links: Vec<String> = match fs::read(&path) {
        Ok(json) => serde_json::from_slice(&json).map_err(|e| Error::io(&path, e.into()))?,
        Err(e) if e.kind() == ErrorKind::NotFound => Vec::new(),
        Err(e) => return Err(Error::io(&path, e)),
    };
    let mut streams: Vec<(String, OwnedFd)> = Vec::new();
    for (fd, link) in (0..3).zip(links) {
        if link != "/dev/null" && !streams.iter().any(|(known, _)| *known == link) {
            streams.push((link, stream(fd).map_err(|e| Error::io("standard streams", e))?));
        }
    }
    Ok(streams)
}
