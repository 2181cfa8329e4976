//! The command line as engines use it, with what they read back.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};
use std::time::Duration;

use lmrun::sys::fdpass;
use runtime_tests::command::{self, Done};
use runtime_tests::container::Container;
use runtime_tests::shell::{in_version2_view, make, shell, state, status, wait_status};
use runtime_tests::{host, needs};
use serde_json::{Value, json};

fn lmrun(words: &str) -> Done {
    command::run(Command::new(needs::built("lmrun")).args(words.split_whitespace()), Duration::from_secs(20))
}

fn running() -> Option<Container> {
    let c = shell("sleep 1000", |_| ())?;
    make(&c, &["run", "-d"]).ok();
    Some(c)
}

#[test]
fn what_engines_ask_before_they_ask_for_containers() {
    let version = lmrun("--version").ok().out;
    let lines: Vec<_> = version.lines().collect();
    assert!(lines.len() == 3 && lines[0].starts_with("lmrun version "), "{version}");
    assert!(lines[1].starts_with("commit: ") && lines[2].starts_with("spec: 1."), "{version}");
    lmrun("checkpoint --help").ok();
    lmrun("restore --help").ok();
    let done = lmrun("restore --lsm-mount-context").failed();
    assert!(done.err.contains("flag needs an argument"), "{done}");
    let features: Value = serde_json::from_str(&lmrun("features").ok().out).unwrap();
    assert_eq!(features["linux"]["seccomp"]["enabled"], json!(true));
    assert_eq!(features["annotations"]["org.opencontainers.runc.checkpoint.enabled"], json!("true"));
}

#[test]
fn mistakes_are_named_as_runc_names_them() {
    let done = lmrun("list --bogus").failed();
    assert!(done.err.contains("flag provided but not defined: -bogus"), "{done}");
    assert_eq!(lmrun("bogus").status.unwrap().code(), Some(3));
    let done = lmrun("--root /nonexistent/lmrun state nobody").failed();
    assert!(done.err.contains("container does not exist"), "{done}");
    lmrun("--root /nonexistent/lmrun delete --force nobody").ok();
    assert_eq!(lmrun("--root /nonexistent/lmrun list -q").ok().out, "");
}

#[test]
fn global_options_of_runcs_are_taken() {
    let Some(c) = running() else { return };
    let log = c.base.join("log.json");
    let mut command = c.lmrun();
    command.args(["--debug", "--criu", "/usr/sbin/criu", "--systemd-cgroup", "--rootless=auto", "--log"]).arg(&log);
    c.perform(command.args(["--log-format", "json", "state", &c.id])).ok();
    let failed =
        c.perform(c.lmrun().arg("--log").arg(&log).args(["--log-format", "json", "kill", &c.id, "BOGUS"])).failed();
    assert!(failed.err.contains("unknown signal \"BOGUS\""), "{failed}");
    let log = fs::read_to_string(log).unwrap();
    let last: Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();
    assert!(last["level"] == "error" && last["msg"].as_str().unwrap().contains("unknown signal"), "{log}");
}

#[test]
fn signals_go_by_number_and_name_to_one_or_all() {
    for words in [&["9"][..], &["KILL"], &["SIGKILL"], &["--all", "KILL"], &["-a", "9"]] {
        let Some(c) = running() else { return };
        let (options, signal) = words.split_at(words.len() - 1);
        c.perform(c.lmrun().arg("kill").args(options).arg(&c.id).args(signal)).ok();
        wait_status(&c, "stopped");
    }
}

#[test]
fn a_container_can_be_kept() {
    let Some(c) = shell("exit 3", |_| ()) else { return };
    let done = make(&c, &["run", "--keep", "--no-subreaper"]);
    assert_eq!(done.status.unwrap().code(), Some(3));
    assert_eq!(status(&c), "stopped");
    c.simple("delete").ok();
}

