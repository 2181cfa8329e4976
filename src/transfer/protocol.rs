//! CRIU's page-server protocol: messages of 32 bytes, in host byte order, sent raw over a
//! stream. No version, no greeting, no authentication.
//!
//! ```text
//! offset  0  u32  command in the low 16 bits, pagemap flags in the high 16
//!         4       padding
//!         8  u64  number of pages
//!        16  u64  address of the first page
//!        24  u64  target: its id << 8 | its type
//! ```

use crate::image::pages::{PAGE_SIZE, PagesOf};
use crate::image::records::mm::pe;

/// Bytes of a message.
pub const MESSAGE_SIZE: usize = 32;

/// Type of target: a task's memory, by pid.
const TASK: u64 = 1;
/// Type of target: shared memory, by its id.
const SHMEM: u64 = 2;

/// The last address of a user's memory plus one, with five-level page tables.
const ADDRESS_LIMIT: u64 = 1 << 56;

/// What a client can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// The target that pages are sent of from now on. With `answer`: tell by one byte
    /// whether it has a parent.
    Open { of: PagesOf, answer: bool },
    /// Tell by an i32 whether the target has a parent.
    HasParent { of: PagesOf },
    /// Pages of the open target. Their bytes follow if `flags` has [`pe::PRESENT`].
    Add { of: PagesOf, vaddr: u64, pages: u64, flags: u32 },
    /// All is sent. Answer by an i32: 0 if it arrived.
    Close,
}

/// Why a message is not one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    #[error("asked for pages: this is no server for lazy migration")]
    Get,
    #[error("sent an unknown command, {0:#x}")]
    Command(u32),
    #[error("sent unknown page flags, {0:#x}")]
    Flags(u32),
    #[error("sent pages of an unknown kind of target, {0:#x}")]
    Target(u64),
    #[error("sent {pages} pages at {vaddr:#x}: no such memory")]
    Range { vaddr: u64, pages: u64 },
    #[error("sent pages of {0} without opening it first")]
    NotOpen(PagesOf),
    #[error("left pages of {0} to the parent image, which does not know it")]
    NoParent(PagesOf),
    #[error("opened {0} a second time")]
    Reopened(PagesOf),
}

impl Message {
    pub fn encode(&self) -> [u8; MESSAGE_SIZE] {
        let (command, pages, vaddr, of) = match *self {
            Self::Open { of, answer: false } => (3, 0, 0, Some(of)),
            Self::Open { of, answer: true } => (4, 0, 0, Some(of)),
            Self::HasParent { of } => (5, 0, 0, Some(of)),
            Self::Add { of, vaddr, pages, flags } => (6 | flags << 16, pages, vaddr, Some(of)),
            Self::Close => (0x1023, 0, 0, None),
        };
        let target = of.map_or(0, |of| match of {
            PagesOf::Task(pid) => u64::from(pid) << 8 | TASK,
            PagesOf::Shmem(id) => id << 8 | SHMEM,
        });
        let mut bytes = [0; MESSAGE_SIZE];
        bytes[..4].copy_from_slice(&u32::to_ne_bytes(command));
        for (slot, value) in bytes[8..].chunks_exact_mut(8).zip([pages, vaddr, target]) {
            slot.copy_from_slice(&value.to_ne_bytes());
        }
        bytes
    }

