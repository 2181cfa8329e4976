//! Containers with a user namespace of their own, or one that they join.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};

use runtime_tests::command::Done;
use runtime_tests::container::{Checkpoint, Container};
use runtime_tests::host;
use runtime_tests::shell::{in_version2_view, make, shell, state, status};
use serde_json::{Value, json};

/// The first of the ids on the host that the container's are.
const FIRST: u32 = 100_000;

fn mapped(config: &mut Value) {
    namespaces(config).push(json!({ "type": "user" }));
    for mappings in ["uidMappings", "gidMappings"] {
        config["linux"][mappings] = json!([{ "containerID": 0, "hostID": FIRST, "size": 65_536 }]);
    }
}

fn namespaces(config: &mut Value) -> &mut Vec<Value> {
    config["linux"]["namespaces"].as_array_mut().unwrap()
}

fn add_mount(config: &mut Value, mount: Value) {
    config["mounts"].as_array_mut().unwrap().push(mount);
}

fn exec(c: &Container, args: &[&str]) -> Done {
    c.perform(c.lmrun().arg("exec").arg(&c.id).args(args))
}

#[test]
fn all_that_a_container_has_it_has_in_a_user_namespace() {
    let script = "cat /proc/self/uid_map; id -u; id -G; env | grep HOME; ls /sys/class/net; cat /proc/sys/kernel/hostname; \
        echo x > /dev/null && echo null; [ -c /dev/kmsg ] && echo device; cat /secret/file; \
        echo x > /secret/file || echo read-only; cat /etc-copy/kept; ls /sys/fs/cgroup | grep -c .; \
        cat /proc/timer_list | grep -c .; cat /proc/self/timens_offsets; cat /proc/sys/net/ipv4/ip_forward; \
        grep -c 'Max open files.* 77 .* 88 ' /proc/self/limits; mkdir /tmp/new && ls -nd /tmp/new | grep -c ' 0 .* 0 '";
    for version2 in [false, true] {
        let Some(mut c) = shell(script, |config| {
            mapped(config);
            namespaces(config).extend([json!({ "type": "cgroup" }), json!({ "type": "time" })]);
            config["linux"]["timeOffsets"] = json!({ "monotonic": { "secs": 100 }, "boottime": { "secs": 200 } });
            config["linux"]["sysctl"] = json!({ "net.ipv4.ip_forward": "1" });
            config["linux"]["maskedPaths"] = json!(["/proc/timer_list"]);
            config["linux"]["devices"] = json!([{ "path": "/dev/kmsg", "type": "c", "major": 1, "minor": 11 }]);
            config["process"]["rlimits"] = json!([{ "type": "RLIMIT_NOFILE", "soft": 77, "hard": 88 }]);
            config["process"]["oomScoreAdj"] = json!(100);
            config["process"]["user"]["additionalGids"] = json!([0, 7]);
            // One that only host's root can go into.
            let root = std::path::Path::new(config["root"]["path"].as_str().unwrap()).to_owned();
            let secret = root.with_file_name("secret");
            fs::create_dir_all(secret.join("in")).unwrap();
            fs::write(secret.join("in/file"), "secret\n").unwrap();
            chown(&secret, Some(1234), Some(1234)).unwrap();
            fs::set_permissions(&secret, PermissionsExt::from_mode(0o700)).unwrap();
            add_mount(
                config,
                json!({ "destination": "/secret", "source": secret.join("in"), "options": ["bind", "ro"] }),
            );
            fs::create_dir(root.join("secret")).unwrap();
            fs::create_dir(root.join("etc-copy")).unwrap();
            fs::write(root.join("etc-copy/kept"), "kept\n").unwrap();
            add_mount(
                config,
                json!({ "destination": "/etc-copy", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup"] }),
            );
            add_mount(config, json!({ "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"] }));
            add_mount(
                config,
                json!({ "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"] }),
            );
        }) else {
            return;
        };
        let devices = c.bundle().join("rootfs/dev");
        if version2 {
            in_version2_view(&mut c);
        }
        fs::set_permissions(devices, PermissionsExt::from_mode(0o755)).unwrap();
        let done = make(&c, &["run"]);
        let words = done.out.split_whitespace().collect::<Vec<_>>().join(" ");
        let (before, after) = words.split_once(" read-only kept ").unwrap_or_else(|| panic!("{done}"));
        assert_eq!(before, "0 100000 65536 0 0 7 HOME=/ lo scenario null device secret", "{done}");
        let (files, after) = after.split_once(' ').unwrap();
        assert!(files.parse::<u32>().unwrap() > 3, "the cgroup is there: {done}");
        assert_eq!(after, "0 monotonic 100 0 boottime 200 0 1 1 1", "{done}");
        assert!(done.err.contains("Read-only file system"), "{done}");
    }
}

