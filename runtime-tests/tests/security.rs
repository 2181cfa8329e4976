//! The attacks on container runtimes that became known by a number, tried on lmrun; and what a container must not get from
//! who makes it.

use std::fs::{self, File};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use runtime_tests::command::{self, Done};
use runtime_tests::container::{Checkpoint, Container};
use runtime_tests::needs;
use runtime_tests::shell::{container, make, shell, state};
use serde_json::{Value, json};

/// What only the host has.
const SECRET: &str = "only-the-host-knows";

fn rootfs(config: &Value) -> PathBuf {
    config["root"]["path"].as_str().unwrap().into()
}

/// A directory of the host's beside the bundle, with the secret in it.
fn prey(config: &Value) -> PathBuf {
    let prey = rootfs(config).parent().unwrap().join("prey");
    fs::create_dir_all(&prey).unwrap();
    fs::write(prey.join("secret"), SECRET).unwrap();
    prey
}

fn without_mount(config: &mut Value, below: &str) {
    config["mounts"].as_array_mut().unwrap().retain(|mount| !mount["destination"].as_str().unwrap().starts_with(below));
}

/// A container of another user's ids: libcontainer makes its mounts.
fn mapped(config: &mut Value) {
    config["linux"]["namespaces"].as_array_mut().unwrap().push(json!({ "type": "user" }));
    for mappings in ["uidMappings", "gidMappings"] {
        config["linux"][mappings] = json!([{ "containerID": 0, "hostID": 100_000, "size": 65_536 }]);
    }
    command::tool(&format!("chown -R 100000:100000 {}", rootfs(config).display()));
}

/// Has `work` race against somebody who exchanges `place` for a link to `target` and back, as fast as that goes.
fn while_exchanged(place: &Path, target: &str, work: impl FnOnce()) {
    let over = AtomicBool::new(false);
    let link = place.with_extension("link");
    symlink(target, &link).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let flags = nix::fcntl::RenameFlags::RENAME_EXCHANGE;
                nix::fcntl::renameat2(nix::fcntl::AT_FDCWD, &link, nix::fcntl::AT_FDCWD, place, flags).unwrap();
            }
        });
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        over.store(true, Ordering::Relaxed);
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

/// A container process that holds lmrun's own program open and writes to it.
#[test]
fn cve_2019_5736_the_runtimes_program_is_overwritten() {
    let hunt = "while :; do for p in /proc/[0-9]*; do \
        case $(readlink $p/exe) in *busybox*|'') ;; *) exec 9<$p/exe && { echo found >> /found; echo pwned > /proc/self/fd/9; echo pwned > $p/exe; }; esac; \
        done; done 2>/dev/null";
    let Some(c) =
        shell(hunt, |config| config["linux"]["namespaces"].as_array_mut().unwrap().retain(|ns| ns["type"] != "pid"))
    else {
        return;
    };
    // Not the one that other scenarios use.
    let program = c.base.join("lmrun");
    fs::copy(needs::built("lmrun"), &program).unwrap();
    fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    let before = fs::read(&program).unwrap();
    let lmrun = |words: &[&str]| {
        let mut command = Command::new(&program);
        command::run(command.arg("--root").arg(&c.root).args(words), Duration::from_secs(30))
    };
    let bundle = c.bundle();
    lmrun(&["run", "-d", "--bundle", bundle.to_str().unwrap(), &c.id]).ok();
    // A program that is the runtime again, and stays to be found.
    let held = [
        "exec",
        "-d",
        &c.id,
        "/proc/self/exe",
        "page-server",
        "--image-path",
        "/tmp/x",
        "--address",
        "127.0.0.1",
        "--port",
        "0",
    ];
    lmrun(&held).ok();
    for _ in 0..10 {
        lmrun(&["exec", &c.id, "true"]).ok();
    }
    let found = c.bundle().join("rootfs/found");
    let begin = std::time::Instant::now();
    while !found.exists() {
        assert!(begin.elapsed() < Duration::from_secs(20), "the attack did not find its aim");
        std::thread::sleep(Duration::from_millis(5));
    }
    lmrun(&["delete", "--force", &c.id]).ok();
    assert!(fs::read(&program).unwrap() == before, "lmrun was overwritten");
}

