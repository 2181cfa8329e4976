//! HTTP/1.1 over a unix socket (RFC 9112), as much of it as engines' APIs need: one request a connection, JSON or a
//! stream in the body. Heads are taken apart by `httparse`.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde_json::Value;

/// Longest head of a response, in bytes.
const LONGEST_HEAD: usize = 1 << 16;
const MOST_HEADERS: usize = 64;
/// Longest JSON answer, in bytes: a list of all images of a host has hundreds of kilobytes.
const LONGEST_JSON: u64 = 64 << 20;
/// What is uploaded goes in pieces of this many bytes.
const PIECE: usize = 1 << 18;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{}", path.display())]
    Socket { path: PathBuf, source: io::Error },
    #[error("{method} {target}")]
    Io { method: &'static str, target: String, source: io::Error },
    /// The engine's own words.
    #[error("{method} {target}: {message} (status {status})")]
    Status { method: &'static str, target: String, status: u16, message: String },
    #[error("{method} {target}: an answer that is no HTTP/1.1: {what}")]
    Malformed { method: &'static str, target: String, what: String },
}

impl Error {
    /// The engine does not have what was named.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Error::Status { status: 404, .. })
    }
}

pub type Result<T> = std::result::Result<T, Error>;

/// Where an engine listens. Every request is a connection of its own.
#[derive(Debug, Clone)]
pub struct Server {
    socket: PathBuf,
    /// Comes before every target: the version of the API.
    prefix: String,
}

enum Content<'a> {
    None,
    Json(&'a Value),
    Stream(&'static str, &'a mut dyn Read),
}

impl Server {
    pub fn new(socket: &Path) -> Server {
        Server { socket: socket.to_owned(), prefix: String::new() }
    }

    pub fn with_prefix(mut self, prefix: String) -> Server {
        self.prefix = prefix;
        self
    }

    /// # Errors
    /// What the socket says, [`Error::Status`] for anything but success. So for all requests.
    pub fn get(&self, target: &str) -> Result<Value> {
        self.json("GET", target, Content::None)
    }

    pub fn post(&self, target: &str, body: Option<&Value>) -> Result<Value> {
        self.json("POST", target, body.map_or(Content::None, Content::Json))
    }

    pub fn delete(&self, target: &str) -> Result<Value> {
        self.json("DELETE", target, Content::None)
    }

    /// The body of the answer, as it comes.
    pub fn download(&self, target: &str) -> Result<Body<BufReader<UnixStream>>> {
        self.ask("GET", target, Content::None)
    }

    /// Sends all of a stream; gives the answer as text, in which some requests report their failure.
    pub fn upload(&self, target: &str, kind: &'static str, from: &mut dyn Read) -> Result<String> {
        text(self.ask("POST", target, Content::Stream(kind, from))?).map_err(|source| Error::Io {
            method: "POST",
            target: target.to_owned(),
            source,
        })
    }

    /// `Null` for an answer without content.
    fn json(&self, method: &'static str, target: &str, content: Content<'_>) -> Result<Value> {
        let io = |source| Error::Io { method, target: target.to_owned(), source };
        let text = text(self.ask(method, target, content)?).map_err(io)?;
        if text.trim().is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_str(&text).map_err(|e| io(e.into()))
    }

    fn ask(&self, method: &'static str, target: &str, content: Content<'_>) -> Result<Body<BufReader<UnixStream>>> {
        let io = |source| Error::Io { method, target: target.to_owned(), source };
        let mut stream =
            UnixStream::connect(&self.socket).map_err(|source| Error::Socket { path: self.socket.clone(), source })?;
        match send(&mut stream, method, &format!("{}{target}", self.prefix), content) {
            // Who refuses a stream may answer and close before all of it has come.
            Err(e) if e.kind() != ErrorKind::BrokenPipe => return Err(io(e)),
            _ => {}
        }
        let mut answer = BufReader::new(stream);
        let head = read_head(&mut answer).map_err(io)?;
        let malformed = |what: &str| Error::Malformed { method, target: target.to_owned(), what: what.to_owned() };
        let (status, framing) = parse_head(&head).map_err(|what| malformed(&what))?;
        let body = Body { from: answer, framing };
        if (200..300).contains(&status) || status == 304 {
            return Ok(body);
        }
        let message = text(body).map_err(io)?;
        let message = serde_json::from_str::<Value>(&message)
            .ok()
            .and_then(|json| Some(json.get("message")?.as_str()?.to_owned()))
            .unwrap_or(message);
        Err(Error::Status { method, target: target.to_owned(), status, message: message.trim().to_owned() })
    }
}

fn text(body: impl Read) -> io::Result<String> {
    let mut text = String::new();
    if body.take(LONGEST_JSON).read_to_string(&mut text)? as u64 == LONGEST_JSON {
        return Err(io::Error::new(ErrorKind::FileTooLarge, "the answer is too long"));
    }
    Ok(text)
}

fn send(to: &mut impl Write, method: &str, target: &str, content: Content<'_>) -> io::Result<()> {
    let head = format!("{method} {target} HTTP/1.1\r\nHost: engine\r\nConnection: close\r\n");
    match content {
        Content::None => write!(to, "{head}Content-Length: 0\r\n\r\n"),
        Content::Json(json) => {
            let body = json.to_string();
            write!(to, "{head}Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}", body.len())
        }
        Content::Stream(kind, from) => {
            write!(to, "{head}Content-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n")?;
            let mut piece = vec![0; PIECE];
            loop {
                match from.read(&mut piece) {
                    Ok(0) => break write!(to, "0\r\n\r\n"),
                    Ok(n) => {
                        write!(to, "{n:x}\r\n")?;
                        to.write_all(&piece[..n])?;
                        to.write_all(b"\r\n")?;
                    }
                    Err(e) if e.kind() == ErrorKind::Interrupted => {}
                    Err(e) => break Err(e),
                }
            }
        }
    }
}

/// Up to the empty line, that included.
fn read_head(from: &mut impl BufRead) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let left = (LONGEST_HEAD - head.len()) as u64;
        if from.by_ref().take(left).read_until(b'\n', &mut head)? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(head)
}

