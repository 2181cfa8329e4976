//! `make demo-docker`: a Redis in a container of Docker moves to another host's Docker by one command, and its client never
//! notices.
//!
//! The hosts are namespaces of this machine, each with a dockerd and a containerd of its own (`runtime_tests::engines::Pair`). They share no
//! disk, and the second one does not have the image. Exits with 0 only if the client kept its connection and no write was lost or done twice.

use std::io::{Error, Result};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use runtime_tests::engines::{Engine, Engines, Pair};
use runtime_tests::redis::Writer;
use runtime_tests::telling;

fn main() -> ExitCode {
    let mib = std::env::args().nth(1).map_or(Some(256), |text| text.parse().ok());
    let Some(mib) = mib else {
        eprintln!("usage: demo_docker [MIB]");
        return ExitCode::from(2);
    };
    if !Pair::is_possible(Engine::Docker) {
        return ExitCode::FAILURE;
    }
    match demo(mib) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("demo_docker: {e}");
            ExitCode::FAILURE
        }
    }
}

fn demo(mib: usize) -> Result<bool> {
    println!("two hosts with a Docker each, a client and a switch: namespaces of this machine");
    let pair = Pair::start("demo");
    pair.run_redis(mib, &["--label", "app=web", "--restart", "always"]);
    println!("a$ docker ps\n{}\n", ps(&pair.a));
    println!("Redis holds {mib} MiB at a; a client does SET and INCR on one connection");
    let writer = Writer::start(pair.connect());
    std::thread::sleep(Duration::from_secs(1));

    println!("\na$ lmrun migrate docker://web ssh://b\n");
    let moved = Instant::now();
    let done = pair.migrate(&pair.a, "docker://web", "ssh://b", &["--json"]);
    for line in done.out.lines() {
        telling::tell(line)?;
    }
    if !done.succeeded() {
        return Err(Error::other(done.to_string()));
    }

    // The client goes on for a while at the new place.
    std::thread::sleep(Duration::from_secs(1));
    let record = writer.finish();
    println!("\na$ docker ps --all\n{}", ps(&pair.a));
    println!("b$ docker ps --all\n{}\n", ps(&pair.b));
    println!("the client: {} SETs and INCRs, each answer checked", record.acknowledged);
    println!("longest gap between two answers: {} ms", record.longest_gap(moved).as_millis());
    if let Some(failure) = &record.failure {
        println!("connection lost: {failure}");
        return Ok(false);
    }
    let (lost, doubled, wrong) = record.audit(&mut pair.connect())?;
    println!("\nconnection kept, {} lost, {doubled} doubled", lost + wrong);
    Ok((lost, doubled, wrong) == (0, 0, 0))
}

fn ps(host: &Engines) -> String {
    host.ok(Engine::Docker, &["ps", "--all", "--format", "table {{.ID}}  {{.Image}}  {{.Status}}  {{.Names}}"])
}
