//! lmrun called by an ordinary user.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::process::Command;
use std::time::Duration;

use runtime_tests::command::{self, Done};
use runtime_tests::container::Container;
use runtime_tests::needs;
use runtime_tests::shell::{make, shell, state, wait_status};
use serde_json::{Value, json};

/// Nobody on this host.
const USER: u32 = 65_533;

/// A container of [`USER`]'s that runs `script`, with the ids that `config` maps or else the user's alone.
fn users(script: &str, edit: impl FnOnce(&mut Value)) -> Option<Container> {
    let mut c = shell(script, |config| {
        let linux = &mut config["linux"];
        linux["namespaces"].as_array_mut().unwrap().push(json!({ "type": "user" }));
        for mappings in ["uidMappings", "gidMappings"] {
            linux[mappings] = json!([{ "containerID": 0, "hostID": USER, "size": 1 }]);
        }
        linux.as_object_mut().unwrap().remove("resources");
        edit(config);
    })?;
    fs::create_dir(c.base.join("runtime")).unwrap();
    let program = c.give_to(USER);
    // The last but the arguments is lmrun's own path, which the user may not be able to reach.
    let script = format!("shift; exec {} \"$@\"", program.display());
    let runtime = format!("XDG_RUNTIME_DIR={}", c.base.join("runtime").display());
    let user = USER.to_string();
    let mut words = vec!["setpriv", "--reuid", &user, "--regid", &user, "--clear-groups", "env", &runtime];
    words.extend(["sh", "-c", &script, "sh"]);
    c.call_through(&words);
    Some(c)
}

fn exec(c: &Container, args: &[&str]) -> Done {
    c.perform(c.lmrun().arg("exec").arg(&c.id).args(args))
}

#[test]
fn a_user_runs_containers() {
    let script = "id -u; cat /proc/self/uid_map /proc/self/setgroups; echo x > /dev/null && echo null; \
        mkdir /tmp/x && echo writes; cat /proc/self/oom_score_adj; sleep 1000";
    let Some(c) = users(script, |config| {
        config["process"]["oomScoreAdj"] = json!(-500);
        let mount = |kind: &str, at: &str| json!({ "destination": at, "type": kind, "source": kind });
        let mounts = config["mounts"].as_array_mut().unwrap();
        mounts.extend([mount("sysfs", "/sys"), mount("cgroup", "/sys/fs/cgroup"), mount("mqueue", "/dev/mqueue")]);
    }) else {
        return;
    };
    let out = c.base.join("out");
    let mut run = c.lmrun();
    run.args(["run", "-d", "--bundle"]).arg(c.bundle()).arg(&c.id);
    run.stdout(fs::File::create(&out).unwrap()).stderr(fs::File::create(c.base.join("err")).unwrap());
    let done = command::wait(&mut run.spawn().unwrap(), Duration::from_secs(20));
    assert!(done.is_some_and(|status| status.success()), "{}", fs::read_to_string(c.base.join("err")).unwrap());

    let pid = state(&c)["pid"].as_i64().unwrap();
    assert_eq!(fs::metadata(format!("/proc/{pid}")).unwrap().uid(), USER);
    let entered = exec(&c, &["sh", "-c", "id -u; readlink /proc/self/ns/user; readlink /proc/1/ns/user"]).ok();
    let lines: Vec<_> = entered.out.lines().collect();
    assert_eq!((lines[0], lines[1]), ("0", lines[2]), "{entered}");
    let said = fs::read_to_string(&out).unwrap();
    let said = said.split_whitespace().collect::<Vec<_>>().join(" ");
    let score = fs::read_to_string("/proc/self/oom_score_adj").unwrap();
    assert_eq!(said, format!("0 0 {USER} 1 deny null writes {}", score.trim()));

    c.perform(c.lmrun().args(["kill", &c.id, "KILL"])).ok();
    wait_status(&c, "stopped");
    c.simple("delete").ok();
    assert!(!c.root.join(&c.id).exists());
}

