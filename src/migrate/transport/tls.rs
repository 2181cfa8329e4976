//! Hosts that know each other, by TLS ([`crate::transfer::tls`]).

use std::io;
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::sync::Arc;

use super::{Channel, Error, Link, Pace, Result};
use crate::sys::{fds, fork};
use crate::transfer::pki::Pki;
use crate::transfer::tls::{self, Connection, Incoming, Listener};

/// Processes that receive at the same time; who has not shown who it is counts for ten seconds.
const MOST: usize = 32;

pub(super) fn connect(host: &str, port: u16, pace: Option<Arc<Pace>>) -> Result<Channel> {
    let address = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
    open(tls::connect(&address, &Pki::default())?, pace)
}

fn open(connection: Connection, pace: Option<Arc<Pace>>) -> Result<Channel> {
    let Connection { peer, address, reader, writer } = connection;
    let link = Link::over_socket(reader.socket(), format!("{} at {address}", peer.name)).map_err(Error::Stdio)?;
    Ok(Channel::new(Box::new(reader), Box::new(writer), link, pace))
}

/// The connection that is standard input, as inetd and systemd hand it down. Nothing that is printed goes there.
pub fn socket() -> Result<Channel> {
    let take = || {
        let socket = TcpStream::from(fds::inherited(0)?);
        nix::unistd::dup2_stdin(&std::fs::File::open("/dev/null")?)?;
        nix::unistd::dup2_stdout(io::stderr().as_fd())?;
        socket.set_nonblocking(false)?;
        socket.peer_addr().map(|_| socket)
    };
    let socket = take().map_err(Error::Stdio)?;
    open(Incoming::new(socket, &Pki::default())?.authenticate()?, None)
}

/// Waits at `HOST:PORT` for paired hosts, and has a process of its own `receive` from each; returns when that cannot go on.
/// The caller has one thread only.
pub fn listen(address: &str, receive: impl Fn(Result<Channel>) -> i32) -> Result<std::convert::Infallible> {
    let mut listener = Some(Listener::bind(address, Pki::default())?);
    let failed = |source| Error::Listen { address: address.to_owned(), source };
    let mut children = 0;
    loop {
        let accepted = listener.as_ref().map(Listener::accept);
        while children > 0 && fork::reap(children >= MOST).map_err(failed)? {
            children -= 1;
        }
        let mut incoming = match accepted.unwrap_or(Err(io::ErrorKind::NotConnected.into())) {
            Ok(incoming) => Some(incoming),
            // It has gone before it was looked at.
            Err(e) if e.kind() == io::ErrorKind::ConnectionAborted => continue,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(failed(e)),
        };
        let child = || {
            // The place is the parent's: another one may take it while a child is at work.
            listener = None;
            let incoming = incoming.take().expect("taken once, in the child");
            receive(incoming.authenticate().map_err(Error::from).and_then(|connection| open(connection, None)))
        };
        fork::child(child).map_err(failed)?;
        children += 1;
    }
}
