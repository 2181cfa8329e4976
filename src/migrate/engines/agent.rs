//! The process that speaks to engines.
//!
//! A request to an engine may take as long as a container's arrival, so whoever drives processes by ptrace asks another
//! process to make it. That process also remembers what it has prepared: when its master goes, killed or not,
//! before the container has come to run, it removes what was half made.
//!
//! Requests and answers are JSON behind their length; a pipe for an image's archive comes as a descriptor.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::waitpid;
use nix::unistd::{Pid, dup2_stdin, dup2_stdout, setsid};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Description, Engine, Error, Image, Note, Prepared, Result, open};
use crate::migrate::options::{Container, Malformed};
use crate::runtime::{StandbySocket, chain};
use crate::sys::pidfd::PidFd;
use crate::sys::{fdpass, fds, fork, proc};

/// Longest message, in bytes: an inspected container has some ten thousand.
const LONGEST: usize = 16 << 20;
/// How long removing what was half made may take before its master goes on without knowing.
const TO_CLEAN_UP: Duration = Duration::from_secs(30);
/// How long an engine may take to kill.
const TO_KILL: Duration = Duration::from_secs(30);
/// How often it is looked whether it has.
const LOOK: Duration = Duration::from_millis(1);

#[derive(Debug, Serialize, Deserialize)]
enum Request {
    Describe { container: String },
    KnownLayers { container: String, image: Image },
    Export { container: String, image: Image, known: usize },
    Import { container: String, image: Image },
    MissingVolumes(Box<Description>),
    Check(Box<Description>),
    Prepare(Box<Description>),
    Start,
    Discard,
    Remove { container: String, prepared: Prepared },
    Retire { left: Box<Description>, keep: bool },
}

#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    Done(Value),
    Failed(String),
}

/// The master's end. Dropped, the process ends, and with it what was prepared and does not run.
#[derive(Debug)]
pub struct Agent {
    socket: Option<UnixStream>,
    process: Pid,
}

