//! What the engine's parts cost: memory out and in, stopping threads, remote calls; beside it a plain copy of memory.

use std::io::{Error, Result};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lmrun::sys::mem::Memory;
use lmrun::sys::proc;
use lmrun::tracee::puppet::{Puppet, Stage};

use super::{Table, machine, median};
use crate::bundle::Shape;
use crate::command;
use crate::container::{Checkpoint, Container};
use crate::host::InMemory;
use crate::runtimes::Runtime;
use crate::stats;

/// What is to be measured.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Memory of a container, MiB.
    pub sizes: Vec<usize>,
    pub threads: Vec<usize>,
    pub repetitions: usize,
}

const LIMIT: Duration = Duration::from_secs(120);

/// Measures, and returns the table.
///
/// # Errors
/// When lmrun fails.
pub fn run(plan: &Plan) -> Result<String> {
    let mut table = Table::new(&["", "size", "median", "unit"]);
    let mut row = |what: &str, size: String, values: &[f64], unit: &str| {
        let value = median(values).unwrap_or_default();
        table.row([what.to_owned(), size, format!("{value:.2}"), unit.to_owned()]);
    };
    for &mib in &plan.sizes {
        let size = format!("{mib} MiB");
        let copies: Vec<f64> = (0..plan.repetitions).map(|_| copy(mib)).collect();
        row("memcpy", size.clone(), &copies, "GB/s");
        let moves = repeat(plan, || out_and_in(mib))?;
        for (n, (what, unit)) in [
            ("dump", "GB/s"),
            ("restore", "GB/s"),
            ("restore, peak of resident memory: all", "MiB"),
            ("restore, peak of resident memory: own", "MiB"),
        ]
        .into_iter()
        .enumerate()
        {
            let values: Vec<f64> = moves.iter().map(|m| m[n]).collect();
            row(what, size.clone(), &values, unit);
        }
    }
    for &threads in &plan.threads {
        let values = freezes(threads, plan.repetitions)?;
        row("freeze", format!("{threads} threads"), &values, "ms");
    }
    let calls = repeat(plan, remote_calls)?;
    for (n, what) in ["remote call, single", "remote call, in a batch"].into_iter().enumerate() {
        let values: Vec<f64> = calls.iter().map(|c| c[n]).collect();
        row(what, format!("{BATCH} calls"), &values, "µs per call");
    }
    Ok(format!("{}\n\n{}; medians of {}\n\n{table}", machine(), Runtime::Lmrun.version()?, plan.repetitions))
}

fn repeat<T>(plan: &Plan, mut measure: impl FnMut() -> Result<T>) -> Result<Vec<T>> {
    (0..plan.repetitions).map(|_| measure()).collect()
}

fn gigabytes_per_second(bytes: u64, time: Duration) -> f64 {
    bytes as f64 / time.as_secs_f64().max(1e-6) / 1e9
}

/// One processor copies memory that is there to memory that is there.
fn copy(mib: usize) -> f64 {
    let from = vec![1u8; mib << 20];
    let mut to = vec![2u8; mib << 20];
    let begin = Instant::now();
    to.copy_from_slice(std::hint::black_box(&from));
    std::hint::black_box(&to);
    gigabytes_per_second(from.len() as u64, begin.elapsed())
}

fn loaded(workload: &str, amount: usize) -> Result<Container> {
    let container = Container::new(&Shape {
        args: vec!["/workload".into(), workload.into(), amount.to_string()],
        ..Shape::default()
    });
    container.run().ok();
    if container.ready() { Ok(container) } else { Err(Error::other(format!("{workload} cannot run here"))) }
}

/// Dump and restore, GB/s; the peak of the restore's resident memory in MiB: all, and without what it maps of files.
fn out_and_in(mib: usize) -> Result<[f64; 4]> {
    let container = loaded("load-memory", mib)?;
    let _images = InMemory::mount(container.base.join("images"))?;
    container.checkpoint(&Checkpoint { images: "final", ..Checkpoint::default() }).ok();
    let dump = stats::dump(&container.work("final")).ok_or_else(|| Error::other("no stats-dump"))?;
    let mut restore = container.restore_command(&container.images("final"), false);
    let null = Stdio::null;
    let mut child = restore.stdin(null()).stdout(null()).stderr(null()).spawn()?;
    let (all, own) = peaks(&mut child);
    if !command::wait(&mut child, LIMIT).is_some_and(|s| s.success()) {
        return Err(Error::other(format!("{} failed", command::line(&restore))));
    }
    let back = stats::restore(&container.work("restore")).ok_or_else(|| Error::other("no stats-restore"))?;
    container.check(1);
    Ok([
        gigabytes_per_second(dump.pages_written * 4096, dump.memory),
        gigabytes_per_second(back.pages * 4096, back.took),
        all,
        own,
    ])
}

/// Watches a command to its end: the most that was resident, in MiB: all, and anonymous memory alone.
fn peaks(child: &mut std::process::Child) -> (f64, f64) {
    let pid = child.id() as i32;
    let (mut all, mut own) = (0u64, 0u64);
    while matches!(child.try_wait(), Ok(None)) {
        if let Ok(status) = proc::status(pid) {
            let kib = |name| {
                let text = status.field(name).unwrap_or_default();
                text.split_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0)
            };
            all = all.max(kib("VmHWM"));
            own = own.max(kib("RssAnon"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    (all as f64 / 1024.0, own as f64 / 1024.0)
}

/// Times to stop a process with so many threads, ms.
fn freezes(threads: usize, repetitions: usize) -> Result<Vec<f64>> {
    let container = loaded("load-threads", threads)?;
    let mut times = Vec::new();
    for n in 0..repetitions {
        let name = format!("images{n}");
        container.checkpoint(&Checkpoint { images: &name, leave_running: true, ..Checkpoint::default() }).ok();
        let stats = stats::dump(&container.work(&name)).ok_or_else(|| Error::other("no stats-dump"))?;
        times.push(stats.freezing.as_secs_f64() * 1000.0);
    }
    container.check(1);
    Ok(times)
}

const BATCH: usize = 100;

/// getppid(2) in a puppet: microseconds for each of many, one at a time and in a batch.
fn remote_calls() -> Result<[f64; 2]> {
    let mut child = Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn()?;
    // Let it get from its start to its sleep.
    std::thread::sleep(Duration::from_millis(50));
    let measured = measure_calls(child.id() as i32).map_err(Error::other);
    child.kill()?;
    child.wait()?;
    measured
}

fn measure_calls(pid: i32) -> std::result::Result<[f64; 2], Box<dyn std::error::Error + Send + Sync>> {
    let taken = proc::maps(pid)?.iter().map(|v| (v.start, v.end)).collect();
    let mut puppet = Puppet::seize(pid, Stage::find(taken))?;
    let memory = Memory::open(pid)?;
    let micros = |time: Duration| time.as_secs_f64() * 1e6 / BATCH as f64;
    let begin = Instant::now();
    for _ in 0..BATCH {
        puppet.call("getppid", libc::SYS_getppid, [])?;
    }
    let single = micros(begin.elapsed());
    let mut batch = puppet.batch();
    for _ in 0..BATCH {
        batch.call("getppid", libc::SYS_getppid, []);
    }
    let begin = Instant::now();
    puppet.run(&memory, &mut batch)?;
    Ok([single, micros(begin.elapsed())])
}
