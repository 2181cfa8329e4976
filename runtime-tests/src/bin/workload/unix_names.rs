//! Unix sockets with names: listening, accepted, and datagram sockets that others send to.

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};

use crate::kernel::{c, fails_with, noise, sys};
use crate::stage::{Check, Fallible, Setup, Stage, holds, same};

pub const WORKLOADS: &[(&str, Setup)] = &[
    ("unix-listening", listening),
    ("unix-abstract", abstract_names),
    ("unix-relative", relative),
    ("unix-orphans", orphans),
    ("unix-datagrams", datagrams),
    ("unix-one-way", one_way),
    ("unix-idle", idle),
];

fn said<T>(outcome: std::io::Result<T>) -> Fallible<T> {
    outcome.map_err(|e| e.to_string())
}

/// Sends each way and demands the same there.
fn talk(a: &UnixStream, b: &UnixStream) -> Fallible {
    for (mut from, mut to) in [(a, b), (b, a)] {
        said(from.write_all(b"still connected"))?;
        let mut bytes = [0; 15];
        said(to.read_exact(&mut bytes))?;
        same("what was said", b"still connected", &bytes)?;
    }
    Ok(())
}

fn name(address: std::io::Result<SocketAddr>) -> Fallible<Vec<u8>> {
    let address = said(address)?;
    let path = address.as_pathname().map(|p| p.as_os_str().as_encoded_bytes());
    Ok(path.or(address.as_abstract_name()).unwrap_or_default().to_vec())
}

/// A listener with a file of its own mode and owner, and a connection with content on its way.
fn listening(_: &mut Stage) -> Fallible<Check> {
    let path = "/named.sock";
    let listener = said(UnixListener::bind(path))?;
    said(std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o640)))?;
    sys!(chown(c(path).as_ptr(), 12, 34))?;
    let mut client = said(UnixStream::connect(path))?;
    let (mut server, _) = said(listener.accept())?;
    let (there, back) = (noise(1, 40_000), noise(2, 123));
    said(client.write_all(&there))?;
    said(server.write_all(&back))?;
    Ok(Box::new(move || {
        let (mut a, mut b) = (vec![0; there.len()], vec![0; back.len()]);
        said(server.read_exact(&mut a))?;
        said(client.read_exact(&mut b))?;
        same("content", &there, &a)?;
        same("content, the other way", &back, &b)?;
        for address in [listener.local_addr(), server.local_addr(), client.peer_addr()] {
            same("name", path.as_bytes().to_vec(), name(address)?)?;
        }
        holds(said(client.local_addr())?.is_unnamed(), "the client has no name")?;
        let file = said(std::fs::symlink_metadata(path))?;
        same("mode and owner", (0o640, 12, 34), (file.mode() & 0o7777, file.uid(), file.gid()))?;
        let another = said(UnixStream::connect(path))?;
        talk(&said(listener.accept())?.0, &another)?;
        said(client.write_all(&there))?;
        said(server.write_all(&back))
    }))
}

/// Names that are no paths; the client has one, too.
fn abstract_names(_: &mut Stage) -> Fallible<Check> {
    let at = |name: &[u8]| said(SocketAddr::from_abstract_name(name));
    let (server_name, client_name) = (&b"server\0of it"[..], &b"client"[..]);
    let listener = said(UnixListener::bind_addr(&at(server_name)?))?;
    let client = sys!(socket(libc::AF_UNIX, libc::SOCK_STREAM, 0))? as i32;
    let bind = |fd: i32, name: &[u8]| {
        let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
        address.sun_family = libc::AF_UNIX as u16;
        for (to, from) in address.sun_path[1..].iter_mut().zip(name) {
            *to = *from as libc::c_char;
        }
        sys!(bind(fd, (&raw const address).cast(), 3 + name.len() as u32))
    };
    bind(client, client_name)?;
    let client = UnixStream::from(unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(client) });
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as u16;
    for (to, from) in address.sun_path[1..].iter_mut().zip(server_name) {
        *to = *from as libc::c_char;
    }
    sys!(connect(client.as_raw_fd(), (&raw const address).cast(), 3 + server_name.len() as u32))?;
    let (server, _) = said(listener.accept())?;
    Ok(Box::new(move || {
        talk(&server, &client)?;
        for address in [server.local_addr(), client.peer_addr()] {
            same("name of the server", server_name.to_vec(), name(address)?)?;
        }
        for address in [client.local_addr(), server.peer_addr()] {
            same("name of the client", client_name.to_vec(), name(address)?)?;
        }
        let another = said(UnixStream::connect_addr(&at(server_name)?))?;
        talk(&said(listener.accept())?.0, &another)
    }))
}

/// Bound by a relative name; the process has gone elsewhere since.
fn relative(_: &mut Stage) -> Fallible<Check> {
    said(std::fs::create_dir_all("/some/where"))?;
    said(std::env::set_current_dir("/some"))?;
    let listener = said(UnixListener::bind("where/it.sock"))?;
    said(std::env::set_current_dir("/"))?;
    Ok(Box::new(move || {
        same("name", b"where/it.sock".to_vec(), name(listener.local_addr())?)?;
        let client = said(UnixStream::connect("/some/where/it.sock"))?;
        talk(&said(listener.accept())?.0, &client)
    }))
}

