//! The files of an image directory and how records lie in them.
//!
//! A file is one or two magic numbers (u32, little endian): what family of file it is and what
//! kind. Records follow, each a u32 little-endian length and a protobuf message. After some
//! records come bytes that are no message ([`Payload`]). `inventory.img` has no family number.

use std::any::type_name;
use std::cmp::Ordering;
use std::io::{Read, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use prost::Message;
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};

use super::records::{cgroup, core, files, inventory, lmrun, mm, net, ns, sockets, stats, task, tty};
use super::{Error, Result};

/// Family of nearly all images.
const COMMON: u32 = 0x5456_4319;
/// Family of files that only say something about an operation.
const SERVICE: u32 = 0x5510_5940;

/// The longest message that is believed. The largest that occurs is an mm with its mappings:
/// some 60 bytes each, 65530 of them unless vm.max_map_count was raised.
const MAX_RECORD: u32 = 64 << 20;

/// A kind of image file that holds records `T`.
pub struct ImageFile<T> {
    stem: &'static str,
    number: Number,
    suffix: &'static str,
    family: Option<u32>,
    magic: u32,
    record: PhantomData<fn() -> T>,
}

/// How a file's id is part of its name.
enum Number {
    None,
    Decimal,
    Hex,
}

impl<T> ImageFile<T> {
    /// The only file of its kind: `STEM.img`.
    const fn one(stem: &'static str, magic: u32) -> Self {
        Self { stem, number: Number::None, suffix: ".img", family: Some(COMMON), magic, record: PhantomData }
    }

    /// One file per task, namespace ...: `STEMid.img`.
    const fn many(stem: &'static str, magic: u32) -> Self {
        Self { number: Number::Decimal, ..Self::one(stem, magic) }
    }

    /// Like [`many`](Self::many) with the id in hexadecimal.
    const fn many_hex(stem: &'static str, magic: u32) -> Self {
        Self { number: Number::Hex, ..Self::one(stem, magic) }
    }

    /// The file's name. Kinds of which there is only one take any id.
    pub fn name(&self, id: u64) -> String {
        let Self { stem, suffix, .. } = self;
        match self.number {
            Number::None => format!("{stem}{suffix}"),
            Number::Decimal => format!("{stem}{id}{suffix}"),
            Number::Hex => format!("{stem}{id:x}{suffix}"),
        }
    }

    /// The magic numbers that the file starts with.
    pub(super) fn header(&self) -> Vec<u8> {
        self.family.into_iter().chain([self.magic]).flat_map(u32::to_le_bytes).collect()
    }
}

pub const INVENTORY: ImageFile<inventory::InventoryEntry> =
    ImageFile { family: None, ..ImageFile::one("inventory", 0x5831_3116) };
