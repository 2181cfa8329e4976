//! Page servers: where they listen, and what happens when one end fails. (That they receive right is shown by
//! the `page_server` flavours.)

use std::fs;
use std::io::Write;
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

use runtime_tests::container::{Checkpoint, Container, free_port};
use runtime_tests::{host, needs};

fn started(workload: &str) -> Option<Container> {
    if !needs::root() {
        return None;
    }
    let c = Container::of_workload(workload);
    c.run().ok();
    c.ready().then_some(c)
}

/// Memory does not travel in the clear beyond this host, unless one insists.
#[test]
fn other_hosts_need_to_be_insisted_on() {
    let Some(c) = started("tree") else { return };
    let mut serve = c.lmrun();
    serve.arg("page-server").arg("--image-path").arg(c.images("server"));
    serve.args(["--address", "0.0.0.0", "--port", &free_port().to_string()]);
    let done = c.perform(&mut serve).failed();
    assert!(done.err.contains("--insecure"), "{done}");
    let mut checkpoint = c.checkpoint_command(&Checkpoint { images: "final", ..Checkpoint::default() });
    // 192.0.2.0/24 is nobody's (RFC 5737).
    checkpoint.args(["--page-server", "192.0.2.1:9"]);
    let done = c.perform(&mut checkpoint).failed();
    assert!(done.err.contains("--insecure"), "{done}");
    c.check(1);
}

/// Nobody listens: the container goes on, nothing is written, and the next checkpoint works.
#[test]
fn server_that_is_not_there() {
    let Some(c) = started("memory-private") else {
        return;
    };
    let to_nobody = Checkpoint { images: "final", page_server: Some(free_port()), ..Checkpoint::default() };
    c.checkpoint(&to_nobody).failed();
    assert!(!host::frozen(&c.id) && !c.images("final").exists());
    c.check(1);
    c.checkpoint(&Checkpoint { images: "final", ..Checkpoint::default() }).ok();
    c.restore(&c.images("final"), false).ok();
    c.check(2);
}

/// The server dies in the middle: the same.
#[test]
fn server_that_dies() {
    let Some(c) = started("memory-large") else {
        return;
    };
    for pre_dump in [true, false] {
        let images = if pre_dump { "pre" } else { "final" };
        let server = c.page_server(images, None);
        let pid = nix::unistd::Pid::from_raw(server.pid());
        let dir = server.dir.clone();
        let killer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(25));
            nix::sys::signal::kill(pid, nix::sys::signal::SIGKILL)
        });
        let done =
            c.checkpoint(&Checkpoint { images, pre_dump, page_server: Some(server.port), ..Checkpoint::default() });
        let _ = killer.join();
        server.ended();
        if done.succeeded() {
            // It was quicker than the killer.
            println!("the page server had all before it was killed");
            return;
        }
        assert!(!host::frozen(&c.id), "frozen after its page server died");
        assert!(!c.images(images).exists(), "half a checkpoint has its final name");
        assert!(!received(&dir), "half a transfer has its final names");
    }
    c.check(1);
    c.checkpoint(&Checkpoint { images: "whole", ..Checkpoint::default() }).ok();
    c.restore(&c.images("whole"), false).ok();
    c.check(2);
}

/// Whether there is anything that a reader takes for images of pages.
fn received(dir: &Path) -> bool {
    let mut names = fs::read_dir(dir).into_iter().flatten().flatten();
    names.any(|e| e.file_name().to_string_lossy().ends_with(".img"))
}

/// A client that talks nonsense gets nowhere, and makes no images.
#[test]
fn nonsense_is_refused() {
    let Some(c) = started("tree") else { return };
    for nonsense in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 100], &[0; 7]] {
        let server = c.page_server("nonsense", None);
        let dir = server.dir.clone();
        let mut client = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
        client.write_all(nonsense).unwrap();
        drop(client);
        server.ended();
        assert!(!received(&dir), "nonsense became images");
    }
    c.check(1);
}
