//! What a migration tells while it goes on: one event at a time, as lines of JSON (docs/migrate-events.md), on a terminal,
//! and afterwards in a report.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::wire::message::Finding;

/// Something has happened. Times are in microseconds (`_us`), memory in pages of 4 KiB.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// The first one.
    Start { container: String, destination: String, token: String, lmrun: String },
    /// The other end has answered.
    Connected { lmrun: String, streams: u32 },
    /// Of the checks before anything moves.
    Finding { what: String, place: String, remedy: String, blocks: bool },
    /// All checks are done.
    Verified { blocks: u32, warns: u32 },
    /// What follows is part of this.
    Phase { phase: Phase },
    /// Pages are on their way; often.
    Progress(Progress),
    /// A round has landed.
    Round(Round),
    /// The container gets so many percent of the processor time that it took, until the freeze.
    Throttle { percent: u32 },
    /// Something that one should know.
    Warning { text: String },
    /// It runs at the destination.
    Moved(Summary),
    /// It does not move; `container` says how it is now.
    Failed { error: String, container: String },
    /// Nobody knows whether it runs at the destination; this command finds out.
    Unknown { error: String, settle: String },
}

/// Parts of a migration, in this order; some are left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    Connect,
    Verify,
    /// The standby is made, the file system's first copy is sent.
    Prepare,
    PreCopy,
    /// The container stands still.
    Freeze,
    /// The source has given up its right to run.
    Handover,
    PostCopy,
    Cleanup,
}

impl Phase {
    pub fn name(self) -> &'static str {
        match self {
            Phase::Connect => "connect",
            Phase::Verify => "verify",
            Phase::Prepare => "prepare",
            Phase::PreCopy => "pre-copy",
            Phase::Freeze => "freeze",
            Phase::Handover => "handover",
            Phase::PostCopy => "post-copy",
            Phase::Cleanup => "cleanup",
        }
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Progress {
    pub round: u32,
    /// Pages of this round so far.
    pub done: u64,
    /// Pages of the processes that this round has come to: those of the first round, and more than those of a later one.
    pub total: u64,
    pub bytes_per_second: u64,
    /// What is written meanwhile, as of the last round.
    pub dirty_pages_per_second: u64,
    /// What the freeze would take now.
    pub expected_downtime_us: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Round {
    /// From 1.
    pub round: u32,
    /// The one inside the freeze.
    pub last: bool,
    pub pages: u64,
    /// Of these, not sent because they are zeros, or like the page before.
    pub skipped: u64,
    /// On the wire.
    pub bytes: u64,
    pub duration_us: u64,
    /// For which the container stood still at the start of the round.
    pub frozen_us: u64,
    /// Written since the round before, all of which this one sent. In the first round: all there is.
    pub dirty_pages_per_second: u64,
    pub expected_downtime_us: u64,
    /// What the stop rule said after it.
    pub decision: String,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    pub total_us: u64,
    /// From the last instruction at the source to the first at the destination.
    pub downtime_us: u64,
    /// What the downtime went into, in order.
    pub downtime: Vec<Part>,
    pub rounds: u32,
    pub pages: u64,
    /// On the wire.
    pub bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Part {
    pub name: String,
    pub us: u64,
}

impl From<&Finding> for Event {
    fn from(finding: &Finding) -> Self {
        let Finding { what, place, remedy, blocks } = finding.clone();
        Event::Finding { what, place, remedy, blocks }
    }
}

/// An event and when it was, counted from the first.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Entry {
    pub at_us: u64,
    #[serde(flatten)]
    pub event: Event,
}

/// All events of a migration in order.
#[derive(Debug)]
pub struct Journal {
    begin: Instant,
    pub entries: Vec<Entry>,
}

impl Default for Journal {
    fn default() -> Self {
        Journal { begin: Instant::now(), entries: Vec::new() }
    }
}

impl Journal {
    /// Notes an event that is now.
    pub fn note(&mut self, event: Event) -> &Entry {
        let at_us = micros(self.begin.elapsed());
        self.entries.push(Entry { at_us, event });
        self.entries.last().expect("one was pushed")
    }
}

impl Entry {
    /// One line of JSON, without the line's end.
    pub fn json(&self) -> String {
        serde_json::to_string(self).expect("events hold nothing that JSON cannot say")
    }
}

/// What a stretch of time goes into.
#[derive(Debug)]
pub struct Parts {
    /// Since the last one ended.
    at: Instant,
    pub all: Vec<Part>,
}

impl Parts {
    pub fn begin() -> Self {
        Parts { at: Instant::now(), all: Vec::new() }
    }

    pub fn end(&mut self, name: &str) {
        self.all.push(Part { name: name.into(), us: micros(self.at.elapsed()) });
        self.at = Instant::now();
    }
}

/// As events have it.
pub fn micros(duration: Duration) -> u64 {
    duration.as_micros().try_into().unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_as_the_documentation_has_them() {
        let line = |event| Entry { at_us: 1500, event }.json();
        assert_eq!(
            line(Event::Phase { phase: Phase::PreCopy }),
            r#"{"at_us":1500,"event":"phase","phase":"pre-copy"}"#
        );
        let moved = Summary {
            total_us: 9,
            downtime_us: 8,
            downtime: vec![Part { name: "a\nb".into(), us: 7 }],
            rounds: 2,
            pages: 3,
            bytes: 4,
        };
        assert_eq!(
            line(Event::Moved(moved)),
            r#"{"at_us":1500,"event":"moved","total_us":9,"downtime_us":8,"downtime":[{"name":"a\nb","us":7}],"rounds":2,"pages":3,"bytes":4}"#
        );
    }

    #[test]
    fn time_goes_forward() {
        let mut journal = Journal::default();
        let first = journal.note(Event::Warning { text: String::new() }).at_us;
        assert!(journal.note(Event::Throttle { percent: 50 }).at_us >= first);
        assert_eq!(journal.entries.len(), 2);
    }
}
