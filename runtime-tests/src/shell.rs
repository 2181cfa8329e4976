//! Containers with busybox in them, whose config.json a scenario edits.

use std::fs;
use std::os::unix::fs::symlink;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::bundle::Shape;
use crate::command::Done;
use crate::container::Container;
use crate::needs;

const APPLETS: [&str; 16] = [
    "sh", "cat", "grep", "ls", "mkdir", "sleep", "tty", "false", "true", "id", "env", "pwd", "stty", "kill",
    "readlink", "dd",
];

/// One that runs `script`. None where that cannot be.
pub fn shell(script: &str, edit: impl FnOnce(&mut Value)) -> Option<Container> {
    container(&["sh", "-c", script], edit)
}

/// One that runs `args`. None where that cannot be.
pub fn container(args: &[&str], edit: impl FnOnce(&mut Value)) -> Option<Container> {
    if !needs::root() {
        return None;
    }
    let Some(busybox) = needs::on_path("busybox") else {
        needs::skip("busybox");
        return None;
    };
    let args = args.iter().map(|arg| arg.to_string()).collect();
    let container = Container::new(&Shape { args, ..Shape::default() });
    let bin = container.bundle().join("rootfs/bin");
    fs::create_dir(&bin).unwrap();
    fs::copy(busybox, bin.join("busybox")).unwrap();
    for name in APPLETS {
        symlink("busybox", bin.join(name)).unwrap();
    }
    let path = container.bundle().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    edit(&mut config);
    fs::write(path, config.to_string()).unwrap();
    Some(container)
}

/// Has all of the container's lmrun commands see a host with cgroup2 alone, in mount namespaces of their own.
pub fn in_version2_view(container: &mut Container) {
    let view = "umount -R /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && exec \"$0\" \"$@\"";
    container.call_through(&["unshare", "-m", "sh", "-c", view]);
}

/// `lmrun WORD... --bundle BUNDLE ID` to its end.
pub fn make(container: &Container, words: &[&str]) -> Done {
    let mut command = container.lmrun();
    command.args(words).arg("--bundle").arg(container.bundle());
    container.perform(command.arg(&container.id))
}

/// What `lmrun state` says.
pub fn state(container: &Container) -> Value {
    serde_json::from_str(&container.simple("state").ok().out).unwrap()
}

pub fn status(container: &Container) -> String {
    state(container)["status"].as_str().unwrap_or_default().to_owned()
}

#[track_caller]
pub fn wait_status(container: &Container, wanted: &str) {
    let begin = Instant::now();
    while status(container) != wanted {
        assert!(begin.elapsed() < Duration::from_secs(20), "never {wanted}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
