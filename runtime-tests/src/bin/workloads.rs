//! `make test-workloads`: servers under load move back and forth by `lmrun migrate`, and their clients see no error: a table in Markdown.
//!
//! `workloads [--moves N] [WORKLOAD,...]`. Ends with 1 when a client saw an error.

use std::fs;
use std::io::{BufRead, BufReader, Error, Result, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use runtime_tests::engines::host_rootfs;
use runtime_tests::host::InMemory;
use runtime_tests::hosts::{CONTAINER, Hosts};
use runtime_tests::journey::{Journey, Load};
use runtime_tests::redis::{self, Writer};
use runtime_tests::{command, needs};
use serde_json::json;

const NGINX: &str = "daemon off; pid /tmp/nginx.pid; error_log /dev/stderr; worker_processes 2; user www-data;\n\
     events { }\nhttp { access_log off; keepalive_requests 100000000; client_body_temp_path /tmp/b;\n\
     proxy_temp_path /tmp/p; fastcgi_temp_path /tmp/f; uwsgi_temp_path /tmp/u; scgi_temp_path /tmp/s;\n\
     server { listen 8000; location / { return 200 \"hello\\n\"; } } }\n";

const POSTGRES: &str = "PATH=$(ls -d /usr/lib/postgresql/*/bin | tail -1):$PATH; \
     initdb -A trust -D /tmp/pg >/dev/null && echo 'host all all all trust' >>/tmp/pg/pg_hba.conf && \
     exec postgres -D /tmp/pg -k /tmp -c listen_addresses='*'";

/// Each request is answered with the number of requests so far.
const JVM: &str = "import com.sun.net.httpserver.*; import java.net.*; import java.util.concurrent.atomic.*;\n\
     public class Server { public static void main(String[] a) throws Exception {\n\
     var n = new AtomicLong(); var s = HttpServer.create(new InetSocketAddress(8000), 0);\n\
     s.createContext(\"/\", x -> { byte[] b = Long.toString(n.incrementAndGet()).getBytes();\n\
     x.sendResponseHeaders(200, b.length); x.getResponseBody().write(b); x.close(); });\n\
     s.setExecutor(java.util.concurrent.Executors.newFixedThreadPool(4)); s.start(); } }\n";

/// What one workload came to.
struct Row {
    name: &'static str,
    client: &'static str,
    moves: usize,
    /// Milliseconds that it stood still, in each move.
    still: Vec<f64>,
    /// What the client has done, or its error.
    outcome: std::result::Result<String, String>,
}

fn main() -> ExitCode {
    let (mut moves, mut wanted) = (10, Vec::new());
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        if word == "--moves" {
            match words.next().and_then(|n| n.parse().ok()) {
                Some(n) => moves = n,
                None => return usage(),
            }
        } else {
            wanted.extend(word.split(',').map(str::to_owned));
        }
    }
    let all: [(&str, &str, &str, Subject); 4] = [
        ("redis", "redis-server", "SET and INCR, each answer checked", redis_server),
        ("nginx", "nginx", "wrk, 8 connections", nginx),
        ("postgres", "psql", "pgbench, 8 clients", postgres),
        ("jvm", "java", "HTTP on one connection, each answer checked", jvm),
    ];
    if wanted.iter().any(|name| !all.iter().any(|(known, ..)| known == name)) {
        return usage();
    }
    println!("| | client | moves | stood still, ms: median, most | the client |\n| --- | --- | --- | --- | --- |");
    let mut good = true;
    for (name, program, client, subject) in all {
        if !wanted.is_empty() && !wanted.iter().any(|w| w == name) {
            continue;
        }
        let mut row = Row { name, client, moves: 0, still: Vec::new(), outcome: Ok(String::new()) };
        row.outcome = match needs::on_path(program) {
            None => Err(format!("{program} is not installed")),
            Some(_) => subject(moves, &mut row).map_err(|e| e.to_string()),
        };
        good &= row.outcome.is_ok();
        row.still.sort_by(f64::total_cmp);
        let still = row.still.get(row.still.len() / 2).zip(row.still.last());
        let still = still.map_or("-".into(), |(middle, most)| format!("{middle:.0}, {most:.0}"));
        let outcome = match &row.outcome {
            Ok(done) => done.clone(),
            Err(e) => format!("FAILED: {}", e.replace('\n', "; ")),
        };
        println!("| {} | {} | {} | {still} | {outcome} |", row.name, row.client, row.moves);
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn usage() -> ExitCode {
    eprintln!("usage: workloads [--moves N] [redis,nginx,postgres,jvm]");
    ExitCode::from(2)
}

type Subject = fn(usize, &mut Row) -> Result<String>;

/// A server on this machine's `/usr`, with all else its own: that goes along.
fn server(args: &[&str], user: Option<u32>, base: &Path, files: &[(&str, &str)]) -> Result<Load> {
    let rootfs = base.join("rootfs");
    host_rootfs(&rootfs)?;
    for (name, content) in files {
        fs::write(rootfs.join(name), content)?;
    }
    Ok(Load {
        args: args.iter().map(|word| (*word).to_owned()).collect(),
        own: Some(rootfs),
        user,
        mounts: vec![json!({ "destination": "/usr", "type": "bind", "source": "/usr", "options": ["rbind", "ro"] })],
        disk_mib: 1024,
        ..Load::default()
    })
}

fn scratch(name: &str) -> Result<InMemory> {
    InMemory::mount(std::env::temp_dir().join(format!("lmrun-workloads-{name}-{}", std::process::id())))
}

/// Moves it, again and again, while `busy` says that the client is at work.
fn travel(journey: &mut Journey, moves: usize, row: &mut Row, mut busy: impl FnMut() -> bool) -> Result<()> {
    for _ in 0..moves {
        std::thread::sleep(Duration::from_millis(500));
        let moved = journey.migrate(&[])?;
        row.moves += 1;
        row.still.push(moved.summary["downtime_us"].as_f64().unwrap_or(0.0) / 1e3);
        if !busy() {
            return Err(Error::other(format!("after {} moves the client is not at work any more", row.moves)));
        }
    }
    std::thread::sleep(Duration::from_millis(500));
    Ok(())
}

/// Waits until a server is there.
fn connect(hosts: &Hosts, port: u16) -> Result<TcpStream> {
    let begin = Instant::now();
    hosts.client.within(|| {
        loop {
            match TcpStream::connect((CONTAINER, port)) {
                Err(e) if begin.elapsed() > Duration::from_secs(60) => return Err(e),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
                done => return done,
            }
        }
    })
}

/// A client that runs by itself until it is interrupted; gives what it says.
struct Program(Option<Child>);

impl Program {
    fn start(hosts: &Hosts, command: &mut Command) -> Result<Program> {
        let command = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(Program(Some(hosts.client.within(|| command.spawn())?)))
    }

    fn is_at_work(&mut self) -> bool {
        self.0.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// Waits for its own end.
    fn finish(mut self) -> Result<String> {
        let Some(child) = self.0.take() else { return Ok(String::new()) };
        let done = child.wait_with_output()?;
        let said = String::from_utf8_lossy(&done.stdout).into_owned() + &String::from_utf8_lossy(&done.stderr);
        if done.status.success() { Ok(said) } else { Err(Error::other(format!("{}: {said}", done.status))) }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// How long a client works that cannot be told when to end: longer than the moves take.
fn seconds(moves: usize) -> String {
    (10 + moves * 6).to_string()
}

fn redis_server(moves: usize, row: &mut Row) -> Result<String> {
    let base = scratch("redis")?;
    redis::rootfs(&base.dir)?;
    let hosts = Hosts::new();
    let mut journey = Journey::start(&hosts, &Load::redis(&base.dir))?;
    journey.connect()?.load(64, |_| {})?;
    let writer = Writer::paced(journey.connect()?, Duration::from_micros(500));
    travel(&mut journey, moves, row, || writer.goes_on())?;
    let record = writer.finish();
    let audit = record.audit(&mut journey.connect()?)?;
    match &record.failure {
        None if audit == (0, 0, 0) => {
            Ok(format!("{} pairs, none lost, none doubled, one connection", record.acknowledged))
        }
        failure => Err(Error::other(format!("{failure:?}; lost, doubled, wrong: {audit:?}"))),
    }
}

fn nginx(moves: usize, row: &mut Row) -> Result<String> {
    let base = scratch("nginx")?;
    let load = server(&["/usr/sbin/nginx", "-c", "/nginx.conf"], None, &base.dir, &[("nginx.conf", NGINX)])?;
    let hosts = Hosts::new();
    let mut journey = Journey::start(&hosts, &load)?;
    drop(connect(&hosts, 8000)?);
    let mut wrk = Command::new(needs::on_path("wrk").ok_or_else(|| Error::other("wrk is not installed"))?);
    let url = format!("http://{CONTAINER}:8000/");
    wrk.args(["-t", "1", "-c", "8", "--timeout", "20s", "-d", &(seconds(moves) + "s"), &url]);
    let mut wrk = Program::start(&hosts, &mut wrk)?;
    travel(&mut journey, moves, row, || wrk.is_at_work())?;
    let said = wrk.finish()?;
    let line = |word: &str| said.lines().find(|line| line.contains(word)).map(|line| line.trim().to_owned());
    if let Some(errors) = line("Socket errors").or_else(|| line("Non-2xx")) {
        return Err(Error::other(errors));
    }
    line("requests in").ok_or_else(|| Error::other(said.clone())).map(|done| format!("{done}, no error"))
}

fn postgres(moves: usize, row: &mut Row) -> Result<String> {
    let base = scratch("postgres")?;
    let passwd = fs::read_to_string("/etc/passwd")?;
    let user = passwd.lines().find_map(|line| line.strip_prefix("postgres:x:")?.split(':').next()?.parse().ok());
    let user = user.ok_or_else(|| Error::other("there is no user postgres"))?;
    let load = server(&["/bin/bash", "-c", POSTGRES], Some(user), &base.dir, &[])?;
    let hosts = Hosts::new();
    let mut journey = Journey::start(&hosts, &load)?;
    drop(connect(&hosts, 5432)?);
    let client = |program: &str, words: &[&str]| {
        let mut command = Command::new(program);
        command.args(["-h", CONTAINER, "-U", "postgres"]).args(words).arg("postgres");
        command
    };
    let run = |mut command: Command| hosts.client.within(move || command::run(&mut command, Duration::from_secs(120)));
    let begin = Instant::now();
    // It listens before it takes connections.
    loop {
        let made = run(client("pgbench", &["-q", "-i", "-s", "2"]));
        match made.succeeded() {
            true => break,
            false if begin.elapsed() > Duration::from_secs(60) => return Err(Error::other(made.to_string())),
            false => std::thread::sleep(Duration::from_millis(100)),
        }
    }
    let mut bench = client("pgbench", &["-n", "-c", "8", "-j", "1", "-T", &seconds(moves)]);
    let mut bench = Program::start(&hosts, &mut bench)?;
    travel(&mut journey, moves, row, || bench.is_at_work())?;
    let said = bench.finish()?;
    let number = |word: &str| said.lines().find_map(|line| line.strip_prefix(word)).map(|rest| rest.trim().to_owned());
    let done = number("number of transactions actually processed:").ok_or_else(|| Error::other(said.clone()))?;
    if number("number of failed transactions:").is_some_and(|failed| !failed.starts_with("0 ")) {
        return Err(Error::other(said));
    }
    let query = "select (select sum(abalance) from pgbench_accounts) - (select sum(delta) from pgbench_history), \
                 (select count(*) from pgbench_history)";
    let books = run(client("psql", &["-At", "-c", query]));
    if books.out.trim() != format!("0|{done}") {
        return Err(Error::other(format!("{done} transactions, but the books say {books}")));
    }
    Ok(format!("{done} transactions, none failed, the books agree"))
}

fn jvm(moves: usize, row: &mut Row) -> Result<String> {
    let base = scratch("jvm")?;
    let load = server(
        &["/usr/bin/java", "-Dsun.net.httpserver.nodelay=true", "-Xmx128m", "/Server.java"],
        None,
        &base.dir,
        &[("Server.java", JVM)],
    )?;
    let hosts = Hosts::new();
    let mut journey = Journey::start(&hosts, &load)?;
    let stream = connect(&hosts, 8000)?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    stream.set_nodelay(true)?;
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| -> Result<u64> {
            let mut answers = BufReader::new(stream.try_clone()?);
            let mut asked = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                (&stream).write_all(b"GET / HTTP/1.1\r\nHost: server\r\n\r\n")?;
                asked += 1;
                let answer = response(&mut answers)?;
                if answer != asked.to_string() {
                    return Err(Error::other(format!("request {asked} was answered with {answer:?}")));
                }
                std::thread::sleep(Duration::from_micros(500));
            }
            Ok(asked)
        });
        let moved = travel(&mut journey, moves, row, || !asking.is_finished());
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        let asked = asking.join().map_err(|_| Error::other("the client"))?;
        let asked = asked?;
        moved?;
        Ok(format!("{asked} requests, each answered once and in turn"))
    })
}

/// The body of an answer.
fn response(answers: &mut impl BufRead) -> Result<String> {
    let mut length = 0;
    loop {
        let mut line = String::new();
        if answers.read_line(&mut line)? == 0 {
            return Err(Error::other("the server has closed the connection"));
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().map_err(Error::other)?;
        }
        if line == "\r\n" {
            break;
        }
    }
    let mut body = vec![0; length];
    answers.read_exact(&mut body)?;
    String::from_utf8(body).map_err(Error::other)
}
