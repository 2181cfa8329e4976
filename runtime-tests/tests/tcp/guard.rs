//! The guard: a connection goes on although the driver was killed in the middle of a dump.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::time::{Duration, Instant};

use lmrun::engine::guard::Guard;
use lmrun::engine::netlock::Nft;
use lmrun::engine::res::fd::{tcp, tcp_stream};
use lmrun::sys::pidfd::PidFd;
use lmrun::sys::{fds, fork, sockopt, tcp as repair};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;

use crate::able;
use crate::moves::connected;
use crate::net::{HERE, Triangle};

#[test]
fn the_driver_is_killed_in_the_bracket() {
    if !able() {
        return;
    }
    let net = Triangle::new();
    let (_listener, mut here, mut peer) = connected(&net, HERE[0], HERE[0]);
    sockopt::set_int(here.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR, 1).unwrap();
    let facts = tcp::facts(here.as_fd()).expect("facts");
    let connection = tcp::connection(&facts.entry).expect("connection");
    let driver = fork::child(|| {
        // The other tests' locks must not live on in this process.
        fds::close_from_except(0, &[here.as_fd(), net.a.fd()]).expect("close");
        let guard = Guard::spawn().expect("guard");
        // Another child of the driver that holds its end of everything.
        fork::child(|| {
            std::thread::sleep(Duration::from_millis(1500));
            0
        })
        .expect("child");
        guard.watch(&[here.as_fd()]).expect("watch");
        let lock = Nft::open(net.a.fd()).and_then(|nft| nft.lock("net-guard", &[connection]));
        tcp_stream::silence(here.as_fd()).expect("repair");
        std::thread::sleep(Duration::from_secs(60));
        drop(lock);
        1
    })
    .expect("driver");
    let start = Instant::now();
    while !repair::in_repair(here.as_fd()).unwrap() {
        assert!(start.elapsed() < Duration::from_secs(5), "the driver got that far");
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(Duration::from_millis(20));
    here.set_nonblocking(true).unwrap();
    assert!(here.write(b"x").is_err(), "silent");
    kill(driver, Signal::SIGKILL).unwrap();
    let killed = Instant::now();
    waitpid(driver, None).unwrap();
    while repair::in_repair(here.as_fd()).unwrap() {
        assert!(killed.elapsed() < Duration::from_secs(1), "the guard did nothing");
        std::thread::sleep(Duration::from_micros(100));
    }
    println!("out of repair mode after {:?}", killed.elapsed());
    here.set_nonblocking(false).unwrap();
    // The other child has inherited the lock's socket; it is not what is tested here.
    std::thread::sleep(Duration::from_millis(1600));
    peer.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    here.write_all(b"hello").expect("send");
    peer.read_exact(&mut [0; 5]).expect("receive");
    assert_eq!(sockopt::get_int(here.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR).unwrap(), 1);
}

#[test]
fn dismissed_it_touches_nothing() {
    if !able() {
        return;
    }
    let net = Triangle::new();
    let (_listener, here, _peer) = connected(&net, HERE[1], HERE[1]);
    let start = Instant::now();
    let guard = Guard::spawn().expect("guard");
    let spawned = start.elapsed();
    let sockets = [here.as_fd(); 600];
    guard.watch(&sockets).expect("watch");
    let watched = start.elapsed() - spawned;
    tcp_stream::silence(here.as_fd()).expect("repair");
    let start = Instant::now();
    guard.dismiss();
    println!("spawn {spawned:?}, watch 600 {watched:?}, dismiss {:?}", start.elapsed());
    assert!(repair::in_repair(here.as_fd()).unwrap());
}

#[test]
fn after_the_commit_the_container_and_its_connections_end_in_silence() {
    if !able() {
        return;
    }
    let net = Triangle::new();
    let (_listener, here, mut peer) = connected(&net, HERE[0], HERE[0]);
    let mut container = Command::new("sleep").arg("60").spawn().expect("sleep");
    let driver = fork::child(|| {
        let init = PidFd::open(container.id() as i32).expect("pidfd");
        fds::close_from_except(0, &[here.as_fd(), init.as_fd()]).expect("close");
        let guard = Guard::spawn().expect("guard");
        guard.watch(&[here.as_fd()]).expect("watch");
        guard.commit(&init).expect("commit");
        std::thread::sleep(Duration::from_secs(60));
        1
    })
    .expect("driver");
    drop(here);
    // Until then the guard has the only descriptor of the connection.
    std::thread::sleep(Duration::from_millis(50));
    peer.write_all(b"x").expect("taken by the kernel");
    kill(driver, Signal::SIGKILL).unwrap();
    waitpid(driver, None).unwrap();
    peer.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    // Neither a reset nor an end, but the timeout.
    let end = peer.read_exact(&mut [0]).expect_err("silence");
    assert_eq!(end.kind(), std::io::ErrorKind::WouldBlock);
    assert_eq!(container.wait().unwrap().signal(), Some(libc::SIGKILL));
}
