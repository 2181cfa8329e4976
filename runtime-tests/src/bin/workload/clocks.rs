//! Clocks, looked at all the time: they never go back, and never leap.

use std::sync::Mutex;
use std::time::Duration;

use crate::stage::{Check, Fallible, Setup, Stage};

pub const WORKLOADS: &[(&str, Setup)] = &[("clocks", clocks)];

const CLOCKS: [(&str, i32); 5] = [
    ("CLOCK_MONOTONIC", libc::CLOCK_MONOTONIC),
    ("CLOCK_BOOTTIME", libc::CLOCK_BOOTTIME),
    ("CLOCK_MONOTONIC_RAW", libc::CLOCK_MONOTONIC_RAW),
    ("CLOCK_MONOTONIC_COARSE", libc::CLOCK_MONOTONIC_COARSE),
    ("CLOCK_REALTIME", libc::CLOCK_REALTIME),
];

fn read_all() -> [Duration; 5] {
    CLOCKS.map(|(_, clock)| {
        let mut at: libc::timespec = unsafe { std::mem::zeroed() };
        unsafe { libc::clock_gettime(clock, &mut at) };
        Duration::new(at.tv_sec as u64, at.tv_nsec as u32)
    })
}

/// A stop may hide from a clock, so that it shows less than real time; it must never show more.
fn clocks(_: &mut Stage) -> Fallible<Check> {
    static WRONG: Mutex<Option<String>> = Mutex::new(None);
    std::thread::spawn(|| {
        let mut before = read_all();
        loop {
            let now = read_all();
            let real = now[4].saturating_sub(before[4]);
            for (n, (name, _)) in CLOCKS.iter().enumerate().take(4) {
                let wrong = match now[n].checked_sub(before[n]) {
                    None => format!("{name} went back from {:?} to {:?}", before[n], now[n]),
                    Some(passed) if passed > real + Duration::from_millis(100) => {
                        format!("{name} leapt by {passed:?} while {real:?} passed")
                    }
                    Some(_) => continue,
                };
                WRONG.lock().expect("no panic under the lock").get_or_insert(wrong);
            }
            before = now;
            std::thread::sleep(Duration::from_micros(500));
        }
    });
    Ok(Box::new(|| {
        std::thread::sleep(Duration::from_millis(5));
        WRONG.lock().map_err(|e| e.to_string())?.clone().map_or(Ok(()), Err)
    }))
}
