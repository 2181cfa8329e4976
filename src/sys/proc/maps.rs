//! `/proc/PID/maps` and `/proc/PID/smaps`.

use std::io;

use libc::pid_t;

use super::malformed;

/// One mapping.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Vma {
    pub start: u64,
    pub end: u64,
    /// PROT_* bits.
    pub prot: u32,
    pub shared: bool,
    /// Offset in the file, in bytes.
    pub offset: u64,
    pub major: u32,
    pub minor: u32,
    /// 0: anonymous.
    pub inode: u64,
    /// Path, pseudo-path such as `[stack]`, or nothing. The kernel's escapes (`\012`) are undone.
    pub name: Vec<u8>,
    /// The two-letter codes of `VmFlags`; empty when read from `maps`.
    pub flags: Vec<[u8; 2]>,
}

impl Vma {
    pub fn has(&self, flag: &[u8; 2]) -> bool {
        self.flags.contains(flag)
    }

    pub fn is_special(&self) -> bool {
        self.name.starts_with(b"[v")
    }
}

/// All mappings, in ascending order, without `flags`.
pub fn maps(pid: pid_t) -> io::Result<Vec<Vma>> {
    std::fs::read(format!("/proc/{pid}/maps"))?.split(|&b| b == b'\n').filter(|l| !l.is_empty()).map(head).collect()
}

/// All mappings with their `flags`. Walks the page tables: some milliseconds per GiB.
pub fn smaps(pid: pid_t) -> io::Result<Vec<Vma>> {
    let text = std::fs::read(format!("/proc/{pid}/smaps"))?;
    let mut all: Vec<Vma> = Vec::new();
    for line in text.split(|&b| b == b'\n').filter(|l| !l.is_empty()) {
        if let Some(flags) = line.strip_prefix(b"VmFlags:") {
            let vma = all.last_mut().ok_or_else(|| malformed("smaps: VmFlags before a mapping"))?;
            vma.flags = flags.split(|&b| b == b' ').filter_map(|f| f.try_into().ok()).collect();
        } else if !line[0].is_ascii_uppercase() {
            all.push(head(line)?);
        }
    }
    Ok(all)
}

fn head(line: &[u8]) -> io::Result<Vma> {
    parse_head(line).ok_or_else(|| malformed(format_args!("mapping {:?}", String::from_utf8_lossy(line))))
}

fn parse_head(line: &[u8]) -> Option<Vma> {
    let mut rest = line;
    let mut field = || {
        let end = rest.iter().position(|&b| b == b' ').unwrap_or(rest.len());
        let (f, r) = rest.split_at(end);
        rest = r.strip_prefix(b" ").unwrap_or(r);
        std::str::from_utf8(f).ok()
    };
    let hex = |s: &str| u64::from_str_radix(s, 16).ok();
    let (start, end) = field()?.split_once('-')?;
    let perms = field()?.as_bytes();
    let offset = hex(field()?)?;
    let (major, minor) = field()?.split_once(':')?;
    let inode = field()?.parse().ok()?;
    let prot = [(b'r', libc::PROT_READ), (b'w', libc::PROT_WRITE), (b'x', libc::PROT_EXEC)];
    Some(Vma {
        start: hex(start)?,
        end: hex(end)?,
        prot: prot.iter().zip(perms).filter(|((c, _), p)| c == *p).map(|((_, bit), _)| *bit as u32).sum(),
        shared: *perms.get(3)? == b's',
        offset,
        major: hex(major)? as u32,
        minor: hex(minor)? as u32,
        inode,
        name: unescape(rest.trim_ascii_start()),
        flags: Vec::new(),
    })
}

/// Undoes `seq_path`'s escape of the newline, the only one it makes here.
fn unescape(name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    let mut rest = name;
    while let Some((&b, tail)) = rest.split_first() {
        match rest.strip_prefix(b"\\012") {
            Some(tail) => {
                out.push(b'\n');
                rest = tail;
            }
            None => {
                out.push(b);
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_whole() {
        let v = head(b"7f00-8f00 r-xp 00002000 fe:01 247030                     /usr/bin/a b\\012c (deleted)").unwrap();
        assert_eq!((v.start, v.end, v.offset, v.major, v.minor, v.inode), (0x7f00, 0x8f00, 0x2000, 0xfe, 1, 247030));
        assert_eq!(v.prot, (libc::PROT_READ | libc::PROT_EXEC) as u32);
        assert!(!v.shared);
        assert_eq!(v.name, b"/usr/bin/a b\nc (deleted)");
        assert_eq!(head(b"7f00-8f00 ---s 00000000 00:00 0 ").unwrap().name, b"");
        assert!(head(b"7f00 rwxp 0 0 0").is_err());
    }

    #[test]
    fn our_own_mappings_agree() {
        let (a, b) = (maps(std::process::id() as pid_t).unwrap(), smaps(std::process::id() as pid_t).unwrap());
        assert!(a.iter().any(|v| v.name == b"[stack]") && b.iter().any(|v| v.has(b"gd")));
    }
}
