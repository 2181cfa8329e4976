//! Contents of memory on the wire.
//!
//! ```text
//! offset  0  u32  0: memory of a task, 1: shared memory
//!         4  u32  encoding
//!         8  u64  the task's pid inside the container, or the object's id
//!        16  u64  address of the first page
//!        24  u64  number of pages
//!        32       payload
//! ```
//! Pages of nothing but zeros, and pages that are like the one before them, are not sent: they cost one header a run.

use std::io::Write;
use std::time::{Duration, Instant};

use lz4_flex::block::{CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size};
use ruzstd::decoding::FrameDecoder;
use ruzstd::encoding::{CompressionLevel, compress as zstd};

use super::{Error, MAX_PAYLOAD, Result, Writer};
use crate::image::pages::{PAGE_SIZE, PagesOf};

/// Bytes of the header.
pub(super) const HEAD: usize = 32;
/// Most pages whose bytes are in one message.
pub const MAX_PAGES: u64 = MAX_PAYLOAD as u64 / PAGE_SIZE;
/// Most pages in a message that holds no bytes for each: 1 GiB of memory.
const MAX_RUN: u64 = 1 << 18;
/// The last address of a user's memory plus one, with five-level page tables.
const ADDRESS_LIMIT: u64 = 1 << 56;

const PAGE: usize = PAGE_SIZE as usize;
const ZEROS: [u8; PAGE] = [0; PAGE];

/// How the payload stands for the pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// All bytes.
    Raw = 0,
    /// Nothing: all bytes are zero.
    Zero = 1,
    /// One page, which all are like.
    Repeat = 2,
    /// One LZ4 block.
    Lz4 = 3,
    /// One Zstandard frame (RFC 8878).
    Zstd = 4,
}

/// What is tried on pages before they are sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    None,
    /// LZ4 where the link is so slow that it saves time.
    #[default]
    Auto,
    Lz4,
    /// A fifth as fast, and much shorter: for slow links.
    Zstd,
}

/// A run of pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pages {
    pub of: PagesOf,
    pub vaddr: u64,
    /// Number of pages.
    pub count: u64,
    pub encoding: Encoding,
    pub payload: Vec<u8>,
}

/// What a run of pages holds.
#[derive(Debug, PartialEq, Eq)]
pub enum Content<'a> {
    /// All bytes of all pages.
    Bytes(&'a [u8]),
    Zeros,
    /// Every page is this one.
    Repeat(&'a [u8]),
}

impl Pages {
    /// The header for a payload.
    pub(super) fn head(of: PagesOf, vaddr: u64, count: u64, encoding: Encoding) -> [u8; HEAD] {
        let (kind, id) = match of {
            PagesOf::Task(pid) => (0u32, u64::from(pid)),
            PagesOf::Shmem(id) => (1, id),
        };
        let mut head = [0; HEAD];
        head[..4].copy_from_slice(&kind.to_le_bytes());
        head[4..8].copy_from_slice(&(encoding as u32).to_le_bytes());
        for (slot, value) in head[8..].chunks_exact_mut(8).zip([id, vaddr, count]) {
            slot.copy_from_slice(&value.to_le_bytes());
        }
        head
    }

    /// From a header; the payload, which is still to be read, has `length` bytes.
    ///
    /// # Errors
    /// Pages that nobody can have, and a payload that cannot stand for so many.
    pub(super) fn from_head(head: &[u8; HEAD], length: usize) -> Result<Pages> {
        let half = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| head[at + i]));
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| head[at + i]));
        let (kind, encoding, id, vaddr, count) = (half(0), half(4), word(8), word(16), word(24));
        let of = match (kind, u32::try_from(id)) {
            (0, Ok(pid)) => PagesOf::Task(pid),
            (1, _) => PagesOf::Shmem(id),
            _ => return Err(Error::invalid(format!("pages of an unknown kind of target: {kind}, {id}"))),
        };
        let end = count.checked_mul(PAGE_SIZE).and_then(|bytes| vaddr.checked_add(bytes));
        if count == 0 || !vaddr.is_multiple_of(PAGE_SIZE) || end.is_none_or(|end| end > ADDRESS_LIMIT) {
            return Err(Error::invalid(format!("{count} pages at {vaddr:#x}: no such memory")));
        }
        let (encoding, most, fits) = match encoding {
            0 => (Encoding::Raw, MAX_PAGES, length as u64 == count.saturating_mul(PAGE_SIZE)),
            1 => (Encoding::Zero, MAX_RUN, length == 0),
            2 => (Encoding::Repeat, MAX_RUN, length == PAGE),
            3 | 4 => {
                let shorter = length > 0 && (length as u64) < count.saturating_mul(PAGE_SIZE);
                (if encoding == 3 { Encoding::Lz4 } else { Encoding::Zstd }, MAX_PAGES, shorter)
            }
            unknown => return Err(Error::invalid(format!("pages in an unknown encoding: {unknown}"))),
        };
        if count > most || !fits {
            return Err(Error::invalid(format!("{count} pages ({encoding:?}) in {length} bytes")));
        }
        Ok(Pages { of, vaddr, count, encoding, payload: Vec::new() })
    }

    /// What the pages hold; `room` is where it is unpacked if need be.
    ///
    /// # Errors
    /// A block that is not what it says.
    pub fn content<'a>(&'a self, room: &'a mut Vec<u8>) -> Result<Content<'a>> {
        match self.encoding {
            Encoding::Raw => Ok(Content::Bytes(&self.payload)),
            Encoding::Zero => Ok(Content::Zeros),
            Encoding::Repeat => Ok(Content::Repeat(&self.payload)),
            Encoding::Lz4 => self.unpacked(room, |room| decompress_into(&self.payload, room)),
            Encoding::Zstd => self.unpacked(room, |room| FrameDecoder::new().decode_all(&self.payload, room)),
        }
    }

    fn unpacked<'a, E: std::fmt::Display>(
        &self,
        room: &'a mut Vec<u8>,
        unpack: impl FnOnce(&mut [u8]) -> std::result::Result<usize, E>,
    ) -> Result<Content<'a>> {
        let size = (self.count * PAGE_SIZE) as usize;
        if room.len() < size {
            room.resize(size, 0);
        }
        match unpack(&mut room[..size]) {
            Ok(length) if length == size => Ok(Content::Bytes(&room[..size])),
            Ok(length) => Err(Error::invalid(format!("{} pages that unpack to {length} bytes", self.count))),
            Err(e) => Err(Error::invalid(format!("pages that cannot be unpacked: {e}"))),
        }
    }
}

