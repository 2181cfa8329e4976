//! Reading what a unix socket has received, without taking it.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use libc::{SOL_SOCKET, c_int};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{Socket, is_datagram, must_be_paired, name_of};
use crate::engine::res::fd::FdFacts;
use crate::engine::{Error, Result};
use crate::image::records::sockets::{SkPacketEntry, SkShutdown, UnixSkEntry};
use crate::sys::sockopt;
use crate::sys::unix_socket::{Peeked, peek};

fn polled(f: &FdFacts) -> Result<PollFlags> {
    let mut p = [PollFd::new(f.dup.as_fd(), PollFlags::POLLIN | PollFlags::POLLPRI)];
    poll(&mut p, PollTimeout::ZERO).map_err(|e| Error::proc(f.pid, e.into()))?;
    Ok(p[0].revents().unwrap_or(PollFlags::empty()))
}

/// Whether the next call on the socket fails with ECONNRESET: its peer was closed and had not read everything. To ask
/// for SO_ERROR would be to take it.
pub fn has_error(f: &FdFacts) -> Result<bool> {
    Ok(polled(f)?.contains(PollFlags::POLLERR))
}

/// The records of what a socket has received. `names` are those of the container's datagram sockets.
pub fn read(s: &Socket, peer: Option<&UnixSkEntry>, names: &BTreeSet<&[u8]>) -> Result<Vec<(SkPacketEntry, Vec<u8>)>> {
    let (f, r) = (&s.facts, &s.record);
    let failed = |e| Error::proc(f.pid, e);
    let polled = polled(f)?;
    if polled.contains(PollFlags::POLLPRI) {
        return f.refuse("holds urgent data", "try again once the program has received it");
    }
    let fd = f.dup.as_fd();
    let length = sockopt::inq(fd).map_err(failed)?;
    let is_stream = r.r#type == libc::SOCK_STREAM as u32;
    if polled.contains(PollFlags::POLLERR) && !is_stream {
        // To look at a queue of messages is to take the error.
        return match length > 0 || is_datagram(r) {
            true => f.refuse("has an error that the program has not seen yet", "try again once the program has used it"),
            false => Ok(Vec::new()),
        };
    }
    let messages = if !polled.contains(PollFlags::POLLIN) {
        Vec::new()
    } else if is_stream {
        stream(fd, length, s.peek_offset).map_err(failed)?
    } else {
        let ends = !is_datagram(r) && r.shutdown.is_some_and(|s| s != SkShutdown::Write as i32);
        let end = ends.then_some(length);
        with_offset(fd, s.peek_offset, || packets(fd, end)).map_err(failed)?
    };
    let pair = peer.is_some_and(|p| must_be_paired(r, p));
    for (from, _) in messages.iter().filter(|(from, _)| is_datagram(r) && !from.is_empty()) {
        let from = from.strip_suffix(b"\0").filter(|_| from[0] != 0).unwrap_or(from);
        let known = if pair { peer.is_some_and(|p| name_of(p) == from) } else { names.contains(from) };
        if !known {
            let why = format!("holds a message from {}, which is no socket of the container", from.escape_ascii());
            return f.refuse(why, "try again once the program has received it");
        }
    }
    let record = |(from, data): (Vec<u8>, Vec<u8>)| {
        let addr = (is_datagram(r) && !from.is_empty()).then_some(from);
        (SkPacketEntry { id_for: r.id, length: data.len() as u32, addr, ..SkPacketEntry::default() }, data)
    };
    Ok(messages.into_iter().map(record).collect())
}

/// A message and the name of the socket that it came from.
type Message = (Vec<u8>, Vec<u8>);

/// Has every look at the queue go on where the one before has ended, for the time of `work`.
fn with_offset<T>(fd: BorrowedFd<'_>, before: c_int, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    sockopt::set_int(fd, SOL_SOCKET, libc::SO_PEEK_OFF, 0)?;
    let result = work();
    sockopt::set_int(fd, SOL_SOCKET, libc::SO_PEEK_OFF, before)?;
    result
}

/// All bytes of a stream. With SO_PASSCRED one look ends where the next bytes come from another sender.
fn stream(fd: BorrowedFd<'_>, length: usize, offset: c_int) -> io::Result<Vec<Message>> {
    let mut bytes = vec![0; length];
    if length == 0 {
        return Ok(Vec::new());
    }
    if offset >= 0 || peek(fd, &mut bytes)?.len < length {
        with_offset(fd, offset, || {
            let mut have = 0;
            while have < length {
                match peek(fd, &mut bytes[have..])?.len {
                    0 => return Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
                    n => have += n,
                }
            }
            Ok(())
        })?;
    }
    Ok(vec![(Vec::new(), bytes)])
}

/// All messages. At the end of a queue to which nothing can be added, an empty one is seen: `end` is the number of bytes before it.
fn packets(fd: BorrowedFd<'_>, end: Option<usize>) -> io::Result<Vec<Message>> {
    let mut found: Vec<Message> = Vec::new();
    let mut buf = vec![0; 65536];
    let mut have = 0;
    loop {
        let Peeked { len, from, .. } = match peek(fd, &mut buf) {
            Ok(p) => p,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(found),
            Err(e) => return Err(e),
        };
        if len == 0 && end == Some(have) {
            return Ok(found);
        }
        if len > buf.len() {
            buf.resize(len, 0);
            sockopt::set_int(fd, SOL_SOCKET, libc::SO_PEEK_OFF, have as c_int)?;
            continue;
        }
        have += len;
        found.push((from, buf[..len].to_vec()));
    }
}
