//! Memory and its contents: anonymous, heap, stack, guards, holes, sharing between processes.

use std::sync::atomic::Ordering;

use crate::kernel::{raw, sys};
use crate::memory_map::{Map, PAGE};
use crate::procfs;
use crate::stage::{Check, Fallible, Setup, Stage, eventually, fork, holds, same};

pub const WORKLOADS: &[(&str, Setup)] = &[
    ("memory-private", private),
    ("memory-shared", shared),
    ("memory-shared-parts", shared_parts),
    ("memory-heap", heap),
    ("memory-stack", stack),
    ("memory-guards", guards),
    ("memory-prot-none", prot_none),
    ("memory-holes", holes),
    ("memory-cow", cow),
    ("memory-code", code),
    ("memory-vdso", vdso),
    ("memory-many", many),
    ("memory-large", large),
];

const MIB: usize = 1 << 20;

fn private(_: &mut Stage) -> Fallible<Check> {
    let all = Map::private(4 * MIB)?;
    all.fill(1);
    let writable = all.part(0, 100);
    all.part(200, 50).protect(libc::PROT_READ)?;
    all.part(300, 50).protect(libc::PROT_READ | libc::PROT_EXEC)?;
    Ok(Box::new(move || {
        all.holds("private memory", 1)?;
        writable.fill(2);
        writable.holds("written after", 2)?;
        writable.fill(1);
        let read_only = procfs::smaps_of(all.part(200, 1).addr)?;
        holds(read_only.lines().next().is_some_and(|l| l.contains(" r--p ")), "read-only pages stay so")
    }))
}

