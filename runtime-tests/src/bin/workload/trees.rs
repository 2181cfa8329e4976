//! Parents, children, sessions, process groups, orphans, zombies.

use crate::kernel::{raw, sys};
use crate::procfs;
use crate::stage::{Check, Fallible, Setup, Stage, eventually, fork, same, sleep_for_good};

pub const WORKLOADS: &[(&str, Setup)] = &[
    ("tree", tree),
    ("tree-sessions", sessions),
    ("tree-orphans", orphans),
    ("tree-wide", wide),
    ("zombies", zombies),
    ("zombie-leaders", zombie_leaders),
];

/// Pid, parent, group, session, children.
#[derive(Debug, PartialEq)]
struct Place {
    pid: i32,
    parent: i32,
    group: i32,
    session: i32,
}

fn place() -> Place {
    unsafe { Place { pid: libc::getpid(), parent: libc::getppid(), group: libc::getpgrp(), session: libc::getsid(0) } }
}

/// The present place is kept.
fn keeps_place(_: &mut Stage) -> Fallible<Check> {
    let before = place();
    Ok(Box::new(move || same("pid, parent, group, session", &before, &place())))
}

/// The children of a process, in the kernel's order (oldest first).
fn children(pid: i32) -> Fallible<String> {
    procfs::text(&format!("/proc/{pid}/task/{pid}/children"))
}

/// Three generations, with holes in the numbering of pids.
fn tree(stage: &mut Stage) -> Fallible<Check> {
    stage.member("a", |a| {
        a.member("b", |b| {
            b.member("c", keeps_place)?;
            keeps_place(b)
        })?;
        let gone = fork(|| {})?;
        sys!(waitpid(gone, std::ptr::null_mut(), 0))?;
        a.member("d", keeps_place)?;
        keeps_place(a)
    })?;
    let last = stage.member("e", keeps_place)?;
    let (mine, mut own) = (children(1)?, keeps_place(stage)?);
    Ok(Box::new(move || {
        own()?;
        same("children of init", &mine, &children(1)?)?;
        let next = fork(|| {})?;
        sys!(waitpid(next, std::ptr::null_mut(), 0))?;
        crate::stage::holds(next != last, "a living child's pid was given out again")
    }))
}

/// Every kind of membership: leader of a session, leader of a group in it, member of a sibling's group,
/// member of a group and of a session whose leaders are dead.
fn sessions(stage: &mut Stage) -> Fallible<Check> {
    stage.member("session", |s| {
        sys!(setsid())?;
        let leader = s.member("group", |g| {
            sys!(setpgid(0, 0))?;
            keeps_place(g)
        })?;
        s.member("fellow", move |f| {
            sys!(setpgid(0, leader))?;
            keeps_place(f)
        })?;
        // The group's leader is dead and reaped; its number lives on as the group's.
        let doomed = fork(|| {
            unsafe { libc::setpgid(0, 0) };
            sleep_for_good()
        })?;
        eventually("own group", || unsafe { libc::getpgid(doomed) } == doomed)?;
        s.member("leaderless", move |l| {
            sys!(setpgid(0, doomed))?;
            keeps_place(l)
        })?;
        sys!(kill(doomed, libc::SIGKILL))?;
        sys!(waitpid(doomed, std::ptr::null_mut(), 0))?;
        keeps_place(s)
    })?;
    keeps_place(stage)
}

