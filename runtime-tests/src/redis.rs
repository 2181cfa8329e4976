//! Redis in a container, and a client that checks every answer.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Error, ErrorKind, Read, Result, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::needs;

/// How the server is started: nothing on disk, open to whoever is in its network.
pub const ARGS: [&str; 12] = [
    "/usr/bin/redis-server",
    "--save",
    "",
    "--appendonly",
    "no",
    "--protected-mode",
    "no",
    "--bind",
    "*",
    "-::*",
    "--daemonize",
    "no",
];

/// Makes a root file system of the host's redis-server and the libraries that it is linked to.
pub fn rootfs(dir: &Path) -> Result<()> {
    let program = needs::on_path("redis-server")
        .ok_or_else(|| Error::new(ErrorKind::NotFound, "redis-server is not installed"))?;
    for name in ["proc", "dev", "sys", "tmp", "run", "usr/bin"] {
        fs::create_dir_all(dir.join(name))?;
    }
    fs::copy(&program, dir.join("usr/bin/redis-server"))?;
    let listed = Command::new("ldd").arg(&program).output()?.stdout;
    for word in String::from_utf8_lossy(&listed).split_whitespace().filter(|w| w.starts_with('/')) {
        let target = dir.join(word.trim_start_matches('/'));
        fs::create_dir_all(target.parent().unwrap_or(dir))?;
        fs::copy(word, target)?;
    }
    Ok(())
}

/// An answer of the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    Status(String),
    Number(i64),
    Bytes(Option<Vec<u8>>),
}

/// One connection.
pub struct Client {
    stream: TcpStream,
    answers: BufReader<TcpStream>,
}

impl Client {
    /// `host:port`; every answer must come within `patience`.
    pub fn connect(address: &str, patience: Duration) -> Result<Client> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(patience))?;
        let answers = BufReader::with_capacity(1 << 16, stream.try_clone()?);
        Ok(Client { stream, answers })
    }

    /// Sends commands without waiting.
    pub fn send(&mut self, commands: &[&[&[u8]]]) -> Result<()> {
        let mut request = Vec::new();
        for command in commands {
            write!(request, "*{}\r\n", command.len())?;
            for word in *command {
                write!(request, "${}\r\n", word.len())?;
                request.extend_from_slice(word);
                request.extend_from_slice(b"\r\n");
            }
        }
        self.stream.write_all(&request)
    }

    /// The next answer.
    pub fn receive(&mut self) -> Result<Answer> {
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            return Err(Error::new(ErrorKind::UnexpectedEof, "the server closed the connection"));
        }
        let strange = || Error::new(ErrorKind::InvalidData, format!("answer {line:?}"));
        let (kind, rest) = line.trim_end().split_at_checked(1).ok_or_else(strange)?;
        match kind {
            "+" => Ok(Answer::Status(rest.to_owned())),
            ":" => rest.parse().map(Answer::Number).map_err(|_| strange()),
            "$" if rest == "-1" => Ok(Answer::Bytes(None)),
            "$" => {
                let length: usize = rest.parse().map_err(|_| strange())?;
                let mut bytes = vec![0; length + 2];
                self.answers.read_exact(&mut bytes)?;
                bytes.truncate(length);
                Ok(Answer::Bytes(Some(bytes)))
            }
            _ => Err(strange()),
        }
    }

    pub fn ask(&mut self, command: &[&[u8]]) -> Result<Answer> {
        self.send(&[command])?;
        self.receive()
    }

    /// Stores all keys of a [`Writer`], so that the server's memory does not grow by what that writes.
    pub fn fill_keys(&mut self) -> Result<()> {
        for first in (0..KEYS).step_by(100) {
            let keys: Vec<String> = (first..first + 100).map(|key| format!("key:{key}")).collect();
            let commands: Vec<[&[u8]; 3]> = keys.iter().map(|key| [&b"SET"[..], key.as_bytes(), b"1000000"]).collect();
            self.send(&commands.iter().map(|command| &command[..]).collect::<Vec<_>>())?;
            keys.iter().try_for_each(|_| demand(&Answer::Status("OK".into()), &self.receive()?))?;
        }
        Ok(())
    }

    /// Stores `mib` MiB of bytes that do not compress, in values of 64 KiB.
    pub fn load(&mut self, mib: usize, mut progress: impl FnMut(usize)) -> Result<()> {
        let mut noise = fs::File::open("/dev/urandom")?;
        let mut value = vec![0; 65_000];
        for n in 0..mib * 16 {
            noise.read_exact(&mut value)?;
            let key = format!("load:{n}");
            demand(&Answer::Status("OK".into()), &self.ask(&[b"SET", key.as_bytes(), &value])?)?;
            progress(n / 16);
        }
        Ok(())
    }
}

/// Waits until the server answers.
pub fn wait_until_up(address: &str) -> Result<Client> {
    let begin = Instant::now();
    loop {
        let answered = Client::connect(address, Duration::from_secs(60)).and_then(|mut client| {
            client.ask(&[b"PING"])?;
            Ok(client)
        });
        match answered {
            Err(e) if begin.elapsed() > Duration::from_secs(10) => return Err(e),
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
            done => return done,
        }
    }
}

