//! How the two ends reach each other: by the user's ssh, by TLS, or by what somebody else has connected.

mod pace;
mod patience;
mod place;
mod ssh;
mod tls;

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::Child;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::wire::{self, Reader, Writer};
use crate::sys::fds;

pub use pace::Pace;
pub use patience::Patience;
pub use place::Destination;
pub use tls::{listen, socket};

pub type Input = Box<dyn Read + Send>;
pub type Output = Box<dyn Write + Send>;

/// How long the other end may be silent, if nobody says otherwise.
pub const PATIENCE: Duration = Duration::from_secs(15);
/// How long a program that connects us may take to end after its work.
const GRACE: Duration = Duration::from_secs(2);

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0:?} is no destination: give ssh://[USER@]HOST[:PORT][/PATH/OF/LMRUN] or tls://HOST:PORT")]
    Destination(String),
    #[error("cannot run ssh; hint: install OpenSSH's client, or use tls://")]
    Ssh(#[source] io::Error),
    #[error("standard input and output")]
    Stdio(#[source] io::Error),
    #[error("cannot listen on {address}")]
    Listen { address: String, source: io::Error },
    #[error(transparent)]
    Tls(#[from] crate::transfer::tls::Error),
    #[error("{what} ended ({status}{hint})")]
    Ended { what: String, status: std::process::ExitStatus, hint: &'static str },
}

pub type Result<T> = std::result::Result<T, Error>;

/// A connection with the other end.
pub struct Channel {
    pub reader: Reader<Input>,
    pub writer: Writer<Output>,
    pub link: Link,
}

/// What a connection runs through. To be dropped after both halves: then the program that connects us ends by itself.
pub struct Link {
    /// Who is at the other end, for messages.
    pub peer: String,
    pub patience: Patience,
    program: Option<(String, Child)>,
}

/// The destination's lmrun, waiting for a first word. `arguments` are for `receive --stdio`, where it is started by us.
pub fn connect(destination: &Destination, arguments: &[&str], pace: Option<Arc<Pace>>) -> Result<Channel> {
    match destination {
        Destination::Ssh { .. } => ssh::connect(destination, arguments, pace),
        Destination::Tls { host, port } => tls::connect(host, *port, pace),
    }
}

/// Standard input and output, which from now on lead to /dev/null and to standard error: nothing that is printed by
/// mistake gets between the messages.
pub fn stdio() -> Result<Channel> {
    let take = || {
        let (input, output) = (fds::inherited(0)?, fds::inherited(1)?);
        let null = std::fs::File::open("/dev/null")?;
        nix::unistd::dup2_stdin(&null)?;
        nix::unistd::dup2_stdout(io::stderr().as_fd())?;
        Channel::over(input, output, "the source".into(), None)
    };
    take().map_err(Error::Stdio)
}

impl Channel {
    /// Over two descriptors that can be polled.
    pub fn over(input: OwnedFd, output: OwnedFd, peer: String, pace: Option<Arc<Pace>>) -> io::Result<Self> {
        let patience = Patience::new(PATIENCE);
        let reader = Box::new(patience.reader(input));
        let writer = Box::new(patience.writer(output)?);
        Ok(Channel::new(reader, writer, Link { peer, patience, program: None }, pace))
    }

    /// Over halves that keep to [`Link::patience`] themselves.
    pub fn new(reader: Input, writer: Output, link: Link, pace: Option<Arc<Pace>>) -> Self {
        let writer = match pace {
            Some(pace) => Box::new(pace::Paced::new(writer, pace)),
            None => writer,
        };
        Channel { reader: Reader::new(reader), writer: Writer::new(writer), link }
    }
}

impl Link {
    /// Over a connected socket, whose silence is noticed by the socket's own timeouts.
    pub fn over_socket(socket: &std::net::TcpStream, peer: String) -> io::Result<Self> {
        Ok(Link { peer, patience: Patience::of_socket(socket, PATIENCE)?, program: None })
    }

    /// The reason behind an error, where the program that connects us knows better.
    pub fn explain(&mut self, error: wire::Error) -> super::Error {
        let broken = matches!(error, wire::Error::Closed | wire::Error::Truncated | wire::Error::Io(_));
        match &mut self.program {
            Some((what, child)) if broken => match ended(child) {
                Some(status) if !status.success() => {
                    let hint = match status.code() {
                        Some(255) => "; it has said why",
                        Some(126 | 127) => {
                            "; is lmrun there, and on the PATH? ssh://HOST/PATH/OF/LMRUN says where it is"
                        }
                        _ => "",
                    };
                    Error::Ended { what: what.clone(), status, hint }.into()
                }
                _ => error.into(),
            },
            _ => error.into(),
        }
    }
}

/// Waits for a program that should be about to end.
fn ended(child: &mut Child) -> Option<std::process::ExitStatus> {
    let deadline = Instant::now() + GRACE;
    loop {
        match child.try_wait() {
            Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            done => return done.ok().flatten(),
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if let Some((_, child)) = &mut self.program
            && ended(child).is_none()
        {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[cfg(test)]
mod tests;
