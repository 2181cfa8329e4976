//! Regular files, directories, device nodes: offsets, flags, who shares what.

use crate::kernel::{c, fails_with, open, raw, read, read_exact, same_description, sys, write};
use crate::procfs;
use crate::stage::{Check, Fallible, Setup, Stage, holds, same};

pub const WORKLOADS: &[(&str, Setup)] = &[
    ("file-offsets", offsets),
    ("file-flags", flags),
    ("file-sharing", sharing),
    ("file-numbers", numbers),
    ("file-owner", owner),
    ("file-append", append),
    ("directory", directory),
    ("directory-as-place", directory_as_place),
    ("devices", devices),
];

fn make(path: &str, content: &[u8]) -> Fallible {
    std::fs::write(path, content).map_err(|e| format!("{path}: {e}"))
}

fn position(fd: i32) -> Fallible<i64> {
    sys!(lseek(fd, 0, libc::SEEK_CUR))
}

/// Offsets anywhere, also beyond the end and beyond 4 GiB; reading and writing goes on from there.
fn offsets(_: &mut Stage) -> Fallible<Check> {
    make("/offsets", b"0123456789")?;
    make("/written", b"")?;
    let start = open("/offsets", libc::O_RDONLY)?;
    let middle = open("/offsets", libc::O_RDONLY)?;
    sys!(lseek(middle, 4, libc::SEEK_SET))?;
    let far = open("/offsets", libc::O_RDWR)?;
    sys!(lseek(far, 5 << 32, libc::SEEK_SET))?;
    let written = open("/written", libc::O_RDWR)?;
    write(written, b"before ")?;
    let mut expected = "before ".to_owned();
    Ok(Box::new(move || {
        same("offsets", [0, 4, 5 << 32], [position(start)?, position(middle)?, position(far)?])?;
        same("read on", b"456".to_vec(), read(middle, 3)?)?;
        sys!(lseek(middle, 4, libc::SEEK_SET))?;
        write(written, b"after ")?;
        expected.push_str("after ");
        same("file that was written on", &expected, &procfs::text("/written")?)
    }))
}

/// Access modes and status flags, as they were.
fn flags(_: &mut Stage) -> Fallible<Check> {
    make("/flags", b"content")?;
    let modes = [
        libc::O_RDONLY,
        libc::O_WRONLY,
        libc::O_RDWR,
        libc::O_RDWR | libc::O_APPEND,
        libc::O_RDWR | libc::O_NONBLOCK,
        libc::O_WRONLY | libc::O_SYNC,
        libc::O_RDONLY | libc::O_NOATIME,
        libc::O_PATH,
        // Done once, at the first open; it must not be done again.
        libc::O_RDWR | libc::O_TRUNC | libc::O_CREAT,
    ];
    let fds = modes.iter().map(|mode| open("/flags", *mode)).collect::<Fallible<Vec<_>>>()?;
    write(fds[8], b"content")?;
    let late = open("/flags", libc::O_RDWR)?;
    sys!(fcntl(late, libc::F_SETFL, libc::O_APPEND | libc::O_NONBLOCK))?;
    let all: Vec<i32> = fds.into_iter().chain([late]).collect();
    let look = move || all.iter().map(|fd| sys!(fcntl(*fd, libc::F_GETFL))).collect::<Fallible<Vec<_>>>();
    let before = look()?;
    Ok(Box::new(move || {
        same("flags", &before, &look()?)?;
        same("content", "content", procfs::text("/flags")?.as_str())
    }))
}

/// One description under several numbers and in several processes has one offset; two opens have two.
fn sharing(stage: &mut Stage) -> Fallible<Check> {
    make("/shared", b"abcdefghijklmnopqrstuvwxyz")?;
    let first = open("/shared", libc::O_RDONLY)?;
    let dup = sys!(dup(first))? as i32;
    let apart = open("/shared", libc::O_RDONLY)?;
    let child = stage.member("child", move |_| {
        let own = open("/shared", libc::O_RDONLY)?;
        let far = sys!(fcntl(first, libc::F_DUPFD, 200))? as i32;
        let me = unsafe { libc::getpid() };
        Ok(Box::new(move || {
            for (fd, shared) in [(dup, true), (far, true), (apart, false), (own, false)] {
                same(format!("fd {fd} is one with fd {first}"), shared, same_description(me, first, me, fd)?)?;
            }
            holds(same_description(me, apart, 1, apart)?, "an inherited description is one with the parent's")?;
            holds(same_description(me, far, 1, first)?, "a dup of it is, too")
        }))
    })?;
    read(first, 5)?;
    read(apart, 2)?;
    let mut at = (5, 2);
    Ok(Box::new(move || {
        same("offsets", (at.0, at.0, at.1), (position(first)?, position(dup)?, position(apart)?))?;
        same("dup", true, same_description(1, first, 1, dup)?)?;
        same("separate open", false, same_description(1, first, 1, apart)?)?;
        same("the child's", true, same_description(1, first, child, first)?)?;
        read(dup, 1)?;
        at.0 += 1;
        same("an offset moves for both", at.0, position(first)?)
    }))
}

/// Descriptors keep their numbers, whatever lies between, and their close-on-exec flags.
fn numbers(_: &mut Stage) -> Fallible<Check> {
    let numbers = [7, 8, 63, 64, 255, 256, 700, 1000];
    let fd = open("/dev/null", libc::O_RDWR)?;
    for (n, to) in numbers.into_iter().enumerate() {
        sys!(dup3(fd, to, if n % 2 == 0 { libc::O_CLOEXEC } else { 0 }))?;
    }
    sys!(close(fd))?;
    let look = || -> Fallible<Vec<(i32, i64)>> {
        let dir = std::fs::read_dir("/proc/self/fd").map_err(|e| e.to_string())?;
        let listed: Vec<i32> = dir.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
        let mut all: Vec<_> =
            listed.into_iter().filter_map(|fd| Some((fd, sys!(fcntl(fd, libc::F_GETFD)).ok()?))).collect();
        all.sort_unstable();
        Ok(all)
    };
    let before = look()?;
    Ok(Box::new(move || same("descriptors and their flags", &before, &look()?)))
}

