//! Unix sockets and TCP.

use std::fs;

use runtime_tests::container::{Checkpoint, Container};
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
