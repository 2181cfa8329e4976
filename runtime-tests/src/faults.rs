//! What may happen to a move, at random moments: afterwards exactly one host runs the container, or the source holds it frozen and `--settle`
//! resolves that; the client's data is right; nothing is left behind; and the next move works.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::command::tool;
use crate::host;
use crate::hosts::Hosts;
use crate::journey::{Journey, LIMIT, Load, Moving};
use crate::redis::{self, Writer};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    KillSource,
    KillDestination,
    KillTransport,
    LinkDown,
    /// Nothing gets to one of the hosts; what it says gets out.
    OneWay,
    NoMemory,
    DiskFull,
    SlowLink,
    /// Bytes that the peer has not said, in either direction.
    Hostile,
}

impl Fault {
    pub const ALL: [Fault; 9] = [
        Fault::KillSource,
        Fault::KillDestination,
        Fault::KillTransport,
        Fault::LinkDown,
        Fault::OneWay,
        Fault::NoMemory,
        Fault::DiskFull,
        Fault::SlowLink,
        Fault::Hostile,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Fault::KillSource => "kill-source",
            Fault::KillDestination => "kill-destination",
            Fault::KillTransport => "kill-ssh",
            Fault::LinkDown => "link-down",
            Fault::OneWay => "one-way",
            Fault::NoMemory => "no-memory",
            Fault::DiskFull => "disk-full",
            Fault::SlowLink => "slow-link",
            Fault::Hostile => "hostile-bytes",
        }
    }

    /// At the beginning of which it may happen, or some time later.
    fn phases(self) -> &'static [&'static str] {
        match self {
            // Once it runs there, it is the container that has too little.
            Fault::NoMemory => &["verify", "pre-copy"],
            // Twice what matters most.
            _ => &["connect", "verify", "pre-copy", "freeze", "handover", "handover", "cleanup"],
        }
    }
}

impl std::str::FromStr for Fault {
    type Err = String;

    fn from_str(name: &str) -> Result<Fault, String> {
        let found = Fault::ALL.into_iter().find(|fault| fault.name() == name);
        found.ok_or_else(|| format!("unknown fault {name}"))
    }
}

#[derive(Debug, Clone)]
pub struct Plan {
    /// In turn, in a random order.
    pub faults: Vec<Fault>,
    pub rounds: usize,
    pub seed: u64,
    /// Of the Redis, MiB.
    pub mib: usize,
}

/// Random numbers that a seed repeats.
pub struct Chance(u64);

impl Chance {
    pub fn new(seed: u64) -> Chance {
        Chance(seed | 1)
    }

    /// From the clock, or from `LMRUN_SEED`.
    pub fn seed() -> u64 {
        let given = std::env::var("LMRUN_SEED").ok().and_then(|seed| seed.parse().ok());
        let clock = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(1, |since| since.as_nanos() as u64);
        given.unwrap_or(clock % 1_000_000_007)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    /// Less than `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }

    fn one<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }

    fn time(&mut self, limit: Duration) -> Duration {
        Duration::from_micros(self.below(limit.as_micros() as u64 + 1))
    }
}

/// What came of all rounds.
#[derive(Debug, Default)]
pub struct Tally {
    /// By fault: moved, not moved, settled by hand.
    pub outcomes: BTreeMap<Fault, [u32; 3]>,
    pub failures: Vec<String>,
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "| fault | rounds | moved | not moved | settled by hand |\n| --- | --- | --- | --- | --- |")?;
        for (fault, [moved, stayed, settled]) in &self.outcomes {
            writeln!(f, "| {} | {} | {moved} | {stayed} | {settled} |", fault.name(), moved + stayed + settled)?;
        }
        self.failures.iter().try_for_each(|failure| writeln!(f, "\n{failure}"))
    }
}

enum Outcome {
    Moved,
    Stayed,
    Settled,
}

/// All rounds. `progress` hears of each.
///
/// # Errors
/// When not even the scene can be made.
pub fn run(plan: &Plan, mut progress: impl FnMut(&str)) -> std::io::Result<Tally> {
    let rootfs =
        host::InMemory::mount(std::env::temp_dir().join(format!("lmrun-faults-{}-{}", std::process::id(), plan.seed)))?;
    redis::rootfs(&rootfs.dir)?;
    let mut tally = Tally::default();
    let mut chance = Chance::new(plan.seed);
    let mut order: Vec<Fault> = Vec::new();
    let mut round = 0;
    'scenes: while round < plan.rounds {
        // A new scene behind each failure, which may have left anything.
        let hosts = Hosts::new();
        let mut scene = Scene::start(&hosts, &rootfs.dir, plan.mib)?;
        while round < plan.rounds {
            if order.is_empty() {
                order = plan.faults.clone();
            }
            let fault = order.swap_remove(chance.below(order.len() as u64) as usize);
            round += 1;
            let (phase, outcome) = scene.round(fault, &mut chance);
            match outcome {
                Ok(outcome) => {
                    let (place, word) = match outcome {
                        Outcome::Moved => (0, "moved"),
                        Outcome::Stayed => (1, "not moved"),
                        Outcome::Settled => (2, "settled"),
                    };
                    tally.outcomes.entry(fault).or_default()[place] += 1;
                    progress(&format!("{round}: {} {phase}: {word}", fault.name()));
                }
                Err(failure) => {
                    let failure = format!("seed {}, round {round}: {} {phase}: {failure}", plan.seed, fault.name());
                    progress(&failure);
                    tally.failures.push(failure);
                    continue 'scenes;
                }
            }
        }
        if let Err(failure) = scene.finish() {
            tally.failures.push(format!("seed {}, at the end: {failure}", plan.seed));
        }
    }
    Ok(tally)
}

