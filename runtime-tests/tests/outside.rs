//! What ties a container to the world: standard streams, and TCP connections with peers elsewhere.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use runtime_tests::bundle::Shape;
use runtime_tests::container::{Checkpoint, Container, complete};
use runtime_tests::network::{Cable, INSIDE, INSIDE_6};
use runtime_tests::{command, flavour, needs};

/// Standard streams that are pipes.
struct Pipes {
    input: std::io::PipeWriter,
    output: std::io::PipeReader,
    errors: std::io::PipeReader,
}

/// Starts a container by `command` with pipes for its standard streams.
fn with_pipes(command: &mut Command) -> Pipes {
    let (stdin, input) = std::io::pipe().unwrap();
    let (output, stdout) = std::io::pipe().unwrap();
    let (errors, stderr) = std::io::pipe().unwrap();
    let [stdin, stdout, stderr] = [OwnedFd::from(stdin), stdout.into(), stderr.into()].map(Stdio::from);
    let mut child = command.stdin(stdin).stdout(stdout).stderr(stderr).spawn().unwrap();
    let status = command::wait(&mut child, Duration::from_secs(30));
    // Its own ends of the pipes must go, so that the container's are the only ones.
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut pipes = Pipes { input, output, errors };
    if !status.is_some_and(|s| s.success()) {
        drop(pipes.input);
        let mut said = String::new();
        let _ = pipes.errors.read_to_string(&mut said);
        panic!("{}: {status:?}\n{said}", command::line(command));
    }
    pipes
}

/// Reads until `wanted` has come; returns all that came.
fn until(stream: &mut impl Read, wanted: &str) -> String {
    let mut all = Vec::new();
    let mut buf = [0; 4096];
    while !String::from_utf8_lossy(&all).contains(wanted) {
        let count = stream.read(&mut buf).unwrap();
        assert!(count > 0, "the stream ended before {wanted:?}: {:?}", String::from_utf8_lossy(&all));
        all.extend_from_slice(&buf[..count]);
    }
    String::from_utf8_lossy(&all).into_owned()
}

/// Pipes of the old world are replaced by pipes of the new one: in every process, in both directions.
#[test]
fn standard_streams_that_are_pipes() {
    if !needs::root() {
        return;
    }
    let c = Container::of_workload("stdio");
    let mut pipes = with_pipes(&mut c.run_command());
    assert!(c.ready());
    until(&mut pipes.output, "set up\n");
    pipes.input.write_all(b"one\n").unwrap();
    until(&mut pipes.output, "heard: one\n");
    for (n, images) in (1..).zip(["first", "second"]) {
        c.checkpoint(&Checkpoint { images, ..Checkpoint::default() }).ok();
        // Nobody holds the old pipes any more.
        let mut rest = String::new();
        pipes.output.read_to_string(&mut rest).unwrap();
        let mut restore = c.restore_command(&c.images(images), false);
        pipes = with_pipes(&mut restore);
        let question = format!("again {n}\n");
        pipes.input.write_all(question.as_bytes()).unwrap();
        until(&mut pipes.output, &format!("heard: {question}"));
        c.check(n);
        until(&mut pipes.errors, &format!("fault {n}\n"));
        let said = until(&mut pipes.output, "beat");
        assert!(said.contains("beat"), "{said}");
    }
    // The end of standard input arrives too.
    drop(pipes.input);
    c.simple("state").ok();
}

/// Files of the outside: what is written after a restore goes to the restorer's.
#[test]
fn standard_streams_that_are_files() {
    if !needs::root() {
        return;
    }
    let c = Container::of_workload("stdio");
    c.run().ok();
    assert!(c.ready());
    c.check(1);
    let before = c.stream("out");
    assert!(before.contains("beat 1\n"), "{before}");
    c.checkpoint(&Checkpoint { images: "final", ..Checkpoint::default() }).ok();
    c.restore(&c.images("final"), false).ok();
    c.check(2);
    let (out, err) = (c.stream("out"), c.stream("err"));
    assert!(out.starts_with(&before) && out.contains("beat 2\n") && out.matches("child's beat").count() == 2, "{out}");
    assert!(err.contains("fault 2\n"), "{err}");
}

/// A client elsewhere of the workload `tcp-server`, which adds numbers up.
struct Adder {
    stream: TcpStream,
    sum: u64,
}

impl Adder {
    fn connect(cable: &Cable, address: &str) -> Adder {
        let stream = cable.outside.within(|| {
            let begin = Instant::now();
            loop {
                match TcpStream::connect(address) {
                    Ok(stream) => return stream,
                    Err(e) if begin.elapsed() > Duration::from_secs(5) => panic!("{address}: {e}"),
                    Err(_) => std::thread::sleep(Duration::from_millis(10)),
                }
            }
        });
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.set_nodelay(true).unwrap();
        Adder { stream, sum: 0 }
    }

