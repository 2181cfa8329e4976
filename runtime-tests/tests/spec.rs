//! What the runtime specification names and neither the OCI validation suite nor `oci.rs` looks at.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

use lmrun::sys::fdpass;
use runtime_tests::command::Done;
use runtime_tests::container::Container;
use runtime_tests::needs;
use runtime_tests::network::Namespace;
use runtime_tests::shell::{make, shell, state};
use serde_json::{Value, json};

/// Runs `script` in a container with this config.json, to its end.
fn run(script: &str, edit: impl FnOnce(&mut Value)) -> Option<Done> {
    shell(script, edit).map(|c| make(&c, &["run"]))
}

/// A running container.
fn running(edit: impl FnOnce(&mut Value)) -> Option<Container> {
    let c = shell("sleep 1000", edit)?;
    make(&c, &["run", "-d"]).ok();
    Some(c)
}

fn exec(c: &Container, options: &[&str], script: &str) -> Done {
    c.perform(c.lmrun().arg("exec").args(options).args([&c.id, "sh", "-c", script]))
}

#[test]
fn a_personality_has_flags() {
    let flags = |flags: Value| {
        move |config: &mut Value| config["linux"]["personality"] = json!({ "domain": "LINUX32", "flags": flags })
    };
    let script = "cat /proc/self/personality; busybox uname -m";
    let Some(done) = run(script, flags(json!(["ADDR_NO_RANDOMIZE"]))) else { return };
    assert_eq!(done.ok().out, "00040008\ni686\n");
    let Some(c) = running(flags(json!(["ADDR_NO_RANDOMIZE"]))) else { return };
    assert_eq!(exec(&c, &[], script).ok().out, "00040008\ni686\n");
    let Some(done) = run("true", flags(json!(["BOGUS"]))) else { return };
    assert!(done.failed().err.contains("BOGUS"));
}

