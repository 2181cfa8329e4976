//! The options of sockets: those of every family, of IP, of TCP, and those that CRIU has no place for.

use std::io;
use std::os::fd::BorrowedFd;

use libc::{IPPROTO_IP, IPPROTO_IPV6, IPPROTO_TCP, SOL_SOCKET, c_int};

use crate::image::records::lmrun::{LmrunSockOpt, LmrunSocket};
use crate::image::records::sockets::{IpOptsEntry, SkOptsEntry, TcpOptsEntry};
use crate::sys::sockopt;

/// include/uapi/asm-generic/socket.h, since 5.14: which buffer sizes the process has set itself.
const SO_BUF_LOCK: c_int = 72;
/// include/uapi/asm-generic/socket.h, since 4.14.
const SO_ZEROCOPY: c_int = 60;
/// include/uapi/asm-generic/socket.h, since 6.5; unix sockets alone.
const SO_PASSPIDFD: c_int = 76;
/// include/uapi/asm-generic/socket.h, since 6.16; unix sockets alone. Kernels before do what 1 means.
const SO_PASSRIGHTS: c_int = 83;

/// An option could not be read or set.
#[derive(Debug, thiserror::Error)]
#[error("socket option {level}/{name}")]
pub struct Error {
    level: c_int,
    name: c_int,
    source: io::Error,
}

type Result<T> = std::result::Result<T, Error>;

fn get(fd: BorrowedFd<'_>, level: c_int, name: c_int) -> Result<u32> {
    get_words::<1>(fd, level, name).map(|[v]| v)
}

fn get_words<const N: usize>(fd: BorrowedFd<'_>, level: c_int, name: c_int) -> Result<[u32; N]> {
    sockopt::get_words(fd, level, name).map_err(|source| Error { level, name, source })
}

fn set_words(fd: BorrowedFd<'_>, level: c_int, name: c_int, words: &[u32]) -> Result<()> {
    sockopt::set_words(fd, level, name, words).map_err(|source| Error { level, name, source })
}

