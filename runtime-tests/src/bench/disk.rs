//! What the files of a container add to the time it is frozen: the last round, from its beginning until the destination has
//! applied and checked it, while a writer has been at work on an overlay until then.

use std::fs::{self, File, OpenOptions};
use std::io::{Error, Read, Result, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use lmrun::migrate::disk::{Message, Root, Round, Source, Stage, Target, message};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use prost::Message as _;

use super::{Table, machine, median};

/// What is to be measured.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Written before, MiB.
    pub before: usize,
    /// Written during the move, MiB/s.
    pub rate: usize,
    /// From the end of the last live round to the freeze, milliseconds.
    pub gap: u64,
    pub repetitions: usize,
}

/// What the writer does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Writer {
    Appends,
    Overwrites,
    MakesFiles,
}

const CHUNK: usize = 64 << 10;

/// Measures, and returns the table.
///
/// # Errors
/// When a disk or lmrun fails.
pub fn run(plan: &Plan) -> Result<String> {
    let mut table = Table::new(&[
        "writer",
        "last round, ms",
        "of which source, ms",
        "sent, KiB",
        "compared, MiB",
        "first round, MiB/s",
    ]);
    let kinds = [
        ("appends to one file", Writer::Appends),
        ("writes anywhere in one file", Writer::Overwrites),
        ("makes files of 64 KiB", Writer::MakesFiles),
    ];
    for (what, writer) in kinds {
        let all = (0..plan.repetitions).map(|_| measure(plan, writer)).collect::<Result<Vec<_>>>()?;
        let of = |value: fn(&Measured) -> f64| {
            let values: Vec<f64> = all.iter().map(value).collect();
            format!("{:.1}", median(&values).unwrap_or_default())
        };
        table.row([
            what.to_owned(),
            of(|m| m.last.as_secs_f64() * 1e3),
            of(|m| m.round.took.as_secs_f64() * 1e3),
            of(|m| m.round.sent as f64 / 1024.0),
            of(|m| m.round.compared as f64 / f64::from(1 << 20)),
            of(|m| m.first),
        ]);
    }
    Ok(format!(
        "{}\n\n{} MiB before, {} MiB/s during, {} ms from the last live round to the freeze; medians of {}\n\n{table}",
        machine(),
        plan.before,
        plan.rate,
        plan.gap,
        plan.repetitions
    ))
}

struct Measured {
    last: Duration,
    round: Round,
    /// MiB/s.
    first: f64,
}

/// An overlay in a directory of its own; gone when dropped.
struct Overlay(PathBuf);

impl Overlay {
    fn new() -> Result<Self> {
        let dir = PathBuf::from(format!("/var/tmp/lmrun-bench-disk-{}", std::process::id()));
        let overlay = Self(dir.clone());
        for name in ["lower", "upper", "work", "merged"] {
            fs::create_dir_all(dir.join(name))?;
        }
        let at = |name| dir.join(name).display().to_string();
        let options = format!("lowerdir={},upperdir={},workdir={}", at("lower"), at("upper"), at("work"));
        mount(Some("overlay"), &dir.join("merged"), Some("overlay"), MsFlags::empty(), Some(options.as_str()))?;
        Ok(overlay)
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let _ = umount2(&self.0.join("merged"), MntFlags::MNT_DETACH);
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn measure(plan: &Plan, writer: Writer) -> Result<Measured> {
    let overlay = Overlay::new()?;
    let merged = overlay.0.join("merged");
    let mut written = 0;
    while written < plan.before << 20 {
        write(&merged, writer, &mut written, plan.before << 20)?;
    }
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let writing = scope.spawn(|| -> Result<()> {
            let mut written = written;
            while !stop.load(Ordering::Relaxed) {
                write(&merged, writer, &mut written, plan.before << 20)?;
                thread::sleep(Duration::from_secs_f64(CHUNK as f64 / (plan.rate << 20) as f64));
            }
            Ok(())
        });
        let moved = (|| {
            let root =
                |path: &str, view| Root { name: "root".into(), path: overlay.0.join(path), view, inside: "/".into() };
            let mut source = Source::open(vec![root("upper", Some(merged.clone()))]).map_err(Error::other)?;
            let target = Target::create(vec![root("target", None)]).map_err(Error::other)?;
            let (mut here, there) = UnixStream::pair()?;
            let receiving = scope.spawn(move || receive(there, target));
            let (first, took) = round(&mut source, Stage::Live, &mut here)?;
            let first = first.sent as f64 / f64::from(1 << 20) / took.as_secs_f64();
            for _ in 0..2 {
                round(&mut source, Stage::Live, &mut here)?;
            }
            thread::sleep(Duration::from_millis(plan.gap));
            stop.store(true, Ordering::Relaxed);
            // What is frozen writes no more.
            thread::sleep(Duration::from_millis(20));
            let (round, last) = round(&mut source, Stage::Last, &mut here)?;
            drop(here);
            receiving.join().map_err(|_| Error::other("the destination has panicked"))??;
            Ok(Measured { last, round, first })
        })();
        stop.store(true, Ordering::Relaxed);
        writing.join().map_err(|_| Error::other("the writer has panicked"))??;
        moved
    })
}

/// A chunk more; what is there at the beginning is made the same way.
fn write(dir: &Path, writer: Writer, written: &mut usize, before: usize) -> Result<()> {
    let bytes: Vec<u8> = (0..CHUNK / 8)
        .flat_map(|n| ((n + *written) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
        .collect();
    let number = *written / CHUNK;
    *written += CHUNK;
    match writer {
        Writer::Appends => OpenOptions::new().append(true).create(true).open(dir.join("log"))?.write_all(&bytes),
        Writer::Overwrites => {
            let chunks = before / CHUNK;
            let at = if number < chunks { number } else { number.wrapping_mul(7919) % chunks };
            let file = OpenOptions::new().write(true).create(true).truncate(false).open(dir.join("database"))?;
            file.write_all_at(&bytes, (at * CHUNK) as u64)
        }
        Writer::MakesFiles => {
            let dir = dir.join((number / 100).to_string());
            fs::create_dir_all(&dir)?;
            File::create(dir.join(number.to_string()))?.write_all(&bytes)
        }
    }
}

/// One round; until the destination says that it has it.
fn round(source: &mut Source, stage: Stage, to: &mut UnixStream) -> Result<(Round, Duration)> {
    let started = Instant::now();
    let mut out = std::io::BufWriter::with_capacity(1 << 20, &mut *to);
    let mut emit = |message: Message| {
        let bytes = message.encode_to_vec();
        out.write_all(&(bytes.len() as u32).to_le_bytes())?;
        out.write_all(&bytes)
    };
    let round = source.round(stage, &[], &mut emit).map_err(Error::other)?;
    out.flush()?;
    drop(out);
    to.read_exact(&mut [0])?;
    Ok((round, started.elapsed()))
}

fn receive(stream: UnixStream, mut target: Target) -> Result<()> {
    let mut input = std::io::BufReader::with_capacity(1 << 20, &stream);
    let mut length = [0; 4];
    while input.read_exact(&mut length).is_ok() {
        let mut bytes = vec![0; (u32::from_le_bytes(length) as usize).min(message::LIMIT)];
        input.read_exact(&mut bytes)?;
        let message = Message::parse(&bytes).map_err(Error::other)?;
        let is_end = matches!(&message.op, Some(message::Op::End(_)));
        target.apply(message).map_err(Error::other)?;
        if is_end {
            (&stream).write_all(&[1])?;
        }
    }
    target.finish().map_err(Error::other)
}
