//! Things that lmrun does not carry. A checkpoint must refuse each before it stops anything, and the process must
//! not notice: its check is that the thing still works.

use std::os::fd::IntoRawFd;

use crate::kernel::{c, open, raw, read, sys, write};
use crate::memory_map::PAGE;
use crate::stage::{Check, Fallible, Setup, Stage, eventually, same};

pub const WORKLOADS: &[(&str, Setup)] = &[
    ("refuse-inotify-unread", inotify),
    ("refuse-fanotify", fanotify),
    ("refuse-netlink", netlink),
    ("refuse-packet", packet),
    ("refuse-raw", raw_socket),
    ("refuse-udp-corked", udp_corked),
    ("refuse-unix-outside", unix_outside),
    ("refuse-memfd", memfd),
    ("refuse-memfd-mapped", memfd_mapped),
    ("refuse-deleted-directory", deleted_directory),
    ("refuse-io-uring", io_uring),
    ("refuse-pidfd", pidfd),
    ("refuse-pty", pty),
    ("refuse-uffd", uffd),
    ("refuse-lease", lease),
    ("refuse-rights-in-flight", rights_in_flight),
    ("refuse-fifo", fifo),
    ("refuse-device", device),
    ("refuse-namespace-file", namespace_file),
    ("refuse-other-namespace", other_namespace),
    ("refuse-tcp-unaccepted", tcp_unaccepted),
];

/// What cannot be set up on this host is a skip, not a failure.
fn or_skip<T>(outcome: Fallible<T>) -> Fallible<T> {
    outcome.map_err(|e| format!("skip: {e}"))
}

/// Events that nobody has read could not be put back.
fn inotify(_: &mut Stage) -> Fallible<Check> {
    let fd = or_skip(sys!(inotify_init1(libc::IN_NONBLOCK)))? as i32;
    std::fs::create_dir_all("/watched").map_err(|e| e.to_string())?;
    sys!(inotify_add_watch(fd, c("/watched").as_ptr(), libc::IN_CREATE))?;
    std::fs::write("/watched/0", "").map_err(|e| e.to_string())?;
    let mut n = 0;
    Ok(Box::new(move || {
        read(fd, 4096)?;
        n += 1;
        std::fs::write(format!("/watched/{n}"), "").map_err(|e| e.to_string())
    }))
}

fn fanotify(_: &mut Stage) -> Fallible<Check> {
    const FAN_REPORT_FID: u32 = 0x200;
    let fd = or_skip(sys!(fanotify_init(FAN_REPORT_FID | libc::FAN_NONBLOCK, 0)))? as i32;
    Ok(Box::new(move || sys!(fcntl(fd, libc::F_GETFL)).map(drop)))
}

fn socket(family: i32, kind: i32, protocol: i32) -> Fallible<Check> {
    let fd = or_skip(sys!(socket(family, kind, protocol)))? as i32;
    Ok(Box::new(move || sys!(fcntl(fd, libc::F_GETFL)).map(drop)))
}

fn netlink(_: &mut Stage) -> Fallible<Check> {
    socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE)
}

fn packet(_: &mut Stage) -> Fallible<Check> {
    socket(libc::AF_PACKET, libc::SOCK_RAW, 0)
}

fn raw_socket(_: &mut Stage) -> Fallible<Check> {
    socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP)
}

/// Half a datagram waits for the other half.
fn udp_corked(_: &mut Stage) -> Fallible<Check> {
    const UDP_CORK: i32 = 1;
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").map_err(|e| e.to_string())?;
    socket.connect(socket.local_addr().map_err(|e| e.to_string())?).map_err(|e| e.to_string())?;
    let fd = socket.into_raw_fd();
    let cork = |on: i32| sys!(setsockopt(fd, libc::IPPROTO_UDP, UDP_CORK, (&raw const on).cast(), 4));
    cork(1)?;
    write(fd, b"half")?;
    Ok(Box::new(move || sys!(fcntl(fd, libc::F_GETFL)).map(drop)))
}

