//! The sending half.

use std::io::{self, BufWriter, Read, Write};

use super::message::{Control, raw};
use super::pages::{Encoding, HEAD, Pages};
use super::{Error, HEADER, MAX_CONTROL, MAX_NAME, MAX_PAYLOAD, Result};
use crate::image::pages::PagesOf;

/// Sends messages. Nothing is on its way for sure before [`flush`](Writer::flush).
pub struct Writer<W: Write> {
    to: BufWriter<W>,
    sent: u64,
}

impl<W: Write> Writer<W> {
    pub fn new(to: W) -> Self {
        Writer { to: BufWriter::with_capacity(256 << 10, to), sent: 0 }
    }

    /// Bytes so far.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Sends a control message.
    pub fn send<M: Control>(&mut self, message: &M) -> Result<()> {
        let length = message.encoded_len();
        if length > MAX_CONTROL {
            return Err(Error::TooLong { what: M::NAME, length: length as u64, limit: MAX_CONTROL as u64 });
        }
        self.frame(M::KIND, &[&message.encode_to_vec()])
    }

    /// Sends a control message that the other end waits for.
    pub fn say<M: Control>(&mut self, message: &M) -> Result<()> {
        self.send(message)?;
        self.flush()
    }

    /// Sends `count` pages; see [`PageEncoder`](super::PageEncoder) for how they are best encoded.
    pub fn send_pages(
        &mut self,
        of: PagesOf,
        vaddr: u64,
        count: u64,
        encoding: Encoding,
        payload: &[u8],
    ) -> Result<()> {
        let head = Pages::head(of, vaddr, count, encoding);
        Pages::from_head(&head, payload.len())?;
        self.frame(raw::PAGES, &[&head, payload])
    }

    /// Sends a file, in as many parts as it takes.
    pub fn send_image(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        if name.is_empty() || name.len() > MAX_NAME {
            return Err(Error::invalid(format!("an image's name of {} bytes", name.len())));
        }
        let mut parts = bytes.chunks(MAX_PAYLOAD).peekable();
        loop {
            let part = parts.next().unwrap_or_default();
            let more = parts.peek().is_some();
            self.frame(raw::IMAGE, &[&[u8::from(more), name.len() as u8], name.as_bytes(), part])?;
            if !more {
                return Ok(());
            }
        }
    }

    /// An image of whatever length.
    pub fn send_file(&mut self, name: &str, from: &mut impl io::Read) -> Result<()> {
        let mut part = Vec::with_capacity(MAX_PAYLOAD);
        loop {
            part.clear();
            from.by_ref().take(MAX_PAYLOAD as u64).read_to_end(&mut part).map_err(Error::Io)?;
            let more = part.len() == MAX_PAYLOAD;
            self.frame(raw::IMAGE, &[&[u8::from(more), name.len() as u8], name.as_bytes(), &part])?;
            if !more {
                return Ok(());
            }
        }
    }

    /// Sends at most [`MAX_PAYLOAD`] bytes to the other end's disk.
    pub fn send_disk(&mut self, bytes: &[u8]) -> Result<()> {
        self.opaque(raw::DISK, "Disk", bytes)
    }

    /// Sends at most [`MAX_PAYLOAD`] bytes to the other end's container engine.
    pub fn send_engine(&mut self, bytes: &[u8]) -> Result<()> {
        self.opaque(raw::ENGINE, "Engine", bytes)
    }

    /// Sends at most [`MAX_PAYLOAD`] bytes to the other end's network.
    pub fn send_network(&mut self, bytes: &[u8]) -> Result<()> {
        self.opaque(raw::NETWORK, "Network", bytes)
    }

    /// Sees to it that all is on its way.
    pub fn flush(&mut self) -> Result<()> {
        self.to.flush().map_err(Error::write)
    }

    fn opaque(&mut self, kind: u16, what: &'static str, bytes: &[u8]) -> Result<()> {
        if bytes.len() > MAX_PAYLOAD {
            return Err(Error::TooLong { what, length: bytes.len() as u64, limit: MAX_PAYLOAD as u64 });
        }
        self.frame(kind, &[bytes])
    }

    fn frame(&mut self, kind: u16, parts: &[&[u8]]) -> Result<()> {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        let mut header = [0; HEADER];
        header[..2].copy_from_slice(&kind.to_le_bytes());
        header[4..].copy_from_slice(&(length as u32).to_le_bytes());
        self.sent += (HEADER + length) as u64;
        // Large parts go past the buffer.
        std::iter::once(&&header[..]).chain(parts).try_for_each(|part| self.to.write_all(part)).map_err(Error::write)
    }
}

/// The longest frame there is.
const _: () = assert!(HEAD + MAX_PAYLOAD < u32::MAX as usize);
