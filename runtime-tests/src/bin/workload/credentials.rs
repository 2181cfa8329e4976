//! Who a process is: ids, groups, capabilities, securebits, no_new_privs; for each thread its own.

use crate::kernel::{fails_with, open, raw, sys};
use crate::procfs;
use crate::stage::{Check, Fallible, Setup, Stage, same};
use crate::threads::Answerer;

pub const WORKLOADS: &[(&str, Setup)] = &[
    ("credentials", credentials),
    ("credentials-capabilities", capabilities),
    ("credentials-threads", threads),
    ("credentials-no-new-privs", no_new_privs),
    ("credentials-dumpable", dumpable),
];

/// What status says about who a task is.
const WHO: &[&str] = &[
    "Uid",
    "Gid",
    "Groups",
    "CapInh",
    "CapPrm",
    "CapEff",
    "CapBnd",
    "CapAmb",
    "NoNewPrivs",
    "Seccomp",
    "Seccomp_filters",
];

/// Status, and securebits, of the calling thread.
fn look() -> Fallible<(Vec<String>, i64)> {
    Ok((procfs::status("thread-self", WHO)?, sys!(prctl(libc::PR_GET_SECUREBITS))?))
}

fn keeps() -> Fallible<Check> {
    let before = look()?;
    Ok(Box::new(move || same("credentials", &before, &look()?)))
}

/// Real, effective, saved and filesystem ids, all different; supplementary groups, none and many.
fn credentials(stage: &mut Stage) -> Fallible<Check> {
    let member = |stage: &mut Stage, name: &str, groups: Vec<u32>, uids: [u32; 3], fsuid: u32| {
        stage.member(name, move |_| {
            sys!(setgroups(groups.len(), groups.as_ptr()))?;
            sys!(setresgid(uids[0] + 10, uids[1] + 10, uids[2] + 10))?;
            raw!(SYS_setfsgid, fsuid + 10)?;
            sys!(setresuid(uids[0], uids[1], uids[2]))?;
            raw!(SYS_setfsuid, fsuid)?;
            let mut keeps = keeps()?;
            Ok(Box::new(move || {
                keeps()?;
                // The filesystem uid is what counts when a file is made.
                let path = format!("/run-state/made-by-{}", unsafe { libc::getpid() });
                std::fs::write(&path, "").map_err(|e| format!("{path}: {e}"))?;
                use std::os::unix::fs::MetadataExt;
                let made = std::fs::metadata(&path).map_err(|e| e.to_string())?;
                std::fs::remove_file(&path).map_err(|e| e.to_string())?;
                same("owner of a new file", (fsuid, fsuid + 10), (made.uid(), made.gid()))
            }))
        })
    };
    member(stage, "plain", vec![], [1000, 1000, 1000], 1000)?;
    member(stage, "groups", (2000..2040).collect(), [1000, 1000, 1000], 1000)?;
    member(stage, "mixed", vec![0, 7], [1001, 1002, 1003], 1001)?;
    member(stage, "saved-root", vec![7], [1001, 1002, 0], 1002)?;
    member(stage, "effective-root", vec![7], [1001, 0, 1003], 1004)?;
    keeps()
}

