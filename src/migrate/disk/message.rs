//! What the source tells the destination about files.
//!
//! There are no paths: a file has a number, given by the source, and a directory's entry is the directory's number and a
//! name. Number 0 is the root itself. A file is made nameless ([`Create`]), gets its content and attributes and then its
//! names ([`Link`]); one that lost its last name ([`Unlink`]) waits for another ([`Link`]: it was renamed) or for its end
//! ([`Forget`]). So a rename costs a message, whatever is below it, and the order of names within a round is of no account.
//!
//! | message | says |
//! |---|---|
//! | [`Create`] | a file of this kind with this number, empty |
//! | [`Resize`] | its size; what is added is a hole |
//! | [`Block`] | all of one block of [`BLOCK`] bytes: what no piece covers is a hole |
//! | [`Meta`] | owner, mode, time and extended attributes; after the content, which changes some |
//! | [`Unlink`] | an entry goes |
//! | [`Link`] | an entry comes; to a file that has one already: a hard link |
//! | [`Forget`] | a file without a name goes |
//! | [`End`] | a round is complete, and this is the [digest](super::digest) of everything |
//!
//! A message is protobuf, as [`Message`] says; its length is the transport's to send, and at most [`LIMIT`].

use std::borrow::Cow;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use prost::Message as _;

/// The bytes that are compared and sent together.
pub const BLOCK: u64 = 128 << 10;

/// The most bytes that a message takes.
pub const LIMIT: usize = 1 << 20;

/// The most bytes of extended attributes that a file may have, their names counted.
pub const XATTR_LIMIT: usize = LIMIT - 4096;

/// The root's number.
pub const ROOT: u64 = 0;

#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct Message {
    /// Which of the roots, counted from 0; 0 for [`End`].
    #[prost(uint32, tag = "1")]
    pub root: u32,
    #[prost(oneof = "Op", tags = "2, 3, 4, 5, 6, 7, 8, 9")]
    pub op: Option<Op>,
}

#[derive(Clone, PartialEq, Eq, ::prost::Oneof)]
pub enum Op {
    #[prost(message, tag = "2")]
    Create(Create),
    #[prost(message, tag = "3")]
    Resize(Resize),
    #[prost(message, tag = "4")]
    Block(Block),
    #[prost(message, tag = "5")]
    Meta(Meta),
    #[prost(message, tag = "6")]
    Unlink(Unlink),
    #[prost(message, tag = "7")]
    Link(Link),
    #[prost(message, tag = "8")]
    Forget(Forget),
    #[prost(message, tag = "9")]
    End(End),
}

#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct Create {
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// S_IFREG and so on.
    #[prost(uint32, tag = "2")]
    pub kind: u32,
    /// Of a device node; an overlay's whiteout is a character device 0:0.
    #[prost(uint64, tag = "3")]
    pub rdev: u64,
    /// Where a symbolic link points to.
    #[prost(bytes = "vec", tag = "4")]
    pub target: Vec<u8>,
}

#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct Resize {
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// Bytes.
    #[prost(uint64, tag = "2")]
    pub size: u64,
}

#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct Block {
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// It starts at this times [`BLOCK`].
    #[prost(uint64, tag = "2")]
    pub index: u64,
    /// In order of their offsets.
    #[prost(message, repeated, tag = "3")]
    pub pieces: Vec<Piece>,
}

#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct Piece {
    /// From the start of the block.
    #[prost(uint32, tag = "1")]
    pub offset: u32,
    #[prost(bytes = "vec", tag = "2")]
    pub bytes: Vec<u8>,
}

#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct Meta {
    #[prost(uint64, tag = "1")]
    pub id: u64,
    /// Permission bits, set-user-id and so on; 0777 for a symbolic link.
    #[prost(uint32, tag = "2")]
    pub mode: u32,
    #[prost(uint32, tag = "3")]
    pub uid: u32,
    #[prost(uint32, tag = "4")]
    pub gid: u32,
    /// When the content was changed: seconds and nanoseconds.
    #[prost(sint64, tag = "5")]
    pub mtime: i64,
    #[prost(uint32, tag = "6")]
    pub mtime_nanos: u32,
    /// In order of their names. ACLs and file capabilities are among them.
    #[prost(message, repeated, tag = "7")]
    pub xattrs: Vec<Xattr>,
}

