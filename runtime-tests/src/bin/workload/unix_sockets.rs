//! Pairs of unix sockets and what is in their queues.

use crate::kernel::{fails_with, noise, read, read_exact, sys, write};
use crate::stage::{Check, Fallible, Setup, Stage, fork, same};

pub const WORKLOADS: &[(&str, Setup)] = &[
    ("unix-stream", stream),
    ("unix-datagram", datagram),
    ("unix-seqpacket", seqpacket),
    ("unix-half-closed", half_closed),
    ("unix-closed-peer", closed_peer),
    ("unix-options", options),
    ("unix-between", between),
    ("unix-reset", reset),
    ("unix-senders", senders),
    ("unix-peeking", peeking),
    ("unix-peers", peers),
    ("unix-unread", unread),
];

fn pair(kind: i32) -> Fallible<[i32; 2]> {
    let mut ends = [0; 2];
    sys!(socketpair(libc::AF_UNIX, kind | libc::SOCK_NONBLOCK, 0, ends.as_mut_ptr()))?;
    Ok(ends)
}

fn option(fd: i32, name: i32) -> Fallible<i32> {
    let (mut value, mut size) = (0i32, 4u32);
    sys!(getsockopt(fd, libc::SOL_SOCKET, name, (&raw mut value).cast(), &mut size))?;
    Ok(value)
}

/// Different content in both directions, and nothing.
fn stream(_: &mut Stage) -> Fallible<Check> {
    let (ends, empty) = (pair(libc::SOCK_STREAM)?, pair(libc::SOCK_STREAM | libc::SOCK_CLOEXEC)?);
    let (there, back) = (noise(1, 50_000), noise(2, 321));
    let fill = move || -> Fallible {
        write(ends[0], &noise(1, 50_000))?;
        write(ends[1], &noise(2, 321))
    };
    fill()?;
    Ok(Box::new(move || {
        same("content", &there, &read_exact(ends[1], there.len())?)?;
        same("content, the other way", &back, &read_exact(ends[0], back.len())?)?;
        for end in empty {
            fails_with("nothing is there", libc::EAGAIN, read(end, 1).map(|_| 0))?;
            same("close-on-exec", 1, sys!(fcntl(end, libc::F_GETFD))?)?;
        }
        write(empty[0], b"still a pair")?;
        same("still a pair", b"still a pair".to_vec(), read(empty[1], 100)?)?;
        fill()
    }))
}

/// Messages keep their bounds, empty ones too.
fn messages(kind: i32) -> Fallible<Check> {
    let ends = pair(kind)?;
    let sizes = [1, 500, 0, 9000, 33];
    let fill = move || {
        sizes.iter().try_for_each(|size| {
            let bytes = noise(*size as u64, *size);
            sys!(send(ends[0], bytes.as_ptr().cast(), bytes.len(), 0))?;
            sys!(send(ends[1], bytes.as_ptr().cast(), bytes.len() / 2, 0)).map(drop)
        })
    };
    fill()?;
    Ok(Box::new(move || {
        for size in sizes {
            same(format!("message of {size} bytes"), noise(size as u64, size), read(ends[1], 20_000)?)?;
            let half = noise(size as u64, size)[..size / 2].to_vec();
            same(format!("message of {} bytes", size / 2), half, read(ends[0], 20_000)?)?;
        }
        fails_with("nothing more", libc::EAGAIN, read(ends[1], 1).map(|_| 0))?;
        same("kind", kind, option(ends[0], libc::SO_TYPE)?)?;
        fill()
    }))
}

fn datagram(_: &mut Stage) -> Fallible<Check> {
    messages(libc::SOCK_DGRAM)
}

fn seqpacket(_: &mut Stage) -> Fallible<Check> {
    messages(libc::SOCK_SEQPACKET)
}

/// Shut down in one direction, with content before the end.
fn half_closed(_: &mut Stage) -> Fallible<Check> {
    let ends = pair(libc::SOCK_STREAM)?;
    write(ends[0], b"the last")?;
    sys!(shutdown(ends[0], libc::SHUT_WR))?;
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    let mut expected: &[u8] = b"the last";
    Ok(Box::new(move || {
        same("what was sent before", expected.to_vec(), read(ends[1], 100)?)?;
        expected = b"";
        same("end of file", Vec::new(), read(ends[1], 100)?)?;
        fails_with("a closed direction", libc::EPIPE, write(ends[0], b"x").map(|()| 0))?;
        write(ends[1], b"the other way")?;
        same("the other way is open", b"the other way".to_vec(), read(ends[0], 100)?)
    }))
}

/// The other end is closed, and its last words are unread.
fn closed_peer(_: &mut Stage) -> Fallible<Check> {
    let (stream, packets) = (pair(libc::SOCK_STREAM)?, pair(libc::SOCK_SEQPACKET)?);
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    for ends in [stream, packets] {
        write(ends[1], b"farewell")?;
        sys!(close(ends[1]))?;
    }
    let mut expected: &[u8] = b"farewell";
    Ok(Box::new(move || {
        for ends in [stream, packets] {
            same("last words", expected.to_vec(), read(ends[0], 100)?)?;
            same("end of file", Vec::new(), read(ends[0], 100)?)?;
            fails_with("nobody listens", libc::EPIPE, write(ends[0], b"x").map(|()| 0))?;
        }
        expected = b"";
        Ok(())
    }))
}

