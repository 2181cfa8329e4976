//! The server's side of the connection: `lmrun page-server`.

use std::io::{self, IoSlice, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;

use super::inbox::{Inbox, Received, Target};
use super::protocol::{MESSAGE_SIZE, Message, ProtocolError};
use super::{Error, Result, tune};
use crate::image::pages::PAGE_SIZE;
use crate::image::records::mm::pe;

/// Bytes received at a time: they are still in the cache when they are written.
const CHUNK: usize = 256 << 10;

/// Listens for a client. Port 0 is any free port: ask the listener.
///
/// # Errors
/// [`Error::Exposed`] for addresses that other hosts can reach, unless `insecure`.
pub fn listen(address: SocketAddr, insecure: bool) -> Result<TcpListener> {
    if !insecure && !address.ip().is_loopback() {
        return Err(Error::Exposed { address });
    }
    TcpListener::bind(address).map_err(|source| Error::Listen { address, source })
}

/// Receives the pages of one checkpoint from the first client that connects.
///
/// They go into the directory `images`, which is made if it is not there and may hold other
/// files of the checkpoint. `parent` is the image that it is an increment of, relative to
/// `images`; it is recorded in the link `parent`. Pages appear when all are there, or not at all.
pub fn serve(listener: &TcpListener, images: &Path, parent: Option<&Path>) -> Result<Received> {
    let mut inbox = Inbox::open(images, parent)?;
    let (mut stream, peer) = listener.accept().map_err(|source| match listener.local_addr() {
        Ok(address) => Error::Listen { address, source },
        Err(source) => Error::Io { path: images.to_owned(), source },
    })?;
    let broken = |source| Error::Connection { peer, source };
    tune(&stream).map_err(broken)?;
    receive(&mut stream, peer, &mut inbox)?;
    let stored = inbox.commit();
    let status: i32 = if stored.is_ok() { 0 } else { -1 };
    let told = stream.write_all(&status.to_ne_bytes());
    let received = stored?;
    told.map_err(broken)?;
    Ok(received)
}

/// Takes messages until the client says that it is done.
fn receive(stream: &mut (impl Read + Write), peer: SocketAddr, inbox: &mut Inbox) -> Result<()> {
    let broken = |source| Error::Connection { peer, source };
    let wrong = |source| Error::Protocol { peer, source };
    let mut open: Option<Target> = None;
    let mut buf = vec![0; CHUNK];
    // Bytes of `buf` that are the beginning of a message; bytes of pages that are still to come.
    let (mut kept, mut expected) = (0, 0);
    loop {
        let filled = match stream.read(&mut buf[kept..]) {
            Ok(0) => return Err(broken(io::ErrorKind::UnexpectedEof.into())),
            Ok(len) => kept + len,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(broken(e)),
        };
        let mut rest = &buf[..filled];
        // Pages that lie between the messages are written together.
        let mut bytes = Vec::new();
        loop {
            let (pages, tail) = rest.split_at(rest.len().min(expected));
            if !pages.is_empty() {
                bytes.push(IoSlice::new(pages));
                expected -= pages.len();
            }
            let Some((message, tail)) = tail.split_first_chunk::<MESSAGE_SIZE>() else {
                rest = tail;
                break;
            };
            rest = tail;
            match Message::decode(message).map_err(wrong)? {
                Message::Add { of, vaddr, pages, flags } => {
                    let target = open.as_mut().filter(|target| target.of() == of);
                    let target = target.ok_or_else(|| wrong(ProtocolError::NotOpen(of)))?;
                    if flags & pe::PARENT != 0 && !target.has_parent() {
                        return Err(wrong(ProtocolError::NoParent(of)));
                    }
                    target.add(vaddr, pages, flags)?;
                    if flags & pe::PRESENT != 0 {
                        expected = (pages * PAGE_SIZE) as usize;
                    }
                }
                Message::Open { of, answer } => {
                    close(open.take(), &mut bytes, inbox)?;
                    let target = inbox.begin(of)?.ok_or_else(|| wrong(ProtocolError::Reopened(of)))?;
                    if answer {
                        stream.write_all(&[target.has_parent().into()]).map_err(broken)?;
                    }
                    open = Some(target);
                }
                Message::HasParent { of } => {
                    let answer = i32::from(inbox.has_parent(of)?);
                    stream.write_all(&answer.to_ne_bytes()).map_err(broken)?;
                }
                Message::Close => return close(open, &mut bytes, inbox),
            }
        }
        if let Some(target) = &mut open {
            target.store(&mut bytes)?;
        }
        drop(bytes);
        kept = rest.len();
        buf.copy_within(filled - kept..filled, 0);
    }
}

/// Ends the open target after its last bytes.
fn close(open: Option<Target>, bytes: &mut Vec<IoSlice<'_>>, inbox: &mut Inbox) -> Result<()> {
    let Some(mut target) = open else {
        return Ok(());
    };
    target.store(bytes)?;
    bytes.clear();
    inbox.end(target)
}

#[cfg(test)]
#[path = "page_server_tests.rs"]
mod tests;