/// A daemon of the old school: fork, setsid, fork, and its session's leader is gone. And a child that init
/// inherited from a dead parent.
fn orphans(stage: &mut Stage) -> Fallible<Check> {
    let daemon = stage.invite("daemon");
    let leader = fork(move || {
        unsafe { libc::setsid() };
        let child = fork(move || {
            while unsafe { libc::getppid() } != 1 {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            daemon.perform(keeps_place)
        });
        assert!(child.is_ok());
    })?;
    sys!(waitpid(leader, std::ptr::null_mut(), 0))?;
    stage.wait_for_member("daemon")?;
    keeps_place(stage)
}

/// Forty children.
fn wide(stage: &mut Stage) -> Fallible<Check> {
    for n in 0..40 {
        stage.member(&n.to_string(), keeps_place)?;
    }
    let before = children(1)?;
    Ok(Box::new(move || same("children of init", &before, &children(1)?)))
}

/// How a child ended, as waitid(2) says.
#[derive(Debug, PartialEq)]
struct End {
    pid: i32,
    uid: u32,
    code: i32,
    status: i32,
}

fn end_of(pid: i32, flags: i32) -> Fallible<End> {
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    sys!(waitid(libc::P_PID, pid as u32, &mut info, libc::WEXITED | libc::WNOHANG | flags))?;
    unsafe { Ok(End { pid: info.si_pid(), uid: info.si_uid(), code: info.si_code, status: info.si_status() }) }
}

fn zombie(body: impl FnOnce()) -> Fallible<i32> {
    let pid = fork(body)?;
    eventually("zombie", || end_of(pid, libc::WNOWAIT).is_ok_and(|e| e.pid == pid))?;
    Ok(pid)
}

/// Children that ended and were not waited for: exit codes, signals, another uid; with comm and place.
fn zombies(_: &mut Stage) -> Fallible<Check> {
    let dead = [
        zombie(|| unsafe { libc::_exit(0) })?,
        zombie(|| unsafe { libc::_exit(7) })?,
        zombie(|| unsafe { libc::_exit(255) })?,
        zombie(|| unsafe {
            libc::raise(libc::SIGKILL);
        })?,
        zombie(|| unsafe {
            libc::signal(libc::SIGTERM, libc::SIG_DFL);
            libc::raise(libc::SIGTERM);
        })?,
        zombie(|| unsafe { libc::abort() })?,
        zombie(|| unsafe {
            libc::prctl(libc::PR_SET_NAME, c"the-late".as_ptr());
            libc::setpgid(0, 0);
            libc::_exit(3)
        })?,
        zombie(|| unsafe {
            libc::setresuid(1000, 1000, 1000);
            libc::_exit(4)
        })?,
    ];
    /// How it ended; parent, group, session and exit code; what its status says.
    type Remains = (End, Vec<i64>, Vec<String>);
    let facts = move || -> Fallible<Vec<Remains>> {
        dead.iter()
            .map(|pid| {
                let who = pid.to_string();
                // Parent, group, session, and the exit code as /proc tells it.
                Ok((
                    end_of(*pid, libc::WNOWAIT)?,
                    procfs::stat(&who, &[4, 5, 6, 52])?,
                    procfs::status(&who, &["Name", "State"])?,
                ))
            })
            .collect()
    };
    let mut before = facts()?;
    let mut reaped = false;
    Ok(Box::new(move || {
        if !reaped {
            same("zombies", &before, &facts()?)?;
            // The first is reaped now; the others stay, for a second check and for the record.
            let first = before.remove(0).0;
            same("reaped", &first, &end_of(first.pid, 0)?)?;
            reaped = true;
        }
        for (end, ..) in &before {
            same("zombie", end, &end_of(end.pid, libc::WNOWAIT)?)?;
        }
        Ok(())
    }))
}

/// The dead can lead the living: a zombie that leads a session, and one that leads a group.
fn zombie_leaders(stage: &mut Stage) -> Fallible<Check> {
    let follower = stage.invite("follower");
    let leader = zombie(move || unsafe {
        libc::setsid();
        let child = fork(move || {
            while libc::getppid() != 1 {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            follower.perform(keeps_place)
        });
        assert!(child.is_ok());
    })?;
    stage.wait_for_member("follower")?;
    let group = fork(|| {
        unsafe { libc::setpgid(0, 0) };
        sleep_for_good()
    })?;
    eventually("own group", || unsafe { libc::getpgid(group) } == group)?;
    stage.member("grouped", move |g| {
        sys!(setpgid(0, group))?;
        keeps_place(g)
    })?;
    sys!(kill(group, libc::SIGKILL))?;
    eventually("zombie", || end_of(group, libc::WNOWAIT).is_ok_and(|e| e.pid == group))?;
    Ok(Box::new(move || {
        same("leader of a session", libc::CLD_EXITED, end_of(leader, libc::WNOWAIT)?.code)?;
        same("leader of a group", libc::CLD_KILLED, end_of(group, libc::WNOWAIT)?.code)?;
        same("tid of init", 1, raw!(SYS_gettid)?)
    }))
}
