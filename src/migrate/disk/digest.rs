//! The digest of file systems that change: a sum that a change is added to and taken from, so that a round costs what it
//! changed and not what there is.
//!
//! Everything that is said of a file (its kind, its size, its attributes, each block, each name) has a BLAKE3 hash of its
//! own; the digest is their sum, in four words of 64 bits. Blocks of zeros add nothing, so a hole and zeros are the
//! same. It guards against faults, not against a peer who looks for two trees with one sum: whoever may send may send anything.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use prost::Message as _;

use super::message::{Create, Meta};

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

    pub fn create(&mut self, root: u32, file: &Create) {
        let kind = hash((root, file.id), Fact::Kind, 0, &file.encode_to_vec());
        self.add(&kind);
        self.files.insert((root, file.id), Entry { kind, ..Entry::default() });
    }

    pub fn forget(&mut self, file: File) {
        let Some(entry) = self.files.remove(&file) else { return };
        if entry.size > 0 {
            self.take(&hash(file, Fact::Size, entry.size, &[]));
        }
        for hash in [entry.kind, entry.meta].iter().chain(entry.blocks.values()) {
            self.take(hash);
        }
    }

    pub fn meta(&mut self, root: u32, meta: &Meta) {
        let file = (root, meta.id);
        let new = hash(file, Fact::Meta, 0, &meta.encode_to_vec());
        let old = std::mem::replace(&mut self.files.entry(file).or_default().meta, new);
        self.take(&old);
        self.add(&new);
    }

    /// Blocks that lie behind the end are gone.
    pub fn resize(&mut self, file: File, size: u64) {
        let entry = self.files.entry(file).or_default();
        let old = std::mem::replace(&mut entry.size, size);
        let gone = entry.blocks.split_off(&size.div_ceil(super::message::BLOCK));
        for (size, change) in [(old, Self::take as fn(&mut _, &_)), (size, Self::add)] {
            if size > 0 {
                change(self, &hash(file, Fact::Size, size, &[]));
            }
        }
        for hash in gone.values() {
            self.take(hash);
        }
    }

    /// `content`: with zeros for holes; None: all of it is hole.
    pub fn block(&mut self, file: File, index: u64, content: Option<&[u8]>) {
        let entry = self.files.entry(file).or_default();
        let is_zero = |bytes: &[u8]| bytes.iter().all(|b| *b == 0);
        let (old, new) = match content {
            None => (entry.blocks.remove(&index), NOTHING),
            Some(bytes) => {
                let new = if is_zero(bytes) { NOTHING } else { hash(file, Fact::Block, index, bytes) };
                (entry.blocks.insert(index, new), new)
            }
        };
        self.take(&old.unwrap_or(NOTHING));
        self.add(&new);
    }

    /// The block is not all hole.
    pub fn has_block(&self, file: File, index: u64) -> bool {
        self.files.get(&file).is_some_and(|entry| entry.blocks.contains_key(&index))
    }

    pub fn size(&self, file: File) -> u64 {
        self.files.get(&file).map_or(0, |entry| entry.size)
    }

    pub fn link(&mut self, dir: File, name: &OsStr, id: u64) {
        self.add(&hash(dir, Fact::Name, id, name.as_bytes()));
    }

    pub fn unlink(&mut self, dir: File, name: &OsStr, id: u64) {
        self.take(&hash(dir, Fact::Name, id, name.as_bytes()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_and_goes_leaves_the_sum_as_it_was() {
        let mut ledger = Ledger::default();
        let file = Create { id: 4, kind: libc::S_IFREG, ..Create::default() };
        let empty = ledger.digest();
        ledger.create(1, &file);
        let created = ledger.digest();
        ledger.resize((1, 4), 300_000);
        ledger.block((1, 4), 0, Some(b"abc"));
        ledger.block((1, 4), 2, Some(b"def"));
        let full = ledger.digest();
        ledger.block((1, 4), 2, Some(b"deg"));
        assert_ne!(ledger.digest(), full);
        ledger.block((1, 4), 2, Some(b"def"));
        ledger.link((1, 0), OsStr::new("n"), 4);
        assert_ne!(ledger.digest(), full);
        ledger.unlink((1, 0), OsStr::new("n"), 4);
        assert_eq!(ledger.digest(), full);
        ledger.resize((1, 4), 0);
        assert_eq!(ledger.digest(), created);
        ledger.meta(1, &Meta { id: 4, uid: 1, ..Meta::default() });
        ledger.block((1, 4), 0, Some(b"abc"));
        ledger.forget((1, 4));
        assert_eq!(ledger.digest(), empty);
    }

    #[test]
    fn zeros_and_a_hole_are_the_same() {
        let mut ledger = Ledger::default();
        ledger.block((0, 1), 3, Some(&[0; 50]));
        assert_eq!(ledger.digest(), NOTHING);
        assert!(ledger.has_block((0, 1), 3));
        ledger.block((0, 1), 3, None);
        assert!(!ledger.has_block((0, 1), 3));
    }

    #[test]
    fn the_same_content_elsewhere_is_another_fact() {
        let of = |file, index| hash(file, Fact::Block, index, b"x");
        let all = [of((0, 1), 0), of((0, 1), 1), of((0, 2), 0), of((1, 1), 0), hash((0, 1), Fact::Name, 0, b"x")];
        assert!(all.iter().enumerate().all(|(i, a)| all[..i].iter().all(|b| a != b)));
    }
}
