//! What `lmrun migrate` costs, against the bars that it has to clear: a Redis with a client, peers that stream, files that are
//! written; and what runc with CRIU makes of the same Redis, in turn.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Error, Read, Result, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;

use super::by_hand::{self, Measure, Mode, PAUSE, brief, ms};
use super::{Table, machine, median, ninety_fifth};
use crate::host::InMemory;
use crate::hosts::{CONTAINER, DESTINATION, Hosts};
use crate::journey::{Journey, LIMIT, Load, Moved};
use crate::needs;
use crate::redis::{self, Writer};
use crate::runtimes::Runtime;

/// What is to be measured.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Memory of the Redis, MiB.
    pub sizes: Vec<usize>,
    pub streams: bool,
    pub files: bool,
    pub repetitions: usize,
    /// For `lmrun migrate`.
    pub flags: Vec<String>,
    /// The peer, or why there is none.
    pub peer: std::result::Result<Runtime, String>,
}

/// Values by what they are of; of lmrun and of the peer.
#[derive(Debug, Default)]
struct Samples {
    ours: BTreeMap<String, Vec<f64>>,
    peers: BTreeMap<String, Vec<f64>>,
    /// What the time went into, by case and in order.
    parts: BTreeMap<String, Vec<(String, Vec<f64>)>>,
    notes: Vec<String>,
}

impl Samples {
    fn add(&mut self, what: String, value: f64) {
        self.ours.entry(what).or_default().push(value);
    }

    /// The parts of lmrun's own account.
    fn account(&mut self, case: &str, moved: &Moved) {
        let parts = self.parts.entry(case.to_owned()).or_default();
        let mut add = |name: &str, value: f64| match parts.iter_mut().find(|(known, _)| known == name) {
            Some((_, values)) => values.push(value),
            None => parts.push((name.to_owned(), vec![value])),
        };
        for part in moved.summary["downtime"].as_array().into_iter().flatten() {
            add(part["name"].as_str().unwrap_or_default(), number(&part["us"]) / 1e3);
        }
        add("= stood still", number(&moved.summary["downtime_us"]) / 1e3);
        add("rounds", number(&moved.summary["rounds"]));
        add("MiB on the wire", number(&moved.summary["bytes"]) / f64::from(1 << 20));
        let longest =
            moved.events.iter().filter(|(_, e)| e["event"] == "round").map(|(_, e)| number(&e["frozen_us"]) / 1e3);
        add("longest stop of pre-copy", longest.fold(0.0, f64::max));
    }
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(0.0)
}

/// A bar: what is measured, whether it is the median (or the 95th percentile), and what it may be at most (or at least).
struct Bar {
    what: String,
    tail: bool,
    most: f64,
    least: bool,
}

/// Measures, and returns the tables. `progress` hears of each step.
///
/// # Errors
/// When lmrun fails. A failure of the peer's is a note below the table.
pub fn run(plan: &Plan, mut progress: impl FnMut(&str)) -> Result<String> {
    let base = InMemory::mount(std::env::temp_dir().join(format!("lmrun-bench-{}-0", std::process::id())))?;
    redis::rootfs(&base.dir.join("redis"))?;
    let guest = base.dir.join("guest");
    for name in ["proc", "dev", "sys", "tmp"] {
        fs::create_dir_all(guest.join(name))?;
    }
    fs::copy(needs::built("bench_guest"), guest.join("bench_guest"))?;
    let mut samples = Samples::default();
    for &mib in &plan.sizes {
        of_redis(plan, mib, &base.dir.join("redis"), &mut samples, &mut progress)?;
    }
    if plan.streams {
        of_streams(plan, &guest, &mut samples, &mut progress)?;
    }
    if plan.files {
        of_files(plan, &guest, &mut samples, &mut progress)?;
    }
    let mut text = format!("{}\n\n{}; ", machine(), Runtime::Lmrun.version()?);
    text += &match &plan.peer {
        Ok(peer) => format!("{}; ", peer.version()?),
        Err(why) => format!("no peer: {why}; "),
    };
    text +=
        &format!("{} moves of each kind, there and back in turn, interleaved with the peer's\n\n", plan.repetitions);
    text += &results(plan, &samples).to_string();
    text += "\nWhat lmrun says of it (`--json`), medians, ms:\n\n";
    text += &accounts(&samples).to_string();
    samples.notes.iter().for_each(|note| text += &format!("\n* {note}"));
    Ok(text)
}

