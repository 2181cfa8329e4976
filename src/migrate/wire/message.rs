//! What is said. A type has one line in the table at the end, and the compiler writes the rest.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use super::pages::Pages;
use super::{Error, Result};
use crate::image::pages::PagesOf;
use crate::migrate::preflight::{Host, Needs};

/// The first message of either side.
#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct Hello {
    /// [`super::PROTOCOL`]
    #[prost(uint32, tag = "1")]
    pub protocol: u32,
    #[prost(string, tag = "2")]
    pub lmrun_version: String,
    /// Names this migration: 128 random bits in hex.
    #[prost(string, tag = "3")]
    pub token: String,
    /// 0: the connection on which everything is said; above: one more for pages.
    #[prost(uint32, tag = "4")]
    pub stream: u32,
    /// What this end can do beyond what its version says.
    #[prost(string, repeated, tag = "5")]
    pub features: Vec<String>,
}

impl Hello {
    /// Of the connection on which everything is said.
    pub fn of(token: &str) -> Self {
        let lmrun_version = env!("CARGO_PKG_VERSION").to_owned();
        Hello { protocol: super::PROTOCOL, lmrun_version, token: token.to_owned(), ..Hello::default() }
    }
}

/// What is to be moved. Its files (config.json and others) follow as images.
#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct Offer {
    #[prost(string, tag = "1")]
    pub id: String,
    /// Where the bundle shall be at the destination, if not where lmrun puts it.
    #[prost(bytes = "vec", optional, tag = "2")]
    pub bundle: Option<Vec<u8>>,
    #[prost(btree_map = "string, string", tag = "3")]
    pub annotations: BTreeMap<String, String>,
    #[prost(message, required, tag = "4")]
    pub manner: Manner,
    /// What the container is to its engine, which the destination's engine understands; empty: lmrun alone.
    #[prost(string, tag = "5")]
    pub engine: String,
    /// Names of the images that follow.
    #[prost(string, repeated, tag = "6")]
    pub images: Vec<String>,
    #[prost(message, required, boxed, tag = "7")]
    pub host: Box<Host>,
    #[prost(message, required, tag = "8")]
    pub needs: Needs,
}

/// How it is to be moved.
#[derive(Clone, Copy, PartialEq, Eq, ::prost::Message)]
pub struct Manner {
    #[prost(bool, tag = "1")]
    pub check: bool,
    #[prost(bool, tag = "2")]
    pub offline: bool,
    #[prost(bool, tag = "3")]
    pub post_copy: bool,
    #[prost(bool, tag = "4")]
    pub keep_source: bool,
    #[prost(bool, tag = "5")]
    pub tcp_established: bool,
    #[prost(bool, tag = "6")]
    pub volumes: bool,
    /// Connections for pages beside the first.
    #[prost(uint32, tag = "7")]
    pub streams: u32,
}

/// What both ends' facts say about the move.
#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct Findings {
    #[prost(message, repeated, tag = "1")]
    pub list: Vec<Finding>,
}

/// Something that stands in the way, or that one should know.
#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct Finding {
    #[prost(string, tag = "1")]
    pub what: String,
    /// `source`, `destination`, `container`, and more exactly if it helps.
    #[prost(string, tag = "2")]
    pub place: String,
    #[prost(string, tag = "3")]
    pub remedy: String,
    /// The move cannot be made. Otherwise: it can.
    #[prost(bool, tag = "4")]
    pub blocks: bool,
}

/// The destination is ready to receive.
#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct Accept {
    /// It has no root file system for the container: it is to be sent.
    #[prost(bool, tag = "1")]
    pub disk: bool,
    /// Its engine lacks the image, but for so many layers counted from the lowest: it is to be sent before all else.
    #[prost(uint32, optional, tag = "2")]
    pub known_layers: Option<u32>,
    /// Volumes of the engine that are to be sent with the root file system, in this order.
    #[prost(string, repeated, tag = "3")]
    pub volumes: Vec<String>,
}

/// The destination will not have it; the findings before say why.
#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct Refuse {
    #[prost(string, tag = "1")]
    pub reason: String,
}

