//! The running kernel's own types: /sys/kernel/btf/vmlinux, Documentation/bpf/btf.rst.

use std::fs;
use std::io::{self, ErrorKind};

const VMLINUX: &str = "/sys/kernel/btf/vmlinux";
const MAGIC: u16 = 0xeb9f;

const STRUCT: u32 = 4;
const UNION: u32 = 5;
const FUNC: u32 = 12;

/// Types by their number.
#[derive(Debug)]
pub struct Btf {
    bytes: Vec<u8>,
    /// Where each type is in `bytes`; type 0 is void.
    types: Vec<usize>,
    strings: usize,
}

impl Btf {
    /// # Errors
    /// `NotFound` where the kernel was built without CONFIG_DEBUG_INFO_BTF.
    pub fn of_kernel() -> io::Result<Btf> {
        Btf::parse(fs::read(VMLINUX)?).ok_or_else(|| io::Error::new(ErrorKind::InvalidData, VMLINUX))
    }

    fn parse(bytes: Vec<u8>) -> Option<Btf> {
        let magic = u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?);
        if magic != MAGIC {
            return None;
        }
        // struct btf_header: magic, version, flags, hdr_len, type_off, type_len, str_off, str_len.
        let [header, type_off, type_len, str_off] =
            [4, 8, 12, 16].map(|at| word(&bytes, at).unwrap_or(u32::MAX) as usize);
        let mut types = vec![0];
        let (mut at, end) = (header.checked_add(type_off)?, header.checked_add(type_off)?.checked_add(type_len)?);
        while at < end {
            types.push(at);
            let info = word(&bytes, at + 4)?;
            let members = (info & 0xffff) as usize;
            at += 12
                + match info >> 24 & 0x1f {
                    1 | 14 | 17 => 4,
                    3 => 12,
                    6 | 13 => members * 8,
                    STRUCT | UNION | 15 | 19 => members * 12,
                    2 | 7..=12 | 16 | 18 => 0,
                    _ => return None,
                };
        }
        Some(Btf { bytes, types, strings: header.checked_add(str_off)? })
    }

    /// The number of a function.
    pub fn function(&self, name: &str) -> Option<u32> {
        self.find(FUNC, name)
    }

    /// The offset of a structure's member, or of one in its nameless parts, in bytes.
    pub fn offset(&self, structure: &str, member: &str) -> Option<u16> {
        self.member(self.find(STRUCT, structure)?, member)?.try_into().ok()
    }

    fn find(&self, kind: u32, name: &str) -> Option<u32> {
        let is = |at: &&usize| {
            word(&self.bytes, **at + 4).is_some_and(|info| info >> 24 & 0x1f == kind) && self.is_named(**at, name)
        };
        let at = self.types.iter().skip(1).find(is)?;
        self.types.binary_search(at).ok()?.try_into().ok()
    }

    fn member(&self, number: u32, name: &str) -> Option<u32> {
        let at = *self.types.get(number as usize).filter(|_| number > 0)?;
        let info = word(&self.bytes, at + 4)?;
        if !matches!(info >> 24 & 0x1f, STRUCT | UNION) {
            return None;
        }
        (0..(info & 0xffff) as usize).map(|n| at + 12 + n * 12).find_map(|member| {
            let bits = word(&self.bytes, member + 8)?;
            // With the kind flag, the upper byte is the size of a bit field.
            let offset = if info >> 31 != 0 { bits & 0x00ff_ffff } else { bits } / 8;
            if self.is_named(member, name) {
                return Some(offset);
            }
            let nameless = word(&self.bytes, member)? == 0;
            let inner = self.member(word(&self.bytes, member + 4)?, name).filter(|_| nameless)?;
            Some(offset + inner)
        })
    }

    /// Whether the string that the first word at `at` names is `name`.
    fn is_named(&self, at: usize, name: &str) -> bool {
        let string = word(&self.bytes, at).and_then(|offset| self.bytes.get(self.strings + offset as usize..));
        string.is_some_and(|s| s.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.first() == Some(&0)))
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two structures as the compiler writes them down, one nameless inside of the other.
    #[test]
    fn members_are_found_in_nameless_parts() {
        let strings = b"\0outer\0x\0inner\0act\0";
        let (outer, x, inner, act) = (1, 7, 9, 15);
        let words = [
            [0, 4 << 24 | 1, 8].to_vec(),
            [inner, 0, 32].to_vec(),
            [outer, 4 << 24 | 2, 16].to_vec(),
            [x, 0, 0, 0, 1, 64].to_vec(),
            [act, 12 << 24, 0].to_vec(),
        ]
        .concat();
        let mut bytes = [MAGIC.to_ne_bytes().as_slice(), &[1, 0]].concat();
        let types = words.len() as u32 * 4;
        for word in [24, 0, types, types, strings.len() as u32].into_iter().chain(words) {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(strings);
        for cut in [0, 3, 30, bytes.len() - strings.len() - 2] {
            assert!(Btf::parse(bytes[..cut].to_vec()).is_none_or(|b| b.offset("outer", "inner").is_none()), "{cut}");
        }
        let btf = Btf::parse(bytes).unwrap();
        assert_eq!(btf.offset("outer", "x"), Some(0));
        assert_eq!(btf.offset("outer", "inner"), Some(8 + 4));
        assert_eq!(btf.offset("outer", "act"), None);
        assert_eq!(btf.offset("act", "x"), None);
        assert_eq!(btf.function("act"), Some(3));
    }
}
