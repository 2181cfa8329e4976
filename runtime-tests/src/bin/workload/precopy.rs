//! Processes that change between the rounds of a pre-copy: on each `stepN` file they do what a tracker of dirty
//! pages may miss, and say `steppedN`.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use crate::kernel::{c, raw, read_exact, sys, write};
use crate::memory_map::{Map, PAGE};
use crate::stage::{Check, Fallible, Setup, Stage, eventually, fork, on_steps, same, sleep_for_good};

pub const WORKLOADS: &[(&str, Setup)] = &[
    ("precopy-idle", idle),
    ("precopy-writes", writes),
    ("precopy-kernel-writes", kernel_writes),
    ("precopy-dontneed", dontneed),
    ("precopy-free", free),
    ("precopy-shared", shared),
    ("precopy-shared-unmapped", shared_unmapped),
    ("precopy-shared-punched", shared_punched),
    ("precopy-new-mapping", new_mapping),
    ("precopy-moved", moved),
    ("precopy-replaced", replaced),
    ("precopy-resized", resized),
    ("precopy-protected", protected),
    ("precopy-file", file),
    ("precopy-huge", huge),
    ("precopy-fork", fork_between),
    ("precopy-fork-cow", fork_cow),
    ("precopy-exec", exec),
    ("precopy-exec-part", exec_part),
    ("precopy-pid-reuse", pid_reuse),
    ("precopy-threads", threads),
    ("precopy-brk", brk),
    ("precopy-stack", stack),
];

const MIB: usize = 1 << 20;
const SEED: u64 = 1000;

/// A mapping filled with `fill(SEED)`; a record of each page's present seed, None being zero.
struct Book {
    map: Map,
    seeds: Vec<Option<u64>>,
}

impl Book {
    fn new(map: Map) -> Book {
        map.fill(SEED);
        Book { map, seeds: (0..map.pages() as u64).map(|n| Some(SEED + n)).collect() }
    }

    fn write(&mut self, page: usize, seed: u64) {
        self.map.part(page, 1).fill(seed);
        self.seeds[page] = Some(seed);
    }

    fn wiped(&mut self, pages: std::ops::Range<usize>) {
        self.seeds[pages].fill(None);
    }

    fn holds(&self, what: &str) -> Fallible {
        for (n, seed) in self.seeds.iter().enumerate() {
            let page = self.map.part(n, 1);
            match seed {
                Some(seed) => page.holds(&format!("{what}, page {n}"), *seed)?,
                None => page.is_zero(&format!("{what}, page {n}"))?,
            }
        }
        Ok(())
    }
}

/// The usual workload: one book, a step that changes it, a check that reads it.
fn book(map: Map, mut step: impl FnMut(&mut Book, u32) -> Fallible + Send + 'static) -> Fallible<Check> {
    let book = Arc::new(Mutex::new(Book::new(map)));
    let ours = book.clone();
    on_steps(move |n| step(&mut *ours.lock().map_err(|e| e.to_string())?, n));
    Ok(Box::new(move || book.lock().map_err(|e| e.to_string())?.holds("memory")))
}

/// 128 MiB that nobody touches.
fn idle(_: &mut Stage) -> Fallible<Check> {
    book(Map::private(128 * MIB)?, |_, _| Ok(()))
}

fn writes(_: &mut Stage) -> Fallible<Check> {
    book(Map::private(16 * MIB)?, |book, n| {
        let pages = book.map.pages();
        (0..500).for_each(|k| book.write((k * 7 + n as usize * 13) % pages, u64::from(n) * 100_000 + k as u64));
        Ok(())
    })
}

