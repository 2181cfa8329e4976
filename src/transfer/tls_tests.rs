use super::super::pki::tests::Scratch;
use super::*;

/// Two hosts that know each other, if `paired`.
fn hosts(paired: bool) -> (Scratch, Pki, Pki) {
    let scratch = Scratch::new("tls");
    let (a, b) = (scratch.pki("a"), scratch.pki("b"));
    if paired {
        a.trust("b", b.identity().unwrap().certificate()).unwrap();
        b.trust("a", a.identity().unwrap().certificate()).unwrap();
    }
    (scratch, a, b)
}

/// What both ends of a connection from `a` to `b` come to.
fn meet(a: &Pki, b: &Pki) -> (Result<Connection>, Result<Connection>) {
    let listener = Listener::bind("127.0.0.1:0", b.clone()).unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::scope(|scope| {
        let server = scope.spawn(|| listener.accept().unwrap().authenticate());
        (connect(&address, a), server.join().unwrap())
    })
}

#[test]
fn paired_hosts_know_each_other() {
    let (_scratch, a, b) = hosts(true);
    let (client, server) = meet(&a, &b);
    let (mut client, mut server) = (client.unwrap(), server.unwrap());
    assert_eq!((client.peer.name.as_str(), server.peer.name.as_str()), ("b", "a"));
    assert_eq!(client.peer.fingerprint, b.identity().unwrap().fingerprint());
    client.writer.write_all(b"hello").unwrap();
    client.writer.finish().unwrap();
    let mut said = String::new();
    server.reader.read_to_string(&mut said).unwrap();
    assert_eq!(said, "hello");
    server.writer.write_all(b"so long").unwrap();
    server.writer.finish().unwrap();
    said.clear();
    client.reader.read_to_string(&mut said).unwrap();
    assert_eq!(said, "so long");
}

#[test]
fn strangers_are_told_what_to_do() {
    let (_scratch, a, b) = hosts(false);
    let (client, server) = meet(&a, &b);
    let (client, server) = (client.unwrap_err(), server.unwrap_err());
    assert!(
        matches!(&client, Error::Stranger { fingerprint, .. } if *fingerprint == b.identity().unwrap().fingerprint())
    );
    assert!(client.to_string().contains("lmrun pair --listen"), "{client}");
    // The client has gone before it showed itself.
    assert!(matches!(&server, Error::Handshake { .. } | Error::Rejected { .. }), "{server:?}");
    // One side alone.
    a.trust("b", b.identity().unwrap().certificate()).unwrap();
    let (client, server) = meet(&a, &b);
    assert!(matches!(client.unwrap_err(), Error::Rejected { .. }));
    assert!(
        matches!(server.unwrap_err(), Error::Stranger { fingerprint, .. } if fingerprint == a.identity().unwrap().fingerprint())
    );
    b.trust("a", a.identity().unwrap().certificate()).unwrap();
    let (client, server) = meet(&a, &b);
    client.unwrap();
    server.unwrap();
    b.forget("a").unwrap();
    assert!(matches!(meet(&a, &b).0.unwrap_err(), Error::Rejected { .. }));
}

#[test]
fn a_copied_certificate_is_not_enough() {
    let (scratch, a, b) = hosts(true);
    // The certificate is a's, the key is not.
    let thief = scratch.pki("thief");
    let other = thief.identity().unwrap();
    let stolen = CertifiedKey::new(vec![a.identity().unwrap().certificate().clone()], other.certified().key.clone());
    let verifier = Verifier::new(Admission::Anybody).unwrap();
    let session = client(&Identity::from(stolen), Arc::clone(&verifier), MIGRATE).unwrap();
    let listener = Listener::bind("127.0.0.1:0", b).unwrap();
    let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    std::thread::scope(|scope| {
        let server = scope.spawn(|| listener.accept().unwrap().authenticate());
        let ended = establish(socket, session, &verifier, &other, MIGRATE, |shown| Ok(Some(unnamed(shown))));
        assert!(ended.is_err());
        assert!(matches!(server.join().unwrap().unwrap_err(), Error::Handshake { .. }));
    });
}

#[test]
fn the_host_that_was_asked_for_has_to_answer() {
    let (scratch, a, b) = hosts(true);
    let c = scratch.pki("c").identity().unwrap();
    a.trust("127.0.0.1", c.certificate()).unwrap();
    assert!(matches!(meet(&a, &b).0.unwrap_err(), Error::OtherPeer { .. }));
}

#[test]
fn an_end_that_was_not_meant_is_an_error() {
    let (_scratch, a, b) = hosts(true);
    let (client, server) = meet(&a, &b);
    let (mut client, mut server) = (client.unwrap(), server.unwrap());
    client.writer.write_all(b"half a").unwrap();
    drop(client);
    let ended = server.reader.read_to_end(&mut Vec::new()).unwrap_err();
    assert!(matches!(ended.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset), "{ended}");
}

#[test]
fn both_ways_at_the_same_time() {
    const LEN: usize = 20 << 20;
    let (_scratch, a, b) = hosts(true);
    let (client, server) = meet(&a, &b);
    let pattern = |n: usize| (n % 251) as u8;
    std::thread::scope(|scope| {
        for Connection { mut reader, mut writer, .. } in [client.unwrap(), server.unwrap()] {
            scope.spawn(move || {
                let bytes: Vec<u8> = (0..LEN).map(pattern).collect();
                for some in bytes.chunks(100_000) {
                    writer.write_all(some).unwrap();
                }
                writer.finish().unwrap();
            });
            scope.spawn(move || {
                let mut bytes = Vec::new();
                reader.read_to_end(&mut bytes).unwrap();
                assert_eq!(bytes.len(), LEN);
                assert!(bytes.iter().enumerate().all(|(n, byte)| *byte == pattern(n)));
            });
        }
    });
}

#[test]
fn silence_can_be_waited_out() {
    let (_scratch, a, b) = hosts(true);
    let (client, server) = meet(&a, &b);
    let (mut client, mut server) = (client.unwrap(), server.unwrap());
    client.reader.set_timeout(Some(Duration::from_millis(20))).unwrap();
    let mut byte = [0];
    assert_eq!(client.reader.read(&mut byte).unwrap_err().kind(), io::ErrorKind::TimedOut);
    server.writer.write_all(b"!").unwrap();
    client.reader.set_timeout(None).unwrap();
    assert_eq!(client.reader.read(&mut byte).unwrap(), 1);
}

#[test]
fn who_does_not_speak_tls_is_sent_away() {
    let (_scratch, _, b) = hosts(true);
    let listener = Listener::bind("127.0.0.1:0", b).unwrap();
    let mut stray = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    stray.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    assert!(matches!(listener.accept().unwrap().authenticate().unwrap_err(), Error::Handshake { .. }));
}
