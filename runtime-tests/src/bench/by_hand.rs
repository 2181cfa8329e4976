//! What a client sees of a move of its Redis that is made by hand (checkpoint, copy, restore), and what it costs: by lmrun, and by
//! runc with CRIU in turn.

use std::collections::BTreeMap;
use std::io::{Error, Result};
use std::time::{Duration, Instant};

use super::{Table, machine, median};
use crate::hosts::Hosts;
use crate::migration::{Migration, Pages};
use crate::redis::Writer;
use crate::runtimes::Runtime;

/// A way to move, or to stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    /// Checkpoint and restore in place, with neither client nor network.
    Local,
    /// Checkpoint to files, copy them, restore.
    Cold,
    PageServer,
    /// Two rounds of pre-dump, then the checkpoint, all to page servers.
    PreDump,
}

impl Mode {
    pub const ALL: [Mode; 4] = [Mode::Local, Mode::Cold, Mode::PageServer, Mode::PreDump];

    pub fn name(self) -> &'static str {
        match self {
            Mode::Local => "local",
            Mode::Cold => "cold",
            Mode::PageServer => "page-server",
            Mode::PreDump => "pre-dump",
        }
    }
}

impl std::str::FromStr for Mode {
    type Err = String;

    fn from_str(name: &str) -> std::result::Result<Mode, String> {
        let found = Mode::ALL.into_iter().find(|mode| mode.name() == name);
        found.ok_or_else(|| format!("unknown mode {name}"))
    }
}

/// What is to be measured.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Memory of the Redis, MiB.
    pub sizes: Vec<usize>,
    pub modes: Vec<Mode>,
    pub repetitions: usize,
    /// The peer, or why there is none.
    pub peer: std::result::Result<Runtime, String>,
}

/// Time between two pairs of writes of the client: about 1,000 pairs a second.
pub(super) const PAUSE: Duration = Duration::from_micros(500);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Measure {
    Gap,
    Frozen,
    Total,
    Bytes,
    Checkpoint,
    Restore,
}

impl Measure {
    fn title(self) -> &'static str {
        match self {
            Measure::Gap => "client's longest gap (ms)",
            Measure::Frozen => "frozen (ms)",
            Measure::Total => "total (ms)",
            Measure::Bytes => "moved (MiB)",
            Measure::Checkpoint => "checkpoint (ms)",
            Measure::Restore => "restore (ms)",
        }
    }
}

pub(super) type Sample = BTreeMap<Measure, f64>;
type Samples = BTreeMap<(usize, Mode), Vec<Sample>>;

/// Measures, and returns the tables. `progress` hears of each step.
///
/// # Errors
/// When lmrun fails. A failure of the peer's is a note below the table.
pub fn run(plan: &Plan, mut progress: impl FnMut(&str)) -> Result<String> {
    let (mut ours, mut peers) = (Samples::new(), Samples::new());
    let mut notes = Vec::new();
    for &mib in &plan.sizes {
        for &mode in &plan.modes {
            let mut peer = plan.peer.as_ref().ok();
            for n in 1..=plan.repetitions {
                progress(&format!("{mib} MiB, {}, {n} of {}", mode.name(), plan.repetitions));
                let sample = measure(&Runtime::Lmrun, mib, mode)?;
                ours.entry((mib, mode)).or_default().push(sample);
                let Some(runtime) = peer else { continue };
                match measure(runtime, mib, mode) {
                    Ok(sample) => peers.entry((mib, mode)).or_default().push(sample),
                    Err(e) => {
                        peer = None;
                        notes.push(format!("peer, {mib} MiB, {}: {}", mode.name(), brief(&e)));
                    }
                }
            }
        }
    }
    let mut text = format!("{}\n\n", machine());
    text += &match &plan.peer {
        Ok(peer) => format!("{}, {}; ", Runtime::Lmrun.version()?, peer.version()?),
        Err(why) => format!("{}; no peer: {why}; ", Runtime::Lmrun.version()?),
    };
    text += &format!("medians of {}, interleaved\n\n", plan.repetitions);
    text += &table(&ours, &peers).to_string();
    notes.iter().for_each(|note| text += &format!("\n* {note}"));
    Ok(text)
}

