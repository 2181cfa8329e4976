//! `stats-dump` and `stats-restore`, as any tool that knows CRIU's format reads them.

use std::path::Path;
use std::time::Duration;

/// The figures of a dump.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DumpStats {
    pub freezing: Duration,
    pub frozen: Duration,
    /// Copying memory.
    pub memory: Duration,
    pub pages_scanned: u64,
    pub pages_skipped_parent: u64,
    pub pages_written: u64,
}

/// The fields of a protobuf message: (number, integer or bytes). None where it is malformed.
fn fields(mut bytes: &[u8]) -> Option<Vec<(u64, Field<'_>)>> {
    fn varint(bytes: &mut &[u8]) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let (byte, rest) = bytes.split_first()?;
            *bytes = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes)?;
        let field = match key & 7 {
            0 => Field::Integer(varint(&mut bytes)?),
            2 => {
                let length = varint(&mut bytes)? as usize;
                let (inside, rest) = bytes.split_at_checked(length)?;
                bytes = rest;
                Field::Bytes(inside)
            }
            _ => return None,
        };
        all.push((key >> 3, field));
    }
    Some(all)
}

enum Field<'a> {
    Integer(u64),
    Bytes(&'a [u8]),
}

/// The figures of a restore.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RestoreStats {
    pub took: Duration,
    pub pages: u64,
}

/// Reads a file of statistics: magics, a size, a StatsEntry whose field `kind` is wanted. Returns that one's integers.
fn read(file: &Path, kind: u64) -> Option<Vec<(u64, u64)>> {
    let bytes = std::fs::read(file).ok()?;
    let size = u32::from_le_bytes(bytes.get(8..12)?.try_into().ok()?) as usize;
    let entry = fields(bytes.get(12..12 + size)?)?;
    let inner = entry.into_iter().find_map(|(n, field)| match field {
        Field::Bytes(inner) if n == kind => Some(inner),
        _ => None,
    })?;
    let integers = fields(inner)?.into_iter().filter_map(|(n, field)| match field {
        Field::Integer(value) => Some((n, value)),
        Field::Bytes(_) => None,
    });
    Some(integers.collect())
}

/// Reads `dir/stats-dump`.
pub fn dump(dir: &Path) -> Option<DumpStats> {
    let mut stats = DumpStats::default();
    for (number, value) in read(&dir.join("stats-dump"), 1)? {
        match number {
            1 => stats.freezing = Duration::from_micros(value),
            2 => stats.frozen = Duration::from_micros(value),
            3 => stats.memory = Duration::from_micros(value),
            5 => stats.pages_scanned = value,
            6 => stats.pages_skipped_parent = value,
            7 => stats.pages_written = value,
            _ => {}
        }
    }
    Some(stats)
}

/// Reads `dir/stats-restore`.
pub fn restore(dir: &Path) -> Option<RestoreStats> {
    let mut stats = RestoreStats::default();
    for (number, value) in read(&dir.join("stats-restore"), 2)? {
        match number {
            4 => stats.took = Duration::from_micros(value),
            5 => stats.pages = value,
            _ => {}
        }
    }
    Some(stats)
}