/// Accepted by listeners that are closed: with the file deleted, with the file left, and taken over by another listener.
fn orphans(_: &mut Stage) -> Fallible<Check> {
    let mut pairs = Vec::new();
    for path in ["/deleted.sock", "/left.sock", "/replaced.sock"] {
        let listener = said(UnixListener::bind(path))?;
        for _ in 0..2 {
            let client = said(UnixStream::connect(path))?;
            pairs.push((path, said(listener.accept())?.0, client));
        }
    }
    said(std::fs::remove_file("/deleted.sock"))?;
    said(std::fs::remove_file("/replaced.sock"))?;
    let replacement = said(UnixListener::bind("/replaced.sock"))?;
    Ok(Box::new(move || {
        for (path, server, client) in &pairs {
            talk(server, client)?;
            same("name", path.as_bytes().to_vec(), name(server.local_addr())?)?;
        }
        holds(!std::path::Path::new("/deleted.sock").exists(), "the file is still deleted")?;
        let left = said(std::fs::symlink_metadata("/left.sock"))?;
        holds(left.file_type().is_socket(), "the file is still there")?;
        let another = said(UnixStream::connect("/replaced.sock"))?;
        talk(&said(replacement.accept())?.0, &another)
    }))
}

/// Many send to one: two by name, one that has none, one that is connected and has both.
fn datagrams(_: &mut Stage) -> Fallible<Check> {
    let server = said(UnixDatagram::bind("/server.sock"))?;
    let abstract_name = said(SocketAddr::from_abstract_name(b"sender"))?;
    let senders = [
        said(UnixDatagram::bind("/sender.sock"))?,
        said(UnixDatagram::bind_addr(&abstract_name))?,
        said(UnixDatagram::unbound())?,
        said(UnixDatagram::bind("/connected.sock"))?,
    ];
    said(senders[3].connect("/server.sock"))?;
    let names = [&b"/sender.sock"[..], b"sender", b"", b"/connected.sock"];
    let fill = move |senders: &[UnixDatagram; 4]| -> Fallible {
        for (n, sender) in senders.iter().enumerate() {
            let bytes = noise(n as u64, n * 1000);
            let sent = match n {
                3 => said(sender.send(&bytes))?,
                _ => said(sender.send_to(&bytes, "/server.sock"))?,
            };
            same("bytes sent", bytes.len(), sent)?;
        }
        Ok(())
    };
    fill(&senders)?;
    said(server.set_nonblocking(true))?;
    Ok(Box::new(move || {
        for (n, expected) in names.iter().enumerate() {
            let mut bytes = vec![0; 5000];
            let (length, from) = said(server.recv_from(&mut bytes))?;
            same("message", noise(n as u64, n * 1000), bytes[..length].to_vec())?;
            same("sender", expected.to_vec(), name(Ok(from))?)?;
        }
        let nothing = server.recv(&mut [0; 9]).map_err(|e| e.kind());
        same("nothing more", Err(std::io::ErrorKind::WouldBlock), nothing.map(|_| ()))?;
        fill(&senders)
    }))
}

/// Datagram sockets that are connected to one that is not connected to them, to one that is, and to one that is gone.
fn one_way(_: &mut Stage) -> Fallible<Check> {
    let server = said(UnixDatagram::bind("/server.sock"))?;
    let client = said(UnixDatagram::unbound())?;
    said(client.connect("/server.sock"))?;
    let (a, b) = (said(UnixDatagram::bind("/a.sock"))?, said(UnixDatagram::bind("/b.sock"))?);
    said(a.connect("/b.sock"))?;
    said(b.connect("/a.sock"))?;
    said(a.send(b"to b"))?;
    let mut lonely = Vec::new();
    for name in ["", "/lonely.sock"] {
        let gone = said(UnixDatagram::bind("/gone.sock"))?;
        let one = match name {
            "" => said(UnixDatagram::unbound())?,
            name => said(UnixDatagram::bind(name))?,
        };
        said(one.connect("/gone.sock"))?;
        said(std::fs::remove_file("/gone.sock"))?;
        drop(gone);
        lonely.push(one);
    }
    let mut first = true;
    Ok(Box::new(move || {
        let mut bytes = [0; 9];
        said(client.send(b"to server"))?;
        let length = said(server.recv(&mut bytes))?;
        same("to the server", &b"to server"[..], &bytes[..length])?;
        let length = said(b.recv(&mut bytes))?;
        same("to b", &b"to b"[..], &bytes[..length])?;
        said(a.send(b"to b"))?;
        said(b.send(b"to a"))?;
        let length = said(a.recv(&mut bytes))?;
        same("to a", &b"to a"[..], &bytes[..length])?;
        // The kernel says it once, and forgets the peer.
        let error = if first { libc::ECONNREFUSED } else { libc::ENOTCONN };
        for one in &lonely {
            let sent = one.send(b"x").map_err(|e| e.to_string());
            fails_with("the peer is gone", error, sent.map(|n| n as i64))?;
        }
        first = false;
        Ok(())
    }))
}

/// Bound and no more, and not even that.
fn idle(_: &mut Stage) -> Fallible<Check> {
    let bound = said(UnixDatagram::bind("/bound.sock"))?;
    let blank = sys!(socket(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_NONBLOCK, 0))? as i32;
    let mut listener = None;
    Ok(Box::new(move || {
        same("name", b"/bound.sock".to_vec(), name(bound.local_addr())?)?;
        said(said(UnixDatagram::unbound())?.send_to(b"hello", "/bound.sock"))?;
        same("message", 5, said(bound.recv(&mut [0; 9]))?)?;
        let sent = sys!(send(blank, b"x".as_ptr().cast(), 1, 0));
        fails_with("not connected", libc::ENOTCONN, sent)?;
        if listener.is_none() {
            listener = Some(said(UnixListener::bind("/later.sock"))?);
        }
        Ok(())
    }))
}