fn bars(plan: &Plan) -> Vec<Bar> {
    let bar = |what: String, tail, most| Bar { what, tail, most, least: false };
    let mut bars = Vec::new();
    for mib in &plan.sizes {
        bars.push(bar(format!("{mib} MiB: client's longest gap, ms"), false, 25.0));
        bars.push(bar(format!("{mib} MiB: client's longest gap, ms"), true, 80.0));
        bars.push(bar(format!("{mib} MiB: stood still, ms"), false, if *mib == 1024 { 20.0 } else { f64::INFINITY }));
        bars.push(bar(format!("{mib} MiB: whole move, ms"), false, f64::INFINITY));
        bars.push(bar(format!("{mib} MiB: whole move / (memory / raw throughput of the link)"), false, 1.5));
        let throughput = format!("{mib} MiB: client's throughput in pre-copy, % of undisturbed");
        bars.push(Bar { what: throughput, tail: false, most: 80.0, least: true });
    }
    for kind in KINDS {
        bars.push(bar(format!("stream, {kind}: latest message, ms"), false, 60.0));
        bars.push(bar(format!("stream, {kind}: latest message of a second without a move, ms"), false, f64::INFINITY));
    }
    bars.push(bar("files: stood still with nothing to carry, ms".into(), false, f64::INFINITY));
    bars.push(bar("files: stood still with 200 MiB before, 5 MiB/s during, ms".into(), false, f64::INFINITY));
    bars
}

fn results(plan: &Plan, samples: &Samples) -> Table {
    let mut table = Table::new(&["", "", "lmrun", "runc + CRIU", "bar", ""]);
    let shown = |value: f64| if value < 10.0 { format!("{value:.2}") } else { format!("{value:.1}") };
    let verdict = |holds: bool| if holds { "holds" } else { "missed" }.to_owned();
    for bar in bars(plan) {
        let of = |all: &BTreeMap<String, Vec<f64>>| {
            let values = all.get(&bar.what)?;
            if bar.tail { ninety_fifth(values) } else { median(values) }
        };
        let Some(own) = of(&samples.ours) else { continue };
        let limited = bar.most.is_finite();
        table.row([
            bar.what.clone(),
            if bar.tail { "95 %" } else { "median" }.to_owned(),
            shown(own),
            of(&samples.peers).map_or("-".into(), shown),
            match (limited, bar.least) {
                (false, _) => String::new(),
                (true, false) => format!("<= {}", bar.most),
                (true, true) => format!(">= {}", bar.most),
            },
            if limited { verdict(if bar.least { own >= bar.most } else { own <= bar.most }) } else { String::new() },
        ]);
    }
    let middle = |what: &str| samples.ours.get(what).and_then(|values| median(values));
    let mut derived = |what: &str, value: Option<f64>, most: f64| {
        if let Some(value) = value {
            table.row([
                what.into(),
                String::new(),
                shown(value),
                "-".into(),
                format!("<= {most}"),
                verdict(value <= most),
            ]);
        }
    };
    let gap = |mib: u32| middle(&format!("{mib} MiB: client's longest gap, ms"));
    derived("gap at 4096 MiB / gap at 64 MiB", gap(4096).zip(gap(64)).map(|(large, small)| large / small), 1.25);
    let with = middle("files: stood still with 200 MiB before, 5 MiB/s during, ms");
    let without = middle("files: stood still with nothing to carry, ms");
    derived(
        "files: by how much longer it stands still, ms",
        with.zip(without).map(|(with, without)| with - without),
        20.0,
    );
    table
}