#[test]
fn a_terminal_has_the_size_that_was_asked_for() {
    let Some(c) = shell("stty size; echo end; sleep 1000", |config| {
        config["process"]["terminal"] = json!(true);
        config["process"]["consoleSize"] = json!({ "height": 33, "width": 77 });
    }) else {
        return;
    };
    let socket = c.base.join("console.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    make(&c, &["run", "-d", "--console-socket", socket.to_str().unwrap()]).ok();
    let (stream, _) = listener.accept().unwrap();
    let (_, fds) = fdpass::receive(stream.as_fd(), &mut [0; 64]).unwrap();
    let mut master = File::from(fds.into_iter().next().unwrap());
    let mut shown = String::new();
    while !shown.contains("end") {
        let mut part = [0; 256];
        let n = master.read(&mut part).unwrap();
        shown.push_str(&String::from_utf8_lossy(&part[..n]));
    }
    assert_eq!(shown, "33 77\r\nend\r\n");
}

/// A label that nobody would check is not taken for a fence.
#[test]
fn labels_are_refused_where_nobody_checks_them() {
    let label = "system_u:system_r:container_t:s0";
    if Path::new("/sys/fs/selinux/enforce").exists() {
        return needs::skip("SELinux is enabled here");
    }
    let words = "selinux label is specified in config, but selinux is disabled or not supported";
    let Some(done) = run("true", |config| config["process"]["selinuxLabel"] = json!(label)) else { return };
    assert!(done.failed().err.contains(words));
    let Some(c) = running(|config| config["process"]["selinuxLabel"] = json!("")) else { return };
    let done = exec(&c, &["--process-label", label], "true").failed();
    assert!(done.err.contains(words), "{done}");
    // Labels of files: told, and no more (the validation suite wants it to run).
    let Some(done) = run("echo ran", |config| {
        config["linux"]["mountLabel"] = json!("system_u:object_r:container_file_t:s0");
        config["linux"]["maskedPaths"] = json!(["/tmp"]);
    }) else {
        return;
    };
    let done = done.ok();
    assert!(done.out == "ran\n" && done.err.contains("linux.mountLabel has no effect"), "{done}");
    if fs::read_to_string("/sys/module/apparmor/parameters/enabled").is_ok_and(|on| on.starts_with('Y')) {
        return needs::skip("AppArmor is enabled here");
    }
    let Some(done) = run("true", |config| config["process"]["apparmorProfile"] = json!("docker-default")) else {
        return;
    };
    assert!(done.failed().err.contains("apparmor is not enabled"));
    exec(&c, &["--apparmor", "docker-default"], "true").failed();
}

#[test]
fn without_resctrl_a_share_of_the_cache_is_refused() {
    if fs::read_to_string("/proc/self/mounts").unwrap().contains(" resctrl ") {
        return needs::skip("resctrl is mounted here");
    }
    for rdt in
        [json!({}), json!({ "closID": "gold" }), json!({ "schemata": ["L3:0=f"] }), json!({ "enableMonitoring": true })]
    {
        let Some(done) = run("true", |config| config["linux"]["intelRdt"] = rdt) else { return };
        let done = done.failed();
        assert!(done.err.contains("Intel RDT (resctrl is not mounted)"), "{done}");
    }
    let Some(done) = run("true", |config| config["linux"]["intelRdt"] = json!({ "closID": "../x" })) else { return };
    done.failed();
    let Some(c) = running(|_| ()) else { return };
    let done = c.perform(c.lmrun().args(["update", "--l3-cache-schema", "L3:0=f", &c.id])).failed();
    assert!(done.err.contains("Intel RDT"), "{done}");
}

/// A host of its own, with a device in it.
fn host_with_device(c: &mut Container) -> Namespace {
    let host = Namespace::new("devices");
    host.ip("link add d0 type veth peer name p0");
    host.ip("link set p0 up");
    host.ip("addr add 192.0.2.7/24 brd 192.0.2.255 dev d0");
    host.ip("addr add 198.51.100.1/32 dev d0");
    host.ip("addr add 2001:db8::7/64 dev d0 nodad");
    host.ip("link set d0 up");
    let path = host.path();
    c.call_through(&["nsenter", &format!("--net={}", path.display())]);
    host
}

const SHOW: &str = "busybox ip -o addr show | grep -v ' lo ' | while read n dev family address rest; do echo $dev $family $address; done; \
    busybox ip -o link show | grep -v ' lo:'";

#[test]
fn devices_of_the_host_move_in_with_their_addresses() {
    for (name, inside) in [(None, "d0"), (Some("eth7"), "eth7"), (Some("net%d"), "net0")] {
        let Some(mut c) = shell(SHOW, |config| {
            config["linux"]["netDevices"] = json!({ "d0": name.map_or(json!({}), |name| json!({ "name": name })) });
        }) else {
            return;
        };
        let host = host_with_device(&mut c);
        let done = make(&c, &["run"]).ok();
        for address in ["inet 192.0.2.7/24", "inet 198.51.100.1/32", "inet6 2001:db8::7/64"] {
            assert!(done.out.contains(&format!("{inside} {address}")), "{name:?} {address}: {done}");
        }
        assert!(done.out.contains("UP"), "{done}");
        // A virtual device ends with the namespace that it is in.
        let left = host.within(|| runtime_tests::command::tool("ip -o link show")).out;
        assert!(!left.contains(inside), "{left}");
    }
}

#[test]
fn a_device_stays_in_a_namespace_that_the_container_joins() {
    let joined = Namespace::new("joined");
    let Some(mut c) = shell(SHOW, |config| {
        let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.iter_mut().find(|ns| ns["type"] == "network").unwrap()["path"] = json!(joined.path());
        config["linux"]["netDevices"] = json!({ "d0": { "name": "eth0" } });
    }) else {
        return;
    };
    let _host = host_with_device(&mut c);
    assert!(make(&c, &["run"]).ok().out.contains("eth0 inet 192.0.2.7/24"));
    let left = joined.within(|| runtime_tests::command::tool("ip -o addr show dev eth0")).out;
    assert!(left.contains("192.0.2.7/24"), "{left}");
}

#[test]
fn a_device_that_cannot_move_is_named() {
    for (device, name, why) in [
        ("d1", "eth0", "network device \"d1\""),
        ("d0", "lo", "File exists"),
        ("d0", "a/b", "invalid"),
        ("lo", "lo1", "network device \"lo\""),
    ] {
        let Some(mut c) = shell("true", |config| config["linux"]["netDevices"] = json!({ device: { "name": name } }))
        else {
            return;
        };
        let _host = host_with_device(&mut c);
        let done = make(&c, &["run"]).failed();
        assert!(done.err.to_lowercase().contains(&why.to_lowercase()), "{device} {name}: {done}");
        c.simple("state").failed();
    }
    let Some(done) = run("true", |config| {
        config["linux"]["namespaces"].as_array_mut().unwrap().retain(|ns| ns["type"] != "network");
        config["linux"]["netDevices"] = json!({ "d0": {} });
    }) else {
        return;
    };
    done.failed();
}

#[test]
fn memory_comes_from_where_the_policy_says() {
    if !Path::new("/proc/self/numa_maps").exists() {
        return needs::skip("the kernel knows no NUMA");
    }
    let policy = |policy: Value| move |config: &mut Value| config["linux"]["memoryPolicy"] = policy;
    let bind = json!({ "mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES"] });
    let Some(c) = shell("cat /proc/self/numa_maps; sleep 1000", policy(bind)) else { return };
    make(&c, &["run", "-d"]).ok();
    let done = exec(&c, &[], "cat /proc/1/numa_maps; echo; cat /proc/self/numa_maps").ok();
    let (init, own) = done.out.split_once("\n\n").unwrap();
    for maps in [init, own] {
        assert!(maps.lines().next().is_some_and(|line| line.contains("bind=static:0")), "{maps}");
    }
    for wrong in [
        json!({ "mode": "MPOL_DEFAULT", "nodes": "0" }),
        json!({ "mode": "MPOL_BIND" }),
        json!({ "mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES", "MPOL_F_RELATIVE_NODES"] }),
        json!({ "mode": "MPOL_BOGUS" }),
    ] {
        let Some(done) = run("true", policy(wrong)) else { return };
        done.failed();
    }
}