#[test]
fn the_state_lies_in_the_users_runtime_directory() {
    let Some(c) = users("true", |_| ()) else { return };
    let user = USER.to_string();
    let mut create = Command::new("setpriv");
    create.args(["--reuid", &user, "--regid", &user, "--clear-groups"]).arg(c.base.join("lmrun"));
    create.env("XDG_RUNTIME_DIR", c.base.join("runtime")).arg("create").arg("--bundle").arg(c.bundle()).arg(&c.id);
    let done = command::run(&mut create, Duration::from_secs(20));
    let made = c.base.join("runtime/lmrun").join(&c.id).join("state.json").exists();
    let mut delete = Command::new(c.base.join("lmrun"));
    delete.arg("--root").arg(c.base.join("runtime/lmrun")).args(["delete", "--force", &c.id]);
    command::run(&mut delete, Duration::from_secs(20)).ok();
    done.ok();
    assert!(made);
}

#[test]
fn what_a_user_may_not_is_said() {
    let Some(c) = users("true", |config| config["linux"]["resources"] = json!({ "pids": { "limit": 5 } })) else {
        return;
    };
    let done = make(&c, &["run"]).failed();
    assert!(done.err.lines().next().unwrap().contains("cannot set the limit pids.max"), "{done}");
    let done = make(&c, &["--rootless", "false", "run"]).failed();
    assert!(done.err.lines().next().unwrap().contains("Permission denied"), "{done}");
    let Some(c) = users("true", |config| {
        let linux = config["linux"].as_object_mut().unwrap();
        linux["namespaces"].as_array_mut().unwrap().retain(|namespace| namespace["type"] != "user");
        ["uidMappings", "gidMappings"].iter().for_each(|mappings| drop(linux.remove(*mappings)));
    }) else {
        return;
    };
    let done = make(&c, &["run"]).failed();
    assert!(done.err.lines().next().unwrap().contains("takes a user namespace"), "{done}");
}

/// The ranges of /etc/subuid and /etc/subgid, in a view of these files that knows the user.
#[test]
fn ranges_of_ids_are_mapped_by_their_helpers() {
    if needs::on_path("newuidmap").is_none() {
        return needs::skip("newuidmap");
    }
    let Some(mut c) = users(
        "cat /proc/self/uid_map /proc/self/setgroups; mkdir /tmp/x && busybox chown 7:8 /tmp/x && ls -nd /tmp/x",
        |config| {
            for mappings in ["uidMappings", "gidMappings"] {
                config["linux"][mappings] = json!([{ "containerID": 0, "hostID": USER, "size": 1 },
                { "containerID": 1, "hostID": 200_000, "size": 1000 }]);
            }
        },
    ) else {
        return;
    };
    let etc = c.base.join("etc");
    fs::create_dir(&etc).unwrap();
    for (name, line) in [
        ("passwd", format!("lmrun-user:x:{USER}:{USER}::/:/bin/sh\n")),
        ("group", format!("lmrun-user:x:{USER}:\n")),
        ("subuid", "lmrun-user:200000:1000\n".into()),
        ("subgid", "lmrun-user:200000:1000\n".into()),
    ] {
        fs::write(etc.join(name), line).unwrap();
    }
    fs::set_permissions(&etc, PermissionsExt::from_mode(0o755)).unwrap();
    let view = format!(
        "for f in passwd group subuid subgid; do [ -e /etc/$f ] || : >/etc/$f; mount --bind {0}/$f /etc/$f; done; shift; \
         exec setpriv --reuid {USER} --regid {USER} --clear-groups {1}/lmrun \"$@\"",
        etc.display(),
        c.base.display()
    );
    c.call_through(&["unshare", "-m", "sh", "-c", &view, "sh"]);
    let done = make(&c, &["run"]).ok();
    let words = done.out.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(words.starts_with(&format!("0 {USER} 1 1 200000 1000 allow ")), "{done}");
    assert!(words.contains(" 7 8 "), "{done}");
}
