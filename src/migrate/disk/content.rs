//! The content of a regular file, block by block, with its holes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::thread;

use xxhash_rust::xxh3::Xxh3;

use super::message::{self, BLOCK, Piece};
use crate::sys::file::next_data;

/// What a block was when it was last sent. Kept by the source alone, which has drawn the seed: quick to compute, and not
/// for anybody else to meet.
pub type Fingerprint = u128;

/// Compares files of this size with more than one thread.
const LARGE: u64 = 8 << 20;

/// Reads those blocks of a file that are not all hole, in order.
pub struct Reader<'a> {
    file: &'a File,
    /// Of the file, which may change meanwhile: what is missing reads as zeros.
    size: u64,
    /// The data that was found last.
    data: Range<u64>,
    bytes: Vec<u8>,
    index: u64,
    /// Of the block, which have data.
    pieces: Vec<Range<usize>>,
}

impl<'a> Reader<'a> {
    pub fn new(file: &'a File, size: u64) -> Self {
        Self { file, size, data: 0..0, bytes: vec![0; BLOCK as usize], index: 0, pieces: Vec::new() }
    }

    /// The first block from `index` on that is not all hole; None: no more of them.
    pub fn read(&mut self, index: u64) -> io::Result<Option<u64>> {
        let Some(first) = self.data_from(index * BLOCK)? else { return Ok(None) };
        self.index = first / BLOCK;
        let start = self.index * BLOCK;
        let len = self.len();
        self.pieces.clear();
        let mut at = first - start;
        while at < len {
            match self.data_from(start + at)? {
                Some(from) if from - start < len => {
                    let end = (self.data.end - start).min(len);
                    self.pieces.push((from - start) as usize..end as usize);
                    at = end;
                }
                _ => break,
            }
        }
        let mut hole = 0;
        for piece in &self.pieces {
            self.bytes[hole..piece.start].fill(0);
            fill(self.file, &mut self.bytes[piece.clone()], start + piece.start as u64)?;
            hole = piece.end;
        }
        self.bytes[hole..len as usize].fill(0);
        Ok(Some(self.index))
    }

    /// This block; false: it is all hole.
    pub fn read_block(&mut self, index: u64) -> io::Result<bool> {
        Ok(self.read(index)? == Some(index))
    }

    /// Where there is data at or behind `at`; `self.data` then ends where that ends.
    fn data_from(&mut self, at: u64) -> io::Result<Option<u64>> {
        if at >= self.size {
            return Ok(None);
        }
        if !self.data.contains(&at) {
            match next_data(self.file, at)? {
                None => return Ok(None),
                Some((start, end)) => self.data = start..end,
            }
        }
        let from = at.max(self.data.start);
        Ok((from < self.size).then_some(from))
    }

    /// Bytes of the block that was read, up to the end of the file.
    fn len(&self) -> u64 {
        BLOCK.min(self.size - self.index * BLOCK)
    }

    /// The block that was read, zeros for holes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len() as usize]
    }

    pub fn message(&self, id: u64) -> message::Block {
        let piece = |at: &Range<usize>| Piece { offset: at.start as u32, bytes: self.bytes[at.clone()].to_vec() };
        message::Block { id, index: self.index, pieces: self.pieces.iter().map(piece).collect() }
    }

    pub fn fingerprint(&self, seed: u64) -> Fingerprint {
        let mut hash = Xxh3::with_seed(seed);
        hash.update(&self.len().to_ne_bytes());
        for piece in &self.pieces {
            hash.update(&[piece.start.to_ne_bytes(), piece.len().to_ne_bytes()].concat());
            hash.update(&self.bytes[piece.clone()]);
        }
        hash.digest128()
    }
}

/// Reads at `at`; what is behind the end of the file is zeros.
fn fill(file: &File, mut bytes: &mut [u8], mut at: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match file.read_at(bytes, at) {
            Ok(0) => {
                bytes.fill(0);
                return Ok(());
            }
            Ok(n) => {
                bytes = &mut bytes[n..];
                at += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// The blocks that are not as `known` says, in order.
pub fn differing(file: &File, size: u64, known: &BTreeMap<u64, Fingerprint>, seed: u64) -> io::Result<Vec<u64>> {
    let blocks = size.div_ceil(BLOCK);
    let threads = if size < LARGE { 1 } else { thread::available_parallelism().map_or(1, |n| n.get() as u64) };
    let share = blocks.div_ceil(threads).max(1);
    let part = |number: u64| differing_in(file, size, known, seed, number * share..blocks.min((number + 1) * share));
    if threads == 1 {
        return part(0);
    }
    let mut all = Vec::new();
    thread::scope(|scope| {
        let parts: Vec<_> = (0..threads).map(|number| scope.spawn(move || part(number))).collect();
        for part in parts {
            all.extend(part.join().map_err(|_| io::Error::other("a thread that compares blocks has panicked"))??);
        }
        Ok(all)
    })
}

fn differing_in(
    file: &File,
    size: u64,
    known: &BTreeMap<u64, Fingerprint>,
    seed: u64,
    range: Range<u64>,
) -> io::Result<Vec<u64>> {
    let mut reader = Reader::new(file, size);
    let mut different = Vec::new();
    let mut next = range.start;
    while next < range.end {
        // What is skipped is hole now.
        let found = reader.read(next)?.filter(|index| *index < range.end);
        different.extend(known.range(next..found.unwrap_or(range.end)).map(|(index, _)| *index));
        let Some(index) = found else { break };
        if known.get(&index) != Some(&reader.fingerprint(seed)) {
            different.push(index);
        }
        next = index + 1;
    }
    Ok(different)
}
