//! A container that an engine makes by `create` and `start`, and whose processes arrive from another host.
//!
//! Whoever receives them binds a [`StandbySocket`] for the container's id before it asks the engine to start it.
//! `create` then builds the container around a puppet, as for any restore, in a time namespace of the clocks that
//! arrive; `start` lets the puppet go, hands it over the socket to the receiver, and waits for its word. So for the
//! engine the container is being started for as long as its memory arrives, and it runs when it runs.
//!
//! The directory `/run/lmrun-standby/<id>` is root's alone. It names one container of one start: neither an image nor
//! a user has a say in it, and a later start of the same container is a plain one. One whose receiver is gone
//! (killed, since it removes the directory otherwise) refuses the start: the container may be running
//! where it was to come from.

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use super::cgroup::Cgroup;
use super::state::{Store, validate_id, write_whole};
use super::{Error, Result, streams};
use crate::engine::{ClockOffsets, Freezer, Puppet};
use crate::sys::fdpass;

const STANDBYS: &str = "/run/lmrun-standby";
const SOCKET: &str = "socket";
const TERMS: &str = "standby.json";
/// Longest message, in bytes: three paths.
const LONGEST: usize = 1 << 14;
/// How long a `start` that has connected may take to say what it has; it has everything at hand.
const TO_SPEAK: Duration = Duration::from_secs(5);
const WELCOME: &[u8] = b"ok\n";

/// What `create` has to know.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
struct Terms {
    monotonic: (i64, u32),
    boottime: (i64, u32),
    /// The last components of the bundle's path.
    bundle: PathBuf,
}

/// What `start` says of the container; with it come the driver's end of the puppet's socket and the standard streams.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Notice {
    init: i32,
    dir: PathBuf,
    bundle: PathBuf,
    rootfs: PathBuf,
    /// The numbers of the standard streams that are open.
    streams: Vec<i32>,
}

/// Where `start` of one container reports. Dropped, the container is one like any other.
#[derive(Debug)]
pub struct StandbySocket {
    dir: PathBuf,
    listener: UnixListener,
}

/// A container whose init is a puppet that waits to be driven. Dropped, `start` fails and the puppet ends.
#[derive(Debug)]
pub struct Arrived {
    /// As the caller's pid namespace counts.
    pub init: i32,
    /// Where lmrun keeps the container's state; locked by the `start` that waits.
    pub dir: PathBuf,
    pub bundle: PathBuf,
    /// Absolute; the mount that the container's root is made of.
    pub rootfs: PathBuf,
    control: UnixStream,
    streams: Vec<(i32, OwnedFd)>,
    start: UnixStream,
}

impl StandbySocket {
    /// From now on `create` and `start` of container `id` with a bundle whose path ends in `bundle` (which may be the
    /// id alone where ids are unique to the host) make a standby, whose clocks are ahead of this host's by `clocks`.
    ///
    /// # Errors
    /// [`Error::Standby`] where another receiver waits for the container; what the file system says.
    pub fn bind(id: &str, bundle: &Path, clocks: ClockOffsets) -> Result<Self> {
        StandbySocket::bind_at(Path::new(STANDBYS), id, bundle, clocks)
    }

    fn bind_at(standbys: &Path, id: &str, bundle: &Path, clocks: ClockOffsets) -> Result<Self> {
        validate_id(id)?;
        let dir = standbys.join(id);
        let socket = dir.join(SOCKET);
        if UnixStream::connect(&socket).is_ok() {
            return Err(Error::Standby(format!("somebody waits for it already ({})", dir.display())));
        }
        remove(&dir)?;
        let made = fs::DirBuilder::new().mode(0o700).recursive(true).create(&dir);
        made.map_err(|e| Error::io(&dir, e))?;
        let terms = Terms { monotonic: clocks.monotonic, boottime: clocks.boottime, bundle: bundle.to_owned() };
        let json = serde_json::to_vec(&terms).map_err(|e| Error::io(&dir, e.into()))?;
        write_whole(&dir.join(TERMS), &json).map_err(|e| Error::io(&dir, e))?;
        let listener = UnixListener::bind(&socket).map_err(|e| Error::io(&socket, e))?;
        Ok(StandbySocket { dir, listener })
    }

    /// Removes what a receiver of container `id` has left that was killed. The container is gone, or is to be one like any other.
    ///
    /// # Errors
    /// [`Error::Standby`] where the receiver is alive; what the file system says.
    pub fn forget(id: &str) -> Result<()> {
        validate_id(id)?;
        let dir = Path::new(STANDBYS).join(id);
        match UnixStream::connect(dir.join(SOCKET)) {
            Ok(_) => Err(Error::Standby(format!("somebody waits for it ({})", dir.display()))),
            Err(_) => remove(&dir),
        }
    }