/// Who gets SIGIO, and which signal it is instead.
fn owner(_: &mut Stage) -> Fallible<Check> {
    let mut ends = [0; 2];
    sys!(pipe(ends.as_mut_ptr()))?;
    sys!(fcntl(ends[0], libc::F_SETOWN, libc::getpid()))?;
    const F_SETSIG: i32 = 10;
    const F_GETSIG: i32 = 11;
    sys!(fcntl(ends[0], F_SETSIG, 44))?;
    Ok(Box::new(move || {
        same("owner", 1, sys!(fcntl(ends[0], libc::F_GETOWN))?)?;
        same("signal", 44, sys!(fcntl(ends[0], F_GETSIG))?)
    }))
}

/// O_APPEND writes at the end, whoever else has written.
fn append(stage: &mut Stage) -> Fallible<Check> {
    make("/append", b"")?;
    let fd = open("/append", libc::O_WRONLY | libc::O_APPEND)?;
    write(fd, b"a")?;
    stage.member("child", move |_| {
        let own = open("/append", libc::O_WRONLY | libc::O_APPEND)?;
        write(own, b"b")?;
        Ok(Box::new(move || write(own, b"b")))
    })?;
    let mut round = 0;
    Ok(Box::new(move || {
        round += 1;
        write(fd, b"a")?;
        crate::stage::eventually("the child appends", || {
            let text = procfs::text("/append").unwrap_or_default();
            text.starts_with("ab") && text.len() == 2 + 2 * round && text.matches('a').count() == round + 1
        })
    }))
}

/// A directory that is half read: the rest comes after, nothing twice.
fn directory(_: &mut Stage) -> Fallible<Check> {
    std::fs::create_dir("/many").map_err(|e| e.to_string())?;
    let names: std::collections::BTreeSet<String> = (0..200).map(|n| format!("name-{n:03}")).collect();
    for name in &names {
        make(&format!("/many/{name}"), b"")?;
    }
    let fd = open("/many", libc::O_RDONLY | libc::O_DIRECTORY)?;
    let part = move |size: usize| -> Fallible<Vec<String>> {
        let mut buf = vec![0u8; size];
        let count = raw!(SYS_getdents64, fd, buf.as_mut_ptr(), size)? as usize;
        let (mut at, mut found) = (0, Vec::new());
        while at < count {
            let length = u16::from_ne_bytes([buf[at + 16], buf[at + 17]]) as usize;
            let name: Vec<u8> = buf[at + 19..at + length].iter().copied().take_while(|b| *b != 0).collect();
            found.push(String::from_utf8_lossy(&name).into_owned());
            at += length;
        }
        Ok(found)
    };
    let mut seen = part(1000)?;
    holds(seen.len() > 10 && seen.len() < 100, "a part of the directory")?;
    let at = position(fd)?;
    Ok(Box::new(move || {
        if seen.len() < 100 {
            same("position in a directory", at, position(fd)?)?;
        }
        loop {
            let more = part(4096)?;
            if more.is_empty() {
                break;
            }
            seen.extend(more);
        }
        let mut sorted = seen.clone();
        sorted.sort_unstable();
        sorted.retain(|n| n.starts_with("name"));
        same("entries of a directory", names.iter().cloned().collect::<Vec<_>>(), sorted)
    }))
}

/// An open directory serves openat(2); so does one that was opened as a path only.
fn directory_as_place(_: &mut Stage) -> Fallible<Check> {
    std::fs::create_dir_all("/place/below").map_err(|e| e.to_string())?;
    make("/place/below/file", b"found")?;
    let (dir, path) = (open("/place", libc::O_DIRECTORY)?, open("/place/below", libc::O_PATH | libc::O_DIRECTORY)?);
    Ok(Box::new(move || {
        for (place, name) in [(dir, "below/file"), (path, "file")] {
            let fd = sys!(openat(place, c(name).as_ptr(), libc::O_RDONLY))? as i32;
            same("content", b"found".to_vec(), read(fd, 100)?)?;
            sys!(close(fd))?;
        }
        Ok(())
    }))
}

/// null, zero, random, urandom, full: the nodes that every container has.
fn devices(_: &mut Stage) -> Fallible<Check> {
    let all = [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9)];
    let mut fds = Vec::new();
    for (name, major, minor) in all {
        fds.push((name, open(&format!("/dev/{name}"), libc::O_RDWR)?, libc::makedev(major, minor)));
    }
    Ok(Box::new(move || {
        for (name, fd, device) in &fds {
            let mut stat: libc::stat = unsafe { std::mem::zeroed() };
            sys!(fstat(*fd, &mut stat))?;
            same(format!("/dev/{name}"), (libc::S_IFCHR, *device), (stat.st_mode & libc::S_IFMT, stat.st_rdev))?;
        }
        let [null, zero, full, random, urandom] = [0, 1, 2, 3, 4].map(|n: usize| fds[n].1);
        same("null", Vec::new(), read(null, 8)?)?;
        write(null, b"gone")?;
        same("zero", vec![0; 8], read_exact(zero, 8)?)?;
        fails_with("full", libc::ENOSPC, write(full, b"x").map(|()| 0))?;
        holds(read_exact(random, 32)? != read_exact(urandom, 32)?, "random differs")
    }))
}
