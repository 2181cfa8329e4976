//! `lmrun exec`: one more process, with all that the container's own have and no more.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use lmrun::sys::fdpass;
use lmrun::sys::pidfd::PidFd;
use nix::libc;
use nix::sys::ptrace;
use nix::sys::statvfs::{FsFlags, fstatvfs};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use runtime_tests::command::{self, Done};
use runtime_tests::container::{Checkpoint, Container};
use runtime_tests::shell::{in_version2_view, make, shell, state};
use runtime_tests::{host, needs};
use serde_json::{Value, json};

/// A running container.
fn running(edit: impl FnOnce(&mut Value)) -> Option<Container> {
    let c = shell("sleep 1000", edit)?;
    make(&c, &["run", "-d"]).ok();
    Some(c)
}

/// `lmrun exec OPTION... ID ARG...`
fn exec(c: &Container, options: &[&str], args: &[&str]) -> Done {
    c.perform(c.lmrun().arg("exec").args(options).arg(&c.id).args(args))
}

/// The same, with `process` in a file.
fn exec_process(c: &Container, options: &[&str], process: &Value) -> Done {
    let file = c.base.join("process.json");
    fs::write(&file, process.to_string()).unwrap();
    c.perform(c.lmrun().arg("exec").arg("--process").arg(&file).args(options).arg(&c.id))
}

