//! What is in tmpfs mounts of the container's own.

use std::ffi::CString;
use std::fs::{self, Permissions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown, symlink};

use crate::kernel::{c, open, sys, write};
use crate::stage::{Check, Fallible, Setup, Stage, holds, same};

pub const WORKLOADS: &[(&str, Setup)] = &[("tmpfs", content), ("tmpfs-in-use", in_use)];

fn io<T>(what: &str, result: std::io::Result<T>) -> Fallible<T> {
    result.map_err(|e| format!("{what}: {e}"))
}

/// Mode, owner, size, names, time and content of everything below a directory that is on the same file system.
fn survey(dir: &str) -> Fallible<Vec<String>> {
    let mut all = Vec::new();
    let device = io("lstat", fs::symlink_metadata(dir))?.dev();
    let mut left = vec![std::path::PathBuf::from(dir)];
    while let Some(path) = left.pop() {
        let m = io("lstat", fs::symlink_metadata(&path))?;
        if m.dev() != device {
            continue;
        }
        let content = if m.is_file() {
            let bytes = io("read", fs::read(&path))?;
            format!("{:x}", bytes.iter().fold(0u64, |h, b| h.wrapping_mul(31).wrapping_add((*b).into())))
        } else if m.is_symlink() {
            io("readlink", fs::read_link(&path))?.display().to_string()
        } else {
            format!("{:x}", m.rdev())
        };
        all.push(format!(
            "{} {:o} {}:{} {} {} {}.{} {content}",
            path.display(),
            m.mode(),
            m.uid(),
            m.gid(),
            if m.is_file() { m.len() } else { 0 },
            if m.is_dir() { 0 } else { m.nlink() },
            m.mtime(),
            m.mtime_nsec(),
        ));
        if m.is_dir() {
            left.extend(io("readdir", fs::read_dir(&path))?.flatten().map(|e| e.path()));
        }
    }
    all.sort();
    Ok(all)
}

/// Files, directories, links, devices; what was removed stays away; a sparse file stays one.
fn content(_: &mut Stage) -> Fallible<Check> {
    io("mkdir", fs::create_dir_all("/dev/shm/a/deep/place"))?;
    io("write", fs::write("/dev/shm/a/deep/place/file", "content".repeat(5000)))?;
    io("write", fs::write("/dev/shm/empty", ""))?;
    io("write", fs::write(format!("/dev/shm/{}", "long".repeat(60)), "a long name"))?;
    io("link", fs::hard_link("/dev/shm/empty", "/dev/shm/a/other-name"))?;
    io("symlink", symlink("/nowhere/at/all", "/dev/shm/dangling"))?;
    sys!(mkfifo(c("/dev/shm/fifo").as_ptr(), 0o620))?;
    sys!(mknod(c("/dev/shm/node").as_ptr(), libc::S_IFCHR | 0o600, libc::makedev(1, 3)))?;
    io("chown", chown("/dev/shm/a/deep/place/file", Some(1234), Some(4321)))?;
    io("chmod", fs::set_permissions("/dev/shm/a/deep/place/file", Permissions::from_mode(0o4751)))?;
    io("chmod", fs::set_permissions("/dev/shm/a", Permissions::from_mode(0o1770)))?;
    let sparse = open("/dev/shm/sparse", libc::O_RDWR | libc::O_CREAT)?;
    sys!(ftruncate(sparse, 16 << 20))?;
    sys!(lseek(sparse, 9 << 20, libc::SEEK_SET))?;
    write(sparse, b"in the middle")?;
    sys!(close(sparse))?;
    io("remove", fs::remove_file("/dev/full"))?;
    let extended = |path: &str| -> Fallible<Vec<u8>> {
        let mut value = vec![0; 64];
        let (path, key) = (CString::new(path).unwrap(), c("trusted.lmrun"));
        let len = sys!(getxattr(path.as_ptr(), key.as_ptr(), value.as_mut_ptr().cast(), value.len()))?;
        value.truncate(len as usize);
        Ok(value)
    };
    let marked = c("/dev/shm/empty");
    // Needs CAP_SYS_ADMIN, which containers seldom have: then there is nothing to carry.
    let _ = sys!(setxattr(marked.as_ptr(), c("trusted.lmrun").as_ptr(), b"value".as_ptr().cast(), 5, 0));
    let before = (survey("/dev/shm")?, survey("/dev")?, extended("/dev/shm/empty").ok());
    Ok(Box::new(move || {
        same("/dev/shm", &before.0, &survey("/dev/shm")?)?;
        same("/dev", &before.1, &survey("/dev")?)?;
        same("extended attribute", &before.2, &extended("/dev/shm/empty").ok())?;
        let sparse = io("stat", fs::metadata("/dev/shm/sparse"))?;
        holds(sparse.blocks() < 1 << 11, "the sparse file has been filled")?;
        holds(io("stat", fs::metadata("/dev/shm/fifo"))?.file_type().is_fifo(), "the FIFO is one")
    }))
}

/// A shared memory object (shm_open(3)) that is open and mapped, by two processes.
fn in_use(stage: &mut Stage) -> Fallible<Check> {
    let fd = open("/dev/shm/object", libc::O_RDWR | libc::O_CREAT)?;
    sys!(ftruncate(fd, 1 << 20))?;
    let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
    let at = unsafe { libc::mmap(std::ptr::null_mut(), 1 << 20, access, kind, fd, 0) } as usize;
    holds(at as *mut libc::c_void != libc::MAP_FAILED, "mmap")?;
    let word = move |n: usize| (at + n * 8) as *mut u64;
    (0..1 << 17).for_each(|n| unsafe { word(n).write_volatile(n as u64 * 7) });
    stage.member("reader", move |_| {
        Ok(Box::new(move || {
            let wrong = (1..1 << 17).find(|n| unsafe { word(*n).read_volatile() } != *n as u64 * 7);
            same("a word of the mapping that differs", None, wrong)?;
            let seen = io("read", fs::read("/dev/shm/object"))?;
            same("the file's size", 1 << 20, seen.len())?;
            same("the file shows the mapping", 7u64.to_ne_bytes().to_vec(), seen[8..16].to_vec())?;
            unsafe { word(0).write_volatile(word(0).read_volatile() + 1) };
            Ok(())
        }))
    })?;
    let mut expected = unsafe { word(0).read_volatile() };
    Ok(Box::new(move || {
        expected += 1;
        let begin = std::time::Instant::now();
        while unsafe { word(0).read_volatile() } != expected {
            holds(begin.elapsed().as_secs() < 10, "the other process's write does not show")?;
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        Ok(())
    }))
}
