//! The wire as the engine's [`Outlet`].

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use super::wire::message::{Extent, Present, TreeEnd};
use super::wire::{Compression, Control, PageEncoder, Writer};
use super::{Result, wire};
use crate::engine::departure::Outlet;
use crate::image::pages::{PagesOf, Span};

/// What the source says, pages included.
pub struct Mouth<W: Write> {
    writer: Writer<W>,
    encoder: PageEncoder,
}

impl<W: Write> Mouth<W> {
    pub fn new(writer: Writer<W>, compression: Compression) -> Self {
        Mouth { writer, encoder: PageEncoder::new(compression) }
    }

    /// Says it, and waits for nobody.
    pub fn say(&mut self, message: &impl Control) -> Result<()> {
        Ok(self.writer.say(message)?)
    }

    pub fn writer(&mut self) -> &mut Writer<W> {
        &mut self.writer
    }

    /// Bytes that were said so far, and pages that went without content.
    pub fn sent(&self) -> (u64, u64) {
        (self.writer.sent(), self.encoder.sent.zero + self.encoder.sent.repeated)
    }
}

impl<W: Write> Outlet for Mouth<W> {
    fn images(&mut self, dir: &Path) -> io::Result<()> {
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let name = entry.file_name().into_string().map_err(|_| io::ErrorKind::InvalidData)?;
            self.writer.send_file(&name, &mut fs::File::open(entry.path())?).map_err(io::Error::other)?;
        }
        self.writer.say(&TreeEnd {}).map_err(io::Error::other)
    }

    fn present(&mut self, of: PagesOf, spans: &[Span]) -> io::Result<()> {
        let mut start = 0;
        let mut parts = spans.chunks(Present::MOST).peekable();
        loop {
            let part = parts.next().unwrap_or_default();
            let end = if parts.peek().is_some() { part.last().map_or(u64::MAX, |s| s.end()) } else { u64::MAX };
            let extents = part.iter().map(|s| Extent { vaddr: s.vaddr, pages: s.pages }).collect();
            self.writer.send(&Present { of: of.into(), start, end, extents }).map_err(io::Error::other)?;
            if end == u64::MAX {
                return Ok(());
            }
            start = end;
        }
    }

    fn pages(&mut self, of: PagesOf, vaddr: u64, bytes: &[u8]) -> io::Result<()> {
        self.encoder.send(&mut self.writer, of, vaddr, bytes).map_err(|e| match e {
            wire::Error::Io(e) => e,
            e => io::Error::other(e),
        })
    }
}