fn table(ours: &Samples, peers: &Samples) -> Table {
    let mut table = Table::new(&["MiB", "mode", "", "lmrun", "runc + CRIU", "ratio"]);
    for (&(mib, mode), samples) in ours {
        // A mode that the peer cannot do is held against the best that it can.
        let at_peer = peers.get_key_value(&(mib, mode)).or_else(|| {
            let moved = peers.iter().filter(|((m, other), _)| *m == mib && *other != Mode::Local);
            moved
                .filter(|_| mode != Mode::Local)
                .filter_map(|(key, all)| Some((middle(all, Measure::Gap)?, (key, all))))
                .min_by(|a, b| a.0.total_cmp(&b.0))
                .map(|(_, entry)| entry)
        });
        for &what in samples[0].keys() {
            let own = middle(samples, what).unwrap_or_default();
            let other = at_peer.and_then(|((_, peers_mode), all)| {
                let value = middle(all, what)?;
                let how = if *peers_mode == mode { String::new() } else { format!(" ({})", peers_mode.name()) };
                Some((value, how))
            });
            let (shown, ratio) = match other {
                Some((value, how)) => (format!("{value:.1}{how}"), format!("{:.2}", own / value)),
                None => ("-".into(), "-".into()),
            };
            table.row([
                mib.to_string(),
                mode.name().to_owned(),
                what.title().to_owned(),
                format!("{own:.1}"),
                shown,
                ratio,
            ]);
        }
    }
    table
}

fn middle(samples: &[Sample], what: Measure) -> Option<f64> {
    let values: Vec<f64> = samples.iter().filter_map(|s| s.get(&what).copied()).collect();
    median(&values)
}

/// The first lines of a long message that speak of an error, as one.
pub(super) fn brief(e: &Error) -> String {
    let text = e.to_string();
    let first = text.lines().take(1);
    let errors = text.lines().skip(1).filter(|line| line.contains("rror"));
    first.chain(errors).take(8).map(str::trim).collect::<Vec<_>>().join("; ")
}

pub(super) fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// One Redis of its own, loaded, moved, and audited, between hosts of its own: CRIU leaves its network lock at the source.
pub(super) fn measure(runtime: &Runtime, mib: usize, mode: Mode) -> Result<Sample> {
    let hosts = Hosts::new();
    let mut migration = Migration::start(&hosts, runtime)?;
    migration.connect()?.load(mib, |_| {})?;
    if mode == Mode::Local {
        // Redis closes the loader's connection when it next looks.
        std::thread::sleep(Duration::from_millis(500));
        let (checkpoint, restore) = migration.there_and_back()?;
        migration.connect()?;
        return Ok(Sample::from([
            (Measure::Checkpoint, ms(checkpoint)),
            (Measure::Restore, ms(restore)),
            (Measure::Total, ms(checkpoint + restore)),
        ]));
    }
    let writer = Writer::paced(migration.connect()?, PAUSE);
    std::thread::sleep(Duration::from_secs(1));
    let begin = Instant::now();
    let mut total = Duration::ZERO;
    if mode == Mode::PreDump {
        for _ in 0..2 {
            total += migration.pre_dump(|_| {})?.took;
        }
    }
    let pages = if mode == Mode::Cold { Pages::AsFiles } else { Pages::ByServer };
    let (last, _) = migration.hand_over(pages)?;
    total += last.took;
    // The longest gap ends with the first answer at the new place.
    std::thread::sleep(Duration::from_secs(1));
    let record = writer.finish();
    if let Some(failure) = &record.failure {
        return Err(Error::other(format!("the client lost its connection: {failure}")));
    }
    let verdict = record.audit(&mut migration.connect()?)?;
    if verdict != (0, 0, 0) {
        return Err(Error::other(format!("writes lost, doubled, wrong: {verdict:?}")));
    }
    Ok(Sample::from([
        (Measure::Gap, ms(record.longest_gap(begin))),
        (Measure::Frozen, ms(last.stats.frozen)),
        (Measure::Total, ms(total)),
        (Measure::Bytes, migration.received() as f64 / f64::from(1 << 20)),
    ]))
}
