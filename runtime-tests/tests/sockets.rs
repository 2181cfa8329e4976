//! Unix sockets and TCP.

use std::fs;

use runtime_tests::container::{Checkpoint, Container};
use runtime_tests::network::Namespace;
use runtime_tests::{command, host, needs};
use serde_json::{Value, json};

runtime_tests::carried! {
    unix_stream, unix_datagram, unix_seqpacket, unix_half_closed, unix_closed_peer, unix_options, unix_between,
    unix_reset, unix_senders, unix_peeking, unix_peers,
    unix_listening, unix_abstract, unix_relative, unix_orphans, unix_datagrams, unix_one_way, unix_idle,
    tcp_listen, tcp_listen_6, tcp_listen_shared, tcp_loopback, tcp_loopback_6, tcp_loopback_full,
    tcp_loopback_half_closed, tcp_loopback_options, tcp_loopback_between, udp_bound, udp_connected, udp_options,
}

/// A hook may connect the new network, and the peers are there before the connections are.
#[test]
fn peers_meet_silence_before_hooks_run() {
    if !needs::root() {
        return;
    }
    let c = Container::of_workload("tcp-loopback");
    c.run().ok();
    assert!(c.ready());
    c.checkpoint(&Checkpoint { images: "images", tcp_established: true, ..Checkpoint::default() }).ok();

    let (hook, seen) = (c.base.join("hook"), c.base.join("seen"));
    let look = "pid=$(sed 's/.*\"pid\": *\\([0-9]*\\).*/\\1/'); nsenter -t $pid -n nft list ruleset";
    host::script(&hook, &format!("{look} >{}", seen.display()));
    let path = c.bundle().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["hooks"] = json!({ "createRuntime": [{ "path": hook, "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"] }] });
    fs::write(path, config.to_string()).unwrap();
    c.restore(&c.images("images"), true).ok();
    c.check(1);

    let seen = fs::read_to_string(seen).unwrap();
    assert!(seen.contains(&format!("table inet lmrun-{}", c.id)) && seen.contains("0x7f000001"), "{seen}");
    let pid = c.pid().to_string();
    let left = command::tool(&format!("nsenter -t {pid} -n nft list tables"));
    assert_eq!(left.out.trim(), "");
}

/// Podman removes the container's network namespace and connects a new one before it has the container restored.
#[test]
fn peers_of_podmans_containers_meet_silence_on_the_host() {
    if !needs::root() {
        return;
    }
    for (manager, held) in [("libpod", true), ("somebody", false)] {
        let host = Namespace::new("host");
        let mut c = Container::of_workload("tcp-loopback");
        c.call_through(&["nsenter", &format!("--net={}", host.path().display())]);
        let path = c.bundle().join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config["annotations"]["io.container.manager"] = json!(manager);
        fs::write(path, config.to_string()).unwrap();
        c.run().ok();
        assert!(c.ready());
        let left_running =
            Checkpoint { images: "left", leave_running: true, tcp_established: true, ..Checkpoint::default() };
        c.checkpoint(&left_running).ok();
        assert_eq!(host.tables(), [""; 0]);
        let last = Checkpoint { images: "images", tcp_established: true, ..Checkpoint::default() };
        c.checkpoint(&last).ok();
        // As Podman does when the container has ended.
        c.perform(c.lmrun().args(["delete", "--force", &c.id])).ok();
        let tables = host.tables();
        let name = format!("table bridge lmrun-{}-until-", c.id);
        assert_eq!(tables.iter().filter(|table| table.starts_with(&name)).count(), usize::from(held), "{tables:?}");
        assert_eq!(tables.len(), usize::from(held), "{tables:?}");
        c.restore(&c.images("images"), true).ok();
        assert_eq!(host.tables(), [""; 0]);
        c.check(1);

        host.within(|| command::tool("nft add table bridge lmrun-expired-until-1"));
        c.perform(c.lmrun().args(["kill", &c.id, "KILL"])).ok();
        c.perform(c.lmrun().args(["delete", "--force", &c.id])).ok();
        assert_eq!(host.tables().len(), usize::from(!held), "{:?}", host.tables());
    }
}