/// None if this kernel, or this sort of socket, has no such option.
fn get_known(fd: BorrowedFd<'_>, level: c_int, name: c_int) -> Result<Option<u32>> {
    match get(fd, level, name) {
        Ok(value) => Ok(Some(value)),
        Err(e) if matches!(e.source.raw_os_error(), Some(libc::ENOPROTOOPT | libc::EOPNOTSUPP)) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Sets an option unless it has the value already: a fresh socket's defaults are left alone.
pub fn set(fd: BorrowedFd<'_>, level: c_int, name: c_int, value: u32) -> Result<()> {
    match get_known(fd, level, name)? {
        Some(present) if present == value => Ok(()),
        None if value == 0 => Ok(()),
        _ => set_words(fd, level, name, &[value]),
    }
}

/// Reads the options of a socket. Its TCP_REPAIR must be off: that mode changes SO_REUSEADDR.
pub fn dump(fd: BorrowedFd<'_>) -> Result<SkOptsEntry> {
    let int = |name| get(fd, SOL_SOCKET, name);
    let flag = |name| get_known(fd, SOL_SOCKET, name).map(|v| v.map(|v| v != 0));
    let (so_snd_tmo_sec, so_snd_tmo_usec) = timeout(fd, libc::SO_SNDTIMEO)?;
    let (so_rcv_tmo_sec, so_rcv_tmo_usec) = timeout(fd, libc::SO_RCVTIMEO)?;
    let [lingers, linger] = get_words(fd, SOL_SOCKET, libc::SO_LINGER)?;
    let tcp = get(fd, SOL_SOCKET, libc::SO_PROTOCOL)? == IPPROTO_TCP as u32;
    let keep = |name| {
        if tcp { get(fd, IPPROTO_TCP, name).map(Some) } else { Ok(None) }
    };
    let device = sockopt::get_name(fd, SOL_SOCKET, libc::SO_BINDTODEVICE).map_err(|source| Error {
        level: SOL_SOCKET,
        name: libc::SO_BINDTODEVICE,
        source,
    })?;
    Ok(SkOptsEntry {
        so_sndbuf: int(libc::SO_SNDBUF)?,
        so_rcvbuf: int(libc::SO_RCVBUF)?,
        so_snd_tmo_sec,
        so_snd_tmo_usec,
        so_rcv_tmo_sec,
        so_rcv_tmo_usec,
        reuseaddr: flag(libc::SO_REUSEADDR)?,
        so_priority: Some(int(libc::SO_PRIORITY)?),
        so_rcvlowat: Some(int(libc::SO_RCVLOWAT)?),
        so_mark: Some(int(libc::SO_MARK)?),
        so_passcred: flag(libc::SO_PASSCRED)?,
        so_passsec: flag(libc::SO_PASSSEC)?,
        so_dontroute: flag(libc::SO_DONTROUTE)?,
        so_no_check: flag(libc::SO_NO_CHECK)?,
        so_bound_dev: (!device.is_empty()).then_some(device),
        so_filter: sockopt::filter(fd).map_err(|source| Error {
            level: SOL_SOCKET,
            name: libc::SO_ATTACH_FILTER,
            source,
        })?,
        so_reuseport: flag(libc::SO_REUSEPORT)?,
        so_broadcast: flag(libc::SO_BROADCAST)?,
        so_keepalive: flag(libc::SO_KEEPALIVE)?,
        tcp_keepcnt: keep(libc::TCP_KEEPCNT)?,
        tcp_keepidle: keep(libc::TCP_KEEPIDLE)?,
        tcp_keepintvl: keep(libc::TCP_KEEPINTVL)?,
        so_oobinline: Some(int(libc::SO_OOBINLINE)?),
        so_linger: (lingers != 0).then_some(linger),
        so_buf_lock: get_known(fd, SOL_SOCKET, SO_BUF_LOCK)?,
    })
}

/// Seconds and microseconds of a `struct timeval`.
fn timeout(fd: BorrowedFd<'_>, name: c_int) -> Result<(u64, u64)> {
    let [s0, s1, u0, u1] = get_words(fd, SOL_SOCKET, name)?;
    Ok((wide(s0, s1), wide(u0, u1)))
}

/// Two words of an ABI struct as the one of 64 bits that they are.
fn wide(first: u32, second: u32) -> u64 {
    u64::from_ne_bytes(std::array::from_fn(|i| [first, second].map(u32::to_ne_bytes).as_flattened()[i]))
}

/// Sets what the caller of bind(2) or connect(2) must have set before.
pub fn restore_before_bind(fd: BorrowedFd<'_>, opts: &SkOptsEntry) -> Result<()> {
    set(fd, SOL_SOCKET, libc::SO_MARK, opts.so_mark.unwrap_or(0))?;
    set(fd, SOL_SOCKET, libc::SO_REUSEPORT, opts.so_reuseport.unwrap_or(false).into())?;
    if let Some(device) = &opts.so_bound_dev {
        sockopt::set_bytes(fd, SOL_SOCKET, libc::SO_BINDTODEVICE, device.as_bytes()).map_err(|source| Error {
            level: SOL_SOCKET,
            name: libc::SO_BINDTODEVICE,
            source,
        })?;
    }
    restore_buffers(fd, opts, 0, 0)
}

/// Sets the sizes of the buffers, in bytes, but to no less than needed for `sndq` and `rcvq` bytes of data.
/// Until [`restore_buffer_locks`] the kernel leaves them as they are.
pub fn restore_buffers(fd: BorrowedFd<'_>, opts: &SkOptsEntry, sndq: usize, rcvq: usize) -> Result<()> {
    // The kernel doubles what it is given, for its own overhead.
    let size = |dumped: u32, queue: usize| (dumped / 2).max((queue + 65536 * (queue > 0) as usize) as u32);
    set_words(fd, SOL_SOCKET, libc::SO_SNDBUFFORCE, &[size(opts.so_sndbuf, sndq)])?;
    set_words(fd, SOL_SOCKET, libc::SO_RCVBUFFORCE, &[size(opts.so_rcvbuf, rcvq)])
}

/// Gives the sizes that the process did not choose back to the kernel's own tuning.
pub fn restore_buffer_locks(fd: BorrowedFd<'_>, opts: &SkOptsEntry) -> Result<()> {
    match opts.so_buf_lock {
        Some(lock) if get_known(fd, SOL_SOCKET, SO_BUF_LOCK)?.is_some() => {
            set_words(fd, SOL_SOCKET, SO_BUF_LOCK, &[lock])
        }
        _ => Ok(()),
    }
}

/// Sets all the rest, except SO_REUSEADDR and the locks of buffer sizes.
pub fn restore(fd: BorrowedFd<'_>, opts: &SkOptsEntry) -> Result<()> {
    let flag = |value: Option<bool>| value.map(u32::from);
    let values = [
        (SOL_SOCKET, libc::SO_PRIORITY, opts.so_priority),
        (SOL_SOCKET, libc::SO_RCVLOWAT, opts.so_rcvlowat),
        (SOL_SOCKET, libc::SO_PASSCRED, flag(opts.so_passcred)),
        (SOL_SOCKET, libc::SO_PASSSEC, flag(opts.so_passsec)),
        (SOL_SOCKET, libc::SO_DONTROUTE, flag(opts.so_dontroute)),
        (SOL_SOCKET, libc::SO_NO_CHECK, flag(opts.so_no_check)),
        (SOL_SOCKET, libc::SO_BROADCAST, flag(opts.so_broadcast)),
        (SOL_SOCKET, libc::SO_OOBINLINE, opts.so_oobinline),
        (IPPROTO_TCP, libc::TCP_KEEPCNT, opts.tcp_keepcnt),
        (IPPROTO_TCP, libc::TCP_KEEPIDLE, opts.tcp_keepidle),
        (IPPROTO_TCP, libc::TCP_KEEPINTVL, opts.tcp_keepintvl),
        (SOL_SOCKET, libc::SO_KEEPALIVE, flag(opts.so_keepalive)),
    ];
    for (level, name, value) in values {
        if let Some(value) = value {
            set(fd, level, name, value)?;
        }
    }
    if let Some(linger) = opts.so_linger {
        set_words(fd, SOL_SOCKET, libc::SO_LINGER, &[1, linger])?;
    }
    if !opts.so_filter.is_empty() {
        sockopt::set_filter(fd, &opts.so_filter).map_err(|source| Error {
            level: SOL_SOCKET,
            name: libc::SO_ATTACH_FILTER,
            source,
        })?;
    }
    for (name, sec, usec) in [
        (libc::SO_SNDTIMEO, opts.so_snd_tmo_sec, opts.so_snd_tmo_usec),
        (libc::SO_RCVTIMEO, opts.so_rcv_tmo_sec, opts.so_rcv_tmo_usec),
    ] {
        let bytes = [sec.to_ne_bytes(), usec.to_ne_bytes()].concat();
        sockopt::set_bytes(fd, SOL_SOCKET, name, &bytes).map_err(|source| Error { level: SOL_SOCKET, name, source })?;
    }
    Ok(())
}

/// Reads the options of the IP layer.
pub fn dump_ip(fd: BorrowedFd<'_>) -> Result<IpOptsEntry> {
    let int = |name| get(fd, IPPROTO_IP, name);
    Ok(IpOptsEntry {
        freebind: Some(int(libc::IP_FREEBIND)? != 0),
        raw: None,
        pktinfo: Some(int(libc::IP_PKTINFO)? != 0),
        tos: Some(int(libc::IP_TOS)?),
        ttl: Some(int(libc::IP_TTL)?),
    })
}

/// Sets what [`dump_ip`] has read, except what must be set before bind(2). Changes SO_PRIORITY.
pub fn restore_ip(fd: BorrowedFd<'_>, opts: &IpOptsEntry) -> Result<()> {
    set_all(
        fd,
        IPPROTO_IP,
        [(libc::IP_TOS, opts.tos), (libc::IP_TTL, opts.ttl), (libc::IP_PKTINFO, opts.pktinfo.map(u32::from))],
    )
}

/// Reads the options of TCP.
pub fn dump_tcp(fd: BorrowedFd<'_>) -> Result<TcpOptsEntry> {
    let int = |name| get(fd, IPPROTO_TCP, name);
    Ok(TcpOptsEntry {
        cork: Some(int(libc::TCP_CORK)? != 0),
        nodelay: Some(int(libc::TCP_NODELAY)? != 0),
        keepcnt: Some(int(libc::TCP_KEEPCNT)?),
        keepidle: Some(int(libc::TCP_KEEPIDLE)?),
        keepintvl: Some(int(libc::TCP_KEEPINTVL)?),
    })
}

/// Sets what [`dump_tcp`] has read.
pub fn restore_tcp(fd: BorrowedFd<'_>, opts: &TcpOptsEntry) -> Result<()> {
    set_all(
        fd,
        IPPROTO_TCP,
        [
            (libc::TCP_NODELAY, opts.nodelay.map(u32::from)),
            (libc::TCP_CORK, opts.cork.map(u32::from)),
            (libc::TCP_KEEPCNT, opts.keepcnt),
            (libc::TCP_KEEPIDLE, opts.keepidle),
            (libc::TCP_KEEPINTVL, opts.keepintvl),
        ],
    )
}

fn set_all<const N: usize>(fd: BorrowedFd<'_>, level: c_int, options: [(c_int, Option<u32>); N]) -> Result<()> {
    for (name, value) in options {
        if let Some(value) = value {
            set(fd, level, name, value)?;
        }
    }
    Ok(())
}

/// Options of stream and unix sockets that are one int, readable and settable at any time, and not in CRIU's
/// records. In the order in which they are set. include/uapi/{asm-generic/socket,linux/in,linux/in6,linux/tcp}.h.
const MORE: [(c_int, c_int); 28] = [
    (SOL_SOCKET, libc::SO_TIMESTAMP),
    (SOL_SOCKET, libc::SO_TIMESTAMPNS),
    (SOL_SOCKET, libc::SO_PEEK_OFF),
    (SOL_SOCKET, libc::SO_BUSY_POLL),
    (SOL_SOCKET, SO_ZEROCOPY),
    (SOL_SOCKET, SO_PASSPIDFD),
    (SOL_SOCKET, SO_PASSRIGHTS),
    (IPPROTO_IP, libc::IP_TRANSPARENT),
    (IPPROTO_IP, libc::IP_MTU_DISCOVER),
    (IPPROTO_IP, libc::IP_RECVERR),
    (IPPROTO_IP, libc::IP_MINTTL),
    (IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT),
    (IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS),
    (IPPROTO_IPV6, libc::IPV6_TCLASS),
    (IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER),
    (IPPROTO_IPV6, libc::IPV6_RECVERR),
    (IPPROTO_IPV6, libc::IPV6_DONTFRAG),
    (IPPROTO_IPV6, libc::IPV6_TRANSPARENT),
    (IPPROTO_TCP, libc::TCP_SYNCNT),
    (IPPROTO_TCP, libc::TCP_LINGER2),
    (IPPROTO_TCP, libc::TCP_DEFER_ACCEPT),
    (IPPROTO_TCP, libc::TCP_WINDOW_CLAMP),
    (IPPROTO_TCP, libc::TCP_THIN_LINEAR_TIMEOUTS),
    (IPPROTO_TCP, libc::TCP_USER_TIMEOUT),
    (IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT),
    (IPPROTO_TCP, libc::TCP_FASTOPEN),
    (IPPROTO_TCP, libc::TCP_INQ),
    (IPPROTO_TCP, libc::TCP_SAVE_SYN),
];

/// Those of [`MORE`] that bind(2) looks at: addresses that are not the host's, ports that come later.
const BEFORE_BIND: [(c_int, c_int); 3] = [
    (IPPROTO_IP, libc::IP_TRANSPARENT),
    (IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT),
    (IPPROTO_IPV6, libc::IPV6_TRANSPARENT),
];

/// Reads what CRIU's records lack of a TCP or unix socket, as far as this kernel and this family have it; `id` is
/// left to the caller.
pub fn dump_more(fd: BorrowedFd<'_>, uid: u32) -> Result<LmrunSocket> {
    let v6 = get(fd, SOL_SOCKET, libc::SO_DOMAIN)? == libc::AF_INET6 as u32;
    let mut options = Vec::new();
    for (level, name) in MORE {
        if level == IPPROTO_IPV6 && !v6 {
            continue;
        }
        let value = get_known(fd, level, name)?;
        if let Some(value) = value.filter(|v| (name, *v) != (SO_PASSRIGHTS, 1)) {
            let (level, name) = (level as u32, name as u32);
            options.push(LmrunSockOpt { level, name, value });
        }
    }
    let tcp = get(fd, SOL_SOCKET, libc::SO_PROTOCOL)? == IPPROTO_TCP as u32;
    let congestion = tcp.then(|| congestion(fd)).transpose()?;
    Ok(LmrunSocket { id: 0, uid, congestion, options, peer: None })
}

/// Sets what [`dump_more`] has read. Options that it does not know are not touched: images are not
/// trusted.
pub fn restore_more(fd: BorrowedFd<'_>, more: &LmrunSocket) -> Result<()> {
    if let Some(wanted) = &more.congestion
        && congestion(fd)? != *wanted
    {
        let (level, name) = (IPPROTO_TCP, libc::TCP_CONGESTION);
        sockopt::set_bytes(fd, level, name, wanted.as_bytes()).map_err(|source| Error { level, name, source })?;
    }
    restore_some(fd, more, &MORE)
}

/// The part of [`restore_more`] that must come before bind(2).
pub fn restore_more_before_bind(fd: BorrowedFd<'_>, more: &LmrunSocket) -> Result<()> {
    restore_some(fd, more, &BEFORE_BIND)
}

fn restore_some(fd: BorrowedFd<'_>, more: &LmrunSocket, known: &[(c_int, c_int)]) -> Result<()> {
    for &(level, name) in known {
        let dumped = more.options.iter().find(|o| (o.level, o.name) == (level as u32, name as u32));
        if let Some(option) = dumped {
            set(fd, level, name, option.value)?;
        }
    }
    Ok(())
}

fn congestion(fd: BorrowedFd<'_>) -> Result<String> {
    let (level, name) = (IPPROTO_TCP, libc::TCP_CONGESTION);
    sockopt::get_name(fd, level, name).map_err(|source| Error { level, name, source })
}
