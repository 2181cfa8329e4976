use super::*;
use std::os::unix::fs::PermissionsExt;

/// A directory that goes with the value.
pub(in super::super) struct Scratch(PathBuf);

impl Scratch {
    pub(in super::super) fn new(name: &str) -> Self {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let n = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("lmrun-{name}-{}-{n}", std::process::id()));
        fs::create_dir(&dir).unwrap();
        Self(dir)
    }

    pub(in super::super) fn pki(&self, host: &str) -> Pki {
        Pki::at(self.0.join(host))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn an_identity_is_made_once_and_is_private() {
    let scratch = Scratch::new("pki");
    let pki = scratch.pki("a");
    let first = pki.identity().unwrap();
    assert_eq!(first.fingerprint(), pki.identity().unwrap().fingerprint());
    assert_ne!(first.fingerprint(), scratch.pki("b").identity().unwrap().fingerprint());
    let mode = |path: PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(scratch.0.join("a/host.pem")), 0o600);
    assert_eq!(mode(scratch.0.join("a")), 0o700);
    assert_eq!(fs::read_dir(scratch.0.join("a")).unwrap().count(), 1, "no draft is left");
}

#[test]
fn two_that_make_an_identity_at_the_same_time_have_the_same() {
    let scratch = Scratch::new("pki");
    let made = || scratch.pki("a").identity().unwrap().fingerprint();
    let all: Vec<Fingerprint> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..2).map(|_| scope.spawn(made)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(all[0], all[1]);
}

#[test]
fn peers_are_known_by_their_certificates() {
    let scratch = Scratch::new("pki");
    let (pki, b, c) = (scratch.pki("a"), scratch.pki("b").identity().unwrap(), scratch.pki("c").identity().unwrap());
    assert_eq!(pki.peers().unwrap(), []);
    pki.trust("b", b.certificate()).unwrap();
    pki.trust("b", b.certificate()).unwrap();
    let peer = Peer { name: "b".into(), fingerprint: b.fingerprint() };
    assert_eq!(pki.find(b.certificate()).unwrap(), Some(peer));
    assert_eq!(pki.find(c.certificate()).unwrap(), None);
    assert!(matches!(pki.trust("b", c.certificate()), Err(Error::Taken { .. })));
    pki.trust("beta", b.certificate()).unwrap();
    assert_eq!(pki.find(b.certificate()).unwrap().unwrap().name, "beta");
    assert_eq!(pki.peers().unwrap().len(), 1);
    pki.forget("beta").unwrap();
    assert!(matches!(pki.forget("beta"), Err(Error::Unknown { .. })));
    assert_eq!(pki.find(b.certificate()).unwrap(), None);
}

#[test]
fn what_others_may_write_to_is_not_believed() {
    let scratch = Scratch::new("pki");
    let (pki, b) = (scratch.pki("a"), scratch.pki("b").identity().unwrap());
    pki.trust("b", b.certificate()).unwrap();
    fs::set_permissions(scratch.0.join("a/peers/b.pem"), fs::Permissions::from_mode(0o666)).unwrap();
    assert!(matches!(pki.find(b.certificate()), Err(Error::Open { .. })));
    fs::write(scratch.0.join("b/host.pem"), "nothing").unwrap();
    assert!(matches!(scratch.pki("b").identity(), Err(Error::Malformed { .. })));
}

#[test]
fn names_are_names_of_files() {
    let long = "x".repeat(LONGEST_NAME + 1);
    for bad in ["", ".", "..", "../a", "a/b", "a b", "ä", &long] {
        assert!(!is_name(bad), "{bad}");
    }
    assert!(is_name("web-1.example_org"));
    assert!(is_name(&host_name()));
}

#[test]
fn a_fingerprint_is_shown_as_openssl_does() {
    let text = Fingerprint::of(&CertificateDer::from(vec![])).to_string();
    assert!(text.starts_with("E3:B0:C4:42:98:FC:1C:14"));
    assert_eq!(text.len(), 95);
}