fn wait_for(what: &str, mut happened: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !happened() {
        assert!(begin.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn lmrun_ends_as_the_process_does() {
    let Some(c) = running(|_| ()) else { return };
    let done = exec(&c, &[], &["sh", "-c", "echo out; echo err >&2; exit 7"]);
    assert_eq!((done.status.unwrap().code(), done.out.as_str(), done.err.as_str()), (Some(7), "out\n", "err\n"));
    assert_eq!(exec(&c, &[], &["sh", "-c", "kill -9 $$"]).status.unwrap().code(), Some(137));
}

#[test]
fn what_could_not_be_run_is_said_in_runcs_words() {
    let Some(c) = running(|_| ()) else { return };
    fs::write(c.bundle().join("rootfs/junk"), "junk").unwrap();
    fs::set_permissions(c.bundle().join("rootfs/junk"), PermissionsExt::from_mode(0o755)).unwrap();
    for (options, program, words) in [
        (&[][..], "nothing", r#"exec: "nothing": executable file not found in $PATH"#),
        (&[], "/nothing", r#"exec: "/nothing": stat /nothing: no such file or directory"#),
        (&[], "/junk", "exec /junk: exec format error"),
        (&["--cwd", "/nowhere"], "true", r#"chdir to cwd ("/nowhere") set in config.json failed: no such file"#),
        (&["--cgroup", "none"], "true", "none does not exist"),
        (&["--preserve-fds", "2"], "true", "preserved-fd 3"),
        (&["--cwd", "relative"], "true", "Cwd must be an absolute path"),
    ] {
        let log = c.base.join("log.json");
        let mut command = c.lmrun();
        command.arg("--log").arg(&log).args(["--log-format", "json", "exec"]).args(options);
        let done = c.perform(command.args([&c.id, program]));
        assert_eq!(done.status.unwrap().code(), Some(255), "{done}");
        let first = done.err.lines().next().unwrap();
        assert!(first.contains("exec failed: ") && first.contains(words), "{done}");
        let log = fs::read_to_string(log).unwrap();
        let last: Value = serde_json::from_str(log.lines().last().unwrap()).unwrap();
        assert!(last["msg"].as_str().unwrap().starts_with("exec failed: "), "{log}");
    }
}

/// A container with everything that a process can have, or be kept from.
fn strict(config: &mut Value) {
    let sets = json!(["CAP_KILL", "CAP_CHOWN"]);
    let process = &mut config["process"];
    process["capabilities"] = json!({ "bounding": sets, "effective": sets, "permitted": sets });
    process["noNewPrivileges"] = json!(true);
    process["oomScoreAdj"] = json!(300);
    process["user"] = json!({ "uid": 0, "gid": 0, "umask": 0o27, "additionalGids": [11, 12] });
    config["linux"]["seccomp"] = json!({ "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 30 }] });
    let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.extend([json!({ "type": "cgroup" }), json!({ "type": "time" })]);
}

/// What the kernel says of a process, in lines that are the same for two that are alike.
fn facts(pid: &str) -> String {
    let kinds = "cgroup ipc mnt net pid time user uts";
    format!(
        "grep -E '^(Uid|Gid|Groups|Cap|NoNew|Seccomp|Sig(Blk|Ign))' /proc/{pid}/status; cat /proc/{pid}/oom_score_adj \
         /proc/{pid}/limits /proc/{pid}/cgroup /proc/{pid}/sessionid; \
         for ns in {kinds}; do readlink /proc/{pid}/ns/$ns; done"
    )
}

#[test]
fn a_process_is_as_init_is() {
    for version2 in [false, true] {
        let Some(mut c) = shell("exec sleep 1000", strict) else { return };
        if version2 {
            in_version2_view(&mut c);
        }
        make(&c, &["run", "-d"]).ok();
        let both = exec(&c, &[], &["sh", "-c", &format!("{}; echo; {}; mkdir /x", facts("1"), facts("self"))]);
        let (init, own) = both.out.split_once("\n\n").unwrap_or_else(|| panic!("{both}"));
        assert_eq!(init.trim(), own.trim());
        assert!(init.contains("Seccomp:\t2") && init.contains("NoNewPrivs:\t1") && init.contains("300"), "{init}");
        assert!(both.err.contains("Read-only file system"), "{both}");
        let pid = state(&c)["pid"].as_i64().unwrap();
        let done = exec(&c, &["-d"], &["sleep", "1000"]);
        assert!(done.succeeded(), "{done}");
        let cgroups = |pid: i64| fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        for member in host::processes(&c.id) {
            assert_eq!(cgroups(member.into()), cgroups(pid));
        }
        assert_eq!(host::processes(&c.id).len(), 2);
        let umask = exec(&c, &[], &["sh", "-c", "umask"]).ok().out;
        assert_eq!(umask.trim(), "0027");
    }
}

#[test]
fn nothing_of_lmruns_comes_along() {
    let Some(c) = running(|_| ()) else { return };
    let done = exec(&c, &[], &["sh", "-c", "ls /proc/$$/fd; cat /proc/$$/environ; readlink /proc/$$/cwd"]).ok();
    assert_eq!(done.out, "0\n1\n2\nPATH=/usr/local/bin:/usr/bin:/bin\0WORKLOAD=yes\0HOME=/\0/\n");
}

#[test]
fn options_change_what_the_process_is() {
    let Some(c) = running(|_| ()) else { return };
    fs::create_dir(c.bundle().join("rootfs/etc")).unwrap();
    fs::write(c.bundle().join("rootfs/etc/passwd"), "joe:x:1000:7:joe:/home/joe:/bin/sh\n").unwrap();
    let options = ["--user", "1000:7", "-g", "8", "--additional-gids", "9", "-e", "A=1 2", "--cwd", "/tmp"];
    let done = exec(&c, &options, &["sh", "-c", "id; pwd; echo $A $HOME; grep CapEff /proc/self/status"]).ok();
    assert_eq!(done.out, "uid=1000(joe) gid=7 groups=8,9\n/tmp\n1 2 /home/joe\nCapEff:\t0000000000000000\n");
    let caps = "grep -E 'CapEff|NoNewPrivs' /proc/self/status";
    let before = exec(&c, &[], &["sh", "-c", caps]).ok().out;
    let after = exec(&c, &["--cap", "CAP_LEASE", "--no-new-privs"], &["sh", "-c", caps]).ok().out;
    let number = |text: &str| u64::from_str_radix(text.split_whitespace().nth(1).unwrap(), 16).unwrap();
    assert_eq!(number(&after), number(&before) | 1 << 28);
    assert!(before.contains("NoNewPrivs:\t0") && after.contains("NoNewPrivs:\t1"));
}

#[test]
fn a_process_file_says_it_all() {
    let Some(c) = running(strict) else { return };
    let pid_file = c.base.join("exec.pid");
    let process = json!({ "terminal": false, "cwd": "/tmp", "env": ["PATH=/bin", "B=2"],
        "user": { "uid": 0, "gid": 0 }, "capabilities": { "bounding": ["CAP_KILL"] },
        "args": ["sh", "-c", "{ grep -E 'CapBnd|NoNew|Seccomp:' /proc/self/status; env; pwd; } > /said; sleep 1000"] });
    exec_process(&c, &["--detach", "--pid-file", pid_file.to_str().unwrap()], &process).ok();
    let pid: i32 = fs::read_to_string(&pid_file).unwrap().parse().unwrap();
    assert!(host::processes(&c.id).contains(&pid));
    let said = c.bundle().join("rootfs/said");
    wait_for("said", || fs::read_to_string(&said).is_ok_and(|text| text.ends_with("/tmp\n")));
    let said = fs::read_to_string(said).unwrap();
    for line in ["CapBnd:\t0000000000000020", "NoNewPrivs:\t1", "Seccomp:\t2", "B=2"] {
        assert!(said.lines().any(|said| said == line), "{line} in {said}");
    }
    assert!(!said.contains("WORKLOAD"), "{said}");
}

#[test]
fn a_paused_container_is_left_alone_unless_told_otherwise() {
    let Some(c) = running(|_| ()) else { return };
    c.simple("pause").ok();
    let refused = exec(&c, &[], &["true"]).failed();
    assert!(refused.err.contains("cannot exec in a paused container"), "{refused}");
    let mut waiting: Child =
        c.lmrun().args(["exec", "--ignore-paused", &c.id, "true"]).stdin(Stdio::null()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(200));
    assert!(waiting.try_wait().unwrap().is_none(), "it ran in a paused container");
    c.simple("resume").ok();
    assert!(command::wait(&mut waiting, Duration::from_secs(20)).is_some_and(|status| status.success()));
    c.simple("pause").ok();
    c.perform(c.lmrun().args(["delete", "--force", &c.id])).ok();
    exec(&c, &[], &["true"]).failed();
}

#[test]
fn a_user_namespace_is_entered() {
    let Some(c) = running(|config| {
        config["linux"]["namespaces"].as_array_mut().unwrap().push(json!({ "type": "user" }));
        for mappings in ["uidMappings", "gidMappings"] {
            config["linux"][mappings] = json!([{ "containerID": 0, "hostID": 100_000, "size": 65_536 }]);
        }
    }) else {
        return;
    };
    let done = exec(
        &c,
        &[],
        &["sh", "-c", "cat /proc/self/uid_map; id; readlink /proc/self/ns/user; readlink /proc/1/ns/user"],
    )
    .ok();
    let words: Vec<_> = done.out.split_whitespace().collect();
    assert_eq!(words[..5], ["0", "100000", "65536", "uid=0", "gid=0"], "{done}");
    assert_eq!(words[5], words[6], "{done}");
}

#[test]
fn a_terminal_in_the_foreground_is_joined_to_ours() {
    let Some(c) = running(|_| ()) else { return };
    let mut child = c
        .lmrun()
        .args(["exec", "-t", &c.id, "sh", "-c", "tty; stty -echo; read line; echo got $line; exit 3"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.as_mut().unwrap().write_all(b"hello\n").unwrap();
    let mut out = String::new();
    child.stdout.take().unwrap().read_to_string(&mut out).unwrap();
    assert_eq!(command::wait(&mut child, Duration::from_secs(20)).unwrap().code(), Some(3));
    assert!(out.contains("/dev/pts/0\r\n") && out.ends_with("got hello\r\n"), "{out:?}");
}

#[test]
fn a_terminal_goes_to_the_console_socket_and_a_pidfd_to_the_other() {
    let Some(c) = running(|_| ()) else { return };
    let listen = |name: &str| {
        let path = c.base.join(name);
        (UnixListener::bind(&path).unwrap(), path.to_str().unwrap().to_owned())
    };
    let ((console, console_path), (pidfds, pidfd_path)) = (listen("console.sock"), listen("pidfd.sock"));
    let process = |terminal| {
        json!({ "terminal": terminal, "consoleSize": { "height": 33, "width": 77 }, "cwd": "/", "env": ["PATH=/bin"],
            "user": { "uid": 0, "gid": 0 }, "args": ["sh", "-c", "tty; stty size; echo end; sleep 1000"] })
    };
    let refused = exec_process(&c, &["-d"], &process(true)).failed();
    assert!(refused.err.contains("console socket"), "{refused}");
    let refused = exec_process(&c, &["-d", "--console-socket", &console_path], &process(false)).failed();
    assert!(refused.err.contains("console socket"), "{refused}");
    let pid_file = c.base.join("pid");
    let options = [
        "-d",
        "--console-socket",
        &console_path,
        "--pidfd-socket",
        &pidfd_path,
        "--pid-file",
        pid_file.to_str().unwrap(),
    ];
    exec_process(&c, &options, &process(true)).ok();
    let receive = |listener: UnixListener| {
        let (stream, _) = listener.accept().unwrap();
        let mut word = [0; 64];
        let (n, fds) = fdpass::receive(stream.as_fd(), &mut word).unwrap();
        (String::from_utf8_lossy(&word[..n]).into_owned(), fds.into_iter().next().unwrap())
    };
    let (word, pidfd) = receive(pidfds);
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", std::os::fd::AsRawFd::as_raw_fd(&pidfd))).unwrap();
    let pid = fs::read_to_string(pid_file).unwrap();
    assert!(word == "setns" && info.lines().any(|line| line == format!("Pid:\t{pid}")), "{word} {info}");
    let (_, master) = receive(console);
    let mut master = File::from(master);
    let mut shown = String::new();
    while !shown.contains("end") {
        let mut part = [0; 256];
        let n = master.read(&mut part).unwrap();
        shown.push_str(&String::from_utf8_lossy(&part[..n]));
    }
    assert_eq!(shown, "/dev/pts/0\r\n33 77\r\nend\r\n");
    drop(master); // hangs up: the session ends
    wait_for("the end of the session", || PidFd::open(pid.parse().unwrap()).is_err());
}

#[test]
fn descriptors_are_handed_down_when_asked_for() {
    let Some(c) = running(|_| ()) else { return };
    let line = format!(
        "exec {} --root {} exec --preserve-fds 2 {} sh -c 'ls /proc/$$/fd; cat <&3' 3</proc/self/comm 4</dev/null 5</etc",
        needs::built("lmrun").display(),
        c.root.display(),
        c.id
    );
    let done = command::run(std::process::Command::new("sh").args(["-c", &line]), Duration::from_secs(20)).ok();
    assert!(done.out.starts_with("0\n1\n2\n3\n4\n"), "{done}");
    assert_eq!(done.out.lines().count(), 6, "not 5, and what the file holds: {done}");
}

/// CVE-2024-21626: a working directory that is a descriptor of the host's.
#[test]
fn a_working_directory_outside_is_refused() {
    let Some(c) = running(|_| ()) else { return };
    for fd in 3..12 {
        let line = format!(
            "exec {} --root {} exec --preserve-fds 9 --cwd /proc/self/fd/{fd} {} ls 3</ 4</ 5</ 6</ 7</ 8</ 9</ 10</ 11</",
            needs::built("lmrun").display(),
            c.root.display(),
            c.id
        );
        // Not every shell takes numbers of two digits: bash does.
        let done =
            command::run(std::process::Command::new("bash").args(["-c", &line]), Duration::from_secs(20)).failed();
        assert!(done.err.contains("outside of container mount namespace root"), "{done}");
        assert_eq!(done.out, "");
    }
    let done = exec(&c, &["--cwd", "/proc/self/fd/7"], &["ls"]).failed();
    assert!(done.err.contains("chdir to cwd"), "{done}");
}

/// CVE-2019-5736: what the container executes in the name of lmrun must not be writable by it.
#[test]
fn the_program_file_of_lmrun_is_out_of_reach() {
    let Some(c) = running(|_| ()) else { return };
    let pid_file = c.base.join("exec.pid");
    let options = ["-d", "--pid-file", pid_file.to_str().unwrap()];
    let attack = ["/proc/self/exe", "page-server", "--image-path", "/tmp/x", "--address", "127.0.0.1", "--port", "0"];
    exec(&c, &options, &attack).ok();
    let exe = format!("/proc/{}/exe", fs::read_to_string(pid_file).unwrap());
    let mount = fstatvfs(File::open(&exe).unwrap()).unwrap().flags();
    assert!(mount.contains(FsFlags::ST_RDONLY), "{mount:?}");
    let changed = || fs::metadata(needs::built("lmrun")).unwrap().modified().unwrap();
    let before = changed();
    exec(&c, &[], &["sh", "-c", "for p in /proc/[0-9]*; do echo x > $p/exe; done"]);
    assert_eq!(changed(), before);
}

#[test]
fn a_cgroup_below_the_containers_can_be_chosen() {
    let Some(mut c) = shell("sleep 1000", |_| ()) else { return };
    in_version2_view(&mut c);
    make(&c, &["run", "-d"]).ok();
    let dir = host::cgroups(&c.id).into_iter().find(|dir| dir.starts_with("/sys/fs/cgroup/unified")).unwrap();
    fs::create_dir(dir.join("below")).unwrap();
    let done = exec(&c, &["--cgroup", "below"], &["cat", "/proc/self/cgroup"]).ok();
    assert!(done.out.contains(&format!("0::/lmrun-test/{}/below\n", c.id)), "{done}");
    let refused = exec(&c, &["--cgroup", "../.."], &["true"]).failed();
    assert!(refused.err.contains("sub cgroup"), "{refused}");
}

/// Where a container has divided its cgroup (systemd does), no process can be in the divided one: it goes to init's.
#[test]
fn a_divided_cgroup_is_entered_where_init_is() {
    let unified = std::path::Path::new("/sys/fs/cgroup/unified");
    let has = |dir: &std::path::Path| fs::read_to_string(dir.join("cgroup.controllers")).unwrap_or_default();
    let Some(controller) = has(unified).split_whitespace().next().map(str::to_owned) else {
        return needs::skip("a controller of cgroup2 beside version 1");
    };
    let Some(mut c) = shell("sleep 1000", |_| ()) else { return };
    in_version2_view(&mut c);
    make(&c, &["run", "-d"]).ok();
    let dir = host::cgroups(&c.id).into_iter().find(|dir| dir.starts_with(unified)).unwrap();
    fs::create_dir(dir.join("inits")).unwrap();
    fs::write(dir.join("inits/cgroup.procs"), state(&c)["pid"].to_string()).unwrap();
    fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}")).unwrap();
    let done = exec(&c, &[], &["cat", "/proc/self/cgroup"]).ok();
    assert!(done.out.contains(&format!("0::/lmrun-test/{}/inits\n", c.id)), "{done}");
}

#[test]
fn a_hook_may_exec_while_start_waits_for_it() {
    let Some(c) = shell("sleep 1000", |config| {
        let rootfs = std::path::Path::new(config["root"]["path"].as_str().unwrap()).to_owned();
        let base = rootfs.ancestors().nth(2).unwrap().to_owned();
        let line = format!(
            "{} --root {} exec {} sh -c 'echo hooked > /hooked'",
            needs::built("lmrun").display(),
            base.join("state").display(),
            base.file_name().unwrap().to_str().unwrap()
        );
        config["hooks"]["poststart"] = json!([{ "path": "/bin/sh", "args": ["sh", "-c", line] }]);
    }) else {
        return;
    };
    make(&c, &["run", "-d"]).ok();
    assert_eq!(fs::read_to_string(c.bundle().join("rootfs/hooked")).unwrap(), "hooked\n");
}

/// What exec started is not in a checkpoint: it stands still meanwhile, a warning names it, and it goes on or ends as the
/// container does.
#[test]
fn a_checkpoint_leaves_visitors_out() {
    let Some(c) = running(|_| ()) else { return };
    let script = "n=0; while :; do n=$((n + 1)); echo $n >> /count; sleep 0.01; done";
    let mut visit = c.lmrun();
    visit.args(["exec", &c.id, "sh", "-c", script]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut visitor = visit.spawn().unwrap();
    let size = || fs::metadata(c.bundle().join("rootfs/count")).map_or(0, |m| m.len());
    let goes_on = |what| {
        let before = size();
        wait_for(what, || size() > before);
    };
    goes_on("the visitor runs");
    c.checkpoint(&Checkpoint { images: "pre", pre_dump: true, ..Checkpoint::default() }).ok();
    goes_on("the visitor runs on after a pre-dump");
    let done = c.checkpoint(&Checkpoint { images: "running", leave_running: true, ..Checkpoint::default() }).ok();
    assert!(done.err.contains("was started by exec"), "{done}");
    goes_on("the visitor runs on after a checkpoint");
    c.simple("pause").ok();
    let before = size();
    c.checkpoint(&Checkpoint { images: "paused", leave_running: true, ..Checkpoint::default() }).ok();
    assert_eq!(size(), before);
    c.simple("resume").ok();
    goes_on("the visitor runs on after a pause");
    c.checkpoint(&Checkpoint { images: "final", ..Checkpoint::default() }).ok();
    assert_eq!(command::wait(&mut visitor, Duration::from_secs(10)).and_then(|s| s.code()), Some(137));
    c.restore(&c.images("final"), false).ok();
    assert_eq!(exec(&c, &[], &["sh", "-c", "exit 5"]).status.unwrap().code(), Some(5));
}

/// The C library is started once, in the program file that is out of reach: its start is a third of what a short exec takes.
#[test]
fn lmrun_is_sealed_before_the_c_library_starts() {
    if !needs::root() {
        return;
    }
    let mut lmrun = std::process::Command::new(needs::built("lmrun"));
    lmrun.args(["exec", "nobody", "true"]).stderr(Stdio::null());
    // SAFETY: ptrace(2) in the child of a fork touches nothing of ours.
    #[allow(unsafe_code)]
    unsafe {
        lmrun.pre_exec(|| ptrace::traceme().map_err(Into::into));
    }
    let pid = Pid::from_raw(lmrun.spawn().unwrap().id().cast_signed());
    assert!(matches!(waitpid(pid, None), Ok(WaitStatus::Stopped(..))));
    let mut calls: Vec<i64> = (0..12)
        .map(|_| {
            ptrace::syscall(pid, None).unwrap();
            waitpid(pid, None).unwrap();
            ptrace::getregs(pid).unwrap().orig_rax.cast_signed()
        })
        .collect();
    ptrace::kill(pid).unwrap();
    waitpid(pid, None).unwrap();
    // Each has stopped where it began and where it ended; behind its success, execveat(2) goes by the name of execve(2).
    calls.dedup();
    use libc::{SYS_brk, SYS_execve, SYS_execveat, SYS_mount_setattr, SYS_open_tree, SYS_statfs};
    assert_eq!(calls, [SYS_statfs, SYS_open_tree, SYS_mount_setattr, SYS_execveat, SYS_execve, SYS_statfs, SYS_brk]);
}