    /// Waits for the container; None when `timeout` has passed first. What its engine makes of a container that
    /// cannot be made, it tells who asked it.
    ///
    /// # Errors
    /// What the socket says; a `start` that does not keep to the protocol.
    pub fn accept(&self, timeout: Duration) -> Result<Option<Arrived>> {
        let io = |e: io::Error| Error::io(self.dir.join(SOCKET), e);
        let begin = std::time::Instant::now();
        loop {
            let left = timeout.saturating_sub(begin.elapsed());
            if !readable(self.listener.as_fd(), left).map_err(io)? {
                return Ok(None);
            }
            let (start, _) = self.listener.accept().map_err(io)?;
            start.set_read_timeout(Some(TO_SPEAK)).map_err(io)?;
            // `create` only asks whether somebody is there.
            if let Some(arrived) = Arrived::receive(start).map_err(io)? {
                return Ok(Some(arrived));
            }
        }
    }
}

impl AsFd for StandbySocket {
    /// Readable when a container may have arrived.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for StandbySocket {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.dir) {
            tracing::warn!(%error, "cannot remove the standby's directory");
        }
    }
}

impl Arrived {
    fn receive(start: UnixStream) -> io::Result<Option<Arrived>> {
        let mut buf = vec![0; LONGEST];
        let (mut have, mut fds) = fdpass::receive(start.as_fd(), &mut buf)?;
        if have == 0 {
            return Ok(None);
        }
        while !buf[..have].ends_with(b"\n") {
            let (more, with) = fdpass::receive(start.as_fd(), &mut buf[have..])?;
            if more == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            have += more;
            fds.extend(with);
        }
        let notice: Notice = serde_json::from_slice(&buf[..have])?;
        let mut fds = fds.into_iter();
        let control = fds.next().ok_or(ErrorKind::InvalidData)?;
        let streams: Vec<_> = notice.streams.iter().copied().zip(fds).collect();
        if streams.len() != notice.streams.len() {
            return Err(ErrorKind::InvalidData.into());
        }
        let Notice { init, dir, bundle, rootfs, .. } = notice;
        Ok(Some(Arrived { init, dir, bundle, rootfs, control: control.into(), streams, start }))
    }

    /// What the engine drives. Its socket ends with the last copy: the puppet too, if nobody traces it by then.
    pub fn puppet(&self) -> io::Result<Puppet> {
        Ok(Puppet { pid: self.init, control: self.control.try_clone()? })
    }

    /// Standard stream 0, 1 or 2 that the engine has given the container.
    ///
    /// # Errors
    /// `NotFound` where it has not.
    pub fn stream(&self, number: i32) -> io::Result<OwnedFd> {
        let (_, stream) = self.streams.iter().find(|(n, _)| *n == number).ok_or(ErrorKind::NotFound)?;
        stream.try_clone()
    }

    /// What takes the place of the standard streams that the container had from outside where it came from: those that the
    /// engine has given it here.
    ///
    /// `images` has the records that were made last.
    ///
    /// # Errors
    /// `NotFound` for a stream that it had there and has not here.
    pub fn external(&self, images: &Path) -> Result<Vec<(String, OwnedFd)>> {
        streams::replaced(images, &|number| self.stream(number))
    }

    /// The freezer of the container's cgroup, which holds it still without anybody.
    pub fn freezer(&self) -> Result<Box<dyn Freezer>> {
        let root = self.dir.parent().unwrap_or(Path::new("/"));
        let id = self.dir.file_name().unwrap_or_default().to_string_lossy();
        Ok(Box::new(Cgroup::at(&Store::new(root).load(&id)?.cgroup)))
    }

    /// Whether `start` still waits: when it does not, the engine has given the container up.
    pub fn is_waiting(&self) -> bool {
        // It never sends a second message, so there is nothing to read but its end.
        matches!(readable(self.start.as_fd(), Duration::ZERO), Ok(false))
    }

    /// Lets `start` return: the container runs, or why it does not.
    ///
    /// # Errors
    /// `start` is gone.
    pub fn release(mut self, outcome: std::result::Result<(), &str>) -> io::Result<()> {
        match outcome {
            Ok(()) => self.start.write_all(WELCOME),
            Err(why) => self.start.write_all(why.as_bytes()),
        }
    }
}