#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct Xattr {
    #[prost(bytes = "vec", tag = "1")]
    pub name: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub value: Vec<u8>,
}

#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct Unlink {
    #[prost(uint64, tag = "1")]
    pub dir: u64,
    #[prost(bytes = "vec", tag = "2")]
    pub name: Vec<u8>,
    /// The file that had it.
    #[prost(uint64, tag = "3")]
    pub id: u64,
}

#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct Link {
    #[prost(uint64, tag = "1")]
    pub dir: u64,
    #[prost(bytes = "vec", tag = "2")]
    pub name: Vec<u8>,
    #[prost(uint64, tag = "3")]
    pub id: u64,
}

#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct Forget {
    #[prost(uint64, tag = "1")]
    pub id: u64,
}

#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct End {
    /// No round follows, and the source was still while this one was made.
    #[prost(bool, tag = "1")]
    pub last: bool,
    #[prost(bytes = "vec", tag = "2")]
    pub digest: Vec<u8>,
}

/// Why bytes are not a message.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    #[error("{0} bytes are more than a message takes")]
    TooLong(usize),
    #[error("it cannot be decoded")]
    Undecodable(#[from] prost::DecodeError),
    #[error("it has fields that this version does not know")]
    UnknownField,
    #[error("it is of a kind that this version does not know")]
    UnknownKind,
    #[error("{0} is wrong")]
    Field(&'static str),
}

impl Message {
    pub fn new(root: u32, op: Op) -> Self {
        Self { root, op: Some(op) }
    }

    /// What was read from a peer, checked as far as a message by itself can be.
    pub fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        if bytes.len() > LIMIT {
            return Err(Malformed::TooLong(bytes.len()));
        }
        let message = Self::decode(bytes)?;
        // Fields that are skipped in decoding are missed here.
        if message.encoded_len() != bytes.len() {
            return Err(Malformed::UnknownField);
        }
        message.check()?;
        Ok(message)
    }

    fn check(&self) -> Result<(), Malformed> {
        let must = |right: bool, field| if right { Ok(()) } else { Err(Malformed::Field(field)) };
        match self.op.as_ref().ok_or(Malformed::UnknownKind)? {
            Op::Create(c) => {
                let is_link = c.kind == libc::S_IFLNK;
                must(is_kind(c.kind), "kind")?;
                must(c.rdev == 0 || matches!(c.kind, libc::S_IFCHR | libc::S_IFBLK), "rdev")?;
                must(!c.target.contains(&0) && c.target.len() < libc::PATH_MAX as usize, "target")?;
                must(c.target.is_empty() != is_link, "target")
            }
            Op::Resize(r) => must(r.size <= i64::MAX as u64, "size"),
            Op::Block(b) => {
                must(b.index < i64::MAX as u64 / BLOCK, "index")?;
                let mut end = 0;
                for piece in &b.pieces {
                    let start = u64::from(piece.offset);
                    must(start >= end && !piece.bytes.is_empty(), "piece")?;
                    end = start + piece.bytes.len() as u64;
                }
                must(end <= BLOCK, "piece")
            }
            Op::Meta(m) => {
                must(m.mode & !0o7777 == 0, "mode")?;
                must(m.uid != u32::MAX && m.gid != u32::MAX, "owner")?;
                must(m.mtime_nanos < 1_000_000_000, "time")?;
                let name = |n: &[u8]| (1..=255).contains(&n.len()) && !n.contains(&0);
                must(m.xattrs.iter().all(|x| name(&x.name) && x.value.len() <= 1 << 16), "attribute")?;
                must(m.xattrs.is_sorted_by(|a, b| a.name < b.name), "attribute")
            }
            Op::Unlink(u) => must(is_name(&u.name), "name"),
            Op::Link(l) => must(is_name(&l.name), "name"),
            Op::Forget(_) => Ok(()),
            Op::End(e) => must(e.digest.len() == super::digest::SIZE && self.root == 0, "digest"),
        }
    }
}