/// Shared memory is one: what either side writes, the other one sees, before and after.
fn shared(stage: &mut Stage) -> Fallible<Check> {
    let map = Map::shared(2 * MIB)?;
    map.fill(10);
    let letters = Map::shared(PAGE)?;
    stage.member("peer", move |_| {
        std::thread::spawn(move || {
            loop {
                // Echo: word 1 follows word 0.
                letters.word(1).store(letters.word(0).load(Ordering::SeqCst), Ordering::SeqCst);
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        });
        Ok(Box::new(move || map.holds("shared memory, seen by the child", 10)))
    })?;
    let mut round = 0;
    Ok(Box::new(move || {
        map.holds("shared memory", 10)?;
        round += 1;
        letters.word(0).store(round, Ordering::SeqCst);
        eventually("the child's writes to be seen", || letters.word(1).load(Ordering::SeqCst) == round)
    }))
}

/// One shared object mapped several times: at other addresses, in parts, with other protection.
fn shared_parts(stage: &mut Stage) -> Fallible<Check> {
    let whole = Map::shared(64 * PAGE)?;
    whole.fill(20);
    // mremap of a shared mapping with old size 0 maps the same pages once more.
    let twin = |first: usize, pages: usize| -> Fallible<Map> {
        let from = whole.part(first, pages);
        let addr = sys!(mremap(from.addr as *mut _, 0, from.len, libc::MREMAP_MAYMOVE))? as usize;
        Ok(Map { addr, len: from.len })
    };
    let (all, middle) = (twin(0, 64)?, twin(16, 8)?);
    middle.protect(libc::PROT_READ)?;
    stage.member("child", move |_| {
        // The child keeps a part only.
        sys!(munmap(whole.part(0, 32).addr as *mut _, 32 * PAGE))?;
        sys!(munmap(all.addr as *mut _, all.len))?;
        Ok(Box::new(move || whole.part(32, 32).holds("the child's half", 52)))
    })?;
    Ok(Box::new(move || {
        whole.holds("first mapping", 20)?;
        all.holds("second mapping", 20)?;
        middle.holds("third mapping", 36)?;
        let old = whole.word(16 * 512).load(Ordering::SeqCst);
        whole.word(16 * 512).store(!old, Ordering::SeqCst);
        let seen = (all.word(16 * 512).load(Ordering::SeqCst), middle.word(0).load(Ordering::SeqCst));
        whole.word(16 * 512).store(old, Ordering::SeqCst);
        same("a write through one mapping, seen through the two others", (!old, !old), seen)
    }))
}

/// The heap by brk: its content, and that it goes on growing and shrinking from where it was.
fn heap(_: &mut Stage) -> Fallible<Check> {
    let grow = |by: isize| -> Fallible<usize> {
        let now = unsafe { libc::syscall(libc::SYS_brk, 0) } as usize;
        let to = now.wrapping_add_signed(by);
        same("brk", to, unsafe { libc::syscall(libc::SYS_brk, to) } as usize)?;
        Ok(now)
    };
    let end = grow(0)?;
    grow((PAGE - end % PAGE) as isize + MIB as isize)?;
    let map = Map { addr: end.next_multiple_of(PAGE), len: MIB };
    map.fill(30);
    Ok(Box::new(move || {
        map.holds("heap", 30)?;
        let start = grow(3 * MIB as isize)?;
        let more = Map { addr: start, len: 3 * MIB };
        more.is_zero("grown heap")?;
        more.fill(31);
        more.holds("grown heap", 31)?;
        grow(-3 * MIB as isize)?;
        map.holds("heap", 30)?;
        let vma = procfs::smaps_of(map.addr)?;
        holds(vma.contains("[heap]"), format!("the heap is known as one: {}", vma.lines().next().unwrap_or_default()))
    }))
}

/// Touches `depth` pages of stack, and gives each page's mark back on the way up.
#[inline(never)]
fn descend(depth: usize, seed: u64) -> bool {
    let mut frame = [0u64; 512];
    frame[0] = seed + depth as u64;
    std::hint::black_box(&mut frame);
    let below = depth == 0 || descend(depth - 1, seed);
    below && std::hint::black_box(frame[0]) == seed + depth as u64
}

/// Stacks grow further than they had when they were dumped; so do other mappings that grow downwards.
fn stack(_: &mut Stage) -> Fallible<Check> {
    holds(descend(60, 5), "stack before")?;
    let flags = libc::MAP_PRIVATE | libc::MAP_GROWSDOWN;
    // Room below, so that it can grow.
    let room = Map::private(512 * PAGE)?;
    sys!(munmap(room.addr as *mut _, room.len))?;
    let top = room.part(500, 4);
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let at = sys!(mmap(top.addr as *mut _, top.len, prot, flags | libc::MAP_ANONYMOUS | libc::MAP_FIXED, -1, 0))?;
    let grows = Map { addr: at as usize, len: top.len };
    grows.fill(40);
    let thread = crate::threads::Answerer::start(|| Ok(()))?;
    Ok(Box::new(move || {
        holds(descend(1000, 6), "the stack grows after")?;
        thread.ask(|| holds(descend(100, 7), "a thread's stack"))?;
        grows.holds("growing mapping", 40)?;
        let vma = procfs::smaps_of(grows.addr)?;
        holds(procfs::smaps_field(&vma, "VmFlags")?.contains("gd"), "a mapping that grows down stays one")
    }))
}

/// Guard pages: inside a mapping by MADV_GUARD_INSTALL (where the kernel has it), and below it by PROT_NONE.
fn guards(_: &mut Stage) -> Fallible<Check> {
    const MADV_GUARD_INSTALL: i32 = 102;
    let map = Map::private(64 * PAGE)?;
    map.fill(50);
    let by_advice = [map.part(10, 1), map.part(32, 4)];
    let mut expected = vec![true; 64];
    if by_advice[0].advise(MADV_GUARD_INSTALL).is_ok() {
        by_advice[1].advise(MADV_GUARD_INSTALL)?;
        expected[10] = false;
        expected[32..36].fill(false);
    } else {
        println!("SKIP guard regions: this kernel lacks MADV_GUARD_INSTALL; PROT_NONE only");
    }
    map.part(0, 1).protect(libc::PROT_NONE)?;
    expected[0] = false;
    same("guards before", &expected, &map.readable()?)?;
    Ok(Box::new(move || {
        same("which pages can be read", &expected, &map.readable()?)?;
        map.part(1, 9).holds("below the guard", 51)?;
        map.part(11, 21).holds("above the guard", 61)?;
        map.part(36, 28).holds("above the guards", 86)?;
        // What steps on a guard dies of it.
        for guard in expected.iter().enumerate().filter(|(_, readable)| !**readable).map(|(n, _)| map.part(n, 1)) {
            let stepper = fork(move || unsafe {
                libc::signal(libc::SIGSEGV, libc::SIG_DFL);
                (guard.addr as *mut u8).write_volatile(1);
            })?;
            let mut status = 0;
            sys!(waitpid(stepper, &mut status, 0))?;
            same("end of a process that steps on a guard", libc::SIGSEGV, libc::WTERMSIG(status))?;
        }
        Ok(())
    }))
}

/// Memory that nobody may read has content all the same.
fn prot_none(_: &mut Stage) -> Fallible<Check> {
    let map = Map::private(128 * PAGE)?;
    map.fill(60);
    let shared = Map::shared(32 * PAGE)?;
    shared.fill(61);
    let hidden = [map.part(16, 64), shared.part(8, 8)];
    for part in hidden {
        part.protect(libc::PROT_NONE)?;
    }
    Ok(Box::new(move || {
        for (part, seed) in hidden.into_iter().zip([76, 69]) {
            holds(part.readable()?.iter().all(|r| !r), "PROT_NONE holds")?;
            part.protect(libc::PROT_READ)?;
            part.holds("PROT_NONE memory", seed)?;
            part.protect(libc::PROT_NONE)?;
        }
        map.part(80, 48).holds("its neighbour", 140)
    }))
}

/// What was never touched stays unpopulated; zero pages read as zero.
fn holes(_: &mut Stage) -> Fallible<Check> {
    let sparse = Map::private(256 * MIB)?;
    sparse.advise(libc::MADV_NOHUGEPAGE)?;
    let touched: Vec<usize> = (0..sparse.pages()).step_by(4099).collect();
    for n in &touched {
        sparse.part(*n, 1).fill(*n as u64);
    }
    // Read, never written: the kernel's zero page.
    let read_only = sparse.part(5000, 16);
    read_only.is_zero("never written")?;
    let written_zero = sparse.part(6000, 16);
    unsafe { std::ptr::write_bytes(written_zero.addr as *mut u8, 0, written_zero.len) };
    let dropped = sparse.part(7000, 16);
    dropped.fill(1);
    dropped.advise(libc::MADV_DONTNEED)?;
    let count = |map: Map| map.populated().map(|p| p.iter().filter(|p| **p).count());
    let before = count(sparse)?;
    let untouched = Map::private(1 << 30)?;
    Ok(Box::new(move || {
        let now = count(sparse)?;
        holds(now <= before, format!("holes stay holes: {before} pages were populated, {now} are"))?;
        same("pages of a mapping that was never touched", 0, count(untouched)?)?;
        for n in &touched {
            sparse.part(*n, 1).holds("island", *n as u64)?;
        }
        for zero in [written_zero, dropped, read_only] {
            zero.is_zero("zero page")?;
        }
        dropped.advise(libc::MADV_DONTNEED)
    }))
}

/// Copy-on-write sharing between parent and child comes back: the memory counts once, and is still private.
fn cow(stage: &mut Stage) -> Fallible<Check> {
    let map = Map::private(16 * MIB)?;
    map.advise(libc::MADV_NOHUGEPAGE)?;
    map.fill(70);
    let own_copy = map.part(0, 64);
    let child_writes = map.part(128, 1);
    stage.member("child", move |grandparent| {
        grandparent.member("child", move |_| Ok(Box::new(move || map.holds("the grandchild's memory", 70))))?;
        own_copy.fill(71);
        Ok(Box::new(move || {
            own_copy.holds("the child's own pages", 71)?;
            map.part(64, 64).holds("the child's shared pages", 134)?;
            child_writes.fill(72);
            child_writes.holds("written by the child", 72)
        }))
    })?;
    Ok(Box::new(move || {
        let vma = procfs::smaps_of(map.addr)?;
        let shared = procfs::smaps_size(&vma, "Shared_Dirty")? + procfs::smaps_size(&vma, "Shared_Clean")?;
        holds(
            shared >= map.len - 256 * PAGE,
            format!("memory shared by copy on write: expected about {} KiB, got {} KiB", map.len / 1024, shared / 1024),
        )?;
        map.holds("the parent's memory", 70)
    }))
}

/// Machine code in anonymous memory, as a just-in-time compiler leaves it.
fn code(_: &mut Stage) -> Fallible<Check> {
    let mut map = Map::private(PAGE)?;
    // lea eax, [rdi + 42]; ret
    map.bytes_mut()[..4].copy_from_slice(&[0x8d, 0x47, 0x2a, 0xc3]);
    map.protect(libc::PROT_READ | libc::PROT_EXEC)?;
    let function: extern "C" fn(i32) -> i32 = unsafe { std::mem::transmute(map.addr) };
    Ok(Box::new(move || same("result of generated code", 1042, function(1000))))
}

/// The vdso's clock, found and called as a C library does it.
fn vdso(_: &mut Stage) -> Fallible<Check> {
    let base = unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) } as usize;
    let clock: extern "C" fn(i32, *mut libc::timespec) -> i32 =
        unsafe { std::mem::transmute(vdso_symbol(base, b"__vdso_clock_gettime").ok_or("skip: no vdso")?) };
    let now = move || {
        let mut at: libc::timespec = unsafe { std::mem::zeroed() };
        clock(libc::CLOCK_MONOTONIC, &mut at);
        at.tv_sec as f64 + at.tv_nsec as f64 / 1e9
    };
    let before = now();
    Ok(Box::new(move || {
        let vma = procfs::smaps_of(base)?;
        holds(vma.contains("[vdso]"), "the vdso is where AT_SYSINFO_EHDR says")?;
        let mut by_kernel: libc::timespec = unsafe { std::mem::zeroed() };
        raw!(SYS_clock_gettime, libc::CLOCK_MONOTONIC, &raw mut by_kernel)?;
        let (by_kernel, by_vdso) = (by_kernel.tv_sec as f64 + by_kernel.tv_nsec as f64 / 1e9, now());
        holds(by_vdso >= before, format!("the vdso's clock went back from {before} to {by_vdso}"))?;
        holds((by_vdso - by_kernel).abs() < 0.5, format!("vdso says {by_vdso}, kernel says {by_kernel}"))
    }))
}

