//! The ecosystem's own tools read lmrun's images: `crit` (python3-pycriu) every file, `checkpointctl inspect` the
//! processes, files and sockets. They are found on the PATH or where `tools.sh` puts them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use runtime_tests::container::{Checkpoint, Container};
use runtime_tests::{command, needs};

/// A tool that Debian 12 lacks, or a skip.
fn tool(name: &str) -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
    let cached = cache.map(|dir| dir.join("lmrun-tools/bin").join(name)).filter(|path| path.is_file());
    let found = needs::on_path(name).or(cached);
    if found.is_none() {
        needs::skip(&format!("{name} is not installed (runtime-tests/tools.sh test)"));
    }
    found
}

fn run(tool: &Path, args: &[&str]) -> command::Done {
    command::run(Command::new(tool).args(args), Duration::from_secs(60)).ok()
}

/// A checkpoint of `workload`, after a round of pre-copy; the container is left running.
fn checkpointed(workload: &str) -> Option<Container> {
    if !needs::root() {
        return None;
    }
    let c = Container::of_workload(workload);
    c.run().ok();
    if !c.ready() {
        return None;
    }
    let round = Checkpoint { images: "pre", pre_dump: true, ..Checkpoint::default() };
    c.checkpoint(&round).ok();
    let last = Checkpoint {
        images: "final",
        parent: Some("pre"),
        leave_running: true,
        tcp_established: true,
        ..Checkpoint::default()
    };
    c.checkpoint(&last).ok();
    Some(c)
}

/// Every image but the pages themselves, which are raw.
fn decodes(workload: &str) {
    let Some(crit) = tool("crit") else { return };
    let Some(c) = checkpointed(workload) else {
        return;
    };
    let mut decoded = 0;
    for dir in [c.images("pre"), c.images("final"), c.work("final")] {
        for entry in fs::read_dir(&dir).expect("a checkpoint leaves its directory").flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let image = name.ends_with(".img") || name.starts_with("stats-");
            if !image || name.starts_with("pages-") {
                continue;
            }
            let done = run(&crit, &["decode", "-i", &entry.path().to_string_lossy()]);
            let json: serde_json::Value = serde_json::from_str(&done.out).expect("crit writes JSON");
            assert!(json["magic"].is_string() && json["entries"].is_array(), "{name}: {}", done.out);
            decoded += 1;
        }
    }
    assert!(decoded > 10, "{decoded} images were decoded");
    c.check(1);
}

#[test]
fn crit_decodes_connections() {
    decodes("tcp-loopback");
}

#[test]
fn crit_decodes_event_sources() {
    decodes("timerfd");
}

#[test]
fn crit_decodes_pipes_of_children() {
    decodes("pipe-between");
}

#[test]
fn crit_decodes_credentials_and_filters() {
    decodes("seccomp-stacked");
}

#[test]
fn crit_decodes_shared_memory() {
    decodes("memory-shared-parts");
}

/// checkpointctl takes a tar archive with the images in `checkpoint/`, and what the engine knows beside them.
#[test]
fn checkpointctl_inspects() {
    let Some(checkpointctl) = tool("checkpointctl") else {
        return;
    };
    let Some(c) = checkpointed("tcp-loopback") else {
        return;
    };
    let archive = c.base.join("archive");
    fs::create_dir(&archive).expect("base is writable");
    let config = serde_json::json!({
        "id": c.id, "name": "scenario", "rootfsImageName": "none", "runtime": "lmrun",
        "createdTime": "2026-01-01T00:00:00Z", "checkpointedTime": "2026-01-01T00:00:00Z",
    });
    fs::write(archive.join("config.dump"), config.to_string()).expect("base is writable");
    fs::copy(c.bundle().join("config.json"), archive.join("spec.dump")).expect("base is writable");
    fs::copy(c.work("final").join("stats-dump"), archive.join("stats-dump")).expect("there are stats");
    let images = archive.join("checkpoint");
    run(Path::new("cp"), &["-a", &c.images("final").to_string_lossy(), &images.to_string_lossy()]);
    let tar = c.base.join("checkpoint.tar").to_string_lossy().into_owned();
    run(Path::new("tar"), &["-C", &archive.to_string_lossy(), "-cf", &tar, "."]);
    let said = run(&checkpointctl, &["inspect", &tar, "--ps-tree", "--files", "--sockets", "--stats"]).out;
    for word in ["Process tree", "[1]  workload", "/dev/null", "TCP (ESTABLISHED)", "127.0.0.1:", "Pages written"] {
        assert!(said.contains(word), "checkpointctl does not say {word:?}:\n{said}");
    }
}
