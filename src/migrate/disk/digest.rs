//! The digest of file systems that change: a sum that a change is added to and taken from, so that a round costs what it
//! changed and not what there is.
//!
//! Everything that is said of a file (its kind, its size, its attributes, each block, each name) has a BLAKE3 hash of its
//! own; the digest is their sum, in four words of 64 bits. Blocks of zeros add nothing, so a hole and zeros are the
//! same. It guards against faults, not against a peer who looks for two trees with one sum: whoever may send may send anything.

use std::collections::{BTreeMap, HashMap};

use prost::Message as _;

use super::message::{BLOCK, Block, Create, Meta, Op};

/// Bytes of a digest.
pub const SIZE: usize = 32;

type Hash = [u8; SIZE];

/// Adds nothing.
const NOTHING: Hash = [0; SIZE];

/// A file: which root, its number.
pub type File = (u32, u64);

/// What is said of a file.
#[derive(Clone, Copy)]
enum Fact {
    Kind = 1,
    Size = 2,
    Meta = 3,
    Block = 4,
    Name = 5,
}

fn hash(of: File, fact: Fact, number: u64, bytes: &[u8]) -> Hash {
    let mut head = [0; 21];
    head[0] = fact as u8;
    head[1..5].copy_from_slice(&of.0.to_le_bytes());
    head[5..13].copy_from_slice(&of.1.to_le_bytes());
    head[13..].copy_from_slice(&number.to_le_bytes());
    *blake3::Hasher::new().update(&head).update(bytes).finalize().as_bytes()
}

/// What the sum has of a file.
#[derive(Default)]
struct Entry {
    kind: Hash,
    size: u64,
    meta: Hash,
    /// Those that are not all hole.
    blocks: BTreeMap<u64, Hash>,
}

/// The sum, and what is in it.
#[derive(Default)]
pub struct Ledger {
    sum: [u64; 4],
    files: HashMap<File, Entry>,
}

impl Ledger {
    fn add(&mut self, hash: &Hash) {
        for (word, bytes) in self.sum.iter_mut().zip(hash.as_chunks().0) {
            *word = word.wrapping_add(u64::from_le_bytes(*bytes));
        }
    }

    fn take(&mut self, hash: &Hash) {
        for (word, bytes) in self.sum.iter_mut().zip(hash.as_chunks().0) {
            *word = word.wrapping_sub(u64::from_le_bytes(*bytes));
        }
    }

    pub fn digest(&self) -> Hash {
        let mut out = NOTHING;
        for (bytes, word) in out.as_chunks_mut().0.iter_mut().zip(self.sum) {
            *bytes = word.to_le_bytes();
        }
        out
    }

    /// What a message about this root says, is so now.
    pub fn apply(&mut self, root: u32, op: &Op) {
        match op {
            Op::Create(create) => self.create((root, create.id), create),
            Op::Resize(resize) => self.resize((root, resize.id), resize.size),
            Op::Block(block) => self.block((root, block.id), block),
            Op::Meta(meta) => self.meta((root, meta.id), meta),
            Op::Unlink(entry) => self.take(&hash((root, entry.dir), Fact::Name, entry.id, &entry.name)),
            Op::Link(entry) => self.add(&hash((root, entry.dir), Fact::Name, entry.id, &entry.name)),
            Op::Forget(forget) => self.forget((root, forget.id)),
            Op::End(_) => {}
        }
    }

    fn create(&mut self, file: File, create: &Create) {
        let kind = hash(file, Fact::Kind, 0, &create.encode_to_vec());
        self.add(&kind);
        self.files.insert(file, Entry { kind, ..Entry::default() });
    }

    fn forget(&mut self, file: File) {
        let Some(entry) = self.files.remove(&file) else { return };
        if entry.size > 0 {
            self.take(&hash(file, Fact::Size, entry.size, &[]));
        }
        for hash in [entry.kind, entry.meta].iter().chain(entry.blocks.values()) {
            self.take(hash);
        }
    }

    fn meta(&mut self, file: File, meta: &Meta) {
        let new = hash(file, Fact::Meta, 0, &meta.encode_to_vec());
        let old = std::mem::replace(&mut self.files.entry(file).or_default().meta, new);
        self.take(&old);
        self.add(&new);
    }