fn is_kind(kind: u32) -> bool {
    use libc::{S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFREG, S_IFSOCK};
    matches!(kind, S_IFREG | S_IFDIR | S_IFLNK | S_IFCHR | S_IFBLK | S_IFIFO | S_IFSOCK)
}

/// A directory's entry can be called this.
fn is_name(name: &[u8]) -> bool {
    let is_special = name.is_empty() || name == b"." || name == b"..";
    !is_special && name.len() <= 255 && !name.contains(&b'/') && !name.contains(&0)
}

impl Block {
    /// `len` bytes, those of the holes zeros; `pieces` do not go further.
    pub fn content(&self, len: usize) -> Cow<'_, [u8]> {
        match &self.pieces[..] {
            [all] if all.offset == 0 && all.bytes.len() == len => Cow::Borrowed(&all.bytes),
            pieces => {
                let mut content = vec![0; len];
                for piece in pieces {
                    let start = piece.offset as usize;
                    content[start..start + piece.bytes.len()].copy_from_slice(&piece.bytes);
                }
                Cow::Owned(content)
            }
        }
    }

    /// Where the last piece ends, from the start of the block.
    pub fn end(&self) -> usize {
        self.pieces.last().map_or(0, |piece| piece.offset as usize + piece.bytes.len())
    }
}

impl Unlink {
    pub fn name(&self) -> &OsStr {
        OsStr::from_bytes(&self.name)
    }
}

