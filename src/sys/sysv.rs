//! System V shared memory (sysvipc(7), shmget(2)) of another task's IPC namespace.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;

use libc::{c_int, pid_t};

use super::namespace;
use super::proc::malformed;

/// In [`Segment::mode`]: it goes away with its last user (include/uapi/linux/shm.h).
pub const SHM_DEST: u32 = 0o1000;
/// Gives the next segment that is made an id of one's choice: sysctl of an IPC namespace, since 3.9 with
/// CONFIG_CHECKPOINT_RESTORE.
const NEXT_ID: &str = "/proc/sys/kernel/shm_next_id";

/// A segment as `/proc/sysvipc/shm` shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    pub key: i32,
    pub id: i32,
    /// Permissions and [`SHM_DEST`].
    pub mode: u32,
    /// In bytes.
    pub size: u64,
    pub uid: u32,
    pub gid: u32,
    pub cuid: u32,
    pub cgid: u32,
}

/// The segments of a task's IPC namespace.
pub fn segments(pid: pid_t) -> io::Result<Vec<Segment>> {
    // Bound to the opener's namespace.
    let text = namespace::in_ipc_of(pid, || match std::fs::read_to_string("/proc/sysvipc/shm") {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        text => text,
    })?;
    text.lines().skip(1).map(|line| parse(line).ok_or_else(|| malformed(format_args!("sysvipc: {line}")))).collect()
}

fn parse(line: &str) -> Option<Segment> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let number = |at: usize| words.get(at)?.parse().ok();
    Some(Segment {
        key: words.first()?.parse().ok()?,
        id: words.get(1)?.parse().ok()?,
        mode: u32::from_str_radix(words.get(2)?, 8).ok()?,
        size: words.get(3)?.parse().ok()?,
        uid: number(7)?,
        gid: number(8)?,
        cuid: number(9)?,
        cgid: number(10)?,
    })
}

/// The memory of a segment, as a file.
pub fn open(pid: pid_t, id: i32) -> io::Result<File> {
    namespace::in_ipc_of(pid, || attached(id))
}

/// Makes a segment with its old id, and gives its memory as a file. Its permissions are complete but for [`SHM_DEST`].
///
/// # Errors
/// EEXIST: the id or the key is taken.
pub fn create(pid: pid_t, s: &Segment) -> io::Result<File> {
    namespace::in_ipc_of(pid, || {
        std::fs::write(NEXT_ID, s.id.to_string())?;
        let flags = libc::IPC_CREAT | libc::IPC_EXCL | (s.mode & 0o777) as c_int;
        // SAFETY: no pointers.
        let id = unsafe { libc::shmget(s.key, s.size as usize, flags) };
        if id < 0 {
            return Err(io::Error::last_os_error());
        }
        if id != s.id {
            remove_here(id)?;
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        // SAFETY: all of it is numbers, for which zeros are good; IPC_SET reads owner and mode.
        let done = unsafe {
            let mut ds: libc::shmid_ds = std::mem::zeroed();
            (ds.shm_perm.uid, ds.shm_perm.gid, ds.shm_perm.mode) = (s.uid, s.gid, (s.mode & 0o777) as _);
            libc::shmctl(id, libc::IPC_SET, &raw mut ds)
        };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        attached(id)
    })
}

/// Has a segment go away with its last user.
pub fn remove(pid: pid_t, id: i32) -> io::Result<()> {
    namespace::in_ipc_of(pid, || remove_here(id))
}

fn remove_here(id: i32) -> io::Result<()> {
    // SAFETY: IPC_RMID ignores the pointer.
    let done = unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Attaches a segment of our own namespace for as long as it takes to open the file behind it.
fn attached(id: i32) -> io::Result<File> {
    // SAFETY: the kernel chooses a free place; nothing but the link below /proc ever looks at it.
    unsafe {
        let at = libc::shmat(id, std::ptr::null(), 0);
        if at as isize == -1 {
            return Err(io::Error::last_os_error());
        }
        let prefix = format!("{:x}-", at as usize);
        let file = std::fs::read_dir("/proc/self/map_files").and_then(|entries| {
            let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
            let name = names.into_iter().find(|name| name.starts_with(&prefix)).ok_or(io::ErrorKind::NotFound)?;
            File::options().read(true).write(true).open(format!("/proc/self/map_files/{name}"))
        });
        libc::shmdt(at);
        file
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_procfs() {
        let line = "  10551441          5  1600                    56  2682  2682      6   101   104   102   105 1795432396 1795432396 1795432396                  4096                     0";
        let expected =
            Segment { key: 10_551_441, id: 5, mode: 0o1600, size: 56, uid: 101, gid: 104, cuid: 102, cgid: 105 };
        assert_eq!(parse(line), Some(expected));
        assert_eq!(parse("1 2 3"), None);
    }
}