/// Asks for the clocks.
#[derive(Clone, Copy, PartialEq, Eq, ::prost::Message)]
pub struct Ping {
    /// The asker's CLOCK_MONOTONIC in ns, to be sent back.
    #[prost(int64, tag = "1")]
    pub sent: i64,
}

/// The container's clocks in ns, in its own time namespace.
#[derive(Clone, Copy, PartialEq, Eq, ::prost::Message)]
pub struct Pong {
    #[prost(int64, tag = "1")]
    pub sent: i64,
    #[prost(int64, tag = "2")]
    pub monotonic: i64,
    #[prost(int64, tag = "3")]
    pub boottime: i64,
    #[prost(int64, tag = "4")]
    pub realtime: i64,
}

/// All of the file system has arrived and is what was sent.
#[derive(Clone, Copy, PartialEq, Eq, ::prost::Message)]
pub struct DiskDone {
    #[prost(uint64, tag = "1")]
    pub bytes: u64,
}

/// A round begins.
#[derive(Clone, Copy, PartialEq, Eq, ::prost::Message)]
pub struct Round {
    /// From 1.
    #[prost(uint32, tag = "1")]
    pub number: u32,
    /// The container is frozen: this is all.
    #[prost(bool, tag = "2")]
    pub last: bool,
}

/// All images of this round's tree were sent.
#[derive(Clone, Copy, PartialEq, Eq, ::prost::Message)]
pub struct TreeEnd {}

/// Where a target has pages: of all addresses from `start` up to `end`, those in `extents` and no others.
#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct Present {
    #[prost(message, required, tag = "1")]
    pub of: Target,
    #[prost(uint64, tag = "2")]
    pub start: u64,
    #[prost(uint64, tag = "3")]
    pub end: u64,
    /// Ascending. Where there are more than [`Present::MOST`], several messages divide the addresses among them.
    #[prost(message, repeated, tag = "4")]
    pub extents: Vec<Extent>,
}

impl Present {
    /// Extents that always fit into one message.
    pub const MOST: usize = 32768;
}

#[derive(Clone, Copy, PartialEq, Eq, ::prost::Message)]
pub struct Extent {
    #[prost(uint64, tag = "1")]
    pub vaddr: u64,
    #[prost(uint64, tag = "2")]
    pub pages: u64,
}

/// [`PagesOf`] in a control message.
#[derive(Clone, Copy, PartialEq, Eq, ::prost::Message)]
pub struct Target {
    #[prost(bool, tag = "1")]
    pub shmem: bool,
    #[prost(uint64, tag = "2")]
    pub id: u64,
}

impl From<PagesOf> for Target {
    fn from(of: PagesOf) -> Self {
        match of {
            PagesOf::Task(pid) => Target { shmem: false, id: pid.into() },
            PagesOf::Shmem(id) => Target { shmem: true, id },
        }
    }
}

impl TryFrom<Target> for PagesOf {
    type Error = Error;

    fn try_from(target: Target) -> Result<Self> {
        match target.id.try_into() {
            _ if target.shmem => Ok(PagesOf::Shmem(target.id)),
            Ok(pid) => Ok(PagesOf::Task(pid)),
            Err(_) => Err(Error::invalid(format!("a target with the pid {}", target.id))),
        }
    }
}

/// All of a round was sent.
#[derive(Clone, Copy, PartialEq, Eq, ::prost::Message)]
pub struct RoundEnd {
    #[prost(uint32, tag = "1")]
    pub number: u32,
}

/// All of a round has landed.
#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct RoundDone {
    #[prost(uint32, tag = "1")]
    pub number: u32,
    /// Of memory, as it lies there.
    #[prost(uint64, tag = "2")]
    pub bytes: u64,
    /// From the round's first message to its last page's landing.
    #[prost(uint64, tag = "3")]
    pub micros: u64,
    /// Pages that are said to be there and have not come, or not to stay: they are to be sent again.
    #[prost(message, repeated, tag = "4")]
    pub missing: Vec<Lack>,
}