impl Link {
    pub fn name(&self) -> &OsStr {
        OsStr::from_bytes(&self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Vec<Message> {
        let xattr = |name: &[u8]| Xattr { name: name.to_vec(), value: vec![1, 0, 2] };
        let meta = Meta {
            id: 3,
            mode: 0o4755,
            uid: 1000,
            gid: 5,
            mtime: -5,
            mtime_nanos: 999_999_999,
            xattrs: vec![xattr(b"security.capability"), xattr(b"trusted.overlay.opaque")],
        };
        let piece = |offset, len| Piece { offset, bytes: vec![7; len] };
        let ops = [
            Op::Create(Create { id: 3, kind: libc::S_IFREG, rdev: 0, target: vec![] }),
            Op::Create(Create { id: 4, kind: libc::S_IFLNK, rdev: 0, target: b"/etc/\xff".to_vec() }),
            Op::Create(Create { id: 5, kind: libc::S_IFBLK, rdev: libc::makedev(8, 1), target: vec![] }),
            Op::Resize(Resize { id: 3, size: 1 << 40 }),
            Op::Block(Block { id: 3, index: 9, pieces: vec![piece(0, 4096), piece(8192, 100)] }),
            Op::Block(Block { id: 3, index: 9, pieces: vec![] }),
            Op::Block(Block { id: 3, index: 0, pieces: vec![piece(0, BLOCK as usize)] }),
            Op::Meta(meta),
            Op::Unlink(Unlink { dir: 0, name: b"a".to_vec(), id: 7 }),
            Op::Link(Link { dir: 0, name: b"b\xfe".to_vec(), id: 3 }),
            Op::Forget(Forget { id: 3 }),
        ];
        let mut all: Vec<Message> = ops.map(|op| Message::new(2, op)).into();
        all.push(Message::new(0, Op::End(End { last: true, digest: vec![9; 32] })));
        all
    }

    #[test]
    fn messages_come_back() {
        for message in all() {
            let bytes = message.encode_to_vec();
            assert!(bytes.len() <= LIMIT);
            assert_eq!(Message::parse(&bytes), Ok(message));
        }
    }

    #[test]
    fn what_is_wrong_is_refused() {
        let wrong = |op| Message::parse(&Message::new(0, op).encode_to_vec()).unwrap_err();
        let field = Malformed::Field;
        let create = |kind, rdev, target: &[u8]| Op::Create(Create { id: 1, kind, rdev, target: target.to_vec() });
        for kind in [0, 0o777, libc::S_IFREG | 0o644, libc::S_IFMT] {
            assert_eq!(wrong(create(kind, 0, b"")), field("kind"));
        }
        assert_eq!(wrong(create(libc::S_IFREG, 1, b"")), field("rdev"));
        assert_eq!(wrong(create(libc::S_IFREG, 0, b"x")), field("target"));
        for target in [b"".to_vec(), b"a\0".to_vec(), vec![b'x'; 4096]] {
            assert_eq!(wrong(create(libc::S_IFLNK, 0, &target)), field("target"));
        }
        assert_eq!(wrong(Op::Resize(Resize { id: 1, size: 1 << 63 })), field("size"));
        let names: [&[u8]; 7] = [b"", b".", b"..", b"a/b", b"/", b"a\0", &[b'x'; 256]];
        for name in names.map(<[u8]>::to_vec) {
            assert_eq!(wrong(Op::Unlink(Unlink { dir: 0, name: name.clone(), id: 1 })), field("name"));
            assert_eq!(wrong(Op::Link(Link { dir: 0, name, id: 1 })), field("name"));
        }
        let pieces = |list: &[(u32, usize)]| {
            let pieces = list.iter().map(|&(offset, len)| Piece { offset, bytes: vec![1; len] }).collect();
            Op::Block(Block { id: 1, index: 0, pieces })
        };
        let block = BLOCK as usize;
        for list in [&[(0, 0)][..], &[(0, 10), (9, 1)], &[(5, 1), (0, 1)], &[(1, block)], &[(u32::MAX, 1)]] {
            assert_eq!(wrong(pieces(list)), field("piece"));
        }
        assert_eq!(wrong(Op::Block(Block { id: 1, index: u64::MAX, pieces: vec![] })), field("index"));
        let meta = |change: fn(&mut Meta)| {
            let mut meta = Meta::default();
            change(&mut meta);
            Op::Meta(meta)
        };
        assert_eq!(wrong(meta(|m| m.mode = 0o100644)), field("mode"));
        assert_eq!(wrong(meta(|m| m.uid = u32::MAX)), field("owner"));
        assert_eq!(wrong(meta(|m| m.mtime_nanos = 1_000_000_000)), field("time"));
        assert_eq!(wrong(meta(|m| m.xattrs = vec![Xattr::default()])), field("attribute"));
        let twice = |m: &mut Meta| m.xattrs = vec![Xattr { name: b"user.a".to_vec(), value: vec![] }; 2];
        assert_eq!(wrong(meta(twice)), field("attribute"));
        assert_eq!(wrong(Op::End(End { last: false, digest: vec![0; 31] })), field("digest"));
        assert_eq!(Message::parse(&[]), Err(Malformed::UnknownKind));
        // Field 10, a message of no bytes; then a known one with a field too many.
        assert_eq!(Message::parse(&[0x52, 0]), Err(Malformed::UnknownField));
        assert_eq!(Message::parse(&[0x42, 4, 0x08, 1, 0x10, 1]), Err(Malformed::UnknownField));
        assert_eq!(Message::parse(&vec![0; LIMIT + 1]), Err(Malformed::TooLong(LIMIT + 1)));
    }

    /// Whatever the bytes, the answer is a message that encodes to as many, or an error.
    #[test]
    fn any_bytes_may_come() {
        let seeds: Vec<Vec<u8>> = all().iter().map(Message::encode_to_vec).filter(|b| b.len() < 5000).collect();
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = |below: usize| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % below.max(1)
        };
        let (mut good, mut bad) = (0, 0);
        for _ in 0..30_000 {
            let mut bytes = seeds[random(seeds.len())].clone();
            for _ in 0..random(4) {
                let at = random(bytes.len());
                match random(4) {
                    0 => bytes[at] = random(256) as u8,
                    1 => bytes[at] ^= 1 << random(8),
                    2 => bytes.truncate(at),
                    _ => bytes.insert(at, random(256) as u8),
                }
                if bytes.is_empty() {
                    bytes.push(0);
                }
            }
            match Message::parse(&bytes) {
                Ok(message) => {
                    good += 1;
                    assert_eq!(message.encoded_len(), bytes.len());
                    assert_eq!(Message::parse(&message.encode_to_vec()), Ok(message));
                }
                Err(_) => bad += 1,
            }
        }
        assert!(good > 1000 && bad > 1000, "{good} good, {bad} bad");
    }
}