/// A function of the vdso by its name, from the ELF image's dynamic symbols.
fn vdso_symbol(base: usize, name: &[u8]) -> Option<usize> {
    let u16_at = |at: usize| unsafe { (at as *const u16).read_unaligned() } as usize;
    let u32_at = |at: usize| unsafe { (at as *const u32).read_unaligned() } as usize;
    let u64_at = |at: usize| unsafe { (at as *const u64).read_unaligned() } as usize;
    let headers = (0..u16_at(base + 56)).map(|n| base + u64_at(base + 32) + n * u16_at(base + 54));
    let (load, dynamic) = headers.fold((None, None), |found, h| match u32_at(h) {
        1 => (found.0.or(Some(u64_at(h + 16))), found.1),
        2 => (found.0, Some(base + u64_at(h + 8))),
        _ => found,
    });
    let (bias, dynamic) = (base - load?, dynamic?);
    let entry =
        |tag: usize| (0..64).map(|n| dynamic + n * 16).find(|d| u64_at(*d) == tag).map(|d| bias + u64_at(d + 8));
    let (strings, symbols) = (entry(5)?, entry(6)?);
    (1..64).map(|n| symbols + n * 24).find_map(|symbol| {
        let text = unsafe { std::ffi::CStr::from_ptr((strings + u32_at(symbol)) as *const _) };
        (text.to_bytes() == name).then(|| bias + u64_at(symbol + 8))
    })
}

