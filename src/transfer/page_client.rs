//! A page sink at the other end of a connection: `checkpoint --page-server`.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::mpsc;
use std::thread;

use super::protocol::{MESSAGE_SIZE, Message};
use super::{Error, Result, tune};
use crate::image;
use crate::image::page_store::Layout;
use crate::image::pages::{PAGE_SIZE, PageReader, PageRun, PageSink, PagesOf, Written};
use crate::image::records::mm::pe;

/// Bytes that are read from memory and sent at a time.
const CHUNK: usize = 512 << 10;

/// Chunks under way: while one is sent the next is read.
const CHUNKS: usize = 3;

/// A connection to a page server (ours or `criu page-server`).
pub struct PageClient {
    stream: TcpStream,
    peer: SocketAddr,
    /// The open target and whether the server has a parent image of it.
    open: Option<(PagesOf, bool)>,
}

impl PageClient {
    /// Connects to the server at `address`.
    pub fn connect(address: impl ToSocketAddrs + ToString) -> Result<Self> {
        let connect = || {
            let stream = TcpStream::connect(&address)?;
            tune(&stream)?;
            let peer = stream.peer_addr()?;
            Ok(Self { stream, peer, open: None })
        };
        connect().map_err(|source| Error::Connect { peer: address.to_string(), source })
    }

    fn broken(&self) -> impl FnOnce(io::Error) -> Error + use<> {
        let peer = self.peer;
        move |source| Error::Connection { peer, source }
    }

    /// Sends a message and reads the answer of `N` bytes.
    fn ask<const N: usize>(&mut self, message: Message) -> Result<[u8; N]> {
        let mut answer = [0; N];
        self.stream
            .write_all(&message.encode())
            .and_then(|()| self.stream.read_exact(&mut answer))
            .map_err(self.broken())?;
        Ok(answer)
    }

    /// Opens a target unless it is the open one; tells whether it has a parent.
    fn open(&mut self, of: PagesOf) -> Result<bool> {
        if let Some((_, has_parent)) = self.open.filter(|open| open.0 == of) {
            return Ok(has_parent);
        }
        let [answer] = self.ask(Message::Open { of, answer: true })?;
        self.open = Some((of, answer != 0));
        Ok(answer != 0)
    }

    fn send(&mut self, bytes: &[u8]) -> image::Result<()> {
        self.stream.write_all(bytes).map_err(self.broken()).map_err(elsewhere)
    }
}

fn elsewhere(error: Error) -> image::Error {
    image::Error::Elsewhere(Box::new(error))
}

impl PageSink for PageClient {
    fn has_parent(&mut self, of: PagesOf) -> image::Result<bool> {
        self.open(of).map_err(elsewhere)
    }

    fn write(&mut self, of: PagesOf, runs: &[PageRun], from: &dyn PageReader) -> image::Result<Written> {
        let layout = Layout::new(of, runs)?;
        self.open(of).map_err(elsewhere)?;
        let mut outgoing = Outgoing { of, runs: runs.iter(), reading: None };
        if layout.written().pages * PAGE_SIZE <= CHUNK as u64 {
            let mut chunk = vec![0; CHUNK];
            loop {
                match outgoing.fill(&mut chunk, from)? {
                    0 => return Ok(layout.written()),
                    len => self.send(&chunk[..len])?,
                }
            }
        }
        thread::scope(|scope| {
            let (full, to_send) = mpsc::sync_channel(CHUNKS);
            let (empty, to_fill) = mpsc::channel();
            (0..CHUNKS).for_each(|_| empty.send(vec![0; CHUNK]).expect("the receiver is here"));
            let reader = scope.spawn(move || {
                // Either channel is closed when the sender gave up.
                while let Ok(mut chunk) = to_fill.recv() {
                    let len = outgoing.fill(&mut chunk, from)?;
                    if len == 0 || full.send((chunk, len)).is_err() {
                        break;
                    }
                }
                Ok(())
            });
            let sent = to_send.into_iter().try_for_each(|(chunk, len): (Vec<u8>, usize)| {
                self.send(&chunk[..len])?;
                let _ = empty.send(chunk);
                Ok(())
            });
            drop(empty);
            sent.and(reader.join().expect("reading memory does not panic")).map(|()| layout.written())
        })
    }

    /// Waits until the server says that it has everything.
    fn finish(&mut self) -> image::Result<()> {
        let status = i32::from_ne_bytes(self.ask(Message::Close).map_err(elsewhere)?);
        if status != 0 {
            return Err(elsewhere(Error::NotStored { peer: self.peer, status }));
        }
        Ok(())
    }
}

/// The runs of a target as bytes on the wire.
struct Outgoing<'a> {
    of: PagesOf,
    runs: std::slice::Iter<'a, PageRun>,
    /// Address and number of the bytes of the current run that are still to be read.
    reading: Option<(u64, u64)>,
}

impl Outgoing<'_> {
    /// Fills a chunk as far as it goes; 0 when there is nothing left.
    fn fill(&mut self, chunk: &mut [u8], from: &dyn PageReader) -> image::Result<usize> {
        let mut used = 0;
        loop {
            let room = chunk.len() - used;
            if let Some((vaddr, left)) = self.reading {
                let len = left.min(room as u64 / PAGE_SIZE * PAGE_SIZE);
                if len == 0 {
                    return Ok(used);
                }
                let bytes = &mut chunk[used..used + len as usize];
                from.read(vaddr, bytes).map_err(|source| image::Error::Memory { of: self.of, vaddr, source })?;
                used += len as usize;
                self.reading = (left > len).then_some((vaddr + len, left - len));
            } else {
                if room < MESSAGE_SIZE {
                    return Ok(used);
                }
                let Some(run) = self.runs.next() else {
                    return Ok(used);
                };
                let flags = if run.in_parent { pe::PARENT } else { pe::PRESENT };
                let message = Message::Add { of: self.of, vaddr: run.vaddr, pages: run.pages, flags };
                chunk[used..used + MESSAGE_SIZE].copy_from_slice(&message.encode());
                used += MESSAGE_SIZE;
                self.reading = (!run.in_parent).then_some((run.vaddr, run.pages * PAGE_SIZE));
            }
        }
    }
}
