//! System calls whose failure is a sentence.

use crate::stage::Fallible;

/// Calls a function of libc: `sys!(close(fd))?` is its result, or `close: Bad file descriptor (os error 9)`.
macro_rules! sys {
    ($name:ident($($arg:expr),* $(,)?)) => {
        $crate::kernel::result(stringify!($name), unsafe { libc::$name($($arg),*) } as i64)
    };
}

/// Calls the kernel past libc: `raw!(SYS_gettid)?`.
macro_rules! raw {
    ($name:ident $(, $arg:expr)* $(,)?) => {
        $crate::kernel::result(stringify!($name), unsafe { libc::syscall(libc::$name $(, $arg as libc::c_long)*) })
    };
}

pub(crate) use {raw, sys};

pub fn result(name: &str, value: i64) -> Fallible<i64> {
    if value == -1 { Err(format!("{name}: {}", std::io::Error::last_os_error())) } else { Ok(value) }
}

/// Demands that a call fail with `errno`.
pub fn fails_with(what: &str, errno: i32, outcome: Fallible<i64>) -> Fallible {
    let expected = std::io::Error::from_raw_os_error(errno).to_string();
    match outcome {
        Err(e) if e.ends_with(&expected) => Ok(()),
        other => Err(format!("{what}: expected {expected}, got {other:?}")),
    }
}

/// A path for the kernel.
pub fn c(path: &str) -> std::ffi::CString {
    std::ffi::CString::new(path).expect("no path of a workload holds a zero byte")
}

/// Opens a file and returns its descriptor.
pub fn open(path: &str, flags: i32) -> Fallible<i32> {
    sys!(open(c(path).as_ptr(), flags, 0o600)).map(|fd| fd as i32).map_err(|e| format!("{path}: {e}"))
}

/// Writes all of `bytes`.
pub fn write(fd: i32, bytes: &[u8]) -> Fallible {
    let written = sys!(write(fd, bytes.as_ptr().cast(), bytes.len()))?;
    crate::stage::same("bytes written", bytes.len() as i64, written)
}

/// Reads up to `most` bytes.
pub fn read(fd: i32, most: usize) -> Fallible<Vec<u8>> {
    let mut buf = vec![0u8; most];
    let got = sys!(read(fd, buf.as_mut_ptr().cast(), most))?;
    buf.truncate(got as usize);
    Ok(buf)
}

/// Reads exactly `count` bytes, or fails.
pub fn read_exact(fd: i32, count: usize) -> Fallible<Vec<u8>> {
    let mut all = Vec::with_capacity(count);
    while all.len() < count {
        let part = read(fd, count - all.len())?;
        if part.is_empty() {
            return Err(format!("end of file after {} of {count} bytes", all.len()));
        }
        all.extend(part);
    }
    Ok(all)
}

/// Whether two descriptors are one open file description, in this process or in another one.
pub fn same_description(pid: i32, fd: i32, other_pid: i32, other_fd: i32) -> Fallible<bool> {
    const KCMP_FILE: i32 = 0;
    raw!(SYS_kcmp, pid, other_pid, KCMP_FILE, fd, other_fd).map(|order| order == 0)
}

/// Bytes that differ for every seed and do not compress.
pub fn noise(seed: u64, count: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(count + 8);
    while bytes.len() < count {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(count);
    bytes
}