#[test]
fn what_is_made_belongs_to_the_user_namespace() {
    let Some(c) = shell("sleep 1000", |config| {
        mapped(config);
        let all = json!(["CAP_SYS_ADMIN", "CAP_NET_ADMIN"]);
        config["process"]["capabilities"] = json!({ "bounding": all, "effective": all, "permitted": all });
    }) else {
        return;
    };
    make(&c, &["run", "-d", "--pid-file", c.base.join("pid").to_str().unwrap()]).ok();
    let done = exec(&c, &["sh", "-c", "busybox mount -t tmpfs none /tmp && busybox ip link set lo down && echo mine"]);
    assert_eq!(done.ok().out, "mine\n");
    // On the host it is nobody's root.
    let pid = c.pid();
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(text.contains(&format!("Uid:\t{FIRST}\t{FIRST}\t{FIRST}\t{FIRST}\n")), "{text}");
    assert_eq!(host::cgroups(&c.id).iter().filter(|dir| holds(dir, pid)).count(), host::cgroups(&c.id).len());
    let refused = c.checkpoint(&Checkpoint { images: "a", ..Checkpoint::default() }).failed();
    assert!(refused.err.contains("user namespace of its own"), "{refused}");
    assert_eq!(status(&c), "running");
    c.perform(c.lmrun().args(["delete", "--force", &c.id])).ok();
    assert!(host::cgroups(&c.id).is_empty());
}

fn holds(cgroup: &std::path::Path, pid: i32) -> bool {
    let procs = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    procs.lines().any(|line| line == pid.to_string())
}

#[test]
fn the_namespaces_of_another_are_joined() {
    let Some(first) = shell("sleep 1000", mapped) else { return };
    make(&first, &["run", "-d"]).ok();
    let pid = state(&first)["pid"].as_i64().unwrap();
    let link = |kind: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap().to_string_lossy().into_owned();
    let kinds = [("user", "user"), ("network", "net"), ("pid", "pid"), ("ipc", "ipc"), ("uts", "uts")];
    let script = "for n in user net ipc uts; do readlink /proc/self/ns/$n; done; cat /proc/1/comm; id -u";
    let second = shell(script, |config| {
        config.as_object_mut().unwrap().remove("hostname");
        let list = namespaces(config);
        list.retain(|namespace| namespace["type"] == "mount");
        list.extend(kinds.map(|(kind, file)| json!({ "type": kind, "path": format!("/proc/{pid}/ns/{file}") })));
    })
    .unwrap();
    let done = make(&second, &["run"]).ok();
    let lines: Vec<_> = done.out.lines().collect();
    assert_eq!(lines[..4], ["user", "net", "ipc", "uts"].map(link), "{done}");
    assert_eq!(lines[4..], ["sleep", "0"], "{done}");
}

/// As an engine lays it: the network namespace is there before the container, and is the host's own.
#[test]
fn a_namespace_of_the_hosts_is_joined_before_rights_to_it_are_lost() {
    let host = format!("/proc/{}/ns/net", std::process::id());
    let Some(c) = shell("readlink /proc/self/ns/net", |config| {
        mapped(config);
        namespaces(config).retain(|namespace| namespace["type"] != "network");
        namespaces(config).push(json!({ "type": "network", "path": host }));
    }) else {
        return;
    };
    let done = make(&c, &["run"]);
    assert_eq!(done.out.trim(), fs::read_link(&host).unwrap().to_string_lossy(), "{done}");
}

#[test]
fn what_cannot_be_is_said() {
    let Some(c) = shell("true", |config| namespaces(config).push(json!({ "type": "user" }))) else { return };
    let done = make(&c, &["run"]).failed();
    assert!(done.err.lines().next().unwrap().contains("uidMappings"), "{done}");
    let Some(c) = shell("true", |config| {
        mapped(config);
        config["linux"]["uidMappings"] = json!([{ "containerID": 5, "hostID": 1, "size": 1 }]);
    }) else {
        return;
    };
    let done = make(&c, &["run"]).failed();
    assert!(done.err.lines().next().unwrap().contains("become user 0 in the user namespace"), "{done}");
    let Some(c) = shell("true", |config| {
        mapped(config);
        add_mount(config, json!({ "destination": "/x", "source": "/nowhere", "options": ["bind"] }));
    }) else {
        return;
    };
    let done = make(&c, &["run"]).failed();
    assert!(done.err.lines().next().unwrap().contains("error mounting \"/nowhere\""), "{done}");
    assert!(host::cgroups(&c.id).is_empty());
}
