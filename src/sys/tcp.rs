//! TCP_REPAIR and its companions: a socket whose state can be read and written while it is silent.
//!
//! The mode belongs to the socket, not to the process that set it: it outlives both (`engine::guard`).
//! Needs CAP_NET_ADMIN in the user namespace that owns the socket's network namespace.

use std::io;
use std::os::fd::BorrowedFd;

use libc::{IPPROTO_TCP, c_int};

use super::sockopt;

/// include/uapi/linux/tcp.h, since 3.5.
const TCP_REPAIR: c_int = 19;
/// include/uapi/linux/tcp.h, since 3.5; only while TCP_REPAIR is on.
const TCP_REPAIR_QUEUE: c_int = 20;
/// include/uapi/linux/tcp.h, since 3.5; only while TCP_REPAIR is on.
const TCP_QUEUE_SEQ: c_int = 21;
/// include/uapi/linux/tcp.h, since 3.5; only while TCP_REPAIR is on.
const TCP_REPAIR_OPTIONS: c_int = 22;
/// include/uapi/linux/tcp.h, since 3.9; settable only while TCP_REPAIR is on.
const TCP_TIMESTAMP: c_int = 24;
/// include/uapi/linux/tcp.h, since 4.8; only while TCP_REPAIR is on.
const TCP_REPAIR_WINDOW: c_int = 29;

/// TCP_REPAIR_OFF of include/uapi/linux/tcp.h: leave the mode and send a window probe.
const REPAIR_OFF: c_int = 0;
const REPAIR_ON: c_int = 1;
/// TCP_REPAIR_OFF_NO_WP of include/uapi/linux/tcp.h, since 4.19: leave the mode and send nothing.
const REPAIR_OFF_NO_WP: c_int = -1;

/// The queue that TCP_QUEUE_SEQ, send(2) and recv(2) mean while TCP_REPAIR is on; values of
/// TCP_REPAIR_QUEUE in include/uapi/linux/tcp.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Queue {
    None = 0,
    Recv = 1,
    Send = 2,
}

/// Options agreed in the handshake: bits of `tcpi_options`, include/uapi/linux/tcp.h.
pub const OPT_TIMESTAMPS: u32 = 1;
/// Selective acknowledgements.
pub const OPT_SACK: u32 = 2;
/// Window scaling.
pub const OPT_WSCALE: u32 = 4;

/// State of a connection: include/net/tcp_states.h.
pub mod state {
    pub const ESTABLISHED: u32 = 1;
    pub const SYN_SENT: u32 = 2;
    pub const SYN_RECV: u32 = 3;
    pub const FIN_WAIT1: u32 = 4;
    pub const FIN_WAIT2: u32 = 5;
    pub const TIME_WAIT: u32 = 6;
    pub const CLOSE: u32 = 7;
    pub const CLOSE_WAIT: u32 = 8;
    pub const LAST_ACK: u32 = 9;
    pub const LISTEN: u32 = 10;
    pub const CLOSING: u32 = 11;

    /// The kernel's name of a state.
    pub fn name(state: u32) -> &'static str {
        match state {
            ESTABLISHED => "ESTABLISHED",
            SYN_SENT => "SYN_SENT",
            SYN_RECV => "SYN_RECV",
            FIN_WAIT1 => "FIN_WAIT1",
            FIN_WAIT2 => "FIN_WAIT2",
            TIME_WAIT => "TIME_WAIT",
            CLOSE => "CLOSE",
            CLOSE_WAIT => "CLOSE_WAIT",
            LAST_ACK => "LAST_ACK",
            LISTEN => "LISTEN",
            CLOSING => "CLOSING",
            _ => "unknown",
        }
    }
}

/// The part of `struct tcp_info` (include/uapi/linux/tcp.h) that the engine reads.
#[derive(Debug, Clone, Copy)]
pub struct Info {
    /// One of [`state`].
    pub state: u32,
    /// `OPT_*` bits.
    pub options: u32,
    /// Shift of the windows that the peer announces.
    pub snd_wscale: u32,
    /// Shift of the windows that we announce.
    pub rcv_wscale: u32,
    /// LISTEN: connections that wait for accept(2). Else segments in flight.
    pub unacked: u32,
    /// LISTEN: the backlog given to listen(2), as the kernel capped it. Else segments sacked.
    pub sacked: u32,
}

/// Reads TCP_INFO; any state, no privilege.
pub fn info(fd: BorrowedFd<'_>) -> io::Result<Info> {
    // The head of the structure is as old as the structure; later kernels only append.
    let [w0, w1, _, _, _, _, unacked, sacked] = sockopt::get_words(fd, IPPROTO_TCP, libc::TCP_INFO)?;
    let [state, _, _, _] = w0.to_ne_bytes();
    let [_, options, wscales, _] = w1.to_ne_bytes();
    Ok(Info {
        state: state.into(),
        options: options.into(),
        // Two 4-bit fields, the lower one first on little-endian machines.
        snd_wscale: (wscales & 0xf).into(),
        rcv_wscale: (wscales >> 4).into(),
        unacked,
        sacked,
    })
}

/// `struct tcp_repair_window`, include/uapi/linux/tcp.h. Sequence numbers and bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct RepairWindow {
    pub snd_wl1: u32,
    pub snd_wnd: u32,
    pub max_window: u32,
    pub rcv_wnd: u32,
    pub rcv_wup: u32,
}
const _: () = assert!(size_of::<RepairWindow>() == 20);

