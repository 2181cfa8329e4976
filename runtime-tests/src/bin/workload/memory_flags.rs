//! What was said of memory: madvise(2), mlock(2), and what that does at fork.

use crate::kernel::sys;
use crate::memory_map::{Map, PAGE};
use crate::procfs;
use crate::stage::{Check, Fallible, Setup, Stage, fork, same};

pub const WORKLOADS: &[(&str, Setup)] = &[("memory-advice", advice), ("memory-fork-advice", fork_advice)];

/// Every piece of advice keeps its flag (`VmFlags` of smaps).
fn advice(_: &mut Stage) -> Fallible<Check> {
    let kinds = [
        ("dontdump", libc::MADV_DONTDUMP),
        ("dontfork", libc::MADV_DONTFORK),
        ("wipeonfork", libc::MADV_WIPEONFORK),
        ("sequential", libc::MADV_SEQUENTIAL),
        ("random", libc::MADV_RANDOM),
        ("mergeable", libc::MADV_MERGEABLE),
        ("hugepage", libc::MADV_HUGEPAGE),
        ("nohugepage", libc::MADV_NOHUGEPAGE),
    ];
    let mut all = Vec::new();
    for (n, (name, advice)) in (0u64..).zip(kinds) {
        let map = spaced(16)?;
        match map.advise(advice) {
            Ok(()) => {}
            Err(e) => {
                println!("SKIP advice {name}: {e}");
                continue;
            }
        }
        map.fill(100 * n);
        all.push((name, map, 100 * n));
    }
    let locked = spaced(16)?;
    locked.fill(9000);
    sys!(mlock(locked.addr as *const _, locked.len))?;
    all.push(("mlock", locked, 9000));
    let noreserve = Map::new(16 * PAGE, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_NORESERVE)?;
    noreserve.fill(9100);
    all.push(("noreserve", noreserve, 9100));
    let flags = |map: &Map| -> Fallible<Vec<String>> {
        let field = procfs::smaps_field(&procfs::smaps_of(map.addr)?, "VmFlags")?;
        // `sd` is the soft-dirty bit and `uw`, `um` are a dump's own tracking: neither is the process's.
        Ok(field.split_whitespace().filter(|f| !matches!(*f, "sd" | "uw" | "um")).map(str::to_owned).collect())
    };
    let before: Vec<_> = all.iter().map(|(_, map, _)| flags(map)).collect::<Fallible<_>>()?;
    Ok(Box::new(move || {
        for ((name, map, seed), before) in all.iter().zip(&before) {
            same(format!("flags of memory, {name}"), before, &flags(map)?)?;
            map.holds(name, *seed)?;
        }
        Ok(())
    }))
}

/// A mapping with unmapped pages about it, so that it does not merge with a neighbour.
fn spaced(pages: usize) -> Fallible<Map> {
    let room = Map::private((pages + 2) * PAGE)?;
    sys!(munmap(room.addr as *mut _, PAGE))?;
    sys!(munmap(room.part(pages + 1, 1).addr as *mut _, PAGE))?;
    Ok(room.part(1, pages))
}

/// A child that is forked afterwards gets zeros, or nothing, where its parent said so.
fn fork_advice(_: &mut Stage) -> Fallible<Check> {
    let (wiped, kept_away, inherited) = (spaced(4)?, spaced(4)?, spaced(4)?);
    wiped.advise(libc::MADV_WIPEONFORK)?;
    kept_away.advise(libc::MADV_DONTFORK)?;
    for (n, map) in [wiped, kept_away, inherited].into_iter().enumerate() {
        map.fill(n as u64);
    }
    Ok(Box::new(move || {
        wiped.holds("the parent's own", 0)?;
        let child = fork(move || unsafe {
            let good = wiped.is_zero("").is_ok()
                && kept_away.readable().is_ok_and(|r| r.iter().all(|r| !r))
                && inherited.holds("", 2).is_ok();
            libc::_exit(if good { 0 } else { 1 })
        })?;
        let mut status = 0;
        sys!(waitpid(child, &mut status, 0))?;
        same("a forked child found its memory as advised", 0, status)
    }))
}