/// Written by the kernel on the process's behalf, and by another process.
fn kernel_writes(stage: &mut Stage) -> Fallible<Check> {
    let map = Map::private(4 * MIB)?;
    let mut ends = [0; 2];
    sys!(pipe(ends.as_mut_ptr()))?;
    // The child inherits the map's address, and writes into its parent by process_vm_writev.
    let order = Map::shared(PAGE)?;
    stage.member("writer", move |_| {
        std::thread::spawn(move || {
            let mut done = 0;
            loop {
                let n = order.word(0).load(Ordering::SeqCst);
                if n > done {
                    let page = crate::kernel::noise(900_000 + n, PAGE);
                    let local = libc::iovec { iov_base: page.as_ptr() as *mut _, iov_len: PAGE };
                    let remote = libc::iovec { iov_base: (map.addr + 50 * PAGE) as *mut _, iov_len: PAGE };
                    let count = unsafe { libc::process_vm_writev(1, &local, 1, &remote, 1, 0) };
                    order.word(1).store(if count == PAGE as isize { n } else { u64::MAX }, Ordering::SeqCst);
                    done = n;
                }
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        });
        Ok(Box::new(|| Ok(())))
    })?;
    book(map, move |book, n| {
        let n = u64::from(n);
        // read(2) into untouched pages.
        write(ends[1], &crate::kernel::noise(800_000 + n, PAGE))?;
        let page = book.map.part(100, 1);
        same("read", PAGE as i64, sys!(read(ends[0], page.addr as *mut _, PAGE))?)?;
        book.seeds[100] = Some(800_000 + n);
        order.word(0).store(n, Ordering::SeqCst);
        eventually("the other process writes", || order.word(1).load(Ordering::SeqCst) >= n)?;
        same("process_vm_writev", n, order.word(1).load(Ordering::SeqCst))?;
        book.seeds[50] = Some(900_000 + n);
        // /proc/self/mem, past the protection of the page.
        book.map.part(60, 1).protect(libc::PROT_READ)?;
        let mem = crate::kernel::open("/proc/self/mem", libc::O_RDWR)?;
        let bytes = crate::kernel::noise(700_000 + n, PAGE);
        let at = (book.map.addr + 60 * PAGE) as i64;
        let wrote = sys!(pwrite(mem, bytes.as_ptr().cast(), PAGE, at));
        sys!(close(mem))?;
        if wrote == Ok(PAGE as i64) {
            book.seeds[60] = Some(700_000 + n);
        }
        Ok(())
    })
}

/// Given back to the kernel: it must read as zero afterwards, not as what an earlier round saw.
fn dontneed(_: &mut Stage) -> Fallible<Check> {
    book(Map::private(4 * MIB)?, |book, n| {
        let first = 100 * n as usize;
        book.map.part(first, 64).advise(libc::MADV_DONTNEED)?;
        book.wiped(first..first + 64);
        // Some are written again.
        book.write(first + 7, 5);
        // And some in the very end and beginning.
        book.map.part(0, 1).advise(libc::MADV_DONTNEED)?;
        book.wiped(0..1);
        let last = book.map.pages() - 1;
        book.map.part(last, 1).advise(libc::MADV_DONTNEED)?;
        book.wiped(last..last + 1);
        Ok(())
    })
}

/// MADV_FREE: each page is either what it was or zero; once written again it stays.
fn free(_: &mut Stage) -> Fallible<Check> {
    const MADV_FREE: i32 = 8;
    let map = Map::private(4 * MIB)?;
    map.fill(SEED);
    let steps = Arc::new(Mutex::new(0u32));
    let ours = steps.clone();
    on_steps(move |n| {
        map.part(100 * n as usize, 64).advise(MADV_FREE)?;
        map.part(100 * n as usize + 8, 8).fill(7);
        *ours.lock().map_err(|e| e.to_string())? = n;
        Ok(())
    });
    Ok(Box::new(move || {
        for n in 1..=*steps.lock().map_err(|e| e.to_string())? as usize {
            let part = map.part(100 * n, 64);
            part.part(8, 8).holds("written after MADV_FREE", 7)?;
            for page in (0..8).chain(16..64) {
                let seed = SEED + (100 * n + page) as u64;
                part.part(page, 1).holds("", seed).or_else(|_| part.part(page, 1).is_zero("freed page"))?;
            }
        }
        map.part(0, 100).holds("untouched", SEED)
    }))
}

/// Shared memory that another process writes: its own page tables know, its neighbour's do not.
fn shared(stage: &mut Stage) -> Fallible<Check> {
    let map = Map::shared(4 * MIB)?;
    let order = Map::shared(PAGE)?;
    stage.member("writer", move |_| {
        std::thread::spawn(move || {
            let mut done = 0;
            loop {
                let n = order.word(0).load(Ordering::SeqCst);
                if n > done {
                    (0..64).for_each(|k| map.part(n as usize * 100 + k * 2, 1).fill(n * 1000 + k as u64));
                    order.word(1).store(n, Ordering::SeqCst);
                    done = n;
                }
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        });
        Ok(Box::new(|| Ok(())))
    })?;
    book(map, move |book, n| {
        order.word(0).store(u64::from(n), Ordering::SeqCst);
        eventually("the other process writes", || order.word(1).load(Ordering::SeqCst) == u64::from(n))?;
        for k in 0..64 {
            book.seeds[n as usize * 100 + k * 2] = Some(u64::from(n) * 1000 + k as u64);
        }
        Ok(())
    })
}

/// Shared memory written through a mapping that is gone before the next round.
fn shared_unmapped(_: &mut Stage) -> Fallible<Check> {
    book(Map::shared(4 * MIB)?, |book, n| {
        let part = book.map.part(n as usize * 100, 32);
        let twin = sys!(mremap(part.addr as *mut _, 0, part.len, libc::MREMAP_MAYMOVE))? as usize;
        let twin = Map { addr: twin, len: part.len };
        twin.fill(u64::from(n) * 5000);
        sys!(munmap(twin.addr as *mut _, twin.len))?;
        for k in 0..32 {
            book.seeds[n as usize * 100 + k] = Some(u64::from(n) * 5000 + k as u64);
        }
        Ok(())
    })
}

/// Shared memory with a hole punched in it.
fn shared_punched(_: &mut Stage) -> Fallible<Check> {
    book(Map::shared(4 * MIB)?, |book, n| {
        let first = n as usize * 100;
        book.map.part(first, 40).advise(libc::MADV_REMOVE)?;
        book.wiped(first..first + 40);
        book.write(first + 3, 77);
        Ok(())
    })
}

fn new_mapping(_: &mut Stage) -> Fallible<Check> {
    let made: Arc<Mutex<Vec<(Map, u64)>>> = Arc::default();
    let ours = made.clone();
    on_steps(move |n| {
        for map in [Map::private(2 * MIB)?, Map::shared(MIB)?, Map::private(PAGE)?] {
            let seed = u64::from(n) * 10_000;
            map.fill(seed);
            ours.lock().map_err(|e| e.to_string())?.push((map, seed));
        }
        Ok(())
    });
    Ok(Box::new(move || {
        made.lock().map_err(|e| e.to_string())?.iter().try_for_each(|(map, seed)| map.holds("new mapping", *seed))
    }))
}

/// A mapping moved by mremap: the same content elsewhere, and something new where it was.
fn moved(_: &mut Stage) -> Fallible<Check> {
    let newcomer: Arc<Mutex<Vec<Map>>> = Arc::default();
    let ours = newcomer.clone();
    let mut check = book(Map::private(2 * MIB)?, move |book, _| {
        let old = book.map;
        let room = Map::private(old.len)?;
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
        sys!(mremap(old.addr as *mut _, old.len, old.len, flags, room.addr))?;
        book.map = room;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        sys!(mmap(old.addr as *mut _, 64 * PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0))?;
        old.part(0, 64).fill(31);
        ours.lock().map_err(|e| e.to_string())?.push(old.part(0, 64));
        Ok(())
    })?;
    Ok(Box::new(move || {
        check()?;
        newcomer.lock().map_err(|e| e.to_string())?.iter().try_for_each(|m| m.holds("where the moved mapping was", 31))
    }))
}

/// Unmapped and mapped again at the same address: some pages written, the others must be zero.
fn replaced(_: &mut Stage) -> Fallible<Check> {
    book(Map::private(4 * MIB)?, |book, n| {
        let part = book.map.part(200 * n as usize, 100);
        sys!(munmap(part.addr as *mut _, part.len))?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        sys!(mmap(part.addr as *mut _, part.len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0))?;
        let first = 200 * n as usize;
        book.wiped(first..first + 100);
        book.write(first + 50, 9);
        Ok(())
    })
}

/// Grown and shrunk.
fn resized(_: &mut Stage) -> Fallible<Check> {
    book(Map::private(2 * MIB)?, |book, n| {
        let old = book.map;
        let to = if n % 2 == 1 { old.len + MIB } else { old.len / 2 };
        let addr = sys!(mremap(old.addr as *mut _, old.len, to, libc::MREMAP_MAYMOVE))? as usize;
        book.map = Map { addr, len: to };
        book.seeds.resize(to / PAGE, None);
        if to > old.len {
            book.write(old.pages() + 3, 3);
        }
        Ok(())
    })
}

/// Protection changes hide and show pages; writes under a new protection count.
fn protected(_: &mut Stage) -> Fallible<Check> {
    let map = Map::private(4 * MIB)?;
    book(map, |book, n| {
        let first = 100 * n as usize;
        let part = book.map.part(first, 50);
        part.protect(libc::PROT_READ)?;
        part.protect(libc::PROT_READ | libc::PROT_WRITE)?;
        book.write(first + 10, 21);
        part.part(20, 30).protect(libc::PROT_NONE)?;
        part.part(20, 30).protect(libc::PROT_READ | libc::PROT_WRITE)?;
        book.write(first + 30, 22);
        part.part(40, 10).protect(libc::PROT_READ)
    })
}

/// A private mapping of a file, copied page by page between the rounds; a shared one, written.
fn file(_: &mut Stage) -> Fallible<Check> {
    let content: Vec<u8> = (0..512u64).flat_map(|n| crate::kernel::noise(SEED + n, PAGE)).collect();
    std::fs::write("/precopy-file", content).map_err(|e| e.to_string())?;
    let fd = crate::kernel::open("/precopy-file", libc::O_RDWR)?;
    let map = Map::of_file(512 * PAGE, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE, fd, 0)?;
    let seeds = (0..512u64).map(|n| Some(SEED + n)).collect();
    let shared = Arc::new(Mutex::new(Book { map, seeds }));
    let ours = shared.clone();
    on_steps(move |n| {
        let mut book = ours.lock().map_err(|e| e.to_string())?;
        (0..20).for_each(|k| book.write(n as usize * 50 + k, u64::from(n) * 333 + k as u64));
        // A copied page that is given back is the file's again.
        book.map.part(n as usize * 50 + 4, 1).advise(libc::MADV_DONTNEED)?;
        book.seeds[n as usize * 50 + 4] = Some(SEED + u64::from(n) * 50 + 4);
        Ok(())
    });
    Ok(Box::new(move || shared.lock().map_err(|e| e.to_string())?.holds("mapped file")))
}

/// Huge pages, of which single small pages are written.
fn huge(_: &mut Stage) -> Fallible<Check> {
    let map = Map::private(34 * MIB)?;
    map.advise(libc::MADV_HUGEPAGE)?;
    book(map, |book, n| {
        let pages = book.map.pages();
        (0..16).for_each(|k| book.write((k * 512 + 17 * n as usize) % pages, u64::from(n) * 70 + k as u64));
        book.map.part(4096 + 600 * n as usize, 512).advise(libc::MADV_DONTNEED)?;
        book.wiped(4096 + 600 * n as usize..4096 + 600 * n as usize + 512);
        Ok(())
    })
}

/// A child is born between the rounds, with memory it has from its parent; both write afterwards.
fn fork_between(_: &mut Stage) -> Fallible<Check> {
    let map = Map::private(4 * MIB)?;
    let results = Map::shared(PAGE)?;
    let mut children = 0;
    let shared_count = Arc::new(Mutex::new(0usize));
    let count = shared_count.clone();
    let mut check = book(map, move |book, n| {
        let child = children;
        children += 1;
        let before: Vec<Option<u64>> = book.seeds.clone();
        fork(move || {
            let mut own = Book { map, seeds: before };
            own.write(5, 50 + u64::from(n));
            results.word(100 + child).store(1, Ordering::SeqCst);
            // Looks at its memory whenever it is asked.
            let mut asked = 0;
            loop {
                let round = results.word(0).load(Ordering::SeqCst);
                if round > asked {
                    let good = own.holds("the child's memory").is_ok();
                    results.word(200 + child).store(round << 1 | u64::from(good), Ordering::SeqCst);
                    asked = round;
                }
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        })?;
        eventually("the child writes", || results.word(100 + child).load(Ordering::SeqCst) == 1)?;
        book.write(6, 60 + u64::from(n));
        *count.lock().map_err(|e| e.to_string())? = children;
        Ok(())
    })?;
    Ok(Box::new(move || {
        check()?;
        let round = results.word(0).fetch_add(1, Ordering::SeqCst) + 1;
        for child in 0..*shared_count.lock().map_err(|e| e.to_string())? {
            eventually("a child answers", || results.word(200 + child).load(Ordering::SeqCst) >> 1 == round)?;
            same(format!("memory of child {child} is right"), 1, results.word(200 + child).load(Ordering::SeqCst) & 1)?;
        }
        Ok(())
    }))
}

/// Parent and child from before share pages by copy on write; each writes some of them between the rounds.
fn fork_cow(stage: &mut Stage) -> Fallible<Check> {
    let map = Map::private(4 * MIB)?;
    map.fill(SEED);
    let order = Map::shared(PAGE)?;
    stage.member("child", move |_| {
        let book = Arc::new(Mutex::new(Book { map, seeds: (0..1024).map(|n| Some(SEED + n)).collect() }));
        let ours = book.clone();
        std::thread::spawn(move || {
            let mut done = 0;
            loop {
                let n = order.word(0).load(Ordering::SeqCst);
                if n > done {
                    let Ok(mut book) = ours.lock() else { return };
                    (0..30).for_each(|k| book.write(100 * n as usize + k, 4000 + k as u64));
                    order.word(1).store(n, Ordering::SeqCst);
                    done = n;
                }
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        });
        Ok(Box::new(move || book.lock().map_err(|e| e.to_string())?.holds("the child's memory")))
    })?;
    let book = Arc::new(Mutex::new(Book { map, seeds: (0..1024).map(|n| Some(SEED + n)).collect() }));
    let ours = book.clone();
    on_steps(move |n| {
        order.word(0).store(u64::from(n), Ordering::SeqCst);
        let mut book = ours.lock().map_err(|e| e.to_string())?;
        (0..30).for_each(|k| book.write(100 * n as usize + 15 + k, 6000 + k as u64));
        eventually("the child writes", || order.word(1).load(Ordering::SeqCst) == u64::from(n))
    });
    Ok(Box::new(move || book.lock().map_err(|e| e.to_string())?.holds("the parent's memory")))
}

/// A child becomes another program between the rounds: same pid, other memory.
fn exec(stage: &mut Stage) -> Fallible<Check> {
    let map = Map::private(8 * MIB)?;
    map.fill(SEED);
    let go = Map::shared(PAGE)?;
    let member = stage.invite("exec");
    let environment = c(&member.environment());
    fork(move || unsafe {
        while go.word(0).load(Ordering::SeqCst) == 0 {
            libc::usleep(1000);
        }
        let args = [c"workload".as_ptr(), c"precopy-exec-part".as_ptr(), std::ptr::null()];
        let env = [environment.as_ptr(), std::ptr::null()];
        libc::execve(c"/workload".as_ptr(), args.as_ptr(), env.as_ptr());
    })?;
    on_steps(move |_| {
        go.word(0).store(1, Ordering::SeqCst);
        eventually("the new program is ready", || std::path::Path::new("/run-state/ready-exec").exists())
    });
    Ok(Box::new(move || {
        go.word(0).store(1, Ordering::SeqCst);
        map.holds("the parent's memory", SEED)
    }))
}

/// What `precopy-exec`'s child becomes.
fn exec_part(_: &mut Stage) -> Fallible<Check> {
    let map = Map::private(4 * MIB)?;
    map.fill(SEED * 2);
    Ok(Box::new(move || map.holds("the new program's memory", SEED * 2)))
}

/// A child dies, and another one gets its pid, with other memory at the same addresses.
fn pid_reuse(_: &mut Stage) -> Fallible<Check> {
    let map = Map::private(2 * MIB)?;
    let board = Map::shared(PAGE)?;
    let spawn = move |pid: i32, seed: u64| -> Fallible<i32> {
        let set_tid = if pid == 0 { (0, 0) } else { (&raw const pid as u64, 1) };
        let args: [u64; 11] = [0, 0, 0, 0, libc::SIGCHLD as u64, 0, 0, 0, set_tid.0, set_tid.1, 0];
        let child = raw!(SYS_clone3, args.as_ptr(), 88)?;
        if child == 0 {
            map.fill(seed);
            let mut asked = 0;
            board.word(1).store(seed, Ordering::SeqCst);
            loop {
                let round = board.word(0).load(Ordering::SeqCst);
                if round > asked {
                    let good = map.holds("", seed).is_ok();
                    board.word(2).store(round << 1 | u64::from(good), Ordering::SeqCst);
                    asked = round;
                }
                unsafe { libc::usleep(1000) };
            }
        }
        eventually("the child is ready", || board.word(1).load(Ordering::SeqCst) == seed)?;
        Ok(child as i32)
    };
    let first = spawn(0, 1)?;
    on_steps(move |n| {
        sys!(kill(first, libc::SIGKILL))?;
        sys!(waitpid(first, std::ptr::null_mut(), 0))?;
        let again = spawn(first, 1000 * u64::from(n))?;
        same("pid that is used again", first, again)
    });
    Ok(Box::new(move || {
        let round = board.word(0).fetch_add(1, Ordering::SeqCst) + 1;
        eventually("the child answers", || board.word(2).load(Ordering::SeqCst) >> 1 == round)?;
        same("the child's memory is right", 1, board.word(2).load(Ordering::SeqCst) & 1)
    }))
}

/// Threads come and go, with their stacks.
fn threads(_: &mut Stage) -> Fallible<Check> {
    let made: Arc<Mutex<Vec<crate::threads::Answerer>>> = Arc::default();
    let ours = made.clone();
    on_steps(move |_| {
        let mut made = ours.lock().map_err(|e| e.to_string())?;
        let leaver = (!made.is_empty()).then(|| made.remove(0));
        drop(leaver);
        for _ in 0..3 {
            made.push(crate::threads::Answerer::start(|| Ok(()))?);
        }
        Ok(())
    });
    Ok(Box::new(move || {
        for thread in made.lock().map_err(|e| e.to_string())?.iter() {
            let tid = thread.tid;
            thread.ask(move || same("tid", i64::from(tid), raw!(SYS_gettid)?))?;
        }
        Ok(())
    }))
}

/// The heap grows, shrinks and grows again.
fn brk(_: &mut Stage) -> Fallible<Check> {
    let at = |to: usize| unsafe { libc::syscall(libc::SYS_brk, to) as usize };
    let start = at(0).next_multiple_of(PAGE);
    same("brk", start + MIB, at(start + MIB))?;
    let map = Map { addr: start, len: MIB };
    book(map, move |book, n| {
        let old = book.map;
        same("shrunk", old.addr + old.len / 2, at(old.addr + old.len / 2))?;
        let to = old.len + n as usize * MIB;
        same("grown", old.addr + to, at(old.addr + to))?;
        book.map = Map { addr: old.addr, len: to };
        book.seeds.truncate(old.pages() / 2);
        book.seeds.resize(to / PAGE, None);
        book.write(to / PAGE - 2, 11);
        Ok(())
    })
}

/// A stack that grew between the rounds.
fn stack(_: &mut Stage) -> Fallible<Check> {
    let mut ends = [0; 2];
    sys!(pipe(ends.as_mut_ptr()))?;
    let answers = Map::shared(PAGE)?;
    // A child whose main thread goes deeper at each step, and comes up to check.
    fork(move || {
        fn deeper(ends: [i32; 2], answers: Map, depth: u64) {
            let mut frame = [depth; 4096];
            std::hint::black_box(&mut frame);
            loop {
                let Ok(order) = read_exact(ends[0], 1) else { sleep_for_good() };
                let good = std::hint::black_box(&frame).iter().all(|word| *word == depth);
                match order[0] {
                    b'd' => {
                        answers.word(0).fetch_add(1, Ordering::SeqCst);
                        deeper(ends, answers, depth + 1);
                    }
                    _ => {
                        answers.word(1).fetch_add(if good { 1 } else { 1 << 32 }, Ordering::SeqCst);
                        if depth > 0 {
                            return;
                        }
                    }
                }
            }
        }
        deeper(ends, answers, 0)
    })?;
    let depth = Arc::new(Mutex::new(0u64));
    let ours = depth.clone();
    on_steps(move |_| {
        for _ in 0..5 {
            let mut depth = ours.lock().map_err(|e| e.to_string())?;
            write(ends[1], b"d")?;
            *depth += 1;
            eventually("deeper", || answers.word(0).load(Ordering::SeqCst) == *depth)?;
        }
        Ok(())
    });
    let mut asked = 0;
    Ok(Box::new(move || {
        let mut depth = depth.lock().map_err(|e| e.to_string())?;
        for _ in 0..=std::mem::take(&mut *depth) {
            write(ends[1], b"u")?;
            asked += 1;
            eventually("up", || answers.word(1).load(Ordering::SeqCst) != asked - 1)?;
            same("frames that held", asked, answers.word(1).load(Ordering::SeqCst))?;
        }
        answers.word(0).store(0, Ordering::SeqCst);
        Ok(())
    }))
}