/// Whether somebody waits for container `id` with this bundle, and in what clocks it is to live.
pub(super) fn awaited(id: &str, bundle: &Path) -> Result<Option<(PathBuf, ClockOffsets)>> {
    awaited_at(Path::new(STANDBYS), id, bundle)
}

fn awaited_at(standbys: &Path, id: &str, bundle: &Path) -> Result<Option<(PathBuf, ClockOffsets)>> {
    let dir = standbys.join(id);
    let json = match fs::read(dir.join(TERMS)) {
        Ok(json) => json,
        // Another user's lmrun, without root's rights, is not meant.
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::PermissionDenied) => return Ok(None),
        Err(e) => return Err(Error::io(dir, e)),
    };
    let terms: Terms = serde_json::from_slice(&json).map_err(|e| Error::io(&dir, e.into()))?;
    if !bundle.ends_with(&terms.bundle) {
        return Ok(None);
    }
    connect(&dir)?;
    Ok(Some((dir, ClockOffsets { monotonic: terms.monotonic, boottime: terms.boottime })))
}

/// A container whose puppet is ready.
#[derive(Debug)]
pub(super) struct Made<'a> {
    pub init: i32,
    pub dir: &'a Path,
    pub bundle: &'a Path,
    pub rootfs: &'a Path,
    /// The driver's end of the puppet's socket.
    pub control: UnixStream,
    /// Those of the standard streams that are open, by number.
    pub streams: Vec<(i32, OwnedFd)>,
}

/// Hands a container to whoever waits for it in `standby`, and waits for its word.
///
/// # Errors
/// [`Error::Standby`]: the container did not come to run.
pub(super) fn report(standby: &Path, made: Made<'_>) -> Result<()> {
    let mut socket = connect(standby)?;
    let io = |e| Error::io(standby.join(SOCKET), e);
    let notice = Notice {
        init: made.init,
        dir: made.dir.to_owned(),
        bundle: made.bundle.to_owned(),
        rootfs: made.rootfs.to_owned(),
        streams: made.streams.iter().map(|(n, _)| *n).collect(),
    };
    let mut json = serde_json::to_vec(&notice).map_err(|e| io(e.into()))?;
    json.push(b'\n');
    let streams = made.streams.iter().map(|(_, stream)| stream.as_fd());
    let fds: Vec<_> = std::iter::once(made.control.as_fd()).chain(streams).collect();
    fdpass::send(socket.as_fd(), &json, &fds).map_err(io)?;
    // Only the receiver's copies count from now on: the puppet ends with them.
    drop(made);
    let mut said = Vec::new();
    (&mut socket).take(LONGEST as u64).read_to_end(&mut said).map_err(io)?;
    match &said[..] {
        WELCOME => Ok(()),
        [] => Err(Error::Standby("who waited for it has gone".into())),
        why => Err(Error::Standby(String::from_utf8_lossy(why).trim().to_owned())),
    }
}

fn connect(dir: &Path) -> Result<UnixStream> {
    UnixStream::connect(dir.join(SOCKET)).map_err(|e| {
        Error::Standby(format!(
            "nobody waits in {} any more ({e}); remove the container, and that directory",
            dir.display()
        ))
    })
}

