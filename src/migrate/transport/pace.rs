//! Not faster than was said: a token bucket.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// What may go at once after a pause: the link has been idle meanwhile.
const BURST: Duration = Duration::from_millis(20);

/// Bytes per second for one or more connections together.
#[derive(Debug)]
pub struct Pace {
    rate: u64,
    /// When all that was let through so far is over at this rate.
    paid: Mutex<Instant>,
}

impl Pace {
    /// `rate` in bytes per second, at least 1.
    pub fn new(rate: u64) -> Arc<Self> {
        Arc::new(Pace { rate: rate.max(1), paid: Mutex::new(Instant::now()) })
    }

    /// Bytes that are written at a time: few enough to flow evenly.
    fn portion(&self) -> usize {
        (self.rate / 100).clamp(1, 1 << 20) as usize
    }

    /// How long to wait until `bytes` may go, which are then paid for.
    fn charge(&self, bytes: usize, now: Instant) -> Duration {
        let mut paid = self.paid.lock().unwrap_or_else(PoisonError::into_inner);
        *paid = (*paid).max(now.checked_sub(BURST).unwrap_or(now));
        let wait = paid.saturating_duration_since(now);
        *paid += Duration::from_secs_f64(bytes as f64 / self.rate as f64);
        wait
    }
}

/// A writer that keeps to a pace.
pub(super) struct Paced<W> {
    to: W,
    pace: Arc<Pace>,
}

impl<W: Write> Paced<W> {
    pub fn new(to: W, pace: Arc<Pace>) -> Self {
        Paced { to, pace }
    }
}

impl<W: Write> Write for Paced<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let portion = &buf[..buf.len().min(self.pace.portion())];
        thread::sleep(self.pace.charge(portion.len(), Instant::now()));
        self.to.write(portion)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_let_through_keeps_to_the_rate() {
        let pace = Pace::new(1000);
        let begin = Instant::now();
        let mut now = begin;
        for _ in 0..100 {
            now += pace.charge(50, now);
        }
        // The last 50 bytes have been let go and not yet paid for.
        let expected = Duration::from_millis(99 * 50) - BURST;
        let off = (now - begin).abs_diff(expected);
        assert!(off < Duration::from_millis(25), "{off:?}");
    }

    #[test]
    fn a_pause_earns_no_more_than_the_burst() {
        let pace = Pace::new(1000);
        let later = Instant::now() + Duration::from_secs(60);
        assert!(pace.charge(20, later).is_zero());
        assert!(pace.charge(1000, later).is_zero());
        assert!(pace.charge(1, later) > Duration::from_millis(900));
    }
}