#[test]
fn a_process_runs_on_the_cpus_it_is_given() {
    let Some(c) = running(|config| {
        config["process"]["execCPUAffinity"] = json!({ "initial": "0-1", "final": "0" });
    }) else {
        return;
    };
    let allowed = "grep Cpus_allowed_list /proc/self/status";
    assert_eq!(exec(&c, &[], allowed).ok().out, "Cpus_allowed_list:\t0\n");
    assert_ne!(exec(&c, &[], "grep Cpus_allowed_list /proc/1/status").ok().out, "Cpus_allowed_list:\t0\n");
    let file = c.base.join("process.json");
    let process = |affinity: Value| {
        let process = json!({ "cwd": "/", "env": ["PATH=/bin"], "user": { "uid": 0, "gid": 0 },
            "args": ["sh", "-c", allowed], "execCPUAffinity": affinity });
        fs::write(&file, process.to_string()).unwrap();
        c.perform(c.lmrun().arg("exec").arg("--process").arg(&file).arg(&c.id))
    };
    assert_eq!(process(json!({ "final": "1" })).ok().out, "Cpus_allowed_list:\t1\n");
    let done = process(json!({ "final": "one" })).failed();
    assert!(done.err.contains("execCPUAffinity"), "{done}");
    process(json!({ "initial": "100000" })).failed();
}

#[test]
fn a_scheduler_and_io_priority_go_to_init_and_exec() {
    let Some(c) = running(|config| {
        config["process"]["scheduler"] =
            json!({ "policy": "SCHED_BATCH", "nice": 5, "flags": ["SCHED_FLAG_RESET_ON_FORK"] });
        config["process"]["ioPriority"] = json!({ "class": "IOPRIO_CLASS_BE", "priority": 6 });
    }) else {
        return;
    };
    // proc_pid_stat(5): nice, and the policy (3: SCHED_BATCH).
    let script = "for p in 1 $$; do busybox ionice -p $p; busybox awk '{ print $19, $41 }' /proc/$p/stat; done";
    assert_eq!(exec(&c, &[], script).ok().out, "best-effort: prio 6\n5 3\n".repeat(2));
    for wrong in [
        json!({ "policy": "SCHED_OTHER", "nice": 50 }),
        json!({ "policy": "SCHED_OTHER", "priority": 5 }),
        json!({ "policy": "SCHED_OTHER", "runtime": 5 }),
        json!({ "policy": "SCHED_BOGUS" }),
    ] {
        let Some(done) = run("true", |config| config["process"]["scheduler"] = wrong) else { return };
        done.failed();
    }
    let Some(done) =
        run("true", |config| config["process"]["ioPriority"] = json!({ "class": "IOPRIO_CLASS_RT", "priority": 9 }))
    else {
        return;
    };
    done.failed();
}

