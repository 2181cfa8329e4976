//! Where a container goes, as a user gives it.

use std::fmt;
use std::str::FromStr;

use super::Error;

/// Where the container goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destination {
    /// `ssh://[user@]host[:port][/path/of/lmrun]`
    Ssh { user: Option<String>, host: String, port: Option<u16>, lmrun: Option<String> },
    /// `tls://host:port`
    Tls { host: String, port: u16 },
}

impl FromStr for Destination {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        parse(text).ok_or_else(|| Error::Destination(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<Destination> {
    let (scheme, rest) = text.split_once("://")?;
    let (authority, path) = match rest.find('/') {
        Some(at) => (&rest[..at], Some(&rest[at..])),
        None => (rest, None),
    };
    let (user, authority) = match authority.rsplit_once('@') {
        Some((user, authority)) => (Some(user), authority),
        None => (None, authority),
    };
    let (host, port) = match authority.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']')?;
            (host, if port.is_empty() { None } else { Some(port.strip_prefix(':')?) })
        }
        None => match authority.rsplit_once(':') {
            Some((host, _)) if host.contains(':') => return None, // IPv6 without brackets
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        },
    };
    let port = port.map(str::parse::<u16>).transpose().ok()?;
    // ssh(1) would take a word that begins with a dash for an option of its own.
    let sound =
        |word: &str| !word.is_empty() && !word.starts_with('-') && !word.contains(|c: char| c.is_control() || c == ' ');
    if !sound(host) || !user.is_none_or(sound) {
        return None;
    }
    match scheme {
        "ssh" => Some(Destination::Ssh {
            user: user.map(str::to_owned),
            host: host.to_owned(),
            port,
            lmrun: path.filter(|path| *path != "/").map(str::to_owned),
        }),
        "tls" if user.is_none() && path.is_none() => Some(Destination::Tls { host: host.to_owned(), port: port? }),
        _ => None,
    }
}

/// As it is given on the command line.
impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = |host: &str| if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
        match self {
            Destination::Tls { host: name, port } => write!(f, "tls://{}:{port}", host(name)),
            Destination::Ssh { user, host: name, port, lmrun } => {
                f.write_str("ssh://")?;
                user.iter().try_for_each(|user| write!(f, "{user}@"))?;
                f.write_str(&host(name))?;
                port.iter().try_for_each(|port| write!(f, ":{port}"))?;
                f.write_str(lmrun.as_deref().unwrap_or_default())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations_are_urls() {
        let good = [
            "ssh://b",
            "ssh://root@b",
            "ssh://root@b:2222",
            "ssh://b/opt/lmrun",
            "ssh://u@[fe80::1%eth0]:22/usr/bin/lmrun",
            "tls://b:8443",
            "tls://[::1]:1",
        ];
        for text in good {
            assert_eq!(text.parse::<Destination>().unwrap().to_string(), text);
        }
        let Destination::Ssh { user, host, port, lmrun } = "ssh://a@b:1/l".parse().unwrap() else { panic!() };
        assert_eq!((user.as_deref(), &*host, port, lmrun.as_deref()), (Some("a"), "b", Some(1), Some("/l")));
        let bad = [
            "b",
            "ssh://",
            "ssh://@b",
            "ssh://-oProxyCommand=x",
            "ssh://-x@b",
            "ssh://b:x",
            "ssh://::1",
            "tls://b",
            "tls://u@b:1",
            "tls://b:1/x",
            "http://b",
            "ssh://b c",
            "ssh://[::1",
            "exec://x",
        ];
        for text in bad {
            assert!(text.parse::<Destination>().is_err(), "{text}");
        }
    }
}