fn demand(expected: &Answer, got: &Answer) -> Result<()> {
    if expected == got {
        Ok(())
    } else {
        Err(Error::new(ErrorKind::InvalidData, format!("expected {expected:?}, got {got:?}")))
    }
}

/// What a client saw that wrote all the time.
#[derive(Debug, Default)]
pub struct Record {
    /// Pairs of SET and INCR that were acknowledged.
    pub acknowledged: u64,
    /// The last acknowledged value of each key.
    values: HashMap<u64, u64>,
    /// The longest times between two answers: when the gap began, how long it was; longest first.
    pub gaps: Vec<(Instant, Duration)>,
    /// Why the client ended before it was told to.
    pub failure: Option<String>,
}

impl Record {
    /// The longest gap that ended after `since`.
    pub fn longest_gap(&self, since: Instant) -> Duration {
        self.gaps.iter().filter(|(begin, gap)| *begin + *gap >= since).map(|(_, gap)| *gap).max().unwrap_or_default()
    }

    /// The longest gap that ended between the two.
    pub fn longest_gap_between(&self, begin: Instant, end: Instant) -> Duration {
        let ended = |since: &Instant, gap: &Duration| (begin..=end).contains(&(*since + *gap));
        self.gaps.iter().filter(|(since, gap)| ended(since, gap)).map(|(_, gap)| *gap).max().unwrap_or_default()
    }

    /// Asks the server for all that was acknowledged: (writes lost, writes doubled, keys with a wrong value).
    pub fn audit(&self, client: &mut Client) -> Result<(u64, u64, u64)> {
        let count = match client.ask(&[b"GET", b"count"])? {
            Answer::Bytes(Some(text)) => String::from_utf8_lossy(&text).parse().unwrap_or(0),
            _ => 0u64,
        };
        let mut wrong = 0;
        for (key, value) in &self.values {
            let stored = client.ask(&[b"GET", format!("key:{key}").as_bytes()])?;
            wrong += u64::from(stored != Answer::Bytes(Some(value.to_string().into_bytes())));
        }
        Ok((self.acknowledged.saturating_sub(count), count.saturating_sub(self.acknowledged), wrong))
    }
}

/// A client on one connection that writes as fast as answers come, until it is stopped.
pub struct Writer {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
    thread: std::thread::JoinHandle<Record>,
}

impl Writer {
    /// Starts on a connection that is already made.
    pub fn start(client: Client) -> Writer {
        Writer::paced(client, Duration::ZERO)
    }

    /// As [`Writer::start`], with a pause after each pair.
    pub fn paced(mut client: Client, pause: Duration) -> Writer {
        let stop = Arc::new(AtomicBool::new(false));
        let told = stop.clone();
        let acknowledged = Arc::new(AtomicU64::new(0));
        let count = acknowledged.clone();
        let thread = std::thread::spawn(move || {
            let mut record = Record::default();
            let mut last = Instant::now();
            while !told.load(Ordering::Relaxed) {
                let outcome = write_pair(&mut client, &mut record, &mut last);
                if let Err(e) = outcome {
                    record.failure = Some(e.to_string());
                    note_gap(&mut record.gaps, last);
                    break;
                }
                count.store(record.acknowledged, Ordering::Relaxed);
                if !pause.is_zero() {
                    std::thread::sleep(pause);
                    last = Instant::now();
                }
            }
            record.gaps.sort_by_key(|gap| std::cmp::Reverse(gap.1));
            record
        });
        Writer { stop, acknowledged, thread }
    }

    /// Whether it still gets its answers.
    pub fn goes_on(&self) -> bool {
        !self.thread.is_finished()
    }

    /// How many pairs were acknowledged so far.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Relaxed)
    }

    pub fn finish(self) -> Record {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("a writer does not panic")
    }
}

/// Gaps that are worth to be remembered.
fn note_gap(gaps: &mut Vec<(Instant, Duration)>, since: Instant) {
    let gap = since.elapsed();
    if gap > Duration::from_millis(2) {
        gaps.push((since, gap));
    }
}

/// Of a writer's keys.
const KEYS: u64 = 20_000;

/// SET one of [`KEYS`], then INCR: each answer is awaited and must be right.
fn write_pair(client: &mut Client, record: &mut Record, last: &mut Instant) -> Result<()> {
    let next = record.acknowledged + 1;
    let key = next.wrapping_mul(0x9e37_79b9_7f4a_7c15) % KEYS;
    let set = client.ask(&[b"SET", format!("key:{key}").as_bytes(), next.to_string().as_bytes()])?;
    note_gap(&mut record.gaps, *last);
    *last = Instant::now();
    demand(&Answer::Status("OK".into()), &set)?;
    record.values.insert(key, next);
    let count = client.ask(&[b"INCR", b"count"])?;
    note_gap(&mut record.gaps, *last);
    *last = Instant::now();
    demand(&Answer::Number(next as i64), &count)?;
    record.acknowledged = next;
    Ok(())
}
