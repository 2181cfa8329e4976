//! Is a directory the same on both hosts (a network file system, a cluster's)? Then there is nothing to copy.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::{Error, Result};

const RANDOM: usize = 16;

/// A file with a name and a content that nobody can guess, in a directory of the source. What the two are is told to the
/// destination, which looks whether it [sees](Probe::is_seen) it. Removed when dropped.
#[derive(Debug)]
pub struct Probe {
    path: PathBuf,
    /// The file's name.
    pub name: String,
    /// Its content.
    pub nonce: String,
}

impl Probe {
    pub fn place(dir: &Path) -> Result<Self> {
        let mut random = [0; 2 * RANDOM];
        let source = "/dev/urandom";
        File::open(source).and_then(|mut f| f.read_exact(&mut random)).map_err(Error::io("read", source))?;
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
        let (name, nonce) = (format!(".lmrun-{}", hex(&random[..RANDOM])), hex(&random[RANDOM..]));
        let path = dir.join(&name);
        let open = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        // A network file system tells others when it is closed.
        let written = open.and_then(|mut f| f.write_all(nonce.as_bytes()).and_then(|()| f.sync_all()));
        let probe = Self { path, name, nonce };
        written.map_err(Error::io("write", &probe.path))?;
        Ok(probe)
    }

    /// Whether `dir`, on the destination, has the source's file. `name` and `nonce` are what the peer says they are.
    pub fn is_seen(dir: &Path, name: &str, nonce: &str) -> Result<bool> {
        let hex = |text: &str| text.len() == 2 * RANDOM && text.bytes().all(|b| b.is_ascii_hexdigit());
        if !name.strip_prefix(".lmrun-").is_some_and(hex) || !hex(nonce) {
            return Err(Error::Hostile { what: "a probe of shared storage with a wrong name".into() });
        }
        let path = dir.join(name);
        let open = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(&path);
        let mut found = Vec::new();
        let read = open.and_then(|file| file.take(nonce.len() as u64 + 1).read_to_end(&mut found));
        match read {
            Ok(_) => Ok(found == nonce.as_bytes()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(source) => Err(Error::Io { doing: "read", path, source }),
        }
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::migrate::disk::tests::Scratch;

    #[test]
    fn it_is_seen_where_it_is_and_nowhere_else() {
        let scratch = Scratch::new();
        let (here, there) = (scratch.dir("here"), scratch.dir("there"));
        let probe = Probe::place(&here).unwrap();
        assert!(Probe::is_seen(&here, &probe.name, &probe.nonce).unwrap());
        assert!(!Probe::is_seen(&there, &probe.name, &probe.nonce).unwrap());
        assert!(!Probe::is_seen(&here, &probe.name, &"0".repeat(32)).unwrap());
        for name in ["../here", ".lmrun-", "/etc/passwd", ".lmrun-../../../etc/../../../etc/passwd"] {
            assert!(Probe::is_seen(&here, name, &probe.nonce).is_err(), "{name}");
        }
        drop(probe);
        assert_eq!(fs::read_dir(&here).unwrap().count(), 0);
    }
}