#[test]
fn descriptors_go_both_ways() {
    let Some(c) = shell("cat <&3; ls /proc/$$/fd; sleep 1000", |_| ()) else { return };
    let refused = make(&c, &["create", "--preserve-fds", "1"]).failed();
    assert!(refused.err.contains("preserved-fd 3"), "{refused}");
    let socket = c.base.join("pidfd.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let line = format!(
        "exec {} --root {} run -d --no-new-keyring --preserve-fds 1 --pidfd-socket {} --bundle {} {} 3</proc/sys/kernel/ostype 4</etc >{}",
        needs::built("lmrun").display(),
        c.root.display(),
        socket.display(),
        c.bundle().display(),
        c.id,
        c.base.join("said").display(),
    );
    c.perform(Command::new("sh").args(["-c", &line])).ok();
    let (stream, _) = listener.accept().unwrap();
    let mut word = [0; 64];
    let (n, fds) = fdpass::receive(stream.as_fd(), &mut word).unwrap();
    assert_eq!(&word[..n], b"standard");
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", fds[0].as_raw_fd())).unwrap();
    let pid = format!("Pid:\t{}", state(&c)["pid"]);
    assert!(info.lines().any(|line| line == pid), "{info}");
    let begin = std::time::Instant::now();
    let said = || fs::read_to_string(c.base.join("said")).unwrap();
    while said().lines().count() < 5 {
        assert!(begin.elapsed() < Duration::from_secs(20), "{}", said());
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(said() == "Linux\n0\n1\n2\n3\n", "{}", said());
}

/// The first line of a file in the container's cgroups.
fn limit(c: &Container, file: &str) -> String {
    let dirs = host::cgroups(&c.id);
    let text = dirs.iter().find_map(|dir| fs::read_to_string(dir.join(file)).ok());
    text.unwrap_or_default().lines().next().unwrap_or_default().to_owned()
}

/// `lmrun update` with a document on its standard input.
fn update_from_stdin(c: &Container, resources: &str) -> bool {
    let mut child = c.lmrun().args(["update", "--resources", "-", &c.id]).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(resources.as_bytes()).unwrap();
    command::wait(&mut child, Duration::from_secs(20)).is_some_and(|status| status.success())
}

#[test]
fn limits_change_while_the_container_runs() {
    let Some(c) = running() else { return };
    let version1 = !limit(&c, "memory.limit_in_bytes").is_empty();
    let file = |one: &'static str, two: &'static str| if version1 { one } else { two };
    assert!(update_from_stdin(
        &c,
        r#"{"memory":{"limit":134217728,"reservation":0,"swap":268435456,"kernel":0},
        "cpu":{"shares":512,"quota":0,"period":0},"blockIO":{"weight":0}}"#
    ));
    assert_eq!(limit(&c, file("memory.limit_in_bytes", "memory.max")), "134217728");
    assert_eq!(limit(&c, file("cpu.shares", "cpu.weight")), file("512", "59"));
    // Zeros leave it all as it is.
    assert!(update_from_stdin(
        &c,
        r#"{"memory":{"limit":0,"swap":0},"cpu":{"shares":0,"quota":0,"period":0},"pids":{"limit":0}}"#
    ));
    assert_eq!(limit(&c, file("memory.limit_in_bytes", "memory.max")), "134217728");
    let words =
        "update --cpu-period 50000 --cpu-quota 25000 --pids-limit 77 --cpuset-cpus 0 --memory 64m --memory-swap -1";
    c.perform(c.lmrun().args(words.split(' ')).arg(&c.id)).ok();
    assert_eq!(limit(&c, file("memory.limit_in_bytes", "memory.max")), "67108864");
    assert_eq!(limit(&c, "pids.max"), "77");
    assert_eq!(limit(&c, "cpuset.cpus"), "0");
    assert_eq!(limit(&c, file("cpu.cfs_quota_us", "cpu.max")), file("25000", "25000 50000"));
    let resources = c.base.join("resources.json");
    fs::write(&resources, r#"{"pids":{"limit":-1},"memory":{"limit":33554432}}"#).unwrap();
    c.perform(c.lmrun().args(["update", &format!("--resources={}", resources.display()), &c.id])).ok();
    assert_eq!(limit(&c, "pids.max"), "max");
    // What the kernel refuses changes nothing.
    let words = "update --pids-limit 5 --memory 128m --cpuset-cpus 4000";
    c.perform(c.lmrun().args(words.split(' ')).arg(&c.id)).failed();
    assert_eq!(limit(&c, file("memory.limit_in_bytes", "memory.max")), "33554432");
    let wrong = c.perform(c.lmrun().args(["update", "--memory", "abc", &c.id])).failed();
    assert!(wrong.err.contains("invalid value for memory: invalid size: 'abc'"), "{wrong}");
    c.perform(c.lmrun().args(["kill", &c.id, "9"])).ok();
    wait_status(&c, "stopped");
    let stopped = c.perform(c.lmrun().args(["update", "--pids-limit", "7", &c.id])).failed();
    assert!(stopped.err.contains("container not running"), "{stopped}");
}

#[test]
fn a_limit_without_a_controller_is_refused_by_name() {
    let Some(mut c) = shell("sleep 1000", |_| ()) else { return };
    let controllers = fs::read_to_string("/sys/fs/cgroup/unified/cgroup.controllers").unwrap_or_default();
    in_version2_view(&mut c);
    make(&c, &["run", "-d"]).ok();
    let done = c.perform(c.lmrun().args(["update", "--pids-limit", "7", &c.id]));
    let hybrid = File::open("/sys/fs/cgroup/unified").is_ok() && !controllers.contains("pids");
    assert!(!hybrid || done.err.contains("pids.max"), "{done}");
}

#[test]
fn processes_are_listed_for_engines_and_for_people() {
    let Some(c) = running() else { return };
    c.perform(c.lmrun().args(["exec", "-d", &c.id, "sleep", "77"])).ok();
    let ps = |words: &[&str]| c.perform(c.lmrun().arg("ps").args(words)).ok().out;
    let pids: Vec<i32> = serde_json::from_str(&ps(&["--format", "json", &c.id])).unwrap();
    assert_eq!(pids, host::processes(&c.id));
    assert_eq!(pids.len(), 2);
    let table = ps(&[&c.id]);
    let rows: Vec<Vec<_>> = table.lines().map(|row| row.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"]);
    assert_eq!((rows[1][0], rows[1][1]), ("root", pids[0].to_string().as_str()));
    assert!(table.contains("sleep 77"), "{table}");
    assert_eq!(ps(&[&c.id, "-o", "comm"]), "COMMAND\nsleep\nsleep\n");
    c.perform(c.lmrun().args(["ps", &c.id, "--frobnicate"])).failed();
    c.perform(c.lmrun().args(["kill", &c.id, "KILL"])).ok();
    wait_status(&c, "stopped");
    assert_eq!(ps(&["-f", "json", &c.id]), "[]\n");
}

#[test]
fn events_tell_what_is_used_and_when_memory_runs_out() {
    let Some(c) = running() else { return };
    let once = c.perform(c.lmrun().args(["events", "--stats", &c.id])).ok().out;
    let event: Value = serde_json::from_str(&once).unwrap();
    assert_eq!((&event["type"], &event["id"]), (&json!("stats"), &json!(c.id)));
    for member in ["/cpu/usage/total", "/memory/usage/usage", "/memory/usage/limit", "/pids/current"] {
        assert!(event["data"].pointer(member).and_then(Value::as_u64).is_some_and(|n| n > 0), "{member}: {once}");
    }
    let (told, out) = (c.base.join("events"), File::create(c.base.join("events")).unwrap());
    let mut watching = c.lmrun().args(["events", "--interval", "100ms", &c.id]).stdout(out).spawn().unwrap();
    let tells = |kind: &str| {
        let begin = std::time::Instant::now();
        let kind = format!("\"type\":\"{kind}\"");
        while !fs::read_to_string(&told).unwrap().contains(&kind) {
            assert!(begin.elapsed() < Duration::from_secs(20), "no {kind}");
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    tells("stats");
    c.perform(c.lmrun().args(["update", "--memory", "24m", "--memory-swap", "24m", &c.id])).ok();
    c.perform(c.lmrun().args(["exec", &c.id, "dd", "if=/dev/zero", "of=/dev/null", "bs=200M", "count=1"])).failed();
    tells("oom");
    c.perform(c.lmrun().args(["kill", &c.id, "KILL"])).ok();
    let end = command::wait(&mut watching, Duration::from_secs(20));
    assert!(end.is_some_and(|status| status.success()), "it goes on without a container: {end:?}");
    c.perform(c.lmrun().args(["events", "--stats", &c.id])).failed();
}

/// runc's parser is not lmrun's: what it takes besides.
#[test]
fn options_may_be_written_as_runcs_parser_takes_them() {
    let Some(c) = shell("sleep 1000", |_| ()) else { return };
    let mut command = c.lmrun();
    command.args(["run", "-detach=true", "--keep=false", "-bundle"]).arg(c.bundle());
    c.perform(command.arg(&c.id)).ok();
    assert_eq!(status(&c), "running");
    c.perform(c.lmrun().args(["kill", "--all=false", &c.id, "KILL"])).ok();
    wait_status(&c, "stopped");
    c.perform(c.lmrun().args(["delete", "-force=1", &c.id])).ok();
    for words in ["-v", "--version", "-version"] {
        assert!(lmrun(words).ok().out.starts_with("lmrun version "), "{words}");
    }
    for words in ["help", "help run", "-h", "run -h", "run --help"] {
        assert!(lmrun(words).ok().out.contains("Usage:"), "{words}");
    }
    assert_eq!(lmrun("run --detach=perhaps x").status.unwrap().code(), Some(1));
    assert_eq!(lmrun("state").status.unwrap().code(), Some(1));
}

/// Every flag of every command of runc 1.3 is known; what they do is in the other scenarios.
#[test]
fn every_flag_of_runcs_is_known() {
    let create = "--bundle --console-socket --pid-file --pidfd-socket --no-pivot --no-new-keyring --preserve-fds";
    let criu = "--image-path --work-path --tcp-established --ext-unix-sk --shell-job --file-locks --manage-cgroups-mode --empty-ns \
        --auto-dedup --lazy-pages";
    for (command, flags) in [
        ("checkpoint", format!("{criu} --parent-path --leave-running --page-server --pre-dump --status-fd --link-remap --tcp-skip-in-flight")),
        ("create", create.to_owned()),
        ("delete", "--force".into()),
        ("events", "--stats --interval".into()),
        (
            "exec",
            "--console-socket --pidfd-socket --cwd --env --tty --user --additional-gids --process --detach --pid-file --process-label \
             --apparmor --no-new-privs --cap --preserve-fds --cgroup --ignore-paused"
                .into(),
        ),
        ("kill", "--all".into()),
        ("list", "--format --quiet".into()),
        ("ps", "--format".into()),
        (
            "restore",
            format!(
                "{criu} --bundle --console-socket --detach --pid-file --no-subreaper --no-pivot --lsm-profile --lsm-mount-context"
            ),
        ),
        ("run", format!("{create} --detach --keep --no-subreaper")),
        ("spec", "--bundle --rootless".into()),
        (
            "update",
            "--resources --blkio-weight --cpu-period --cpu-quota --cpu-burst --cpu-rt-period --cpu-rt-runtime --cpu-share --cpuset-cpus \
             --cpuset-mems --memory --memory-reservation --memory-swap --pids-limit --cpu-idle --l3-cache-schema --mem-bw-schema \
             --kernel-memory --kernel-memory-tcp"
                .into(),
        ),
    ] {
        for flag in flags.split_whitespace() {
            // What is not known is said before anything else is missing.
            let done = lmrun(&format!("{command} {flag}"));
            assert!(!done.err.contains("not defined"), "{command} {flag}: {done}");
            let bogus = lmrun(&format!("{command} {flag}-bogus"));
            assert!(bogus.err.contains("not defined"), "{command} {flag}: {bogus}");
        }
    }
}

/// Docker and Podman make exit codes 126 and 127 of these words.
#[test]
fn what_cannot_be_executed_is_said_in_the_words_that_engines_look_for() {
    for (program, words) in [
        ("nothing", "executable file not found in $PATH"),
        ("/nothing", "no such file or directory"),
        ("/plain", "permission denied"),
        ("/tmp", "is a directory"),
    ] {
        let Some(c) = runtime_tests::shell::container(&[program], |config| {
            let rootfs = std::path::Path::new(config["root"]["path"].as_str().unwrap());
            fs::write(rootfs.join("plain"), "").unwrap();
        }) else {
            return;
        };
        let log = c.base.join("log.json");
        let mut command = c.lmrun();
        command.arg("--log").arg(&log).args(["--log-format", "json", "create", "--bundle"]).arg(c.bundle());
        let done = c.perform(command.arg(&c.id)).failed();
        assert_eq!(done.status.unwrap().code(), Some(1));
        let first = done.err.lines().next().unwrap();
        assert!(first.contains("exec: ") && first.contains(words), "{done}");
        let log = fs::read_to_string(log).unwrap();
        let last: Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();
        let members: Vec<_> = last.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(members, ["level", "msg", "time"], "{log}");
        assert!(last["level"] == "error" && last["msg"].as_str().unwrap().contains(words), "{log}");
    }
}

#[test]
fn lists_have_runcs_shapes() {
    let Some(c) = shell("sleep 1000", |config| config["annotations"] = json!({ "a": "b" })) else { return };
    make(&c, &["create"]).ok();
    let list = |words: &[&str]| c.perform(c.lmrun().arg("list").args(words)).ok().out;
    let all: Value = serde_json::from_str(&list(&["--format", "json"])).unwrap();
    let one = &all[0];
    for member in ["ociVersion", "id", "pid", "status", "bundle", "rootfs", "created", "annotations", "owner"] {
        assert!(!one[member].is_null(), "{member}: {one}");
    }
    assert_eq!((&one["id"], &one["status"], &one["owner"]), (&json!(c.id), &json!("created"), &json!("root")));
    assert_eq!(list(&["-q"]), format!("{}\n", c.id));
    let table = list(&[]);
    let head: Vec<_> = table.lines().next().unwrap().split_whitespace().collect();
    assert_eq!(head, ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]);
    let state = state(&c);
    for member in ["ociVersion", "id", "pid", "status", "bundle", "rootfs", "created", "annotations", "owner"] {
        assert_eq!(state[member], one[member], "{member}");
    }
}
