//! What config.json asks for, looked at from inside: the parts of the runtime specification that the OCI validation suite
//! leaves out.

use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{MetadataExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;

use lmrun::sys::fdpass;
use runtime_tests::bundle::Shape;
use runtime_tests::command::Done;
use runtime_tests::container::Container;
use runtime_tests::needs;
use serde_json::{Value, json};

/// A container with busybox in it that runs `script`, its config.json edited with the bundle's path. None where that
/// cannot be.
fn shell(script: &str, edit: impl FnOnce(&mut Value, &Path)) -> Option<Container> {
    if !needs::root() {
        return None;
    }
    let Some(busybox) = needs::on_path("busybox") else {
        needs::skip("busybox");
        return None;
    };
    let args = ["/bin/sh", "-c", script].map(str::to_owned).to_vec();
    let container = Container::new(&Shape { args, ..Shape::default() });
    let bin = container.bundle().join("rootfs/bin");
    fs::create_dir(&bin).unwrap();
    fs::copy(busybox, bin.join("busybox")).unwrap();
    for name in ["sh", "cat", "grep", "ls", "stat", "mkdir", "touch", "sleep", "hostname", "mount", "umount", "awk"] {
        symlink("busybox", bin.join(name)).unwrap();
    }
    let path = container.bundle().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    edit(&mut config, &container.bundle());
    fs::write(path, config.to_string()).unwrap();
    Some(container)
}

fn run(container: &Container) -> Done {
    let mut command = container.lmrun();
    command.arg("run").arg("--bundle").arg(container.bundle());
    container.perform(command.arg(&container.id))
}

fn add_mount(config: &mut Value, mount: Value) {
    config["mounts"].as_array_mut().unwrap().push(mount);
}

/// A directory of the host with `inside` in it.
fn volume(bundle: &Path, name: &str, inside: &str) -> std::path::PathBuf {
    let dir = bundle.join(name);
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("file"), inside).unwrap();
    dir
}

#[test]
fn a_bind_mount_gets_its_attributes() {
    let script = "grep ' /ro ' /proc/self/mountinfo; cat /ro/file /one; touch /ro/new";
    let Some(c) = shell(script, |config, bundle| {
        let dir = volume(bundle, "volume", "here\n");
        let options = json!(["bind", "ro", "nosuid", "nodev", "noexec", "noatime"]);
        add_mount(config, json!({ "destination": "/ro", "type": "bind", "source": dir, "options": options }));
        // Relative to the bundle; onto a file that is not there.
        add_mount(config, json!({ "destination": "/one", "source": "volume/file", "options": ["rbind"] }));
    }) else {
        return;
    };
    let done = run(&c).failed();
    assert!(done.out.contains("ro,nosuid,nodev,noexec,noatime - "), "{done}");
    assert!(done.out.ends_with("here\nhere\n"), "{done}");
    assert!(done.err.contains("Read-only file system"), "{done}");
}

#[test]
fn attributes_reach_what_lies_below_when_asked() {
    let script = "touch /plain/sub/a && echo plain; touch /deep/sub/b || echo deep";
    let Some(c) = shell(script, |config, bundle| {
        let dir = volume(bundle, "volume", "");
        fs::create_dir(dir.join("sub")).unwrap();
        for (at, options) in [("/plain", json!(["rbind", "ro"])), ("/deep", json!(["rbind", "rro"]))] {
            add_mount(config, json!({ "destination": at, "source": dir, "options": options }));
        }
        let mounted = dir.join("sub");
        runtime_tests::command::tool(&format!("mount -t tmpfs lmrun-test {}", mounted.display()));
    }) else {
        return;
    };
    let done = run(&c);
    runtime_tests::command::tool(&format!("umount {}", c.bundle().join("volume/sub").display()));
    assert_eq!(done.out, "plain\ndeep\n", "{done}");
}

#[test]
fn propagation_is_what_was_asked_for() {
    let script = "grep -E ' /(shared|slave|private) ' /proc/self/mountinfo";
    let Some(c) = shell(script, |config, bundle| {
        let dir = volume(bundle, "volume", "");
        for word in ["shared", "slave", "private"] {
            let options = json!(["rbind", format!("r{word}")]);
            add_mount(config, json!({ "destination": format!("/{word}"), "source": dir, "options": options }));
        }
        config["linux"]["rootfsPropagation"] = json!("rslave");
    }) else {
        return;
    };
    let done = run(&c).ok();
    let line = |word: &str| done.out.lines().find(|line| line.contains(&format!(" /{word} "))).unwrap_or_default();
    assert!(line("shared").contains(" shared:"), "{done}");
    assert!(!line("private").contains("shared:") && !line("private").contains("master:"), "{done}");
}