impl RoundDone {
    /// Lacks that always fit into one message; the rest is asked for the next time.
    pub const MOST: usize = 16384;
}

#[derive(Clone, Copy, PartialEq, Eq, ::prost::Message)]
pub struct Lack {
    #[prost(message, required, tag = "1")]
    pub of: Target,
    #[prost(message, required, tag = "2")]
    pub extent: Extent,
}

/// The container is complete at the destination and stands still.
#[derive(Clone, Copy, PartialEq, Eq, ::prost::Message)]
pub struct Ready {}

/// The source has given up its right to run the container.
#[derive(Clone, Copy, PartialEq, Eq, ::prost::Message)]
pub struct Commit {}

/// The destination runs the container.
#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct Running {
    /// From the commit's arrival.
    #[prost(uint64, tag = "1")]
    pub micros: u64,
    /// What that time went into: a name and microseconds each.
    #[prost(message, repeated, tag = "2")]
    pub parts: Vec<Part>,
}

#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct Part {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(uint64, tag = "2")]
    pub micros: u64,
}

/// The source has ended its copy; nothing more will be said.
#[derive(Clone, Copy, PartialEq, Eq, ::prost::Message)]
pub struct Done {}

/// The migration does not take place. Only before the commit.
#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct Abort {
    #[prost(string, tag = "1")]
    pub reason: String,
}

/// Post-copy: asks for pages that a task of the destination waits for.
#[derive(Clone, Copy, PartialEq, Eq, ::prost::Message)]
pub struct Fetch {
    #[prost(message, required, tag = "1")]
    pub of: Target,
    #[prost(uint64, tag = "2")]
    pub vaddr: u64,
    #[prost(uint32, tag = "3")]
    pub pages: u32,
}

/// Asks what became of the migration that [`Hello::token`] names, and aborts it if it was not decided.
#[derive(Clone, Copy, PartialEq, Eq, ::prost::Message)]
pub struct Settle {}

/// What was decided at the destination, now and for ever.
#[derive(Clone, Copy, PartialEq, Eq, ::prost::Message)]
pub struct Verdict {
    /// It runs (or ran) there. Otherwise it never will.
    #[prost(bool, tag = "1")]
    pub running: bool,
}

/// I am alive.
#[derive(Clone, Copy, PartialEq, Eq, ::prost::Message)]
pub struct Keepalive {}

/// A part of a file, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    pub name: String,
    /// More parts follow.
    pub more: bool,
    pub bytes: Vec<u8>,
}

/// Puts images together from their parts.
#[derive(Debug)]
pub struct Images {
    whole: BTreeMap<String, Vec<u8>>,
    /// The image that is not complete yet.
    open: Option<(String, Vec<u8>)>,
    /// Bytes that may still come.
    room: usize,
}

impl Images {
    /// For images of `limit` bytes in all.
    pub fn new(limit: usize) -> Self {
        Images { whole: BTreeMap::new(), open: None, room: limit }
    }

    /// Takes one part.
    ///
    /// # Errors
    /// A part out of order, an image that was there before, and bytes above the limit.
    pub fn add(&mut self, part: Image) -> Result<()> {
        let (name, mut bytes) = match self.open.take() {
            Some((name, bytes)) if name == part.name => (name, bytes),
            Some((name, _)) => return Err(Error::invalid(format!("a part of {:?} inside of {name:?}", part.name))),
            None => (part.name, Vec::new()),
        };
        self.room = self.room.checked_sub(part.bytes.len()).ok_or_else(|| {
            let length = self.whole.values().map(Vec::len).sum::<usize>() + bytes.len() + part.bytes.len();
            Error::TooLong {
                what: "the images",
                length: length as u64,
                limit: (length - part.bytes.len() + self.room) as u64,
            }
        })?;
        bytes.extend_from_slice(&part.bytes);
        if part.more {
            self.open = Some((name, bytes));
            return Ok(());
        }
        match self.whole.entry(name) {
            Entry::Occupied(there) => Err(Error::invalid(format!("the image {:?} a second time", there.key()))),
            Entry::Vacant(place) => {
                place.insert(bytes);
                Ok(())
            }
        }
    }

