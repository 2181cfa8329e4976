//! What runs in the containers of `bench_migrate`.
//!
//! `bench_guest streams`: a server at port 7000. The first byte of a connection says what the peer wants:
//! `N` and `D` send records (Nagle's algorithm on, off); `T` gets one every millisecond; `E` gets back what it sends; `Q` is told how late the
//! latest record of `N` and of `D` was since it last asked, in microseconds. A record is 128 bytes, in front the time when it was sent.
//!
//! `bench_guest files MIB RATE`: writes so many MiB to `/data`, says so in `/ready`, then writes on, RATE MiB a second, anywhere in it.

use std::fs::{self, File};
use std::io::{Read, Result, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, SystemTime};

static LATEST: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize| words.get(at).and_then(|word| word.parse().ok()).unwrap_or(0u64);
    match words.first().map(String::as_str) {
        Some("streams") => streams(),
        Some("files") => files(number(1), number(2)),
        _ => std::process::exit(2),
    }
}

/// Microseconds; both ends of a stream are on one machine.
fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64)
}

fn streams() -> Result<()> {
    for connection in TcpListener::bind(("0.0.0.0", 7000))?.incoming() {
        let connection = connection?;
        thread::spawn(move || serve(connection));
    }
    Ok(())
}

fn serve(mut peer: TcpStream) -> Result<()> {
    let (mut kind, mut record) = ([0], [0; 128]);
    peer.set_nodelay(true)?;
    peer.read_exact(&mut kind)?;
    loop {
        match kind[0] {
            b'N' | b'D' => {
                peer.read_exact(&mut record)?;
                let sent = u64::from_le_bytes(record[..8].try_into().expect("8 bytes"));
                LATEST[usize::from(kind[0] == b'D')].fetch_max(now().saturating_sub(sent), Ordering::Relaxed);
            }
            b'T' => {
                record[..8].copy_from_slice(&now().to_le_bytes());
                peer.write_all(&record)?;
                thread::sleep(Duration::from_millis(1));
            }
            b'E' => {
                peer.read_exact(&mut record)?;
                peer.write_all(&record)?;
            }
            _ => {
                peer.read_exact(&mut [0])?;
                for latest in &LATEST {
                    peer.write_all(&latest.swap(0, Ordering::Relaxed).to_le_bytes())?;
                }
            }
        }
    }
}

const CHUNK: u64 = 64 << 10;

fn files(mib: u64, rate: u64) -> Result<()> {
    let mut noise = 1u64;
    let mut chunk = || -> Vec<u8> {
        let mut word = || {
            noise ^= noise << 13;
            noise ^= noise >> 7;
            noise ^= noise << 17;
            noise.to_le_bytes()
        };
        (0..CHUNK / 8).flat_map(|_| word()).collect()
    };
    let file = File::create("/data")?;
    let chunks = (mib << 20) / CHUNK;
    for n in 0..chunks {
        file.write_all_at(&chunk(), n * CHUNK)?;
    }
    fs::write("/ready", "")?;
    for n in 1u64.. {
        if rate == 0 || chunks == 0 {
            thread::sleep(Duration::from_millis(100));
            continue;
        }
        file.write_all_at(&chunk(), n.wrapping_mul(7919) % chunks * CHUNK)?;
        thread::sleep(Duration::from_secs_f64(CHUNK as f64 / (rate << 20) as f64));
    }
    Ok(())
}
