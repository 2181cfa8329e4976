//! Reading what a unix socket has received, without taking it.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use libc::{SOL_SOCKET, c_int, pid_t};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use super::{Socket, is_datagram, must_be_paired, name_of, refuse};
use crate::engine::guard::Guard;
use crate::engine::res::fd::FdFacts;
use crate::engine::{Error, Result};
use crate::image::records::sockets::{SkPacketEntry, SkShutdown, SkUcredEntry, UnixSkEntry};
use crate::sys::sockopt;
use crate::sys::tcp::state;
use crate::sys::unix_socket::{Peeked, Sender, peek, send};

/// A message, or of a stream what one sender has sent.
#[derive(Debug)]
pub struct Message {
    /// The name of the socket that it came from.
    from: Vec<u8>,
    sender: Option<Sender>,
    data: Vec<u8>,
}

impl Message {
    fn new(seen: Peeked, data: &[u8]) -> Message {
        Message { from: seen.from, sender: seen.sender, data: data.to_vec() }
    }

    /// The record of a message that `r` has received; `inside` knows the pids of the container.
    pub fn record(
        self,
        r: &UnixSkEntry,
        inside: impl Fn(pid_t) -> io::Result<u32>,
    ) -> io::Result<(SkPacketEntry, Vec<u8>)> {
        let addr = (is_datagram(r) && !self.from.is_empty()).then_some(self.from);
        let ucred = self.sender.filter(|_| r.opts.so_passcred == Some(true));
        let ucred = ucred
            .map(|s| Ok::<_, io::Error>(SkUcredEntry { uid: s.uid, gid: s.gid, pid: inside(s.pid)? }))
            .transpose()?;
        let length = self.data.len() as u32;
        Ok((SkPacketEntry { id_for: r.id, length, addr, scm: Vec::new(), ucred }, self.data))
    }
}

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

/// Refuses what was sent by a datagram socket that is not of the container: `names` are of those that are.
pub fn check_senders(
    s: &Socket,
    peer: Option<&UnixSkEntry>,
    names: &BTreeSet<&[u8]>,
    messages: &[Message],
) -> Result<()> {
    let pair = peer.filter(|p| must_be_paired(&s.record, p));
    for from in messages.iter().map(|m| &m.from[..]).filter(|from| is_datagram(&s.record) && !from.is_empty()) {
        let from = from.strip_suffix(b"\0").filter(|_| from[0] != 0).unwrap_or(from);
        if !pair.map_or(names.contains(from), |p| name_of(p) == from) {
            let why = format!("holds a message from {}, which is no socket of the container", from.escape_ascii());
            return refuse(&s.facts, why, "try again once the program has received it");
        }
    }
    Ok(())
}

/// Refuses a queue that holds more than was seen. An empty message that has been looked at before, by a checkpoint that
/// failed or left the container running, is not shown again; but it weighs on the socket that sent it.
pub fn check_all_seen(s: &Socket, sender: &Socket, messages: &[Message]) -> Result<()> {
    let kind = match s.record.r#type as c_int {
        libc::SOCK_DGRAM => SockType::Datagram,
        libc::SOCK_SEQPACKET => SockType::SeqPacket,
        _ => return Ok(()),
    };
    let weigh = || {
        let (a, _b) = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC)?;
        let room: usize = messages.iter().map(|m| m.data.len() + 4096).sum();
        sockopt::set_int(a.as_fd(), SOL_SOCKET, libc::SO_SNDBUFFORCE, room.min(1 << 30) as c_int)?;
        messages.iter().try_for_each(|m| send(a.as_fd(), &m.data, None, None))?;
        Ok((sockopt::outq(a.as_fd())?, sockopt::outq(sender.facts.dup.as_fd())?))
    };
    let (seen, there) = weigh().map_err(|e| Error::proc(s.facts.pid, e))?;
    if there > seen {
        let why = "holds an empty message that an earlier checkpoint has looked at, which cannot be seen again";
        return refuse(&s.facts, why, "try again once the program has received it");
    }
    Ok(())
}

