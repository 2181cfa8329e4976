//! Two hosts with engines, a client, and the switch between them:
//!
//! ```text
//! a       10.88.0.201 --+
//! b       10.88.0.202 --+-- switch (a bridge in a namespace of its own)
//! client  10.88.0.203 --+
//! ```
//! Containers in the network that [`Pair::lan`] makes are on the switch themselves (macvlan). Each host reaches the other by
//! ssh, with a key that is made for it.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::command::{self, Done, tool};
use crate::host;
use crate::needs;
use crate::network::Namespace;
use crate::redis::{self, Client};

use super::{BUSYBOX, Engine, Engines, path};

const LIMIT: Duration = Duration::from_secs(10);
const SUBNET: &str = "10.88.0.0/24";
const CLIENT: &str = "10.88.0.203/24";
/// The container's address, wherever it is.
const ADDRESS: &str = "10.88.0.7";
/// The image with Redis in it, and busybox.
const REDIS: &str = "lmrun-redis";
/// The network that containers are in.
pub const LAN: &str = "lan";

pub struct Pair {
    pub a: Engines,
    pub b: Engines,
    pub client: Namespace,
    _switch: Namespace,
    sshds: Vec<Child>,
}

impl Pair {
    /// Whether what it takes is here; says so where it is not.
    pub fn is_possible(engine: Engine) -> bool {
        let have = needs::root() && engine.is_installed();
        let sshd = needs::on_path("sshd").is_some();
        if have && !sshd {
            println!("SKIP two hosts: no sshd (runtime-tests/tools.sh test installs it)");
        }
        have && sshd
    }

    /// Starts both, which takes seconds.
    pub fn start(name: &str) -> Pair {
        let (a, b) = (Engines::start(&format!("{name}-a")), Engines::start(&format!("{name}-b")));
        let (client, switch) = (Namespace::new("cli"), Namespace::new("switch"));
        switch.ip("link add br0 type bridge");
        switch.ip("link set br0 up");
        let ends =
            [("to-a", a.init.to_string()), ("to-b", b.init.to_string()), ("to-client", client.name().to_owned())];
        for (port, namespace) in &ends {
            let switch_name = switch.name();
            tool(&format!("ip link add eth1 netns {namespace} type veth peer name {port} netns {switch_name}"));
            switch.ip(&format!("link set {port} master br0 up"));
        }
        client.ip(&format!("addr add {CLIENT} dev eth1"));
        client.ip("link set eth1 up");
        let key = a.base.join("key");
        let mut keygen = Command::new("ssh-keygen");
        command::run(keygen.args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key), LIMIT).ok();
        let mut pair = Pair { a, b, client, _switch: switch, sshds: Vec::new() };
        for (host, address) in [(&pair.a, "10.88.0.201"), (&pair.b, "10.88.0.202")] {
            perform(host, &format!("ip addr add {address}/24 dev eth1"));
            perform(host, "ip link set eth1 up");
            write_ssh(host, &key);
        }
        pair.sshds = [&pair.a, &pair.b].map(start_sshd).into();
        pair
    }

    /// Makes a network at `host`, whose containers are on the switch.
    #[track_caller]
    pub fn lan(&self, host: &Engines) {
        let words = ["network", "create", "--driver", "macvlan", "--subnet", SUBNET, "--opt", "parent=eth1", LAN];
        host.ok(Engine::Docker, &words);
    }

    /// Runs a Redis, whose image `b` has the lower half of, as the container `web` at `a`, in a network of its own, with `options`
    /// of `docker run` besides, and fills it.
    #[track_caller]
    pub fn run_redis(&self, mib: usize, options: &[&str]) {
        let rootfs = self.a.import_busybox(Engine::Docker);
        self.b.import(Engine::Docker, BUSYBOX, &rootfs);
        redis::rootfs(&rootfs).expect("redis-server is installed");
        self.a.import(Engine::Docker, REDIS, &rootfs);
        self.lan(&self.a);
        let run = format!("run --detach --name web --hostname www --network {LAN} --ip {ADDRESS}");
        let words = [&run.split(' ').collect::<Vec<_>>()[..], options, &[REDIS], &redis::ARGS].concat();
        self.a.ok(Engine::Docker, &words);
        self.connect().load(mib, |_| ()).expect("Redis takes what it is given");
    }

    /// A connection of the client's with it, wherever it is.
    #[track_caller]
    pub fn connect(&self) -> Client {
        self.client.within(|| redis::wait_until_up(&format!("{ADDRESS}:6379"))).expect("Redis answers")
    }

    /// `lmrun migrate FLAG... CONTAINER DESTINATION` at `from`.
    pub fn migrate(&self, from: &Engines, container: &str, destination: &str, flags: &[&str]) -> Done {
        let words: Vec<&str> = ["migrate"].into_iter().chain(flags.iter().copied()).collect();
        from.perform("lmrun", &[&words[..], &[container, destination]].concat())
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        for sshd in &mut self.sshds {
            let _ = sshd.kill();
            let _ = sshd.wait();
        }
    }
}

#[track_caller]
fn perform(host: &Engines, line: &str) {
    let words: Vec<&str> = line.split(' ').collect();
    host.perform(words[0], &words[1..]).ok();
}

/// Makes ssh and its server at a host what they are between two hosts of one owner.
fn write_ssh(host: &Engines, key: &Path) {
    let base = host.base.display();
    let server = format!(
        "Port 22\nListenAddress 0.0.0.0\nHostKey {key}\nAuthorizedKeysFile {key}.pub\nStrictModes no\nUsePAM no\nPidFile none\n\
         PermitRootLogin yes\nSetEnv PATH={} DOCKER_HOST=unix://{base}/run/docker.sock\n",
        path(&host.base),
        key = key.display(),
    );
    let client = format!(
        "Host a\n HostName 10.88.0.201\nHost b\n HostName 10.88.0.202\nHost *\n IdentityFile {}\n User root\n\
         StrictHostKeyChecking no\n UserKnownHostsFile /dev/null\n LogLevel ERROR\n",
        key.display()
    );
    fs::write(host.base.join("sshd_config"), server).expect("base is writable");
    fs::write(host.base.join("ssh_config"), client).expect("base is writable");
    host::script(&host.base.join("bin/ssh"), &format!("exec /usr/bin/ssh -F {base}/ssh_config \"$@\""));
}

fn start_sshd(host: &Engines) -> Child {
    perform(host, "mkdir -p /run/sshd");
    let config = host.base.join("sshd_config").display().to_string();
    let log = fs::File::options().create(true).append(true).open(host.base.join("log")).expect("base is writable");
    let mut sshd = host.command("/usr/sbin/sshd", &["-D", "-e", "-f", &config]);
    let sshd = sshd.stdin(Stdio::null()).stderr(log).spawn().expect("sshd starts");
    let begin = Instant::now();
    while !command::run(&mut host.command("ssh", &["127.0.0.1", "true"]), LIMIT).succeeded() {
        assert!(begin.elapsed() < LIMIT, "sshd does not answer: {}", host.log());
        std::thread::sleep(Duration::from_millis(20));
    }
    sshd
}
