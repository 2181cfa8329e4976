//! Pipes and what is in them.

use crate::kernel::{fails_with, noise, open, read, read_exact, sys, write};
use crate::stage::{Check, Fallible, Setup, Stage, same};

pub const WORKLOADS: &[(&str, Setup)] = &[
    ("pipe-content", content),
    ("pipe-full", full),
    ("pipe-size", size),
    ("pipe-packets", packets),
    ("pipe-closed-ends", closed_ends),
    ("pipe-between", between),
    ("pipe-reopened", reopened),
];

fn pipe(flags: i32) -> Fallible<[i32; 2]> {
    let mut ends = [0; 2];
    sys!(pipe2(ends.as_mut_ptr(), flags))?;
    Ok(ends)
}

fn waiting(fd: i32) -> Fallible<i32> {
    let mut count = 0;
    sys!(ioctl(fd, libc::FIONREAD, &mut count))?;
    Ok(count)
}

/// Some bytes, written in several goes and read in part; and an empty pipe.
fn content(_: &mut Stage) -> Fallible<Check> {
    let (some, empty) = (pipe(libc::O_CLOEXEC)?, pipe(libc::O_NONBLOCK)?);
    let bytes = noise(1, 10_000);
    for part in bytes.chunks(777) {
        write(some[1], part)?;
    }
    read_exact(some[0], 1234)?;
    let mut expected = bytes[1234..].to_vec();
    Ok(Box::new(move || {
        // O_LARGEFILE means nothing to a pipe, and has it when it was opened by name.
        let flags = |fd: i32| -> Fallible<(i64, i64)> {
            const O_LARGEFILE: i64 = 0o100_000;
            Ok((sys!(fcntl(fd, libc::F_GETFL))? & !O_LARGEFILE, sys!(fcntl(fd, libc::F_GETFD))?))
        };
        let (read_only, write_only) = (i64::from(libc::O_RDONLY), i64::from(libc::O_WRONLY));
        same("flags", [(read_only, 1), (write_only, 1)], [flags(some[0])?, flags(some[1])?])?;
        let nonblock = i64::from(libc::O_NONBLOCK);
        same("flags", [(nonblock, 0), (nonblock | write_only, 0)], [flags(empty[0])?, flags(empty[1])?])?;
        same("bytes in the pipe", expected.len() as i32, waiting(some[0])?)?;
        same("content of a pipe", &expected, &read_exact(some[0], expected.len())?)?;
        fails_with("read of an empty pipe", libc::EAGAIN, read(empty[0], 1).map(|_| 0))?;
        expected = noise(2, 4321);
        write(some[1], &expected)
    }))
}

/// Full to the last byte.
fn full(_: &mut Stage) -> Fallible<Check> {
    let ends = pipe(libc::O_NONBLOCK)?;
    let bytes = noise(3, 65536);
    write(ends[1], &bytes)?;
    Ok(Box::new(move || {
        fails_with("write to a full pipe", libc::EAGAIN, write(ends[1], b"x").map(|()| 0))?;
        same("content of a full pipe", &bytes, &read_exact(ends[0], bytes.len())?)?;
        fails_with("nothing more", libc::EAGAIN, read(ends[0], 1).map(|_| 0))?;
        write(ends[1], &bytes)
    }))
}

/// Sizes other than the default.
fn size(_: &mut Stage) -> Fallible<Check> {
    let (large, small) = (pipe(libc::O_NONBLOCK)?, pipe(0)?);
    sys!(fcntl(large[1], libc::F_SETPIPE_SZ, 1 << 20))?;
    sys!(fcntl(small[1], libc::F_SETPIPE_SZ, 4096))?;
    let bytes = noise(4, 900_000);
    write(large[1], &bytes)?;
    write(small[1], &bytes[..4096])?;
    Ok(Box::new(move || {
        let sizes = [sys!(fcntl(large[0], libc::F_GETPIPE_SZ))?, sys!(fcntl(small[0], libc::F_GETPIPE_SZ))?];
        same("sizes", [1 << 20, 4096], sizes)?;
        same("content of a large pipe", &bytes, &read_exact(large[0], bytes.len())?)?;
        same("content of a small pipe", &bytes[..4096], &read_exact(small[0], 4096)?[..])?;
        write(large[1], &bytes)?;
        write(small[1], &bytes[..4096])
    }))
}

