//! Two hosts, a client, and the switch between them, as network namespaces:
//!
//! ```text
//! source       10.99.0.1 --+
//! destination  10.99.0.2 --+-- switch (a bridge in a namespace of its own)
//! client       10.99.0.3 --+
//! container on either host: 10.99.0.10, the same MAC; exactly one of the two has its port up
//! ```

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

/// The port of the container at each host.
const PORT_SOURCE: &str = "at-source";
const PORT_DESTINATION: &str = "at-dest";

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
        hosts.switch.ip("link add br0 type bridge");
        hosts.switch.ip("link set br0 up");
        for (host, port, address) in [
            (&hosts.source, "source", SOURCE),
            (&hosts.destination, "dest", DESTINATION),
            (&hosts.client, "client", CLIENT),
            (&hosts.container_at_source, PORT_SOURCE, CONTAINER),
            (&hosts.container_at_destination, PORT_DESTINATION, CONTAINER),
        ] {
            tool(&format!(
                "ip link add eth0 netns {} type veth peer name {port} netns {}",
                host.name(),
                hosts.switch.name()
            ));
            if address == CONTAINER {
                host.ip(&format!("link set eth0 address {MAC}"));
            }
            host.ip(&format!("addr add {address}/24 dev eth0"));
            host.ip("link set eth0 up");
            hosts.switch.ip(&format!("link set {port} master br0"));
            if port != PORT_DESTINATION {
                hosts.switch.ip(&format!("link set {port} up"));
            }
        }
        // A segment that comes while the socket is on its way is to be met with silence: the client sends it again.
        for end in [&hosts.container_at_source, &hosts.container_at_destination] {
            end.within(|| {
                tool("nft add table inet quiet");
                tool("nft add chain inet quiet output { type filter hook output priority 0 ; }");
                tool("nft add rule inet quiet output tcp flags & rst == rst drop");
            });
        }
        hosts
    }

    /// A shell command that moves the container's address from source to destination.
    pub fn move_command(&self) -> String {
        format!(
            "printf 'link set {PORT_SOURCE} down\\nlink set {PORT_DESTINATION} up\\n' | ip -n {} -batch - && \
             nsenter --net={} busybox arping -U -c 1 -I eth0 {CONTAINER} >/dev/null",
            self.switch.name(),
            self.container_at_destination.path().display()
        )
    }

    /// Makes the switch ready to be told in one breath.
    pub fn prepare_move(&self) -> Move {
        let mut command = Command::new("ip");
        command.args(["-n", self.switch.name(), "-batch", "-"]).stdin(Stdio::piped());
        let switch = command.spawn().expect("iproute2 is installed");
        Move { switch, announcement: None }
    }
}

impl Default for Hosts {
    fn default() -> Hosts {
        Hosts::new()
    }
}

/// A move of the container's address that is ready to be made.
pub struct Move {
    switch: Child,
    announcement: Option<Child>,
}

impl Move {
    /// The container's port at the source goes down, that at the destination up, and the address is announced there.
    pub fn make(&mut self, hosts: &Hosts) {
        let order = format!("link set {PORT_SOURCE} down\nlink set {PORT_DESTINATION} up\n");
        let mut to_switch = self.switch.stdin.take().expect("a move is made once");
        to_switch.write_all(order.as_bytes()).expect("ip reads its orders");
        drop(to_switch);
        command::wait(&mut self.switch, std::time::Duration::from_secs(5));
        // Unsolicited: the neighbours that have not seen a frame from the new place learn of it.
        let mut arping = Command::new("busybox");
        arping.args(["arping", "-U", "-c", "1", "-I", "eth0", CONTAINER]).stdout(Stdio::null()).stderr(Stdio::null());
        self.announcement = hosts.container_at_destination.within(|| arping.spawn().ok());
    }
}

impl Drop for Move {
    fn drop(&mut self) {
        for child in [Some(&mut self.switch), self.announcement.as_mut()].into_iter().flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
