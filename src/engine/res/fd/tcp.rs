//! TCP sockets: what a process has set up. [`tcp_stream`](super::tcp_stream) has what goes through them.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use libc::{IPPROTO_IP, IPPROTO_IPV6, IPPROTO_TCP, SOL_SOCKET, c_int};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, Backlog, Shutdown, SockFlag, SockProtocol, SockType, listen, shutdown, socket};
use nix::unistd::{Uid, fchown};

use super::{address, sockopts};
use crate::engine::netlock::Connection;
use crate::image::records::files::FownEntry;
use crate::image::records::lmrun::LmrunSocket;
use crate::image::records::sockets::{InetSkEntry, SkOptsEntry, SkShutdown};
use crate::sys::sockopt;
use crate::sys::tcp::{self, state};

/// A socket that cannot be dumped or restored.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `what` completes "a socket ...".
    #[error("TCP socket {what}: lmrun cannot checkpoint it")]
    Unsupported { what: String },
    /// The image contradicts itself.
    #[error("TCP socket in the image: {0}")]
    Image(&'static str),
    #[error("{call}")]
    Call { call: &'static str, source: io::Error },
    #[error(transparent)]
    Option(#[from] sockopts::Error),
}

pub(super) type Result<T> = std::result::Result<T, Error>;

/// Names the call that failed.
pub(super) fn call<T, E: Into<io::Error>>(call: &'static str) -> impl FnOnce(std::result::Result<T, E>) -> Result<T> {
    move |result| result.map_err(|e| Error::Call { call, source: e.into() })
}

/// What must be done with a socket, by its state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// [`create_listening`].
    Listening,
    /// [`tcp_stream::create`](super::tcp_stream::create): both ends are known, one or both may have closed.
    Connected,
    /// [`tcp_stream::create_connecting`](super::tcp_stream::create_connecting): the peer has not answered yet.
    Connecting,
    /// [`create_unconnected`].
    Unconnected,
}

impl Kind {
    /// By the state in an [`InetSkEntry`].
    pub fn of(entry: &InetSkEntry) -> Result<Self> {
        match entry.state {
            state::LISTEN => Ok(Self::Listening),
            state::CLOSE => Ok(Self::Unconnected),
            state::SYN_SENT => Ok(Self::Connecting),
            state::ESTABLISHED
            | state::FIN_WAIT1
            | state::FIN_WAIT2
            | state::CLOSE_WAIT
            | state::LAST_ACK
            | state::CLOSING => Ok(Self::Connected),
            other => Err(Error::Unsupported { what: format!("in state {}", state::name(other)) }),
        }
    }

    /// Whether it has a peer that must be kept away while it is read: [`tcp_stream`](super::tcp_stream).
    pub fn has_peer(self) -> bool {
        matches!(self, Self::Connected | Self::Connecting)
    }
}

/// We have sent FIN, or are about to: it has the sequence number before `write_seq`.
pub(super) fn local_fin(state: u32) -> bool {
    matches!(state, state::FIN_WAIT1 | state::FIN_WAIT2 | state::CLOSING | state::LAST_ACK)
}

/// The peer has not acknowledged our FIN.
pub(super) fn local_fin_unacked(state: u32) -> bool {
    local_fin(state) && state != state::FIN_WAIT2
}

/// The peer has sent FIN: it has the sequence number before `rcv_nxt`.
pub(super) fn remote_fin(state: u32) -> bool {
    matches!(state, state::CLOSE_WAIT | state::CLOSING | state::LAST_ACK)
}

/// A socket without its queues.
#[derive(Debug, Clone, PartialEq)]
pub struct Facts {
    pub kind: Kind,
    /// `id`, `flags`, `fown` and `ns_id` are the caller's to fill in.
    pub entry: InetSkEntry,
    /// `id` is the caller's to fill in.
    pub more: LmrunSocket,
    /// Connections that wait for accept(2); they cannot be dumped, as nobody has a descriptor of them.
    pub pending: u32,
}

/// Reads a socket by a duplicate of its descriptor. Its repair mode must be off.
pub fn facts(fd: BorrowedFd<'_>) -> Result<Facts> {
    let int = |name| call("getsockopt")(sockopt::get_int(fd, SOL_SOCKET, name));
    let (family, protocol) = (int(libc::SO_DOMAIN)?, int(libc::SO_PROTOCOL)?);
    if !matches!(family, libc::AF_INET | libc::AF_INET6) || protocol != IPPROTO_TCP {
        return Err(Error::Unsupported { what: format!("of family {family}, protocol {protocol}") });
    }
    if let Ok(ulp) = sockopt::get_name(fd, IPPROTO_TCP, libc::TCP_ULP)
        && !ulp.is_empty()
    {
        return Err(Error::Unsupported { what: format!("with upper layer protocol {ulp:?}") });
    }
    let stat = call("fstat")(nix::sys::stat::fstat(fd))?;
    let info = call("TCP_INFO")(tcp::info(fd))?;
    let opts = sockopts::dump(fd)?;
    let mut entry = InetSkEntry {
        id: 0,
        ino: stat.st_ino as u32,
        family: family as u32,
        r#type: libc::SOCK_STREAM as u32,
        proto: IPPROTO_TCP as u32,
        state: info.state,
        src_port: 0,
        dst_port: 0,
        flags: 0,
        backlog: 0,
        src_addr: Vec::new(),
        dst_addr: Vec::new(),
        fown: FownEntry::default(),
        opts,
        v6only: None,
        ip_opts: Some(sockopts::dump_ip(fd)?),
        ifname: None,
        ns_id: None,
        shutdown: None,
        tcp_opts: Some(sockopts::dump_tcp(fd)?),
    };
    let kind = Kind::of(&entry)?;
    let local = call("getsockname")(address::sock_name(fd))?;
    (entry.src_addr, entry.src_port) = (address::words(local), local.port().into());
    let remote = match kind {
        Kind::Connected | Kind::Connecting => call("SO_PEERNAME")(address::peer_name(fd))?,
        Kind::Listening | Kind::Unconnected => address::unspecified(local),
    };
    (entry.dst_addr, entry.dst_port) = (address::words(remote), remote.port().into());
    if address::scope(local) != 0 {
        let name = sockopt::interface_name(fd, address::scope(local));
        entry.ifname = Some(call("SIOCGIFNAME")(name)?);
    }
    if family == libc::AF_INET6 {
        let only = call("IPV6_V6ONLY")(sockopt::get_int(fd, IPPROTO_IPV6, libc::IPV6_V6ONLY))?;
        entry.v6only = Some(only != 0);
    }
    match kind {
        Kind::Listening => entry.backlog = info.sacked,
        Kind::Unconnected => refuse_left_over(call("SIOCINQ")(sockopt::inq(fd))?)?,
        Kind::Connected | Kind::Connecting => {}
    }
    entry.shutdown = shut_down(fd, &entry)?.map(|s| s as i32);
    Ok(Facts {
        kind,
        entry,
        more: sockopts::dump_more(fd, stat.st_uid)?,
        pending: if kind == Kind::Listening { info.unacked } else { 0 },
    })
}

/// Which directions the process has shut down, as far as the state does not tell.
pub(super) fn shut_down(fd: BorrowedFd<'_>, entry: &InetSkEntry) -> Result<Option<SkShutdown>> {
    let hung_up = call("poll")(sockopt::read_shut_down(fd))?;
    let write = local_fin(entry.state) || entry.state == state::CLOSE && hung_up;
    let read = hung_up && !remote_fin(entry.state);
    Ok(match (read, write) {
        (false, false) => None,
        (true, false) => Some(SkShutdown::Read),
        (false, true) => Some(SkShutdown::Write),
        (true, true) => Some(SkShutdown::Both),
    })
}

/// The two ends of a connected socket, for the network lock.
pub fn connection(entry: &InetSkEntry) -> Result<Connection> {
    Ok(Connection {
        local: address::local(entry).ok_or(Error::Image("address"))?,
        remote: address::remote(entry).ok_or(Error::Image("address"))?,
    })
}

/// Bytes that nobody has read yet have no connection any more with which they could be restored.
pub(super) fn refuse_left_over(inq: usize) -> Result<()> {
    if inq == 0 { Ok(()) } else { Err(Error::Unsupported { what: format!("closed with {inq} unread bytes") }) }
}

/// A new socket, TCP or UDP, with the options that must be there before it has an address.
pub(super) fn fresh(entry: &InetSkEntry, more: Option<&LmrunSocket>) -> Result<OwnedFd> {
    let family = match entry.family as c_int {
        libc::AF_INET => AddressFamily::Inet,
        libc::AF_INET6 => AddressFamily::Inet6,
        _ => return Err(Error::Image("address family")),
    };
    let (kind, protocol) = match entry.proto as c_int {
        libc::IPPROTO_UDP => (SockType::Datagram, SockProtocol::Udp),
        _ => (SockType::Stream, SockProtocol::Tcp),
    };
    let owned = call("socket")(socket(family, kind, SockFlag::SOCK_CLOEXEC, protocol))?;
    let fd = owned.as_fd();
    if let Some(more) = more {
        call("fchown")(fchown(fd, Some(Uid::from_raw(more.uid)), None))?;
        sockopts::restore_more_before_bind(fd, more)?;
    }
    if let Some(only) = entry.v6only {
        sockopts::set(fd, IPPROTO_IPV6, libc::IPV6_V6ONLY, only.into())?;
    }
    if let Some(ip) = &entry.ip_opts {
        sockopts::set(fd, IPPROTO_IP, libc::IP_FREEBIND, ip.freebind.unwrap_or(false).into())?;
    }
    sockopts::restore_before_bind(fd, &entry.opts)?;
    Ok(owned)
}

/// Makes a listening socket, in the network namespace of the calling thread.
pub fn create_listening(entry: &InetSkEntry, more: Option<&LmrunSocket>) -> Result<OwnedFd> {
    let owned = fresh(entry, more)?;
    let fd = owned.as_fd();
    // The port is in use if the connections that it has accepted were made before.
    sockopts::set(fd, SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    call("bind")(address::bind(fd, addresses(fd, entry)?.local))?;
    let backlog = Backlog::new(entry.backlog.min(i32::MAX as u32) as i32);
    call("listen")(listen(&owned, backlog.unwrap_or(Backlog::MAXCONN)))?;
    finish(fd, entry, more)?;
    Ok(owned)
}

/// Makes a socket that is not connected, in the network namespace of the calling thread.
pub fn create_unconnected(entry: &InetSkEntry, more: Option<&LmrunSocket>) -> Result<OwnedFd> {
    let owned = fresh(entry, more)?;
    let fd = owned.as_fd();
    let local = addresses(fd, entry)?.local;
    // What was connected once and has ended keeps its name, but not its port.
    let ended = entry.shutdown == Some(SkShutdown::Both as i32);
    if !ended && (local.port() != 0 || !local.ip().is_unspecified()) {
        sockopts::set(fd, SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
        call("bind")(address::bind(fd, local))?;
    }
    restore_shutdown(fd, entry)?;
    finish(fd, entry, more)?;
    Ok(owned)
}

/// Sets the options that may be set at any time, but for the buffers and SO_REUSEADDR.
pub(super) fn restore_options(fd: BorrowedFd<'_>, entry: &InetSkEntry, more: Option<&LmrunSocket>) -> Result<()> {
    if let Some(ip) = &entry.ip_opts {
        sockopts::restore_ip(fd, ip)?;
    }
    // After IP_TOS, which changes SO_PRIORITY.
    sockopts::restore(fd, &entry.opts)?;
    if let Some(tcp) = &entry.tcp_opts {
        sockopts::restore_tcp(fd, tcp)?;
    }
    if let Some(more) = more {
        sockopts::restore_more(fd, more)?;
    }
    Ok(())
}

/// The end of what has no connection.
pub(super) fn finish(fd: BorrowedFd<'_>, entry: &InetSkEntry, more: Option<&LmrunSocket>) -> Result<()> {
    restore_options(fd, entry, more)?;
    sockopts::restore_buffer_locks(fd, &entry.opts)?;
    restore_reuse(fd, &entry.opts)
}

pub(super) fn restore_reuse(fd: BorrowedFd<'_>, opts: &SkOptsEntry) -> Result<()> {
    let reuse = opts.reuseaddr.unwrap_or(false).into();
    Ok(sockopts::set(fd, SOL_SOCKET, libc::SO_REUSEADDR, reuse)?)
}

/// The addresses of a record with the scope that they have on this host.
pub(super) fn addresses(fd: BorrowedFd<'_>, entry: &InetSkEntry) -> Result<Connection> {
    let Connection { local, remote } = connection(entry)?;
    let scope = match &entry.ifname {
        Some(name) => call("SIOCGIFINDEX")(sockopt::interface_index(fd, name))?,
        None => 0,
    };
    Ok(Connection { local: address::scoped(local, scope), remote: address::scoped(remote, scope) })
}

pub(super) fn restore_shutdown(fd: BorrowedFd<'_>, entry: &InetSkEntry) -> Result<()> {
    let how = match entry.shutdown.map(SkShutdown::try_from) {
        None | Some(Ok(SkShutdown::None)) if local_fin(entry.state) => Shutdown::Write,
        None | Some(Ok(SkShutdown::None)) => return Ok(()),
        Some(Ok(SkShutdown::Read)) if !local_fin(entry.state) => Shutdown::Read,
        Some(Ok(SkShutdown::Write)) => Shutdown::Write,
        Some(Ok(SkShutdown::Read | SkShutdown::Both)) => Shutdown::Both,
        Some(Err(_)) => return Err(Error::Image("shutdown")),
    };
    match shutdown(fd.as_raw_fd(), how) {
        // Said of a socket that is not connected, and done all the same: net/ipv4/af_inet.c.
        Err(Errno::ENOTCONN) if entry.state == state::CLOSE => Ok(()),
        result => call("shutdown")(result),
    }
}
