//! Restartable sequences: the C library's registration, and being stopped inside of one. And robust locks.

use std::arch::global_asm;
use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::kernel::sys;
use crate::memory_map::{Map, PAGE};
use crate::stage::{Check, Fallible, Setup, Stage, eventually, fork, same, sleep_for_good};
use crate::threads::Answerer;

pub const WORKLOADS: &[(&str, Setup)] = &[
    ("rseq-registered", registered),
    ("rseq-section", section),
    ("robust-lock", robust),
    ("robust-lock-shared", robust_shared),
];

unsafe extern "C" {
    /// Of glibc 2.35 and later: where a thread's `struct rseq` lies, from its thread pointer.
    static __rseq_offset: isize;
    static __rseq_size: u32;
    fn rseq_increment(area: usize, counters: *const AtomicU64, spins: u64) -> i64;
}

// Adds one to the counter of the present CPU (128 bytes apart). Returns 0, or -1 when the sequence was aborted.
global_asm!(
    r#"
    .section .data.rel.ro, "aw"
    .balign 32
rseq_descriptor:
    .long 0, 0
    .quad .Lrseq_start, .Lrseq_committed - .Lrseq_start, .Lrseq_abort
    .text
    .globl rseq_increment
rseq_increment:
    lea rax, [rip + rseq_descriptor]
    mov [rdi + 8], rax
.Lrseq_start:
    mov ecx, [rdi + 4]
    shl rcx, 7
    mov r8, [rsi + rcx]
    inc r8
2:
    dec rdx
    jnz 2b
    mov [rsi + rcx], r8
.Lrseq_committed:
    xor eax, eax
    ret
    .byte 0x0f, 0xb9, 0x3d
    .long 0x53053053
.Lrseq_abort:
    mov rax, -1
    ret
"#
);

/// The calling thread's `struct rseq`.
fn area() -> Fallible<usize> {
    if unsafe { __rseq_size } == 0 {
        return Err("skip: the C library registered no rseq".into());
    }
    let thread_pointer: usize;
    unsafe { std::arch::asm!("mov {}, fs:0", out(reg) thread_pointer) };
    Ok(thread_pointer.wrapping_add_signed(unsafe { __rseq_offset }))
}

/// The kernel keeps the CPU's number up to date, in every thread.
fn registered(_: &mut Stage) -> Fallible<Check> {
    area()?;
    let threads = (0..4).map(|_| Answerer::start(|| area().map(drop))).collect::<Fallible<Vec<_>>>()?;
    fn follows_cpu() -> Fallible {
        let mut allowed: libc::cpu_set_t = unsafe { std::mem::zeroed() };
        sys!(sched_getaffinity(0, size_of_val(&allowed), &mut allowed))?;
        let area = area()?;
        for cpu in (0..64).filter(|cpu| unsafe { libc::CPU_ISSET(*cpu, &allowed) }) {
            let mut one: libc::cpu_set_t = unsafe { std::mem::zeroed() };
            unsafe { libc::CPU_SET(cpu, &mut one) };
            sys!(sched_setaffinity(0, size_of_val(&one), &one))?;
            let seen = unsafe { ((area + 4) as *const u32).read_volatile() };
            same("CPU number that rseq shows", cpu as u32, seen)?;
        }
        sys!(sched_setaffinity(0, size_of_val(&allowed), &allowed)).map(drop)
    }
    follows_cpu()?;
    Ok(Box::new(move || {
        follows_cpu()?;
        threads.iter().try_for_each(|t| t.ask(follows_cpu))
    }))
}