impl Agent {
    /// Forks. To be called early, while there is one thread.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn spawn() -> Result<Agent> {
        let (ours, its) = UnixStream::pair().map_err(Error::Agent)?;
        let process = fork::child(move || {
            // Its copies: of the other end, without which it would never see that closed, and of all that others wait for
            // the end of.
            let closed = fds::close_from_except(3, &[its.as_fd()]).map_err(io::Error::from);
            i32::from(closed.and_then(|()| serve(its)).is_err())
        });
        Ok(Agent { socket: Some(ours), process: process.map_err(Error::Agent)? })
    }

    /// The container as its engine knows it.
    ///
    /// # Errors
    /// [`Error::Told`], as for all requests, for what the engine says; [`Error::Agent`].
    pub fn describe(&mut self, container: &Container) -> Result<Description> {
        self.ask(&Request::Describe { container: container.to_string() })
    }

    /// See [`Engine::known_layers`]; at the destination.
    pub fn known_layers(&mut self, wanted: &Description) -> Result<Option<usize>> {
        self.ask(&Request::KnownLayers { container: wanted.container.clone(), image: wanted.image.clone() })
    }

    /// Begins to write the image, without the content of its lowest `known` layers, to `to`, and closes that; at the source.
    /// Its success is told by [`Agent::finished`].
    pub fn begin_export(&mut self, left: &Description, known: usize, to: impl Into<OwnedFd>) -> Result<()> {
        let (container, image) = (left.container.clone(), left.image.clone());
        self.send(&Request::Export { container, image, known }, Some(to.into().as_fd()))
    }

    /// Begins to read the image from `from`; at the destination. Its success is told by [`Agent::finished`].
    pub fn begin_import(&mut self, wanted: &Description, from: impl Into<OwnedFd>) -> Result<()> {
        let (container, image) = (wanted.container.clone(), wanted.image.clone());
        self.send(&Request::Import { container, image }, Some(from.into().as_fd()))
    }

    /// Waits for the end of an export or import.
    pub fn finished(&mut self) -> Result<()> {
        self.receive()
    }

    /// See [`Engine::missing_volumes`].
    pub fn missing_volumes(&mut self, wanted: &Description) -> Result<Vec<String>> {
        self.ask(&Request::MissingVolumes(Box::new(wanted.clone())))
    }

    /// See [`Engine::check`].
    pub fn check(&mut self, wanted: &Description) -> Result<Vec<Note>> {
        self.ask(&Request::Check(Box::new(wanted.clone())))
    }

    /// See [`Engine::prepare`].
    pub fn prepare(&mut self, wanted: &Description) -> Result<Prepared> {
        self.begin_prepare(wanted)?;
        self.prepared()
    }

    /// The first half of [`Agent::prepare`].
    pub fn begin_prepare(&mut self, wanted: &Description) -> Result<()> {
        self.send(&Request::Prepare(Box::new(wanted.clone())), None)
    }

    /// The second half of [`Agent::prepare`].
    pub fn prepared(&mut self) -> Result<Prepared> {
        self.receive()
    }

    /// Begins to start what was prepared: the engine is busy with it until the container is released.
    pub fn begin_start(&mut self) -> Result<()> {
        self.send(&Request::Start, None)
    }

    /// Waits until the engine has started the container: it runs, and the agent will not touch it any more. To be called
    /// when the agent is readable, which it is early where the engine could not come as far as the runtime.
    pub fn started(&mut self) -> Result<Vec<Note>> {
        self.receive()
    }

    /// Removes what was prepared, or started last.
    pub fn discard(&mut self) -> Result<()> {
        self.ask(&Request::Discard)
    }

    /// Removes what another agent has prepared.
    pub fn remove(&mut self, container: &str, prepared: &Prepared) -> Result<()> {
        self.ask(&Request::Remove { container: container.to_owned(), prepared: prepared.clone() })
    }

    /// See [`Engine::retire`]: ends a container that has left, of which `init` is the first process, and which stands still.
    /// `let_go` is called when the engine has killed it, so that whatever holds its processes does not hold them any more: none of
    /// them runs again.
    ///
    /// # Errors
    /// As for all requests. [`Error::NotKilled`]: `let_go` was not called.
    pub fn retire(&mut self, left: &Description, keep: bool, init: i32, let_go: impl FnOnce()) -> Result<()> {
        self.send(&Request::Retire { left: Box::new(left.clone()), keep }, None)?;
        let begin = Instant::now();
        while !is_killed(init).map_err(Error::Agent)? {
            if begin.elapsed() > TO_KILL {
                return Err(Error::NotKilled { name: left.name.clone() });
            }
            let answered = readable(self.as_fd(), LOOK).map_err(Error::Agent)?;
            if answered && !is_killed(init).map_err(Error::Agent)? {
                // It was not to be killed, or there is no such container.
                self.receive::<()>()?;
                return Err(Error::NotKilled { name: left.name.clone() });
            }
        }
        let_go();
        self.receive()
    }

    fn ask<T: DeserializeOwned>(&mut self, request: &Request) -> Result<T> {
        self.send(request, None)?;
        self.receive()
    }

    fn socket(&mut self) -> Result<&mut UnixStream> {
        self.socket.as_mut().ok_or_else(|| Error::Agent(ErrorKind::NotConnected.into()))
    }

    fn send(&mut self, request: &Request, with: Option<BorrowedFd<'_>>) -> Result<()> {
        write(self.socket()?, request, with).map_err(Error::Agent)
    }

    fn receive<T: DeserializeOwned>(&mut self) -> Result<T> {
        match read(self.socket()?).map_err(Error::Agent)? {
            Some((Answer::Done(value), _)) => serde_json::from_value(value).map_err(|e| Error::Agent(e.into())),
            Some((Answer::Failed(why), _)) => Err(Error::Told(why)),
            None => Err(Error::Agent(ErrorKind::UnexpectedEof.into())),
        }
    }
}