pub const PSTREE: ImageFile<inventory::PstreeEntry> = ImageFile::one("pstree", 0x5027_3030);
pub const CPUINFO: ImageFile<inventory::CpuinfoEntry> = ImageFile::one("cpuinfo", 0x6140_4013);
/// By tid.
pub const CORE: ImageFile<core::CoreEntry> = ImageFile::many("core-", 0x5505_3847);
/// By pid.
pub const IDS: ImageFile<core::TaskKobjIdsEntry> = ImageFile::many("ids-", 0x5443_2030);
/// By pid.
pub const MM: ImageFile<mm::MmEntry> = ImageFile::many("mm-", 0x5749_2820);
/// By pid. The first record is a [`mm::PagemapHead`].
pub const PAGEMAP: ImageFile<mm::PagemapEntry> = ImageFile::many("pagemap-", 0x5608_4025);
/// By shared memory id. The first record is a [`mm::PagemapHead`].
pub const PAGEMAP_SHMEM: ImageFile<mm::PagemapEntry> = ImageFile::many("pagemap-shmem-", 0x5608_4025);
/// By pid.
pub const FS: ImageFile<task::FsEntry> = ImageFile::many("fs-", 0x5140_3912);
pub const SECCOMP: ImageFile<task::SeccompEntry> = ImageFile::one("seccomp", 0x6441_3049);
/// By files id.
pub const FDINFO: ImageFile<files::FdinfoEntry> = ImageFile::many("fdinfo-", 0x5621_3732);
pub const FILES: ImageFile<files::FileEntry> = ImageFile::one("files", 0x5630_3138);
pub const PIPES_DATA: ImageFile<files::PipeDataEntry> = ImageFile::one("pipes-data", 0x5645_3709);
pub const FIFO_DATA: ImageFile<files::PipeDataEntry> = ImageFile::one("fifo-data", 0x5933_3054);
pub const REMAP_FPATH: ImageFile<files::RemapFilePathEntry> = ImageFile::one("remap-fpath", 0x5913_3954);
/// By ghost file id. The content follows the record, see [`files::GhostFileEntry`].
pub const GHOST_FILE: ImageFile<files::GhostFileEntry> = ImageFile::many_hex("ghost-file-", 0x5258_3605);
pub const MEMFD: ImageFile<files::MemfdInodeEntry> = ImageFile::one("memfd", 0x4845_3499);
pub const FILELOCKS: ImageFile<files::FileLockEntry> = ImageFile::one("filelocks", 0x5432_3616);
pub const SK_QUEUES: ImageFile<sockets::SkPacketEntry> = ImageFile::one("sk-queues", 0x5626_4026);
/// By inode number.
pub const TCP_STREAM: ImageFile<sockets::TcpStreamEntry> = ImageFile::many_hex("tcp-stream-", 0x5146_5506);
pub const TTY_INFO: ImageFile<tty::TtyInfoEntry> = ImageFile::one("tty-info", 0x5945_3036);
pub const TTY_DATA: ImageFile<tty::TtyDataEntry> = ImageFile::one("tty-data", 0x5941_3026);
pub const CGROUP: ImageFile<cgroup::CgroupEntry> = ImageFile::one("cgroup", 0x5938_3330);
/// By namespace id, as are all the following.
pub const MOUNTPOINTS: ImageFile<ns::MntEntry> = ImageFile::many("mountpoints-", 0x5556_3928);
pub const UTSNS: ImageFile<ns::UtsnsEntry> = ImageFile::many("utsns-", 0x5447_3203);
pub const TIMENS: ImageFile<ns::TimensEntry> = ImageFile::many("timens-", 0x4311_4433);
pub const USERNS: ImageFile<ns::UsernsEntry> = ImageFile::many("userns-", 0x5547_4906);
pub const PIDNS: ImageFile<ns::PidnsEntry> = ImageFile::many("pidns-", 0x6115_7326);
pub const IPC_VAR: ImageFile<ns::IpcVarEntry> = ImageFile::many("ipcns-var-", 0x5311_5007);
/// Segments that are not in the pagemaps have their content after the record.
pub const IPC_SHM: ImageFile<ns::IpcShmEntry> = ImageFile::many("ipcns-shm-", 0x4628_3044);
/// Every queue is followed by its messages, see [`ns::IpcMsg`].
pub const IPC_MSG: ImageFile<ns::IpcMsgEntry> = ImageFile::many("ipcns-msg-", 0x5545_3737);
pub const IPC_SEM: ImageFile<ns::IpcSemEntry> = ImageFile::many("ipcns-sem-", 0x5957_3019);
pub const NETNS: ImageFile<net::NetnsEntry> = ImageFile::many("netns-", 0x5593_3752);
pub const NETDEV: ImageFile<net::NetDeviceEntry> = ImageFile::many("netdev-", 0x5737_3951);
/// Ours, and by its name no image of CRIU's.
pub const LMRUN: ImageFile<lmrun::LmrunEntry> = ImageFile { suffix: ".bin", ..ImageFile::one("lmrun", 0x4c4d_5231) };
pub const STATS_DUMP: ImageFile<stats::StatsEntry> = stats_file("stats-dump");
pub const STATS_RESTORE: ImageFile<stats::StatsEntry> = stats_file("stats-restore");

const fn stats_file(stem: &'static str) -> ImageFile<stats::StatsEntry> {
    ImageFile { family: Some(SERVICE), suffix: "", ..ImageFile::one(stem, 0x5709_3306) }
}

