//! Network namespaces of the test's own, which go when the last descriptor of them does.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;

use lmrun::sys::netns;
use nix::sched::{CloneFlags, unshare};

/// A network namespace with its loopback up.
pub struct Namespace(File);

impl Namespace {
    pub fn new() -> Self {
        let made = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("unshare");
            File::open("/proc/thread-self/ns/net").expect("own namespace")
        });
        let namespace = Self(made.join().expect("thread"));
        namespace.ip("link set lo up");
        namespace
    }

    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        netns::within(self.fd(), work).expect("setns")
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Runs ip(8) in the namespace.
    pub fn ip(&self, arguments: &str) {
        let output = self.command("ip", arguments);
        assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// The namespace's nftables tables, as nft(8) lists them.
    pub fn tables(&self) -> String {
        String::from_utf8_lossy(&self.command("nft", "list tables").stdout).into_owned()
    }

    pub fn command(&self, program: &str, arguments: &str) -> std::process::Output {
        self.run(|| Command::new(program).args(arguments.split(' ')).output().expect(program))
    }

    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }
}

/// Hosts `a` and `c`, of which one at a time has the container's addresses, and `b`, where its peer lives.
pub struct Triangle {
    pub a: Namespace,
    pub b: Namespace,
    pub c: Namespace,
    /// ip(8) in `b`, waiting for commands.
    switch: Mutex<Child>,
}

/// The container's IPv4 address; its peer's ends in 2.
pub const HERE: [&str; 2] = ["10.88.0.1", "fd88::1"];
pub const PEER: [&str; 2] = ["10.88.0.2", "fd88::2"];

impl Triangle {
    pub fn new() -> Self {
        let b = Namespace::new();
        let switch = b.run(|| {
            let mut ip = Command::new("ip");
            ip.args(["-batch", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped());
            Mutex::new(ip.spawn().expect("ip"))
        });
        let net = Self { a: Namespace::new(), b, c: Namespace::new(), switch };
        for (host, link, [local, mac]) in
            [(&net.a, "to-a", ["fe80::a", "02:00:00:00:00:0a"]), (&net.c, "to-c", ["fe80::c", "02:00:00:00:00:0c"])]
        {
            net.b.ip(&format!("link add {link} type veth peer name eth0 address {mac} netns {}", host.path()));
            net.b.ip(&format!("link set {link} up"));
            host.ip("link set eth0 up");
            host.ip(&format!("addr add {}/24 dev eth0", HERE[0]));
            host.ip(&format!("addr add {}/64 dev eth0 nodad", HERE[1]));
            host.ip(&format!("addr add {local}/64 dev eth0 nodad"));
            // Unlike ARP, neighbour discovery does not find an address of the loopback.
            net.b.ip(&format!("addr add fe80::b/64 dev {link} nodad"));
            host.ip(&format!("-6 route add {}/128 via fe80::b dev eth0", PEER[1]));
        }
        net.b.ip(&format!("addr add {}/32 dev lo", PEER[0]));
        net.b.ip(&format!("addr add {}/128 dev lo nodad", PEER[1]));
        net.route("to-a");
        net
    }

    /// Sends the peer's packets to one of the two hosts: `to-a` or `to-c`. Takes less than a millisecond.
    pub fn route(&self, link: &str) {
        let mut ip = self.switch.lock().expect("switch");
        let commands = ip.stdin.as_mut().expect("stdin");
        for (here, peer) in [(HERE[0], PEER[0]), (HERE[1], PEER[1])] {
            writeln!(commands, "route replace {here} dev {link} src {peer}").expect("ip");
        }
        // Its answer says that all is done.
        writeln!(commands, "route get {}", HERE[0]).expect("ip");
        let mut answer = [0; 4096];
        let len = ip.stdout.as_mut().expect("stdout").read(&mut answer).expect("ip");
        let answer = String::from_utf8_lossy(&answer[..len]);
        assert!(answer.contains(link), "ip route get: {answer}");
    }
}

impl Drop for Triangle {
    fn drop(&mut self) {
        if let Ok(ip) = self.switch.get_mut() {
            drop(ip.stdin.take());
            let _ = ip.wait();
        }
    }
}
