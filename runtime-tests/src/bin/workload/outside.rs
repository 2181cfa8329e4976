//! What comes from outside the container: the standard streams.

use crate::kernel::{read, sys, write};
use crate::procfs;
use crate::stage::{Check, Fallible, Setup, Stage, same};

pub const WORKLOADS: &[(&str, Setup)] = &[("stdio", stdio), ("stdio-null", stdio_null)];

/// Says `beat N` on standard output when asked by a check, `fault N` on standard error, and answers each line
/// from standard input with `heard: LINE`.
fn stdio(stage: &mut Stage) -> Fallible<Check> {
    write(1, b"set up\n")?;
    std::thread::spawn(|| {
        while let Ok(line) = read(0, 4096) {
            if line.is_empty() {
                break;
            }
            let _ = write(1, &[b"heard: ", &line[..]].concat());
        }
    });
    stage.member("child", |_| {
        Ok(Box::new(|| {
            write(1, b"child's beat\n")?;
            holds_one_output()
        }))
    })?;
    let mut beat = 0;
    Ok(Box::new(move || {
        beat += 1;
        write(1, format!("beat {beat}\n").as_bytes())?;
        write(2, format!("fault {beat}\n").as_bytes())
    }))
}

/// A child's standard output is its parent's.
fn holds_one_output() -> Fallible {
    let me = unsafe { libc::getpid() };
    same("standard output of child and parent", true, crate::kernel::same_description(me, 1, 1, 1)?)
}

/// Standard streams that go nowhere.
fn stdio_null(_: &mut Stage) -> Fallible<Check> {
    let look = || [0, 1, 2].map(|fd| procfs::link(&format!("/proc/self/fd/{fd}")));
    let before = look();
    Ok(Box::new(move || {
        same("standard streams", &before, &look())?;
        same("end of file", Vec::new(), read(0, 10)?)?;
        write(1, b"into the void\n")?;
        same("flags", true, sys!(fcntl(2, libc::F_GETFL)).is_ok())
    }))
}
