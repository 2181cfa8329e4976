//! inotify: what is watched, under which number, and that nothing is told that did not happen.

use crate::kernel::{c, fails_with, read, sys};
use crate::stage::{Check, Fallible, Setup, Stage, same};

pub const WORKLOADS: &[(&str, Setup)] = &[("inotify-watches", watches), ("inotify-numbers", numbers)];

fn text<T>(outcome: std::io::Result<T>) -> Fallible<T> {
    outcome.map_err(|e| e.to_string())
}

fn instance() -> Fallible<i32> {
    Ok(sys!(inotify_init1(libc::IN_NONBLOCK | libc::IN_CLOEXEC))? as i32)
}

fn add(fd: i32, path: &str, mask: u32) -> Fallible<i32> {
    Ok(sys!(inotify_add_watch(fd, c(path).as_ptr(), mask))? as i32)
}

/// The events that wait: watch, mask, name.
fn events(fd: i32) -> Fallible<Vec<(i32, u32, String)>> {
    let mut bytes = &read(fd, 4096)?[..];
    let mut all = Vec::new();
    while bytes.len() >= 16 {
        let word = |at: usize| u32::from_ne_bytes(std::array::from_fn(|i| bytes[at + i]));
        let end = 16 + word(12) as usize;
        let name = String::from_utf8_lossy(&bytes[16..end]).trim_end_matches('\0').to_owned();
        all.push((word(0).cast_signed(), word(4), name));
        bytes = &bytes[end..];
    }
    Ok(all)
}

/// A directory, a file deep down, and the root, which hear all there is to hear, and have heard nothing.
fn watches(_: &mut Stage) -> Fallible<Check> {
    text(std::fs::create_dir_all("/some/where/deep"))?;
    text(std::fs::write("/some/where/deep/file", "content"))?;
    let fd = instance()?;
    let all = libc::IN_ALL_EVENTS;
    let dir = add(fd, "/some/where", all)?;
    let file = add(fd, "/some/where/deep/file", all)?;
    let root = add(fd, "/", libc::IN_CREATE | libc::IN_ONLYDIR)?;
    let mut n = 0;
    Ok(Box::new(move || {
        fails_with("read", libc::EAGAIN, read(fd, 4096).map(|bytes| bytes.len() as i64))?;
        n += 1;
        let name = format!("new-{n}");
        text(std::fs::create_dir(format!("/some/where/{name}")))?;
        text(std::fs::create_dir(format!("/{name}")))?;
        let directory = libc::IN_CREATE | libc::IN_ISDIR;
        same("created", vec![(dir, directory, name.clone()), (root, directory, name)], events(fd)?)?;
        text(std::fs::remove_dir(format!("/some/where/new-{n}")))?;
        text(std::fs::set_permissions(
            "/some/where/deep/file",
            std::os::unix::fs::PermissionsExt::from_mode(0o600 + n),
        ))?;
        let deleted = (dir, libc::IN_DELETE | libc::IN_ISDIR, format!("new-{n}"));
        same("the rest", vec![deleted, (file, libc::IN_ATTRIB, String::new())], events(fd)?)
    }))
}

/// Numbers with holes between them; a watch that ends after its first event.
fn numbers(_: &mut Stage) -> Fallible<Check> {
    let fd = instance()?;
    let mut watches = Vec::new();
    for n in 0..20 {
        text(std::fs::create_dir(format!("/d{n}")))?;
        watches.push(add(fd, &format!("/d{n}"), libc::IN_CREATE)?);
    }
    for n in (0..20).filter(|n| n % 3 != 0) {
        sys!(inotify_rm_watch(fd, watches[n]))?;
    }
    read(fd, 4096)?; // that they were removed
    let mut n = 0;
    Ok(Box::new(move || {
        n += 1;
        for at in [0, 9, 18] {
            text(std::fs::write(format!("/d{at}/{n}"), ""))?;
        }
        let expected: Vec<_> = [0, 9, 18].iter().map(|at| (watches[*at], libc::IN_CREATE, n.to_string())).collect();
        same("events", expected, events(fd)?)?;
        same("number of a known watch", watches[3], add(fd, "/d3", libc::IN_CREATE)?)
    }))
}
