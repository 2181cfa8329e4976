//! Two hosts get to know each other: afterwards each has the other's certificate ([`crate::transfer::pki`]).
//!
//! One host waits and prints a *code*; at the other one it is typed in. The code is what nobody else has: the head of the
//! digest of the first host's certificate, by which the second knows it, and a secret that works once, by which the first
//! knows the second. So nobody in between can take part, whatever the network does: who connects is shown the
//! certificate in a TLS handshake and says the secret to nobody else.
//!
//! Between hosts that have ssh there is no code: each end writes its name and its certificate to the other.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pem::Pem;

use crate::transfer::pki::{self, Peer, Pki};
use crate::transfer::tls::{self, Connection, Incoming, Listener};

/// How long a host waits for the one that has the code.
pub const PATIENCE: Duration = Duration::from_secs(600);

/// Where a host waits: beside the port of [`tls::PORT`].
pub const PORT: u16 = tls::PORT + 1;

/// How long the other end may be silent.
const SILENCE: Duration = Duration::from_secs(10);

/// Bytes of a secret, and of the digest that goes with it.
const HALF: usize = 16;

/// What a pairing over ssh begins with.
const GREETING: &str = "lmrun-pair/1";

/// Longest text of a pairing over ssh, in bytes.
const LONGEST: u64 = 16 << 10;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0:?} is not a code that `lmrun pair --listen` prints")]
    Code(String),
    #[error(
        "the host at {address} is not the one that has printed this code: its certificate is {fingerprint}; hint: if \
         the code and the address are right, somebody is in between"
    )]
    WrongHost { address: SocketAddr, fingerprint: pki::Fingerprint },
    #[error("{address} says: {said}")]
    Refused { address: SocketAddr, said: String },
    #[error("nobody came with the code within {0:?}")]
    Nobody(Duration),
    #[error("connection with {peer}")]
    Connection { peer: SocketAddr, source: io::Error },
    #[error("wait for the other host")]
    Wait(#[source] io::Error),
    #[error("{0:?} is not ssh://[user@]host[:port]")]
    Destination(String),
    #[error("cannot run ssh")]
    Ssh(#[source] io::Error),
    #[error("lmrun at {0} did not pair; hint: it must be installed there, and the user be root")]
    Remote(String),
    #[error("the other host's answer is not that of lmrun pair: {0}")]
    Answer(&'static str),
    #[error(transparent)]
    Tls(#[from] tls::Error),
    #[error(transparent)]
    Pki(#[from] pki::Error),
}

pub type Result<T> = std::result::Result<T, Error>;

/// What is printed here and typed in there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Code {
    secret: [u8; HALF],
    /// The head of the digest of the certificate.
    mark: [u8; HALF],
}

/// RFC 4648, base32, in lower case.
const DIGITS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

impl Code {
    fn text(&self) -> String {
        let bytes = [self.secret, self.mark].concat();
        let bits = bytes.iter().flat_map(|byte| (0..8).rev().map(move |n| byte >> n & 1));
        let bits: Vec<u8> = bits.collect();
        let digit = |five: &[u8]| five.iter().chain(&[0; 4]).take(5).fold(0, |n, bit| n << 1 | bit);
        bits.chunks(5).map(|five| char::from(DIGITS[usize::from(digit(five))])).collect()
    }

    /// None if it is no code.
    fn parse(text: &str) -> Option<Self> {
        let (mut bytes, mut held, mut bits) = (Vec::new(), 0u32, 0);
        for c in text.trim().bytes() {
            let digit = DIGITS.iter().position(|d| *d == c.to_ascii_lowercase())?;
            held = (held << 5 | digit as u32) & 0xfff;
            bits += 5;
            if bits >= 8 {
                bits -= 8;
                bytes.push((held >> bits) as u8);
            }
        }
        let (secret, mark) = bytes.split_first_chunk()?;
        let code = Self { secret: *secret, mark: mark.try_into().ok()? };
        (code.text().len() == text.trim().len()).then_some(code)
    }
}

/// A host that waits for another one.
#[derive(Debug)]
pub struct Invitation {
    listener: Listener,
    code: Code,
    pki: Pki,
    name: String,
}

impl Invitation {
    /// Listens on `HOST:PORT`, or on [`PORT`] of all addresses. `name` is what this host wants to be called at the other.
    pub fn open(listen: Option<&str>, pki: Pki, name: &str) -> Result<Self> {
        check_name(name)?;
        let listener = match listen {
            Some(address) => Listener::bind(address, pki.clone())?,
            // A host without IPv6 has no such address.
            None => Listener::bind(&format!("[::]:{PORT}"), pki.clone())
                .or_else(|_| Listener::bind(&format!("0.0.0.0:{PORT}"), pki.clone()))?,
        };
        let mut code = Code { secret: [0; HALF], mark: [0; HALF] };
        graviola::random::fill(&mut code.secret).map_err(|e| Error::Wait(io::Error::other(format!("{e:?}"))))?;
        code.mark.copy_from_slice(&pki.identity()?.fingerprint().bytes()[..HALF]);
        Ok(Self { listener, code, pki, name: name.to_owned() })
    }

    /// The code, a word of 52 letters and digits. Whoever has it can pair with this host.
    pub fn code(&self) -> String {
        self.code.text()
    }

    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Waits until a host has come with the code, which is worth nothing then. Others are sent away.
    pub fn wait(self, patience: Duration) -> Result<Peer> {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let mut polled = [PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut polled, timeout) {
                Ok(0) => return Err(Error::Nobody(patience)),
                Ok(_) => {}
                Err(nix::errno::Errno::EINTR) => continue,
                Err(e) => return Err(Error::Wait(e.into())),
            }
            let admitted = self.listener.accept().map_err(Error::Wait).and_then(|incoming| self.admit(incoming));
            match admitted {
                Ok(peer) => return Ok(peer),
                Err(e) => tracing::warn!("somebody did not pair: {}", crate::runtime::chain(&e)),
            }
        }
    }

    fn admit(&self, incoming: Incoming) -> Result<Peer> {
        let (certificate, Connection { peer, address, mut reader, mut writer }) = incoming.authenticate_to_pair()?;
        let broken = |source| Error::Connection { peer: address, source };
        reader.set_timeout(Some(SILENCE)).map_err(broken)?;
        let mut secret = [0; HALF];
        reader.read_exact(&mut secret).map_err(broken)?;
        let name = read_word(&mut reader).map_err(broken)?;
        // The digest says nothing of how much of a secret is right.
        let right = digest(&secret) == digest(&self.code.secret);
        let trusted = match right {
            true => self.pki.trust(&name, &certificate).map_err(|e| e.to_string()),
            false => Err("this is not the code that was printed here".to_owned()),
        };
        let answer = match &trusted {
            Ok(()) => [&[1], &word(&self.name)[..]].concat(),
            Err(said) => [&[0], &word(said)[..]].concat(),
        };
        let told = writer.write_all(&answer).map_err(broken);
        trusted.map_err(|said| Error::Refused { address, said })?;
        told?;
        // It may be gone with what it wanted.
        let _ = writer.finish();
        Ok(Peer { name, ..peer })
    }
}

/// Pairs with the host that waits at `HOST:PORT` and has printed `code`.
pub fn join(address: &str, code: &str, pki: &Pki, name: &str) -> Result<Peer> {
    check_name(name)?;
    let code = Code::parse(code).ok_or_else(|| Error::Code(code.to_owned()))?;
    let met = tls::connect_to_pair(address, &pki.identity()?, &code.mark).map_err(|e| match e {
        tls::Error::Stranger { peer, fingerprint } => Error::WrongHost { address: peer, fingerprint },
        e => e.into(),
    })?;
    let (certificate, Connection { peer, address, mut reader, mut writer }) = met;
    let broken = |source| Error::Connection { peer: address, source };
    reader.set_timeout(Some(SILENCE)).map_err(broken)?;
    writer.write_all(&[&code.secret[..], &word(name)].concat()).map_err(broken)?;
    let mut agreed = [0];
    reader.read_exact(&mut agreed).map_err(broken)?;
    let said = read_word(&mut reader).map_err(broken)?;
    if agreed != [1] {
        return Err(Error::Refused { address, said });
    }
    pki.trust(&said, &certificate)?;
    Ok(Peer { name: said, ..peer })
}

fn check_name(name: &str) -> Result<()> {
    if pki::is_name(name) { Ok(()) } else { Err(pki::Error::Name(name.to_owned()).into()) }
}

fn digest(bytes: &[u8]) -> pki::Fingerprint {
    pki::Fingerprint::of(&bytes.into())
}

/// A text of at most 255 bytes, its length before it.
fn word(text: &str) -> Vec<u8> {
    let len = (0..=text.len().min(255)).rev().find(|len| text.is_char_boundary(*len)).unwrap_or(0);
    [&[len as u8], &text.as_bytes()[..len]].concat()
}

/// Reads what [`word`] makes; what a terminal would take for a command is left out.
fn read_word(from: &mut impl Read) -> io::Result<String> {
    let mut len = [0];
    from.read_exact(&mut len)?;
    let mut bytes = vec![0; len[0].into()];
    from.read_exact(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).chars().filter(|c| !c.is_control()).collect())
}

/// Pairs with the host that `ssh://[user@]host[:port]` leads to, where lmrun is run by ssh.
pub fn over_ssh(destination: &str, pki: &Pki, name: &str) -> Result<Peer> {
    check_name(name)?;
    let bad = || Error::Destination(destination.to_owned());
    let place = destination.strip_prefix("ssh://").map(|place| place.trim_end_matches('/')).ok_or_else(bad)?;
    let (place, port) = match place.rsplit_once(':').filter(|(_, port)| !port.contains(']')) {
        Some((place, port)) => (place, Some(port.parse::<u16>().map_err(|_| bad())?)),
        None => (place, None),
    };
    if place.is_empty() || place.starts_with('-') {
        return Err(bad());
    }
    let mut ssh = Command::new("ssh");
    if let Some(port) = port {
        ssh.args(["-p", &port.to_string()]);
    }
    ssh.args(["-T", "--", &place.replace(['[', ']'], ""), "lmrun", "pair", "--stdio"]);
    pair_by(ssh, place, pki, name)
}

/// Pairs with an lmrun that runs as `command` and reads what is written to it.
fn pair_by(mut command: Command, place: &str, pki: &Pki, name: &str) -> Result<Peer> {
    let ours = introduction(pki, name)?;
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().map_err(Error::Ssh)?;
    let mut said = Vec::new();
    let exchanged = {
        // Its end is the end of what we say. If the other side does not read it, its exit code says why.
        let _ = child.stdin.take().expect("piped").write_all(ours.as_bytes());
        child.stdout.take().expect("piped").take(LONGEST).read_to_end(&mut said)
    };
    let ended = child.wait().map_err(Error::Ssh)?;
    exchanged.map_err(Error::Ssh)?;
    if !ended.success() {
        return Err(Error::Remote(place.to_owned()));
    }
    trust_introduced(&said, pki)
}

/// The other end of [`over_ssh`]: standard input and output are those of ssh.
pub fn over_stdio(pki: &Pki, name: &str, input: impl Read, mut output: impl Write) -> Result<Peer> {
    check_name(name)?;
    let mut said = Vec::new();
    input.take(LONGEST).read_to_end(&mut said).map_err(Error::Wait)?;
    let ours = introduction(pki, name)?;
    let peer = trust_introduced(&said, pki)?;
    output.write_all(ours.as_bytes()).and_then(|()| output.flush()).map_err(Error::Wait)?;
    Ok(peer)
}

fn introduction(pki: &Pki, name: &str) -> Result<String> {
    let certificate = Pem::new("CERTIFICATE", pki.identity()?.certificate().to_vec());
    Ok(format!("{GREETING} {name}\n{}", pem::encode(&certificate)))
}

fn trust_introduced(said: &[u8], pki: &Pki) -> Result<Peer> {
    let text = std::str::from_utf8(said).map_err(|_| Error::Answer("it is not text"))?;
    let (greeting, rest) = text.split_once('\n').ok_or(Error::Answer("it is one line"))?;
    let name = greeting.strip_prefix(GREETING).ok_or(Error::Answer("another greeting"))?.trim();
    let certificate = pki::certificate(rest).ok_or(Error::Answer("no certificate"))?;
    pki.trust(name, &certificate)?;
    Ok(Peer { name: name.to_owned(), fingerprint: pki::Fingerprint::of(&certificate) })
}

#[cfg(test)]
#[path = "pairing_tests.rs"]
mod tests;