#[test]
fn ids_are_mapped_on_one_mount() {
    let Some(c) = shell("stat -c '%u %g' /mapped/file /plain/file", |config, bundle| {
        let dir = volume(bundle, "volume", "");
        let mapping = json!([{ "containerID": 0, "hostID": 5000, "size": 10 }]);
        add_mount(config, json!({ "destination": "/plain", "source": dir, "options": ["bind"] }));
        add_mount(
            config,
            json!({ "destination": "/mapped", "source": dir, "options": ["bind", "idmap"],
                "uidMappings": mapping, "gidMappings": mapping }),
        );
    }) else {
        return;
    };
    let done = run(&c);
    if done.err.contains("Invalid argument") {
        return needs::skip("mapped ids: the file system of the temporary directory has none");
    }
    assert_eq!(done.out, "5000 5000\n0 0\n", "{done}");
}

#[test]
fn nothing_is_mounted_out_of_the_root_or_over_proc() {
    for (destination, why) in [("/proc/sys", "is inside /proc"), ("/link", "is inside /proc")] {
        let Some(c) = shell("true", |config, bundle| {
            let dir = volume(bundle, "volume", "");
            symlink("/proc/sys", bundle.join("rootfs/link")).unwrap();
            add_mount(config, json!({ "destination": destination, "source": dir, "options": ["rbind"] }));
        }) else {
            return;
        };
        let done = run(&c).failed();
        assert!(done.err.contains(why), "{done}");
    }
    // A link that leads out of the root leads to its top.
    let Some(c) = shell("cat /escape/in/file", |config, bundle| {
        let dir = volume(bundle, "volume", "inside\n");
        fs::create_dir(bundle.join("rootfs/in")).unwrap();
        symlink("../../../../../..", bundle.join("rootfs/escape")).unwrap();
        add_mount(config, json!({ "destination": "/escape/in", "source": dir, "options": ["rbind"] }));
    }) else {
        return;
    };
    assert_eq!(run(&c).ok().out, "inside\n");
}

#[test]
fn proc_is_not_mounted_where_a_link_leads() {
    let Some(c) = shell("true", |_, bundle| {
        let rootfs = bundle.join("rootfs");
        fs::remove_dir(rootfs.join("proc")).unwrap();
        symlink("/tmp", rootfs.join("proc")).unwrap();
    }) else {
        return;
    };
    let done = run(&c).failed();
    assert!(done.err.contains("ordinary directory"), "{done}");
}

#[test]
fn cgroups_are_read_only_when_asked() {
    let script = "for d in /sys/fs/cgroup /sys/fs/cgroup/*; do [ -d $d ] && mkdir $d/x; done; echo there";
    let Some(c) = shell(script, |config, _| {
        let mount =
            |kind: &str, at: &str| json!({ "destination": at, "type": kind, "source": kind, "options": ["ro"] });
        add_mount(config, mount("sysfs", "/sys"));
        add_mount(config, mount("cgroup", "/sys/fs/cgroup"));
    }) else {
        return;
    };
    let done = run(&c).ok();
    assert_eq!(done.out, "there\n");
    assert!(!done.err.is_empty() && done.err.lines().all(|line| line.contains("Read-only")), "{done}");
}

