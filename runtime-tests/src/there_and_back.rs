//! A container that goes back and forth, over and over: nothing grows, and its client keeps its first connection.

use std::io::{Error, Result};
use std::time::Duration;

use crate::host::InMemory;
use crate::hosts::Hosts;
use crate::journey::{Journey, Load};
use crate::redis::{self, Writer};

/// Of the Redis, MiB.
const MIB: usize = 16;
/// Round trips after which all that is made once has been made.
const SETTLED: usize = 2;

/// What was counted after the first round trips, and at the end.
pub struct Growth {
    pub rounds: usize,
    pub acknowledged: u64,
    pub counts: Vec<(&'static str, u64, u64)>,
}

impl Growth {
    /// Nothing has grown. Memory and the machine's own cgroups, which others make too, go up and down by a few.
    pub fn is_good(&self) -> bool {
        self.counts.iter().all(|(what, before, after)| *after <= before + Growth::slack(what, *before))
    }

    fn slack(what: &str, before: u64) -> u64 {
        match what {
            "resident, KiB" | "mapped, KiB" | "files, KiB" => before / 20,
            "memory cgroups of the machine" => u64::MAX - before,
            _ => 0,
        }
    }
}

impl std::fmt::Display for Growth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "{} times there and back; the client's first connection: {} writes, none lost or doubled\n",
            self.rounds, self.acknowledged
        )?;
        writeln!(f, "| | after {SETTLED} | at the end | |\n| --- | --- | --- | --- |")?;
        for (what, before, after) in &self.counts {
            let verdict = if *after <= before + Growth::slack(what, *before) { "" } else { "has grown" };
            writeln!(f, "| {what} | {before} | {after} | {verdict} |")?;
        }
        Ok(())
    }
}

/// So many round trips, at least three.
///
/// # Errors
/// When a move fails, when the client loses its connection or gets a wrong answer.
pub fn run(rounds: usize, mut progress: impl FnMut(&str)) -> Result<Growth> {
    let rootfs = InMemory::mount(std::env::temp_dir().join(format!("lmrun-back-{}", std::process::id())))?;
    redis::rootfs(&rootfs.dir)?;
    let hosts = Hosts::new();
    let mut journey = Journey::start(&hosts, &Load::redis(&rootfs.dir))?;
    let mut loader = journey.connect()?;
    loader.load(MIB, |_| {})?;
    loader.fill_keys()?;
    let writer = Writer::paced(journey.connect()?, Duration::from_millis(1));
    let mut before = Vec::new();
    for round in 1..=rounds.max(SETTLED + 1) {
        journey.migrate(&[])?;
        journey.migrate(&[])?;
        if !writer.goes_on() {
            break;
        }
        if round == SETTLED {
            before = settled(&journey);
        }
        progress(&format!("{round} of {rounds}"));
    }
    let after = settled(&journey);
    let record = writer.finish();
    if let Some(failure) = &record.failure {
        return Err(Error::other(format!("the client: {failure}")));
    }
    let audit = record.audit(&mut journey.connect()?)?;
    if audit != (0, 0, 0) {
        return Err(Error::other(format!("writes lost, doubled, wrong: {audit:?}")));
    }
    let counts = before.iter().zip(after).map(|((what, before), (_, after))| (*what, *before, after)).collect();
    Ok(Growth { rounds, acknowledged: record.acknowledged, counts })
}

/// When all that ends with a move has ended: twice the same.
fn settled(journey: &Journey) -> Vec<(&'static str, u64)> {
    let counted = |all: &[(&'static str, u64)]| all.iter().map(|(_, n)| *n).skip(2).collect::<Vec<_>>();
    let mut last = journey.growth();
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(100));
        let now = journey.growth();
        if counted(&now) == counted(&last) {
            return now;
        }
        last = now;
    }
    last
}