/// A working directory that leads out by a descriptor which the runtime has open.
#[test]
fn cve_2024_21626_a_working_directory_leads_out() {
    // As Docker has it, WORKDIR is a path of the image: a link as well.
    for fd in 0..16 {
        let mut secret = PathBuf::new();
        let Some(c) = shell("cat secret ../secret ../../../../../../../../../../$SECRET; ls", |config| {
            secret = prey(config).join("secret");
            symlink(format!("/proc/self/fd/{fd}"), rootfs(config).join("way-out")).unwrap();
            config["process"]["cwd"] =
                json!(if fd % 2 == 0 { "/way-out".to_owned() } else { format!("/proc/self/fd/{fd}") });
            config["process"]["env"].as_array_mut().unwrap().push(json!(format!("SECRET={}", secret.display())));
        }) else {
            return;
        };
        // The caller has directories of the host open, too.
        let prey = secret.parent().unwrap().display();
        let line = format!(
            "exec {} --root {} run --bundle {} {} 3<{prey} 4<{prey} 5</ 6</ 7</ 8<{prey} 9</",
            needs::built("lmrun").display(),
            c.root.display(),
            c.bundle().display(),
            c.id
        );
        let done = c.perform(Command::new("bash").args(["-c", &line]));
        assert!(!done.succeeded() && done.out.is_empty(), "descriptor {fd}: {done}");
    }
}

/// `/dev/null` of the image is a link when the runtime masks a path with it.
#[test]
fn cve_2025_31133_masking_uncovers() {
    // Nothing here opens /dev/null by itself: that is the link, in part of the rounds.
    let script = "cat /masked/file; echo pwned > /masked/file";
    for map in [false, true] {
        let Some(c) = shell(script, |config| {
            without_mount(config, "/dev");
            let root = rootfs(config);
            fs::create_dir_all(root.join("masked")).unwrap();
            fs::write(root.join("masked/file"), "masked").unwrap();
            fs::write(root.join("target"), SECRET).unwrap();
            fs::write(root.join("dev/null"), "").unwrap();
            config["linux"]["maskedPaths"] = json!(["/masked/file"]);
            if map {
                mapped(config);
            }
        }) else {
            return;
        };
        let root = c.bundle().join("rootfs");
        while_exchanged(&root.join("dev/null"), "/target", || {
            for _ in 0..15 {
                let done = make(&c, &["run"]);
                assert!(!done.out.contains(SECRET) && !done.out.contains("masked"), "{done}");
            }
        });
        assert_eq!(fs::read_to_string(root.join("target")).unwrap(), SECRET);
        assert_eq!(fs::read_to_string(root.join("masked/file")).unwrap(), "masked");
    }
}

/// The terminal is mounted over what `/dev/console` leads to, before paths are masked.
#[test]
fn cve_2025_52565_the_console_covers_something_else() {
    let script = "grep -E ' /(victim|proc/sys/kernel/hostname|proc/timer_list) ' /proc/self/mountinfo; echo end";
    let Some(c) = shell(script, |config| {
        without_mount(config, "/dev");
        let root = rootfs(config);
        fs::write(root.join("victim"), SECRET).unwrap();
        fs::write(root.join("dev/console"), "").unwrap();
        config["process"]["terminal"] = json!(true);
        let devpts = json!({ "destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance", "ptmxmode=0666"] });
        config["mounts"].as_array_mut().unwrap().push(devpts);
    }) else {
        return;
    };
    for target in ["/victim", "/proc/sys/kernel/hostname", "../../../../../../victim"] {
        let console = c.bundle().join("rootfs/dev/console");
        while_exchanged(&console, target, || {
            for _ in 0..8 {
                let socket = c.base.join("console.sock");
                let _ = fs::remove_file(&socket);
                let _listener = UnixListener::bind(&socket).unwrap();
                let done = make(&c, &["create", "--console-socket", socket.to_str().unwrap()]);
                if done.succeeded() {
                    let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", state(&c)["pid"])).unwrap();
                    let points: Vec<_> = mounts.lines().filter_map(|line| line.split(' ').nth(4)).collect();
                    assert!(
                        !points.contains(&"/victim") && !points.contains(&"/proc/sys/kernel/hostname"),
                        "{points:?}"
                    );
                }
                c.perform(c.lmrun().args(["delete", "--force", &c.id])).ok();
            }
        });
        let _ = fs::remove_file(console.with_extension("link"));
        let _ = fs::remove_file(&console);
        fs::write(&console, "").unwrap();
    }
    assert_eq!(fs::read_to_string(c.bundle().join("rootfs/victim")).unwrap(), SECRET);
}

