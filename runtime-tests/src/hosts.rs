//! Two hosts, a client, and the switch between them, as network namespaces:
//!
//! ```text
//! source       10.99.0.1 on br0 -- eth0 --+
//! destination  10.99.0.2 on br0 -- eth0 --+-- switch (a bridge in a namespace of its own)
//! client       10.99.0.3 -------- eth0 ---+
//! ```
//! On either host a network namespace for the container hangs on br0 by a veth (`web`). That at the source has 10.99.0.10; that at the
//! destination has nothing yet.

use std::io::Write;
use std::process::{Child, Command, Stdio};

use crate::command::{self, tool};
use crate::network::Namespace;

/// The container's address, wherever it is.
pub const CONTAINER: &str = "10.99.0.10";
pub const SOURCE: &str = "10.99.0.1";
pub const DESTINATION: &str = "10.99.0.2";
const CLIENT: &str = "10.99.0.3";
const MAC: &str = "02:00:0a:63:00:0a";

/// The switch's ends of the cables of source and destination.
const CABLES: [&str; 2] = ["source", "dest"];
/// The container's port on each host's bridge.
const PORT: &str = "web";

#[derive(Debug)]
pub struct Hosts {
    pub source: Namespace,
    pub destination: Namespace,
    pub client: Namespace,
    pub container_at_source: Namespace,
    pub container_at_destination: Namespace,
    switch: Namespace,
}

impl Hosts {
    pub fn new() -> Hosts {
        let hosts = Hosts {
            source: Namespace::new("src"),
            destination: Namespace::new("dst"),
            client: Namespace::new("cli"),
            container_at_source: Namespace::new("csrc"),
            container_at_destination: Namespace::new("cdst"),
            switch: Namespace::new("switch"),
        };
        for bridge in [&hosts.switch, &hosts.source, &hosts.destination] {
            bridge.ip("link add br0 type bridge");
            bridge.ip("link set br0 up");
        }
        for (host, port, address) in [
            (&hosts.source, CABLES[0], SOURCE),
            (&hosts.destination, CABLES[1], DESTINATION),
            (&hosts.client, "client", CLIENT),
        ] {
            cable(host, &hosts.switch, port);
            let interface = if address == CLIENT { "eth0" } else { "br0" };
            if interface == "br0" {
                host.ip("link set eth0 master br0");
            }
            host.ip(&format!("addr add {address}/24 dev {interface}"));
        }
        cable(&hosts.container_at_source, &hosts.source, PORT);
        cable(&hosts.container_at_destination, &hosts.destination, PORT);
        settle(&hosts.container_at_source);
        hosts
    }

    /// Plugs or unplugs the cable of host 0 (source) or 1 (destination).
    pub fn plug(&self, host: usize, plugged: bool) {
        self.switch.ip(&format!("link set {} {}", CABLES[host], if plugged { "up" } else { "down" }));
    }

    /// Bits per second that get to a host, with a queue of 50 ms; none: as it was.
    pub fn throttle(&self, host: usize, rate: Option<u64>) {
        let device = CABLES[host];
        let tc = match rate {
            Some(rate) => format!("tc qdisc replace dev {device} root tbf rate {rate} burst 64kb latency 50ms"),
            None => format!("tc qdisc del dev {device} root"),
        };
        self.switch.within(|| tool(&tc));
    }

    /// For who moves the address himself: the destination has it too, with its port down, and is ready to be told.
    pub fn prepare_move(&self) -> Move {
        self.destination.ip(&format!("link set {PORT} down"));
        settle(&self.container_at_destination);
        // A segment that comes while the socket is on its way is to be met with silence: the client sends it again.
        for end in [&self.container_at_source, &self.container_at_destination] {
            end.within(|| {
                tool("nft add table inet quiet");
                tool("nft add chain inet quiet output { type filter hook output priority 0 ; }");
                tool("nft add rule inet quiet output tcp flags & rst == rst drop");
            });
        }
        let ready = |host: &Namespace| {
            let mut command = Command::new("ip");
            command.args(["-n", host.name(), "-batch", "-"]).stdin(Stdio::piped());
            command.spawn().expect("iproute2 is installed")
        };
        Move { ports: [(ready(&self.source), "down"), (ready(&self.destination), "up")], announcement: None }
    }
}

impl Default for Hosts {
    fn default() -> Hosts {
        Hosts::new()
    }
}

/// A veth: `eth0` at `host`, `port` at `bridge` and in its br0.
fn cable(host: &Namespace, bridge: &Namespace, port: &str) {
    tool(&format!("ip link add eth0 netns {} type veth peer name {port} netns {}", host.name(), bridge.name()));
    host.ip("link set eth0 up");
    bridge.ip(&format!("link set {port} master br0"));
    bridge.ip(&format!("link set {port} up"));
}

/// Gives a namespace the container's addresses.
fn settle(container: &Namespace) {
    container.ip(&format!("link set eth0 address {MAC}"));
    container.ip(&format!("addr add {CONTAINER}/24 dev eth0"));
}

/// A move of the container's address that is ready to be made.
pub struct Move {
    ports: [(Child, &'static str); 2],
    announcement: Option<Child>,
}

impl Move {
    /// The container's port at the source goes down, that at the destination up, and the address is announced there.
    pub fn make(&mut self, hosts: &Hosts) {
        for (host, state) in &mut self.ports {
            let mut orders = host.stdin.take().expect("a move is made once");
            orders.write_all(format!("link set {PORT} {state}\n").as_bytes()).expect("ip reads its orders");
        }
        for (host, _) in &mut self.ports {
            command::wait(host, std::time::Duration::from_secs(5));
        }
        // Unsolicited: the neighbours that have not seen a frame from the new place learn of it.
        let mut arping = Command::new("busybox");
        arping.args(["arping", "-U", "-c", "1", "-I", "eth0", CONTAINER]).stdout(Stdio::null()).stderr(Stdio::null());
        self.announcement = hosts.container_at_destination.within(|| arping.spawn().ok());
    }
}

impl Drop for Move {
    fn drop(&mut self) {
        let ports = self.ports.iter_mut().map(|(host, _)| host);
        for child in ports.chain(self.announcement.as_mut()) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