/// Options that setsockopt(2) left.
fn options(_: &mut Stage) -> Fallible<Check> {
    let ends = pair(libc::SOCK_STREAM)?;
    let set = |name: i32, value: i32| {
        sys!(setsockopt(ends[0], libc::SOL_SOCKET, name, (&raw const value).cast(), 4)).map(drop)
    };
    set(libc::SO_SNDBUF, 50_000)?;
    set(libc::SO_RCVBUF, 60_000)?;
    set(libc::SO_PASSCRED, 1)?;
    set(libc::SO_RCVLOWAT, 3)?;
    // A program of one instruction that lets 0xffff bytes through: struct sock_filter and struct sock_fprog.
    let pass = [0x06u64 | 0xffff << 32];
    let program = (1u16, pass.as_ptr());
    sys!(setsockopt(ends[0], libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, (&raw const program).cast(), 16))?;
    let time = libc::timeval { tv_sec: 7, tv_usec: 500_000 };
    sys!(setsockopt(ends[0], libc::SOL_SOCKET, libc::SO_RCVTIMEO, (&raw const time).cast(), 16))?;
    let look = move || -> Fallible<(Vec<i32>, i64)> {
        let names = [libc::SO_SNDBUF, libc::SO_RCVBUF, libc::SO_PASSCRED, libc::SO_RCVLOWAT];
        let values = names.iter().map(|name| option(ends[0], *name)).collect::<Fallible<Vec<_>>>()?;
        let (mut time, mut size): (libc::timeval, u32) = (unsafe { std::mem::zeroed() }, 16);
        sys!(getsockopt(ends[0], libc::SOL_SOCKET, libc::SO_RCVTIMEO, (&raw mut time).cast(), &mut size))?;
        let (mut filter, mut length) = ([0u64; 4], 4u32);
        sys!(getsockopt(ends[0], libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, filter.as_mut_ptr().cast(), &mut length))?;
        same("filter", (pass[0], 1), (filter[0], length))?;
        Ok((values, time.tv_sec * 1000 + time.tv_usec / 1000))
    };
    let before = look()?;
    Ok(Box::new(move || same("options", &before, &look()?)))
}

/// Between parent and child, with a request on its way.
fn between(stage: &mut Stage) -> Fallible<Check> {
    let mut ends = [0; 2];
    sys!(socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET, 0, ends.as_mut_ptr()))?;
    stage.member("child", move |_| {
        sys!(close(ends[0]))?;
        std::thread::spawn(move || {
            while let Ok(request) = read(ends[1], 100) {
                let answer: Vec<u8> = request.into_iter().rev().collect();
                if answer.is_empty() || write(ends[1], &answer).is_err() {
                    break;
                }
            }
        });
        Ok(Box::new(|| Ok(())))
    })?;
    sys!(close(ends[1]))?;
    write(ends[0], b"123")?;
    Ok(Box::new(move || {
        write(ends[0], b"abc")?;
        same("first answer", b"321".to_vec(), read(ends[0], 100)?)?;
        same("second answer", b"cba".to_vec(), read(ends[0], 100)?)?;
        write(ends[0], b"123")
    }))
}

/// The other end was closed before it had read everything: an error that the next call gives, once.
fn reset(_: &mut Stage) -> Fallible<Check> {
    let (stream, packets) = (pair(libc::SOCK_STREAM)?, pair(libc::SOCK_SEQPACKET)?);
    for ends in [stream, packets] {
        write(ends[0], b"never read")?;
    }
    write(stream[1], b"farewell")?;
    for ends in [stream, packets] {
        sys!(close(ends[1]))?;
    }
    let mut first = true;
    Ok(Box::new(move || {
        if first {
            same("last words", b"farewell".to_vec(), read(stream[0], 100)?)?;
            for ends in [stream, packets] {
                fails_with("the peer had not read all", libc::ECONNRESET, read(ends[0], 100).map(|_| 0))?;
            }
            first = false;
        }
        for ends in [stream, packets] {
            same("end of file", Vec::new(), read(ends[0], 100)?)?;
        }
        Ok(())
    }))
}

/// A message with who sent it.
fn read_with_sender(fd: i32) -> Fallible<(Vec<u8>, libc::ucred)> {
    let (mut bytes, mut control) = ([0u8; 100], [0u64; 8]);
    let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = 64;
    let got = sys!(recvmsg(fd, &mut message, 0))? as usize;
    let kind = libc::SOL_SOCKET as u64 | (libc::SCM_CREDENTIALS as u64) << 32;
    same("control message", [28, kind], [control[0], control[1]])?;
    let sender = unsafe { control[2..].as_ptr().cast::<libc::ucred>().read() };
    Ok((bytes[..got].to_vec(), sender))
}

