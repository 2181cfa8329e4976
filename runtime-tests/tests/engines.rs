//! Docker, containerd and Podman drive lmrun: what a user does with a container, and checkpoints. The short form of
//! `make test-engines`. An engine that is not installed is left out, and said to be.

use runtime_tests::engines::{BUSYBOX, Engine, Engines};
use runtime_tests::needs;

/// Counts in its log, five times a second.
const COUNTER: [&str; 3] = ["sh", "-c", "i=0; while :; do i=$((i+1)); echo $i; sleep 0.2; done"];

/// Counts for as long as it has its terminal, of the size that it was given.
const ON_TERMINAL: [&str; 3] = [
    "sh",
    "-c",
    "stty rows 7 cols 77; exec 9</dev/tty; i=0; \
     while test \"$(stty size)$(stty size <&9)\" = '7 777 77'; do i=$((i+1)); echo $i; sleep 0.2; done",
];

fn with(engine: Engine, name: &str) -> Option<Engines> {
    if !needs::root() || !engine.is_installed() {
        return None;
    }
    let engines = Engines::start(name);
    engines.import_busybox(engine);
    Some(engines)
}

fn run<'a>(options: &[&'a str], id: &'a str) -> Vec<&'a str> {
    let always = ["run", "--detach", "--network", "none", "--name", id];
    always.iter().chain(options).copied().chain([BUSYBOX]).chain(COUNTER).collect()
}

/// The lines are 1, 2, 3 ...: nothing was lost, nothing was done twice.
#[track_caller]
fn goes_on(engines: &Engines, engine: Engine, id: &str, before: usize) {
    let lines = engines.more_lines(engine, id, before);
    let numbers: Vec<usize> = lines.iter().filter_map(|line| line.parse().ok()).collect();
    assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "{id}: {lines:?}");
    assert_eq!(lines.len(), numbers.len(), "{id}: {lines:?}");
}

fn daily_life(engines: &Engines, engine: Engine) {
    let do_it = |words: &[&str]| engines.ok(engine, words);
    let said = do_it(&["run", "--rm", "--network", "none", BUSYBOX, "echo", "hello"]);
    assert_eq!(said, "hello");
    let missing = engines.perform(engine.name(), &["run", "--rm", "--network", "none", BUSYBOX, "nothing"]).failed();
    assert_eq!(missing.status.and_then(|status| status.code()), Some(127), "{missing}");
    let code = engines.perform(engine.name(), &["run", "--rm", "--network", "none", BUSYBOX, "sh", "-c", "exit 7"]);
    assert_eq!(code.status.and_then(|status| status.code()), Some(7), "{code}");

    do_it(&run(&["--user", "1000", "--read-only", "--tmpfs", "/scratch", "--memory", "64m"], "life"));
    goes_on(engines, engine, "life", 1);
    do_it(&["pause", "life"]);
    do_it(&["unpause", "life"]);
    goes_on(engines, engine, "life", 3);
    do_it(&["kill", "life"]);
    do_it(&["rm", "--force", "life"]);
}

#[test]
fn docker() {
    let engine = Engine::Docker;
    let Some(engines) = with(engine, "docker") else { return };
    daily_life(&engines, engine);
    engines.ok(engine, &run(&[], "counter"));
    goes_on(&engines, engine, "counter", 2);
    engines.ok(engine, &["checkpoint", "create", "--leave-running", "counter", "first"]);
    goes_on(&engines, engine, "counter", 5);
    engines.ok(engine, &["checkpoint", "create", "counter", "second"]);
    assert_eq!(engines.ok(engine, &["inspect", "--format", "{{.State.ExitCode}}", "counter"]), "137");
    let before = engines.ok(engine, &["logs", "counter"]).lines().count();
    engines.ok(engine, &["start", "--checkpoint", "second", "counter"]);
    goes_on(&engines, engine, "counter", before);
    engines.ok(engine, &["rm", "--force", "counter"]);

    let run = ["run", "--detach", "--tty", "--interactive", "--network", "none", "--name", "shell", BUSYBOX];
    engines.ok(engine, &run.into_iter().chain(ON_TERMINAL).collect::<Vec<_>>());
    goes_on(&engines, engine, "shell", 2);
    engines.ok(engine, &["checkpoint", "create", "shell", "first"]);
    let before = engines.ok(engine, &["logs", "shell"]).lines().count();
    engines.ok(engine, &["start", "--checkpoint", "first", "shell"]);
    goes_on(&engines, engine, "shell", before);
    engines.ok(engine, &["rm", "--force", "shell"]);
}

