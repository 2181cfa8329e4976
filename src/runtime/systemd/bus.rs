//! A connection to systemd: its own socket, or the message bus that it is on.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::wire::{Kind, Message, Target, Writer, call};

/// How long systemd may take for an answer, or a job.
const PATIENCE: Duration = Duration::from_secs(30);

const MANAGER: Target<'static> = Target {
    destination: "org.freedesktop.systemd1",
    path: "/org/freedesktop/systemd1",
    interface: "org.freedesktop.systemd1.Manager",
};

/// The message bus itself.
const BUS: Target<'static> =
    Target { destination: "org.freedesktop.DBus", path: "/org/freedesktop/DBus", interface: "org.freedesktop.DBus" };

/// Why systemd did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    #[error(
        "no systemd answers on {}: {why}; without the option (an engine's: the cgroupfs driver) lmrun makes cgroups itself",
        .tried.join(" or ")
    )]
    NoSystemd { tried: Vec<String>, why: io::Error },
    #[error("talk to systemd")]
    Io(#[from] io::Error),
    /// The name of a D-Bus error, and its words.
    #[error("systemd: {member}: {words} ({name})")]
    Refused { member: String, name: String, words: String },
    #[error("systemd's job for {unit} ended as {result:?}")]
    Job { unit: String, result: String },
}

impl BusError {
    /// Whether it is the error with this last part of its name.
    pub fn is(&self, wanted: &str) -> bool {
        matches!(self, BusError::Refused { name, .. } if name.rsplit('.').next() == Some(wanted))
    }
}

pub type Result<T> = std::result::Result<T, BusError>;

/// Where a manager listens.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Address {
    path: PathBuf,
    /// A message bus, rather than systemd alone.
    bus: bool,
}

/// A connection that was let in.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    serial: u32,
    deadline: Instant,
    /// Signals that came while a reply was waited for.
    signals: Vec<Message>,
}

impl Connection {
    /// To the manager of the system, or to that of the calling user.
    ///
    /// # Errors
    /// [`BusError::NoSystemd`] with all places that were tried.
    pub fn open(user: bool) -> Result<Connection> {
        let addresses = addresses(user, &|name| std::env::var(name).ok());
        let mut last = io::Error::from(ErrorKind::NotFound);
        for address in &addresses {
            match UnixStream::connect(&address.path) {
                Ok(stream) => return Connection::begin(stream, address.bus),
                Err(error) => last = error,
            }
        }
        let tried = addresses.iter().map(|address| address.path.display().to_string()).collect();
        Err(BusError::NoSystemd { tried, why: last })
    }

    /// D-Bus Specification, "Authentication Protocol": EXTERNAL, the peer asking the kernel who we are.
    pub(super) fn begin(mut stream: UnixStream, bus: bool) -> Result<Connection> {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(b"\0AUTH EXTERNAL\r\nDATA\r\nBEGIN\r\n")?;
        for expected in ["DATA", "OK"] {
            let line = read_line(&mut stream)?;
            if line.split(' ').next() != Some(expected) {
                let words = format!("answers {line:?} to one who wants in");
                return Err(io::Error::new(ErrorKind::PermissionDenied, words).into());
            }
        }
        let deadline = Instant::now() + PATIENCE;
        let mut connection = Connection { stream, serial: 0, deadline, signals: Vec::new() };
        if bus {
            connection.call_to(BUS, "Hello", "", Writer::default())?;
            let mut rule = Writer::default();
            rule.text("type='signal',interface='org.freedesktop.systemd1.Manager',member='JobRemoved'");
            connection.call_to(BUS, "AddMatch", "s", rule)?;
        }
        Ok(connection)
    }

    /// Calls a method of the manager.
    pub fn call(&mut self, member: &str, signature: &str, body: Writer) -> Result<Message> {
        self.call_to(MANAGER, member, signature, body)
    }

    /// Has the manager tell this connection how jobs end.
    pub fn subscribe(&mut self) -> Result<()> {
        match self.call("Subscribe", "", Writer::default()) {
            Err(error) if !error.is("AlreadySubscribed") => Err(error),
            _ => Ok(()),
        }
    }

    /// A property of the manager that is text.
    pub fn property(&mut self, name: &str) -> Result<String> {
        let target = Target { interface: "org.freedesktop.DBus.Properties", ..MANAGER };
        let mut body = Writer::default();
        body.text(MANAGER.interface);
        body.text(name);
        Ok(self.call_to(target, "Get", "ss", body)?.body().text_variant()?)
    }