fn accounts(samples: &Samples) -> Table {
    let cases: Vec<&String> = samples.parts.keys().collect();
    let head: Vec<&str> = std::iter::once("").chain(cases.iter().map(|case| case.as_str())).collect();
    let mut table = Table::new(&head);
    let mut names: Vec<&String> = Vec::new();
    for (name, _) in samples.parts.values().flatten() {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    for name in names {
        let of = |case: &&String| {
            let values = samples.parts[*case].iter().find(|(known, _)| known == name).map(|(_, values)| values);
            values.and_then(|values| median(values)).map_or("-".into(), |value| format!("{value:.1}"))
        };
        table.row(std::iter::once(name.clone()).chain(cases.iter().map(of)));
    }
    table
}

/// A Redis goes back and forth; its client keeps its one connection.
fn of_redis(
    plan: &Plan,
    mib: usize,
    rootfs: &Path,
    samples: &mut Samples,
    progress: &mut impl FnMut(&str),
) -> Result<()> {
    let hosts = Hosts::new();
    let mut journey = Journey::start(&hosts, &Load::redis(rootfs))?;
    journey.connect()?.load(mib, |_| {})?;
    let writer = Writer::paced(journey.connect()?, PAUSE);
    let mut peer = plan.peer.as_ref().ok();
    let flags: Vec<&str> = plan.flags.iter().map(String::as_str).collect();
    let mut moves: Vec<(Instant, Instant)> = Vec::new();
    for n in 1..=plan.repetitions {
        progress(&format!("{mib} MiB, {n} of {}", plan.repetitions));
        let raw = link(&hosts)?;
        let (from, before) = (Instant::now(), writer.acknowledged());
        std::thread::sleep(Duration::from_secs(1));
        let rate = |since: Instant, count: u64| (writer.acknowledged() - count) as f64 / since.elapsed().as_secs_f64();
        let undisturbed = rate(from, before);

        let mut moving = journey.depart(&flags)?;
        let begun = moving.begun;
        moving.await_phase("pre-copy");
        let (from, before) = (Instant::now(), writer.acknowledged());
        moving.await_phase("freeze");
        let disturbed = rate(from, before);
        let moved = journey.complete(moving)?;
        let total = number(&moved.summary["total_us"]);
        samples.account(&format!("{mib} MiB"), &moved);
        samples.add(format!("{mib} MiB: stood still, ms"), number(&moved.summary["downtime_us"]) / 1e3);
        samples.add(format!("{mib} MiB: whole move, ms"), total / 1e3);
        let least = (mib << 20) as f64 / raw;
        samples.add(format!("{mib} MiB: whole move / (memory / raw throughput of the link)"), total / 1e6 / least);
        samples.add(
            format!("{mib} MiB: client's throughput in pre-copy, % of undisturbed"),
            disturbed / undisturbed * 100.0,
        );
        std::thread::sleep(Duration::from_millis(500));
        // What the peer does to this machine afterwards is not to count.
        moves.push((begun, Instant::now()));
        let Some(runtime) = peer else { continue };
        match by_hand::measure(runtime, mib, Mode::PageServer) {
            Ok(sample) => {
                for (measure, what) in [
                    (Measure::Gap, "client's longest gap, ms"),
                    (Measure::Frozen, "stood still, ms"),
                    (Measure::Total, "whole move, ms"),
                ] {
                    if let Some(value) = sample.get(&measure) {
                        samples.peers.entry(format!("{mib} MiB: {what}")).or_default().push(*value);
                    }
                }
            }
            Err(e) => {
                peer = None;
                samples.notes.push(format!("peer, {mib} MiB: {}", brief(&e)));
            }
        }
    }
    let record = writer.finish();
    if let Some(failure) = &record.failure {
        return Err(Error::other(format!("the client lost its connection: {failure}")));
    }
    let verdict = record.audit(&mut journey.connect()?)?;
    if verdict != (0, 0, 0) {
        return Err(Error::other(format!("writes lost, doubled, wrong: {verdict:?}")));
    }
    for (begin, end) in moves {
        samples.add(format!("{mib} MiB: client's longest gap, ms"), ms(record.longest_gap_between(begin, end)));
    }
    Ok(())
}

/// Bytes per second from host to host, by one connection.
fn link(hosts: &Hosts) -> Result<f64> {
    const PORT: u16 = 7001;
    const BYTES: usize = 512 << 20;
    let listener = hosts.destination.within(|| TcpListener::bind((DESTINATION, PORT)))?;
    let mut from = hosts.source.within(|| TcpStream::connect((DESTINATION, PORT)))?;
    let (mut to, _) = listener.accept()?;
    let begin = Instant::now();
    let reader = std::thread::spawn(move || {
        let mut room = vec![0; 1 << 20];
        while to.read(&mut room).is_ok_and(|read| read > 0) {}
    });
    let chunk = vec![1; 1 << 20];
    for _ in 0..BYTES >> 20 {
        from.write_all(&chunk)?;
    }
    drop(from);
    reader.join().map_err(|_| Error::other("reader"))?;
    Ok(BYTES as f64 / begin.elapsed().as_secs_f64())
}

const KINDS: [&str; 4] = ["sends with Nagle's algorithm", "sends with TCP_NODELAY", "only receives", "idle, then asks"];

/// Four peers of one container.
struct Peers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<()>>>,
    /// How late the latest message to the peer that only receives was, in microseconds.
    received: Arc<AtomicU64>,
    idle: TcpStream,
    query: TcpStream,
}

