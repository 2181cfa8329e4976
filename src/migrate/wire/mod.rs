//! How the two ends of a migration speak: frames over any stream of bytes.
//!
//! ```text
//! offset  0  u16  type
//!         2  u16  flags: none is known, all must be 0
//!         4  u32  length of what follows, in bytes
//! ```
//! Numbers are little-endian. Control messages are protobuf ([`message`]); pages, images and what the other layers say to
//! their own kind at the other end are raw bytes behind a small header ([`pages`], [`Message`]), so that memory is copied by
//! nobody. Both ends say their version first, and it must be the same: what is not known here is an error.

pub mod message;
pub mod pages;
mod reader;
#[cfg(test)]
mod tests;
mod writer;

use std::io;

pub use message::{Control, Message};
pub use pages::{Compression, Content, Encoding, PageEncoder, Pages};
pub use reader::Reader;
pub use writer::Writer;

/// The version that both ends must speak.
pub const PROTOCOL: u32 = 1;

/// Bytes of a frame's header.
const HEADER: usize = 8;
/// Most bytes of a control message.
pub const MAX_CONTROL: usize = 1 << 20;
/// Most bytes of payload in a frame of pages, of an image, of a disk or an engine.
pub const MAX_PAYLOAD: usize = 1 << 20;
/// Most bytes of an image's name.
const MAX_NAME: usize = 255;

/// Why nothing more can be said or understood.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("connection")]
    Io(#[source] io::Error),
    #[error("the other end has closed the connection")]
    Closed,
    #[error("the connection broke in the middle of a message")]
    Truncated,
    #[error("the other end is silent")]
    Silent,
    #[error("received a message of unknown type {0}")]
    UnknownType(u16),
    #[error("received a message of type {kind} with unknown flags {flags:#x}")]
    UnknownFlags { kind: u16, flags: u16 },
    #[error("{what} has {length} bytes: more than {limit}")]
    TooLong { what: &'static str, length: u64, limit: u64 },
    #[error("received a malformed {what}")]
    Malformed {
        what: &'static str,
        #[source]
        source: prost::DecodeError,
    },
    #[error("received a {what} with fields that this version does not know")]
    UnknownFields { what: &'static str },
    #[error("received {what}")]
    Invalid { what: String },
    #[error("the other end gave up: {reason}")]
    Aborted { reason: String },
    #[error("received a {found} where {expected} was due")]
    OutOfPhase { found: &'static str, expected: &'static str },
}

impl Error {
    /// What a failed read means.
    fn read(e: io::Error) -> Error {
        match e.kind() {
            io::ErrorKind::UnexpectedEof => Error::Truncated,
            // A socket's own timeouts end with the latter.
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Error::Silent,
            io::ErrorKind::ConnectionReset => Error::Closed,
            _ => Error::Io(e),
        }
    }

    /// What a failed write means.
    fn write(e: io::Error) -> Error {
        match e.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::WriteZero => Error::Closed,
            io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Error::Silent,
            _ => Error::Io(e),
        }
    }

    fn invalid(what: impl Into<String>) -> Error {
        Error::Invalid { what: what.into() }
    }
}

pub type Result<T> = std::result::Result<T, Error>;