fn parse_head(head: &[u8]) -> std::result::Result<(u16, Framing), String> {
    let mut headers = [httparse::EMPTY_HEADER; MOST_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    response.parse(head).map_err(|e| e.to_string())?;
    let status = response.code.ok_or("no status")?;
    let value = |name: &str| {
        let found = response.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name))?;
        std::str::from_utf8(found.value).ok().map(str::trim)
    };
    let framing = match (value("Transfer-Encoding"), value("Content-Length")) {
        _ if status == 204 || status == 304 => Framing::Left(0),
        (Some(encoding), _) if encoding.eq_ignore_ascii_case("chunked") => Framing::Chunked { left: 0, first: true },
        (Some(encoding), _) => return Err(format!("Transfer-Encoding {encoding}")),
        (None, Some(length)) => Framing::Left(length.parse().map_err(|_| format!("Content-Length {length}"))?),
        (None, None) => Framing::UntilEnd,
    };
    Ok((status, framing))
}

/// How long a body is (RFC 9112, 6.3).
#[derive(Debug)]
enum Framing {
    Left(u64),
    Chunked { left: u64, first: bool },
    UntilEnd,
}

/// The body of an answer.
#[derive(Debug)]
pub struct Body<R> {
    from: R,
    framing: Framing,
}

impl<R: BufRead> Body<R> {
    /// The size of the next chunk; 0: that was the last.
    fn next_chunk(&mut self, first: bool) -> io::Result<u64> {
        let mut line = Vec::new();
        if !first {
            self.from.by_ref().take(2).read_until(b'\n', &mut line)?;
            line.clear();
        }
        self.from.by_ref().take(1 << 10).read_until(b'\n', &mut line)?;
        match httparse::parse_chunk_size(&line) {
            Ok(httparse::Status::Complete((_, size))) => Ok(size),
            Ok(httparse::Status::Partial) => Err(ErrorKind::UnexpectedEof.into()),
            Err(_) => Err(io::Error::new(ErrorKind::InvalidData, "a chunk without a size")),
        }
    }
}

impl<R: BufRead> Read for Body<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        if let Framing::Chunked { left: 0, first } = self.framing {
            self.framing = match self.next_chunk(first)? {
                0 => Framing::Left(0),
                left => Framing::Chunked { left, first: false },
            };
        }
        let left = match &mut self.framing {
            Framing::UntilEnd => return self.from.read(buf),
            Framing::Left(0) => return Ok(0),
            Framing::Left(left) | Framing::Chunked { left, .. } => left,
        };
        let most = buf.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
        let n = self.from.read(&mut buf[..most])?;
        if n == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        *left -= n as u64;
        Ok(n)
    }
}