/// More mappings than one would like to handle one by one.
fn many(_: &mut Stage) -> Fallible<Check> {
    let map = Map::private(4000 * PAGE)?;
    map.fill(80);
    for n in (0..4000).step_by(2) {
        map.part(n, 1).protect(libc::PROT_READ)?;
    }
    let lines = || procfs::text("/proc/self/maps").map(|m| m.lines().count());
    let before = lines()?;
    Ok(Box::new(move || {
        map.holds("memory of many mappings", 80)?;
        let now = lines()?;
        holds(now.abs_diff(before) <= 4, format!("mappings: {before} before, {now} after"))
    }))
}

/// 192 MiB in two processes, with a writer that checks what it wrote.
fn large(stage: &mut Stage) -> Fallible<Check> {
    fn writer() -> Fallible<Check> {
        let map = Map::private(96 * MIB)?;
        let words = map.len / 8;
        for n in 0..words {
            map.word(n).store(n as u64 ^ 0x5555_5555_5555_5555, Ordering::Relaxed);
        }
        std::thread::spawn(move || {
            // Two words change together: their sum is zero whenever the writer is between two pairs.
            for turn in 1u64.. {
                let at = turn.wrapping_mul(0x9e37_79b9_7f4a_7c15) as usize % (words / 2) * 2;
                let (a, b) = (map.word(at), map.word(at + 1));
                let (was_a, was_b) = (a.load(Ordering::Relaxed), b.load(Ordering::Relaxed));
                a.store(was_a.wrapping_add(turn), Ordering::Relaxed);
                b.store(was_b.wrapping_sub(turn), Ordering::Relaxed);
                if turn % 64 == 0 {
                    std::thread::sleep(std::time::Duration::from_micros(200));
                }
            }
        });
        let sum = move || (0..words).fold(0u64, |s, n| s.wrapping_add(map.word(n).load(Ordering::Relaxed)));
        let expected = (0..words).fold(0u64, |s, n| s.wrapping_add(n as u64 ^ 0x5555_5555_5555_5555));
        Ok(Box::new(move || {
            // The sum is taken while the writer writes: a few tries until none of its writes tore it.
            eventually("checksum of a large memory", || sum() == expected)
        }))
    }
    stage.member("child", |_| writer())?;
    writer()
}
