//! TCP sockets: listening, connected (half-closed too), and not connected.
//!
//! A dump has two parts. [`facts`] reads what the process has set up and changes nothing; it may run
//! long before the end. [`read_stream`] reads what the peers change all the time, in repair mode and under the network
//! lock: the later and the shorter, the better. A restore has two parts as well: [`create_established`] makes a socket that
//! is silent, [`Silent::go_live`] lets it speak.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use libc::{IPPROTO_IP, IPPROTO_IPV6, IPPROTO_TCP, SOL_SOCKET, c_int};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, MsgFlags, Shutdown, SockFlag, SockType, listen, recv, send, shutdown,
    socket,
};
use nix::unistd::{Uid, fchown};

use super::{address, sockopts};
use crate::engine::netlock::Connection;
use crate::image::records::files::FownEntry;
use crate::image::records::lmrun::LmrunSocket;
use crate::image::records::sockets::{InetSkEntry, SkOptsEntry, SkShutdown, TcpStreamEntry};
use crate::sys::segment::{RawTcp, Segment};
use crate::sys::sockopt;
use crate::sys::tcp::{self, Queue, RepairOption, RepairWindow, state};

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
    Call {
        call: &'static str,
        source: io::Error,
    },
    #[error(transparent)]
    Option(#[from] sockopts::Error),
}

type Result<T> = std::result::Result<T, Error>;

/// Names the call that failed.
fn call<T, E: Into<io::Error>>(
    call: &'static str,
) -> impl FnOnce(std::result::Result<T, E>) -> Result<T> {
    move |result| {
        result.map_err(|e| Error::Call {
            call,
            source: e.into(),
        })
    }
}

/// What must be done with a socket, by its state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// [`create_listening`].
    Listening,
    /// [`read_stream`] and [`create_established`]: both ends are known, one or both may have closed.
    Connected,
    /// [`create_unconnected`].
    Unconnected,
}

impl Kind {
    /// By the state in an [`InetSkEntry`].
    pub fn of(entry: &InetSkEntry) -> Result<Self> {
        match entry.state {
            state::LISTEN => Ok(Self::Listening),
            state::CLOSE => Ok(Self::Unconnected),
            state::ESTABLISHED
            | state::FIN_WAIT1
            | state::FIN_WAIT2
            | state::CLOSE_WAIT
            | state::LAST_ACK
            | state::CLOSING => Ok(Self::Connected),
            other => Err(Error::Unsupported {
                what: format!("in state {}", state::name(other)),
            }),
        }
    }
}

/// We have sent FIN, or are about to: it has the sequence number before `write_seq`.
fn local_fin(state: u32) -> bool {
    matches!(
        state,
        state::FIN_WAIT1 | state::FIN_WAIT2 | state::CLOSING | state::LAST_ACK
    )
}

/// The peer has not acknowledged our FIN.
fn local_fin_unacked(state: u32) -> bool {
    local_fin(state) && state != state::FIN_WAIT2
}

/// The peer has sent FIN: it has the sequence number before `rcv_nxt`.
fn remote_fin(state: u32) -> bool {
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
        return Err(Error::Unsupported {
            what: format!("of family {family}, protocol {protocol}"),
        });
    }
    if let Ok(ulp) = sockopt::get_name(fd, IPPROTO_TCP, libc::TCP_ULP)
        && !ulp.is_empty()
    {
        return Err(Error::Unsupported {
            what: format!("with upper layer protocol {ulp:?}"),
        });
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
        Kind::Connected => call("getpeername")(address::peer_name(fd))?,
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
        Kind::Connected => {}
    }
    entry.shutdown = shut_down(fd, &entry)?.map(|s| s as i32);
    Ok(Facts {
        kind,
        entry,
        more: sockopts::dump_more(fd, stat.st_uid)?,
        pending: if kind == Kind::Listening {
            info.unacked
        } else {
            0
        },
    })
}

/// Which directions the process has shut down, as far as the state does not tell.
fn shut_down(fd: BorrowedFd<'_>, entry: &InetSkEntry) -> Result<Option<SkShutdown>> {
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

/// The queues of a connection. Neither counts a FIN.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stream {
    pub entry: TcpStreamEntry,
    pub inq: Vec<u8>,
    pub outq: Vec<u8>,
}

