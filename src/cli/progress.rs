//! How far a round of pages has come, for a person at a terminal.

use std::cell::Cell;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use crate::image::pages::PAGE_SIZE;

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

fn line(done: u64, all: u64) -> String {
    let filled = done.min(all) * WIDTH / all.max(1);
    let bar: String = (0..WIDTH).map(|at| if at < filled { '#' } else { '.' }).collect();
    let mib = |pages: u64| (pages * PAGE_SIZE) >> 20;
    format!("[{bar}] {} of {} MiB", mib(done), mib(all))
}

#[cfg(test)]
mod tests {
    use super::line;

    #[test]
    fn a_line_never_overflows() {
        assert_eq!(line(0, 0), format!("[{}] 0 of 0 MiB", ".".repeat(30)));
        assert_eq!(line(256, 512), format!("[{}{}] 1 of 2 MiB", "#".repeat(15), ".".repeat(15)));
        assert!(line(9, 3).starts_with(&format!("[{}]", "#".repeat(30))));
    }
}