/// Threads that are nearly always inside a sequence. If one of them were resumed in the middle of it after
/// others had run, an increment would be lost.
fn section(_: &mut Stage) -> Fallible<Check> {
    area()?;
    /// Odd while the threads are to pause; each pause has its own number.
    static PAUSE: AtomicU64 = AtomicU64::new(0);
    static PAUSED: [AtomicU64; 3] = [const { AtomicU64::new(0) }; 3];
    static COMMITTED: AtomicU64 = AtomicU64::new(0);
    let counters = Map::private(256 * 128)?;
    for paused in &PAUSED {
        std::thread::spawn(move || {
            let area = area().expect("this thread is registered as the others are");
            loop {
                let pause = PAUSE.load(Ordering::SeqCst);
                paused.store(pause, Ordering::SeqCst);
                if pause % 2 == 1 {
                    std::thread::sleep(std::time::Duration::from_millis(1));
                } else if unsafe { rseq_increment(area, counters.word(0), 20_000) } == 0 {
                    COMMITTED.fetch_add(1, Ordering::SeqCst);
                }
            }
        });
    }
    let check = move || -> Fallible {
        let before = COMMITTED.load(Ordering::SeqCst);
        eventually("sequences are committed", || COMMITTED.load(Ordering::SeqCst) > before + 10)?;
        let pause = PAUSE.fetch_add(1, Ordering::SeqCst) + 1;
        eventually("threads pause", || PAUSED.iter().all(|p| p.load(Ordering::SeqCst) == pause))?;
        let counted = (0..256).map(|cpu| counters.word(cpu * 16).load(Ordering::SeqCst)).sum::<u64>();
        let committed = COMMITTED.load(Ordering::SeqCst);
        PAUSE.fetch_add(1, Ordering::SeqCst);
        same("increments that were committed", committed, counted)
    };
    check()?;
    Ok(Box::new(check))
}

/// A robust mutex at a fixed place.
#[derive(Clone, Copy)]
struct Lock(*mut libc::pthread_mutex_t);
unsafe impl Send for Lock {}

impl Lock {
    fn new(at: *mut libc::pthread_mutex_t, shared: bool) -> Lock {
        unsafe {
            let mut attr: libc::pthread_mutexattr_t = std::mem::zeroed();
            libc::pthread_mutexattr_init(&mut attr);
            libc::pthread_mutexattr_setrobust(&mut attr, libc::PTHREAD_MUTEX_ROBUST);
            if shared {
                libc::pthread_mutexattr_setpshared(&mut attr, libc::PTHREAD_PROCESS_SHARED);
            }
            libc::pthread_mutex_init(at, &attr);
        }
        Lock(at)
    }

    fn acquire(self) -> i32 {
        unsafe { libc::pthread_mutex_lock(self.0) }
    }

    /// Takes the lock of a dead owner over, and gives it back.
    fn inherit(self) -> Fallible {
        same("lock of a dead owner", libc::EOWNERDEAD, self.acquire())?;
        same("made consistent", 0, unsafe { libc::pthread_mutex_consistent(self.0) })?;
        same("given back", 0, unsafe { libc::pthread_mutex_unlock(self.0) })
    }
}

/// The kernel finds what a thread still held when it died: its robust list is registered as before.
fn robust(_: &mut Stage) -> Fallible<Check> {
    let place = Box::leak(Box::new(UnsafeCell::new(unsafe { std::mem::zeroed() })));
    let lock = Lock::new(place.get(), false);
    let hold = move || {
        Answerer::start(move || {
            let lock = lock;
            same("lock", 0, lock.acquire())
        })
    };
    let mut holder = vec![hold()?];
    Ok(Box::new(move || {
        // Its channel closes: the thread ends with the lock held.
        holder.clear();
        lock.inherit()?;
        holder.push(hold()?);
        Ok(())
    }))
}

/// The same between processes; one holder and its lock for each round of checks.
fn robust_shared(_: &mut Stage) -> Fallible<Check> {
    let map = Map::shared(PAGE)?;
    let mut holders = Vec::new();
    for n in 0..4 {
        let lock = Lock::new((map.addr + n * 128) as *mut _, true);
        let child = fork(move || {
            lock.acquire();
            map.word(511 - n).store(1, Ordering::SeqCst);
            sleep_for_good()
        })?;
        eventually("the child holds the lock", || map.word(511 - n).load(Ordering::SeqCst) == 1)?;
        holders.push((lock, child));
    }
    Ok(Box::new(move || {
        let Some((lock, child)) = holders.pop() else {
            return Ok(());
        };
        sys!(kill(child, libc::SIGKILL))?;
        sys!(waitpid(child, std::ptr::null_mut(), 0))?;
        lock.inherit()
    }))
}