/// What the runtime writes into /proc for the container goes somewhere else.
#[test]
fn cve_2025_52881_writes_to_proc_are_redirected() {
    let Some(c) = shell("sleep 1000", |config| {
        without_mount(config, "/proc");
        let root = rootfs(config);
        // An image with a /proc of its own.
        for dir in ["proc/sys/net/ipv4", "proc/self/attr", "proc/thread-self/attr", "proc/1"] {
            fs::create_dir_all(root.join(dir)).unwrap();
        }
        fs::write(root.join("victim"), SECRET).unwrap();
        for link in [
            "proc/sys/net/ipv4/ip_forward",
            "proc/self/attr/exec",
            "proc/thread-self/attr/exec",
            "proc/self/oom_score_adj",
        ] {
            symlink("/victim", root.join(link)).unwrap();
        }
        config["linux"]["sysctl"] = json!({ "net.ipv4.ip_forward": "1" });
        config["process"]["oomScoreAdj"] = json!(321);
    }) else {
        return;
    };
    make(&c, &["run", "-d"]).ok();
    let pid = state(&c)["pid"].clone();
    let read = |path: String| fs::read_to_string(path).unwrap();
    let netns = format!("nsenter -t {pid} -n cat /proc/sys/net/ipv4/ip_forward");
    assert_eq!(command::tool(&netns).out, "1\n", "the true one is set");
    assert_eq!(read(format!("/proc/{pid}/oom_score_adj")), "321\n");
    c.perform(c.lmrun().args(["exec", "-d", &c.id, "sleep", "1000"])).ok();
    assert_eq!(read(c.bundle().join("rootfs/victim").display().to_string()), SECRET);
}

/// The way to a mount is exchanged while it is walked: the mount lands on the host's directories, or what is made for it does.
#[test]
fn cve_2021_30465_and_cve_2024_45310_the_way_to_a_mount_is_exchanged() {
    for map in [false, true] {
        let mut host = PathBuf::new();
        let Some(c) = shell("cat /vol/secret /vol/a/secret 2>/dev/null; true", |config| {
            host = prey(config);
            fs::create_dir(rootfs(config).join("vol")).unwrap();
            let mounts = config["mounts"].as_array_mut().unwrap();
            mounts.push(json!({ "destination": "/vol/a/b/c", "type": "tmpfs", "source": "tmpfs" }));
            mounts
                .push(json!({ "destination": "/vol/file", "source": "/proc/sys/kernel/ostype", "options": ["bind"] }));
            if map {
                mapped(config);
            }
        }) else {
            return;
        };
        // As long as it may get, and as an image may have it.
        let out = format!("../../../../../../../../../../../..{}", host.display());
        for target in [host.display().to_string(), out] {
            let place = c.bundle().join("rootfs/vol");
            while_exchanged(&place, &target, || {
                for _ in 0..12 {
                    let done = make(&c, &["run"]);
                    assert!(!done.out.contains(SECRET), "{done}");
                }
            });
            for left in [place.with_extension("link"), place.clone()] {
                let _ = fs::remove_file(&left);
                let _ = fs::remove_dir_all(&left);
            }
            fs::create_dir(&place).unwrap();
            if map {
                std::os::unix::fs::chown(&place, Some(100_000), Some(100_000)).unwrap();
            }
        }
        let left: Vec<_> = fs::read_dir(&host).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["secret"], "something was made outside of the root");
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(c.base.to_str().unwrap()), "something was mounted on the host: {mounts}");
    }
}

/// A /proc or /sys that is a link, in the image or in a volume, shows something else than the kernel's: paths are masked where
/// nobody looks.
#[test]
fn cve_2023_27561_and_28642_proc_is_a_link() {
    for (name, kind) in [("proc", "proc"), ("sys", "sysfs")] {
        for target in ["/tmp", "tmp", "../../tmp", "/proc2"] {
            let Some(c) = shell("echo ran", |config| {
                let root = rootfs(config);
                fs::create_dir_all(root.join("proc2/self/attr")).unwrap();
                let _ = fs::remove_dir(root.join(name));
                symlink(target, root.join(name)).unwrap();
                without_mount(config, &format!("/{name}"));
                config["mounts"]
                    .as_array_mut()
                    .unwrap()
                    .insert(0, json!({ "destination": format!("/{name}"), "type": kind, "source": kind }));
            }) else {
                return;
            };
            let done = make(&c, &["run"]).failed();
            assert!(done.out.is_empty() && done.err.contains("ordinary directory"), "{name} -> {target}: {done}");
        }
    }
}

