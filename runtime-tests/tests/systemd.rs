//! `--systemd-cgroup` with a real systemd, which is process 1 of namespaces made for it and sees cgroup2 alone.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use runtime_tests::command::{self, Done};
use runtime_tests::container::Container;
use runtime_tests::needs;
use runtime_tests::shell::{container, make};
use serde_json::json;

const NOBODY: u32 = 65_534;

/// Where nobody's manager listens.
const RUNTIME: &str = "/run/user/65534";

/// Where systemd's own cgroups begin: cgroup2, wherever this host has it.
fn unified(dir: &Path) -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let mount = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>()).find(|words| words[2] == "cgroup2");
    mount.map(|words| Path::new(words[1]).join(dir.file_name().unwrap()).with_extension("systemd"))
}

/// A systemd; dropping it ends all that runs under it.
struct Systemd {
    unshare: Child,
    cgroup: PathBuf,
    /// As this host knows it.
    pid: i32,
}

impl Systemd {
    /// None where there is none.
    fn boot(dir: &Path) -> Option<Systemd> {
        let (Some(cgroup), true) = (unified(dir), Path::new("/lib/systemd/systemd").exists()) else {
            needs::skip("systemd and cgroup2");
            return None;
        };
        fs::create_dir(&cgroup).unwrap();
        // Nothing of this host's configuration is started.
        let script = "mount --make-rprivate / && mount -t proc proc /proc && mount -t tmpfs -o mode=755 none /run && \
            (umount -R /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup) && mount -t tmpfs none /etc/systemd/system && \
            mkdir -p /run/systemd/system && \
            printf '[Unit]\\nDefaultDependencies=no\\n' >/run/systemd/system/lmrun-test.target && \
            export container=lmrun && exec /lib/systemd/systemd --system --unit=lmrun-test.target --show-status=no";
        let enter = "echo $$ >\"$0\"/cgroup.procs && exec unshare --pid --mount --cgroup --ipc --uts --fork --kill-child sh -c \"$1\"";
        let log = fs::File::create(dir.join("systemd.log")).unwrap();
        let mut unshare = Command::new("sh");
        unshare.args(["-c", enter]).arg(&cgroup).arg(script).stdin(Stdio::null());
        let unshare = unshare.stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap();
        let mut systemd = Systemd { unshare, cgroup, pid: 0 };
        let begin = Instant::now();
        while !systemd.answers() {
            let log = || fs::read_to_string(dir.join("systemd.log")).unwrap_or_default();
            assert!(begin.elapsed() < Duration::from_secs(60), "systemd does not come up: {}", log());
            std::thread::sleep(Duration::from_millis(20));
        }
        Some(systemd)
    }

    fn answers(&mut self) -> bool {
        let children = format!("/proc/{0}/task/{0}/children", self.unshare.id());
        let children = fs::read_to_string(children).unwrap_or_default();
        let Some(pid) = children.split_whitespace().next().and_then(|pid| pid.parse().ok()) else { return false };
        self.pid = pid;
        self.run(&["systemctl", "is-active", "lmrun-test.target"]).succeeded()
    }

    /// A manager of nobody's units, in a service of its own, and the bus by which it asks this one to move processes. Gives
    /// what enters all that as nobody, from outside of that service.
    fn boot_users(&self) -> Vec<String> {
        let script = format!(
            "unit() {{ mkdir -p \"$1\"; printf '[Unit]\nDefaultDependencies=no\n%s\n' \"$3\" >\"$1/$2\"; }}
            unit /run/systemd/system dbus.socket '[Socket]
ListenStream=/run/dbus/system_bus_socket'
            unit /run/systemd/system dbus.service 'Requires=dbus.socket
[Service]
Type=notify
ExecStart=/usr/bin/dbus-daemon --system --address=systemd: --nofork --nopidfile --systemd-activation'
            unit /run/systemd/system lmrun-users.service '[Service]
Type=notify
User={NOBODY}
Delegate=yes
Environment=XDG_RUNTIME_DIR={RUNTIME} HOME={RUNTIME}
ExecStart=/lib/systemd/systemd --user --unit=lmrun-test.target'
            unit {RUNTIME}/systemd/user lmrun-test.target
            chown -R {NOBODY}:{NOBODY} {RUNTIME}
            systemctl daemon-reload
            systemctl start dbus.service lmrun-users.service"
        );
        self.run(&["sh", "-ec", &script]).ok();
        let user = NOBODY.to_string();
        let enter = self.enter();
        let as_user = ["setpriv", "--reuid", &user, "--regid", &user, "--clear-groups", "env"].map(str::to_owned);
        enter.into_iter().chain(as_user).chain([format!("XDG_RUNTIME_DIR={RUNTIME}")]).collect()
    }

    fn enter(&self) -> [String; 4] {
        ["nsenter".into(), "-t".into(), self.pid.to_string(), "-a".into()]
    }

    fn run(&self, words: &[&str]) -> Done {
        let enter = self.enter();
        command::run(Command::new(&enter[0]).args(&enter[1..]).args(words), Duration::from_secs(20))
    }

