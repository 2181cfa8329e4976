//! The other end of `ssh_stand_in`: a host that does what comes in at port 22, as inetd(8) does, with the connection as standard input and
//! output. No keys, no login: it listens in a network namespace of the scenario's.

use std::fs::File;
use std::io::{Error, Read, Result};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use crate::network::Namespace;

/// Listens as long as it lives.
pub struct Remote {
    served: Arc<Mutex<Vec<Child>>>,
    address: String,
    within: PathBuf,
    thread: Option<JoinHandle<()>>,
}

impl Remote {
    /// `enter`: the words behind which a shell's command line is run at this host. What is said to standard error goes to `log`.
    pub fn listen(host: &Namespace, address: &str, enter: Vec<String>, log: PathBuf) -> Result<Remote> {
        let listener = host.within(|| TcpListener::bind((address, 22)))?;
        let served: Arc<Mutex<Vec<Child>>> = Arc::default();
        let children = served.clone();
        let thread = std::thread::spawn(move || {
            // An empty command line is the word to end.
            while let Ok((connection, _)) = listener.accept() {
                match serve(connection, &enter, &log) {
                    Ok(Some(child)) => children.lock().expect("nobody panics with it").push(child),
                    Ok(None) => return,
                    Err(e) => eprintln!("port 22: {e}"),
                }
            }
        });
        Ok(Remote { served, address: address.to_owned(), within: host.path(), thread: Some(thread) })
    }

    /// The processes that are at work, as this machine counts.
    pub fn at_work(&self) -> Vec<u32> {
        let mut served = self.served.lock().expect("nobody panics with it");
        served.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
        served.iter().map(Child::id).collect()
    }
}

fn serve(mut connection: TcpStream, enter: &[String], log: &Path) -> Result<Option<Child>> {
    let mut line = Vec::new();
    let mut byte = [0];
    while connection.read(&mut byte)? == 1 && byte != *b"\n" {
        line.push(byte[0]);
    }
    if line.is_empty() {
        return Ok(None);
    }
    connection.set_nodelay(true)?;
    let line = String::from_utf8(line).map_err(Error::other)?;
    let log = File::options().create(true).append(true).open(log)?;
    let input = OwnedFd::from(connection);
    let output = input.try_clone()?;
    let mut command = Command::new(&enter[0]);
    command.args(&enter[1..]).args(["sh", "-c", &format!("exec {line}")]).stdin(input).stdout(output).stderr(log);
    command.spawn().map(Some)
}

impl Drop for Remote {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            let file = File::open(&self.within);
            let ended = std::thread::scope(|scope| {
                let told = scope.spawn(|| {
                    nix::sched::setns(file.ok()?, nix::sched::CloneFlags::CLONE_NEWNET).ok()?;
                    TcpStream::connect((self.address.as_str(), 22)).ok()?.shutdown(Shutdown::Both).ok()
                });
                told.join().ok().flatten().is_some()
            });
            if ended {
                let _ = thread.join();
            }
        }
        for mut child in self.served.lock().map(|mut all| std::mem::take(&mut *all)).unwrap_or_default() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