    fn call_to(&mut self, target: Target<'_>, member: &str, signature: &str, body: Writer) -> Result<Message> {
        self.serial += 1;
        self.stream.write_all(&call(self.serial, target, member, signature, body))?;
        loop {
            let message = self.next()?;
            match message.kind {
                Kind::Signal => self.signals.push(message),
                Kind::Return if message.reply_to == self.serial => return Ok(message),
                Kind::Error if message.reply_to == self.serial => {
                    let words = message.body().text().unwrap_or_default();
                    return Err(BusError::Refused { member: member.to_owned(), name: message.error, words });
                }
                _ => {}
            }
        }
    }

    /// Waits for the end of a job that a call has begun, of which it has given the path.
    ///
    /// # Errors
    /// [`BusError::Job`]: it did not end well.
    pub fn wait_for_job(&mut self, path: &str, unit: &str) -> Result<()> {
        loop {
            let signal = if self.signals.is_empty() { self.next()? } else { self.signals.remove(0) };
            if signal.kind != Kind::Signal || signal.member != "JobRemoved" || signal.signature != "uoss" {
                continue;
            }
            let mut body = signal.body();
            let (_, job, _, result) = (body.uint()?, body.text()?, body.text()?, body.text()?);
            match result.as_str() {
                _ if job != path => {}
                "done" => return Ok(()),
                _ => return Err(BusError::Job { unit: unit.to_owned(), result }),
            }
        }
    }

    fn next(&mut self) -> io::Result<Message> {
        if Instant::now() > self.deadline {
            return Err(ErrorKind::TimedOut.into());
        }
        Message::read(&mut self.stream)
    }
}

/// A line of the handshake, without its end.
fn read_line(stream: &mut UnixStream) -> io::Result<String> {
    let mut line = Vec::new();
    while !line.ends_with(b"\r\n") && line.len() < 512 {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        line.extend(byte);
    }
    Ok(String::from_utf8_lossy(&line).trim_end().to_owned())
}

/// systemd's own socket first: it needs no bus to be running.
fn addresses(user: bool, variable: &dyn Fn(&str) -> Option<String>) -> Vec<Address> {
    let mut found = Vec::new();
    let mut add = |path: String, bus| {
        let address = Address { path: path.into(), bus };
        if !found.contains(&address) {
            found.push(address);
        }
    };
    if user {
        let runtime = variable("XDG_RUNTIME_DIR").unwrap_or_else(|| format!("/run/user/{}", nix::unistd::getuid()));
        add(format!("{runtime}/systemd/private"), false);
        variable("DBUS_SESSION_BUS_ADDRESS").iter().flat_map(|list| unix_paths(list)).for_each(|path| add(path, true));
        add(format!("{runtime}/bus"), true);
    } else {
        add("/run/systemd/private".into(), false);
        variable("DBUS_SYSTEM_BUS_ADDRESS").iter().flat_map(|list| unix_paths(list)).for_each(|path| add(path, true));
        add("/run/dbus/system_bus_socket".into(), true);
    }
    found
}

/// D-Bus Specification, "Server Addresses": `unix:path=/run/bus,guid=...;...`.
fn unix_paths(list: &str) -> Vec<String> {
    let unix = list.split(';').filter_map(|address| address.strip_prefix("unix:"));
    unix.filter_map(|keys| keys.split(',').find_map(|pair| pair.strip_prefix("path="))).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_managers_listen() {
        let none = |_: &str| None;
        let paths = |user, variable: &dyn Fn(&str) -> Option<String>| {
            addresses(user, variable).into_iter().map(|a| (a.path.display().to_string(), a.bus)).collect::<Vec<_>>()
        };
        let system = [("/run/systemd/private".to_owned(), false), ("/run/dbus/system_bus_socket".to_owned(), true)];
        assert_eq!(paths(false, &none), system);
        let user = |name: &str| match name {
            "XDG_RUNTIME_DIR" => Some("/run/user/7".to_owned()),
            _ => Some("unix:abstract=x;unix:path=/b/us,guid=1".to_owned()),
        };
        let expected = [("/run/user/7/systemd/private", false), ("/b/us", true), ("/run/user/7/bus", true)];
        assert_eq!(paths(true, &user), expected.map(|(path, bus)| (path.to_owned(), bus)));
    }
}
