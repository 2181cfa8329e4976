//! Pairs of unix sockets and what is in their queues.

use crate::kernel::{fails_with, noise, read, read_exact, sys, write};
use crate::stage::{Check, Fallible, Setup, Stage, same};

pub const WORKLOADS: &[(&str, Setup)] = &[
    ("unix-stream", stream),
    ("unix-datagram", datagram),
    ("unix-seqpacket", seqpacket),
    ("unix-half-closed", half_closed),
    ("unix-closed-peer", closed_peer),
    ("unix-options", options),
    ("unix-between", between),
];

fn pair(kind: i32) -> Fallible<[i32; 2]> {
    let mut ends = [0; 2];
    sys!(socketpair(
        libc::AF_UNIX,
        kind | libc::SOCK_NONBLOCK,
        0,
        ends.as_mut_ptr()
    ))?;
    Ok(ends)
}

fn option(fd: i32, name: i32) -> Fallible<i32> {
    let (mut value, mut size) = (0i32, 4u32);
    sys!(getsockopt(
        fd,
        libc::SOL_SOCKET,
        name,
        (&raw mut value).cast(),
        &mut size
    ))?;
    Ok(value)
}

/// Different content in both directions, and nothing.
fn stream(_: &mut Stage) -> Fallible<Check> {
    let (ends, empty) = (
        pair(libc::SOCK_STREAM)?,
        pair(libc::SOCK_STREAM | libc::SOCK_CLOEXEC)?,
    );
    let (there, back) = (noise(1, 50_000), noise(2, 321));
    let fill = move || -> Fallible {
        write(ends[0], &noise(1, 50_000))?;
        write(ends[1], &noise(2, 321))
    };
    fill()?;
    Ok(Box::new(move || {
        same("content", &there, &read_exact(ends[1], there.len())?)?;
        same(
            "content, the other way",
            &back,
            &read_exact(ends[0], back.len())?,
        )?;
        for end in empty {
            fails_with("nothing is there", libc::EAGAIN, read(end, 1).map(|_| 0))?;
            same("close-on-exec", 1, sys!(fcntl(end, libc::F_GETFD))?)?;
        }
        write(empty[0], b"still a pair")?;
        same(
            "still a pair",
            b"still a pair".to_vec(),
            read(empty[1], 100)?,
        )?;
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
            same(
                format!("message of {size} bytes"),
                noise(size as u64, size),
                read(ends[1], 20_000)?,
            )?;
            let half = noise(size as u64, size)[..size / 2].to_vec();
            same(
                format!("message of {} bytes", size / 2),
                half,
                read(ends[0], 20_000)?,
            )?;
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
        same(
            "what was sent before",
            expected.to_vec(),
            read(ends[1], 100)?,
        )?;
        expected = b"";
        same("end of file", Vec::new(), read(ends[1], 100)?)?;
        fails_with(
            "a closed direction",
            libc::EPIPE,
            write(ends[0], b"x").map(|()| 0),
        )?;
        write(ends[1], b"the other way")?;
        same(
            "the other way is open",
            b"the other way".to_vec(),
            read(ends[0], 100)?,
        )
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
            fails_with(
                "nobody listens",
                libc::EPIPE,
                write(ends[0], b"x").map(|()| 0),
            )?;
        }
        expected = b"";
        Ok(())
    }))
}

/// Options that setsockopt(2) left.
fn options(_: &mut Stage) -> Fallible<Check> {
    let ends = pair(libc::SOCK_STREAM)?;
    let set = |name: i32, value: i32| {
        sys!(setsockopt(
            ends[0],
            libc::SOL_SOCKET,
            name,
            (&raw const value).cast(),
            4
        ))
        .map(drop)
    };
    set(libc::SO_SNDBUF, 50_000)?;
    set(libc::SO_RCVBUF, 60_000)?;
    set(libc::SO_PASSCRED, 1)?;
    set(libc::SO_RCVLOWAT, 3)?;
    let time = libc::timeval {
        tv_sec: 7,
        tv_usec: 500_000,
    };
    sys!(setsockopt(
        ends[0],
        libc::SOL_SOCKET,
        libc::SO_RCVTIMEO,
        (&raw const time).cast(),
        16
    ))?;
    let look = move || -> Fallible<(Vec<i32>, i64)> {
        let names = [
            libc::SO_SNDBUF,
            libc::SO_RCVBUF,
            libc::SO_PASSCRED,
            libc::SO_RCVLOWAT,
        ];
        let values = names
            .iter()
            .map(|name| option(ends[0], *name))
            .collect::<Fallible<Vec<_>>>()?;
        let (mut time, mut size): (libc::timeval, u32) = (unsafe { std::mem::zeroed() }, 16);
        sys!(getsockopt(
            ends[0],
            libc::SOL_SOCKET,
            libc::SO_RCVTIMEO,
            (&raw mut time).cast(),
            &mut size
        ))?;
        Ok((values, time.tv_sec * 1000 + time.tv_usec / 1000))
    };
    let before = look()?;
    Ok(Box::new(move || same("options", &before, &look()?)))
}

/// Between parent and child, with a request on its way.
fn between(stage: &mut Stage) -> Fallible<Check> {
    let mut ends = [0; 2];
    sys!(socketpair(
        libc::AF_UNIX,
        libc::SOCK_SEQPACKET,
        0,
        ends.as_mut_ptr()
    ))?;
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
