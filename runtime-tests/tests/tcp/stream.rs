//! A byte stream that checks itself.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// One end: what it sends and receives are the numbers 0, 1, 2, ... as 8 bytes each.
pub struct End {
    pub socket: TcpStream,
    sent: u64,
    received: u64,
}

impl End {
    pub fn new(socket: TcpStream) -> Self {
        socket.set_nonblocking(true).expect("O_NONBLOCK");
        Self { socket, sent: 0, received: 0 }
    }

    /// Goes on with another socket where the former stopped.
    pub fn moved_to(&mut self, socket: TcpStream) {
        socket.set_nonblocking(true).expect("O_NONBLOCK");
        self.socket = socket;
    }

    /// Bytes sent and received so far.
    pub fn progress(&self) -> (u64, u64) {
        (self.sent, self.received)
    }

    /// Sends at most `limit` bytes, as many as the socket takes.
    pub fn send(&mut self, limit: usize) -> usize {
        let mut bytes = Vec::with_capacity(limit + 16);
        for number in self.sent / 8..=(self.sent + limit as u64) / 8 {
            bytes.extend_from_slice(&number.to_be_bytes());
        }
        let start = (self.sent % 8) as usize;
        let n = match self.socket.write(&bytes[start..start + limit]) {
            Ok(n) => n,
            Err(e) if e.kind() == ErrorKind::WouldBlock => 0,
            Err(e) => panic!("send after {} bytes: {e}", self.sent),
        };
        self.sent += n as u64;
        n
    }

    /// Receives what there is; None at the end of the stream.
    pub fn receive(&mut self) -> Option<usize> {
        let mut bytes = [0; 65536];
        let n = match self.socket.read(&mut bytes) {
            Ok(0) => return None,
            Ok(n) => n,
            Err(e) if e.kind() == ErrorKind::WouldBlock => 0,
            Err(e) => panic!("receive after {} bytes: {e}", self.received),
        };
        for byte in &bytes[..n] {
            let expected = (self.received / 8).to_be_bytes()[(self.received % 8) as usize];
            assert_eq!(*byte, expected, "byte {} of the stream", self.received);
            self.received += 1;
        }
        Some(n)
    }

    /// Sends and receives for a while.
    pub fn pump(&mut self, time: Duration) {
        let start = Instant::now();
        while start.elapsed() < time {
            if self.send(8000) + self.receive().expect("stream goes on") == 0 {
                std::thread::sleep(Duration::from_micros(200));
            }
        }
    }
}

/// A peer that sends and receives on a thread of its own, as the switches say.
pub struct Peer {
    thread: JoinHandle<End>,
    switches: &'static Switches,
}

#[derive(Default)]
pub struct Switches {
    pub sends: AtomicBool,
    pub receives: AtomicBool,
    stops: AtomicBool,
}

impl Peer {
    pub fn start(socket: TcpStream) -> Self {
        let switches: &'static Switches = Box::leak(Box::default());
        switches.sends.store(true, Ordering::SeqCst);
        switches.receives.store(true, Ordering::SeqCst);
        let mut end = End::new(socket);
        let thread = std::thread::spawn(move || {
            while !switches.stops.load(Ordering::SeqCst) {
                let sent = if switches.sends.load(Ordering::SeqCst) { end.send(8000) } else { 0 };
                let receives = switches.receives.load(Ordering::SeqCst);
                let received = if receives { end.receive().expect("stream goes on") } else { 0 };
                if sent + received == 0 {
                    std::thread::sleep(Duration::from_micros(200));
                }
            }
            end
        });
        Self { thread, switches }
    }

    pub fn sends(&self, on: bool) {
        self.switches.sends.store(on, Ordering::SeqCst);
    }

    pub fn receives(&self, on: bool) {
        self.switches.receives.store(on, Ordering::SeqCst);
    }

    /// Ends the thread and gives the socket back.
    pub fn stop(self) -> End {
        self.switches.stops.store(true, Ordering::SeqCst);
        self.thread.join().expect("peer")
    }
}

/// Both ends receive what is still on its way, and nothing is missing.
pub fn settle(here: &mut End, there: &mut End) {
    let (here_sent, there_sent) = (here.progress().0, there.progress().0);
    let start = Instant::now();
    while (here.progress().1, there.progress().1) != (there_sent, here_sent) {
        assert!(
            start.elapsed() < Duration::from_secs(30),
            "stalled: {:?} here, {:?} there",
            here.progress(),
            there.progress()
        );
        let received = here.receive().expect("stream goes on") + there.receive().expect("stream goes on");
        if received == 0 {
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}