impl AsFd for Agent {
    /// Readable when an answer is there.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_ref().expect("only `drop` takes it").as_fd()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        drop(self.socket.take());
        let ended = PidFd::open(self.process.as_raw()).and_then(|process| process.wait_end(TO_CLEAN_UP));
        if let Ok(true) = ended {
            let _ = waitpid(self.process, None);
        } else {
            tracing::warn!(pid = self.process.as_raw(), "the process that speaks to the engine is still busy");
        }
    }
}

/// Whether a process has ended or is about to: SIGKILL waits for it (proc_pid_status(5)), which no freezer keeps from it
/// for longer than it freezes.
fn is_killed(pid: i32) -> io::Result<bool> {
    let status = match proc::status(pid) {
        Err(e) if e.kind() == ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH) => return Ok(true),
        status => status?,
    };
    let waits = |field| status.mask(field).is_ok_and(|set| set >> (libc::SIGKILL - 1) & 1 == 1);
    Ok(status.field("State").is_ok_and(|state| state.starts_with(['Z', 'X'])) || waits("ShdPnd") || waits("SigPnd"))
}

fn readable(fd: BorrowedFd<'_>, timeout: Duration) -> io::Result<bool> {
    let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
    Ok(poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout)? > 0)
}

/// What a message goes with: its length, little-endian.
const HEAD: usize = 4;

fn write(to: &mut UnixStream, message: &impl Serialize, with: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let json = serde_json::to_vec(message)?;
    let length = u32::try_from(json.len()).map_err(|_| ErrorKind::FileTooLarge)?;
    let with: Vec<_> = with.into_iter().collect();
    fdpass::send(to.as_fd(), &length.to_le_bytes(), &with)?;
    to.write_all(&json)
}

/// None: the other side has closed.
fn read<T: DeserializeOwned>(from: &mut UnixStream) -> io::Result<Option<(T, Option<OwnedFd>)>> {
    let mut head = [0; HEAD];
    let (have, with) = fdpass::receive(from.as_fd(), &mut head)?;
    if have == 0 {
        return Ok(None);
    }
    from.read_exact(&mut head[have..])?;
    let length = u32::from_le_bytes(head) as usize;
    if length > LONGEST {
        return Err(ErrorKind::FileTooLarge.into());
    }
    let mut json = vec![0; length];
    from.read_exact(&mut json)?;
    Ok(Some((serde_json::from_slice(&json)?, with.into_iter().next())))
}

/// What the process does all its life.
fn serve(mut socket: UnixStream) -> io::Result<()> {
    // Ctrl-C is for the master, whose end undoes what is to be undone.
    setsid()?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    dup2_stdin(&null)?;
    dup2_stdout(&null)?;
    let mut desk = Desk { open: &open, prepared: None, started: None };
    while let Ok(Some((request, with))) = read(&mut socket) {
        let answer = match desk.answer(request, with) {
            Ok(value) => Answer::Done(value),
            Err(e) => Answer::Failed(chain(&e)),
        };
        if write(&mut socket, &answer, None).is_err() {
            break;
        }
    }
    desk.close();
    Ok(())
}

type Opener<'a> = &'a dyn Fn(&Container) -> Result<Box<dyn Engine>>;

/// What the process knows between two requests.
struct Desk<'a> {
    open: Opener<'a>,
    /// What is made and does not run.
    prepared: Option<(Description, Prepared)>,
    /// What runs, for all that the engine knows: it stays when the master goes.
    started: Option<(Description, Prepared)>,
}