/// Makes the socket silent and readable. A `guard` should know of it before.
pub fn enter_repair(fd: BorrowedFd<'_>) -> Result<()> {
    call("TCP_REPAIR")(tcp::repair_on(fd))
}

/// Lets the socket go on as before; `opts` are what [`facts`] has read.
pub fn leave_repair(fd: BorrowedFd<'_>, opts: &SkOptsEntry) -> Result<()> {
    call("TCP_REPAIR")(tcp::repair_off(fd))?;
    restore_reuse(fd, opts)
}

/// Reads the queues of a connected socket in repair mode. Its segments must be locked out; one that slipped in
/// before is waited for.
pub fn read_stream(fd: BorrowedFd<'_>) -> Result<Stream> {
    for _ in 0..READ_TRIES {
        let before = Lengths::read(fd)?;
        let info = call("TCP_INFO")(tcp::info(fd))?;
        let stream = read_queues(fd, before, info);
        if Lengths::read(fd)? == before {
            return stream;
        }
    }
    Err(Error::Call { call: "reading the queues", source: io::ErrorKind::WouldBlock.into() })
}

/// Bytes that nobody has read yet have no connection any more with which they could be restored.
fn refuse_left_over(inq: usize) -> Result<()> {
    if inq == 0 {
        Ok(())
    } else {
        Err(Error::Unsupported {
            what: format!("closed with {inq} unread bytes"),
        })
    }
}

const READ_TRIES: u32 = 8;

/// Lengths of the queues, which change whenever a segment arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Lengths {
    inq: usize,
    outq: usize,
    unsent: usize,
}

impl Lengths {
    fn read(fd: BorrowedFd<'_>) -> Result<Self> {
        Ok(Self {
            inq: call("SIOCINQ")(sockopt::inq(fd))?,
            outq: call("SIOCOUTQ")(sockopt::outq(fd))?,
            unsent: call("SIOCOUTQNSD")(sockopt::outq_unsent(fd))?,
        })
    }
}

fn read_queues(fd: BorrowedFd<'_>, lengths: Lengths, info: tcp::Info) -> Result<Stream> {
    let fin = usize::from(local_fin_unacked(info.state));
    let outq_len = lengths.outq.saturating_sub(fin);
    let unsent = lengths.unsent.saturating_sub(fin);
    // recv(2) would begin there.
    let peek_off = sockopt::get_int(fd, SOL_SOCKET, libc::SO_PEEK_OFF).unwrap_or(-1);
    if peek_off >= 0 {
        call("SO_PEEK_OFF")(sockopt::set_int(fd, SOL_SOCKET, libc::SO_PEEK_OFF, -1))?;
    }
    let (inq_seq, inq) = read_queue(fd, Queue::Recv, lengths.inq)?;
    if peek_off >= 0 {
        call("SO_PEEK_OFF")(sockopt::set_int(
            fd,
            SOL_SOCKET,
            libc::SO_PEEK_OFF,
            peek_off,
        ))?;
    }
    let (outq_seq, outq) = read_queue(fd, Queue::Send, outq_len)?;
    let window = call("TCP_REPAIR_WINDOW")(tcp::window(fd))?;
    let timestamps = info.options & tcp::OPT_TIMESTAMPS != 0;
    let entry = TcpStreamEntry {
        inq_len: inq.len() as u32,
        inq_seq,
        outq_len: outq.len() as u32,
        outq_seq,
        opt_mask: info.options,
        snd_wscale: info.snd_wscale,
        mss_clamp: call("TCP_MAXSEG")(tcp::max_segment(fd))?,
        rcv_wscale: Some(info.rcv_wscale),
        timestamp: if timestamps {
            Some(call("TCP_TIMESTAMP")(tcp::timestamp(fd))?)
        } else {
            None
        },
        cork: None,
        nodelay: None,
        unsq_len: Some(unsent as u32),
        snd_wl1: Some(window.snd_wl1),
        snd_wnd: Some(window.snd_wnd),
        max_window: Some(window.max_window),
        rcv_wnd: Some(window.rcv_wnd),
        rcv_wup: Some(window.rcv_wup),
    };
    Ok(Stream { entry, inq, outq })
}