/// What has been sent, in pages and in bytes of payload.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    pub pages: u64,
    pub zero: u64,
    /// Like the page before them.
    pub repeated: u64,
    pub bytes: u64,
}

/// Whether compression saves time, by what both have taken lately: per byte of memory to compress, and per byte on the wire
/// to be rid of.
#[derive(Clone, Copy, Debug, Default)]
struct Worth {
    /// Nanoseconds for a byte, and bytes on the wire for a byte.
    packing: Option<(f64, f64)>,
    /// Nanoseconds for a byte.
    sending: Option<f64>,
    /// Pieces since it was tried.
    untried: u32,
}

/// Every so many pieces it is tried again: the link and the memory change.
const TRY_AGAIN: u32 = 64;
/// How much the last piece counts.
const LAST: f64 = 0.2;

impl Worth {
    /// Whether to compress the next piece.
    fn next(&mut self) -> bool {
        let worth = match (self.packing, self.sending) {
            (Some((packing, ratio)), Some(sending)) => packing < (1.0 - ratio) * sending,
            _ => true,
        };
        self.untried = if worth || self.untried + 1 >= TRY_AGAIN { 0 } else { self.untried + 1 };
        self.untried == 0
    }

    fn packed(&mut self, from: usize, to: usize, took: Duration) {
        let now = (took.as_nanos() as f64 / from as f64, to as f64 / from as f64);
        let (cost, ratio) = self.packing.unwrap_or(now);
        self.packing = Some((cost + LAST * (now.0 - cost), ratio + LAST * (now.1 - ratio)));
    }

    fn sent(&mut self, bytes: usize, took: Duration) {
        let now = took.as_nanos() as f64 / bytes as f64;
        let before = self.sending.unwrap_or(now);
        self.sending = Some(before + LAST * (now - before));
    }
}

/// Finds what need not be sent, and sends the rest as short as it gets.
pub struct PageEncoder {
    compression: Compression,
    worth: Worth,
    table: CompressTable,
    room: Vec<u8>,
    pub sent: Sent,
}

impl PageEncoder {
    pub fn new(compression: Compression) -> Self {
        PageEncoder {
            compression,
            worth: Worth::default(),
            table: CompressTable::large(),
            room: Vec::new(),
            sent: Sent::default(),
        }
    }