impl Desk<'_> {
    fn engine(&self, container: &str) -> Result<Box<dyn Engine>> {
        (self.open)(&parse(container)?)
    }

    fn answer(&mut self, request: Request, with: Option<OwnedFd>) -> Result<Value> {
        let pipe = with.map(File::from).ok_or_else(|| Error::Agent(ErrorKind::InvalidInput.into()));
        match request {
            Request::Describe { container } => {
                let name = parse(&container)?.name().to_owned();
                value(&self.engine(&container)?.describe(&name)?)
            }
            Request::KnownLayers { container, image } => value(&self.engine(&container)?.known_layers(&image)?),
            Request::Export { container, image, known } => {
                value(&self.engine(&container)?.export(&image, known, &mut pipe?)?)
            }
            Request::Import { container, image } => value(&self.engine(&container)?.import(&image, &mut pipe?)?),
            Request::MissingVolumes(wanted) => value(&self.engine(&wanted.container)?.missing_volumes(&wanted)?),
            Request::Check(wanted) => value(&self.engine(&wanted.container)?.check(&wanted)?),
            Request::Prepare(wanted) => {
                let prepared = self.engine(&wanted.container)?.prepare(&wanted)?;
                self.prepared = Some((*wanted, prepared.clone()));
                value(&prepared)
            }
            Request::Start => {
                let (wanted, prepared) = self.prepared.as_ref().ok_or_else(nothing)?;
                let notes = self.engine(&wanted.container)?.start(wanted, prepared)?;
                self.started = self.prepared.take();
                value(&notes)
            }
            Request::Discard => {
                self.prepared = self.prepared.take().or(self.started.take());
                value(&self.discard()?)
            }
            Request::Remove { container, prepared } => value(&self.remove(&container, &prepared)?),
            Request::Retire { left, keep } => value(&self.engine(&left.container)?.retire(&left, keep)?),
        }
    }

    fn discard(&mut self) -> Result<()> {
        match self.prepared.take() {
            Some((wanted, prepared)) => self.remove(&wanted.container, &prepared),
            None => Ok(()),
        }
    }

    fn remove(&self, container: &str, prepared: &Prepared) -> Result<()> {
        self.engine(container)?.discard(prepared)?;
        // A receiver that lives removes it by itself.
        let _ = StandbySocket::forget(&prepared.id);
        Ok(())
    }

    /// The master is gone.
    fn close(&mut self) {
        if let Err(error) = self.discard() {
            tracing::warn!("cannot remove what was prepared: {}", chain(&error));
        }
    }
}

fn parse(container: &str) -> Result<Container> {
    container.parse().map_err(|e: Malformed| Error::Told(e.to_string()))
}

fn nothing() -> Error {
    Error::Told("nothing is prepared".into())
}

