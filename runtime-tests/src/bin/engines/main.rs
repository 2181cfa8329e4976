//! The long form of `tests/engines.rs`: real workloads, through all that an engine does with a container, as one table.
//!
//! `engines [WORD...]`: workloads, engines (docker, ctr, podman) and `installed` or `newer`; takes those alone. Ends
//! with 1 when a cell failed; what failed is printed below the table.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::ExitCode;
use std::time::Instant;

use runtime_tests::engines::{Engine, Engines, Programs};
use runtime_tests::needs;

use subject::{Life, Outcome, Subject, Verdict};
use workloads::{FILES, WORKLOADS};

mod subject;
mod workloads;

type Operation = (&'static str, fn(&Subject<'_>) -> Outcome);

/// In this order. What runs a container begins a life, and the operations below it are done to that container.
const OPERATIONS: [Operation; 30] = [
    ("run, bridge network", |s| s.run(Life::Bridged)),
    ("reachable", |s| s.bridged()),
    ("exec", |s| s.exec()),
    ("exec -it", |s| s.exec_it()),
    ("logs", |s| s.logs()),
    ("stats", |s| s.stats()),
    ("top", |s| s.top()),
    ("pause, unpause", |s| s.paused()),
    ("update", |s| s.updated()),
    ("volumes", |s| s.volumes()),
    ("checkpoint, left running", |s| s.left_running()),
    ("restore", |s| s.restored()),
    ("reachable again", |s| s.bridged()),
    ("volumes again", |s| s.volumes()),
    ("restore with a client", |s| s.with_client()),
    ("rounds of pre-copy", |s| s.with_rounds()),
    ("kill", |s| s.killed()),
    ("run -it", |s| s.run_it()),
    ("run --init --user --read-only -it", |s| s.run(Life::Bare)),
    ("they hold", |s| s.bare()),
    ("restore", |s| s.restored()),
    ("they hold again", |s| s.bare()),
    ("stop", |s| s.stopped()),
    ("run, host network", |s| s.run(Life::Host).and_then(|_| s.host_network())),
    ("restore", |s| s.restored()),
    ("restore by annotation", |s| s.annotated()),
    ("run --restart --health-cmd", |s| s.run(Life::Watched)),
    ("health check", |s| s.healthy()),
    ("restart policy", |s| s.restarted()),
    ("out of memory", |s| s.out_of_memory()),
];

/// The letter that stands for an engine in the table: small for this machine's, large for the newer one's.
fn letter(engine: Engine, programs: &Programs) -> char {
    let small = match engine {
        Engine::Docker => 'd',
        Engine::Containerd => 'c',
        Engine::Podman => 'p',
    };
    if *programs == Programs::Installed { small } else { small.to_ascii_uppercase() }
}

/// What was found, by operation and workload: one letter for each engine.
#[derive(Default)]
struct Table {
    cells: BTreeMap<(usize, &'static str), String>,
    legend: Vec<String>,
    failures: Vec<String>,
}

impl Table {
    fn print(&self) {
        println!(
            "\nA letter: that engine does it. `-`: it has no such operation. `!`: it failed.\n{}",
            self.legend.join(", ")
        );
        let names: Vec<&str> =
            WORKLOADS.iter().map(|w| w.name).filter(|name| self.cells.keys().any(|(_, n)| n == name)).collect();
        println!("\n| {:34} |{}", "operation", names.iter().map(|name| format!(" {name:8} |")).collect::<String>());
        println!("|{}|{}", "-".repeat(36), "----------|".repeat(names.len()));
        for (row, (operation, _)) in OPERATIONS.iter().enumerate() {
            let cell = |name: &&'static str| self.cells.get(&(row, *name)).map_or("", String::as_str);
            let cells: String = names.iter().map(|name| format!(" {:8} |", cell(name))).collect();
            println!("| {operation:34} |{cells}");
        }
        println!();
        self.failures.iter().for_each(|failure| println!("{failure}\n"));
    }

    fn try_all(&mut self, subject: &Subject<'_>, letter: char, title: &str) {
        print!("{title}:");
        let before = self.failures.len();
        for (row, (name, operation)) in OPERATIONS.iter().enumerate() {
            let begin = Instant::now();
            let outcome = operation(subject);
            subject.tidy();
            let took = begin.elapsed().as_millis();
            let mark = match outcome {
                Ok(Verdict::Passed) => {
                    print!(" {name} {took} ms,");
                    letter
                }
                Ok(Verdict::Absent) => '-',
                Err(why) => {
                    print!(" {name} FAILED,");
                    self.failures.push(format!("{title}, {name}: {why}"));
                    '!'
                }
            };
            let _ = std::io::stdout().flush();
            self.cells.entry((row, subject.workload.name)).or_default().push(mark);
        }
        println!();
        self.failures[before..].iter().for_each(|failure| println!("{failure}"));
        subject.remove();
    }
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let wanted = |name: &str, among: &[&str]| {
        !words.iter().any(|word| among.contains(&word.as_str())) || words.iter().any(|word| word == name)
    };
    let mut table = Table::default();
    for (place, programs) in [("installed", Programs::Installed), ("newer", Programs::newer())] {
        let engines: Vec<Engine> = Engine::ALL
            .into_iter()
            .filter(|engine| wanted(engine.name(), &Engine::ALL.map(Engine::name)))
            .filter(|engine| wanted(place, &["installed", "newer"]) && programs.have(*engine))
            .collect();
        if engines.is_empty() {
            continue;
        }
        let daemons = Engines::start_from(&format!("engines-{place}"), programs.clone());
        for engine in engines {
            let name = format!("{} {}", engine.name(), daemons.version(engine));
            let letter = letter(engine, &programs);
            table.legend.push(format!("{letter} {name}"));
            daemons.import_busybox(engine);
            daemons.import_host(engine, &FILES);
            for workload in
                WORKLOADS.iter().filter(|w| wanted(w.name, &WORKLOADS.iter().map(|w| w.name).collect::<Vec<_>>()))
            {
                if needs::on_path(workload.needs).is_none() {
                    println!("SKIP {}: no {}", workload.name, workload.needs);
                    continue;
                }
                table.try_all(
                    &Subject::new(&daemons, engine, workload),
                    letter,
                    &format!("{} in {name}", workload.name),
                );
            }
        }
    }
    table.print();
    if table.failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