    /// Blocks that lie behind the end are gone.
    fn resize(&mut self, file: File, size: u64) {
        let entry = self.files.entry(file).or_default();
        let old = std::mem::replace(&mut entry.size, size);
        let gone = entry.blocks.split_off(&size.div_ceil(BLOCK));
        for (size, change) in [(old, Self::take as fn(&mut _, &_)), (size, Self::add)] {
            if size > 0 {
                change(self, &hash(file, Fact::Size, size, &[]));
            }
        }
        for hash in gone.values() {
            self.take(hash);
        }
    }

    fn block(&mut self, file: File, block: &Block) {
        let entry = self.files.entry(file).or_default();
        let old = if block.pieces.is_empty() {
            entry.blocks.remove(&block.index)
        } else {
            let end = BLOCK.min(entry.size.saturating_sub(block.index * BLOCK)) as usize;
            let content = block.content(end.max(block.end()));
            let is_zero = content.iter().all(|b| *b == 0);
            let new = if is_zero { NOTHING } else { hash(file, Fact::Block, block.index, &content) };
            let old = entry.blocks.insert(block.index, new);
            self.add(&new);
            old
        };
        self.take(&old.unwrap_or(NOTHING));
    }

    /// The block is not all hole.
    pub fn has_block(&self, file: File, index: u64) -> bool {
        self.files.get(&file).is_some_and(|entry| entry.blocks.contains_key(&index))
    }

    pub fn size(&self, file: File) -> u64 {
        self.files.get(&file).map_or(0, |entry| entry.size)
    }
}

#[cfg(test)]
mod tests {
    use super::super::message::{Forget, Link, Piece, Resize, Unlink};
    use super::*;

    fn block(index: u64, bytes: &[u8]) -> Op {
        Op::Block(Block { id: 4, index, pieces: vec![Piece { offset: 0, bytes: bytes.to_vec() }] })
    }

    #[test]
    fn what_comes_and_goes_leaves_the_sum_as_it_was() {
        let mut ledger = Ledger::default();
        let empty = ledger.digest();
        ledger.apply(1, &Op::Create(Create { id: 4, kind: libc::S_IFREG, ..Create::default() }));
        let created = ledger.digest();
        ledger.apply(1, &Op::Resize(Resize { id: 4, size: 300_000 }));
        ledger.apply(1, &block(0, b"abc"));
        ledger.apply(1, &block(2, b"def"));
        let full = ledger.digest();
        ledger.apply(1, &block(2, b"deg"));
        assert_ne!(ledger.digest(), full);
        ledger.apply(1, &block(2, b"def"));
        ledger.apply(1, &Op::Link(Link { dir: 0, name: b"n".to_vec(), id: 4 }));
        assert_ne!(ledger.digest(), full);
        ledger.apply(1, &Op::Unlink(Unlink { dir: 0, name: b"n".to_vec(), id: 4 }));
        assert_eq!(ledger.digest(), full);
        ledger.apply(1, &Op::Resize(Resize { id: 4, size: 0 }));
        assert_eq!(ledger.digest(), created);
        ledger.apply(1, &Op::Meta(Meta { id: 4, uid: 1, ..Meta::default() }));
        ledger.apply(1, &block(0, b"abc"));
        ledger.apply(1, &Op::Forget(Forget { id: 4 }));
        assert_eq!(ledger.digest(), empty);
    }

    #[test]
    fn zeros_and_a_hole_are_the_same() {
        let mut ledger = Ledger::default();
        ledger.apply(0, &block(3, &[0; 50]));
        assert_eq!(ledger.digest(), NOTHING);
        assert!(ledger.has_block((0, 4), 3));
        ledger.apply(0, &Op::Block(Block { id: 4, index: 3, pieces: vec![] }));
        assert!(!ledger.has_block((0, 4), 3));
        let mut with_hole = Ledger::default();
        let piece = |offset, bytes: &[u8]| Piece { offset, bytes: bytes.to_vec() };
        with_hole.apply(0, &Op::Block(Block { id: 4, index: 0, pieces: vec![piece(0, b"a"), piece(3, b"b")] }));
        ledger.apply(0, &block(0, b"a\0\0b"));
        assert_eq!(with_hole.digest(), ledger.digest());
    }

    #[test]
    fn the_same_content_elsewhere_is_another_fact() {
        let of = |file, index| hash(file, Fact::Block, index, b"x");
        let all = [of((0, 1), 0), of((0, 1), 1), of((0, 2), 0), of((1, 1), 0), hash((0, 1), Fact::Name, 0, b"x")];
        assert!(all.iter().enumerate().all(|(i, a)| all[..i].iter().all(|b| a != b)));
    }
}
