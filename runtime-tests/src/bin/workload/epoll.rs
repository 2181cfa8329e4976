//! epoll: what it watches, how, and what it says.

use crate::kernel::{sys, write};
use crate::procfs;
use crate::stage::{Check, Fallible, Setup, Stage, holds, same};

pub const WORKLOADS: &[(&str, Setup)] = &[("epoll", epoll), ("epoll-modes", modes), ("epoll-nested", nested)];

fn add(epoll: i32, fd: i32, events: i32, data: u64) -> Fallible {
    let mut event = libc::epoll_event { events: events as u32, u64: data };
    sys!(epoll_ctl(epoll, libc::EPOLL_CTL_ADD, fd, &mut event)).map(drop)
}

/// What is ready now: (events, data), in order of the data.
fn ready(epoll: i32) -> Fallible<Vec<(u32, u64)>> {
    let mut events = [libc::epoll_event { events: 0, u64: 0 }; 32];
    let count = sys!(epoll_wait(epoll, events.as_mut_ptr(), 32, 0))? as usize;
    let mut all: Vec<_> = events[..count].iter().map(|e| (e.events, e.u64)).collect();
    all.sort_unstable_by_key(|e| e.1);
    Ok(all)
}

/// The targets as fdinfo lists them: descriptor, events, data. Inode numbers may change, and EPOLLERR and EPOLLHUP
/// come with every registration: only the kernel takes them away, from a one-shot that has fired.
fn targets(epoll: i32) -> Fallible<Vec<(String, u32, String)>> {
    let info = procfs::text(&format!("/proc/self/fdinfo/{epoll}"))?;
    let mut all = Vec::new();
    for line in info.lines().filter(|l| l.starts_with("tfd:")) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_, fd, _, events, _, data, ..] = words[..] else {
            return Err(format!("fdinfo: {line}"));
        };
        let events = u32::from_str_radix(events, 16).map_err(|e| e.to_string())?;
        let always = (libc::EPOLLERR | libc::EPOLLHUP) as u32;
        all.push((fd.to_owned(), events & !always, data.to_owned()));
    }
    all.sort_unstable();
    Ok(all)
}

fn pipe() -> Fallible<[i32; 2]> {
    let mut ends = [0; 2];
    sys!(pipe2(ends.as_mut_ptr(), libc::O_NONBLOCK))?;
    Ok(ends)
}

const IN: i32 = libc::EPOLLIN;
const OUT: i32 = libc::EPOLLOUT;

/// Pipes, eventfds, sockets, timers; one target under two numbers, one that was closed but lives on in a dup.
fn epoll(stage: &mut Stage) -> Fallible<Check> {
    let epoll = sys!(epoll_create1(libc::EPOLL_CLOEXEC))? as i32;
    let (full, silent) = (pipe()?, pipe()?);
    write(full[1], b"something")?;
    let event = sys!(eventfd(7, libc::EFD_NONBLOCK))? as i32;
    let twin = sys!(dup(full[0]))? as i32;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").map_err(|e| e.to_string())?;
    use std::os::fd::AsRawFd;
    add(epoll, full[0], IN, u64::MAX)?;
    add(epoll, twin, IN, 2)?;
    add(epoll, full[1], OUT, 3)?;
    add(epoll, silent[0], IN | libc::EPOLLRDHUP | libc::EPOLLPRI, 4)?;
    add(epoll, event, IN, 5)?;
    add(epoll, listener.as_raw_fd(), IN, 6)?;
    let (before, listed) = (ready(epoll)?, targets(epoll)?);
    same("ready at first", vec![2, 3, 5, u64::MAX], before.iter().map(|e| e.1).collect())?;
    stage.member("child", move |_| {
        let expected = ready(epoll)?;
        Ok(Box::new(move || same("ready, seen by the child", &expected, &ready(epoll)?)))
    })?;
    Ok(Box::new(move || {
        let _ = &listener;
        same("targets", &listed, &targets(epoll)?)?;
        same("close-on-exec", libc::FD_CLOEXEC, sys!(fcntl(epoll, libc::F_GETFD))? as i32)?;
        same("ready", &before, &ready(epoll)?)
    }))
}

/// Edge-triggered, one-shot, exclusive, and a target that was told and switched off.
fn modes(_: &mut Stage) -> Fallible<Check> {
    let epoll = sys!(epoll_create1(0))? as i32;
    let (edge, once, spent, exclusive) = (pipe()?, pipe()?, pipe()?, pipe()?);
    add(epoll, edge[0], IN | libc::EPOLLET, 1)?;
    add(epoll, once[0], IN | libc::EPOLLONESHOT, 2)?;
    add(epoll, spent[0], IN | libc::EPOLLONESHOT, 3)?;
    add(epoll, exclusive[0], IN | libc::EPOLLEXCLUSIVE, 4)?;
    write(spent[1], b"x")?;
    same("told once", vec![(IN as u32, 3)], ready(epoll)?)?;
    let listed = targets(epoll)?;
    let mut done = false;
    Ok(Box::new(move || {
        if !done {
            same("targets and their modes", &listed, &targets(epoll)?)?;
            // A one-shot that has fired stays silent.
            same("nothing is ready", vec![], ready(epoll)?)?;
        }
        done = true;
        write(edge[1], b"x")?;
        same("an edge", vec![(IN as u32, 1)], ready(epoll)?)?;
        same("an edge is told once", vec![], ready(epoll)?)?;
        crate::kernel::read(edge[0], 1)?;
        let mut again = libc::epoll_event { events: (IN | libc::EPOLLONESHOT) as u32, u64: 33 };
        sys!(epoll_ctl(epoll, libc::EPOLL_CTL_MOD, spent[0], &mut again))?;
        same("armed again", vec![(IN as u32, 33)], ready(epoll)?)?;
        write(exclusive[1], b"x")?;
        let told = ready(epoll)?;
        crate::kernel::read(exclusive[0], 1)?;
        holds(told.iter().any(|e| e.1 == 4), format!("exclusive target: {told:?}"))
    }))
}

/// An epoll that watches an epoll.
fn nested(_: &mut Stage) -> Fallible<Check> {
    let (outer, inner) = (sys!(epoll_create1(0))? as i32, sys!(epoll_create1(0))? as i32);
    let ends = pipe()?;
    add(inner, ends[0], IN, 10)?;
    add(outer, inner, IN, 20)?;
    Ok(Box::new(move || {
        same("nothing is ready", vec![], ready(outer)?)?;
        write(ends[1], b"x")?;
        same("the inner one is ready", vec![(IN as u32, 20)], ready(outer)?)?;
        same("and its target", vec![(IN as u32, 10)], ready(inner)?)?;
        crate::kernel::read(ends[0], 1).map(drop)
    }))
}
