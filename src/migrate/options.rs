//! What is moved, where to, and how.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use super::stop;
use super::wire::Compression;
use super::wire::message::Manner;

/// How a container is to be moved.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// Verify both ends and stop.
    pub check: bool,
    /// Stop, copy, start: no pre-copy.
    pub offline: bool,
    /// May go on at the destination before all of its memory is there.
    pub post_copy: bool,
    /// What the freeze shall not exceed; none: it is as short as may be.
    pub downtime_target: Option<Duration>,
    /// After this time the move is given up, or switched to post-copy; none: never.
    pub max_time: Option<Duration>,
    /// Bytes per second; none: what the connection carries.
    pub bandwidth: Option<u64>,
    /// Connections for pages, at least 1.
    pub streams: u32,
    pub compression: Compression,
    /// The source's container is kept, stopped, after the move.
    pub keep_source: bool,
    /// Named volumes of an engine go along.
    pub volumes: bool,
    pub tcp_established: bool,
    /// A command for sh(1), run at the commit.
    pub on_commit: Option<String>,
    /// Where the bundle is at the destination; none: where lmrun puts it.
    pub bundle: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            check: false,
            offline: false,
            post_copy: false,
            downtime_target: None,
            max_time: None,
            bandwidth: None,
            streams: 1,
            compression: Compression::default(),
            keep_source: false,
            volumes: false,
            tcp_established: true,
            on_commit: None,
            bundle: None,
        }
    }
}

/// The target of who names none, and what is taken rather than not to move.
const TARGET: Duration = Duration::from_millis(20);
const LIMIT: Duration = Duration::from_secs(1);

impl Options {
    /// When pre-copy ends. `throttle`: the container's processor time can be cut.
    pub fn rule(&self, throttle: bool) -> stop::Rule {
        stop::Rule {
            target: self.downtime_target.unwrap_or(TARGET),
            limit: self.downtime_target.map_or(LIMIT, |target| target * 2),
            max_time: self.max_time,
            post_copy: self.post_copy,
            throttle,
        }
    }

    /// # Errors
    /// What can be asked for and is not there yet.
    pub fn check_supported(&self) -> Result<(), super::Error> {
        let lacking = match self {
            Options { post_copy: true, .. } => "--post-copy",
            Options { offline: true, .. } => "--offline",
            Options { streams: 2.., .. } => "--streams above 1",
            _ => return Ok(()),
        };
        Err(super::Error::Other(format!("{lacking} is not supported yet; leave it out")))
    }

    /// What the destination must know of it.
    pub fn manner(&self) -> Manner {
        Manner {
            check: self.check,
            offline: self.offline,
            post_copy: self.post_copy,
            keep_source: self.keep_source,
            tcp_established: self.tcp_established,
            volumes: self.volumes,
            streams: self.streams.saturating_sub(1),
        }
    }
}

/// Whose container it is, and what it is called there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Container {
    /// By lmrun's id.
    Lmrun(String),
    Docker(String),
    Podman(String),
    Containerd {
        namespace: String,
        name: String,
    },
}

#[derive(Debug, thiserror::Error)]
pub enum Malformed {
    #[error("{0:?} is no container: give lmrun's id, docker://NAME, podman://NAME or containerd://NAMESPACE/NAME")]
    Container(String),
    #[error("{0:?} is no rate: give bytes per second (500k, 100M, 1.5G) or bits (800kbit, 100Mbit, 10Gbit)")]
    Rate(String),
}

impl FromStr for Container {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        let malformed = || Malformed::Container(text.to_owned());
        let container = match text.split_once("://") {
            None => Container::Lmrun(text.to_owned()),
            Some(("docker", name)) => Container::Docker(name.to_owned()),
            Some(("podman", name)) => Container::Podman(name.to_owned()),
            Some(("containerd", name)) => {
                let (namespace, name) = name.split_once('/').filter(|(n, _)| !n.is_empty()).ok_or_else(malformed)?;
                Container::Containerd { namespace: namespace.to_owned(), name: name.to_owned() }
            }
            Some(_) => return Err(malformed()),
        };
        let name = container.name();
        if name.is_empty() || name.contains('/') { Err(malformed()) } else { Ok(container) }
    }
}

impl Container {
    /// The id or the name at its engine.
    pub fn name(&self) -> &str {
        match self {
            Container::Lmrun(name) | Container::Docker(name) | Container::Podman(name) => name,
            Container::Containerd { name, .. } => name,
        }
    }
}

/// As it is given on the command line.
impl fmt::Display for Container {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Container::Lmrun(id) => f.write_str(id),
            Container::Docker(name) => write!(f, "docker://{name}"),
            Container::Podman(name) => write!(f, "podman://{name}"),
            Container::Containerd { namespace, name } => write!(f, "containerd://{namespace}/{name}"),
        }
    }
}

/// Bytes per second, from a command line. Multiples are of 1000.
pub fn rate(text: &str) -> Result<u64, Malformed> {
    let malformed = || Malformed::Rate(text.to_owned());
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" => 1e3,
        "m" => 1e6,
        "g" => 1e9,
        "bit" => 1.0 / 8.0,
        "kbit" => 1e3 / 8.0,
        "mbit" => 1e6 / 8.0,
        "gbit" => 1e9 / 8.0,
        _ => return Err(malformed()),
    };
    let bytes = number.parse::<f64>().map_err(|_| malformed())? * factor;
    if (1.0..1e15).contains(&bytes) { Ok(bytes as u64) } else { Err(malformed()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_are_named_by_engine() {
        for text in ["web1", "docker://web", "podman://web", "containerd://k8s.io/web"] {
            assert_eq!(text.parse::<Container>().unwrap().to_string(), text);
        }
        for bad in ["", "a/b", "docker://", "docker://a/b", "containerd://web", "containerd:///web", "lxc://a"] {
            assert!(bad.parse::<Container>().is_err(), "{bad}");
        }
    }

    #[test]
    fn rates_have_units() {
        let good = [("1", 1), ("500k", 500_000), ("1.5G", 1_500_000_000), ("100Mbit", 12_500_000), ("8kbit", 1000)];
        for (text, bytes) in good {
            assert_eq!(rate(text).unwrap(), bytes, "{text}");
        }
        for bad in ["", "M", "0", "1X", "-1", "1.2.3", "1e9", "4bit", "99999999999999999G"] {
            assert!(rate(bad).is_err(), "{bad}");
        }
    }
}