/// Reads queues.
#[derive(Debug, Default)]
pub struct Reader {
    /// Puts SO_PEEK_OFF back if we cannot; made when the first queue needs it.
    guard: Option<Guard>,
}

impl Reader {
    /// What a socket has received.
    pub fn read(&mut self, s: &Socket) -> Result<Vec<Message>> {
        let (f, r) = (&s.facts, &s.record);
        if r.state == state::LISTEN {
            return Ok(Vec::new());
        }
        let failed = |e| Error::proc(f.pid, e);
        let polled = polled(f)?;
        if polled.contains(PollFlags::POLLPRI) {
            return refuse(f, "holds urgent data", "try again once the program has received it");
        }
        let fd = f.dup.as_fd();
        let length = sockopt::inq(fd).map_err(failed)?;
        let is_stream = r.r#type == libc::SOCK_STREAM as u32;
        if polled.contains(PollFlags::POLLERR) && !is_stream {
            // To look at a queue of messages is to take the error.
            return match length > 0 || is_datagram(r) {
                true => refuse(
                    f,
                    "has an error that the program has not seen yet",
                    "try again once the program has used it",
                ),
                false => Ok(Vec::new()),
            };
        }
        if !polled.contains(PollFlags::POLLIN) || (is_stream && length == 0) {
            return Ok(Vec::new());
        }
        if is_stream && s.peek_offset < 0 {
            let mut bytes = vec![0; length];
            let seen = peek(fd, &mut bytes).map_err(failed)?;
            if seen.len == length {
                return Ok(vec![Message::new(seen, &bytes)]);
            }
        }
        let ends = !is_datagram(r) && r.shutdown.is_some_and(|s| s != SkShutdown::Write as i32);
        self.guard(fd)?;
        let read = || {
            sockopt::set_int(fd, SOL_SOCKET, libc::SO_PEEK_OFF, 0)?;
            if is_stream { stream(fd, length) } else { packets(fd, ends.then_some(length)) }
        };
        let result = read();
        sockopt::set_int(fd, SOL_SOCKET, libc::SO_PEEK_OFF, s.peek_offset).map_err(failed)?;
        result.map_err(failed)
    }

    fn guard(&mut self, fd: BorrowedFd<'_>) -> Result<()> {
        let guard = match &mut self.guard {
            Some(guard) => guard,
            none => none.insert(Guard::spawn()?),
        };
        Ok(guard.watch(&[fd])?)
    }
}

/// All bytes of a stream. With SO_PASSCRED one look ends where the next bytes come from another sender.
fn stream(fd: BorrowedFd<'_>, mut length: usize) -> io::Result<Vec<Message>> {
    let mut found = Vec::new();
    let mut buf = vec![0; length];
    while length > 0 {
        let seen = peek(fd, &mut buf[..length])?;
        if seen.len == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        length -= seen.len;
        let bytes = &buf[..seen.len];
        found.push(Message::new(seen, bytes));
    }
    Ok(found)
}

/// All messages. At the end of a queue to which nothing can be added, an empty one is seen: `end` is the number of
/// bytes before it.
fn packets(fd: BorrowedFd<'_>, end: Option<usize>) -> io::Result<Vec<Message>> {
    let mut found = Vec::new();
    let mut buf = vec![0; 65536];
    let mut have = 0;
    loop {
        let seen = match peek(fd, &mut buf) {
            Ok(seen) => seen,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(found),
            Err(e) => return Err(e),
        };
        if seen.len == 0 && end == Some(have) {
            return Ok(found);
        }
        if seen.len > buf.len() {
            buf.resize(seen.len, 0);
            sockopt::set_int(fd, SOL_SOCKET, libc::SO_PEEK_OFF, have as c_int)?;
            continue;
        }
        have += seen.len;
        let bytes = &buf[..seen.len];
        found.push(Message::new(seen, bytes));
    }
}