#[test]
fn names_and_kernel_parameters_need_their_namespaces() {
    let without = |config: &mut Value, kind: &str| {
        config["linux"]["namespaces"].as_array_mut().unwrap().retain(|ns| ns["type"] != kind);
    };
    for (sysctl, lacks) in [
        ("net.ipv4.ip_forward", "network"),
        ("kernel.shmmax", "ipc"),
        ("fs.mqueue.msg_max", "ipc"),
        ("kernel.hostname", ""),
        ("vm.swappiness", ""),
    ] {
        let Some(done) = run("true", |config| {
            without(config, lacks);
            config["linux"]["sysctl"] = json!({ sysctl: "1" });
        }) else {
            return;
        };
        let done = done.failed();
        assert!(done.err.contains(sysctl), "{done}");
    }
    let Some(done) = run("cat /proc/sys/fs/mqueue/msg_max /proc/sys/kernel/shm_rmid_forced", |config| {
        config["linux"]["sysctl"] = json!({ "fs.mqueue.msg_max": "17", "kernel.shm_rmid_forced": "1" });
    }) else {
        return;
    };
    assert_eq!(done.ok().out, "17\n1\n");
    for name in ["hostname", "domainname"] {
        let Some(done) = run("true", |config| {
            without(config, "uts");
            config.as_object_mut().unwrap().remove("hostname");
            config[name] = json!("inside");
        }) else {
            return;
        };
        done.failed();
    }
}

#[test]
fn offsets_of_clocks_are_seen_and_must_be_possible() {
    let offsets = |namespace: Option<Value>| {
        move |config: &mut Value| {
            config["linux"]["namespaces"].as_array_mut().unwrap().extend(namespace);
            config["linux"]["timeOffsets"] = json!({ "boottime": { "secs": 1_000_000_000 } });
        }
    };
    let Some(done) = run("cat /proc/uptime", offsets(Some(json!({ "type": "time" })))) else { return };
    let uptime: f64 = done.ok().out.split(' ').next().unwrap().parse().unwrap();
    assert!(uptime > 1e9, "{uptime}");
    for namespace in [None, Some(json!({ "type": "time", "path": "/proc/self/ns/time" }))] {
        let Some(done) = run("true", offsets(namespace)) else { return };
        done.failed();
    }
}

#[test]
fn a_tmpfs_begins_with_what_the_image_has_there() {
    let Some(c) =
        shell("cat /etc/kept /etc/sub/link; busybox stat -c '%a %u' /etc/kept; echo x > /etc/new", |config| {
            let rootfs = Path::new(config["root"]["path"].as_str().unwrap()).to_owned();
            fs::create_dir_all(rootfs.join("etc/sub")).unwrap();
            fs::write(rootfs.join("etc/kept"), "kept\n").unwrap();
            fs::set_permissions(rootfs.join("etc/kept"), PermissionsExt::from_mode(0o640)).unwrap();
            std::os::unix::fs::chown(rootfs.join("etc/kept"), Some(7), None).unwrap();
            std::os::unix::fs::symlink("../kept", rootfs.join("etc/sub/link")).unwrap();
            let mount =
                json!({ "destination": "/etc", "type": "tmpfs", "source": "tmpfs", "options": ["rw", "tmpcopyup"] });
            config["mounts"].as_array_mut().unwrap().push(mount);
        })
    else {
        return;
    };
    assert_eq!(make(&c, &["run"]).ok().out, "kept\nkept\n640 7\n");
    assert!(!c.bundle().join("rootfs/etc/new").exists());
}

