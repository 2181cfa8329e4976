//! File mappings, private and shared.

use std::os::unix::fs::FileExt;

use crate::kernel::{noise, open, sys};
use crate::memory_map::{Map, PAGE};
use crate::stage::{Check, Fallible, Setup, Stage, holds};

pub const WORKLOADS: &[(&str, Setup)] = &[
    ("mapped-private", private),
    ("mapped-shared", shared),
    ("mapped-read-only", read_only),
    ("mapped-odd-size", odd_size),
    ("mapped-dev-zero", dev_zero),
];

const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// A file whose page `n` holds the noise of `seed + n`, mapped from page `first` on; its descriptor is closed.
fn map_new(path: &str, pages: usize, seed: u64, first: usize, prot: i32, flags: i32) -> Fallible<Map> {
    let content: Vec<u8> = (0..pages as u64).flat_map(|n| noise(seed + n, PAGE)).collect();
    std::fs::write(path, content).map_err(|e| format!("{path}: {e}"))?;
    let fd = open(path, libc::O_RDWR)?;
    let map = Map::of_file((pages - first) * PAGE, prot, flags, fd, (first * PAGE) as i64)?;
    sys!(close(fd))?;
    Ok(map)
}

/// Pages that were written are the process's own; the others are the file's.
fn private(stage: &mut Stage) -> Fallible<Check> {
    let map = map_new("/mapped-private", 64, 100, 8, RW, libc::MAP_PRIVATE)?;
    map.part(4, 8).fill(1000);
    stage.member("child", move |_| {
        map.part(20, 4).fill(1001);
        Ok(Box::new(move || {
            map.part(20, 4).holds("the child's copy", 1001)?;
            map.part(4, 8).holds("inherited copy", 1000)
        }))
    })?;
    Ok(Box::new(move || {
        map.part(0, 4).holds("the file's page", 108)?;
        map.part(4, 8).holds("copied page", 1000)?;
        map.part(12, 44).holds("the file's page", 120)?;
        // An untouched page still follows the file.
        let file = std::fs::OpenOptions::new().write(true).open("/mapped-private").map_err(|e| e.to_string())?;
        file.write_all_at(&noise(7, PAGE), 63 * PAGE as u64).map_err(|e| e.to_string())?;
        map.part(55, 1).holds("page of a changed file", 7)?;
        file.write_all_at(&noise(163, PAGE), 63 * PAGE as u64).map_err(|e| e.to_string())
    }))
}

/// Writes reach the file, writes to the file show in the mapping, and both processes see them.
fn shared(stage: &mut Stage) -> Fallible<Check> {
    let map = map_new("/mapped-shared", 32, 200, 0, RW, libc::MAP_SHARED)?;
    map.part(8, 4).fill(2000);
    stage.member("child", move |_| Ok(Box::new(move || map.part(8, 4).holds("seen by the child", 2000))))?;
    let mut round = 5000;
    Ok(Box::new(move || {
        map.part(0, 8).holds("untouched", 200)?;
        map.part(8, 4).holds("written", 2000)?;
        round += 1;
        map.part(31, 1).fill(round);
        let file =
            std::fs::OpenOptions::new().read(true).write(true).open("/mapped-shared").map_err(|e| e.to_string())?;
        let mut page = vec![0; PAGE];
        file.read_exact_at(&mut page, 31 * PAGE as u64).map_err(|e| e.to_string())?;
        holds(page == noise(round, PAGE), "a write to the mapping reaches the file")?;
        file.write_all_at(&noise(round + 1, PAGE), 30 * PAGE as u64).map_err(|e| e.to_string())?;
        map.part(30, 1).holds("a write to the file shows in the mapping", round + 1)
    }))
}

/// Mapped for reading only; pages that were written before the mapping became read-only.
fn read_only(_: &mut Stage) -> Fallible<Check> {
    let plain = map_new("/mapped-ro-1", 16, 300, 0, libc::PROT_READ, libc::MAP_PRIVATE)?;
    let copied = map_new("/mapped-ro-2", 16, 300, 0, RW, libc::MAP_PRIVATE)?;
    copied.part(3, 2).fill(3000);
    copied.protect(libc::PROT_READ)?;
    let hidden = map_new("/mapped-ro-3", 16, 300, 0, RW, libc::MAP_PRIVATE)?;
    hidden.part(3, 2).fill(3000);
    hidden.protect(libc::PROT_NONE)?;
    let shared = map_new("/mapped-ro-4", 16, 300, 0, libc::PROT_READ, libc::MAP_SHARED)?;
    Ok(Box::new(move || {
        plain.holds("read-only", 300)?;
        shared.holds("read-only, shared", 300)?;
        hidden.protect(libc::PROT_READ)?;
        for map in [copied, hidden] {
            map.part(0, 3).holds("the file's page", 300)?;
            map.part(3, 2).holds("copied page", 3000)?;
            map.part(5, 11).holds("the file's page", 305)?;
        }
        hidden.protect(libc::PROT_NONE)?;
        // A private mapping may become writable whatever the file is.
        plain.protect(RW)?;
        plain.part(0, 1).fill(300);
        plain.protect(libc::PROT_READ)
    }))
}

/// A file that ends within a page, and a mapping that reaches beyond its end.
fn odd_size(_: &mut Stage) -> Fallible<Check> {
    std::fs::write("/mapped-odd", noise(400, 5 * PAGE + 100)).map_err(|e| e.to_string())?;
    let fd = open("/mapped-odd", libc::O_RDWR)?;
    let private = Map::of_file(8 * PAGE, RW, libc::MAP_PRIVATE, fd, 0)?;
    let shared = Map::of_file(8 * PAGE, RW, libc::MAP_SHARED, fd, 0)?;
    private.part(5, 1).fill(4000);
    Ok(Box::new(move || {
        private.part(5, 1).holds("copied last page", 4000)?;
        let expected = noise(400, 5 * PAGE + 100);
        holds(shared.bytes()[..expected.len()] == expected, "content of a file of odd size")?;
        // Beyond the end there is nothing to read.
        holds(!shared.readable()?[6] && !private.readable()?[6], "pages beyond the end of the file")
    }))
}

/// Mappings of /dev/zero: private ones are anonymous memory by another name.
fn dev_zero(_: &mut Stage) -> Fallible<Check> {
    let fd = open("/dev/zero", libc::O_RDWR)?;
    let map = Map::of_file(16 * PAGE, RW, libc::MAP_PRIVATE, fd, 0)?;
    map.part(2, 4).fill(500);
    Ok(Box::new(move || {
        map.part(0, 2).is_zero("untouched")?;
        map.part(2, 4).holds("written", 500)?;
        map.part(6, 10).is_zero("untouched")
    }))
}
