//! Who this host is, and which hosts it knows: a key, a certificate and a directory of certificates.
//!
//! ```text
//! /etc/lmrun/pki/            0700
//!     host.pem               0600: this host's certificate, signed by itself, and its key (Ed25519, PKCS #8)
//!     peers/NAME.pem         the certificate of a host that this one was paired with
//! ```
//!
//! A peer is known if the certificate that it shows is in `peers`, byte for byte: there is no authority, and no date and
//! no name in a certificate counts. To forget a peer is to remove its file. A host that is known may put containers here,
//! which is to say that it is root here.

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use graviola::hashing::{Hash, Sha256};
use graviola::signing::eddsa::Ed25519SigningKey;
use pem::Pem;
use rcgen::{CertificateParams, DnType, PublicKeyData, SignatureAlgorithm, SigningKey};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;

/// Where the keys of a host are.
pub const DIRECTORY: &str = "/etc/lmrun/pki";

/// Longest file that is read: a certificate is some 400 bytes.
const LONGEST: u64 = 64 << 10;

/// Longest name of a host, in bytes: HOST_NAME_MAX of include/uapi/linux/limits.h.
const LONGEST_NAME: usize = 64;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{path}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{path}: {what}")]
    Malformed { path: PathBuf, what: &'static str },
    #[error("{path}: belongs to uid {uid}, or others may write to it; hint: its owner must be root, its mode 0600")]
    Open { path: PathBuf, uid: u32 },
    #[error("cannot make a certificate: {0}")]
    Make(String),
    #[error("{0:?} is no name for a host: letters, digits, '.', '-' and '_', at most 64")]
    Name(String),
    #[error(
        "{name} is the name of another host that this one is paired with; hint: lmrun pair --forget {name}, or another --name"
    )]
    Taken { name: String },
    #[error("there is no host {name} that this one is paired with; hint: lmrun pair --list")]
    Unknown { name: String },
    #[error(transparent)]
    Processor(#[from] Processor),
}

pub type Result<T> = std::result::Result<T, Error>;

/// The cryptography has no way to do without some instructions (of 2014 and later).
#[derive(Debug, thiserror::Error)]
#[error("this processor does not have {missing}, which TLS is made with; hint: use ssh://")]
pub struct Processor {
    missing: &'static str,
}

impl Processor {
    /// Whether this processor can do it: what it cannot do, graviola answers with a panic.
    pub fn check() -> std::result::Result<(), Processor> {
        let features = [
            ("aes", std::is_x86_feature_detected!("aes")),
            ("pclmulqdq", std::is_x86_feature_detected!("pclmulqdq")),
            ("ssse3", std::is_x86_feature_detected!("ssse3")),
            ("avx", std::is_x86_feature_detected!("avx")),
            ("avx2", std::is_x86_feature_detected!("avx2")),
            ("bmi1", std::is_x86_feature_detected!("bmi1")),
            ("bmi2", std::is_x86_feature_detected!("bmi2")),
            ("adx", std::is_x86_feature_detected!("adx")),
        ];
        features.iter().find(|(_, there)| !there).map_or(Ok(()), |&(missing, _)| Err(Processor { missing }))
    }
}

/// The SHA-256 digest of a certificate, as `openssl x509 -fingerprint -sha256` shows it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    pub fn of(certificate: &CertificateDer<'_>) -> Self {
        let mut digest = [0; 32];
        digest.copy_from_slice(Sha256::hash(certificate).as_ref());
        Self(digest)
    }

    pub fn bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, byte) in self.0.iter().enumerate() {
            write!(f, "{}{byte:02X}", if n == 0 { "" } else { ":" })?;
        }
        Ok(())
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A host at the other end, or one that this host is paired with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// As it was called when it was paired.
    pub name: String,
    pub fingerprint: Fingerprint,
}

/// What a host proves itself with.
#[derive(Debug, Clone)]
pub struct Identity {
    certified: Arc<CertifiedKey>,
}

impl Identity {
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certified.cert[0]
    }

    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(self.certificate())
    }

    pub(super) fn certified(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.certified)
    }
}

impl From<CertifiedKey> for Identity {
    fn from(certified: CertifiedKey) -> Self {
        Self { certified: Arc::new(certified) }
    }
}

