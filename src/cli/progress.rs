//! How far a round of pages, or a migration, has come, for a person at a terminal.

use std::cell::Cell;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use crate::image::pages::PAGE_SIZE;
use crate::migrate::Event;
use crate::migrate::events::{Progress, Round};

/// Often enough to look alive.
const PERIOD: Duration = Duration::from_millis(50);
const WIDTH: u64 = 30;

/// One line on standard error that is drawn over and over, and wiped when this is dropped.
pub struct Bar {
    drawn: Cell<Option<Instant>>,
}

impl Bar {
    /// None where standard error is no terminal.
    pub fn on_terminal() -> Option<Self> {
        let bar = Bar { drawn: Cell::new(None) };
        io::stderr().is_terminal().then_some(bar)
    }

    /// `done` and `all` in pages.
    pub fn show(&self, done: u64, all: u64) {
        if self.drawn.get().is_none_or(|at| at.elapsed() >= PERIOD) {
            self.drawn.set(Some(Instant::now()));
            let _ = write!(io::stderr(), "\r{}", line(done, all));
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if self.drawn.get().is_some() {
            let _ = write!(io::stderr(), "\r\x1b[K"); // erase to the end of the line
        }
    }
}

/// A migration, told on standard error: what stays, line by line, and below it what changes, on a terminal.
pub struct Ticker {
    terminal: bool,
    drawn: Option<Instant>,
}

impl Default for Ticker {
    fn default() -> Self {
        Ticker { terminal: io::stderr().is_terminal(), drawn: None }
    }
}

impl Ticker {
    pub fn show(&mut self, event: &Event) {
        match event {
            Event::Progress(progress) if self.terminal => {
                if self.drawn.is_none_or(|at| at.elapsed() >= PERIOD) {
                    self.drawn = Some(Instant::now());
                    let _ = write!(io::stderr(), "\r{}\x1b[K", changing(progress));
                }
            }
            event => {
                if let Some(line) = staying(event, self.terminal) {
                    self.wipe();
                    eprintln!("{line}");
                }
            }
        }
    }

    /// Takes away what changes.
    pub fn wipe(&mut self) {
        if self.drawn.take().is_some() {
            let _ = write!(io::stderr(), "\r\x1b[K"); // erase to the end of the line
        }
    }
}

fn changing(now: &Progress) -> String {
    format!(
        "round {}: {}, {} MiB/s; written {} MiB/s, downtime {} ms",
        now.round,
        line(now.done, now.total),
        now.bytes_per_second >> 20,
        (now.dirty_pages_per_second * PAGE_SIZE) >> 20,
        now.expected_downtime_us / 1000
    )
}

/// `all`: not only what one must know.
fn staying(event: &Event, all: bool) -> Option<String> {
    // What the container or the other end says must not move the cursor.
    let plain = |text: &str| text.replace(|c: char| c.is_control(), "?");
    match event {
        Event::Finding { what, place, remedy, blocks } => {
            let kind = if *blocks { "in the way" } else { "to know" };
            Some(format!("{kind}: {}: {}; {}", plain(place), plain(what), plain(remedy)))
        }
        Event::Warning { text } => Some(format!("warning: {}", plain(text))),
        Event::Throttle { percent } => Some(format!("throttled to {percent} % of its processor time")),
        Event::Verified { blocks: 0, .. } if all => Some("both ends fit".to_owned()),
        Event::Round(Round { round, pages, bytes, duration_us, expected_downtime_us, decision, .. }) if all => {
            let (pages, sent, took) = ((pages * PAGE_SIZE) >> 10, bytes >> 10, duration_us / 1000);
            let downtime = expected_downtime_us / 1000;
            let decision = plain(decision);
            Some(format!(
                "round {round}: {pages} KiB as {sent} KiB in {took} ms; downtime would be {downtime} ms: {decision}"
            ))
        }
        Event::Moved(moved) => Some(format!(
            "moved: it stood still for {:.1} ms; {:.1} s in all",
            moved.downtime_us as f64 / 1e3,
            moved.total_us as f64 / 1e6
        )),
        _ => None,
    }
}

fn line(done: u64, all: u64) -> String {
    let filled = done.min(all) * WIDTH / all.max(1);
    let bar: String = (0..WIDTH).map(|at| if at < filled { '#' } else { '.' }).collect();
    let mib = |pages: u64| (pages * PAGE_SIZE) >> 20;
    format!("[{bar}] {} of {} MiB", mib(done), mib(all))
}

#[cfg(test)]
mod tests {
    use super::{changing, line, staying};
    use crate::migrate::Event;
    use crate::migrate::events::Progress;

    #[test]
    fn a_migration_is_told_in_lines() {
        let progress = Progress {
            round: 2,
            done: 256,
            total: 512,
            bytes_per_second: 900 << 20,
            dirty_pages_per_second: 2560,
            expected_downtime_us: 12_345,
        };
        let expected = format!("round 2: {}, 900 MiB/s; written 10 MiB/s, downtime 12 ms", line(256, 512));
        assert_eq!(changing(&progress), expected);
        let warning = Event::Warning { text: "a\x1b[2Jb\n".into() };
        assert_eq!(staying(&warning, false).unwrap(), "warning: a?[2Jb?");
        assert_eq!(staying(&Event::Progress(progress), true), None);
    }

    #[test]
    fn a_line_never_overflows() {
        assert_eq!(line(0, 0), format!("[{}] 0 of 0 MiB", ".".repeat(30)));
        assert_eq!(line(256, 512), format!("[{}{}] 1 of 2 MiB", "#".repeat(15), ".".repeat(15)));
        assert!(line(9, 3).starts_with(&format!("[{}]", "#".repeat(30))));
    }
}