    /// The complete images by name.
    ///
    /// # Errors
    /// An image that lacks its end.
    pub fn finish(self) -> Result<BTreeMap<String, Vec<u8>>> {
        match self.open {
            Some((name, _)) => Err(Error::invalid(format!("only a part of the image {name:?}"))),
            None => Ok(self.whole),
        }
    }
}

/// A control message.
pub trait Control: prost::Message + Default {
    const KIND: u16;
    const NAME: &'static str;

    /// The message if it is of this type.
    fn take(message: Message) -> Option<Self>;
}

/// Frames that are no control messages.
pub(super) mod raw {
    pub const IMAGE: u16 = 64;
    pub const PAGES: u16 = 65;
    pub const DISK: u16 = 66;
    pub const ENGINE: u16 = 67;
    pub const NETWORK: u16 = 68;
}

macro_rules! messages {
    ($($kind:literal $name:ident),* $(,)?) => {
        $(impl Control for $name {
            const KIND: u16 = $kind;
            const NAME: &'static str = stringify!($name);

            fn take(message: Message) -> Option<Self> {
                match message {
                    Message::$name(inner) => Some(inner),
                    _ => None,
                }
            }
        })*

        /// Everything that can be received.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Message {
            $($name($name),)*
            Image(Image),
            Pages(Pages),
            /// What the two ends of the disk say to each other.
            Disk(Vec<u8>),
            /// What the two ends' container engines say to each other.
            Engine(Vec<u8>),
            /// What the two ends of the network say to each other.
            Network(Vec<u8>),
        }

        impl Message {
            pub fn name(&self) -> &'static str {
                match self {
                    $(Message::$name(_) => $name::NAME,)*
                    Message::Image(_) => "Image",
                    Message::Pages(_) => "Pages",
                    Message::Disk(_) => "Disk",
                    Message::Engine(_) => "Engine",
                    Message::Network(_) => "Network",
                }
            }

            /// Reads control messages of type `kind`; None: there are none.
            pub(super) fn decoder(kind: u16) -> Option<fn(&[u8]) -> Result<Message>> {
                match kind {
                    $($kind => Some(|bytes| decode(bytes).map(Message::$name)),)*
                    _ => None,
                }
            }
        }
    };
}

messages! {
    1 Hello, 2 Offer, 3 Findings, 4 Accept, 5 Refuse, 6 Ping, 7 Pong, 8 DiskDone,
    9 Round, 10 TreeEnd, 11 Present, 12 RoundEnd, 13 RoundDone,
    14 Ready, 15 Commit, 16 Running, 17 Done, 18 Abort, 19 Fetch,
    20 Settle, 21 Verdict, 22 Keepalive,
}

impl Message {
    /// What the other end's engine says, which is due.
    ///
    /// # Errors
    /// As for [`Message::expect`].
    pub fn expect_engine(self) -> Result<Vec<u8>> {
        match self {
            Message::Engine(bytes) => Ok(bytes),
            Message::Abort(Abort { reason }) => Err(Error::Aborted { reason }),
            other => Err(Error::OutOfPhase { found: other.name(), expected: "Engine" }),
        }
    }

    /// The message that is due.
    ///
    /// # Errors
    /// [`Error::Aborted`] if the other end gives up instead, and [`Error::OutOfPhase`] for any other message.
    pub fn expect<M: Control>(self) -> Result<M> {
        let found = self.name();
        let gave_up = if let Message::Abort(abort) = &self { Some(abort.reason.clone()) } else { None };
        M::take(self).ok_or(match gave_up {
            Some(reason) => Error::Aborted { reason },
            None => Error::OutOfPhase { found, expected: M::NAME },
        })
    }
}

fn decode<M: Control>(bytes: &[u8]) -> Result<M> {
    let message = M::decode(bytes).map_err(|source| Error::Malformed { what: M::NAME, source })?;
    // prost passes over fields that it does not know; the sender has written no others.
    if message.encoded_len() != bytes.len() {
        return Err(Error::UnknownFields { what: M::NAME });
    }
    Ok(message)
}