fn value(of: &impl Serialize) -> Result<Value> {
    serde_json::to_value(of).map_err(|e| Error::Agent(e.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::rc::Rc;

    /// An engine that notes what it is asked for; its start fails.
    #[derive(Clone, Default)]
    struct Clerk(Rc<RefCell<Vec<String>>>);

    impl Clerk {
        fn note(&self, what: &str) {
            self.0.borrow_mut().push(what.to_owned());
        }
    }

    impl Engine for Clerk {
        fn describe(&self, name: &str) -> Result<Description> {
            Err(Error::NotRunning { name: name.to_owned() })
        }
        fn known_layers(&self, _: &Image) -> Result<Option<usize>> {
            Ok(Some(2))
        }
        fn export(&self, _: &Image, known: usize, to: &mut dyn Write) -> Result<()> {
            write!(to, "all but {known}").map_err(Error::Agent)
        }
        fn import(&self, _: &Image, _: &mut dyn Read) -> Result<()> {
            Ok(())
        }
        fn missing_volumes(&self, _: &Description) -> Result<Vec<String>> {
            Ok(Vec::new())
        }
        fn check(&self, _: &Description) -> Result<Vec<Note>> {
            Ok(Vec::new())
        }
        fn prepare(&self, _: &Description) -> Result<Prepared> {
            self.note("prepare");
            Ok(Prepared { id: "new".into(), ..Prepared::default() })
        }
        fn start(&self, wanted: &Description, prepared: &Prepared) -> Result<Vec<Note>> {
            self.note(&format!("start {}", prepared.id));
            if wanted.name == "bad" { Err(Error::Told("it did not arrive".into())) } else { Ok(Vec::new()) }
        }
        fn discard(&self, prepared: &Prepared) -> Result<()> {
            self.note(&format!("discard {}", prepared.id));
            Ok(())
        }
        fn retire(&self, left: &Description, keep: bool) -> Result<()> {
            self.note(&format!("retire {} {keep}", left.id));
            Ok(())
        }
    }

    fn description(name: &str) -> Box<Description> {
        Box::new(Description {
            container: format!("docker://{name}"),
            name: name.into(),
            ..super::super::tests::description()
        })
    }

    #[test]
    fn what_does_not_run_is_removed_when_the_master_goes() {
        for (name, expected) in
            [("bad", &["prepare", "start new", "discard new"][..]), ("good", &["prepare", "start new"])]
        {
            let clerk = Clerk::default();
            let open = |_: &Container| -> Result<Box<dyn Engine>> { Ok(Box::new(clerk.clone())) };
            let mut desk = Desk { open: &open, prepared: None, started: None };
            desk.answer(Request::Prepare(description(name)), None).unwrap();
            assert_eq!(desk.answer(Request::Start, None).is_ok(), name == "good");
            desk.close();
            assert_eq!(*clerk.0.borrow(), expected);
        }
    }

    #[test]
    fn nothing_is_discarded_twice() {
        let clerk = Clerk::default();
        let open = |_: &Container| -> Result<Box<dyn Engine>> { Ok(Box::new(clerk.clone())) };
        let mut desk = Desk { open: &open, prepared: None, started: None };
        assert!(desk.answer(Request::Start, None).is_err());
        desk.answer(Request::Prepare(description("web")), None).unwrap();
        desk.answer(Request::Discard, None).unwrap();
        desk.close();
        assert_eq!(*clerk.0.borrow(), ["prepare", "discard new"]);
        // One that runs goes if that is what is asked for, and not by itself.
        desk.answer(Request::Prepare(description("web")), None).unwrap();
        desk.answer(Request::Start, None).unwrap();
        desk.close();
        desk.answer(Request::Discard, None).unwrap();
        desk.answer(Request::Discard, None).unwrap();
        assert_eq!(clerk.0.borrow()[2..], ["prepare", "start new", "discard new"]);
    }

    #[test]
    fn an_archive_goes_into_the_pipe_that_comes_along() {
        let clerk = Clerk::default();
        let open = |_: &Container| -> Result<Box<dyn Engine>> { Ok(Box::new(clerk.clone())) };
        let mut desk = Desk { open: &open, prepared: None, started: None };
        let (mut ours, mut its) = UnixStream::pair().unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        let wanted = description("web");
        let request = Request::Export { container: wanted.container, image: wanted.image, known: 3 };
        write(&mut ours, &request, Some(writer.as_fd())).unwrap();
        drop(writer);
        let (request, with) = read(&mut its).unwrap().unwrap();
        desk.answer(request, with).unwrap();
        let mut archive = String::new();
        reader.read_to_string(&mut archive).unwrap();
        assert_eq!(archive, "all but 3");
        drop(ours);
        assert!(read::<Answer>(&mut its).unwrap().is_none());
    }

    #[test]
    fn what_is_no_message_is_refused() {
        let (mut ours, mut its) = UnixStream::pair().unwrap();
        ours.write_all(&u32::MAX.to_le_bytes()).unwrap();
        assert!(read::<Request>(&mut its).is_err());
        ours.write_all(b"\x02\0\0\0{}").unwrap();
        assert!(read::<Request>(&mut its).is_err());
    }

    #[test]
    fn a_process_that_is_killed_is_known_before_it_is_gone() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let pid = child.id().cast_signed();
        assert!(!is_killed(pid).unwrap());
        child.kill().unwrap();
        assert!(is_killed(pid).unwrap());
        child.wait().unwrap();
        assert!(is_killed(pid).unwrap());
    }

    #[test]
    fn the_process_answers_and_ends() {
        let mut agent = Agent::spawn().unwrap();
        let error = agent.describe(&"lone".parse().unwrap()).unwrap_err();
        assert!(error.to_string().contains("lmrun alone"), "{error}");
        let process = agent.process;
        drop(agent);
        assert!(PidFd::open(process.as_raw()).is_err(), "it is gone and reaped");
    }
}
