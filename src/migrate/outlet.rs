//! The wire as the engine's [`Outlet`].

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use prost::Message as _;

use super::disk::{self, Busy, Root, Stage};
use super::wire::message::{Extent, Present, TreeEnd};
use super::wire::{Compression, Control, PageEncoder, Writer};
use super::{Error, Result, wire};
use crate::engine::departure::{BusyFile, Outlet};
use crate::image::pages::{PagesOf, Span};

/// What the source says, pages included.
pub struct Mouth<W: Write> {
    writer: Writer<W>,
    encoder: PageEncoder,
    /// The file systems that go along.
    disk: Option<disk::Source>,
    stage: Stage,
}

impl<W: Write> Mouth<W> {
    pub fn new(writer: Writer<W>, compression: Compression) -> Self {
        Mouth { writer, encoder: PageEncoder::new(compression), disk: None, stage: Stage::Live }
    }

    /// From now on these go along; their first copy is said at once.
    pub fn send_disk(&mut self, roots: Vec<Root>) -> Result<disk::Round> {
        self.disk = Some(disk::Source::open(roots).map_err(failed)?);
        self.disk_round(&[])
    }

    /// The container is frozen.
    pub fn freeze(&mut self) {
        self.stage = Stage::Last;
    }

    fn disk_round(&mut self, busy: &[Busy]) -> Result<disk::Round> {
        let Some(disk) = &mut self.disk else { return Ok(disk::Round::default()) };
        let writer = &mut self.writer;
        let mut emit = |message: disk::Message| writer.send_disk(&message.encode_to_vec()).map_err(io::Error::other);
        disk.round(self.stage, busy, &mut emit).map_err(failed)
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

fn failed(error: disk::Error) -> Error {
    Error::Disk(error)
}

impl<W: Write> Outlet for Mouth<W> {
    fn files(&mut self, busy: &[BusyFile]) -> io::Result<()> {
        let busy: Vec<Busy> = busy.iter().map(|b| Busy { path: b.path.clone(), mapped: b.mapped }).collect();
        self.disk_round(&busy).map(drop).map_err(io::Error::other)
    }

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