/// Messages know who sent them: the init, a child that lives, one of another user, and one that has ended.
fn senders(stage: &mut Stage) -> Fallible<Check> {
    let kinds = [libc::SOCK_STREAM, libc::SOCK_DGRAM, libc::SOCK_SEQPACKET];
    let mut all = Vec::new();
    for kind in kinds {
        let ends = pair(kind)?;
        let on = 1i32;
        let to = (&raw const on).cast();
        sys!(setsockopt(ends[1], libc::SOL_SOCKET, libc::SO_PASSCRED, to, 4))?;
        write(ends[0], b"init")?;
        all.push(ends);
    }
    let member = {
        let all = all.clone();
        stage.member("child", move |_| {
            // Real ids are what a message shows.
            sys!(setresgid(77, 0, 0))?;
            sys!(setresuid(78, 0, 0))?;
            for ends in &all {
                write(ends[0], b"child")?;
            }
            sys!(setresuid(0, 0, 0))?;
            sys!(setresgid(0, 0, 0))?;
            Ok(Box::new(|| Ok(())))
        })?
    };
    let gone = {
        let all = all.clone();
        fork(move || all.iter().for_each(|ends| drop(write(ends[0], b"gone"))))?
    };
    sys!(waitpid(gone, std::ptr::null_mut(), 0))?;
    let mut waiting = true;
    Ok(Box::new(move || {
        let first = std::mem::take(&mut waiting);
        for ends in &all {
            if !first {
                write(ends[0], b"init")?;
                same("pid", 1, read_with_sender(ends[1])?.1.pid)?;
                continue;
            }
            for (what, pids, uid, gid) in [
                (&b"init"[..], [1, 1], 0, 0),
                (b"child", [member, member], 78, 77),
                // Nobody can send in the name of a process that is no more.
                (b"gone", [gone, 0], 0, 0),
            ] {
                let (bytes, sender) = read_with_sender(ends[1])?;
                same("message", what.to_vec(), bytes)?;
                same("user and group", (uid, gid), (sender.uid, sender.gid))?;
                if !pids.contains(&sender.pid) {
                    return Err(format!("pid {} is none of {pids:?}", sender.pid));
                }
            }
        }
        Ok(())
    }))
}

/// Where the next look at the queue begins.
fn peeking(_: &mut Stage) -> Fallible<Check> {
    let ends = pair(libc::SOCK_SEQPACKET)?;
    let zero = 0i32;
    sys!(setsockopt(ends[1], libc::SOL_SOCKET, libc::SO_PEEK_OFF, (&raw const zero).cast(), 4))?;
    let look = move || -> Fallible<Vec<u8>> {
        let mut bytes = [0u8; 100];
        let to = bytes.as_mut_ptr().cast();
        let got = sys!(recv(ends[1], to, 100, libc::MSG_PEEK))?;
        Ok(bytes[..got as usize].to_vec())
    };
    let fill = move || -> Fallible {
        write(ends[0], b"first")?;
        write(ends[0], b"second")?;
        same("first look", b"first".to_vec(), look()?)
    };
    fill()?;
    Ok(Box::new(move || {
        same("second look", b"second".to_vec(), look()?)?;
        same("first", b"first".to_vec(), read(ends[1], 100)?)?;
        same("second", b"second".to_vec(), read(ends[1], 100)?)?;
        same("offset", 0, option(ends[1], libc::SO_PEEK_OFF)?)?;
        fill()
    }))
}

/// SO_PEERCRED: who made the pair. (The pid cannot be kept.)
fn peers(_: &mut Stage) -> Fallible<Check> {
    sys!(setegid(77))?;
    sys!(seteuid(78))?;
    let ends = pair(libc::SOCK_STREAM)?;
    sys!(seteuid(0))?;
    sys!(setegid(0))?;
    Ok(Box::new(move || {
        for end in ends {
            let (mut maker, mut size): (libc::ucred, u32) = (unsafe { std::mem::zeroed() }, 12);
            sys!(getsockopt(end, libc::SOL_SOCKET, libc::SO_PEERCRED, (&raw mut maker).cast(), &mut size))?;
            same("user and group", (78, 77), (maker.uid, maker.gid))?;
        }
        Ok(())
    }))
}

/// Messages that stay unread until the last check; an empty one among them.
fn unread(_: &mut Stage) -> Fallible<Check> {
    let ends = pair(libc::SOCK_DGRAM)?;
    for message in [&b"one"[..], b"", b"two"] {
        sys!(send(ends[0], message.as_ptr().cast(), message.len(), 0))?;
    }
    let mut first = true;
    Ok(Box::new(move || {
        if std::mem::take(&mut first) {
            return Ok(());
        }
        for message in [&b"one"[..], b"", b"two"] {
            same("message", message.to_vec(), read(ends[1], 100)?)?;
        }
        Ok(())
    }))
}
