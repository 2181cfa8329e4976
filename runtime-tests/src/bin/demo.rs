//! `make demo`: a Redis under load moves between two hosts, and its client never notices.
//!
//! The hosts are network namespaces of this machine (`runtime_tests::hosts`). A client writes over one TCP connection
//! as fast as answers come, and checks every answer, while one `lmrun migrate` moves the Redis. Exits with 0 only if the client kept its connection and no write
//! was lost or done twice.

use std::io::{IsTerminal, Result, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use runtime_tests::hosts::Hosts;
use runtime_tests::migration::Migration;
use runtime_tests::redis::Writer;
use runtime_tests::runtimes::Runtime;
use runtime_tests::telling;

fn main() -> ExitCode {
    let mib = std::env::args().nth(1).map_or(Some(256), |text| text.parse().ok());
    let Some(mib) = mib else {
        eprintln!("usage: demo [MIB]");
        return ExitCode::from(2);
    };
    match demo(mib) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("demo: {e}");
            ExitCode::FAILURE
        }
    }
}

fn demo(mib: usize) -> Result<bool> {
    println!("two hosts, a client and a switch: network namespaces of this machine");
    let hosts = Hosts::new();
    let migration = Migration::start(&hosts, &Runtime::Lmrun)?;
    let mut loader = migration.connect()?;
    let bar = Bar::new("loading Redis", mib as u64);
    loader.load(mib, |done| bar.show(done as u64))?;
    bar.end();
    println!("Redis holds {mib} MiB at the source; a client does SET and INCR on one connection");
    let writer = Writer::start(migration.connect()?);
    std::thread::sleep(Duration::from_secs(1));

    println!("\nlmrun migrate ... ssh://destination\n");
    let moved = Instant::now();
    for line in migration.migrate(&[])? {
        telling::tell(&line)?;
    }

    // The client goes on for a while at the new place.
    std::thread::sleep(Duration::from_secs(1));
    let record = writer.finish();
    println!("the client: {} SETs and INCRs, each answer checked", record.acknowledged);
    println!("longest gap between two answers: {} ms", record.longest_gap(moved).as_millis());
    if let Some(failure) = &record.failure {
        println!("connection lost: {failure}");
        return Ok(false);
    }
    let (lost, doubled, wrong) = record.audit(&mut migration.connect()?)?;
    println!("\nconnection kept, {} lost, {doubled} doubled", lost + wrong);
    Ok((lost, doubled, wrong) == (0, 0, 0))
}

/// A bar on a terminal; elsewhere nothing.
struct Bar {
    label: String,
    /// MiB, or 0 where nobody knows.
    whole: u64,
    terminal: bool,
}

impl Bar {
    fn new(label: &str, whole: u64) -> Bar {
        Bar { label: label.to_owned(), whole, terminal: std::io::stdout().is_terminal() }
    }

    fn show(&self, done: u64) {
        const WIDTH: u64 = 40;
        if !self.terminal {
            return;
        }
        match (done * WIDTH).checked_div(self.whole) {
            None => print!("\r{:<22}{done} MiB", self.label),
            Some(filled) => {
                let filled = filled.min(WIDTH) as usize;
                let bar = format!("{}{}", "#".repeat(filled), ".".repeat(WIDTH as usize - filled));
                print!("\r{:<22}{bar} {done} of {} MiB", self.label, self.whole);
            }
        }
        let _ = std::io::stdout().flush();
    }

    fn end(&self) {
        if self.terminal {
            print!("\r\x1b[K");
        }
    }
}
