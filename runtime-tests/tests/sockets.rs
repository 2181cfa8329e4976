//! Unix sockets and TCP.

runtime_tests::carried! {
    unix_stream, unix_datagram, unix_seqpacket, unix_half_closed, unix_closed_peer, unix_options, unix_between,
    unix_reset, unix_senders, unix_peeking, unix_peers,
    unix_listening, unix_abstract, unix_relative, unix_orphans, unix_datagrams, unix_one_way, unix_idle,
    tcp_listen, tcp_listen_6, tcp_listen_shared, tcp_loopback, tcp_loopback_6, tcp_loopback_full,
    tcp_loopback_half_closed, tcp_loopback_options, tcp_loopback_between, udp_bound, udp_connected, udp_options,
}