/// The caller's line, with descriptors open and variables set that are nobody else's business.
fn careless(c: &Container, words: &str) -> Done {
    let line = format!(
        "exec {} --root {} {words} 3<{secret} 4<{secret} 5</ 6<>/dev/null 7</ 8<{secret} 9</",
        needs::built("lmrun").display(),
        c.root.display(),
        secret = c.base.join("secret").display(),
    );
    fs::write(c.base.join("secret"), SECRET).unwrap();
    c.perform(
        Command::new("bash").args(["-c", &line]).env("LEAK", SECRET).env("LISTEN_PID", "1").env("NOTIFY_SOCKET", "/x"),
    )
}

/// What a process has that it could have from its maker: descriptors, variables, capabilities, and its place.
fn belongings(pid: &str) -> (Vec<String>, Vec<String>, String) {
    let mut fds: Vec<_> = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .map(|fd| fd.unwrap().file_name().into_string().unwrap())
        .collect();
    fds.sort();
    let environ = fs::read_to_string(format!("/proc/{pid}/environ")).unwrap();
    let mut environ: Vec<_> = environ.split_terminator('\0').map(str::to_owned).collect();
    environ.sort();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let caps: Vec<_> = status.lines().filter(|line| line.starts_with("Cap")).collect();
    (fds, environ, caps.join(" "))
}

#[test]
fn nothing_leaks_into_a_container() {
    let Some(c) = container(&["sleep", "1000"], |config| {
        let sets = json!(["CAP_KILL", "CAP_CHOWN"]);
        config["process"]["capabilities"] = json!({ "bounding": sets, "effective": sets, "permitted": sets });
    }) else {
        return;
    };
    let bare = |pid: &str| {
        let (fds, environ, caps) = belongings(pid);
        assert_eq!(fds, ["0", "1", "2"], "{pid}");
        assert_eq!(environ, ["HOME=/", "PATH=/usr/local/bin:/usr/bin:/bin", "WORKLOAD=yes"]);
        let mask = "0000000000000021";
        let wanted = format!(
            "CapInh:\t0000000000000000 CapPrm:\t{mask} CapEff:\t{mask} CapBnd:\t{mask} CapAmb:\t0000000000000000"
        );
        assert_eq!(caps, wanted);
        for link in ["cwd", "root"] {
            assert_eq!(fs::read_link(format!("/proc/{pid}/{link}")).unwrap(), Path::new("/"), "{link}");
        }
    };
    let bundle = c.bundle().display().to_string();
    let pid = || state(&c)["pid"].to_string();
    careless(&c, &format!("create --bundle {bundle} {} >/dev/null 2>&1", c.id)).ok();
    careless(&c, &format!("start {}", c.id)).ok();
    bare(&pid());
    let pid_file = c.base.join("exec.pid");
    careless(&c, &format!("exec -d --pid-file {} {} sleep 1000 >/dev/null 2>&1", pid_file.display(), c.id)).ok();
    bare(&fs::read_to_string(&pid_file).unwrap());
    c.perform(c.lmrun().args(["exec", &c.id, "kill", "-9", &host_to_inside(&pid_file)])).ok();
    c.checkpoint(&Checkpoint { images: "final", ..Checkpoint::default() }).ok();
    let images = c.images("final").display().to_string();
    careless(&c, &format!("restore -d --bundle {bundle} --image-path {images} {} >/dev/null 2>&1", c.id)).ok();
    bare(&pid());
    c.perform(c.lmrun().args(["delete", "--force", &c.id])).ok();
    careless(&c, &format!("run -d --bundle {bundle} {} >/dev/null 2>&1", c.id)).ok();
    bare(&pid());
}

/// A process's pid in its own namespace.
fn host_to_inside(pid_file: &Path) -> String {
    let status = fs::read_to_string(format!("/proc/{}/status", fs::read_to_string(pid_file).unwrap())).unwrap();
    let pids = status.lines().find(|line| line.starts_with("NSpid:")).unwrap();
    pids.split_whitespace().last().unwrap().to_owned()
}