#[test]
fn podman() {
    let engine = Engine::Podman;
    let Some(engines) = with(engine, "podman") else { return };
    daily_life(&engines, engine);
    engines.ok(engine, &run(&[], "counter"));
    goes_on(&engines, engine, "counter", 2);
    // The same directory twice: the images of the first are replaced.
    for _ in 0..2 {
        engines.ok(engine, &["container", "checkpoint", "--leave-running", "counter"]);
    }
    let archive = engines.base.join("counter.tar").display().to_string();
    let said = engines.ok(engine, &["container", "checkpoint", "--print-stats", "--export", &archive, "counter"]);
    assert!(said.contains("pages_written"), "{said}");
    let before = engines.ok(engine, &["logs", "counter"]).lines().count();
    engines.ok(engine, &["rm", "--force", "counter"]);
    engines.ok(engine, &["container", "restore", "--import", &archive]);
    goes_on(&engines, engine, "counter", before);

    // A round of pre-copy, and what was written since.
    let earlier = engines.base.join("earlier.tar").display().to_string();
    let checkpoint = |round: &str, archive: &str| {
        engines.ok(engine, &["container", "checkpoint", round, "--export", archive, "counter"]);
    };
    checkpoint("--pre-checkpoint", &earlier);
    checkpoint("--with-previous", &archive);
    let before = engines.ok(engine, &["logs", "counter"]).lines().count();
    engines.ok(engine, &["rm", "--force", "counter"]);
    engines.ok(engine, &["container", "restore", "--import-previous", &earlier, "--import", &archive]);
    goes_on(&engines, engine, "counter", before);
    engines.ok(engine, &["container", "checkpoint", "--leave-running", "--export", &archive, "counter"]);

    // By plain create and start.
    let images = engines.base.join("checkpoints/counter");
    std::fs::create_dir(&images).expect("base is writable");
    let (tar, dir) = (&archive, images.display().to_string());
    runtime_tests::command::tool(&format!("tar -C {dir} --no-same-owner --strip-components=1 -xf {tar} checkpoint"));
    engines.ok(engine, &run(&["--annotation", "dev.lmrun.restore=/var/lib/lmrun/checkpoints/counter"], "again"));
    let lines = engines.more_lines(engine, "again", 0);
    assert!(lines[0].parse::<usize>().is_ok_and(|n| n > 2), "{lines:?}");
    let elsewhere = format!("dev.lmrun.restore={}", engines.base.display());
    let refused = engines.perform("podman", &run(&["--annotation", &elsewhere], "refused")).failed();
    assert!(refused.err.contains("is not below"), "{refused}");
}

#[test]
fn containerd() {
    if !needs::root() || !Engine::Containerd.is_installed() {
        return;
    }
    let engines = Engines::start("ctr");
    let rootfs = engines.import_busybox(Engine::Docker).display().to_string();
    let lmrun = engines.base.join("bin/lmrun").display().to_string();
    let log = engines.base.join("counter.log");
    let uri = format!("file://{}", log.display());
    let ctr = |words: &[&str]| engines.perform("ctr", words).ok();
    let options = [
        "run",
        "--detach",
        "--env",
        "PATH=/bin",
        "--runc-binary",
        &lmrun,
        "--log-uri",
        &uri,
        "--rootfs",
        &rootfs,
        "counter",
    ];
    ctr(&options.into_iter().chain(COUNTER).collect::<Vec<_>>());
    let count = || std::fs::read_to_string(&log).unwrap_or_default().lines().count();
    let grows = |from: usize| {
        (0..200).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(50));
            count() > from
        })
    };
    assert!(grows(2), "the counter does not count");
    let images = engines.base.join("images").display().to_string();
    let work = engines.base.join("work").display().to_string();
    ctr(&["tasks", "checkpoint", "--image-path", &images, "--work-path", &work, "counter"]);
    assert!(grows(count()), "left running, it does not");
    for (dir, file) in [(&images, "inventory.img"), (&work, "dump.log"), (&work, "stats-dump")] {
        assert!(std::path::Path::new(dir).join(file).exists(), "no {file} in {dir}");
    }
    ctr(&["tasks", "checkpoint", "--exit", "--image-path", &images, "--work-path", &work, "counter"]);
    ctr(&["containers", "rm", "counter"]);
}