/// Connected to a socket of the host, which the scenario has put at `/run-state/host.sock`.
fn unix_outside(_: &mut Stage) -> Fallible<Check> {
    use std::io::{Read, Write};
    let path = "/run-state/host.sock";
    let mut stream = std::os::unix::net::UnixStream::connect(path).map_err(|e| format!("skip: {path}: {e}"))?;
    Ok(Box::new(move || {
        stream.write_all(b"x").map_err(|e| e.to_string())?;
        stream.read_exact(&mut [0; 1]).map_err(|e| e.to_string())
    }))
}

fn new_memfd() -> Fallible<i32> {
    let fd = sys!(memfd_create(c("scratch").as_ptr(), 0))? as i32;
    write(fd, &[7; PAGE])?;
    Ok(fd)
}

fn memfd(_: &mut Stage) -> Fallible<Check> {
    let fd = new_memfd()?;
    Ok(Box::new(move || same("size", PAGE as i64, sys!(lseek(fd, 0, libc::SEEK_END))?)))
}

fn map_and_close(fd: i32) -> Fallible<Check> {
    let map = crate::memory_map::Map::of_file(PAGE, libc::PROT_READ, libc::MAP_SHARED, fd, 0)?;
    sys!(close(fd))?;
    Ok(Box::new(move || same("content", 7, map.bytes()[100])))
}

fn memfd_mapped(_: &mut Stage) -> Fallible<Check> {
    map_and_close(new_memfd()?)
}

fn deleted_directory(_: &mut Stage) -> Fallible<Check> {
    std::fs::create_dir("/deleted").map_err(|e| e.to_string())?;
    let fd = open("/deleted", libc::O_RDONLY)?;
    std::fs::remove_dir("/deleted").map_err(|e| e.to_string())?;
    Ok(Box::new(move || sys!(fcntl(fd, libc::F_GETFL)).map(drop)))
}

fn io_uring(_: &mut Stage) -> Fallible<Check> {
    let mut parameters = [0u8; 120];
    let fd = or_skip(raw!(SYS_io_uring_setup, 8, parameters.as_mut_ptr()))? as i32;
    Ok(Box::new(move || {
        // Nothing to submit, nothing to wait for.
        same("io_uring_enter", 0, raw!(SYS_io_uring_enter, fd, 0, 0, 0, 0, 0)?)
    }))
}

fn pidfd(_: &mut Stage) -> Fallible<Check> {
    let fd = raw!(SYS_pidfd_open, 1, 0)? as i32;
    Ok(Box::new(move || raw!(SYS_pidfd_send_signal, fd, 0, 0, 0).map(drop)))
}

fn pty(_: &mut Stage) -> Fallible<Check> {
    let (mut master, mut slave) = (0, 0);
    let null = std::ptr::null_mut();
    or_skip(sys!(openpty(&mut master, &mut slave, null, null as *mut libc::termios, null as *mut libc::winsize)))?;
    Ok(Box::new(move || {
        write(slave, b"x\n")?;
        read(master, 10).map(drop)
    }))
}

fn uffd(_: &mut Stage) -> Fallible<Check> {
    const UFFD_USER_MODE_ONLY: i32 = 1;
    let fd = or_skip(raw!(SYS_userfaultfd, UFFD_USER_MODE_ONLY))? as i32;
    Ok(Box::new(move || sys!(fcntl(fd, libc::F_GETFL)).map(drop)))
}

/// The promise to be told before somebody else opens a file.
fn lease(_: &mut Stage) -> Fallible<Check> {
    std::fs::write("/leased", "").map_err(|e| e.to_string())?;
    let fd = open("/leased", libc::O_RDONLY)?;
    or_skip(sys!(fcntl(fd, libc::F_SETLEASE, libc::F_RDLCK)))?;
    Ok(Box::new(move || same("lease", i64::from(libc::F_RDLCK), sys!(fcntl(fd, libc::F_GETLEASE))?)))
}

