//! `lmrun.bin`: what a restore wants to know and CRIU's images have no place for. An image
//! directory without it (CRIU's own) restores too.

use super::sockets::SkUcredEntry;

/// [`LmrunEntry::version`] of this build.
pub const LMRUN_VERSION: u32 = 1;

/// `lmrun.bin`.
#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct LmrunEntry {
    /// See [`LMRUN_VERSION`].
    #[prost(uint32, required, tag = "1")]
    pub version: u32,
    #[prost(message, required, tag = "2")]
    pub host: LmrunHost,
    /// Names the dirty-page tracking that this image ends a round of. A child image may
    /// leave pages to this one only if it was made by the same tracking.
    #[prost(string, optional, tag = "3")]
    pub dirty_token: Option<String>,
    #[prost(message, repeated, tag = "4")]
    pub tasks: Vec<LmrunTask>,
    /// nftables table that holds the container's connections still.
    #[prost(string, optional, tag = "5")]
    pub network_lock: Option<String>,
    /// Digests of other files of the directory.
    #[prost(message, repeated, tag = "6")]
    pub digests: Vec<LmrunDigest>,
    #[prost(message, repeated, tag = "7")]
    pub sockets: Vec<LmrunSocket>,
}

/// The machine that the dump was made on.
#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct LmrunHost {
    /// `uname -r`.
    #[prost(string, required, tag = "1")]
    pub kernel_release: String,
    /// `uname -m`.
    #[prost(string, required, tag = "2")]
    pub machine: String,
    /// `model name` of /proc/cpuinfo.
    #[prost(string, optional, tag = "3")]
    pub cpu_model: Option<String>,
    /// XCR0: the components of the xsave areas.
    #[prost(uint64, optional, tag = "4")]
    pub xfeatures: Option<u64>,
    /// CLOCK_REALTIME of the dump, nanoseconds.
    #[prost(uint64, optional, tag = "5")]
    pub realtime: Option<u64>,
}

/// More about a process.
#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct LmrunTask {
    /// As in `pstree.img`.
    #[prost(uint32, required, tag = "1")]
    pub pid: u32,
    #[prost(message, repeated, tag = "2")]
    pub threads: Vec<LmrunThread>,
    /// MADV_GUARD_INSTALL, since Linux 6.13.
    #[prost(message, repeated, tag = "3")]
    pub guard_regions: Vec<LmrunRange>,
}

/// More about a thread.
#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct LmrunThread {
    #[prost(uint32, required, tag = "1")]
    pub tid: u32,
    /// The whole xsave area as PTRACE_GETREGSET(NT_X86_XSTATE) gives it.
    #[prost(bytes = "vec", optional, tag = "2")]
    pub xsave: Option<Vec<u8>>,
    /// sched_getaffinity(2): cpu n is bit n % 8 of byte n / 8.
    #[prost(bytes = "vec", optional, tag = "3")]
    pub affinity: Option<Vec<u8>>,
    /// /proc/PID/timerslack_ns.
    #[prost(uint64, optional, tag = "4")]
    pub timerslack: Option<u64>,
    /// ioprio_get(2).
    #[prost(uint32, optional, tag = "5")]
    pub io_priority: Option<u32>,
}

/// Addresses from `start` up to, not including, `end`.
#[derive(Clone, Copy, PartialEq, Eq, ::prost::Message)]
pub struct LmrunRange {
    #[prost(uint64, required, tag = "1")]
    pub start: u64,
    #[prost(uint64, required, tag = "2")]
    pub end: u64,
}

/// A file of the image directory and its digest.
#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct LmrunDigest {
    #[prost(string, required, tag = "1")]
    pub file: String,
    /// `algorithm:hex`.
    #[prost(string, required, tag = "2")]
    pub digest: String,
}

/// More about a socket.
#[derive(Clone, PartialEq, Eq, ::prost::Message)]
pub struct LmrunSocket {
    /// As in `inet_sk_entry` or `unix_sk_entry`.
    #[prost(uint32, required, tag = "1")]
    pub id: u32,
    /// Who owns the socket: SO_REUSEPORT shares a port only among sockets of one user.
    #[prost(uint32, required, tag = "2")]
    pub uid: u32,
    /// TCP_CONGESTION.
    #[prost(string, optional, tag = "3")]
    pub congestion: Option<String>,
    #[prost(message, repeated, tag = "4")]
    pub options: Vec<LmrunSockOpt>,
    /// SO_PEERCRED of a unix socket: who was on the other side as the connection was made; of a listening one its own.
    #[prost(message, optional, tag = "5")]
    pub peer: Option<SkUcredEntry>,
}

/// A socket option that is one int.
#[derive(Clone, Copy, PartialEq, Eq, ::prost::Message)]
pub struct LmrunSockOpt {
    #[prost(uint32, required, tag = "1")]
    pub level: u32,
    #[prost(uint32, required, tag = "2")]
    pub name: u32,
    #[prost(uint32, required, tag = "3")]
    pub value: u32,
}
