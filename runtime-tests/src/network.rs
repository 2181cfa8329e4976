//! Network namespaces for scenarios, made with `ip`.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sched::{CloneFlags, setns};

use crate::command::{run, tool};

/// A named network namespace; removed when dropped.
#[derive(Debug)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// Makes one with a name of its own, its loopback interface up.
    pub fn new(kind: &str) -> Namespace {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("lmrun-{kind}-{}-{n}", std::process::id());
        tool(&format!("ip netns add {name}"));
        let namespace = Namespace { name };
        namespace.ip("link set lo up");
        namespace
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// `ip` inside of the namespace.
    #[track_caller]
    pub fn ip(&self, words: &str) {
        tool(&format!("ip -n {} {words}", self.name));
    }

    /// Runs `work` on a thread inside of the namespace: what it opens and starts is there.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let file = File::open(self.path()).expect("the namespace has a file");
                setns(file, CloneFlags::CLONE_NEWNET).expect("root may enter a network namespace");
                work()
            });
            match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// The nftables tables in the namespace.
    pub fn tables(&self) -> Vec<String> {
        let listed = self.within(|| tool("nft list tables"));
        listed.out.lines().map(str::to_owned).collect()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let mut command = std::process::Command::new("ip");
        run(command.args(["netns", "del", &self.name]), std::time::Duration::from_secs(20));
    }
}

/// A container's network and somebody outside of it, with a cable between them.
#[derive(Debug)]
pub struct Cable {
    pub container: Namespace,
    pub outside: Namespace,
}

/// Addresses at the ends of a [`Cable`].
pub const INSIDE: &str = "10.77.0.2";
pub const INSIDE_6: &str = "fd77::2";

impl Cable {
    pub fn new() -> Cable {
        let (container, outside) = (Namespace::new("in"), Namespace::new("out"));
        tool(&format!("ip link add eth0 netns {} type veth peer name eth0 netns {}", container.name, outside.name));
        for (end, n) in [(&container, 2), (&outside, 1)] {
            end.ip(&format!("addr add 10.77.0.{n}/24 dev eth0"));
            end.ip(&format!("addr add fd77::{n}/64 dev eth0 nodad"));
            end.ip("link set eth0 up");
        }
        Cable { container, outside }
    }
}

impl Default for Cable {
    fn default() -> Cable {
        Cable::new()
    }
}
