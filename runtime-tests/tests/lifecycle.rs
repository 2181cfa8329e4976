//! Containers from create to delete, as engines ask for them.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lmrun::sys::fdpass;
use nix::sys::statvfs::{FsFlags, fstatvfs};
use runtime_tests::command;
use runtime_tests::container::{Checkpoint, Container};
use runtime_tests::host;
use runtime_tests::shell::{container, make, shell, status, wait_status};
use serde_json::{Value, json};

/// Nothing of the container is left: no state, cgroup or process.
#[track_caller]
fn gone(container: &Container) {
    container.simple("state").failed();
    assert!(!container.root.join(&container.id).exists());
    assert_eq!(host::cgroups(&container.id), Vec::<std::path::PathBuf>::new());
    let root = container.root.to_string_lossy().into_owned();
    assert_eq!(host::commands(&[&root]), vec![]);
}

#[test]
fn every_status_in_its_turn() {
    let Some(c) = shell("sleep 100", |_| ()) else {
        return;
    };
    let pid_file = c.base.join("pid");
    make(&c, &["create", "--pid-file", pid_file.to_str().unwrap()]).ok();
    assert_eq!(status(&c), "created");
    let state: Value = serde_json::from_str(&c.simple("state").out).unwrap();
    assert_eq!(fs::read_to_string(&pid_file).unwrap(), state["pid"].to_string());
    assert_eq!(state["bundle"], json!(c.bundle()));
    c.simple("start").ok();
    assert_eq!(status(&c), "running");
    c.simple("start").failed();
    c.simple("pause").ok();
    assert_eq!(status(&c), "paused");
    c.simple("resume").ok();
    assert_eq!(status(&c), "running");
    c.simple("delete").failed();
    c.perform(c.lmrun().args(["kill", &c.id, "KILL"])).ok();
    wait_status(&c, "stopped");
    c.simple("kill").failed();
    c.simple("delete").ok();
    gone(&c);
    c.simple("delete").failed();
    c.perform(c.lmrun().args(["delete", "--force", &c.id])).ok();
}

#[test]
fn an_id_is_given_once() {
    let Some(c) = shell("sleep 100", |_| ()) else {
        return;
    };
    make(&c, &["create"]).ok();
    let again = make(&c, &["create"]).failed();
    assert!(again.err.contains("already exists"), "{again}");
    assert_eq!(status(&c), "created");
}

#[test]
fn the_foreground_ends_as_the_container_does() {
    let Some(c) = shell("exit 7", |_| ()) else {
        return;
    };
    assert_eq!(make(&c, &["run"]).status.unwrap().code(), Some(7));
    gone(&c);
}

/// A container in the foreground, once it runs.
fn foreground(c: &Container) -> std::process::Child {
    let mut command = c.lmrun();
    command.args(["run", "--bundle"]).arg(c.bundle()).arg(&c.id);
    let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    let begin = Instant::now();
    while !c.bundle().join("rootfs/ready").exists() {
        assert!(begin.elapsed() < Duration::from_secs(20), "not ready");
        std::thread::sleep(Duration::from_millis(2));
    }
    child
}

#[test]
fn the_foreground_passes_signals_on() {
    let script = "trap 'exit 5' TERM; : > /ready; while :; do sleep 0.01; done";
    let Some(c) = shell(script, |_| ()) else {
        return;
    };
    let mut child = foreground(&c);
    command::tool(&format!("kill -TERM {}", child.id()));
    assert_eq!(child.wait().unwrap().code(), Some(5));
    gone(&c);
}

#[test]
fn a_death_by_signal_is_128_and_more() {
    let Some(c) = shell(": > /ready; sleep 100", |_| ()) else {
        return;
    };
    let mut child = foreground(&c);
    c.perform(c.lmrun().args(["kill", &c.id, "9"])).ok();
    assert_eq!(child.wait().unwrap().code(), Some(137));
    gone(&c);
}

