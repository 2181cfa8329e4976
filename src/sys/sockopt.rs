//! Socket options and socket ioctls as plain values.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use libc::{SOL_SOCKET, c_int, c_ulong};

/// include/uapi/linux/sockios.h: bytes that can be read at once. Equal to FIONREAD.
const SIOCINQ: c_ulong = 0x541b;
/// include/uapi/linux/sockios.h: bytes not yet acknowledged by the peer. Equal to TIOCOUTQ.
const SIOCOUTQ: c_ulong = 0x5411;
/// include/uapi/linux/sockios.h: bytes not yet sent for the first time.
const SIOCOUTQNSD: c_ulong = 0x894b;
/// include/uapi/asm-generic/socket.h, since 3.8.
const SO_GET_FILTER: c_int = libc::SO_ATTACH_FILTER;
/// include/uapi/linux/sockios.h.
const SIOCGIFNAME: c_ulong = 0x8910;
/// include/uapi/linux/sockios.h.
const SIOCGIFINDEX: c_ulong = 0x8933;

/// Reads an option into `buf`; returns the length of what the kernel wrote, getsockopt(2).
pub fn get_bytes(fd: BorrowedFd<'_>, level: c_int, name: c_int, buf: &mut [u8]) -> io::Result<usize> {
    let mut len = buf.len() as libc::socklen_t;
    // SAFETY: `buf` is writable for `len` bytes, and the kernel writes at most that.
    let ret = unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, buf.as_mut_ptr().cast(), &mut len) };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(len as usize) }
}

/// Sets an option to `value`, setsockopt(2).
pub fn set_bytes(fd: BorrowedFd<'_>, level: c_int, name: c_int, value: &[u8]) -> io::Result<()> {
    // SAFETY: the kernel reads `value` for its length and keeps no pointer to it.
    let ret =
        unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, value.as_ptr().cast(), value.len() as libc::socklen_t) };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Reads `N` consecutive ints. An option that yields fewer is `InvalidData`.
pub fn get_words<const N: usize>(fd: BorrowedFd<'_>, level: c_int, name: c_int) -> io::Result<[u32; N]> {
    let mut buf = vec![0; 4 * N];
    let len = get_bytes(fd, level, name, &mut buf)?;
    if len != buf.len() {
        return Err(io::Error::from(io::ErrorKind::InvalidData));
    }
    let mut words = [0; N];
    for (word, bytes) in words.iter_mut().zip(buf.as_chunks::<4>().0) {
        *word = u32::from_ne_bytes(*bytes);
    }
    Ok(words)
}

/// Sets consecutive ints.
pub fn set_words(fd: BorrowedFd<'_>, level: c_int, name: c_int, words: &[u32]) -> io::Result<()> {
    let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
    set_bytes(fd, level, name, &bytes)
}

/// Reads an option that is an int.
pub fn get_int(fd: BorrowedFd<'_>, level: c_int, name: c_int) -> io::Result<c_int> {
    get_words::<1>(fd, level, name).map(|[word]| word as c_int)
}

/// Sets an option that is an int.
pub fn set_int(fd: BorrowedFd<'_>, level: c_int, name: c_int, value: c_int) -> io::Result<()> {
    set_bytes(fd, level, name, &value.to_ne_bytes())
}

/// Reads an option that is a name, without its NUL bytes.
pub fn get_name(fd: BorrowedFd<'_>, level: c_int, name: c_int) -> io::Result<String> {
    let mut buf = [0; 64];
    let len = get_bytes(fd, level, name, &mut buf)?;
    let end = buf[..len].iter().position(|&b| b == 0).unwrap_or(len);
    Ok(String::from_utf8_lossy(&buf[..end]).into_owned())
}