fn readable(fd: BorrowedFd<'_>, timeout: Duration) -> io::Result<bool> {
    let mut polled = [PollFd::new(fd, PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
    Ok(poll(&mut polled, timeout)? > 0)
}

fn remove(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(Error::io(dir, e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    const CLOCKS: ClockOffsets = ClockOffsets { monotonic: (-7, 5), boottime: (9, 0) };

    fn place(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("lmrun-standby-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        dir
    }

    /// What `start` does, with a stand-in for the puppet's socket and one standard stream.
    fn start(standby: &Path, control: UnixStream) -> Result<()> {
        let stdout = OwnedFd::from(fs::File::open("/dev/null").unwrap());
        let [dir, bundle, rootfs] = ["/run/x/web", "/b/moby/web", "/r"].map(Path::new);
        report(standby, Made { init: 77, dir, bundle, rootfs, control, streams: vec![(1, stdout)] })
    }

    #[test]
    fn a_container_is_handed_over_and_released() {
        let at = place("over");
        let socket = StandbySocket::bind_at(&at, "web", Path::new("moby/web"), CLOCKS).unwrap();
        let (dir, clocks) = awaited_at(&at, "web", Path::new("/b/moby/web")).unwrap().unwrap();
        assert_eq!(clocks, CLOCKS);
        for outcome in [Ok(()), Err("the link went down")] {
            let (mut puppet, control) = UnixStream::pair().unwrap();
            let waiting = {
                let dir = dir.clone();
                std::thread::spawn(move || start(&dir, control))
            };
            let arrived = socket.accept(TO_SPEAK).unwrap().unwrap();
            assert_eq!((arrived.init, arrived.rootfs.as_path()), (77, Path::new("/r")));
            assert!(arrived.is_waiting());
            assert!(arrived.stream(1).unwrap().as_raw_fd() > 2);
            assert_eq!(arrived.stream(0).unwrap_err().kind(), ErrorKind::NotFound);
            arrived.puppet().unwrap().control.write_all(b"go").unwrap();
            arrived.release(outcome).unwrap();
            match (outcome, waiting.join().unwrap()) {
                (Ok(()), Ok(())) => {}
                (Err(why), Err(Error::Standby(said))) => assert_eq!(said, why),
                (_, other) => panic!("{other:?}"),
            }
            let mut said = String::new();
            puppet.read_to_string(&mut said).unwrap();
            assert_eq!(said, "go", "and then its end: nobody holds the driver's side");
        }
        drop(socket);
        assert!(awaited_at(&at, "web", Path::new("/b/moby/web")).unwrap().is_none());
        assert_eq!(fs::read_dir(&at).unwrap().count(), 0, "nothing is left");
        fs::remove_dir(at).unwrap();
    }

    #[test]
    fn who_drops_it_fails_the_start() {
        let at = place("dropped");
        let socket = StandbySocket::bind_at(&at, "web", Path::new("web"), CLOCKS).unwrap();
        let (_puppet, control) = UnixStream::pair().unwrap();
        let dir = at.join("web");
        let waiting = std::thread::spawn(move || start(&dir, control));
        drop(socket.accept(TO_SPEAK).unwrap().unwrap());
        assert!(matches!(waiting.join().unwrap(), Err(Error::Standby(_))));
        assert!(socket.accept(Duration::ZERO).unwrap().is_none());
        drop(socket);
        fs::remove_dir(at).unwrap();
    }

    #[test]
    fn a_start_that_has_died_is_noticed() {
        let at = place("died");
        let socket = StandbySocket::bind_at(&at, "web", Path::new("web"), CLOCKS).unwrap();
        let peer = UnixStream::connect(at.join("web").join(SOCKET)).unwrap();
        let notice = Notice { init: 1, dir: "/d".into(), bundle: "/b".into(), rootfs: "/r".into(), streams: vec![] };
        let json = serde_json::to_string(&notice).unwrap() + "\n";
        let (control, _other) = UnixStream::pair().unwrap();
        // In two pieces: a stream has no messages.
        let (first, rest) = json.as_bytes().split_at(9);
        fdpass::send(peer.as_fd(), first, &[control.as_fd()]).unwrap();
        fdpass::send(peer.as_fd(), rest, &[]).unwrap();
        let arrived = socket.accept(TO_SPEAK).unwrap().unwrap();
        assert!(arrived.is_waiting());
        drop(peer);
        assert!(!arrived.is_waiting());
        drop(socket);
        fs::remove_dir(at).unwrap();
    }

    #[test]
    fn only_the_container_that_is_meant_waits() {
        let at = place("meant");
        let bind = || StandbySocket::bind_at(&at, "web", Path::new("default/web"), CLOCKS);
        let socket = bind().unwrap();
        assert!(awaited_at(&at, "other", Path::new("/b/default/other")).unwrap().is_none());
        assert!(awaited_at(&at, "web", Path::new("/b/k8s/web")).unwrap().is_none(), "one of another namespace");
        assert!(matches!(bind(), Err(Error::Standby(_))), "one receiver at a time");
        // As kill -9 leaves it: the directory is there, and nobody listens.
        let dead = at.join("web");
        drop(socket);
        fs::create_dir(&dead).unwrap();
        drop(UnixListener::bind(dead.join(SOCKET)).unwrap());
        let terms = Terms { monotonic: (0, 0), boottime: (0, 0), bundle: "web".into() };
        fs::write(dead.join(TERMS), serde_json::to_vec(&terms).unwrap()).unwrap();
        let error = awaited_at(&at, "web", Path::new("/b/default/web")).unwrap_err().to_string();
        assert!(error.contains("nobody waits"), "{error}");
        drop(bind().unwrap());
        fs::remove_dir(at).unwrap();
    }

    #[test]
    fn ids_do_not_lead_out() {
        let bound = StandbySocket::bind_at(&place("ids"), "../x", Path::new("x"), CLOCKS);
        assert!(matches!(bound, Err(Error::InvalidId(_))));
    }
}