#[test]
fn a_process_is_what_it_is_said_to_be() {
    let script = "cat /proc/self/timens_offsets; hostname; cat /proc/sys/kernel/domainname; umask; awk '{print $19}' /proc/self/stat; \
        grep -E 'Groups|^Uid' /proc/self/status; cat /proc/self/oom_score_adj; ulimit -c; cat /proc/sys/net/ipv4/ip_forward";
    let Some(c) = shell(script, |config, _| {
        config["hostname"] = json!("inside");
        config["domainname"] = json!("example.org");
        let process = &mut config["process"];
        process["user"] = json!({ "uid": 1000, "gid": 1000, "umask": 0o27, "additionalGids": [5, 7] });
        process["scheduler"] = json!({ "policy": "SCHED_BATCH", "nice": 7 });
        process["ioPriority"] = json!({ "class": "IOPRIO_CLASS_IDLE", "priority": 0 });
        process["oomScoreAdj"] = json!(321);
        process["rlimits"] = json!([{ "type": "RLIMIT_CORE", "soft": 0, "hard": 0 }]);
        config["linux"]["sysctl"] = json!({ "net.ipv4.ip_forward": "1" });
        config["linux"]["namespaces"].as_array_mut().unwrap().push(json!({ "type": "time" }));
        config["linux"]["timeOffsets"] =
            json!({ "monotonic": { "secs": 100, "nanosecs": 5 }, "boottime": { "secs": 200 } });
    }) else {
        return;
    };
    let done = run(&c).ok();
    let words: Vec<&str> = done.out.split_whitespace().collect();
    let expected =
        "monotonic 100 5 boottime 200 0 inside example.org 0027 7 Uid: 1000 1000 1000 1000 Groups: 5 7 321 0 1";
    assert_eq!(words.join(" "), expected, "{done}");
}

#[test]
fn a_poststart_hook_that_fails_is_what_the_version_says() {
    for (version, ends) in [("1.0.2", false), ("1.3.0", true)] {
        let Some(c) = shell("sleep 100", |config, _| {
            config["ociVersion"] = json!(version);
            config["hooks"] = json!({ "poststart": [{ "path": "/bin/false" }] });
        }) else {
            return;
        };
        let mut command = c.lmrun();
        c.perform(command.arg("create").arg("--bundle").arg(c.bundle()).arg(&c.id)).ok();
        let started = c.simple("start");
        assert_eq!(started.succeeded(), !ends, "{version}: {started}");
        assert_eq!(c.simple("state").succeeded(), !ends, "{version}");
    }
}

/// include/uapi/linux/seccomp.h: _IOWR('!', 0, 80 bytes) and _IOWR('!', 1, 24 bytes).
const NOTIF_RECV: libc::c_ulong = 0xc050_2100;
const NOTIF_SEND: libc::c_ulong = 0xc018_2101;

#[test]
fn a_seccomp_agent_answers() {
    let Some(c) = shell("mkdir /tmp/x; mkdir /tmp/y", |config, bundle| {
        config["process"]["noNewPrivileges"] = json!(true);
        config["annotations"] = json!({ "a": "b" });
        config["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64"],
            "listenerPath": bundle.join("agent.sock"),
            "listenerMetadata": "what for",
            "syscalls": [{ "names": ["mkdir"], "action": "SCMP_ACT_NOTIFY" }],
        });
    }) else {
        return;
    };
    let listener = UnixListener::bind(c.bundle().join("agent.sock")).unwrap();
    let agent = std::thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut buffer = [0; 8192];
        let (length, fds) = fdpass::receive(stream.as_fd(), &mut buffer).unwrap();
        let said: Value = serde_json::from_slice(&buffer[..length]).unwrap();
        let mut pids = Vec::new();
        for _ in 0..2 {
            // struct seccomp_notif: id, pid, ...; struct seccomp_notif_resp: id, value, error, flags.
            let mut asked = [0_u64; 10];
            // SAFETY: the kernel fills a structure of the size that the request names.
            let got = unsafe { libc::ioctl(fds[0].as_raw_fd(), NOTIF_RECV, asked.as_mut_ptr()) };
            assert_eq!(got, 0);
            pids.push(asked[1] as u32);
            let mut answer = [asked[0], 0, u64::from(-(libc::EXDEV) as u32)];
            // SAFETY: as above.
            assert_eq!(unsafe { libc::ioctl(fds[0].as_raw_fd(), NOTIF_SEND, answer.as_mut_ptr()) }, 0);
        }
        (said, pids)
    });
    let done = run(&c).failed();
    assert_eq!(done.err.matches("Invalid cross-device link").count(), 2, "{done}");
    let (said, pids) = agent.join().unwrap();
    assert_eq!((&said["fds"], &said["metadata"]), (&json!(["seccompFd"]), &json!("what for")));
    assert_eq!((&said["state"]["id"], &said["state"]["annotations"]["a"]), (&json!(c.id), &json!("b")));
    assert!(said["pid"].as_i64().is_some_and(|pid| pid > 1) && pids.iter().all(|pid| *pid > 1), "{said} {pids:?}");
}

