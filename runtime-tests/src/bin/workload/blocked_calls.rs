//! Threads that sit in system calls: none may come back before its time, none with EINTR, none never.

use std::sync::mpsc;
use std::time::Duration;

use crate::kernel::sys;
use crate::memory_map::{Map, PAGE};
use crate::stage::{Check, Fallible, Setup, Stage, fork, holds, same};

pub const WORKLOADS: &[(&str, Setup)] = &[
    ("blocked-sleeps", sleeps),
    ("blocked-polls", polls),
    ("blocked-futexes", futexes),
    ("blocked-signals", signals),
    ("blocked-for-good", for_good),
    ("blocked-io", io),
    ("blocked-wait", wait),
];

/// Longer than any checkpoint and restore of these scenarios takes, so that the call spans it.
const LONG: Duration = Duration::from_millis(2500);
/// How much later than asked a call may come back: other tests share the machine.
const LATE: Duration = Duration::from_millis(4000);

/// Seconds of a clock that goes on where it was.
fn now() -> Duration {
    let mut at: libc::timespec = unsafe { std::mem::zeroed() };
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut at) };
    Duration::new(at.tv_sec as u64, at.tv_nsec as u32)
}

fn timespec(d: Duration) -> libc::timespec {
    libc::timespec { tv_sec: d.as_secs() as i64, tv_nsec: d.subsec_nanos() as i64 }
}

/// The result of a blocked call, as -errno or value, and when it came.
struct Blocked {
    name: &'static str,
    expected: i64,
    since: Duration,
    outcome: mpsc::Receiver<(i64, Duration)>,
}

/// Runs `call` on a thread of its own; it is to return `expected` (a value, or -errno).
fn start(name: &'static str, expected: i64, call: impl FnOnce() -> i64 + Send + 'static) -> Blocked {
    let (tell, outcome) = mpsc::channel();
    let since = now();
    std::thread::spawn(move || {
        let value = call();
        let value =
            if value == -1 { -i64::from(std::io::Error::last_os_error().raw_os_error().unwrap_or(0)) } else { value };
        let _ = tell.send((value, now()));
    });
    Blocked { name, expected, since, outcome }
}

/// Every call in `calls` lasts LONG; a check waits for its end and starts it anew.
fn timed(make: fn() -> Vec<Blocked>) -> Fallible<Check> {
    let mut calls = make();
    Ok(Box::new(move || {
        for call in std::mem::take(&mut calls) {
            let waited = call.outcome.recv_timeout(LONG + LATE);
            let (value, at) = waited.map_err(|_| format!("{}: does not return", call.name))?;
            same(format!("{}: result (or -errno)", call.name), call.expected, value)?;
            let took = at.saturating_sub(call.since);
            holds(took >= LONG, format!("{}: came back after {took:?}, asked for {LONG:?}", call.name))?;
            holds(took <= LONG + LATE, format!("{}: came back after {took:?}, asked for {LONG:?}", call.name))?;
        }
        calls = make();
        Ok(())
    }))
}

fn sleeps(_: &mut Stage) -> Fallible<Check> {
    timed(|| {
        let until = |clock: i32| {
            let mut at: libc::timespec = unsafe { std::mem::zeroed() };
            unsafe { libc::clock_gettime(clock, &mut at) };
            // A little more, so that it is no earlier than a LONG from when the call begins.
            timespec(Duration::new(at.tv_sec as u64, at.tv_nsec as u32) + LONG + Duration::from_millis(50))
        };
        let sleep = move |clock: i32, flags: i32, time: libc::timespec| unsafe {
            i64::from(-libc::clock_nanosleep(clock, flags, &time, std::ptr::null_mut()))
        };
        let (monotonic, boottime) = (until(libc::CLOCK_MONOTONIC), until(libc::CLOCK_BOOTTIME));
        vec![
            start("nanosleep", 0, || unsafe { i64::from(libc::nanosleep(&timespec(LONG), std::ptr::null_mut())) }),
            start("clock_nanosleep, relative", 0, move || sleep(libc::CLOCK_MONOTONIC, 0, timespec(LONG))),
            start("clock_nanosleep, real time, relative", 0, move || sleep(libc::CLOCK_REALTIME, 0, timespec(LONG))),
            start("clock_nanosleep, absolute", 0, move || sleep(libc::CLOCK_MONOTONIC, libc::TIMER_ABSTIME, monotonic)),
            start("clock_nanosleep, boot time, absolute", 0, move || {
                sleep(libc::CLOCK_BOOTTIME, libc::TIMER_ABSTIME, boottime)
            }),
        ]
    })
}

/// A pipe that nobody writes to.
fn silent_pipe() -> i32 {
    let mut ends = [0; 2];
    unsafe { libc::pipe(ends.as_mut_ptr()) };
    ends[0]
}

