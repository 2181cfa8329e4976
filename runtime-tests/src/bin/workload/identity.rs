//! What a process is and where it stands: names, program, argument and auxiliary vectors, directories, umask.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use crate::kernel::{c, sys};
use crate::procfs;
use crate::stage::{Check, Fallible, Setup, Stage, eventually, fork, same, sleep_for_good};

pub const WORKLOADS: &[(&str, Setup)] = &[
    ("identity", identity),
    ("identity-title", title),
    ("identity-exec", exec),
    ("identity-exec-part", exec_part),
    ("places", places),
];

/// Where the program's parts lie: code, data, stack, brk, arguments, environment (stat's fields, proc(5)).
const LAYOUT: &[usize] = &[26, 27, 28, 45, 46, 47, 48, 49, 50, 51];

#[derive(Debug, PartialEq)]
struct Identity {
    comm: String,
    exe: String,
    exe_inode: u64,
    cmdline: Vec<u8>,
    environ: Vec<u8>,
    auxv: Vec<u8>,
    layout: Vec<i64>,
    brk: i64,
}

fn look() -> Fallible<Identity> {
    Ok(Identity {
        comm: procfs::text("/proc/self/comm")?,
        exe: procfs::link("/proc/self/exe")?,
        exe_inode: std::fs::metadata("/proc/self/exe").map_err(|e| e.to_string())?.ino(),
        cmdline: procfs::bytes("/proc/self/cmdline")?,
        environ: procfs::bytes("/proc/self/environ")?,
        auxv: procfs::bytes("/proc/self/auxv")?,
        layout: procfs::stat("self", LAYOUT)?,
        brk: unsafe { libc::syscall(libc::SYS_brk, 0) },
    })
}

fn keeps_identity() -> Fallible<Check> {
    let before = look()?;
    Ok(Box::new(move || same("identity", &before, &look()?)))
}

fn set_name(name: &str) {
    unsafe { libc::prctl(libc::PR_SET_NAME, c(name).as_ptr()) };
}

fn identity(stage: &mut Stage) -> Fallible<Check> {
    set_name("odd ) name (");
    stage.member("child", |_| {
        set_name("fifteen-letters");
        keeps_identity()
    })?;
    keeps_identity()
}

/// Servers write over their argument vector to show what they do.
fn title(_: &mut Stage) -> Fallible<Check> {
    let range = procfs::stat("self", &[48, 49])?;
    let [start, end] = range[..] else {
        return Err("stat".into());
    };
    let argv = unsafe { std::slice::from_raw_parts_mut(start as *mut u8, (end - start) as usize) };
    argv.fill(b' ');
    let text = b"idle: 3 conns";
    let count = text.len().min(argv.len());
    argv[..count].copy_from_slice(&text[..count]);
    keeps_identity()
}

/// Children that run another program than init does.
fn exec(stage: &mut Stage) -> Fallible<Check> {
    std::fs::copy("/workload", "/another").map_err(|e| e.to_string())?;
    std::fs::set_permissions("/another", PermissionsExt::from_mode(0o755)).map_err(|e| e.to_string())?;
    let member = stage.invite("exec");
    let environment = c(&member.environment());
    fork(move || unsafe {
        let args =
            [c"my name".as_ptr(), c"identity-exec-part".as_ptr(), c"".as_ptr(), c"x y".as_ptr(), std::ptr::null()];
        let env = [environment.as_ptr(), std::ptr::null()];
        libc::execve(c"/another".as_ptr(), args.as_ptr(), env.as_ptr());
    })?;
    stage.wait_for_member("exec")?;
    keeps_identity()
}

/// The program of `identity-exec`'s child.
fn exec_part(_: &mut Stage) -> Fallible<Check> {
    same("exe", "/another", &procfs::link("/proc/self/exe")?)?;
    keeps_identity()
}

/// Working and root directories, umasks. A child in a jail cannot see `/run-state`: init looks at it from outside.
fn places(_: &mut Stage) -> Fallible<Check> {
    for dir in ["/here", "/here/and there", "/jail", "/jail/inside"] {
        std::fs::create_dir_all(dir).map_err(|e| e.to_string())?;
    }
    let jailed = fork(|| {
        unsafe {
            libc::umask(0o077);
            assert_eq!(libc::chroot(c"/jail".as_ptr()), 0);
            assert_eq!(libc::chdir(c"/inside".as_ptr()), 0);
        }
        sleep_for_good()
    })?;
    let shut_out = fork(|| {
        unsafe {
            // The classic way out of a jail: the working directory lies outside of the root.
            assert_eq!(libc::chdir(c"/here".as_ptr()), 0);
            assert_eq!(libc::chroot(c"/jail".as_ptr()), 0);
            libc::umask(0);
        }
        sleep_for_good()
    })?;
    let seen = move |pid: i32| -> Fallible<Vec<String>> {
        let mut all = vec![procfs::link(&format!("/proc/{pid}/cwd"))?, procfs::link(&format!("/proc/{pid}/root"))?];
        all.extend(procfs::status(&pid.to_string(), &["Umask"])?);
        Ok(all)
    };
    eventually("jailed", || seen(jailed).is_ok_and(|s| s[0] == "/jail/inside"))?;
    eventually("shut out", || seen(shut_out).is_ok_and(|s| s[1] == "/jail" && s[2].ends_with("0000")))?;
    sys!(chdir(c"/here/and there".as_ptr()))?;
    sys!(umask(0o137))?;
    let before = [seen(1)?, seen(jailed)?, seen(shut_out)?];
    Ok(Box::new(move || {
        same("cwd, root, umask", &before, &[seen(1)?, seen(jailed)?, seen(shut_out)?])?;
        std::fs::write("made-here", "").map_err(|e| e.to_string())?;
        let made = std::fs::metadata("/here/and there/made-here").map_err(|e| e.to_string())?;
        std::fs::remove_file("/here/and there/made-here").map_err(|e| e.to_string())?;
        same("mode of a new file", 0o640, made.mode() & 0o777)
    }))
}
