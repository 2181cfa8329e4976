//! The programs that scenarios run in containers: `workload NAME`.
//!
//! Each sets up one kind of state, says that it is ready, and, when it is asked, verifies all of it. It talks to
//! the scenario through plain files in `/run-state` only (`stage`), so that nothing under test is needed to tell
//! the verdict.
// These programs are made of raw system calls, each a line or two: a fence around `unsafe` would only hide them.
#![allow(unsafe_code, clippy::undocumented_unsafe_blocks)]

mod kernel;
mod memory_map;
mod procfs;
mod stage;

mod blocked_calls;
mod clocks;
mod credentials;
mod deleted_files;
mod epoll;
mod event_sources;
mod identity;
mod inotify;
mod limits;
mod load;
mod locks;
mod mapped_files;
mod memory;
mod memory_flags;
mod outside;
mod pipes;
mod precopy;
mod refusals;
mod registers;
mod regular_files;
mod rseq;
mod seccomp;
mod signals;
mod sysv;
mod tcp;
mod threads;
mod timers;
mod tmpfs;
mod trees;
mod udp;
mod unix_names;
mod unix_sockets;

use stage::{Setup, Stage};

/// Every workload there is.
fn workloads() -> impl Iterator<Item = &'static (&'static str, Setup)> {
    [
        blocked_calls::WORKLOADS,
        clocks::WORKLOADS,
        credentials::WORKLOADS,
        deleted_files::WORKLOADS,
        epoll::WORKLOADS,
        event_sources::WORKLOADS,
        identity::WORKLOADS,
        inotify::WORKLOADS,
        limits::WORKLOADS,
        load::WORKLOADS,
        locks::WORKLOADS,
        mapped_files::WORKLOADS,
        memory::WORKLOADS,
        memory_flags::WORKLOADS,
        outside::WORKLOADS,
        pipes::WORKLOADS,
        precopy::WORKLOADS,
        refusals::WORKLOADS,
        registers::WORKLOADS,
        regular_files::WORKLOADS,
        rseq::WORKLOADS,
        seccomp::WORKLOADS,
        signals::WORKLOADS,
        tcp::WORKLOADS,
        sysv::WORKLOADS,
        threads::WORKLOADS,
        timers::WORKLOADS,
        tmpfs::WORKLOADS,
        trees::WORKLOADS,
        udp::WORKLOADS,
        unix_names::WORKLOADS,
        unix_sockets::WORKLOADS,
    ]
    .into_iter()
    .flatten()
}

fn main() {
    let name = std::env::args().nth(1).unwrap_or_default();
    match workloads().find(|(known, _)| *known == name) {
        Some((_, setup)) => Stage::of_init().perform(setup),
        None => {
            for (known, _) in workloads() {
                println!("{known}");
            }
            std::process::exit(if name.is_empty() { 0 } else { 2 })
        }
    }
}