/// The sequence number behind a queue, and its `len` bytes.
fn read_queue(fd: BorrowedFd<'_>, queue: Queue, len: usize) -> Result<(u32, Vec<u8>)> {
    call("TCP_REPAIR_QUEUE")(tcp::select_queue(fd, queue))?;
    let seq = call("TCP_QUEUE_SEQ")(tcp::queue_seq(fd))?;
    let mut bytes = vec![0; len];
    if len > 0 {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        let got = call("recv of a queue")(recv(fd.as_raw_fd(), &mut bytes, flags))?;
        if got != len {
            return Err(Error::Call {
                call: "recv of a queue",
                source: io::ErrorKind::UnexpectedEof.into(),
            });
        }
    }
    call("TCP_REPAIR_QUEUE")(tcp::select_queue(fd, Queue::None))?;
    Ok((seq, bytes))
}

/// A new socket with the options that must be there before it has an address.
fn fresh(entry: &InetSkEntry, more: Option<&LmrunSocket>) -> Result<OwnedFd> {
    let family = match entry.family as c_int {
        libc::AF_INET => AddressFamily::Inet,
        libc::AF_INET6 => AddressFamily::Inet6,
        _ => return Err(Error::Image("address family")),
    };
    let owned = call("socket")(socket(
        family,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    ))?;
    let fd = owned.as_fd();
    if let Some(more) = more {
        call("fchown")(fchown(fd, Some(Uid::from_raw(more.uid)), None))?;
        sockopts::restore_more_before_bind(fd, more)?;
    }
    if let Some(only) = entry.v6only {
        sockopts::set(fd, IPPROTO_IPV6, libc::IPV6_V6ONLY, only.into())?;
    }
    if let Some(ip) = &entry.ip_opts {
        sockopts::set(
            fd,
            IPPROTO_IP,
            libc::IP_FREEBIND,
            ip.freebind.unwrap_or(false).into(),
        )?;
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
    finish_silent(fd, entry, more)?;
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
    finish_silent(fd, entry, more)?;
    Ok(owned)
}

/// Sets the options that may be set at any time, but for the buffers and SO_REUSEADDR.
fn restore_options(
    fd: BorrowedFd<'_>,
    entry: &InetSkEntry,
    more: Option<&LmrunSocket>,
) -> Result<()> {
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
fn finish_silent(
    fd: BorrowedFd<'_>,
    entry: &InetSkEntry,
    more: Option<&LmrunSocket>,
) -> Result<()> {
    restore_options(fd, entry, more)?;
    sockopts::restore_buffer_locks(fd, &entry.opts)?;
    restore_reuse(fd, &entry.opts)
}

fn restore_reuse(fd: BorrowedFd<'_>, opts: &SkOptsEntry) -> Result<()> {
    let reuse = opts.reuseaddr.unwrap_or(false).into();
    Ok(sockopts::set(fd, SOL_SOCKET, libc::SO_REUSEADDR, reuse)?)
}

/// The addresses of a record with the scope that they have on this host.
fn addresses(fd: BorrowedFd<'_>, entry: &InetSkEntry) -> Result<Connection> {
    let Connection { local, remote } = connection(entry)?;
    let scope = match &entry.ifname {
        Some(name) => call("SIOCGIFINDEX")(sockopt::interface_index(fd, name))?,
        None => 0,
    };
    Ok(Connection {
        local: address::scoped(local, scope),
        remote: address::scoped(remote, scope),
    })
}

/// Makes a connected socket in repair mode, in the network namespace of the calling thread. Its receive queue is full,
/// its send queue is empty until [`Silent::go_live`], so that no timer runs and nothing is sent.
pub fn create_established(
    entry: &InetSkEntry,
    more: Option<&LmrunSocket>,
    stream: Stream,
) -> Result<Silent> {
    let owned = fresh(entry, more)?;
    let fd = owned.as_fd();
    let tcp = &stream.entry;
    let unsent = tcp.unsq_len.unwrap_or(0) as usize;
    if stream.inq.len() != tcp.inq_len as usize || stream.outq.len() != tcp.outq_len as usize {
        return Err(Error::Image("length of a queue"));
    }
    if unsent > stream.outq.len()
        || tcp.snd_wscale > 14
        || tcp.rcv_wscale.is_some_and(|scale| scale > 14)
    {
        return Err(Error::Image("state of a connection"));
    }
    // The FINs come later, and by themselves.
    let write_seq = tcp.outq_seq.wrapping_sub(local_fin(entry.state).into());
    let rcv_nxt = tcp.inq_seq.wrapping_sub(remote_fin(entry.state).into());
    // Repair mode also gives the port whoever else uses it; SO_REUSEADDR would take that away again.
    enter_repair(fd)?;
    sockopts::restore_buffers(fd, &entry.opts, 0, stream.inq.len())?;
    for (queue, seq, len) in [
        (Queue::Send, write_seq, stream.outq.len()),
        (Queue::Recv, rcv_nxt, stream.inq.len()),
    ] {
        call("TCP_REPAIR_QUEUE")(tcp::select_queue(fd, queue))?;
        call("TCP_QUEUE_SEQ")(tcp::set_queue_seq(fd, seq.wrapping_sub(len as u32)))?;
    }
    let Connection { local, remote } = addresses(fd, entry)?;
    call("bind")(address::bind(fd, local))?;
    // connect(2) computes the size of our segments from it, and RepairOption::Mss comes too late for that.
    call("TCP_MAXSEG")(tcp::set_max_segment(fd, tcp.mss_clamp))?;
    call("connect")(address::connect(fd, remote))?;
    call("TCP_MAXSEG")(tcp::set_max_segment(fd, 0))?;
    call("TCP_REPAIR_OPTIONS")(tcp::set_repair_options(fd, &repair_options(tcp)))?;
    if let Some(timestamp) = tcp.timestamp {
        // Not before the last one that the peer has seen, though the clock counts whole milliseconds.
        call("TCP_TIMESTAMP")(tcp::set_timestamp(fd, timestamp.wrapping_add(2)))?;
    }
    fill_queue(fd, Queue::Recv, &stream.inq)?;
    if let Some(window) = repair_window(tcp, rcv_nxt) {
        call("TCP_REPAIR_WINDOW")(tcp::set_window(fd, &window))?;
    }
    sockopts::restore_buffers(fd, &entry.opts, stream.outq.len(), 0)?;
    restore_options(fd, entry, more)?;
    let ack = Segment {
        from: local,
        to: remote,
        seq: write_seq.wrapping_sub(unsent as u32),
        ack: tcp.inq_seq,
        window: announced(tcp.rcv_wnd, tcp.rcv_wscale),
        fin: false,
        timestamp: None,
    };
    let fin = Segment {
        from: remote,
        to: local,
        seq: rcv_nxt,
        ack: write_seq.wrapping_sub(stream.outq.len() as u32),
        window: announced(tcp.snd_wnd, Some(tcp.snd_wscale)),
        fin: true,
        timestamp: None,
    };
    Ok(Silent {
        owned,
        entry: entry.clone(),
        outq: stream.outq,
        unsent,
        timestamps: tcp.timestamp.is_some(),
        ack,
        fin,
    })
}

fn repair_options(tcp: &TcpStreamEntry) -> Vec<RepairOption> {
    let mut options = vec![RepairOption::Mss(tcp.mss_clamp)];
    if tcp.opt_mask & tcp::OPT_WSCALE != 0 {
        options.push(RepairOption::WindowScale {
            snd: tcp.snd_wscale,
            rcv: tcp.rcv_wscale.unwrap_or(0),
        });
    }
    if tcp.opt_mask & tcp::OPT_SACK != 0 {
        options.push(RepairOption::SackPermitted);
    }
    if tcp.opt_mask & tcp::OPT_TIMESTAMPS != 0 {
        options.push(RepairOption::Timestamps);
    }
    options
}

/// None if the image has no windows (CRIU on old kernels).
fn repair_window(tcp: &TcpStreamEntry, rcv_nxt: u32) -> Option<RepairWindow> {
    let rcv_wup = tcp.rcv_wup?;
    // The kernel wants it not after rcv_nxt, which does not count the FIN yet.
    let ahead = rcv_wup.wrapping_sub(rcv_nxt) as i32 > 0;
    Some(RepairWindow {
        snd_wl1: tcp.snd_wl1?,
        snd_wnd: tcp.snd_wnd?,
        max_window: tcp.max_window?,
        rcv_wnd: tcp.rcv_wnd?,
        rcv_wup: if ahead { rcv_nxt } else { rcv_wup },
    })
}

/// A window as it stands in a header.
fn announced(window: Option<u32>, scale: Option<u32>) -> u16 {
    (window.unwrap_or(0) >> scale.unwrap_or(0)).min(u16::MAX.into()) as u16
}

/// Puts bytes into a queue of a socket in repair mode: those of the send queue count as sent.
fn fill_queue(fd: BorrowedFd<'_>, queue: Queue, mut bytes: &[u8]) -> Result<()> {
    call("TCP_REPAIR_QUEUE")(tcp::select_queue(fd, queue))?;
    while !bytes.is_empty() {
        let sent = call("send into a queue")(send(fd.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT))?;
        bytes = &bytes[sent..];
    }
    call("TCP_REPAIR_QUEUE")(tcp::select_queue(fd, Queue::None))
}

/// A restored connection that does not speak yet. Dropped, it ends without a word to the peer.
#[derive(Debug)]
#[must_use = "the connection ends when this is dropped"]
pub struct Silent {
    owned: OwnedFd,
    entry: InetSkEntry,
    outq: Vec<u8>,
    /// How many bytes at the end of `outq` were never sent.
    unsent: usize,
    timestamps: bool,
    ack: Segment,
    fin: Segment,
}

/// How long a FIN may take from this host to itself.
const FIN_PATIENCE: Duration = Duration::from_millis(500);

impl Silent {
    /// The socket, to be given to the process that will own it.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.owned.as_fd()
    }

    /// Lets the connection go on. The peer's segments must reach this namespace and no lock be in force.
    /// `raw` belongs to the same namespace.
    pub fn go_live(self, raw: &RawTcp) -> Result<OwnedFd> {
        let Self {
            owned,
            entry,
            outq,
            unsent,
            timestamps,
            mut ack,
            fin,
        } = self;
        let fd = owned.as_fd();
        let (sent, unsent) = outq.split_at(outq.len() - unsent);
        fill_queue(fd, Queue::Send, sent)?;
        // Sends a window probe, which makes the peer say what it has received.
        leave_repair(fd, &entry.opts)?;
        // The probe does not acknowledge anything; a peer may wait for an acknowledgement that was due.
        if timestamps {
            ack.timestamp = Some(call("TCP_TIMESTAMP")(tcp::timestamp(fd))?);
        }
        call("raw ACK")(raw.send(&ack))?;
        // In repair mode the kernel takes nothing that it is to send itself.
        let mut rest = unsent;
        while !rest.is_empty() {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            let sent = call("send of unsent data")(send(fd.as_raw_fd(), rest, flags))?;
            rest = &rest[sent..];
        }
        if entry.state == state::CLOSING {
            restore_shutdown(fd, &entry)?;
            receive_fin(fd, raw, &fin)?;
        } else if remote_fin(entry.state) {
            receive_fin(fd, raw, &fin)?;
            restore_shutdown(fd, &entry)?;
        } else {
            restore_shutdown(fd, &entry)?;
        }
        sockopts::restore_buffers(fd, &entry.opts, 0, 0)?;
        sockopts::restore_buffer_locks(fd, &entry.opts)?;
        Ok(owned)
    }
}

/// Lets the socket receive the peer's FIN once more, and waits until it has.
fn receive_fin(fd: BorrowedFd<'_>, raw: &RawTcp, fin: &Segment) -> Result<()> {
    let start = Instant::now();
    call("raw FIN")(raw.send(fin))?;
    // CLOSE: the peer has had our FIN in the meantime, and all is over.
    let received = |state| remote_fin(state) || state == state::CLOSE;
    while !received(call("TCP_INFO")(tcp::info(fd))?.state) {
        if start.elapsed() > FIN_PATIENCE {
            return Err(Error::Call {
                call: "FIN",
                source: io::ErrorKind::TimedOut.into(),
            });
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    Ok(())
}

fn restore_shutdown(fd: BorrowedFd<'_>, entry: &InetSkEntry) -> Result<()> {
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