#[test]
fn an_agent_that_is_not_there_is_missed_before_anything_runs() {
    let Some(c) = shell("echo ran", |config, bundle| {
        config["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "listenerPath": bundle.join("nobody.sock"),
            "syscalls": [{ "names": ["mkdir"], "action": "SCMP_ACT_NOTIFY" }],
        });
    }) else {
        return;
    };
    let done = run(&c).failed();
    assert!(done.err.contains("nobody.sock") && done.out.is_empty(), "{done}");
}

/// The containers' own programs and files do not lead lmrun astray: CVE-2025-31133 (a link where /dev/null is to be),
/// CVE-2024-21626 (a working directory from outside).
#[test]
fn attacks_that_are_known() {
    let Some(c) = shell("cat /proc/timer_list; echo end", |config, bundle| {
        // /dev/null of the image is a link to something of the host's.
        config["mounts"].as_array_mut().unwrap().retain(|mount| mount["destination"] != "/dev");
        let dev = bundle.join("rootfs/dev");
        fs::write(bundle.join("rootfs/prey"), "prey\n").unwrap();
        symlink("/prey", dev.join("null")).unwrap();
        config["linux"]["maskedPaths"] = json!(["/proc/timer_list"]);
    }) else {
        return;
    };
    let done = run(&c);
    assert!(!done.out.contains("prey"), "{done}");

    // The image's /dev is a link to a directory of the host.
    let Some(c) = shell("true", |config, bundle| {
        config["mounts"].as_array_mut().unwrap().retain(|mount| mount["destination"] == "/proc");
        let dev = bundle.join("rootfs/dev");
        fs::remove_dir(&dev).unwrap();
        symlink(volume(bundle, "hosts", ""), dev).unwrap();
    }) else {
        return;
    };
    run(&c).failed();
    assert_eq!(fs::read_dir(c.bundle().join("hosts")).unwrap().count(), 1, "nothing was made there");

    for cwd in ["/proc/self/fd/7", "/proc/self/fd/8", "/proc/self/fd/9"] {
        let Some(c) = shell("ls ../../../etc/hostname", |config, _| config["process"]["cwd"] = json!(cwd)) else {
            return;
        };
        let done = run(&c).failed();
        assert_eq!(done.out, "", "{done}");
    }
}

#[test]
fn masked_and_read_only_paths() {
    let script = "cat /proc/timer_list; ls /masked; touch /kept/x; cat /kept/file; cat /gone";
    let Some(c) = shell(script, |config, bundle| {
        for name in ["masked", "kept"] {
            let dir = bundle.join("rootfs").join(name);
            fs::create_dir(&dir).unwrap();
            fs::write(dir.join("file"), "kept\n").unwrap();
        }
        config["linux"]["maskedPaths"] = json!(["/proc/timer_list", "/masked", "/gone"]);
        config["linux"]["readonlyPaths"] = json!(["/kept", "/gone"]);
    }) else {
        return;
    };
    let done = run(&c).failed();
    assert_eq!(done.out, "kept\n", "{done}");
    assert!(done.err.contains("/kept/x: Read-only"), "{done}");
}

#[test]
fn devices_are_made_and_allowed() {
    let Some(c) =
        shell("stat -c '%t:%T %a %u:%g' /dev/mine /dev/null; cat /dev/mine; echo >/dev/sub/other", |config, _| {
            config["linux"]["devices"] = json!([
                { "path": "/dev/mine", "type": "c", "major": 1, "minor": 3, "fileMode": 0o640, "uid": 7, "gid": 8 },
                { "path": "/dev/sub/other", "type": "c", "major": 1, "minor": 8, "fileMode": 0o666 },
            ]);
            config["linux"]["resources"]["devices"] = json!([
                { "allow": false, "access": "rwm" },
                { "allow": true, "type": "c", "major": 1, "minor": 3, "access": "rwm" },
            ]);
        })
    else {
        return;
    };
    let done = run(&c).ok();
    assert_eq!(done.out, "1:3 640 7:8\n1:3 666 0:0\n", "{done}");
}

#[test]
fn a_root_of_ones_own_can_be_used_again() {
    let Some(c) = shell("echo again > /dev/null && echo ran", |config, _| {
        config["mounts"].as_array_mut().unwrap().retain(|mount| mount["destination"] == "/proc");
    }) else {
        return;
    };
    for _ in 0..2 {
        assert_eq!(run(&c).ok().out, "ran\n");
    }
    let null = fs::metadata(c.bundle().join("rootfs/dev/null")).unwrap();
    assert_eq!(null.rdev(), libc::makedev(1, 3));
}