#[repr(C)]
struct CapHeader {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

const LINUX_CAPABILITY_VERSION_3: u32 = 0x2008_0522;

fn set_capabilities(effective: u32, permitted: u32, inheritable: u32) -> Fallible {
    let header = CapHeader { version: LINUX_CAPABILITY_VERSION_3, pid: 0 };
    let none = CapData { effective: 0, permitted: 0, inheritable: 0 };
    let data = [CapData { effective, permitted, inheritable }, none];
    raw!(SYS_capset, &raw const header, data.as_ptr()).map(drop)
}

const CHOWN: u32 = 1 << 0;
const KILL: u32 = 1 << 5;
const SETUID: u32 = 1 << 7;
const NET_BIND: u32 = 1 << 10;

/// Sets that are smaller than what the container may have, with ambient ones, and a smaller bounding set.
fn capabilities(stage: &mut Stage) -> Fallible<Check> {
    stage.member("fewer", |_| {
        set_capabilities(CHOWN, CHOWN | KILL, KILL)?;
        keeps()
    })?;
    stage.member("none", |_| {
        set_capabilities(0, 0, 0)?;
        keeps()
    })?;
    stage.member("bounded", |_| {
        for capability in [0, 5, 7] {
            sys!(prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0))?;
        }
        keeps()
    })?;
    stage.member("user", |_| {
        // Capabilities of a process that is not root: kept over setuid, raised again, ambient.
        sys!(prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0))?;
        sys!(setresuid(1000, 1000, 1000))?;
        set_capabilities(NET_BIND, NET_BIND | KILL, NET_BIND)?;
        sys!(prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, 10, 0, 0))?;
        keeps()
    })?;
    stage.member("securebits", |_| {
        // SECBIT_NOROOT, its lock, SECBIT_NO_SETUID_FIXUP, SECBIT_NO_CAP_AMBIENT_RAISE.
        sys!(prctl(libc::PR_SET_SECUREBITS, 0b100_0111))?;
        set_capabilities(SETUID, SETUID | KILL, 0)?;
        keeps()
    })?;
    keeps()
}

/// The kernel keeps credentials for each thread, though C libraries pretend otherwise.
fn threads(_: &mut Stage) -> Fallible<Check> {
    let start = |uid: u32, permitted: Option<u32>| {
        Answerer::start(move || {
            raw!(SYS_setresgid, uid + 1, uid + 1, uid + 1)?;
            raw!(SYS_setgroups, 1, [uid + 2].as_ptr())?;
            if let Some(permitted) = permitted {
                raw!(SYS_prctl, libc::PR_SET_KEEPCAPS, 1, 0, 0, 0)?;
                raw!(SYS_setresuid, uid, uid, uid)?;
                set_capabilities(permitted, permitted, 0)?;
            } else {
                raw!(SYS_setresuid, uid, uid, uid)?;
            }
            Ok(())
        })
    };
    let all = [start(3000, None)?, start(4000, Some(KILL))?, start(0, Some(CHOWN | KILL))?];
    let mut before = Vec::new();
    for thread in &all {
        before.push(procfs::status(&format!("self/task/{}", thread.tid), WHO)?);
    }
    let mut own = keeps()?;
    Ok(Box::new(move || {
        own()?;
        for (thread, before) in all.iter().zip(&before) {
            same("a thread's credentials", before, &procfs::status(&format!("self/task/{}", thread.tid), WHO)?)?;
        }
        let uid = |expected: i64| move || same("getuid of a thread", expected, raw!(SYS_getuid)?);
        all[0].ask(uid(3000))?;
        all[1].ask(uid(4000))
    }))
}

fn no_new_privs(stage: &mut Stage) -> Fallible<Check> {
    stage.member("set", |_| {
        sys!(prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        Ok(Box::new(|| same("no_new_privs", 1, sys!(prctl(libc::PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0))?)))
    })?;
    Ok(Box::new(|| same("no_new_privs", 0, sys!(prctl(libc::PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0))?)))
}

/// Dumpable or not, as told and as a change of uid leaves it.
fn dumpable(stage: &mut Stage) -> Fallible<Check> {
    fn keeps() -> Fallible<Check> {
        let before = sys!(prctl(libc::PR_GET_DUMPABLE))?;
        Ok(Box::new(move || same("dumpable", before, sys!(prctl(libc::PR_GET_DUMPABLE))?)))
    }
    stage.member("not", |_| {
        sys!(prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0))?;
        keeps()
    })?;
    stage.member("other-user", |_| {
        sys!(setresuid(1000, 1000, 1000))?;
        let mut keeps = keeps()?;
        Ok(Box::new(move || {
            keeps()?;
            fails_with(
                "opening init's memory as a user",
                libc::EACCES,
                open("/proc/1/mem", libc::O_RDONLY).map(i64::from),
            )
        }))
    })?;
    stage.member("other-user-dumpable", |_| {
        sys!(setresuid(1000, 1000, 1000))?;
        sys!(prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0))?;
        keeps()
    })?;
    keeps()
}