fn polls(_: &mut Stage) -> Fallible<Check> {
    timed(|| {
        let milliseconds = LONG.as_millis() as i32;
        let fd = silent_pipe();
        let entry = move || libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let set = move || unsafe {
            let mut set: libc::fd_set = std::mem::zeroed();
            libc::FD_SET(fd, &mut set);
            set
        };
        vec![
            start("poll", 0, move || unsafe { i64::from(libc::poll(&mut entry(), 1, milliseconds)) }),
            start("poll of nothing", 0, move || unsafe {
                i64::from(libc::poll(std::ptr::null_mut(), 0, milliseconds))
            }),
            start("ppoll", 0, move || unsafe {
                i64::from(libc::ppoll(&mut entry(), 1, &timespec(LONG), std::ptr::null()))
            }),
            start("select", 0, move || unsafe {
                let mut time = libc::timeval { tv_sec: LONG.as_secs() as i64, tv_usec: LONG.subsec_micros() as i64 };
                i64::from(libc::select(fd + 1, &mut set(), std::ptr::null_mut(), std::ptr::null_mut(), &mut time))
            }),
            start("pselect", 0, move || unsafe {
                i64::from(libc::pselect(
                    fd + 1,
                    &mut set(),
                    std::ptr::null_mut(),
                    std::ptr::null_mut(),
                    &timespec(LONG),
                    std::ptr::null(),
                ))
            }),
            start("epoll_wait", 0, move || unsafe {
                let epoll = libc::epoll_create1(0);
                let mut event = libc::epoll_event { events: libc::EPOLLIN as u32, u64: 1 };
                libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, fd, &mut event);
                let result = libc::epoll_wait(epoll, &mut event, 1, milliseconds);
                libc::close(epoll);
                i64::from(result)
            }),
            start("epoll_pwait with a mask", 0, move || unsafe {
                let epoll = libc::epoll_create1(0);
                let mut event = libc::epoll_event { events: 0, u64: 1 };
                let mut mask: libc::sigset_t = std::mem::zeroed();
                libc::sigaddset(&mut mask, libc::SIGUSR2);
                let result = libc::epoll_pwait(epoll, &mut event, 1, milliseconds, &mask);
                libc::close(epoll);
                i64::from(result)
            }),
        ]
    })
}

fn futexes(_: &mut Stage) -> Fallible<Check> {
    fn wait(op: i32, time: Option<libc::timespec>) -> i64 {
        let word = Box::leak(Box::new(0u32));
        let time = time.as_ref().map_or(std::ptr::null(), |t| t as *const _);
        unsafe { libc::syscall(libc::SYS_futex, word as *mut u32, op, 0, time, 0, u32::MAX) }
    }
    timed(|| {
        let timed_out = -i64::from(libc::ETIMEDOUT);
        let until = timespec(now() + LONG + Duration::from_millis(50));
        vec![
            start("futex, relative", timed_out, || {
                wait(libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG, Some(timespec(LONG)))
            }),
            start("futex, shared, relative", timed_out, || wait(libc::FUTEX_WAIT, Some(timespec(LONG)))),
            start("futex, absolute", timed_out, move || {
                wait(libc::FUTEX_WAIT_BITSET | libc::FUTEX_PRIVATE_FLAG, Some(until))
            }),
        ]
    })
}

fn signals(_: &mut Stage) -> Fallible<Check> {
    timed(|| {
        vec![start("sigtimedwait", -i64::from(libc::EAGAIN), || unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigaddset(&mut set, libc::SIGUSR1);
            libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
            i64::from(libc::sigtimedwait(&set, std::ptr::null_mut(), &timespec(LONG)))
        })]
    })
}

/// Calls that only return when something happens: nothing does, so they must not.
fn for_good(_: &mut Stage) -> Fallible<Check> {
    let fd = silent_pipe();
    let calls = vec![
        start("pause", 0, || unsafe { i64::from(libc::pause()) }),
        start("sigsuspend", 0, || unsafe {
            let none: libc::sigset_t = std::mem::zeroed();
            i64::from(libc::sigsuspend(&none))
        }),
        start("sigwaitinfo", 0, || unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigaddset(&mut set, libc::SIGUSR1);
            libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
            i64::from(libc::sigwaitinfo(&set, std::ptr::null_mut()))
        }),
        start("futex", 0, || unsafe {
            let word = Box::leak(Box::new(0u32)) as *mut u32;
            libc::syscall(libc::SYS_futex, word, libc::FUTEX_WAIT, 0, 0, 0, 0)
        }),
        start("poll", 0, move || unsafe {
            i64::from(libc::poll(&mut libc::pollfd { fd, events: libc::POLLIN, revents: 0 }, 1, -1))
        }),
        start("epoll_wait", 0, || unsafe {
            let epoll = libc::epoll_create1(0);
            i64::from(libc::epoll_wait(epoll, &mut std::mem::zeroed(), 1, -1))
        }),
        start("read", 0, move || unsafe { libc::read(fd, [0u8; 8].as_mut_ptr().cast(), 8) as i64 }),
    ];
    Ok(Box::new(move || {
        std::thread::sleep(Duration::from_millis(50));
        for call in &calls {
            if let Ok((value, _)) = call.outcome.try_recv() {
                return Err(format!("{}: came back with {value}", call.name));
            }
        }
        Ok(())
    }))
}