/// O_DIRECT: what is written in one go is read in one go.
fn packets(_: &mut Stage) -> Fallible<Check> {
    let ends = pipe(libc::O_DIRECT | libc::O_NONBLOCK)?;
    let sizes = [1, 100, 4096, 7, 3000];
    let fill = move || sizes.iter().try_for_each(|size| write(ends[1], &noise(*size as u64, *size)));
    fill()?;
    Ok(Box::new(move || {
        for size in sizes {
            same(format!("packet of {size} bytes"), noise(size as u64, size), read(ends[0], 5000)?)?;
        }
        fails_with("nothing more", libc::EAGAIN, read(ends[0], 1).map(|_| 0))?;
        fill()
    }))
}

/// One end is gone: end of file after the content, or a broken pipe.
fn closed_ends(_: &mut Stage) -> Fallible<Check> {
    let (no_writer, no_reader) = (pipe(0)?, pipe(0)?);
    write(no_writer[1], b"last words")?;
    sys!(close(no_writer[1]))?;
    sys!(close(no_reader[0]))?;
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    let mut expected: &[u8] = b"last words";
    Ok(Box::new(move || {
        same("what the writer left", expected.to_vec(), read(no_writer[0], 100)?)?;
        same("end of file", Vec::new(), read(no_writer[0], 100)?)?;
        expected = b"";
        fails_with("write without a reader", libc::EPIPE, write(no_reader[1], b"x").map(|()| 0))
    }))
}

/// Between parent and children: a chain through which numbers go on flowing.
fn between(stage: &mut Stage) -> Fallible<Check> {
    let (down, across, up) = (pipe(0)?, pipe(0)?, pipe(0)?);
    let relay = |stage: &mut Stage, name: &str, from: [i32; 2], to: [i32; 2], others: [i32; 2]| {
        stage.member(name, move |_| {
            for fd in [from[1], to[0], others[0], others[1]] {
                sys!(close(fd))?;
            }
            std::thread::spawn(move || {
                while let Ok(bytes) = read_exact(from[0], 8) {
                    let number = u64::from_ne_bytes(bytes.try_into().expect("8 bytes were read"));
                    if write(to[1], &(number + 1).to_ne_bytes()).is_err() {
                        break;
                    }
                }
            });
            Ok(Box::new(|| Ok(())))
        })
    };
    relay(stage, "first", down, across, up)?;
    relay(stage, "second", across, up, down)?;
    for fd in [down[0], across[0], across[1], up[1]] {
        sys!(close(fd))?;
    }
    // The answers of these lie in the last pipe, or somewhere on the way.
    let mut sent = 0u64;
    let mut send = move |count: u64| -> Fallible<Vec<u64>> {
        (sent..sent + count).try_for_each(|n| write(down[1], &n.to_ne_bytes()))?;
        sent += count;
        Ok((sent - count..sent).map(|n| n + 2).collect())
    };
    let mut expected = send(100)?;
    Ok(Box::new(move || {
        expected.extend(send(10)?);
        let mut got = Vec::new();
        for _ in 0..expected.len() {
            got.push(u64::from_ne_bytes(read_exact(up[0], 8)?.try_into().map_err(|_| "8 bytes")?));
        }
        same("numbers through two children", &expected, &got)?;
        expected = send(50)?;
        Ok(())
    }))
}

/// One pipe opened once more by /proc: other flags, another description, the same bytes.
fn reopened(_: &mut Stage) -> Fallible<Check> {
    let ends = pipe(0)?;
    let second = open(&format!("/proc/self/fd/{}", ends[0]), libc::O_RDONLY | libc::O_NONBLOCK)?;
    let both = open(&format!("/proc/self/fd/{}", ends[0]), libc::O_RDWR)?;
    write(ends[1], b"abcdef")?;
    let mut expected: &[u8] = b"abcdef";
    Ok(Box::new(move || {
        same("read through the second description", expected[..3].to_vec(), read(second, 3)?)?;
        same("read through the first", expected[3..].to_vec(), read(ends[0], 100)?)?;
        fails_with("and it does not block", libc::EAGAIN, read(second, 1).map(|_| 0))?;
        write(both, b"ghijkl")?;
        same("flags", libc::O_RDWR, sys!(fcntl(both, libc::F_GETFL))? as i32 & libc::O_ACCMODE)?;
        same("one description or two", false, crate::kernel::same_description(1, ends[0], 1, second)?)?;
        expected = b"ghijkl";
        Ok(())
    }))
}
