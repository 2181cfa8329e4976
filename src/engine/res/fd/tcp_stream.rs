//! TCP connections: what goes through them, and how they come to speak again.
//!
//! What peers change all the time is read in repair mode and under the network lock: the later and the shorter, the
//! better. A restored connection is [`Silent`] until all is ready, and then lets its peer know.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use libc::{IPPROTO_TCP, SOL_SOCKET};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{MsgFlags, recv, send};

use super::tcp::{
    Error, Result, addresses, call, finish, fresh, local_fin, local_fin_unacked, refuse_left_over, remote_fin,
    restore_options, restore_reuse, restore_shutdown, shut_down,
};
use super::{address, sockopts};
use crate::engine::netlock::Connection;
use crate::image::records::lmrun::LmrunSocket;
use crate::image::records::sockets::{InetSkEntry, TcpStreamEntry};
use crate::sys::segment::{RawTcp, Segment};
use crate::sys::sockopt;
use crate::sys::tcp::{self, Queue, RepairOption, RepairWindow, state};

/// The queues of a connection. Neither counts a FIN.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stream {
    pub entry: TcpStreamEntry,
    pub inq: Vec<u8>,
    pub outq: Vec<u8>,
}

/// Makes the socket silent: whatever becomes of it, its peer does not learn of it. A `guard` should know of it before.
pub fn silence(fd: BorrowedFd<'_>) -> Result<()> {
    call("TCP_REPAIR")(tcp::repair_on(fd))
}

/// Reads the queues of a socket and brings `entry` up to date: its peer may have answered, closed or reset it since
/// [`facts`](super::tcp::facts). None if there is no connection, not yet or no more; `entry` says which.
///
/// The connection's segments must be locked out; one that slipped in before is waited for. The socket is in repair mode
/// for some 20 us, in which its own process must not touch it, and a `guard` should know of it before.
pub fn read(fd: BorrowedFd<'_>, entry: &mut InetSkEntry) -> Result<Option<Stream>> {
    silence(fd)?;
    let stream = read_silent(fd, entry);
    call("TCP_REPAIR")(tcp::repair_off_quietly(fd))?;
    restore_reuse(fd, &entry.opts)?;
    stream
}

fn read_silent(fd: BorrowedFd<'_>, entry: &mut InetSkEntry) -> Result<Option<Stream>> {
    for _ in 0..READ_TRIES {
        let before = Lengths::read(fd)?;
        let info = call("TCP_INFO")(tcp::info(fd))?;
        entry.state = info.state;
        entry.shutdown = shut_down(fd, entry)?.map(|s| s as i32);
        let stream = match info.state {
            state::CLOSE => refuse_left_over(before.inq).map(|()| None),
            state::SYN_SENT => Ok(None),
            _ => read_queues(fd, before, info).map(Some),
        };
        if Lengths::read(fd)? == before && call("TCP_INFO")(tcp::info(fd))?.state == info.state {
            return stream;
        }
    }
    Err(Error::Call { call: "reading the queues", source: io::ErrorKind::WouldBlock.into() })
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
        call("SO_PEEK_OFF")(sockopt::set_int(fd, SOL_SOCKET, libc::SO_PEEK_OFF, peek_off))?;
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
        timestamp: if timestamps { Some(call("TCP_TIMESTAMP")(tcp::timestamp(fd))?) } else { None },
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
            return Err(Error::Call { call: "recv of a queue", source: io::ErrorKind::UnexpectedEof.into() });
        }
    }
    call("TCP_REPAIR_QUEUE")(tcp::select_queue(fd, Queue::None))?;
    Ok((seq, bytes))
}

