//! Connections between hosts that know each other: TLS 1.3, and both ends show a certificate ([`super::pki`]).
//!
//! A connection is split into a half that reads and one that writes, for two threads. Several streams are several
//! connections. What a host sends is acknowledged by nothing but the protocol inside; an end that stops without
//! [`Writer::finish`] is an error at the other.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::CertifiedKey;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, ClientConnection, DigitallySignedStruct, DistinguishedName,
    ServerConfig, ServerConnection, SignatureScheme,
};

use super::pki::{self, Fingerprint, Identity, Peer, Pki, Processor};
use super::tune;

/// Where `lmrun receive --listen` listens if nobody says otherwise.
pub const PORT: u16 = 7677;

/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// What a server says first: a client learns from it that it is known there.
const WELCOME: u8 = b'+';

/// Bytes that are encrypted, and bytes that are received, at a time.
const CHUNK: usize = 256 << 10;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot connect to {address}")]
    Connect { address: String, source: io::Error },
    #[error("cannot listen on {address}")]
    Listen { address: String, source: io::Error },
    #[error("connection with {peer}")]
    Handshake { peer: SocketAddr, source: io::Error },
    /// The other end is none of our peers.
    #[error(
        "this host is not paired with {peer}, whose certificate is {fingerprint}; hint: say `lmrun pair --listen` at \
         one of the two hosts, and at the other the command that it prints"
    )]
    Stranger { peer: SocketAddr, fingerprint: Fingerprint },
    /// We are none of the other end's.
    #[error(
        "{peer} is not paired with this host, or not any more (our certificate is {fingerprint}); hint: say \
         `lmrun pair --listen` there, and here the command that it prints"
    )]
    Rejected { peer: SocketAddr, fingerprint: Fingerprint },
    #[error("{peer} is {found} and not {expected}; hint: lmrun pair --list")]
    OtherPeer { peer: SocketAddr, expected: String, found: String },
    #[error(transparent)]
    Pki(#[from] pki::Error),
    #[error(transparent)]
    Processor(#[from] Processor),
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
}

pub type Result<T> = std::result::Result<T, Error>;

/// Whom a verifier lets through.
#[derive(Debug)]
enum Admission {
    /// Who is in the directory now.
    Known(Pki),
    /// Whose certificate has a digest that begins like this.
    Marked(Vec<u8>),
    /// Anybody, who has to bring something else.
    Anybody,
}

/// Checks the other end of one connection.
#[derive(Debug)]
struct Verifier {
    admission: Admission,
    provider: Arc<CryptoProvider>,
    refused: Mutex<Option<Fingerprint>>,
}

impl Verifier {
    fn new(admission: Admission) -> Result<Arc<Self>> {
        Processor::check()?;
        let provider = Arc::new(rustls_graviola::default_provider());
        Ok(Arc::new(Self { admission, provider, refused: Mutex::new(None) }))
    }

    /// Who was sent away.
    fn refused(&self) -> Option<Fingerprint> {
        *unpoisoned(&self.refused)
    }

    fn admit(&self, certificate: &CertificateDer<'_>) -> std::result::Result<(), rustls::Error> {
        let admitted = match &self.admission {
            Admission::Known(pki) => match pki.find(certificate) {
                Ok(found) => found.is_some(),
                Err(e) => {
                    tracing::warn!("peers: {e}");
                    false
                }
            },
            Admission::Marked(mark) => Fingerprint::of(certificate).bytes().starts_with(mark),
            Admission::Anybody => true,
        };
        if admitted {
            return Ok(());
        }
        *unpoisoned(&self.refused) = Some(Fingerprint::of(certificate));
        // Becomes the alert access_denied.
        Err(rustls::Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
    }

    fn verify(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

fn not_tls12() -> rustls::Error {
    rustls::Error::General("TLS 1.2 is not spoken".to_owned())
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        self.admit(certificate).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        Err(not_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        self.verify(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> std::result::Result<ClientCertVerified, rustls::Error> {
        self.admit(certificate).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        Err(not_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        self.verify(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

/// Always the same certificate.
#[derive(Debug)]
struct Own(Arc<CertifiedKey>);

impl rustls::client::ResolvesClientCert for Own {
    fn resolve(&self, _hints: &[&[u8]], _schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl rustls::server::ResolvesServerCert for Own {
    fn resolve(&self, _hello: rustls::server::ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }
}

fn unpoisoned<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is spoken on a connection.
#[derive(Debug, Clone, Copy)]
struct Purpose {
    /// By ALPN (RFC 7301): hosts of other versions do not connect.
    protocol: &'static [u8],
    /// The server says [`WELCOME`].
    welcome: bool,
}

const MIGRATE: Purpose = Purpose { protocol: b"lmrun/1", welcome: true };
const PAIR: Purpose = Purpose { protocol: b"lmrun-pair/1", welcome: false };

fn client(identity: &Identity, verifier: Arc<Verifier>, purpose: Purpose) -> Result<rustls::Connection> {
    let mut config = ClientConfig::builder_with_provider(Arc::clone(&verifier.provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::new(Own(identity.certified())));
    config.alpn_protocols = vec![purpose.protocol.to_vec()];
    // Every connection proves itself anew.
    config.resumption = rustls::client::Resumption::disabled();
    // Certificates are compared, and names are not.
    config.enable_sni = false;
    let name = ServerName::try_from("lmrun").expect("a name");
    Ok(ClientConnection::new(Arc::new(config), name)?.into())
}

fn server(identity: &Identity, verifier: Arc<Verifier>, purpose: Purpose) -> Result<rustls::Connection> {
    let mut config = ServerConfig::builder_with_provider(Arc::clone(&verifier.provider))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(Own(identity.certified())));
    config.alpn_protocols = vec![purpose.protocol.to_vec()];
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(ServerConnection::new(Arc::new(config))?.into())
}

/// A connection whose ends know each other.
#[derive(Debug)]
pub struct Connection {
    pub peer: Peer,
    pub address: SocketAddr,
    pub reader: Reader,
    pub writer: Writer,
}

/// Connects to a paired host: `HOST:PORT`, an IPv6 address in brackets.
///
/// Any paired host may answer; but if there is one that is called HOST, it must be that one.
///
/// # Errors
/// [`Error::Stranger`] and [`Error::Rejected`] where they are not paired, each with what to do.
pub fn connect(address: &str, pki: &Pki) -> Result<Connection> {
    let verifier = Verifier::new(Admission::Known(pki.clone()))?;
    let identity = pki.identity()?;
    let session = client(&identity, Arc::clone(&verifier), MIGRATE)?;
    let socket = dial(address).map_err(|source| Error::Connect { address: address.to_owned(), source })?;
    let connection = establish(socket, session, &verifier, &identity, MIGRATE, |certificate| pki.find(certificate))?;
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let expected = pki.peers()?.into_iter().find(|peer| peer.name == host);
    match expected {
        Some(expected) if expected != connection.peer => {
            Err(Error::OtherPeer { peer: connection.address, expected: expected.name, found: connection.peer.name })
        }
        _ => Ok(connection),
    }
}

fn dial(address: &str) -> io::Result<TcpStream> {
    let mut failed = io::Error::from(io::ErrorKind::NotFound);
    for address in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, HANDSHAKE) {
            Ok(socket) => return Ok(socket),
            Err(e) => failed = e,
        }
    }
    Err(failed)
}

/// Connects to a host that waits to be paired and whose certificate's digest begins with `mark`.
pub(crate) fn connect_to_pair(
    address: &str,
    identity: &Identity,
    mark: &[u8],
) -> Result<(CertificateDer<'static>, Connection)> {
    let verifier = Verifier::new(Admission::Marked(mark.to_vec()))?;
    let session = client(identity, Arc::clone(&verifier), PAIR)?;
    let socket = dial(address).map_err(|source| Error::Connect { address: address.to_owned(), source })?;
    let mut shown = None;
    let connection = establish(socket, session, &verifier, identity, PAIR, |certificate| {
        shown = Some(certificate.clone().into_owned());
        Ok(Some(unnamed(certificate)))
    })?;
    Ok((shown.expect("shown in the handshake"), connection))
}

/// Somebody who is known by nothing but a certificate.
fn unnamed(certificate: &CertificateDer<'_>) -> Peer {
    Peer { name: String::new(), fingerprint: Fingerprint::of(certificate) }
}

/// A socket that paired hosts connect to.
#[derive(Debug)]
pub struct Listener {
    socket: TcpListener,
    pki: Pki,
    identity: Identity,
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Listener {
    /// Listens on `HOST:PORT`; port 0 is any free one.
    pub fn bind(address: &str, pki: Pki) -> Result<Self> {
        let identity = pki.identity()?;
        let socket = TcpListener::bind(address);
        let socket = socket.map_err(|source| Error::Listen { address: address.to_owned(), source })?;
        Ok(Self { socket, pki, identity })
    }

    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    /// Waits for a connection. Who it is, [`Incoming::authenticate`] finds out; a thread of its own should wait for that.
    pub fn accept(&self) -> io::Result<Incoming> {
        let (socket, _) = self.socket.accept()?;
        Ok(Incoming { socket, pki: self.pki.clone(), identity: self.identity.clone() })
    }
}

/// Somebody has connected.
#[derive(Debug)]
pub struct Incoming {
    socket: TcpStream,
    pki: Pki,
    identity: Identity,
}

impl Incoming {
    /// Over a socket that somebody else has accepted.
    pub fn new(socket: TcpStream, pki: &Pki) -> Result<Self> {
        Ok(Self { socket, pki: pki.clone(), identity: pki.identity()? })
    }

    /// Lets paired hosts in. Takes at most ten seconds.
    pub fn authenticate(self) -> Result<Connection> {
        let verifier = Verifier::new(Admission::Known(self.pki.clone()))?;
        let session = server(&self.identity, Arc::clone(&verifier), MIGRATE)?;
        establish(self.socket, session, &verifier, &self.identity, MIGRATE, |shown| self.pki.find(shown))
    }

    /// Lets anybody in, who has to bring a secret then.
    pub(crate) fn authenticate_to_pair(self) -> Result<(CertificateDer<'static>, Connection)> {
        let verifier = Verifier::new(Admission::Anybody)?;
        let session = server(&self.identity, Arc::clone(&verifier), PAIR)?;
        let mut shown = None;
        let connection = establish(self.socket, session, &verifier, &self.identity, PAIR, |certificate| {
            shown = Some(certificate.clone().into_owned());
            Ok(Some(unnamed(certificate)))
        })?;
        Ok((shown.expect("shown in the handshake"), connection))
    }
}

/// Shakes hands, and finds out who the other end is.
fn establish(
    socket: TcpStream,
    mut session: rustls::Connection,
    verifier: &Verifier,
    identity: &Identity,
    purpose: Purpose,
    who: impl FnOnce(&CertificateDer<'_>) -> pki::Result<Option<Peer>>,
) -> Result<Connection> {
    let failed = |source| Error::Connect { address: "somebody who is gone".to_owned(), source };
    let address = socket.peer_addr().map_err(failed)?;
    let broken = |source| Error::Handshake { peer: address, source };
    tune(&socket).map_err(broken)?;
    shake_hands(&socket, &mut session, purpose).map_err(|e| {
        let tls = e.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        let denied = matches!(tls, Some(rustls::Error::AlertReceived(AlertDescription::AccessDenied)));
        match verifier.refused() {
            Some(fingerprint) => Error::Stranger { peer: address, fingerprint },
            None if denied => Error::Rejected { peer: address, fingerprint: identity.fingerprint() },
            None => broken(e),
        }
    })?;
    let shown = session.peer_certificates().and_then(|chain| chain.first());
    let shown = shown.ok_or_else(|| broken(io::ErrorKind::PermissionDenied.into()))?;
    // It may have been forgotten in the meantime.
    let stranger = || Error::Stranger { peer: address, fingerprint: Fingerprint::of(shown) };
    let peer = who(shown)?.ok_or_else(stranger)?;
    session.set_buffer_limit(None);
    let shared = Arc::new(Shared { socket, session: Mutex::new(session) });
    let reader = Reader { shared: Arc::clone(&shared), bytes: vec![0; CHUNK], pending: 0..0 };
    Ok(Connection { peer, address, reader, writer: Writer { shared, bytes: Vec::new() } })
}

fn shake_hands(socket: &TcpStream, session: &mut rustls::Connection, purpose: Purpose) -> io::Result<()> {
    let deadline = Instant::now() + HANDSHAKE;
    socket.set_write_timeout(Some(HANDSHAKE))?;
    let mut welcomed = !purpose.welcome;
    loop {
        while session.wants_write() {
            session.write_tls(&mut &*socket)?;
        }
        if !session.is_handshaking() {
            if session.alpn_protocol() != Some(purpose.protocol) {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "the other end speaks another protocol"));
            }
            match session {
                rustls::Connection::Server(server) if !welcomed => {
                    server.writer().write_all(&[WELCOME])?;
                    welcomed = true;
                    continue;
                }
                rustls::Connection::Client(client) if !welcomed => {
                    let mut said = [0];
                    match client.reader().read(&mut said) {
                        Ok(1) if said == [WELCOME] => welcomed = true,
                        Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                        Ok(_) => return Err(io::ErrorKind::InvalidData.into()),
                        Err(e) => return Err(e),
                    }
                }
                _ => {}
            }
            if welcomed {
                socket.set_read_timeout(None)?;
                return socket.set_write_timeout(None);
            }
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        socket.set_read_timeout(Some(left))?;
        if session.read_tls(&mut &*socket)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if let Err(e) = session.process_new_packets() {
            // The other end is told why.
            let _ = session.write_tls(&mut &*socket);
            return Err(io::Error::new(io::ErrorKind::InvalidData, e));
        }
    }
}

/// What the two halves have in common. The session's lock is never held while the socket is waited for: each half goes on
/// while the other one waits.
struct Shared {
    socket: TcpStream,
    session: Mutex<rustls::Connection>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("socket", &self.socket).finish_non_exhaustive()
    }
}

/// The kernel's word for a socket's timeout is that of one that does not block.
fn silence(e: io::Error) -> io::Error {
    if e.kind() == io::ErrorKind::WouldBlock { io::ErrorKind::TimedOut.into() } else { e }
}

/// The half that receives. Its end is that of [`Writer::finish`]; that of the connection alone is an error.
#[derive(Debug)]
pub struct Reader {
    shared: Arc<Shared>,
    /// Bytes as they came, and which of them the session has not had.
    bytes: Vec<u8>,
    pending: Range<usize>,
}

impl Reader {
    /// After such a silence of the other end, [`Read::read`] fails with [`io::ErrorKind::TimedOut`]; it can be called again.
    pub fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.shared.socket.set_read_timeout(timeout)
    }

    /// What it all goes through, for timeouts and to shut it down; not to be read or written.
    pub fn socket(&self) -> &TcpStream {
        &self.shared.socket
    }
}

/// For poll(2), which does not see what the session has received already, and to shut the connection down.
impl AsFd for Reader {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.socket.as_fd()
    }
}

impl Read for Reader {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if out.is_empty() {
            return Ok(0);
        }
        let mut filled = 0;
        loop {
            let mut session = unpoisoned(&self.shared.session);
            loop {
                match session.reader().read(&mut out[filled..]) {
                    Ok(0) => return Ok(filled),
                    Ok(len) => filled += len,
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                    Err(_) if filled > 0 => return Ok(filled),
                    Err(e) => return Err(e),
                }
                if filled == out.len() {
                    return Ok(filled);
                }
                if self.pending.is_empty() {
                    break;
                }
                self.pending.start += session.read_tls(&mut &self.bytes[self.pending.clone()])?;
                session.process_new_packets().map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
            }
            drop(session);
            if filled > 0 {
                return Ok(filled);
            }
            let len = (&self.shared.socket).read(&mut self.bytes).map_err(silence)?;
            if len == 0 {
                // So that the session knows, and fails unless the other end has finished.
                unpoisoned(&self.shared.session).read_tls(&mut io::empty())?;
            }
            self.pending = 0..len;
        }
    }
}

/// The half that sends. A message should be written by one call: each becomes packets of its own.
#[derive(Debug)]
pub struct Writer {
    shared: Arc<Shared>,
    bytes: Vec<u8>,
}

impl Writer {
    /// The last word: the other end reads its end of file, and knows that nothing is missing.
    pub fn finish(mut self) -> io::Result<()> {
        unpoisoned(&self.shared.session).send_close_notify();
        self.send()?;
        match self.shared.socket.shutdown(Shutdown::Write) {
            // It has heard enough, and gone.
            Err(e) if e.kind() == io::ErrorKind::NotConnected => Ok(()),
            done => done,
        }
    }

    /// Sends what the session has to say.
    fn send(&mut self) -> io::Result<()> {
        self.bytes.clear();
        let mut session = unpoisoned(&self.shared.session);
        while session.wants_write() {
            session.write_tls(&mut self.bytes)?;
        }
        drop(session);
        (&self.shared.socket).write_all(&self.bytes).map_err(silence)
    }
}

impl AsFd for Writer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.socket.as_fd()
    }
}

impl Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = unpoisoned(&self.shared.session).writer().write(&bytes[..bytes.len().min(CHUNK)])?;
        self.send()?;
        Ok(taken)
    }

    /// Nothing is held back.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
#[path = "tls_tests.rs"]
mod tests;