    /// A property of a unit.
    fn show(&self, unit: &str, property: &str) -> String {
        self.run(&["systemctl", "show", "--value", "-p", property, unit]).ok().out.trim().to_owned()
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
        let begin = Instant::now();
        while fs::remove_dir(&self.cgroup).is_err() && begin.elapsed() < Duration::from_secs(10) {
            let _ = fs::write(self.cgroup.join("cgroup.kill"), "1");
            remove_below(&self.cgroup);
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

fn remove_below(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_below(&entry.path());
            let _ = fs::remove_dir(entry.path());
        }
    }
}

fn lmrun(c: &Container, words: &[&str]) -> Done {
    c.perform(c.lmrun().arg("--systemd-cgroup").args(words))
}

#[test]
fn a_container_is_a_scope() {
    let Some(mut c) = container(&["sleep", "1000"], |config| {
        config["linux"]["cgroupsPath"] = json!("lmrun-test.slice:lm:one");
        config["annotations"] = json!({ "org.systemd.property.TimeoutStopSec": "uint32 7" });
    }) else {
        return;
    };
    let Some(systemd) = Systemd::boot(&c.base) else { return };
    let enter = systemd.enter();
    c.call_through(&enter.each_ref().map(String::as_str));
    let bundle = c.bundle().to_str().unwrap().to_owned();
    lmrun(&c, &["run", "-d", "--bundle", &bundle, &c.id]).ok();

    let place = "/lmrun.slice/lmrun-test.slice/lm-one.scope";
    for (property, value) in [
        ("ActiveState", "active"),
        ("ControlGroup", place),
        ("Slice", "lmrun-test.slice"),
        ("Delegate", "yes"),
        ("DefaultDependencies", "no"),
        ("Description", &format!("lmrun container {}", c.id)),
        ("DevicePolicy", "strict"),
        ("TimeoutStopUSec", "7s"),
    ] {
        assert_eq!(systemd.show("lm-one.scope", property), value, "{property}");
    }
    assert!(systemd.show("lm-one.scope", "DeviceAllow").contains("/dev/char/1:3 rwm"));
    // The process that the scope was made around has gone, and the container is there.
    let procs = fs::read_to_string(systemd.cgroup.join(&place[1..]).join("cgroup.procs")).unwrap();
    assert_eq!(procs.lines().count(), 1, "{procs}");
    let inside = lmrun(&c, &["exec", &c.id, "cat", "/proc/self/cgroup"]).ok();
    assert!(inside.out.contains(&format!("0::{place}\n")), "{inside}");

    lmrun(&c, &["kill", &c.id, "KILL"]).ok();
    lmrun(&c, &["delete", "--force", &c.id]).ok();
    assert_eq!(systemd.show("lm-one.scope", "LoadState"), "not-found");
    assert!(!systemd.cgroup.join(&place[1..]).exists());

    // A program that cannot be run leaves nothing either.
    let config = c.bundle().join("config.json");
    let text = fs::read_to_string(&config).unwrap().replace("\"sleep\"", "\"nothing\"");
    fs::write(config, text).unwrap();
    lmrun(&c, &["run", "--bundle", &bundle, &c.id]).failed();
    assert_eq!(systemd.show("lm-one.scope", "LoadState"), "not-found");
}

/// A user who may not move processes into the cgroups of his units has systemd do so.
#[test]
fn a_users_container_is_in_its_scope() {
    let Some(mut c) = container(&["sleep", "1000"], |config| {
        let linux = &mut config["linux"];
        linux["cgroupsPath"] = json!("user.slice:lm:one");
        linux["namespaces"].as_array_mut().unwrap().push(json!({ "type": "user" }));
        for mappings in ["uidMappings", "gidMappings"] {
            linux[mappings] = json!([{ "containerID": 0, "hostID": NOBODY, "size": 1 }]);
        }
        linux.as_object_mut().unwrap().remove("resources");
    }) else {
        return;
    };
    if needs::on_path("dbus-daemon").is_none() {
        return needs::skip("dbus-daemon");
    }
    let Some(systemd) = Systemd::boot(&c.base) else { return };
    let program = c.give_to(NOBODY);
    let enter = systemd.boot_users();
    // The last but the arguments is lmrun's own path, which the user may not be able to reach.
    let script = format!("shift; exec {} \"$@\"", program.display());
    let words = enter.iter().map(String::as_str).chain(["sh", "-c", &script, "sh"]);
    c.call_through(&words.collect::<Vec<_>>());

    let bundle = c.bundle().to_str().unwrap().to_owned();
    lmrun(&c, &["run", "-d", "--bundle", &bundle, &c.id]).ok();
    let place = "system.slice/lmrun-users.service/user.slice/lm-one.scope";
    let procs = || fs::read_to_string(systemd.cgroup.join(place).join("cgroup.procs")).unwrap_or_default();
    assert_eq!(procs().lines().count(), 1, "{}", procs());
    let inside = lmrun(&c, &["exec", &c.id, "cat", "/proc/self/cgroup"]).ok();
    assert!(inside.out.contains(&format!("0::/{place}\n")), "{inside}");
    lmrun(&c, &["delete", "--force", &c.id]).ok();
    assert!(!systemd.cgroup.join(place).exists());
}

#[test]
fn without_systemd_the_remedy_is_said() {
    let Some(c) = container(&["true"], |config| config["linux"]["cgroupsPath"] = json!("a.slice:lm:one")) else {
        return;
    };
    let mut c = c;
    c.call_through(&["unshare", "-m", "sh", "-c", "mount -t tmpfs none /run && exec \"$0\" \"$@\""]);
    let done = lmrun(&c, &["run", "--bundle", c.bundle().to_str().unwrap(), &c.id]).failed();
    let first = done.err.lines().next().unwrap();
    assert!(first.contains("no systemd answers on /run/systemd/private") && first.contains("cgroupfs"), "{done}");
    assert!(make(&c, &["create"]).succeeded(), "a path with colons is a path without the option");
    c.perform(c.lmrun().args(["delete", "--force", &c.id])).ok();
}
