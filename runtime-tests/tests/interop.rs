//! CRIU 4.x at the other end: its page server receives from lmrun, and lmrun's from `criu dump`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use runtime_tests::container::{Checkpoint, Container, complete, free_port};
use runtime_tests::{command, needs};

const LIMIT: Duration = Duration::from_secs(60);

/// CRIU, or a skip.
fn criu() -> Option<PathBuf> {
    if !needs::root() {
        return None;
    }
    let found = needs::on_path("criu").filter(|criu| {
        let said = command::run(Command::new(criu).arg("--version"), LIMIT).out;
        said.lines().any(|line| line.strip_prefix("Version:").is_some_and(|v| v.trim().starts_with("4.")))
    });
    if found.is_none() {
        needs::skip("no CRIU 4.x on the PATH");
    }
    found
}

/// Rounds of pre-copy and the rest go to CRIU's page servers, and the result restores.
fn received_by_criu(workload: &str, rounds: &[&'static str]) {
    let Some(criu) = criu() else { return };
    let c = Container::of_workload(workload);
    c.run().ok();
    if !c.ready() {
        return;
    }
    let mut parent = None;
    for (n, images) in rounds.iter().enumerate() {
        let (port, dir) = (free_port(), c.base.join("server").join(images));
        fs::create_dir_all(&dir).expect("base is writable");
        let mut serve = Command::new(&criu);
        serve.args(["page-server", "--address", "127.0.0.1", "--port", &port.to_string(), "--images-dir"]).arg(&dir);
        if let Some(parent) = parent {
            serve.arg("--prev-images-dir").arg(format!("../{parent}"));
        }
        let server = c.serve(images, serve, port, dir);
        let pre_dump = n + 1 < rounds.len();
        let to_criu = Checkpoint { images, pre_dump, parent, page_server: Some(port), ..Checkpoint::default() };
        c.checkpoint(&to_criu).ok();
        let received = server.done();
        complete(&c.images(images), &received);
        parent = Some(images);
        if !pre_dump {
            c.restore(&received, false).ok();
        }
    }
    c.check(1);
}

#[test]
fn criu_receives_a_checkpoint() {
    received_by_criu("memory-large", &["final"]);
}

#[test]
fn criu_receives_rounds_of_pre_copy() {
    received_by_criu("memory-private", &["pre1", "pre2", "final"]);
}

/// A process of the host that writes a digest of what it holds to `answer` when it is asked.
fn holder(answer: &Path) -> Child {
    let script = r#"x=$(head -c 3000000 /dev/urandom | base64)
        trap 'echo "$x" | md5sum > "$0.new"; mv "$0.new" "$0"' USR1
        while :; do sleep 0.05; done"#;
    let null = Stdio::null;
    let mut shell = Command::new("setsid");
    shell.args(["sh", "-c", script]).arg(answer);
    shell.current_dir("/").stdin(null()).stdout(null()).stderr(null());
    shell.spawn().expect("setsid is installed")
}

fn ask(pid: i32, answer: &Path) -> String {
    let _ = fs::remove_file(answer);
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(10) {
        // Until it has its trap, the signal would end it.
        let handled = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let caught = handled.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap_or_default();
        if u64::from_str_radix(caught.trim(), 16).is_ok_and(|mask| mask & (1 << (libc::SIGUSR1 - 1)) != 0) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGUSR1);
        }
        std::thread::sleep(Duration::from_millis(200));
        if let Ok(text) = fs::read_to_string(answer) {
            return text;
        }
    }
    panic!("process {pid} does not answer");
}

#[test]
fn lmrun_receives_from_criu() {
    let Some(criu) = criu() else { return };
    // Of the container only its directories are used.
    let c = Container::of_workload("tree");
    let answer = c.base.join("answer");
    let mut holder = holder(&answer);
    let pid = holder.id() as i32;
    let before = ask(pid, &answer);
    let local = c.images("final");
    fs::create_dir_all(&local).expect("base is writable");
    let server = c.page_server("final", None);
    let run = |args: &[&str]| command::run(Command::new(&criu).args(args), LIMIT).ok();
    let (tree, port) = (pid.to_string(), server.port.to_string());
    let dir = |path: &Path| path.to_string_lossy().into_owned();
    run(&["dump", "-t", &tree, "-D", &dir(&local), "--page-server", "--address", "127.0.0.1", "--port", &port]);
    let received = server.done();
    complete(&local, &received);
    // The pids of its group are needed again.
    holder.wait().expect("it has ended");
    let begin = Instant::now();
    while kill(Pid::from_raw(-pid), None).is_ok() && begin.elapsed() < Duration::from_secs(5) {
        std::thread::sleep(Duration::from_millis(5));
    }
    run(&["restore", "-d", "-D", &dir(&received)]);
    assert_eq!(ask(pid, &answer), before);
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
}