#[test]
fn a_program_that_is_not_there_is_named_as_runc_names_it() {
    for (program, words) in [
        ("nothing", r#"exec: "nothing": executable file not found in $PATH"#),
        ("/nothing", r#"exec: "/nothing": stat /nothing: no such file or directory"#),
        ("/bin", r#"exec: "/bin": is a directory"#),
    ] {
        let Some(c) = container(&[program], |_| ()) else {
            return;
        };
        let log = c.base.join("log.json");
        let mut command = c.lmrun();
        command.arg("--log").arg(&log).args(["--log-format", "json", "create", "--bundle"]);
        let done = c.perform(command.arg(c.bundle()).arg(&c.id)).failed();
        assert!(done.err.lines().next().unwrap().contains(words), "{done}");
        let log = fs::read_to_string(log).unwrap();
        let last: Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();
        assert_eq!(last["level"], "error");
        assert!(last["msg"].as_str().unwrap().contains(words), "{log}");
        gone(&c);
    }
}

#[test]
fn start_tells_why_a_program_cannot_be_executed() {
    let Some(c) = container(&["/junk"], |_| ()) else {
        return;
    };
    let junk = c.bundle().join("rootfs/junk");
    fs::write(&junk, "neither a script nor a program").unwrap();
    fs::set_permissions(&junk, PermissionsExt::from_mode(0o755)).unwrap();
    make(&c, &["create"]).ok();
    let done = c.simple("start").failed();
    assert!(done.err.contains("exec /junk: exec format error"), "{done}");
    make(&c, &["run"]).failed();
}

#[test]
fn the_workload_inherits_nothing() {
    let script = "grep -E 'Sig(Blk|Ign)' /proc/self/status; ls /proc/1/fd; :";
    let Some(c) = shell(script, |_| ()) else {
        return;
    };
    let done = make(&c, &["run"]).ok();
    let zero = "0000000000000000";
    assert_eq!(done.out, format!("SigBlk:\t{zero}\nSigIgn:\t{zero}\n0\n1\n2\n"));
}

#[test]
fn privileges_are_those_of_the_config() {
    let script = "grep -E 'CapEff|CapBnd|NoNewPrivs|Seccomp' /proc/self/status; mkdir /tmp/x";
    let edit = |nnp: bool| {
        move |config: &mut Value| {
            config["process"]["noNewPrivileges"] = json!(nnp);
            let sets = json!(["CAP_KILL", "CAP_CHOWN", "CAP_NOT_YET_INVENTED"]);
            config["process"]["capabilities"] = json!({ "bounding": sets, "effective": sets, "permitted": sets });
            config["linux"]["seccomp"] = json!({ "defaultAction": "SCMP_ACT_ALLOW",
                "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
                "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 30 }] });
        }
    };
    for nnp in [false, true] {
        let Some(c) = shell(script, edit(nnp)) else {
            return;
        };
        let done = make(&c, &["run"]).failed();
        let expected = format!(
            "CapEff:\t0000000000000021\nCapBnd:\t0000000000000021\nNoNewPrivs:\t{}\nSeccomp:\t2\nSeccomp_filters:\t1\n",
            i32::from(nnp)
        );
        assert_eq!(done.out, expected);
        assert!(done.err.contains("Read-only file system"), "{done}");
    }
}

/// A hook that appends its name and what it reads to `log`.
fn hook(dir: &Path, name: &str, log: &str) -> Value {
    let script = dir.join(name);
    fs::write(&script, format!("#!/bin/sh\necho {name} $(cat) >> {log}\n")).unwrap();
    fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).unwrap();
    json!([{ "path": script }])
}

#[test]
fn hooks_run_in_order_and_see_the_bundle() {
    let mut log = std::path::PathBuf::new();
    let Some(c) = shell("cat /hooked", |config| {
        let rootfs = Path::new(config["root"]["path"].as_str().unwrap()).to_owned();
        let dir = rootfs.parent().unwrap();
        log = dir.join("hooks.log");
        let names = ["prestart", "createRuntime", "createContainer", "poststart", "poststop"];
        for name in names {
            config["hooks"][name] = hook(dir, name, log.to_str().unwrap());
        }
        hook(&rootfs, "startContainer", "/hooked");
        config["hooks"]["startContainer"] = json!([{ "path": "/startContainer" }]);
    }) else {
        return;
    };
    let done = make(&c, &["run"]).ok();
    assert!(done.out.starts_with("startContainer {"), "{done}");
    let log = fs::read_to_string(log).unwrap();
    let names: Vec<_> = log.lines().filter_map(|line| line.split(' ').next()).collect();
    assert_eq!(names, ["prestart", "createRuntime", "createContainer", "poststart", "poststop"]);
    let bundle = format!("\"bundle\":\"{}\"", c.bundle().display());
    assert!(log.lines().all(|line| line.contains(&bundle)), "{log}");
}

#[test]
fn a_hook_that_fails_before_the_start_stops_the_container() {
    for kind in ["createRuntime", "createContainer", "startContainer"] {
        let program = if kind == "startContainer" { "/bin/false" } else { "/usr/bin/false" };
        let hooks = json!({ kind: [{ "path": program }] });
        let Some(c) = shell("echo ran", |config| config["hooks"] = hooks) else {
            return;
        };
        let done = make(&c, &["run"]).failed();
        assert!(done.err.contains("hook"), "{done}");
        assert_eq!(done.out, "");
        gone(&c);
    }
}

#[test]
fn the_program_file_of_lmrun_is_out_of_reach() {
    let Some(c) = shell("sleep 100", |_| ()) else {
        return;
    };
    make(&c, &["create"]).ok();
    let state: Value = serde_json::from_str(&c.simple("state").ok().out).unwrap();
    let exe = format!("/proc/{}/exe", state["pid"]);
    let mount = fstatvfs(File::open(exe).unwrap()).unwrap().flags();
    assert!(mount.contains(FsFlags::ST_RDONLY), "{mount:?}");
}

#[test]
fn a_terminal_goes_to_the_console_socket() {
    let Some(c) = shell("tty; ls /dev/console", |config| {
        config["process"]["terminal"] = json!(true);
    }) else {
        return;
    };
    let refused = make(&c, &["run", "-d"]).failed();
    assert!(refused.err.contains("console socket"), "{refused}");
    let path = c.base.join("console.sock");
    let listener = UnixListener::bind(&path).unwrap();
    make(&c, &["run", "-d", "--console-socket", path.to_str().unwrap()]).ok();
    let (stream, _) = listener.accept().unwrap();
    let (_, fds) = fdpass::receive(stream.as_fd(), &mut [0; 64]).unwrap();
    let mut shown = String::new();
    // Ends with EIO when the container closes its side.
    let _ = File::from(fds.into_iter().next().unwrap()).read_to_string(&mut shown);
    assert_eq!(shown, "/dev/pts/0\r\n/dev/console\r\n");
}

#[test]
fn a_cgroup_belongs_to_one_container() {
    let Some(first) = shell("sleep 100", |_| ()) else {
        return;
    };
    make(&first, &["run", "-d"]).ok();
    let shared = json!(format!("/lmrun-test/{}", first.id));
    let edit = |config: &mut Value| config["linux"]["cgroupsPath"] = shared;
    let Some(second) = shell("sleep 100", edit) else {
        return;
    };
    let refused = make(&second, &["create"]).failed();
    assert!(refused.err.contains("is not empty"), "{refused}");
    assert_eq!(status(&first), "running");
}

#[test]
fn lists_know_every_container() {
    let Some(c) = shell("sleep 100", |_| ()) else {
        return;
    };
    make(&c, &["create"]).ok();
    let table = c.perform(c.lmrun().arg("list")).ok().out;
    let rows: Vec<Vec<_>> = table.lines().map(|row| row.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"]);
    assert_eq!((rows[1][0], rows[1][2], rows[1][5]), (c.id.as_str(), "created", "root"));
    let json: Value = serde_json::from_str(&c.perform(c.lmrun().args(["list", "--format", "json"])).ok().out).unwrap();
    assert_eq!(json[0]["id"], json!(c.id));
    assert_eq!(c.perform(c.lmrun().args(["list", "-q"])).ok().out.trim(), c.id);
}

#[test]
fn whatever_instant_lmrun_dies_at_delete_cleans_up() {
    let Some(c) = shell("sleep 100", |_| ()) else {
        return;
    };
    for instant in 0..25_u64 {
        let mut command: Command = c.run_command();
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_micros(instant * 1_300));
        child.kill().unwrap();
        child.wait().unwrap();
        c.perform(c.lmrun().args(["delete", "--force", &c.id])).ok();
        gone(&c);
    }
}

#[test]
fn a_page_server_that_others_can_reach_must_be_asked_for() {
    let Some(c) = shell("true", |_| ()) else {
        return;
    };
    let mut command = c.lmrun();
    command.args(["page-server", "--address", "0.0.0.0", "--port", "0", "--image-path"]);
    let done = c.perform(command.arg(c.images("x"))).failed();
    assert!(done.err.contains("--insecure"), "{done}");
}

/// A paused container runs nothing before its checkpoint, and is paused after it; resumed or restored, it goes on.
#[test]
fn a_paused_container_stands_still_through_its_checkpoint() {
    let Some(c) = shell("n=0; while :; do n=$((n + 1)); echo $n >> /count; done", |_| ()) else {
        return;
    };
    make(&c, &["run", "-d"]).ok();
    let size = || fs::metadata(c.bundle().join("rootfs/count")).map_or(0, |m| m.len());
    let grows = || {
        let (begin, before) = (Instant::now(), size());
        while size() <= before {
            assert!(begin.elapsed() < Duration::from_secs(5), "it does not go on");
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    grows();
    for round in 0..3 {
        c.simple("pause").ok();
        let before = size();
        let images = format!("running{round}");
        c.checkpoint(&Checkpoint { images: &images, leave_running: true, ..Checkpoint::default() }).ok();
        assert_eq!((status(&c).as_str(), size()), ("paused", before));
        c.simple("resume").ok();
        grows();
    }
    c.simple("pause").ok();
    let before = size();
    c.checkpoint(&Checkpoint { images: "final", ..Checkpoint::default() }).ok();
    assert_eq!(size(), before);
    c.restore(&c.images("final"), true).ok();
    grows();
}

/// Where `/` is no mount point, and a mount namespace has another root than lmrun.
#[test]
fn lmrun_works_in_a_chroot() {
    let Some(mut c) = shell("ls /; sleep 1000", |_| ()) else { return };
    let root = c.base.join("root");
    let view = format!(
        "mount --make-rprivate /; for f in /*; do if [ -L $f ]; then [ -L {0}$f ] || cp -a $f {0}$f; elif [ -d $f ]; then \
         mkdir -p {0}$f; mount --rbind $f {0}$f; fi; done; exec chroot {0} \"$0\" \"$@\"",
        root.display()
    );
    fs::create_dir(&root).unwrap();
    c.call_through(&["unshare", "-m", "sh", "-ec", &view]);
    let out = fs::File::create(c.base.join("out")).unwrap();
    let mut run = c.lmrun();
    run.args(["run", "-d", "--bundle"]).arg(c.bundle()).arg(&c.id).stdout(out);
    c.perform(&mut run).ok();
    let inside = c.perform(c.lmrun().args(["exec", &c.id, "cat", "/proc/self/mountinfo"]));
    c.perform(c.lmrun().args(["delete", "--force", &c.id])).ok();
    // Of the host's mounts, nothing is left below the container's.
    let roots = inside.ok().out;
    assert_eq!(roots.lines().filter(|line| line.split(' ').nth(4) == Some("/")).count(), 1, "{roots}");
}