#[test]
fn the_root_propagates_as_it_is_told() {
    for (word, tags) in [("shared", "shared:"), ("rshared", "shared:"), ("private", ""), ("unbindable", "unbindable")] {
        let Some(done) = run("grep ' / / \\| / ' /proc/self/mountinfo", |config| {
            config["linux"]["rootfsPropagation"] = json!(word);
        }) else {
            return;
        };
        let done = done.ok();
        let root = done.out.lines().find(|line| line.split(' ').nth(4) == Some("/")).unwrap_or_default();
        let optional = root.split(" - ").next().unwrap().split(' ').skip(6).collect::<Vec<_>>().join(" ");
        assert!(optional.contains(tags) && (!tags.is_empty() || optional.is_empty()), "{word}: {root}");
    }
    let Some(done) = run("true", |config| config["linux"]["rootfsPropagation"] = json!("bogus")) else { return };
    assert!(done.failed().err.contains("bogus"));
}

/// A hook of the host, which writes down what it reads and where it runs.
fn told(dir: &Path, name: &str) -> Value {
    let script = dir.join(name);
    let log = dir.join(format!("{name}.log"));
    let text = format!(
        "#!/bin/sh\n{{ cat; echo; for ns in mnt net pid; do readlink /proc/self/ns/$ns; done; echo $0 $1 $A; }} > {}\n",
        log.display()
    );
    fs::write(&script, text).unwrap();
    fs::set_permissions(&script, PermissionsExt::from_mode(0o755)).unwrap();
    json!([{ "path": script, "args": [script, "argument"], "env": ["PATH=/usr/bin:/bin", "A=from-config"], "timeout": 30 }])
}

#[test]
fn hooks_are_told_the_state_and_run_where_they_belong() {
    let kinds = ["prestart", "createRuntime", "createContainer", "poststart", "poststop"];
    let Some(c) = shell("sleep 1000", |config| {
        let dir = Path::new(config["root"]["path"].as_str().unwrap()).parent().unwrap().to_owned();
        for kind in kinds {
            config["hooks"][kind] = told(&dir, kind);
        }
        let inside = "{ cat; echo; for ns in mnt net pid; do readlink /proc/self/ns/$ns; done; echo $0 $1 $A; } > /startContainer.log";
        config["hooks"]["startContainer"] = json!([{ "path": "/bin/sh", "args": ["sh", "-c", inside, "hook", "argument"], "env": ["A=from-config", "PATH=/bin"] }]);
        config["annotations"] = json!({ "org.example": "value" });
    }) else {
        return;
    };
    make(&c, &["create"]).ok();
    let log = |kind: &str| {
        let dir = if kind == "startContainer" { c.bundle().join("rootfs") } else { c.bundle() };
        fs::read_to_string(dir.join(format!("{kind}.log")))
    };
    for (kind, ran) in [
        ("prestart", true),
        ("createRuntime", true),
        ("createContainer", true),
        ("startContainer", false),
        ("poststart", false),
    ] {
        assert_eq!(log(kind).is_ok(), ran, "{kind} after create");
    }
    let pid = state(&c)["pid"].as_i64().unwrap();
    let namespace =
        |of: &str, kind: &str| fs::read_link(format!("/proc/{of}/ns/{kind}")).unwrap().display().to_string();
    let host = ["mnt", "net", "pid"].map(|kind| namespace("self", kind));
    let inside = ["mnt", "net", "pid"].map(|kind| namespace(&pid.to_string(), kind));
    c.simple("start").ok();
    assert!(log("poststart").is_ok() && log("startContainer").is_ok() && log("poststop").is_err());
    c.perform(c.lmrun().args(["delete", "--force", &c.id])).ok();
    for (kind, status, pid, namespaces) in [
        ("prestart", "created", Some(pid), &host),
        ("createRuntime", "created", Some(pid), &host),
        ("createContainer", "created", Some(1), &inside),
        ("startContainer", "created", None, &inside),
        ("poststart", "running", Some(pid), &host),
        ("poststop", "stopped", None, &host),
    ] {
        let log = log(kind).unwrap();
        let mut lines = log.lines();
        let state: Value = serde_json::from_str(lines.next().unwrap()).unwrap();
        assert_eq!(state["status"], json!(status), "{kind}: {log}");
        if let Some(pid) = pid {
            assert_eq!(state["pid"], json!(pid), "{kind}: {log}");
        }
        assert_eq!((&state["id"], &state["bundle"]), (&json!(c.id), &json!(c.bundle())), "{kind}: {log}");
        assert!(state["annotations"]["org.example"] == "value" && state["ociVersion"].is_string(), "{kind}: {log}");
        let seen: Vec<_> = lines.by_ref().take(3).collect();
        assert_eq!(seen, namespaces.iter().map(String::as_str).collect::<Vec<_>>(), "{kind}");
        let last = lines.next().unwrap();
        assert!(last.ends_with(" argument from-config"), "{kind}: {last}");
    }
}