    /// Sends the pages at `vaddr`, whose bytes are whole pages, at most [`MAX_PAGES`].
    pub fn send<W: Write>(&mut self, to: &mut Writer<W>, of: PagesOf, vaddr: u64, bytes: &[u8]) -> Result<()> {
        let pages: Vec<&[u8]> = bytes.chunks(PAGE).collect();
        let mut at = 0;
        while at < pages.len() {
            let (encoding, count) = run(&pages[at..]);
            self.run(to, of, vaddr + at as u64 * PAGE_SIZE, encoding, &bytes[at * PAGE..(at + count) * PAGE])?;
            at += count;
        }
        self.sent.pages += pages.len() as u64;
        Ok(())
    }

    fn run<W: Write>(
        &mut self,
        to: &mut Writer<W>,
        of: PagesOf,
        vaddr: u64,
        encoding: Encoding,
        data: &[u8],
    ) -> Result<()> {
        let count = (data.len() / PAGE) as u64;
        let compressed = if encoding == Encoding::Raw { self.compress(data) } else { None };
        let (encoding, payload) = match (encoding, compressed) {
            (_, Some((encoding, length))) => (encoding, &self.room[..length]),
            (Encoding::Zero, _) => (Encoding::Zero, &[][..]),
            (Encoding::Repeat, _) => (Encoding::Repeat, &data[..PAGE]),
            _ => (Encoding::Raw, data),
        };
        match encoding {
            Encoding::Zero => self.sent.zero += count,
            Encoding::Repeat => self.sent.repeated += count - 1,
            _ => {}
        }
        self.sent.bytes += payload.len() as u64;
        let (bytes, begun) = (payload.len(), Instant::now());
        to.send_pages(of, vaddr, count, encoding, payload)?;
        // What is short is mostly a matter of the call.
        if bytes >= PAGE {
            self.worth.sent(bytes, begun.elapsed());
        }
        Ok(())
    }

    /// What is in `room` then, and its length; None if it does not get shorter by an eighth, which would cost the other end more
    /// than it saves.
    fn compress(&mut self, data: &[u8]) -> Option<(Encoding, usize)> {
        let (encoding, length) = match self.compression {
            Compression::None => return None,
            Compression::Auto if !self.worth.next() => return None,
            Compression::Auto | Compression::Lz4 => {
                let most = get_maximum_output_size(data.len());
                if self.room.len() < most {
                    self.room.resize(most, 0);
                }
                let begun = Instant::now();
                let length = compress_into_with_table(data, &mut self.room, &mut self.table).ok()?;
                self.worth.packed(data.len(), length.min(data.len()), begun.elapsed());
                (Encoding::Lz4, length)
            }
            Compression::Zstd => {
                self.room.clear();
                zstd(data, &mut self.room, CompressionLevel::Fastest);
                (Encoding::Zstd, self.room.len())
            }
        };
        (length <= data.len() / 8 * 7).then_some((encoding, length))
    }
}

/// How the first pages can be sent, and how many they are.
fn run(pages: &[&[u8]]) -> (Encoding, usize) {
    let alike = pages.iter().take_while(|page| *page == &pages[0]).count();
    let alone = |at: usize| pages[at] != ZEROS && pages.get(at + 1) != Some(&pages[at]);
    match alike {
        _ if pages[0] == ZEROS => (Encoding::Zero, alike),
        1 => (Encoding::Raw, (1..pages.len()).take_while(|&at| alone(at)).count() + 1),
        _ => (Encoding::Repeat, alike),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of 1000 pieces are compressed, by the time a byte takes to compress and to send.
    fn compressed(packing: u64, ratio: f64, sending: impl Fn(usize) -> u64) -> usize {
        let mut worth = Worth::default();
        let len = 10_000;
        let piece = |n: usize| {
            let packs = worth.next();
            let left = if packs { (len as f64 * ratio) as usize } else { len };
            if packs {
                worth.packed(len, left, Duration::from_nanos(packing * len as u64));
            }
            worth.sent(left, Duration::from_nanos(sending(n) * left as u64));
            packs
        };
        (0..1000).map(piece).filter(|packs| *packs).count()
    }

    #[test]
    fn compression_has_to_save_time() {
        // A slow link; a quick one; one that nothing gets shorter for; one that becomes slow.
        assert_eq!(compressed(4, 0.5, |_| 10), 1000);
        assert!((15..=17).contains(&compressed(4, 0.5, |_| 1)));
        assert!((15..=17).contains(&compressed(4, 1.0, |_| 100)));
        assert!((480..=600).contains(&compressed(4, 0.5, |n| if n < 500 { 1 } else { 20 })));
    }
}