/// The directory with this host's key and its peers' certificates.
#[derive(Debug, Clone)]
pub struct Pki {
    dir: PathBuf,
}

/// That of this host: [`DIRECTORY`], or what the variable `LMRUN_PKI` names.
impl Default for Pki {
    fn default() -> Self {
        Self::at(std::env::var_os("LMRUN_PKI").map_or(DIRECTORY.into(), PathBuf::from))
    }
}

impl Pki {
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// This host's key and certificate; the first call makes them.
    pub fn identity(&self) -> Result<Identity> {
        Processor::check()?;
        let path = self.dir.join("host.pem");
        let text = match read_private(&path)? {
            Some(text) => text,
            None => {
                self.make_identity(&path)?;
                read_private(&path)?
                    .ok_or_else(|| Error::Io { path: path.clone(), source: io::ErrorKind::NotFound.into() })?
            }
        };
        let malformed = |what| Error::Malformed { path: path.clone(), what };
        let certificate = certificate(&text).ok_or_else(|| malformed("has no certificate"))?;
        let key = find(&text, "PRIVATE KEY").ok_or_else(|| malformed("has no private key"))?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key));
        let certified = CertifiedKey::from_der(vec![certificate], key, &rustls_graviola::default_provider());
        Ok(certified.map_err(|_| malformed("the key is not the certificate's, or of an unknown kind"))?.into())
    }

    fn make_identity(&self, path: &Path) -> Result<()> {
        let io = |source| Error::Io { path: path.to_owned(), source };
        let text = make_certificate(&host_name())?;
        make_dir(&self.dir)?;
        // Linked into its place when it is complete: of two that make one at the same time, one wins.
        let mut nonce = [0; 8];
        graviola::random::fill(&mut nonce).map_err(|e| Error::Make(format!("{e:?}")))?;
        let draft = self.dir.join(format!(".host.pem.{:x}", u64::from_ne_bytes(nonce)));
        let written = write_new(&draft, text.as_bytes(), 0o600).and_then(|()| match fs::hard_link(&draft, path) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(e),
            _ => Ok(()),
        });
        let removed = fs::remove_file(&draft);
        written.and(removed).map_err(io)
    }

    /// The hosts that this one is paired with, by name.
    pub fn peers(&self) -> Result<Vec<Peer>> {
        let peer =
            |(name, certificate): (String, CertificateDer)| Peer { name, fingerprint: Fingerprint::of(&certificate) };
        Ok(self.certificates()?.into_iter().map(peer).collect())
    }

    /// The peer that has this certificate.
    pub fn find(&self, certificate: &CertificateDer<'_>) -> Result<Option<Peer>> {
        let known = self.certificates()?.into_iter().find(|(_, known)| known == certificate);
        Ok(known.map(|(name, certificate)| Peer { name, fingerprint: Fingerprint::of(&certificate) }))
    }

    fn certificates(&self) -> Result<Vec<(String, CertificateDer<'static>)>> {
        let dir = self.dir.join("peers");
        let io = |source| Error::Io { path: dir.clone(), source };
        let entries = match fs::read_dir(&dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(io)?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let path = entry.map_err(io)?.path();
            let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_suffix(".pem"));
            let Some(name) = name.filter(|name| is_name(name)) else { continue };
            // One that has just been forgotten is no peer.
            let Some(text) = read_private(&path)? else { continue };
            let certificate = certificate(&text);
            let certificate =
                certificate.ok_or_else(|| Error::Malformed { path: path.clone(), what: "has no certificate" })?;
            found.push((name.to_owned(), certificate));
        }
        found.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(found)
    }

    /// From now on, who has the key of `certificate` is known as `name`.
    ///
    /// # Errors
    /// [`Error::Taken`] if that is another peer's name.
    pub fn trust(&self, name: &str, certificate: &CertificateDer<'_>) -> Result<()> {
        let path = self.peer(name)?;
        if let Some((other, _)) = self.certificates()?.into_iter().find(|(_, known)| known == certificate) {
            if other == name {
                return Ok(());
            }
            // It has a new name.
            self.forget(&other)?;
        }
        make_dir(&self.dir)?;
        make_dir(&self.dir.join("peers"))?;
        let text = pem::encode(&Pem::new("CERTIFICATE", certificate.to_vec()));
        match write_new(&path, text.as_bytes(), 0o644) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Err(Error::Taken { name: name.to_owned() }),
            written => written.map_err(|source| Error::Io { path, source }),
        }
    }

    /// The peer of that name is known no more; connections that it has go on.
    pub fn forget(&self, name: &str) -> Result<()> {
        let path = self.peer(name)?;
        fs::remove_file(&path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => Error::Unknown { name: name.to_owned() },
            _ => Error::Io { path, source },
        })
    }

    fn peer(&self, name: &str) -> Result<PathBuf> {
        if !is_name(name) {
            return Err(Error::Name(name.to_owned()));
        }
        Ok(self.dir.join("peers").join(format!("{name}.pem")))
    }
}