/// A Redis between two hosts, and its client.
struct Scene<'a> {
    hosts: &'a Hosts,
    journey: Journey<'a>,
    writer: Option<Writer>,
    /// What there is at the host that runs it, and at the other.
    as_it_was: [BTreeSet<String>; 2],
    /// How long each phase takes.
    usual: BTreeMap<String, Duration>,
}

impl<'a> Scene<'a> {
    fn start(hosts: &'a Hosts, rootfs: &std::path::Path, mib: usize) -> std::io::Result<Scene<'a>> {
        let mut journey = Journey::start(hosts, &Load::redis(rootfs))?;
        journey.connect()?.load(mib, |_| {})?;
        let writer = Some(Writer::paced(journey.connect()?, Duration::from_micros(500)));
        let mut usual = BTreeMap::new();
        for _ in 0..2 {
            let moved = journey.migrate(&[])?;
            usual = durations(&moved.events);
        }
        let as_it_was = [journey.inventory(journey.at()), journey.inventory(1 - journey.at())];
        Ok(Scene { hosts, journey, writer, as_it_was, usual })
    }

    /// One move with a fault in it, and one without. Gives the moment, too.
    fn round(&mut self, fault: Fault, chance: &mut Chance) -> (String, Result<Outcome, String>) {
        let phase = chance.one(fault.phases());
        let delay = chance.time(self.usual.get(phase).copied().unwrap_or(Duration::from_millis(10)));
        let moment = format!("in {phase} after {delay:?}");
        let (from, to) = (self.journey.at(), 1 - self.journey.at());
        let mut moving = match self.journey.depart(&[]) {
            Ok(moving) => moving,
            Err(e) => return (moment, Err(e.to_string())),
        };
        let outcome = self.suffer(fault, phase, delay, &mut moving, chance);
        let told = |failure: String| {
            let states = [0, 1].map(|at| self.journey.state(at).map(|s| s["status"].clone()).unwrap_or_default());
            format!(
                "{failure}\nmoved from {from}; states {states:?}; client: {:?}\nsource: {}\ndestination: {}",
                self.writer.as_ref().map(Writer::goes_on),
                moving.said(),
                self.journey.received(to)
            )
        };
        let outcome = outcome.map_err(told);
        let outcome = outcome.and_then(|outcome| {
            self.again()
                .map_err(|e| format!("{e}\nbefore: {}\nthere: {}", moving.said(), self.journey.received(to)))?;
            Ok(outcome)
        });
        (moment, outcome)
    }

    fn suffer(
        &mut self,
        fault: Fault,
        phase: &str,
        delay: Duration,
        moving: &mut Moving,
        chance: &mut Chance,
    ) -> Result<Outcome, String> {
        let (from, to) = (self.journey.at(), 1 - self.journey.at());
        let struck = if moving.await_phase(phase) {
            std::thread::sleep(delay);
            let struck = self.strike(fault, moving, chance);
            struck.hold(self, moving, chance);
            Some(struck)
        } else {
            None
        };
        let code = if struck.is_some() { moving.wait() } else { moving.wait().or(Some(1)) };
        if let Some(struck) = struck {
            // The destination may wait for a word that does not come.
            let begin = Instant::now();
            while !self.journey.receiving(to).is_empty() {
                if begin.elapsed() > Duration::from_secs(40) {
                    struck.heal(self.hosts);
                    return Err("the destination's lmrun does not end".into());
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            struck.heal(self.hosts);
        }
        let outcome = self.resolve(from, to, code)?;
        self.serves()?;
        Ok(outcome)
    }

    fn strike(&self, fault: Fault, moving: &Moving, chance: &mut Chance) -> Struck {
        let to = 1 - self.journey.at();
        let end = |pid: u32| {
            // It may have ended by itself.
            let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
        };
        match fault {
            Fault::KillSource => end(moving.pid()),
            Fault::KillDestination => self.journey.receiving(to).into_iter().for_each(end),
            Fault::KillTransport => moving.transport().into_iter().for_each(|pid| end(pid as u32)),
            Fault::LinkDown => {
                self.hosts.plug(to, false);
                return Struck::Unplugged(to);
            }
            Fault::OneWay => {
                let deaf = chance.below(2) as usize;
                let host = [&self.hosts.source, &self.hosts.destination][deaf];
                host.within(|| {
                    tool("nft add table inet deaf");
                    tool("nft add chain inet deaf input { type filter hook input priority 0 ; policy drop ; }");
                });
                return Struck::Deaf(deaf);
            }
            Fault::NoMemory => return self.no_memory(moving, chance).map_or(Struck::Once, Struck::Limited),
            Fault::DiskFull => {
                let path = self.journey.disk(to).join("full");
                if let Ok(file) = File::create(&path)
                    && let Ok(about) = nix::sys::statvfs::fstatvfs(&file)
                {
                    let free =
                        (about.blocks_available() * about.fragment_size()) as i64 - (chance.below(17) << 12) as i64;
                    let _ = nix::fcntl::posix_fallocate(&file, 0, free.max(1));
                }
                return Struck::Full(path);
            }
            Fault::SlowLink => {
                self.hosts.throttle(to, Some(1_000_000 * (20 + chance.below(180))));
                return Struck::Slow(to);
            }
            Fault::Hostile => {
                let _ = fs::write(self.journey.garbage(), garbage(chance));
                let signal = chance.one(&[Signal::SIGUSR1, Signal::SIGUSR2]);
                if let Some(pid) = moving.transport() {
                    let _ = kill(Pid::from_raw(pid), signal);
                }
            }
        }
        Struck::Once
    }

    /// From now on the container at the destination gets hardly any more memory. Gives the file that says so.
    fn no_memory(&self, moving: &Moving, chance: &mut Chance) -> Option<PathBuf> {
        let cgroup = self.journey.cgroup(1 - self.journey.at());
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(5) {
            for dir in host::cgroups(&self.journey.id).into_iter().filter(|dir| dir.ends_with(&cgroup)) {
                for (limit, usage) in
                    [("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")]
                {
                    let used =
                        fs::read_to_string(dir.join(usage)).ok().and_then(|text| text.trim().parse::<u64>().ok());
                    if let Some(used) = used {
                        let path = dir.join(limit);
                        fs::write(&path, (used + chance.below(4 << 20)).to_string()).ok()?;
                        return Some(path);
                    }
                }
            }
            if fs::metadata(format!("/proc/{}/task", moving.pid())).is_err() {
                return None;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        None
    }

    /// Sees to it that exactly one host runs it, as one does by hand.
    fn resolve(&mut self, from: usize, to: usize, code: Option<i32>) -> Result<Outcome, String> {
        let runs = |at: usize| self.journey.status(at).as_deref() == Some("running");
        let (here, there) = (runs(from), runs(to));
        if here && there {
            return Err("both run".into());
        }
        let frozen = self.journey.status(from).as_deref() == Some("paused");
        let note = self.journey.disk(from).join("state").join(&self.journey.id).join("migration.json").exists();
        let expected = match code {
            Some(0) => there && !here && !note,
            Some(1) => here && !note,
            Some(75) => frozen && note,
            // Killed.
            None => here || note || there,
            Some(_) => false,
        };
        if !expected {
            return Err(format!(
                "exit code {code:?}, but it runs at the source: {here}, at the destination: {there}, frozen: {frozen}, note: {note}"
            ));
        }
        let mut outcome = if there { Outcome::Moved } else { Outcome::Stayed };
        if note {
            outcome = Outcome::Settled;
            let said = self.journey.settle(from);
            if !said.succeeded() {
                return Err(format!("--settle: {said}"));
            }
        }
        let runs = |at: usize| self.journey.status(at).as_deref() == Some("running");
        let at = match (runs(from), runs(to)) {
            (true, false) => from,
            (false, true) => to,
            other => return Err(format!("after all, running at source and destination: {other:?}")),
        };
        self.journey.is_at(at);
        Ok(outcome)
    }

    /// The client gets its answers.
    fn serves(&mut self) -> Result<(), String> {
        let Some(writer) = &self.writer else { return Err("no client".into()) };
        let (begin, before) = (Instant::now(), writer.acknowledged());
        while writer.acknowledged() < before + 20 {
            if !writer.goes_on() {
                let failure = self.writer.take().and_then(|writer| writer.finish().failure);
                return Err(format!("the client: {failure:?}"));
            }
            if begin.elapsed() > Duration::from_secs(30) {
                return Err("the client is not served".into());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// The next move works, nothing is left behind, and all data is there.
    fn again(&mut self) -> Result<(), String> {
        let moved = self.journey.migrate(&[]).map_err(|e| format!("the next move: {e}"))?;
        for (phase, took) in durations(&moved.events) {
            // One that took long is the exception.
            let usual = self.usual.entry(phase).or_insert(took);
            *usual = (*usual * 3 + took.min(*usual * 2)) / 4;
        }
        self.serves().map_err(|e| format!("after the next move: {e}"))?;
        let begin = Instant::now();
        for (at, expected) in [self.journey.at(), 1 - self.journey.at()].into_iter().zip(&self.as_it_was) {
            loop {
                let now = self.journey.inventory(at);
                if now == *expected {
                    break;
                }
                if begin.elapsed() > Duration::from_secs(5) {
                    let more: Vec<_> = now.difference(expected).collect();
                    let less: Vec<_> = expected.difference(&now).collect();
                    return Err(format!("left behind at host {at}: {more:?}; missing: {less:?}"));
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        Ok(())
    }

    /// All that was ever acknowledged is there, on the first connection.
    fn finish(mut self) -> Result<(), String> {
        let record = self.writer.take().ok_or("no client")?.finish();
        if let Some(failure) = record.failure {
            return Err(failure);
        }
        let audit =
            self.journey.connect().and_then(|mut client| record.audit(&mut client)).map_err(|e| e.to_string())?;
        if audit == (0, 0, 0) { Ok(()) } else { Err(format!("lost, doubled, wrong: {audit:?}")) }
    }
}

/// What was done, and how long it is to last.
enum Struck {
    /// It is done.
    Once,
    Unplugged(usize),
    Deaf(usize),
    Slow(usize),
    Limited(PathBuf),
    Full(PathBuf),
}

impl Struck {
    /// Until it is over, or the move is.
    fn hold(&self, scene: &Scene, moving: &mut Moving, chance: &mut Chance) {
        let limit = match self {
            Struck::Once => return,
            // Some are soon over, and some last.
            Struck::Unplugged(_) | Struck::Deaf(_) if chance.below(2) == 0 => chance.time(Duration::from_secs(2)),
            _ => LIMIT,
        };
        let begin = Instant::now();
        while begin.elapsed() < limit && !moving.has_ended() {
            std::thread::sleep(Duration::from_micros(500));
        }
        // What lasts does so for the destination, too; but there is nobody left who could use the memory.
        if limit < LIMIT || matches!(self, Struck::Limited(_)) {
            self.heal(scene.hosts);
        }
    }

    /// As it was before. May be said twice.
    fn heal(&self, hosts: &Hosts) {
        match self {
            Struck::Once => {}
            Struck::Unplugged(host) => hosts.plug(*host, true),
            Struck::Deaf(host) => {
                [&hosts.source, &hosts.destination][*host]
                    .within(|| tool_line("nft delete table inet deaf 2>/dev/null || :"));
            }
            Struck::Slow(host) => hosts.throttle(*host, None),
            Struck::Limited(path) => {
                let _ = fs::write(path, "-1").or_else(|_| fs::write(path, "max"));
            }
            Struck::Full(path) => {
                let _ = fs::remove_file(path);
            }
        }
    }
}

/// A line for sh(1), which must succeed.
#[track_caller]
fn tool_line(line: &str) {
    crate::command::run(std::process::Command::new("sh").args(["-c", line]), Duration::from_secs(20)).ok();
}

/// Noise, or frames of the protocol that nobody would say: of any type, with a length that is none, with nonsense inside.
fn garbage(chance: &mut Chance) -> Vec<u8> {
    let length = 1 + chance.below(4096) as usize;
    let noise: Vec<u8> = (0..length).map(|_| chance.below(256) as u8).collect();
    let mut bytes = Vec::new();
    let kind = chance.below(72) as u16;
    let header =
        |flags: u16, length: u32| [&kind.to_le_bytes()[..], &flags.to_le_bytes(), &length.to_le_bytes()].concat();
    match chance.below(4) {
        0 => {}
        1 => bytes.extend(header(0, u32::MAX)),
        2 => bytes.extend(header(1, length as u32)),
        _ => bytes.extend(header(0, length as u32)),
    }
    let _ = bytes.write_all(&noise);
    bytes
}

/// From the beginning of each phase to that of the next.
fn durations(events: &[(Instant, Value)]) -> BTreeMap<String, Duration> {
    let phases: Vec<(Instant, &str)> =
        events.iter().filter_map(|(at, event)| Some((*at, event["phase"].as_str()?))).collect();
    let end = events.last().map(|(at, _)| *at);
    let ends = phases.iter().skip(1).map(|(at, _)| *at).chain(end);
    phases.iter().zip(ends).map(|((at, phase), end)| ((*phase).to_owned(), end - *at)).collect()
}