#[test]
fn a_hook_that_takes_too_long_is_ended() {
    for kind in ["prestart", "createRuntime", "createContainer"] {
        let Some(done) = run("echo ran", |config| {
            config["hooks"][kind] = json!([{ "path": "/bin/sleep", "args": ["sleep", "1000"], "timeout": 1 }]);
        }) else {
            return;
        };
        let done = done.failed();
        assert!(done.out.is_empty() && done.err.contains("hook"), "{kind}: {done}");
    }
    for (hook, why) in [
        (json!({ "path": "/bin/true", "timeout": 0 }), "greater than zero"),
        (json!({ "path": "/bin/true", "timeout": -5 }), "greater than zero"),
        (json!({ "path": "bin/true" }), "not absolute"),
    ] {
        let Some(done) = run("true", |config| config["hooks"] = json!({ "poststop": [hook] })) else { return };
        let done = done.failed();
        assert!(done.err.contains(why), "{done}");
    }
}

/// A container of another user's ids.
fn mapped(config: &mut Value) {
    config["linux"]["namespaces"].as_array_mut().unwrap().push(json!({ "type": "user" }));
    for mappings in ["uidMappings", "gidMappings"] {
        config["linux"][mappings] = json!([{ "containerID": 0, "hostID": 100_000, "size": 65_536 }]);
    }
}