/// Whether `name` can be that of a peer, and so of a file.
pub fn is_name(name: &str) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    !name.is_empty() && name.len() <= LONGEST_NAME && !name.starts_with('.') && name.chars().all(fits)
}

/// What this host is called: the head of its name, or `host` where that cannot be a peer's name.
pub fn host_name() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    if is_name(name.trim()) { name.trim().to_owned() } else { "host".to_owned() }
}

/// A certificate in a PEM text.
pub fn certificate(text: &str) -> Option<CertificateDer<'static>> {
    find(text, "CERTIFICATE").map(CertificateDer::from)
}

fn find(text: &str, tag: &str) -> Option<Vec<u8>> {
    let all = pem::parse_many(text).ok()?;
    all.into_iter().find(|pem| pem.tag() == tag).map(Pem::into_contents)
}

/// A key that signs a certificate.
struct Signer {
    key: Ed25519SigningKey,
    public: [u8; 32],
}

impl PublicKeyData for Signer {
    fn der_bytes(&self) -> &[u8] {
        &self.public
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &rcgen::PKCS_ED25519
    }
}

impl SigningKey for Signer {
    fn sign(&self, message: &[u8]) -> std::result::Result<Vec<u8>, rcgen::Error> {
        Ok(self.key.sign(message).to_vec())
    }
}

/// A new key and its certificate, as PEM.
fn make_certificate(name: &str) -> Result<String> {
    let failed = |e: graviola::Error| Error::Make(format!("{e:?}"));
    let key = Ed25519SigningKey::generate().map_err(failed)?;
    let signer = Signer { public: key.public_key().as_bytes(), key };
    let mut serial = [0; 16];
    graviola::random::fill(&mut serial).map_err(failed)?;
    // A positive number.
    serial[0] = serial[0] & 0x7f | 0x40;
    let mut params = CertificateParams::new(vec![name.to_owned()]).map_err(|e| Error::Make(e.to_string()))?;
    params.serial_number = Some(serial.to_vec().into());
    params.distinguished_name.push(DnType::CommonName, name);
    let certificate = params.self_signed(&signer).map_err(|e| Error::Make(e.to_string()))?;
    let mut room = [0; 128];
    let secret = signer.key.to_pkcs8_der(&mut room).map_err(failed)?;
    Ok(pem::encode_many(&[
        Pem::new("CERTIFICATE", certificate.der().to_vec()),
        Pem::new("PRIVATE KEY", secret.to_vec()),
    ]))
}

fn make_dir(dir: &Path) -> Result<()> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|source| Error::Io { path: dir.to_owned(), source })
}

fn write_new(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Reads a file that decides who may enter; None if it is not there.
fn read_private(path: &Path) -> Result<Option<String>> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let file = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(io)?,
    };
    let meta = file.metadata().map_err(io)?;
    let mine = meta.uid() == 0 || meta.uid() == nix::unistd::geteuid().as_raw();
    if !mine || meta.mode() & 0o022 != 0 {
        return Err(Error::Open { path: path.to_owned(), uid: meta.uid() });
    }
    let mut text = String::new();
    file.take(LONGEST).read_to_string(&mut text).map_err(io)?;
    Ok(Some(text))
}

#[cfg(test)]
#[path = "pki_tests.rs"]
pub(super) mod tests;