/// Name of the raw file with the pages of the pagemap whose head says `pages_id`.
pub fn pages_name(pages_id: u32) -> String {
    format!("pages-{pages_id}.img")
}

/// A record that is followed by bytes.
pub trait Payload {
    /// How many.
    fn payload_len(&self) -> u64;
}

impl Payload for files::PipeDataEntry {
    fn payload_len(&self) -> u64 {
        self.bytes.into()
    }
}

impl Payload for files::GhostChunkEntry {
    fn payload_len(&self) -> u64 {
        self.len
    }
}

impl Payload for sockets::SkPacketEntry {
    fn payload_len(&self) -> u64 {
        self.length.into()
    }
}

/// First what was received, then what was sent.
impl Payload for sockets::TcpStreamEntry {
    fn payload_len(&self) -> u64 {
        u64::from(self.inq_len) + u64::from(self.outq_len)
    }
}

/// Why a message is not what its kind of record says. Fields are named by their path of
/// numbers: 5.3 is field 3 of the message in field 5.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error(transparent)]
    Malformed(#[from] prost::DecodeError),
    #[error("unknown field {0}")]
    Unknown(String),
    #[error("required field {0} is missing")]
    Missing(String),
    #[error("encoded in an unusual way")]
    Unusual,
}

/// Decodes a message and refuses what prost lets pass: unknown fields (state that
/// would be lost) and missing required ones.
pub fn decode<T: Message + Default>(bytes: &[u8]) -> std::result::Result<T, RecordError> {
    let record = T::decode(bytes)?;
    // Optional fields know whether they were there, so encoding gives back what was read,
    // unless something was not understood.
    if record.encoded_len() == bytes.len() { Ok(record) } else { Err(difference(bytes, &record.encode_to_vec())) }
}

/// Names the first field in which a message differs from its decoded and encoded self.
fn difference(read: &[u8], written: &[u8]) -> RecordError {
    match first_difference(read, written, "") {
        Ok(Some(error)) => error,
        Ok(None) => RecordError::Unusual,
        Err(error) => error.into(),
    }
}

fn first_difference(
    read: &[u8],
    written: &[u8],
    outer: &str,
) -> std::result::Result<Option<RecordError>, prost::DecodeError> {
    let (read, written) = (split(read)?, split(written)?);
    let of = |fields: &[(u32, &[u8])], tag| fields.iter().filter(|f| f.0 == tag).count();
    for &(tag, _) in read.iter().chain(&written) {
        let path = format!("{outer}{tag}");
        match of(&read, tag).cmp(&of(&written, tag)) {
            Ordering::Greater => return Ok(Some(RecordError::Unknown(path))),
            Ordering::Less => return Ok(Some(RecordError::Missing(path))),
            Ordering::Equal => {}
        }
    }
    // The same fields: the difference is inside one of them.
    let inner = read.iter().zip(&written).find(|(r, w)| r.0 == w.0 && r.1.len() != w.1.len());
    inner.map_or(Ok(None), |(r, w)| first_difference(r.1, w.1, &format!("{outer}{}.", r.0)))
}

/// The fields of a message: number and, where it is length-delimited, content.
fn split(mut bytes: &[u8]) -> std::result::Result<Vec<(u32, &[u8])>, prost::DecodeError> {
    let mut fields = Vec::new();
    while !bytes.is_empty() {
        let (tag, wire) = decode_key(&mut bytes)?;
        let mut content: &[u8] = &[];
        if wire == WireType::LengthDelimited {
            let mut peek = bytes;
            let len = decode_varint(&mut peek)?;
            content = usize::try_from(len).ok().and_then(|len| peek.get(..len)).unwrap_or_default();
        }
        skip_field(wire, tag, &mut bytes, DecodeContext::default())?;
        fields.push((tag, content));
    }
    Ok(fields)
}

/// Writes one image file.
pub struct RecordWriter<W: Write> {
    path: PathBuf,
    out: W,
    buf: Vec<u8>,
}