/// What a mount is asked to be holds in a user namespace too.
#[test]
fn mounts_are_as_asked_for_in_a_user_namespace() {
    let script = "grep ' /vol ' /proc/self/mountinfo; touch /vol/sub/x || echo refused; cat /etc/kept";
    let Some(c) = shell(script, |config| {
        mapped(config);
        let bundle = Path::new(config["root"]["path"].as_str().unwrap()).parent().unwrap().to_owned();
        fs::create_dir_all(bundle.join("vol/sub")).unwrap();
        fs::create_dir_all(bundle.join("rootfs/etc")).unwrap();
        fs::write(bundle.join("rootfs/etc/kept"), "kept\n").unwrap();
        runtime_tests::command::tool(&format!("chown -R 100000:100000 {}", bundle.join("rootfs").display()));
        let mounts = config["mounts"].as_array_mut().unwrap();
        mounts.push(
            json!({ "destination": "/vol", "source": bundle.join("vol"), "options": ["rbind", "rro", "rshared"] }),
        );
        mounts.push(json!({ "destination": "/etc", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup"] }));
    }) else {
        return;
    };
    runtime_tests::command::tool(&format!("mount -t tmpfs none {}", c.bundle().join("vol/sub").display()));
    let done = make(&c, &["run"]);
    runtime_tests::command::tool(&format!("umount {}", c.bundle().join("vol/sub").display()));
    let done = done.ok();
    assert!(
        done.out.contains(" shared:")
            && done.out.contains(" ro")
            && done.out.contains("refused")
            && done.out.contains("kept"),
        "{done}"
    );
}

/// A file of the host's root, once as it is and twice as one of the container's root: by a mapping of the mount's, and by the
/// container's own.
#[test]
fn ids_are_mapped_on_a_mount_in_a_user_namespace() {
    let Some(done) = run("busybox stat -c %u /plain/file /vol/file /own/file", |config| {
        mapped(config);
        let root = std::path::Path::new(config["root"]["path"].as_str().unwrap()).to_owned();
        let volume = root.with_file_name("volume");
        fs::create_dir(&volume).unwrap();
        fs::write(volume.join("file"), "").unwrap();
        let mapping = json!([{ "containerID": 0, "hostID": 100_000, "size": 10 }]);
        for (at, options) in
            [("vol", json!(["bind", "idmap"])), ("own", json!(["bind", "idmap"])), ("plain", json!(["bind"]))]
        {
            fs::create_dir(root.join(at)).unwrap();
            let mut mount = json!({ "destination": format!("/{at}"), "source": volume, "options": options });
            if at == "vol" {
                mount["uidMappings"] = mapping.clone();
                mount["gidMappings"] = mapping.clone();
            }
            config["mounts"].as_array_mut().unwrap().push(mount);
        }
    }) else {
        return;
    };
    if done.err.contains("Invalid argument") {
        return needs::skip("mapped ids: the file system of the temporary directory has none");
    }
    assert_eq!(done.out, "65534\n0\n0\n", "{done}");
}

fn features() -> Value {
    let mut command = std::process::Command::new(needs::built("lmrun"));
    let done = runtime_tests::command::run(command.arg("features"), std::time::Duration::from_secs(20)).ok();
    serde_json::from_str(&done.out).unwrap()
}

/// What `features` says is what config.json may say.
#[test]
fn every_mount_option_that_is_named_is_taken() {
    let all = features()["mountOptions"].as_array().unwrap().clone();
    assert!(all.len() > 60, "{all:?}");
    let mut places = Vec::new();
    let Some(c) = shell("busybox awk '{ print $5 }' /proc/self/mountinfo", |config| {
        let mounts = config["mounts"].as_array_mut().unwrap();
        for option in all.iter().filter_map(Value::as_str) {
            let at = format!("/options/{option}");
            let new = json!({ "destination": at, "type": "tmpfs", "source": "tmpfs", "options": [option] });
            let bound = json!({ "destination": at, "source": "/tmp", "options": ["bind", option] });
            match option {
                "bind" | "rbind" => mounts.push(bound),
                "idmap" | "ridmap" => {
                    let mapping = json!([{ "containerID": 0, "hostID": 0, "size": 10 }]);
                    let mut mapped = bound;
                    (mapped["uidMappings"], mapped["gidMappings"]) = (mapping.clone(), mapping);
                    mounts.push(mapped);
                }
                "remount" => {
                    mounts.push(json!({ "destination": at, "type": "tmpfs", "source": "tmpfs" }));
                    mounts.push(
                        json!({ "destination": at, "type": "tmpfs", "source": "tmpfs", "options": ["remount", "ro"] }),
                    );
                }
                _ => mounts.push(new),
            }
            places.push(at);
        }
    }) else {
        return;
    };
    let done = make(&c, &["run"]).ok();
    let seen: Vec<_> = done.out.lines().collect();
    let missing: Vec<_> = places.iter().filter(|place| !seen.contains(&place.as_str())).collect();
    assert!(missing.is_empty(), "{missing:?}: {done}");
}

#[test]
fn features_are_complete() {
    let features = features();
    for place in [
        "ociVersionMin",
        "ociVersionMax",
        "hooks/5",
        "mountOptions/0",
        "linux/namespaces/7",
        "linux/capabilities/40",
        "linux/cgroup/v1",
        "linux/cgroup/v2",
        "linux/cgroup/systemd",
        "linux/cgroup/systemdUser",
        "linux/cgroup/rdma",
        "linux/seccomp/enabled",
        "linux/seccomp/actions/8",
        "linux/seccomp/operators/6",
        "linux/seccomp/archs/2",
        "linux/seccomp/knownFlags/3",
        "linux/seccomp/supportedFlags/3",
        "linux/apparmor/enabled",
        "linux/selinux/enabled",
        "linux/intelRdt/enabled",
        "linux/intelRdt/schemata",
        "linux/intelRdt/monitoring",
        "linux/memoryPolicy/modes/6",
        "linux/memoryPolicy/flags/2",
        "linux/mountExtensions/idmap/enabled",
        "linux/netDevices/enabled",
        "annotations/org.opencontainers.runc.checkpoint.enabled",
        "potentiallyUnsafeConfigAnnotations/0",
    ] {
        assert!(features.pointer(&format!("/{place}")).is_some_and(|value| !value.is_null()), "{place}");
    }
}
