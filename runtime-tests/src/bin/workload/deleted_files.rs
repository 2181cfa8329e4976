//! Files that are in use and have no name any more.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use crate::kernel::{open, read_exact, sys, write};
use crate::memory_map::{Map, PAGE};
use crate::stage::{Check, Fallible, Setup, Stage, holds, same};

pub const WORKLOADS: &[(&str, Setup)] = &[
    ("deleted-open", held),
    ("deleted-shared", shared),
    ("deleted-mapped", mapped),
    ("deleted-name-taken", name_taken),
];

fn text<T>(outcome: std::io::Result<T>) -> Fallible<T> {
    outcome.map_err(|e| e.to_string())
}

fn new(path: &str, content: &[u8], flags: i32) -> Fallible<i32> {
    text(std::fs::write(path, content))?;
    open(path, flags)
}

/// 2 MiB of content behind 4 GiB of nothing, with its owner and mode; it can be written on.
fn held(_: &mut Stage) -> Fallible<Check> {
    const FAR: i64 = 4 << 30;
    let fd = new("/held", b"start", libc::O_RDWR)?;
    sys!(lseek(fd, FAR, libc::SEEK_SET))?;
    let much: Vec<u8> = (0..2 << 20).map(|n: u32| (n / 7) as u8).collect();
    write(fd, &much)?;
    sys!(lseek(fd, 2, libc::SEEK_SET))?;
    text(std::os::unix::fs::chown("/held", Some(1000), Some(1001)))?;
    text(std::fs::set_permissions("/held", PermissionsExt::from_mode(0o640)))?;
    text(std::fs::remove_file("/held"))?;
    let mut size = FAR + much.len() as i64;
    Ok(Box::new(move || {
        let stat = text(std::fs::metadata(format!("/proc/self/fd/{fd}")))?;
        same("links", 0, stat.nlink())?;
        same("owner", (1000, 1001, 0o100640), (stat.uid(), stat.gid(), stat.mode()))?;
        same("size", size as u64, stat.size())?;
        holds(stat.blocks() < 16384, "its hole is no content")?;
        same("offset", 2, sys!(lseek(fd, 0, libc::SEEK_CUR))?)?;
        sys!(lseek(fd, FAR, libc::SEEK_SET))?;
        holds(read_exact(fd, much.len())? == much, "content")?;
        write(fd, b"more")?;
        size = size.max(FAR + much.len() as i64 + 4);
        sys!(lseek(fd, 2, libc::SEEK_SET)).map(drop)
    }))
}

/// Opened twice, by two ways: one file.
fn shared(_: &mut Stage) -> Fallible<Check> {
    let writer = new("/both", b"one", libc::O_WRONLY)?;
    let reader = open("/both", libc::O_RDONLY)?;
    text(std::fs::remove_file("/both"))?;
    let mut expected = b"one".to_vec();
    sys!(lseek(writer, 0, libc::SEEK_END))?;
    Ok(Box::new(move || {
        write(writer, b"+")?;
        expected.push(b'+');
        sys!(lseek(reader, 0, libc::SEEK_SET))?;
        same("content", expected.clone(), read_exact(reader, expected.len())?)
    }))
}

/// Mapped, shared and private, and open: what is written to the shared mapping is in the file.
fn mapped(_: &mut Stage) -> Fallible<Check> {
    let fd = new("/mapped", &[7; 2 * PAGE], libc::O_RDWR)?;
    let (all, flags) = (libc::PROT_READ | libc::PROT_WRITE, [libc::MAP_SHARED, libc::MAP_PRIVATE]);
    let [shared, private] = flags.map(|flags| Map::of_file(2 * PAGE, all, flags, fd, 0));
    let (mut shared, mut private) = (shared?, private?);
    text(std::fs::remove_file("/mapped"))?;
    private.bytes_mut()[0] = 1;
    let mut n = 8;
    Ok(Box::new(move || {
        same("private", (1, 7), (private.bytes()[0], private.bytes()[PAGE]))?;
        shared.bytes_mut()[10] = n;
        sys!(lseek(fd, 10, libc::SEEK_SET))?;
        same("file", vec![n, 7], read_exact(fd, 2)?)?;
        n += 1;
        Ok(())
    }))
}

/// Another file has the name now.
fn name_taken(_: &mut Stage) -> Fallible<Check> {
    let old = new("/name", b"old", libc::O_RDONLY)?;
    text(std::fs::remove_file("/name"))?;
    let now = new("/name", b"now", libc::O_RDONLY)?;
    Ok(Box::new(move || {
        for (fd, expected) in [(old, b"old"), (now, b"now")] {
            sys!(lseek(fd, 0, libc::SEEK_SET))?;
            same("content", expected.to_vec(), read_exact(fd, 3)?)?;
        }
        let names: Vec<_> = text(std::fs::read_dir("/"))?.flatten().map(|e| e.file_name()).collect();
        holds(!names.iter().any(|name| name.to_string_lossy().contains("lmrun-")), "no name is left behind")
    }))
}