/// The classic BPF program of a socket, each instruction (`struct sock_filter`) as one number; empty: it has none.
/// An eBPF program cannot be read back: EACCES.
pub fn filter(fd: BorrowedFd<'_>) -> io::Result<Vec<u64>> {
    // Unlike other options', this one's lengths are numbers of instructions.
    let read = |program: &mut [u64]| {
        let mut len = program.len() as libc::socklen_t;
        let to = program.as_mut_ptr().cast();
        // SAFETY: the kernel writes at most `len` instructions of eight bytes each.
        let ret = unsafe { libc::getsockopt(fd.as_raw_fd(), SOL_SOCKET, SO_GET_FILTER, to, &mut len) };
        if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(len as usize) }
    };
    let mut program = vec![0; read(&mut [])?];
    if !program.is_empty() {
        read(&mut program)?;
    }
    Ok(program)
}

/// Attaches a program that [`filter`] has read.
pub fn set_filter(fd: BorrowedFd<'_>, program: &[u64]) -> io::Result<()> {
    let len = u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let filter = program.as_ptr().cast_mut().cast();
    let program = libc::sock_fprog { len, filter };
    let size = size_of_val(&program) as libc::socklen_t;
    // SAFETY: the kernel copies `len` instructions of eight bytes each, and checks them; it changes nothing.
    let ret = unsafe {
        libc::setsockopt(fd.as_raw_fd(), SOL_SOCKET, libc::SO_ATTACH_FILTER, (&raw const program).cast(), size)
    };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Bytes in the receive queue, FIN not counted: tcp(7) SIOCINQ.
pub fn inq(fd: BorrowedFd<'_>) -> io::Result<usize> {
    queue_ioctl(fd, SIOCINQ)
}

/// Bytes not yet acknowledged by the peer, the sequence number of FIN counted: tcp(7) SIOCOUTQ.
pub fn outq(fd: BorrowedFd<'_>) -> io::Result<usize> {
    queue_ioctl(fd, SIOCOUTQ)
}

/// Bytes not yet sent, the sequence number of FIN counted: SIOCOUTQNSD.
pub fn outq_unsent(fd: BorrowedFd<'_>) -> io::Result<usize> {
    queue_ioctl(fd, SIOCOUTQNSD)
}

fn queue_ioctl(fd: BorrowedFd<'_>, request: c_ulong) -> io::Result<usize> {
    let mut value: c_int = 0;
    // SAFETY: the three requests above write one int.
    let ret = unsafe { libc::ioctl(fd.as_raw_fd(), request as _, &mut value) };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(value.max(0) as usize) }
}

/// Whether nothing more can be received: poll(2) POLLRDHUP. The peer has sent FIN, or shutdown(2) was called.
pub fn read_shut_down(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let mut polled = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLRDHUP, revents: 0 };
    // SAFETY: one pollfd, and the call does not wait.
    let ret = unsafe { libc::poll(&mut polled, 1, 0) };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(polled.revents & libc::POLLRDHUP != 0) }
}

/// The name of interface `index` in the socket's network namespace: netdevice(7).
pub fn interface_name(fd: BorrowedFd<'_>, index: u32) -> io::Result<String> {
    // SAFETY: an ifreq is plain data, and zeroes are a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_ifru.ifru_ifindex = index as c_int;
    interface_ioctl(fd, SIOCGIFNAME, &mut request)?;
    let name = request.ifr_name.iter().map(|c| *c as u8);
    Ok(String::from_utf8_lossy(&name.take_while(|c| *c != 0).collect::<Vec<u8>>()).into_owned())
}

/// The index of interface `name` in the socket's network namespace: netdevice(7).
pub fn interface_index(fd: BorrowedFd<'_>, name: &str) -> io::Result<u32> {
    // SAFETY: as above.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    interface_ioctl(fd, SIOCGIFINDEX, &mut request)?;
    // SAFETY: the kernel has filled in this member of the union.
    Ok(unsafe { request.ifr_ifru.ifru_ifindex } as u32)
}

fn interface_ioctl(fd: BorrowedFd<'_>, request: c_ulong, arg: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: the two requests above read and write one ifreq.
    let ret = unsafe { libc::ioctl(fd.as_raw_fd(), request as _, arg) };
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
