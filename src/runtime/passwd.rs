//! /etc/passwd, read as the plain file it is: a name service would load libraries, and inside a
//! container those are the container's.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

/// More than this is not a password file, and is not read.
const LIMIT: u64 = 4 << 20;

/// One line of passwd(5).
#[derive(Debug, PartialEq, Eq)]
pub(super) struct User {
    pub name: String,
    pub home: PathBuf,
}

/// The first user with this uid; None where there is none or no readable file.
pub(super) fn user(passwd: &Path, uid: u32) -> Option<User> {
    // A fifo or a device would keep us waiting.
    if !passwd.metadata().ok()?.is_file() {
        return None;
    }
    let lines = BufReader::new(File::open(passwd).ok()?.take(LIMIT)).lines();
    lines.map_while(Result::ok).find_map(|line| parse(&line, uid))
}

fn parse(line: &str, uid: u32) -> Option<User> {
    let fields: Vec<_> = line.split(':').collect();
    let [name, _password, number, _gid, _gecos, home, ..] = fields[..] else {
        return None;
    };
    (number.parse() == Ok(uid)).then(|| User { name: name.to_owned(), home: home.into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_names_user_and_home() {
        let root = User { name: "root".into(), home: "/root".into() };
        assert_eq!(parse("root:x:0:0:root:/root:/bin/bash", 0), Some(root));
        assert_eq!(parse("root:x:0:0:root:/root:/bin/bash", 1), None);
        assert_eq!(parse("# root:0", 0), None);
    }
}
