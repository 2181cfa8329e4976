//! pipe(2), both ends, with what is in it.

use std::os::fd::{AsFd, OwnedFd};

use libc::c_int;
use nix::fcntl::{OFlag, SpliceFFlags, tee};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{pipe2, read, write};

use super::{Collected, FdFacts, FdKind, Workshop, part};
use crate::engine::{Error, Result};
use crate::image::records::files::{FdTypes, FileEntry, FownEntry, PipeDataEntry, PipeEntry};
use crate::sys::file;
use crate::tracee::batch::Batch;

pub struct Pipe;

/// A pipe of which one or both ends have been seen while files were collected.
#[derive(Debug)]
pub struct Seen {
    facts: FdFacts,
    reader: bool,
    writer: bool,
    /// Writes are packets (O_DIRECT): the writing end says so.
    packets: bool,
}

/// A pipe that is being built. Its own ends are kept until all files are made, so that none of them sees the
/// other side closed before its time.
#[derive(Debug)]
pub struct Ends {
    read: OwnedFd,
    write: OwnedFd,
}

impl FdKind for Pipe {
    const NAME: &'static str = "pipe";
    const TYPE: FdTypes = FdTypes::Pipe;

    fn claims(f: &FdFacts) -> bool {
        f.link.starts_with(b"pipe:[")
    }

    fn dump(f: &FdFacts, id: u32, all: &mut Collected) -> Result<FileEntry> {
        let pipe_id = f.stat.inode as u32;
        let record = PipeEntry { id, pipe_id, flags: f.flags(), fown: f.owner()? };
        let mode = f.flags() as c_int & libc::O_ACCMODE;
        let (reader, writer) = (mode != libc::O_WRONLY, mode != libc::O_RDONLY);
        let packets = f.flags() as c_int & libc::O_DIRECT != 0;
        match all.pipes.get_mut(&pipe_id) {
            Some(seen) => {
                (seen.reader, seen.writer) = (seen.reader | reader, seen.writer | writer);
                seen.packets |= packets;
            }
            None => {
                let dup = f.dup.try_clone().map_err(|e| Error::proc(f.pid, e))?;
                let facts = FdFacts { dup, link: f.link.clone(), info: f.info.clone(), ..*f };
                all.pipes.insert(pipe_id, Seen { facts, reader, writer, packets });
            }
        }
        Ok(FileEntry { r#type: Self::TYPE as i32, id, pipe: Some(record), ..FileEntry::default() })
    }

    fn create(e: &FileEntry, shop: &mut Workshop) -> Result<OwnedFd> {
        let r = part(e, Self::NAME, e.pipe.as_ref())?;
        let link = link_of(r.pipe_id);
        if shop.external.contains_key(&link) {
            return shop.external(&link);
        }
        let failed = || Error::system(format!("make pipe {:#x}", r.pipe_id));
        let ends = match shop.pipes.entry(r.pipe_id) {
            std::collections::hash_map::Entry::Occupied(o) => o.into_mut(),
            std::collections::hash_map::Entry::Vacant(v) => {
                v.insert(make(r.pipe_id, &shop.pipe_data).map_err(failed())?)
            }
        };
        let end = if r.flags as c_int & libc::O_ACCMODE == libc::O_RDONLY { &ends.read } else { &ends.write };
        let fd = file::reopen(end, r.flags & libc::O_ACCMODE as u32).map_err(failed())?;
        file::set_flags(&fd, r.flags).map_err(failed())?;
        Ok(fd)
    }

    fn link(_: &FileEntry, _: c_int, _: &mut Batch) {}

    fn owner(e: &FileEntry) -> Option<&FownEntry> {
        e.pipe.as_ref().map(|r| &r.fown)
    }
}

fn link_of(pipe_id: u32) -> Vec<u8> {
    format!("pipe:[{pipe_id}]").into_bytes()
}

/// Once all descriptors are known: reads what the pipes hold, and refuses those that lead out of the container.
pub fn finish(all: &mut Collected) -> Result<()> {
    for (pipe_id, seen) in std::mem::take(&mut all.pipes) {
        let inside = seen.reader && seen.writer;
        if !inside && all.external.contains(&link_of(pipe_id)) {
            continue;
        }
        let f = &seen.facts;
        if !inside && !other_side_closed(f)? {
            return f.refuse(
                "its other end is outside the container",
                "pass it as standard input, output or error, or close it",
            );
        }
        if seen.reader {
            let size = file::pipe_size(&f.dup).map_err(|e| Error::proc(f.pid, e))?;
            let packets = content(f, size, seen.packets).map_err(|e| Error::proc(f.pid, e.into()))?;
            // The first record gives the size, even of an empty pipe.
            let first = packets.first().cloned().unwrap_or_default();
            for (i, data) in std::iter::once(first).chain(packets.into_iter().skip(1)).enumerate() {
                let record = PipeDataEntry { pipe_id, bytes: data.len() as u32, size: (i == 0).then_some(size) };
                all.pipe_data.push((record, data));
            }
        }
    }
    Ok(())
}

/// Of a pipe with only one kind of end inside: whether nobody has the other one.
fn other_side_closed(f: &FdFacts) -> Result<bool> {
    let mut p = [PollFd::new(f.dup.as_fd(), PollFlags::empty())];
    poll(&mut p, PollTimeout::ZERO).map_err(|e| Error::proc(f.pid, e.into()))?;
    Ok(p[0].revents().is_some_and(|r| r.intersects(PollFlags::POLLHUP | PollFlags::POLLERR)))
}

/// What the pipe holds, left in it: one piece, or one per packet (O_DIRECT).
fn content(f: &FdFacts, size: u32, packets: bool) -> nix::Result<Vec<Vec<u8>>> {
    let readable = f.flags() as c_int & libc::O_ACCMODE != libc::O_WRONLY;
    let source =
        if readable { f.dup.try_clone() } else { file::reopen(&f.dup, (libc::O_RDONLY | libc::O_NONBLOCK) as u32) };
    let source = source.map_err(|e| nix::Error::from_raw(e.raw_os_error().unwrap_or(0)))?;
    let (r, w) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    // As many slots as the pipe has: each may hold a single byte.
    let _ = file::set_pipe_size(&w, size);
    match tee(&source, &w, size as usize, SpliceFFlags::SPLICE_F_NONBLOCK) {
        Ok(_) | Err(nix::errno::Errno::EAGAIN) => {}
        Err(e) => return Err(e),
    }
    drop(w);
    let mut pieces: Vec<Vec<u8>> = Vec::new();
    let mut buf = vec![0; size as usize];
    loop {
        match read(&r, &mut buf)? {
            0 => return Ok(pieces),
            n if packets || pieces.is_empty() => pieces.push(buf[..n].to_vec()),
            n => pieces[0].extend_from_slice(&buf[..n]),
        }
    }
}

fn make(pipe_id: u32, data: &[(PipeDataEntry, Vec<u8>)]) -> std::io::Result<Ends> {
    let mine = || data.iter().filter(|(d, _)| d.pipe_id == pipe_id);
    let packets = if mine().count() > 1 { OFlag::O_DIRECT } else { OFlag::empty() };
    let (r, w) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | packets)?;
    if let Some(size) = mine().find_map(|(d, _)| d.size).filter(|s| Ok(*s) != file::pipe_size(&w).map_err(drop)) {
        file::set_pipe_size(&w, size)?;
    }
    for (_, bytes) in mine() {
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let n = write(&w, rest)?;
            rest = &rest[n..];
        }
    }
    Ok(Ends { read: r, write: w })
}