/// A segment of a path, or a value in a query, with what has a meaning there escaped (RFC 3986, 2.1).
pub fn escaped(text: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"-._~".contains(&b);
    text.bytes().map(|b| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    fn body(head: &str, rest: &[u8]) -> io::Result<String> {
        let (status, framing) = parse_head(format!("{head}\r\n\r\n").as_bytes()).map_err(io::Error::other)?;
        assert_eq!(status, 200);
        text(Body { from: BufReader::with_capacity(3, rest), framing })
    }

    #[test]
    fn bodies_end_where_the_head_says() {
        assert_eq!(body("HTTP/1.1 200 OK\r\ncontent-length: 5", b"helloXX").unwrap(), "hello");
        assert_eq!(body("HTTP/1.1 200 OK", b"all").unwrap(), "all");
        let chunked = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked";
        assert_eq!(body(chunked, b"5\r\nhello\r\na;x=y\r\n, world 12\r\n0\r\n\r\n").unwrap(), "hello, world 12");
        for short in [&b"5\r\nhel"[..], b"5\r\nhello", b"", b"zz\r\n"] {
            assert!(body(chunked, short).is_err(), "{short:?}");
        }
        assert!(body("HTTP/1.1 200 OK\r\nContent-Length: 5", b"hel").is_err());
        for bad in ["HTTP/1.1 200 OK\r\nContent-Length: x", "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip", "nonsense"] {
            assert!(parse_head(format!("{bad}\r\n\r\n").as_bytes()).is_err(), "{bad}");
        }
    }

    /// Answers one request, of which it gives the bytes up to `until`.
    fn serve(name: &str, until: &'static str, answer: &'static str) -> (Server, std::thread::JoinHandle<String>) {
        let path = std::env::temp_dir().join(format!("lmrun-http-{}-{name}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        let server = Server::new(&path).with_prefix("/v1".into());
        let answering = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut got = Vec::new();
            while !got.ends_with(until.as_bytes()) {
                let mut byte = [0];
                stream.read_exact(&mut byte).unwrap();
                got.push(byte[0]);
            }
            stream.write_all(answer.as_bytes()).unwrap();
            std::fs::remove_file(path).unwrap();
            String::from_utf8(got).unwrap()
        });
        (server, answering)
    }

    #[test]
    fn json_goes_out_and_comes_in() {
        let (server, answering) =
            serve("json", "{\"a\":1}", "HTTP/1.1 201 Created\r\nContent-Length: 8\r\n\r\n{\"b\": 2}");
        assert_eq!(server.post("/x", Some(&serde_json::json!({"a": 1}))).unwrap()["b"], 2);
        let asked = answering.join().unwrap();
        assert!(asked.starts_with("POST /v1/x HTTP/1.1\r\nHost: engine\r\n"), "{asked}");
        assert!(asked.contains("Content-Length: 7\r\n"), "{asked}");
    }

    #[test]
    fn streams_go_out_in_chunks() {
        let (server, answering) = serve("stream", "0\r\n\r\n", "HTTP/1.1 200 OK\r\n\r\nloaded");
        assert_eq!(server.upload("/load", "application/x-tar", &mut &b"0123456789abcdef0"[..]).unwrap(), "loaded");
        assert!(answering.join().unwrap().ends_with("\r\n\r\n11\r\n0123456789abcdef0\r\n0\r\n\r\n"));
    }

    #[test]
    fn what_the_engine_refuses_is_told_in_its_words() {
        let answer = "HTTP/1.1 404 Not Found\r\nContent-Length: 23\r\n\r\n{\"message\":\"no such x\"}";
        let (server, answering) = serve("refused", "\r\n\r\n", answer);
        let error = server.get("/x").unwrap_err();
        answering.join().unwrap();
        assert!(error.is_not_found());
        assert_eq!(error.to_string(), "GET /x: no such x (status 404)");
    }

    #[test]
    fn names_are_escaped() {
        assert_eq!(escaped("my net/1?x"), "my%20net%2F1%3Fx");
    }
}
