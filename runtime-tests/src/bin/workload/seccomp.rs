//! Seccomp filters: none may be lost, none may hinder a checkpoint.

use crate::kernel::{fails_with, raw, sys};
use crate::procfs;
use crate::stage::{Check, Fallible, Setup, Stage, same};
use crate::threads::Answerer;

pub const WORKLOADS: &[(&str, Setup)] = &[
    ("seccomp", one),
    ("seccomp-stacked", stacked),
    ("seccomp-threads", threads),
    ("seccomp-tight", tight),
    ("seccomp-user", user),
];

/// Classic BPF: these calls fail with these errnos (or the process is killed), all others pass.
fn install(rules: &[(i64, u32)], default: u32) -> Fallible {
    let stmt = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let mut program = vec![stmt(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0)];
    for (call, action) in rules {
        let jump = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
        program.push(libc::sock_filter { code: jump, jt: 0, jf: 1, k: *call as u32 });
        program.push(stmt(libc::BPF_RET | libc::BPF_K, *action));
    }
    program.push(stmt(libc::BPF_RET | libc::BPF_K, default));
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    raw!(SYS_prctl, libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)?;
    raw!(SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const filter).map(drop)
}

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;

const fn errno(n: i32) -> u32 {
    libc::SECCOMP_RET_ERRNO | n as u32
}

/// Calls that no C library and no workload makes by itself.
const A: i64 = libc::SYS_swapoff;
const B: i64 = libc::SYS_acct;

fn a() -> Fallible<i64> {
    raw!(SYS_swapoff, 0)
}

fn b() -> Fallible<i64> {
    raw!(SYS_acct, 0)
}

fn filters(expected: i64) -> Fallible {
    let lines = procfs::status("thread-self", &["Seccomp", "Seccomp_filters"])?;
    same("mode and number of filters", vec!["Seccomp:\t2".to_owned(), format!("Seccomp_filters:\t{expected}")], lines)
}

fn one(stage: &mut Stage) -> Fallible<Check> {
    stage.member("child", |inner| {
        install(&[(A, errno(77))], ALLOW)?;
        inner.member("heir", |_| {
            Ok(Box::new(|| {
                filters(1)?;
                fails_with("an inherited filter", 77, a())
            }))
        })?;
        Ok(Box::new(|| {
            filters(1)?;
            fails_with("filtered call", 77, a())
        }))
    })?;
    Ok(Box::new(|| same("seccomp of init", vec!["Seccomp:\t0".to_owned()], procfs::status("self", &["Seccomp"])?)))
}

fn stacked(stage: &mut Stage) -> Fallible<Check> {
    stage.member("child", |inner| {
        install(&[(A, errno(77)), (B, errno(78))], ALLOW)?;
        inner.member("heir", |_| {
            // The heir's second filter is not its parent's; the later filter wins among equals.
            install(&[(A, errno(79))], ALLOW)?;
            install(&[(libc::SYS_swapon, errno(80))], ALLOW)?;
            Ok(Box::new(|| {
                filters(3)?;
                fails_with("third filter", 80, raw!(SYS_swapon, 0, 0))?;
                fails_with("first filter", 78, b())?;
                fails_with("second filter", 79, a())
            }))
        })?;
        Ok(Box::new(|| {
            filters(1)?;
            fails_with("filter of the parent", 77, a())
        }))
    })?;
    Ok(Box::new(|| Ok(())))
}

/// Filters are a thread's own matter.
fn threads(stage: &mut Stage) -> Fallible<Check> {
    stage.member("child", |_| {
        let free = Answerer::start(|| Ok(()))?;
        let first = Answerer::start(|| install(&[(A, errno(71))], ALLOW))?;
        let second = Answerer::start(|| {
            install(&[(A, errno(72))], ALLOW)?;
            install(&[(B, errno(73))], ALLOW)
        })?;
        Ok(Box::new(move || {
            free.ask(|| same("filters", vec!["Seccomp:\t0".to_owned()], procfs::status("thread-self", &["Seccomp"])?))?;
            first.ask(|| {
                filters(1)?;
                fails_with("first thread", 71, a())
            })?;
            second.ask(|| {
                filters(2)?;
                fails_with("second thread", 73, b())?;
                fails_with("second thread", 72, a())
            })
        }))
    })?;
    Ok(Box::new(|| Ok(())))
}

/// A filter that kills whoever makes a call a checkpoint might want to be made: memory maps, futexes, timers.
fn tight(stage: &mut Stage) -> Fallible<Check> {
    stage.member("child", |_| {
        let deadly = [
            libc::SYS_rt_sigaction,
            libc::SYS_sigaltstack,
            libc::SYS_getitimer,
            libc::SYS_setitimer,
            libc::SYS_timer_gettime,
            libc::SYS_timer_create,
            libc::SYS_userfaultfd,
            libc::SYS_pidfd_open,
            libc::SYS_prctl,
            libc::SYS_arch_prctl,
            libc::SYS_rt_sigqueueinfo,
            libc::SYS_set_tid_address,
            libc::SYS_get_robust_list,
            libc::SYS_memfd_create,
            libc::SYS_socket,
            libc::SYS_sendmsg,
            libc::SYS_clone,
            libc::SYS_clone3,
            libc::SYS_mremap,
            libc::SYS_umask,
            libc::SYS_getpid,
        ];
        let rules: Vec<_> = deadly.iter().map(|call| (*call, libc::SECCOMP_RET_KILL_PROCESS)).collect();
        install(&rules, ALLOW)?;
        Ok(Box::new(|| filters(1)))
    })?;
    stage.member("errno", |_| {
        install(
            &[
                (libc::SYS_mmap, errno(libc::ENOMEM)),
                (libc::SYS_munmap, errno(libc::EPERM)),
                (libc::SYS_mprotect, errno(libc::EPERM)),
            ],
            ALLOW,
        )?;
        Ok(Box::new(|| {
            filters(1)?;
            fails_with(
                "mmap",
                libc::ENOMEM,
                sys!(mmap(std::ptr::null_mut(), 4096, 0, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)),
            )
        }))
    })?;
    Ok(Box::new(|| Ok(())))
}

/// A filter set up by somebody who is not root.
fn user(stage: &mut Stage) -> Fallible<Check> {
    stage.member("child", |_| {
        sys!(setresgid(1000, 1000, 1000))?;
        sys!(setresuid(1000, 1000, 1000))?;
        install(&[(A, errno(77))], ALLOW)?;
        Ok(Box::new(|| {
            filters(1)?;
            same("uid", 1000, raw!(SYS_getuid)?)?;
            fails_with("filtered call", 77, a())
        }))
    })?;
    Ok(Box::new(|| Ok(())))
}