impl<W: Write> RecordWriter<W> {
    /// Starts a file of this kind in `out`; `path` is for messages.
    pub fn new<T>(kind: &ImageFile<T>, out: W, path: PathBuf) -> Result<Self> {
        let mut writer = Self { path, out, buf: Vec::new() };
        writer.raw(&kind.header())?;
        Ok(writer)
    }

    /// Appends a record. Most files hold one type; it is the caller who knows the exceptions.
    ///
    /// # Errors
    /// [`Error::TooLong`] for what no reader would take.
    pub fn record<T: Message>(&mut self, record: &T) -> Result<()> {
        let len = u32::try_from(record.encoded_len()).ok().filter(|len| *len <= MAX_RECORD);
        let len = len.ok_or_else(|| Error::TooLong {
            path: self.path.clone(),
            offset: 0,
            bytes: record.encoded_len() as u64,
        })?;
        let mut buf = std::mem::take(&mut self.buf);
        buf.clear();
        buf.extend_from_slice(&len.to_le_bytes());
        record.encode_raw(&mut buf);
        let done = self.raw(&buf);
        self.buf = buf;
        done
    }

    /// Appends bytes that belong to the last record.
    pub fn raw(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).map_err(Error::io(&self.path))
    }

    /// Hands everything to the underlying file.
    pub fn finish(mut self) -> Result<W> {
        self.out.flush().map_err(Error::io(&self.path))?;
        Ok(self.out)
    }
}

/// Reads one image file from front to back. Nothing in it is believed before it was checked
/// against the length of the file.
pub struct RecordReader<R> {
    path: PathBuf,
    input: R,
    offset: u64,
    left: u64,
}

impl<R: Read> RecordReader<R> {
    /// Starts reading `input`, which has `len` bytes, and checks that it is of this kind.
    pub fn new<T>(kind: &ImageFile<T>, input: R, len: u64, path: PathBuf) -> Result<Self> {
        let mut reader = Self { path, input, offset: 0, left: len };
        for expected in kind.family.into_iter().chain([kind.magic]) {
            let found = reader.u32()?;
            if found != expected {
                return Err(Error::Magic { path: reader.path, found, expected });
            }
        }
        Ok(reader)
    }

    /// The next record, or None at the end of the file.
    pub fn record<T: Message + Default>(&mut self) -> Result<Option<T>> {
        if self.left == 0 {
            return Ok(None);
        }
        let offset = self.offset;
        let len = self.u32()?;
        if len > MAX_RECORD {
            return Err(Error::TooLong { path: self.path.clone(), offset, bytes: len.into() });
        }
        let bytes = self.raw(len.into())?;
        let record = decode(&bytes).map_err(|source| {
            let kind = type_name::<T>().rsplit("::").next().unwrap_or_default();
            Error::Record { path: self.path.clone(), offset, kind, source }
        })?;
        Ok(Some(record))
    }

    /// The next `len` bytes, as they are.
    pub fn raw(&mut self, len: u64) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.raw_to(len, &mut bytes)?;
        Ok(bytes)
    }

    /// Copies the next `len` bytes to `out`.
    pub fn raw_to(&mut self, len: u64, out: &mut impl Write) -> Result<()> {
        if len > self.left {
            return Err(self.truncated(len));
        }
        let copied = std::io::copy(&mut self.input.by_ref().take(len), out).map_err(Error::io(&self.path))?;
        if copied < len {
            self.left = copied;
            return Err(self.truncated(len));
        }
        self.offset += len;
        self.left -= len;
        Ok(())
    }

    /// Bytes not yet read.
    pub fn left(&self) -> u64 {
        self.left
    }

    /// The file, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn u32(&mut self) -> Result<u32> {
        let bytes = self.raw(4)?;
        Ok(bytes.iter().rev().fold(0, |n, b| n << 8 | u32::from(*b)))
    }

    fn truncated(&self, wanted: u64) -> Error {
        Error::Truncated { path: self.path.clone(), offset: self.offset, wanted, left: self.left }
    }
}

#[cfg(test)]
#[path = "format_tests.rs"]
mod tests;