/// Makes a connected socket in repair mode, in the network namespace of the calling thread. Its receive queue is full,
/// its send queue is empty until [`Silent::go_live`], so that no timer runs and nothing is sent.
pub fn create(entry: &InetSkEntry, more: Option<&LmrunSocket>, stream: Stream) -> Result<Silent> {
    let owned = fresh(entry, more)?;
    let fd = owned.as_fd();
    let tcp = &stream.entry;
    let unsent = tcp.unsq_len.unwrap_or(0) as usize;
    if stream.inq.len() != tcp.inq_len as usize || stream.outq.len() != tcp.outq_len as usize {
        return Err(Error::Image("length of a queue"));
    }
    if unsent > stream.outq.len() || tcp.snd_wscale > 14 || tcp.rcv_wscale.is_some_and(|scale| scale > 14) {
        return Err(Error::Image("state of a connection"));
    }
    // The FINs come later, and by themselves.
    let write_seq = tcp.outq_seq.wrapping_sub(local_fin(entry.state).into());
    let rcv_nxt = tcp.inq_seq.wrapping_sub(remote_fin(entry.state).into());
    // Repair mode also gives the port whoever else uses it; SO_REUSEADDR would take that away again.
    silence(fd)?;
    sockopts::restore_buffers(fd, &entry.opts, 0, stream.inq.len())?;
    for (queue, seq, len) in [(Queue::Send, write_seq, stream.outq.len()), (Queue::Recv, rcv_nxt, stream.inq.len())] {
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
    let timestamps = tcp.timestamp.is_some();
    let voice = Voice::Established { outq: stream.outq, unsent, timestamps, ack, fin };
    Ok(Silent { owned, entry: entry.clone(), voice })
}

/// Makes a socket whose peer has not answered yet, in the network namespace of the calling thread. It asks again
/// in [`Silent::go_live`].
pub fn create_connecting(entry: &InetSkEntry, more: Option<&LmrunSocket>) -> Result<Silent> {
    let owned = fresh(entry, more)?;
    let fd = owned.as_fd();
    let Connection { local, remote } = addresses(fd, entry)?;
    sockopts::set(fd, SOL_SOCKET, libc::SO_REUSEADDR, 1)?;
    call("bind")(address::bind(fd, local))?;
    finish(fd, entry, more)?;
    Ok(Silent { owned, entry: entry.clone(), voice: Voice::Connecting { remote } })
}

fn repair_options(tcp: &TcpStreamEntry) -> Vec<RepairOption> {
    let mut options = vec![RepairOption::Mss(tcp.mss_clamp)];
    if tcp.opt_mask & tcp::OPT_WSCALE != 0 {
        options.push(RepairOption::WindowScale { snd: tcp.snd_wscale, rcv: tcp.rcv_wscale.unwrap_or(0) });
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
    voice: Voice,
}

/// What a connection has to say first.
#[derive(Debug)]
enum Voice {
    Connecting {
        remote: SocketAddr,
    },
    Established {
        outq: Vec<u8>,
        /// How many bytes at the end of `outq` were never sent.
        unsent: usize,
        timestamps: bool,
        ack: Segment,
        fin: Segment,
    },
}

/// How long a FIN may take from this host to itself.
const FIN_PATIENCE: Duration = Duration::from_millis(500);

impl Silent {
    /// The socket, to be given to the process that will own it.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.owned.as_fd()
    }

    /// As in its `inet_sk_entry`.
    pub fn id(&self) -> u32 {
        self.entry.id
    }

    /// Lets the connection go on. The peer's segments must reach this namespace and no lock be in force.
    /// `raw` belongs to the same namespace.
    pub fn go_live(self, raw: &RawTcp) -> Result<OwnedFd> {
        let fd = self.owned.as_fd();
        match self.voice {
            Voice::Connecting { remote } => ask(fd, remote)?,
            Voice::Established { outq, unsent, timestamps, mut ack, fin } => {
                let (sent, unsent) = outq.split_at(outq.len() - unsent);
                fill_queue(fd, Queue::Send, sent)?;
                // Sends a window probe, which makes the peer say what it has received.
                call("TCP_REPAIR")(tcp::repair_off(fd))?;
                restore_reuse(fd, &self.entry.opts)?;
                // The probe acknowledges nothing. A peer that waits for an acknowledgement that was due would
                // wait for a timer if this one fails, which is no reason to fail.
                if timestamps {
                    ack.timestamp = tcp::timestamp(fd).ok();
                }
                let _ = raw.send(&ack);
                send_unsent(fd, unsent)?;
                close(fd, raw, &self.entry, &fin)?;
                sockopts::restore_buffers(fd, &self.entry.opts, 0, 0)?;
                sockopts::restore_buffer_locks(fd, &self.entry.opts)?;
            }
        }
        Ok(self.owned)
    }
}

/// Sends what was never sent: in repair mode the kernel takes nothing that it is to send itself.
fn send_unsent(fd: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<()> {
    if bytes.is_empty() {
        return Ok(());
    }
    // There may be more than the process would be allowed to add.
    let low = call("TCP_NOTSENT_LOWAT")(sockopt::get_int(fd, IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT))?;
    sockopts::set(fd, IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, u32::MAX)?;
    while !bytes.is_empty() {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let sent = call("send of unsent data")(send(fd.as_raw_fd(), bytes, flags))?;
        bytes = &bytes[sent..];
    }
    Ok(sockopts::set(fd, IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, low as u32)?)
}

/// Closes what was closed, in the order in which it was.
fn close(fd: BorrowedFd<'_>, raw: &RawTcp, entry: &InetSkEntry, fin: &Segment) -> Result<()> {
    if entry.state == state::CLOSING {
        restore_shutdown(fd, entry)?;
        return receive_fin(fd, raw, fin);
    }
    if remote_fin(entry.state) {
        receive_fin(fd, raw, fin)?;
    }
    restore_shutdown(fd, entry)
}

/// Connects without waiting for it.
fn ask(fd: BorrowedFd<'_>, remote: SocketAddr) -> Result<()> {
    let flags = OFlag::from_bits_retain(call("F_GETFL")(fcntl(fd, FcntlArg::F_GETFL))?);
    call("F_SETFL")(fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)))?;
    match address::connect(fd, remote) {
        Err(e) if e.raw_os_error() == Some(libc::EINPROGRESS) => {}
        result => call("connect")(result)?,
    }
    call("F_SETFL")(fcntl(fd, FcntlArg::F_SETFL(flags)))?;
    Ok(())
}

/// Lets the socket receive the peer's FIN once more, and waits until it has.
fn receive_fin(fd: BorrowedFd<'_>, raw: &RawTcp, fin: &Segment) -> Result<()> {
    let start = Instant::now();
    call("raw FIN")(raw.send(fin))?;
    // CLOSE: the peer has had our FIN in the meantime, and all is over.
    let received = |state| remote_fin(state) || state == state::CLOSE;
    while !received(call("TCP_INFO")(tcp::info(fd))?.state) {
        if start.elapsed() > FIN_PATIENCE {
            return Err(Error::Call { call: "FIN", source: io::ErrorKind::TimedOut.into() });
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    Ok(())
}