#[test]
fn nothing_leaks_into_hooks() {
    let inside = "ls /proc/self/fd > /inside; env >> /inside";
    let Some(c) = shell("cat /inside", |config| {
        let outside = rootfs(config).parent().unwrap().join("outside");
        let line = format!("ls /proc/self/fd > {0}; env >> {0}", outside.display());
        config["hooks"]["createRuntime"] =
            json!([{ "path": "/bin/sh", "args": ["sh", "-c", line], "env": ["PATH=/usr/bin:/bin"] }]);
        config["hooks"]["startContainer"] =
            json!([{ "path": "/bin/sh", "args": ["sh", "-c", inside], "env": ["PATH=/bin"] }]);
    }) else {
        return;
    };
    let done = careless(&c, &format!("run --bundle {} {}", c.bundle().display(), c.id)).ok();
    let outside = fs::read_to_string(c.bundle().join("outside")).unwrap();
    for (hook, text) in [("startContainer", &done.out), ("createRuntime", &outside)] {
        // 3 is the directory that ls reads.
        let fds: Vec<_> = text.lines().take_while(|line| line.parse::<u32>().is_ok()).collect();
        assert_eq!(fds, ["0", "1", "2", "3"], "{hook}: {text}");
        assert!(!text.contains(SECRET) && !text.contains("LEAK") && !text.contains("NOTIFY_SOCKET"), "{text}");
    }
}

/// Ends as an error does, not as a program that fell over.
#[track_caller]
fn refused(c: &Container, done: &Done, what: &str) {
    let code = done.status.and_then(|status| status.code());
    assert_eq!(code, Some(1), "{what}: {done}");
    assert!(!done.err.contains("panicked") && done.err.starts_with("lmrun: "), "{what}: {done}");
    assert!(!c.root.join(&c.id).exists(), "{what} left something behind");
}

#[test]
fn hostile_bundles_are_refused_with_words() {
    let Some(c) = shell("true", |_| ()) else { return };
    let path = c.bundle().join("config.json");
    let plain: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let deep = format!("{}{}", "[".repeat(200_000), "]".repeat(200_000));
    let texts: [(&str, Vec<u8>); 8] = [
        ("nothing", Vec::new()),
        ("no object", b"[]".to_vec()),
        ("torn", b"{\"ociVersion\": \"1.0.2\", ".to_vec()),
        ("deep", deep.into_bytes()),
        ("no UTF-8", b"{\"ociVersion\": \"1.0.\xff\"}".to_vec()),
        ("NUL", b"\0\0\0\0".to_vec()),
        ("great number", plain.to_string().replace("4096", "1e999").into_bytes()),
        ("greater number", plain.to_string().replace("4096", "18446744073709551616").into_bytes()),
    ];
    for (what, text) in texts {
        fs::write(&path, text).unwrap();
        refused(&c, &make(&c, &["create"]), what);
    }
    let nul = "a\0b";
    let long = "x".repeat(1 << 20);
    let places: [(&str, Value); 30] = [
        ("/process/args/0", json!(nul)),
        ("/process/args", json!([])),
        ("/process/args", json!([""])),
        ("/process/cwd", json!(nul)),
        ("/process/cwd", json!(long)),
        ("/process/rlimits/0/type", json!("RLIMIT_BOGUS")),
        ("/process/rlimits/0", json!({ "type": "RLIMIT_NOFILE", "soft": 9, "hard": 8 })),
        ("/process/user/uid", json!(-1)),
        ("/process/user/uid", json!(1_u64 << 40)),
        ("/root/path", json!(nul)),
        ("/root/path", json!("")),
        ("/root/path", json!("/proc/self/fd/0")),
        ("/root/path", json!("nowhere")),
        ("/hostname", json!(long)),
        ("/mounts/0/destination", json!(nul)),
        ("/mounts/0/destination", json!(long)),
        ("/mounts/0/type", json!(nul)),
        ("/mounts/0/type", json!("bogus")),
        ("/mounts/0/source", json!(nul)),
        ("/mounts/1/options/0", json!(nul)),
        ("/mounts/1/options/0", json!("size=bogus")),
        ("/linux/namespaces/0/path", json!("/nowhere")),
        ("/linux/namespaces/0/path", json!("/proc/self/ns/net")),
        ("/linux/namespaces/0/type", json!("bogus")),
        ("/linux/cgroupsPath", json!("/../../..")),
        ("/linux/cgroupsPath", json!("/")),
        ("/linux/cgroupsPath", json!(nul)),
        ("/linux/cgroupsPath", json!(long)),
        ("/linux/resources/devices/0/access", json!(long)),
        ("/ociVersion", json!("9.9.9")),
    ];
    for (place, value) in places {
        let mut config = plain.clone();
        let (parent, name) = place.rsplit_once('/').unwrap();
        match config.pointer_mut(parent).unwrap() {
            Value::Array(list) => list[name.parse::<usize>().unwrap()] = value.clone(),
            object => object[name] = value.clone(),
        }
        fs::write(&path, config.to_string()).unwrap();
        let shown: String = value.to_string().chars().take(40).collect();
        if place == "/linux/resources/devices/0/access" {
            // Letters that mean nothing are no access: it need not fail, but not fall over either.
            let done = make(&c, &["create"]);
            assert!(!done.err.contains("panicked"), "{done}");
            c.perform(c.lmrun().args(["delete", "--force", &c.id])).ok();
            continue;
        }
        refused(&c, &make(&c, &["create"]), &format!("{place} = {shown}"));
    }
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    refused(&c, &make(&c, &["create"]), "a directory");
}