fn micros_now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}

impl Peers {
    fn connect(hosts: &Hosts) -> Result<Peers> {
        let connect = |kind: u8| -> Result<TcpStream> {
            let mut stream = hosts.client.within(|| {
                let begin = Instant::now();
                loop {
                    match TcpStream::connect((CONTAINER, 7000)) {
                        Err(_) if begin.elapsed() < Duration::from_secs(10) => {
                            std::thread::sleep(Duration::from_millis(10))
                        }
                        done => return done,
                    }
                }
            })?;
            stream.write_all(&[kind])?;
            stream.set_read_timeout(Some(Duration::from_secs(20)))?;
            Ok(stream)
        };
        let stop = Arc::new(AtomicBool::new(false));
        let received = Arc::new(AtomicU64::new(0));
        let mut threads = Vec::new();
        for kind in [b'N', b'D'] {
            let (mut stream, stop) = (connect(kind)?, stop.clone());
            stream.set_nodelay(kind == b'D')?;
            threads.push(std::thread::spawn(move || {
                let mut record = [0; 128];
                while !stop.load(Ordering::Relaxed) {
                    record[..8].copy_from_slice(&micros_now().to_le_bytes());
                    stream.write_all(&record)?;
                    std::thread::sleep(Duration::from_millis(1));
                }
                Ok(())
            }));
        }
        let (mut stream, told, latest) = (connect(b'T')?, stop.clone(), received.clone());
        threads.push(std::thread::spawn(move || {
            let mut record = [0; 128];
            while !told.load(Ordering::Relaxed) {
                stream.read_exact(&mut record)?;
                let sent = u64::from_le_bytes(record[..8].try_into().expect("8 bytes"));
                latest.fetch_max(micros_now().saturating_sub(sent), Ordering::Relaxed);
            }
            Ok(())
        }));
        let (idle, query) = (connect(b'E')?, connect(b'Q')?);
        idle.set_nodelay(true)?;
        Ok(Peers { stop, threads, received, idle, query })
    }