    pub fn decode(bytes: &[u8; MESSAGE_SIZE]) -> Result<Self, ProtocolError> {
        let word = |at: usize| u64::from_ne_bytes(std::array::from_fn(|i| bytes[at + i]));
        let command = u32::from_ne_bytes(std::array::from_fn(|i| bytes[i]));
        let (pages, vaddr, target) = (word(8), word(16), word(24));
        let (command, flags) = (command & 0xffff, command >> 16);

        let of = || match (target & 0xff, target >> 8) {
            (TASK, pid) => pid.try_into().map(PagesOf::Task).map_err(|_| ProtocolError::Target(target)),
            (SHMEM, id) => Ok(PagesOf::Shmem(id)),
            _ => Err(ProtocolError::Target(target)),
        };
        let add = |flags| {
            let end = pages.checked_mul(PAGE_SIZE).and_then(|bytes| vaddr.checked_add(bytes));
            if pages == 0 || !vaddr.is_multiple_of(PAGE_SIZE) || end.is_none_or(|end| end > ADDRESS_LIMIT) {
                return Err(ProtocolError::Range { vaddr, pages });
            }
            Ok(Self::Add { of: of()?, vaddr, pages, flags })
        };
        match command {
            // A page is here or in the parent; in neither it could only be fetched later.
            6 if matches!(flags & !pe::LAZY, pe::PRESENT | pe::PARENT) => add(flags),
            _ if flags != 0 || command == 6 => Err(ProtocolError::Flags(flags)),
            1 => add(pe::PRESENT),
            2 => add(pe::PARENT),
            3 => Ok(Self::Open { of: of()?, answer: false }),
            4 => Ok(Self::Open { of: of()?, answer: true }),
            5 => Ok(Self::HasParent { of: of()? }),
            7 => Err(ProtocolError::Get),
            0x1023 | 0x1024 => Ok(Self::Close),
            unknown => Err(ProtocolError::Command(unknown)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OF: PagesOf = PagesOf::Task(7);

    #[test]
    fn messages_come_back() {
        let all = [
            Message::Open { of: OF, answer: false },
            Message::Open { of: PagesOf::Shmem(0xabcd_ef01), answer: true },
            Message::HasParent { of: OF },
            Message::Add { of: OF, vaddr: 0x7f00_0000_0000, pages: 1 << 20, flags: pe::PRESENT },
            Message::Add { of: OF, vaddr: 0, pages: 1, flags: pe::PARENT },
            Message::Close,
        ];
        for message in all {
            assert_eq!(Message::decode(&message.encode()), Ok(message));
        }
    }

    #[test]
    fn the_bytes_are_those_of_the_format() {
        let bytes = Message::Add { of: OF, vaddr: 0x2000, pages: 3, flags: pe::PRESENT }.encode();
        let words = bytes.chunks(8).map(|c| u64::from_le_bytes(c.try_into().unwrap()));
        assert_eq!(words.collect::<Vec<_>>(), [6 | 4 << 16, 3, 0x2000, 7 << 8 | 1]);
    }

    #[test]
    fn what_is_not_known_is_refused() {
        let message = |command: u32, pages: u64, vaddr: u64, target: u64| {
            let mut bytes = [0; MESSAGE_SIZE];
            bytes[..4].copy_from_slice(&command.to_ne_bytes());
            bytes[8..16].copy_from_slice(&pages.to_ne_bytes());
            bytes[16..24].copy_from_slice(&vaddr.to_ne_bytes());
            bytes[24..].copy_from_slice(&target.to_ne_bytes());
            Message::decode(&bytes).unwrap_err()
        };
        let task = 7 << 8 | 1;
        assert_eq!(message(7, 1, 0, task), ProtocolError::Get);
        assert_eq!(message(9, 1, 0, task), ProtocolError::Command(9));
        assert_eq!(message(6, 1, 0, task), ProtocolError::Flags(0));
        assert_eq!(message(6 | 2 << 16, 1, 0, task), ProtocolError::Flags(2));
        assert_eq!(message(6 | 12 << 16, 1, 0, task), ProtocolError::Flags(12));
        assert_eq!(message(1 | 4 << 16, 1, 0, task), ProtocolError::Flags(4));
        assert_eq!(message(3, 0, 0, 7 << 8), ProtocolError::Target(7 << 8));
        assert_eq!(message(3, 0, 0, 1 << 40 | 1), ProtocolError::Target(1 << 40 | 1));
        for (pages, vaddr) in [(0, 0), (1, 1), (u64::MAX, 0), (1 << 44, 4096), (1, ADDRESS_LIMIT)] {
            assert_eq!(message(1, pages, vaddr, task), ProtocolError::Range { pages, vaddr });
        }
    }
}
