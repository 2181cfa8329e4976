use super::*;

fn scratch(name: &str) -> std::path::PathBuf {
    static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let n = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let dir = std::env::temp_dir().join(format!("lmrun-pair-{name}-{}-{n}", std::process::id()));
    std::fs::create_dir(&dir).unwrap();
    dir
}

/// Two hosts in one directory, which is removed.
fn with_hosts(test: impl FnOnce(Pki, Pki)) {
    let dir = scratch("hosts");
    test(Pki::at(dir.join("a")), Pki::at(dir.join("b")));
    std::fs::remove_dir_all(dir).unwrap();
}

fn knows(pki: &Pki, name: &str, other: &Pki) -> bool {
    let fingerprint = other.identity().unwrap().fingerprint();
    pki.peers().unwrap().iter().any(|peer| peer.name == name && peer.fingerprint == fingerprint)
}

#[test]
fn a_code_is_one_word_and_comes_back() {
    let code = Code { secret: std::array::from_fn(|n| n as u8 * 7), mark: [0xff; HALF] };
    let text = code.text();
    assert_eq!(text.len(), 52);
    assert_eq!(Code::parse(&format!(" {}\n", text.to_uppercase())), Some(code));
    for bad in ["", "a", &text[1..], &format!("{text}a"), &format!("{}1", &text[1..])] {
        assert_eq!(Code::parse(bad), None, "{bad}");
    }
}

#[test]
fn the_code_pairs_both() {
    with_hosts(|a, b| {
        let invitation = Invitation::open(Some("127.0.0.1:0"), b.clone(), "bee").unwrap();
        let (address, code) = (invitation.address().unwrap().to_string(), invitation.code());
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| invitation.wait(SILENCE).unwrap());
            assert_eq!(join(&address, &code, &a, "ay").unwrap().name, "bee");
            assert_eq!(waiting.join().unwrap().name, "ay");
        });
        assert!(knows(&a, "bee", &b) && knows(&b, "ay", &a));
    });
}

#[test]
fn who_does_not_have_the_code_is_sent_away() {
    with_hosts(|a, b| {
        let invitation = Invitation::open(Some("127.0.0.1:0"), b.clone(), "b").unwrap();
        let (address, code) = (invitation.address().unwrap().to_string(), invitation.code);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| invitation.wait(SILENCE));
            let guess = Code { secret: [0; HALF], ..code }.text();
            assert!(matches!(join(&address, &guess, &a, "a").unwrap_err(), Error::Refused { .. }));
            let other = Code { mark: [0; HALF], ..code }.text();
            assert!(matches!(join(&address, &other, &a, "a").unwrap_err(), Error::WrongHost { .. }));
            std::net::TcpStream::connect(&address).unwrap().write_all(&[0; 100]).unwrap();
            assert!(a.peers().unwrap().is_empty() && b.peers().unwrap().is_empty());
            join(&address, &code.text(), &a, "a").unwrap();
            waiting.join().unwrap().unwrap();
        });
        assert!(matches!(join(&address, &code.text(), &a, "a").unwrap_err(), Error::Tls(_)), "the code is used up");
    });
}

#[test]
fn nobody_came() {
    with_hosts(|_, b| {
        let invitation = Invitation::open(Some("127.0.0.1:0"), b, "b").unwrap();
        assert!(matches!(invitation.wait(Duration::from_millis(10)).unwrap_err(), Error::Nobody(_)));
    });
}

#[test]
fn a_name_that_is_taken_is_told() {
    with_hosts(|a, b| {
        let dir = scratch("third");
        b.trust("a", Pki::at(&dir).identity().unwrap().certificate()).unwrap();
        std::fs::remove_dir_all(dir).unwrap();
        let invitation = Invitation::open(Some("127.0.0.1:0"), b, "b").unwrap();
        let (address, code) = (invitation.address().unwrap().to_string(), invitation.code());
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| invitation.wait(SILENCE));
            let refused = join(&address, &code, &a, "a").unwrap_err().to_string();
            assert!(refused.contains("lmrun pair --forget a"), "{refused}");
            join(&address, &code, &a, "another").unwrap();
            waiting.join().unwrap().unwrap();
        });
    });
}

#[test]
fn over_a_channel_that_is_safe_already() {
    with_hosts(|a, b| {
        let mut answer = Vec::new();
        let ours = introduction(&a, "a").unwrap();
        assert_eq!(over_stdio(&b, "b", ours.as_bytes(), &mut answer).unwrap().name, "a");
        assert_eq!(trust_introduced(&answer, &a).unwrap().name, "b");
        assert!(knows(&a, "b", &b) && knows(&b, "a", &a));
        for bad in ["", "\n", "lmrun-pair/1 x\n", "lmrun-pair/2 x\nnothing", "lmrun-pair/1 ../x\n"] {
            let said = [bad.as_bytes(), ours.split_once('\n').unwrap().1.as_bytes()].concat();
            let said = if bad.contains("..") { said } else { bad.as_bytes().to_vec() };
            assert!(trust_introduced(&said, &b).is_err(), "{bad}");
        }
    });
}

#[test]
fn a_remote_that_fails_is_named() {
    with_hosts(|a, _| {
        let failed = pair_by(Command::new("/bin/false"), "b", &a, "a").unwrap_err();
        assert!(matches!(&failed, Error::Remote(place) if place == "b"));
        for bad in ["b", "ssh://", "ssh://-oProxyCommand=x", "ssh://b:x"] {
            assert!(matches!(over_ssh(bad, &a, "a").unwrap_err(), Error::Destination(_)), "{bad}");
        }
        assert!(a.peers().unwrap().is_empty());
    });
}