    fn send(&mut self, number: u64) {
        self.stream.write_all(&number.to_le_bytes()).unwrap();
        self.sum = self.sum.wrapping_add(number);
    }

    fn receive(&mut self, expected: u64) {
        let mut answer = [0; 8];
        self.stream.read_exact(&mut answer).expect("the server answers");
        assert_eq!(u64::from_le_bytes(answer), expected, "sum");
    }

    fn exchange(&mut self, count: u64) {
        for number in 1..=count {
            self.send(number);
            self.receive(self.sum);
        }
    }
}

/// How many bytes the server sends to the number 0; it is the noise of seed 1, which the workload makes.
const FLOOD: usize = 256 << 10;

/// Three connections over a checkpoint: one idle, one with a request that nobody has answered yet, and one whose
/// server is stuck in a long answer with further requests behind it. IPv4 and IPv6.
fn with_clients(move_it: fn(&Container)) {
    if !needs::root() {
        return;
    }
    let cable = Cable::new();
    let args = vec!["/workload".into(), "tcp-server".into()];
    let c = Container::new(&Shape { args, network: Some(cable.container.path()), ..Shape::default() });
    c.run().ok();
    assert!(c.ready());
    let mut clients: Vec<Adder> = [INSIDE.to_owned(), format!("[{INSIDE_6}]")]
        .iter()
        .flat_map(|host| [(); 3].map(|()| Adder::connect(&cable, &format!("{host}:7000"))))
        .collect();
    for client in &mut clients {
        client.exchange(50);
    }
    for client in clients.chunks_mut(3) {
        client[2].send(0);
        (1..=100).for_each(|n| client[2].send(n));
    }
    std::thread::sleep(Duration::from_millis(50));
    for client in clients.chunks_mut(3) {
        client[1].send(7);
    }
    move_it(&c);
    for client in clients.chunks_mut(3) {
        client[0].exchange(50);
        client[1].receive(1275 + 7);
        client[1].exchange(50);
        let mut flood = vec![0; FLOOD];
        client[2].stream.read_exact(&mut flood).expect("the long answer");
        assert!(flood == noise(FLOOD), "the long answer is damaged");
        (1..=100u64).for_each(|n| client[2].receive(1275 + n * (n + 1) / 2));
        client[2].exchange(50);
    }
    // New connections are taken, and nothing stands in the way.
    Adder::connect(&cable, &format!("{INSIDE}:7000")).exchange(5);
    c.check(1);
    let tables = cable.container.tables();
    assert!(tables.is_empty(), "a network lock was left: {tables:?}");
}

/// The workload's noise of seed 1.
fn noise(count: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64 | 1;
    let mut bytes = Vec::with_capacity(count + 8);
    while bytes.len() < count {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(count);
    bytes
}

fn checkpoint(images: &str) -> Checkpoint<'_> {
    Checkpoint { images, tcp_established: true, ..Checkpoint::default() }
}

#[test]
fn clients_control() {
    with_clients(|_| {});
}

#[test]
fn clients_over_a_restore() {
    with_clients(|c| {
        c.checkpoint(&checkpoint("final")).ok();
        c.restore(&c.images("final"), true).ok();
    });
}

/// The peers try again and again while nobody is there: silence, and no reset, is what they get.
#[test]
fn clients_over_a_long_absence() {
    with_clients(|c| {
        c.checkpoint(&checkpoint("final")).ok();
        std::thread::sleep(Duration::from_millis(1500));
        c.restore(&c.images("final"), true).ok();
    });
}

#[test]
fn clients_of_one_that_was_left_running() {
    with_clients(|c| {
        for images in ["one", "two", "three"] {
            c.checkpoint(&Checkpoint { leave_running: true, ..checkpoint(images) }).ok();
        }
    });
}

#[test]
fn clients_over_three_restores() {
    with_clients(|c| {
        for images in ["one", "two", "three"] {
            c.checkpoint(&checkpoint(images)).ok();
            c.restore(&c.images(images), true).ok();
        }
    });
}

#[test]
fn clients_over_rounds_to_a_page_server() {
    with_clients(|c| {
        flavour::by_page_server(c, &Checkpoint { pre_dump: true, ..checkpoint("pre1") });
        flavour::by_page_server(c, &Checkpoint { pre_dump: true, parent: Some("pre1"), ..checkpoint("pre2") });
        let images = flavour::by_page_server(c, &Checkpoint { parent: Some("pre2"), ..checkpoint("final") });
        complete(&c.images("final"), &images);
        c.restore(&images, true).ok();
    });
}