    /// How late the latest messages of the four kinds were since it was last asked, ms.
    fn latest(&mut self) -> Result<[f64; 4]> {
        let begin = Instant::now();
        self.idle.write_all(&[0; 128])?;
        self.idle.read_exact(&mut [0; 128])?;
        let idle = ms(begin.elapsed());
        let mut sent = [[0; 8]; 2];
        self.query.write_all(&[0])?;
        for latest in &mut sent {
            self.query.read_exact(latest)?;
        }
        let [nagle, nodelay] = sent.map(|bytes| u64::from_le_bytes(bytes) as f64 / 1e3);
        Ok([nagle, nodelay, self.received.swap(0, Ordering::Relaxed) as f64 / 1e3, idle])
    }

    fn end(self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| Error::other("a peer"))?)
    }
}

fn of_streams(plan: &Plan, guest: &Path, samples: &mut Samples, progress: &mut impl FnMut(&str)) -> Result<()> {
    let hosts = Hosts::new();
    let args = ["/bench_guest", "streams"].map(str::to_owned).to_vec();
    let mut journey = Journey::start(&hosts, &Load { args, shared: Some(guest.to_owned()), ..Load::default() })?;
    let mut peers = Peers::connect(&hosts)?;
    let flags: Vec<&str> = plan.flags.iter().map(String::as_str).collect();
    for n in 1..=plan.repetitions {
        progress(&format!("streams, {n} of {}", plan.repetitions));
        std::thread::sleep(Duration::from_millis(500));
        peers.latest()?;
        std::thread::sleep(Duration::from_secs(1));
        for (kind, latest) in KINDS.iter().zip(peers.latest()?) {
            samples.add(format!("stream, {kind}: latest message of a second without a move, ms"), latest);
        }
        // The idle one asks in the middle of it.
        let mut moving = journey.depart(&flags)?;
        moving.await_phase("freeze");
        let idle = {
            let begin = Instant::now();
            peers.idle.write_all(&[0; 128])?;
            peers.idle.read_exact(&mut [0; 128])?;
            ms(begin.elapsed())
        };
        let moved = journey.complete(moving)?;
        samples.account("streams", &moved);
        std::thread::sleep(Duration::from_millis(700));
        let mut latest = peers.latest()?;
        latest[3] = idle;
        for (kind, latest) in KINDS.iter().zip(latest) {
            samples.add(format!("stream, {kind}: latest message, ms"), latest);
        }
    }
    peers.end()
}

fn of_files(plan: &Plan, guest: &Path, samples: &mut Samples, progress: &mut impl FnMut(&str)) -> Result<()> {
    let hosts = [Hosts::new(), Hosts::new()];
    let cases = [("nothing to carry", "0", "0"), ("200 MiB before, 5 MiB/s during", "200", "5")];
    let mut journeys = Vec::new();
    for (hosts, (_, before, rate)) in hosts.iter().zip(cases) {
        let args = ["/bench_guest", "files", before, rate].map(str::to_owned).to_vec();
        let load = Load { args, own: Some(guest.to_owned()), disk_mib: 700, ..Load::default() };
        let journey = Journey::start(hosts, &load)?;
        let begin = Instant::now();
        while !journey.disk(0).join("rootfs/ready").exists() {
            if begin.elapsed() > LIMIT {
                return Err(Error::other("the writer of files is not ready"));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        journeys.push(journey);
    }
    let flags: Vec<&str> = plan.flags.iter().map(String::as_str).collect();
    for n in 1..=plan.repetitions {
        for (journey, (case, ..)) in journeys.iter_mut().zip(cases) {
            progress(&format!("files, {case}, {n} of {}", plan.repetitions));
            let moved = journey.migrate(&flags)?;
            samples.account(&format!("files: {case}"), &moved);
            samples.add(format!("files: stood still with {case}, ms"), number(&moved.summary["downtime_us"]) / 1e3);
        }
    }
    Ok(())
}