/// Enters the repair mode. Changes SO_REUSEADDR: read that before. EPERM for a listening socket.
pub fn repair_on(fd: BorrowedFd<'_>) -> io::Result<()> {
    sockopt::set_int(fd, IPPROTO_TCP, TCP_REPAIR, REPAIR_ON)
}

/// Leaves the repair mode, by which an established socket sends a window probe. Clears SO_REUSEADDR.
pub fn repair_off(fd: BorrowedFd<'_>) -> io::Result<()> {
    sockopt::set_int(fd, IPPROTO_TCP, TCP_REPAIR, REPAIR_OFF)
}

/// Leaves the repair mode and sends nothing. Clears SO_REUSEADDR.
pub fn repair_off_quietly(fd: BorrowedFd<'_>) -> io::Result<()> {
    sockopt::set_int(fd, IPPROTO_TCP, TCP_REPAIR, REPAIR_OFF_NO_WP)
}

/// Whether the socket is in repair mode.
pub fn in_repair(fd: BorrowedFd<'_>) -> io::Result<bool> {
    sockopt::get_int(fd, IPPROTO_TCP, TCP_REPAIR).map(|v| v != 0)
}

/// Chooses the queue.
pub fn select_queue(fd: BorrowedFd<'_>, queue: Queue) -> io::Result<()> {
    sockopt::set_int(fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, queue as c_int)
}

/// The sequence number behind the last byte of the chosen queue: `rcv_nxt` or `write_seq`.
pub fn queue_seq(fd: BorrowedFd<'_>) -> io::Result<u32> {
    sockopt::get_words(fd, IPPROTO_TCP, TCP_QUEUE_SEQ).map(|[seq]| seq)
}

/// Sets the sequence number at which the chosen queue begins; only before connect(2).
pub fn set_queue_seq(fd: BorrowedFd<'_>, seq: u32) -> io::Result<()> {
    sockopt::set_words(fd, IPPROTO_TCP, TCP_QUEUE_SEQ, &[seq])
}

/// An option of the handshake, for [`set_repair_options`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RepairOption {
    /// The peer's maximum segment size, bytes.
    Mss(u32),
    WindowScale {
        snd: u32,
        rcv: u32,
    },
    SackPermitted,
    Timestamps,
}

/// Sets what the handshake would have agreed; only between connect(2) and the end of the repair mode.
pub fn set_repair_options(fd: BorrowedFd<'_>, options: &[RepairOption]) -> io::Result<()> {
    // An array of struct tcp_repair_opt { u32 opt_code; u32 opt_val }; codes are those of RFC 9293 and 7323.
    let words: Vec<u32> = options
        .iter()
        .flat_map(|option| match *option {
            RepairOption::Mss(mss) => [2, mss],
            RepairOption::WindowScale { snd, rcv } => [3, snd | rcv << 16],
            RepairOption::SackPermitted => [4, 0],
            RepairOption::Timestamps => [8, 0],
        })
        .collect();
    sockopt::set_words(fd, IPPROTO_TCP, TCP_REPAIR_OPTIONS, &words)
}

/// The clock of the socket's timestamps, as now. Bit 0 says that it counts microseconds (since 6.7; before,
/// and when clear, milliseconds).
pub fn timestamp(fd: BorrowedFd<'_>) -> io::Result<u32> {
    sockopt::get_words(fd, IPPROTO_TCP, TCP_TIMESTAMP).map(|[v]| v)
}

/// Sets the clock that [`timestamp`] reads.
pub fn set_timestamp(fd: BorrowedFd<'_>, value: u32) -> io::Result<()> {
    sockopt::set_words(fd, IPPROTO_TCP, TCP_TIMESTAMP, &[value])
}

/// Reads the windows.
pub fn window(fd: BorrowedFd<'_>) -> io::Result<RepairWindow> {
    let [snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup] = sockopt::get_words(fd, IPPROTO_TCP, TCP_REPAIR_WINDOW)?;
    Ok(RepairWindow { snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup })
}

/// Sets the windows; the receive queue must be complete. EINVAL if they contradict the sequence numbers.
pub fn set_window(fd: BorrowedFd<'_>, w: &RepairWindow) -> io::Result<()> {
    let words = [w.snd_wl1, w.snd_wnd, w.max_window, w.rcv_wnd, w.rcv_wup];
    sockopt::set_words(fd, IPPROTO_TCP, TCP_REPAIR_WINDOW, &words)
}

/// Maximum segment size: the peer's own (`mss_clamp`) while in repair mode, else the effective one. Bytes.
pub fn max_segment(fd: BorrowedFd<'_>) -> io::Result<u32> {
    sockopt::get_words(fd, IPPROTO_TCP, libc::TCP_MAXSEG).map(|[mss]| mss)
}

/// The most that [`set_max_segment`] takes: MAX_TCP_WINDOW of include/net/tcp.h.
const MAX_SEGMENT: u32 = 32767;

/// Caps the segment size of what connect(2) agrees; 0 is no cap of our own. Bytes.
pub fn set_max_segment(fd: BorrowedFd<'_>, mss: u32) -> io::Result<()> {
    sockopt::set_words(fd, IPPROTO_TCP, libc::TCP_MAXSEG, &[mss.min(MAX_SEGMENT)])
}