/// A descriptor that was sent over a unix socket and not yet received.
fn rights_in_flight(_: &mut Stage) -> Fallible<Check> {
    let mut ends = [0; 2];
    sys!(socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0, ends.as_mut_ptr()))?;
    let file = open("/dev/null", libc::O_RDONLY)?;
    let mut byte = [b'x'];
    let mut part = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    // cmsghdr { len 20, level SOL_SOCKET, type SCM_RIGHTS }, then the descriptor, padded to 8 bytes.
    let mut control = [20u64, libc::SOL_SOCKET as u64 | (libc::SCM_RIGHTS as u64) << 32, file as u64];
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = 24;
    sys!(sendmsg(ends[0], &message, 0))?;
    Ok(Box::new(move || {
        let mut peek = [0u8; 1];
        same("byte", 1, sys!(recv(ends[1], peek.as_mut_ptr().cast(), 1, libc::MSG_PEEK))?)
    }))
}

/// A named pipe.
fn fifo(_: &mut Stage) -> Fallible<Check> {
    sys!(mkfifo(c("/fifo").as_ptr(), 0o600))?;
    let fd = open("/fifo", libc::O_RDWR | libc::O_NONBLOCK)?;
    Ok(Box::new(move || {
        write(fd, b"x")?;
        same("byte", b"x".to_vec(), read(fd, 1)?)
    }))
}

/// A device that has state of its own: the kernel's log, or a tty.
fn device(_: &mut Stage) -> Fallible<Check> {
    let fd = or_skip(open("/dev/ptmx", libc::O_RDWR | libc::O_NOCTTY))?;
    Ok(Box::new(move || sys!(fcntl(fd, libc::F_GETFL)).map(drop)))
}

fn namespace_file(_: &mut Stage) -> Fallible<Check> {
    let fd = std::fs::File::open("/proc/self/ns/net").map_err(|e| e.to_string())?.into_raw_fd();
    Ok(Box::new(move || sys!(fcntl(fd, libc::F_GETFL)).map(drop)))
}

/// A child that made namespaces of its own.
fn other_namespace(stage: &mut Stage) -> Fallible<Check> {
    let outcome = stage.member("child", |_| {
        or_skip(sys!(unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWUTS)))?;
        sys!(sethostname(c("other").as_ptr(), 5))?;
        let name = || crate::procfs::text("/proc/sys/kernel/hostname");
        same("host name", "other\n".to_owned(), name()?)?;
        Ok(Box::new(move || same("host name", "other\n".to_owned(), name()?)))
    });
    outcome.map(drop)?;
    Ok(Box::new(|| Ok(())))
}

/// Connections that are complete but not yet accepted. They are lmrun's to refuse or to bring back, not to lose.
fn tcp_unaccepted(_: &mut Stage) -> Fallible<Check> {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    let listener = TcpListener::bind("127.0.0.1:7005").map_err(|e| e.to_string())?;
    let mut client = TcpStream::connect("127.0.0.1:7005").map_err(|e| e.to_string())?;
    client.write_all(b"early").map_err(|e| e.to_string())?;
    let mut kept = Vec::new();
    Ok(Box::new(move || {
        listener.set_nonblocking(true).map_err(|e| e.to_string())?;
        let mut server = None;
        eventually("the connection is there", || {
            server = server.take().or_else(|| listener.accept().ok());
            server.is_some()
        })?;
        let (mut server, _) = server.ok_or("accept")?;
        server.set_nonblocking(false).map_err(|e| e.to_string())?;
        let mut early = [0; 5];
        server.read_exact(&mut early).map_err(|e| e.to_string())?;
        same("what was sent early", b"early", &early)?;
        kept.push((
            server,
            std::mem::replace(&mut client, TcpStream::connect("127.0.0.1:7005").map_err(|e| e.to_string())?),
        ));
        client.write_all(b"early").map_err(|e| e.to_string())
    }))
}