/// Reads, writes, accepts and receives that wait, and are served after.
fn io(_: &mut Stage) -> Fallible<Check> {
    let mut pipe = [0; 2];
    sys!(pipe(pipe.as_mut_ptr()))?;
    let mut full = [0; 2];
    sys!(pipe(full.as_mut_ptr()))?;
    crate::kernel::write(full[1], &[7; 65536])?;
    let mut pair = [0; 2];
    sys!(socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0, pair.as_mut_ptr()))?;
    let event = sys!(eventfd(0, 0))? as i32;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").map_err(|e| e.to_string())?;
    let address = listener.local_addr().map_err(|e| e.to_string())?;
    let listener = std::sync::Arc::new(listener);
    let begin = move || {
        let listener = listener.clone();
        vec![
            start("read of a pipe", 5, move || unsafe { libc::read(pipe[0], [0u8; 8].as_mut_ptr().cast(), 8) as i64 }),
            start("write to a full pipe", 4096, move || unsafe {
                libc::write(full[1], [7u8; 4096].as_ptr().cast(), 4096) as i64
            }),
            start("recv of a unix socket", 5, move || unsafe {
                libc::recv(pair[0], [0u8; 8].as_mut_ptr().cast(), 8, 0) as i64
            }),
            start("read of an eventfd", 8, move || unsafe {
                libc::read(event, [0u64; 1].as_mut_ptr().cast(), 8) as i64
            }),
            start("accept", 1, move || i64::from(listener.accept().is_ok())),
        ]
    };
    let mut calls = begin();
    Ok(Box::new(move || {
        std::thread::sleep(Duration::from_millis(20));
        for call in &calls {
            if let Ok((value, _)) = call.outcome.try_recv() {
                return Err(format!("{}: came back with {value} before it was served", call.name));
            }
        }
        crate::kernel::write(pipe[1], b"hello")?;
        crate::kernel::read_exact(full[0], 4096)?;
        crate::kernel::write(pair[1], b"hello")?;
        crate::kernel::write(event, &1u64.to_ne_bytes())?;
        let _client = std::net::TcpStream::connect(address).map_err(|e| e.to_string())?;
        for call in std::mem::take(&mut calls) {
            let (value, _) = call.outcome.recv_timeout(LATE).map_err(|_| format!("{}: does not return", call.name))?;
            same(format!("{}: result (or -errno)", call.name), call.expected, value)?;
        }
        calls = begin();
        Ok(())
    }))
}

/// Parents that wait for children, and take up their ends.
fn wait(_: &mut Stage) -> Fallible<Check> {
    let flags = Map::shared(PAGE)?;
    let mut round = 0;
    let begin = move |round: usize| -> Fallible<Vec<Blocked>> {
        let child = |n: usize| {
            fork(move || unsafe {
                while flags.word(round * 2 + n).load(std::sync::atomic::Ordering::SeqCst) == 0 {
                    libc::usleep(1000);
                }
                libc::_exit(40 + n as i32)
            })
        };
        let (first, second) = (child(0)?, child(1)?);
        Ok(vec![
            start("waitpid", 40 << 8, move || unsafe {
                let mut status = 0;
                if libc::waitpid(first, &mut status, 0) == first { i64::from(status) } else { -1 }
            }),
            start("waitid", 41, move || unsafe {
                let mut info: libc::siginfo_t = std::mem::zeroed();
                let result = libc::waitid(libc::P_PID, second as u32, &mut info, libc::WEXITED);
                if result == 0 { i64::from(info.si_status()) } else { -1 }
            }),
        ])
    };
    let mut calls = begin(0)?;
    Ok(Box::new(move || {
        std::thread::sleep(Duration::from_millis(20));
        for n in 0..2 {
            flags.word(round * 2 + n).store(1, std::sync::atomic::Ordering::SeqCst);
        }
        for call in std::mem::take(&mut calls) {
            let (value, _) = call.outcome.recv_timeout(LATE).map_err(|_| format!("{}: does not return", call.name))?;
            same(format!("{}: result (or -errno)", call.name), call.expected, value)?;
        }
        round += 1;
        calls = begin(round)?;
        Ok(())
    }))
}