#[test]
fn hostile_arguments_are_refused_with_words() {
    use std::os::unix::ffi::OsStrExt;
    let Some(c) = shell("true", |_| ()) else { return };
    let long = "x".repeat(2000);
    let not_text = std::ffi::OsStr::from_bytes(b"a\xff");
    let ids = ["..", ".", "a/b", "../x", "/etc", "", "a b", "a\nb", "ä", &long].map(std::ffi::OsStr::new);
    for id in ids.into_iter().chain([not_text]) {
        for words in [
            &["state"][..],
            &["create", "--bundle"],
            &["start"],
            &["delete"],
            &["pause"],
            &["kill"],
            &["ps"],
            &["exec"],
        ] {
            let mut command = c.lmrun();
            command.args(words);
            if words.len() > 1 {
                command.arg(c.bundle());
            }
            command.arg("--").arg(id);
            if words[0] == "exec" {
                command.arg("true");
            }
            let done = c.perform(&mut command);
            assert!(!done.succeeded() && !done.err.contains("panicked") && !done.err.is_empty(), "{id:?}: {done}");
            assert!(
                done.status.and_then(|status| status.code()).is_some_and(|code| [1, 2, 255].contains(&code)),
                "{done}"
            );
        }
    }
    assert!(fs::read_dir(&c.root).map_or(0, Iterator::count) == 0, "nothing was made");
    make(&c, &["create"]).ok();
    for words in [
        &["kill", "ID", "99999999999"][..],
        &["kill", "ID", "-5"],
        &["kill", "ID", "SIGBOGUS"],
        &["exec", "--user", "99999999999", "ID", "true"],
        &["exec", "--user", "a:b", "ID", "true"],
        &["exec", "--cwd", "relative", "ID", "true"],
        &["exec", "--cap", "CAP_BOGUS_", "--env", "", "ID", "/nothing"],
        &["exec", "--process", "/dev/null", "ID"],
        &["exec", "--process", "/nowhere", "ID"],
        &["exec", "--process", "/", "ID"],
        &["exec", "--preserve-fds", "4294967295", "ID", "true"],
        &["update", "--memory", "99999999999999999999", "ID"],
        &["update", "--memory", "nan", "ID"],
        &["update", "--resources", "/dev/null", "ID"],
        &["update", "--cpuset-cpus", "0-99999999999", "ID"],
        &["events", "--interval", "-1s", "ID"],
        &["checkpoint", "--image-path", "/proc/self/nowhere", "ID"],
        &["restore", "--bundle", "/nowhere", "--image-path", "/nowhere", "other"],
        &["ps", "--format", "bogus", "ID"],
        &["spec", "--bundle", "/nowhere"],
        &["list", "--format", "bogus"],
    ] {
        let words = words.iter().map(|word| if *word == "ID" { c.id.as_str() } else { word });
        let done = c.perform(c.lmrun().args(words));
        assert!(!done.succeeded() && !done.err.contains("panicked") && !done.err.is_empty(), "{done}");
        assert!(done.status.and_then(|status| status.code()).is_some(), "{done}");
    }
}

/// The root may be a link to it, as with runc; a container lives where it leads.
#[test]
fn a_root_that_is_a_link_is_followed_once() {
    let Some(c) = shell("echo ran", |config| {
        let root = rootfs(config);
        let link = root.parent().unwrap().join("link");
        symlink(&root, &link).unwrap();
        config["root"]["path"] = json!(link);
    }) else {
        return;
    };
    assert_eq!(make(&c, &["run"]).ok().out, "ran\n");
    // A device is no root.
    let mut options = File::options();
    options.write(true).create(true).custom_flags(libc::O_EXCL).open(c.bundle().join("plain")).unwrap();
    let path = c.bundle().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["root"]["path"] = json!(c.bundle().join("plain"));
    fs::write(&path, config.to_string()).unwrap();
    refused(&c, &make(&c, &["create"]), "a file for a root");
}
