//! What must be known after a crash: at the source, that it has given up its right to run the container; at the destination,
//! what was decided.
//!
//! The *note* is a file in the container's directory: it is there or not. The *entry* is a file whose name ends in what was
//! decided; rename(2) decides, and only the first one finds the undecided file.

use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::engines::Prepared;
use super::handover::Verdict;
use super::handover::settle::Entry;
use crate::runtime::Process;

/// In the container's directory at the source.
const NOTE: &str = "migration.json";
/// Entries of the destination. Survives a reboot, so that a source that asks then is told what was.
const INCOMING: &str = "/var/lib/lmrun/incoming";

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{0:?} names no migration: that takes 32 hexadecimal digits")]
    Token(String),
}

pub type Result<T> = std::result::Result<T, Error>;

fn at(path: &Path) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { path: path.to_owned(), source }
}

/// A new name for a migration: 128 random bits in hex, which nobody guesses.
pub fn token() -> Result<String> {
    let path = Path::new("/dev/urandom");
    let mut bits = [0; 16];
    File::open(path).and_then(|mut random| io::Read::read_exact(&mut random, &mut bits)).map_err(at(path))?;
    Ok(bits.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// # Errors
/// What [`token`] does not make: it becomes a part of paths.
pub fn check_token(token: &str) -> Result<()> {
    let sound = token.len() == 32 && token.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    if sound { Ok(()) } else { Err(Error::Token(token.to_owned())) }
}

/// Says at the source that only the destination knows who may run the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    pub token: String,
    /// As on the command line.
    pub destination: String,
    /// As on the command line.
    pub container: String,
    /// The container is kept, stopped, if it has moved.
    pub keep_source: bool,
}

impl Note {
    /// Puts the note into a container's directory, as a whole. It need not survive a loss of power: nor does the container.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let path = dir.join(NOTE);
        let new = dir.join(format!("{NOTE}.new"));
        let json = serde_json::to_vec(self).map_err(|e| at(&path)(e.into()))?;
        let written = write_private(&new, &json).and_then(|()| fs::rename(&new, &path));
        written.map_err(|e| {
            let _ = fs::remove_file(&new);
            at(&path)(e)
        })
    }

    /// None: there is none.
    pub fn read(dir: &Path) -> Result<Option<Note>> {
        read(&dir.join(NOTE))
    }

    pub fn remove(dir: &Path) -> Result<()> {
        gone(&dir.join(NOTE))
    }
}

/// What an entry is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arrival {
    /// The container's id, and the root directory that it is in.
    pub id: String,
    pub root: PathBuf,
    /// The lmrun that receives it.
    pub owner: Process,
    /// The inode of the pid namespace that the owner's pid is of. None is 0.
    #[serde(default)]
    pub pid_namespace: u64,
}

impl Arrival {
    /// Of a container that this process receives.
    pub fn own(id: &str, root: &Path) -> Result<Arrival> {
        let (id, root) = (id.to_owned(), root.to_owned());
        Ok(Arrival { id, root, owner: Process::own(), pid_namespace: pid_namespace()? })
    }

    /// Whether it is known that nobody receives the container any more.
    pub fn is_orphaned(&self) -> bool {
        pid_namespace().is_ok_and(|own| own == self.pid_namespace) && !self.owner.is_alive()
    }
}

fn pid_namespace() -> Result<u64> {
    let path = Path::new("/proc/self/ns/pid");
    Ok(fs::metadata(path).map_err(at(path))?.ino())
}

/// Where a destination keeps the records of each round until the container is complete. Its name is no id.
pub fn records(root: &Path, token: &str) -> PathBuf {
    root.join(format!(".arriving:{token}"))
}

/// What an engine has made for an entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ByEngine {
    /// As on a command line.
    pub container: String,
    pub prepared: Prepared,
    /// The lmrun root directory that it is in.
    pub root: PathBuf,
}

/// The entries of this host.
#[derive(Debug, Clone)]
pub struct Incoming(PathBuf);

impl Default for Incoming {
    fn default() -> Self {
        Incoming(INCOMING.into())
    }
}

impl Incoming {
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Incoming(dir.into())
    }

    fn path(&self, token: &str, entry: Entry) -> Result<PathBuf> {
        check_token(token)?;
        let end = match entry {
            Entry::Open => "open",
            Entry::Running => "running",
            Entry::Aborted | Entry::Gone => "aborted",
        };
        Ok(self.0.join(format!("{token}.{end}")))
    }

    /// Makes an entry on which nothing is decided, and sees to it that deciding needs no more room on the disk.
    pub fn open(&self, token: &str, arrival: &Arrival) -> Result<()> {
        let path = self.path(token, Entry::Open)?;
        DirBuilder::new().recursive(true).mode(0o700).create(&self.0).map_err(at(&self.0))?;
        let json = serde_json::to_vec(arrival).map_err(|e| at(&path)(e.into()))?;
        let (now, _) = self.look(token)?;
        if now != Entry::Gone {
            return Err(at(&path)(ErrorKind::AlreadyExists.into()));
        }
        write_private(&path, &json).and_then(|()| sync(&path)).and_then(|()| sync(&self.0)).map_err(at(&path))
    }

    /// Notes that the container of an entry is an engine's.
    pub fn made_by_engine(&self, token: &str, made: &ByEngine) -> Result<()> {
        let path = self.engine_path(token)?;
        let json = serde_json::to_vec(made).map_err(|e| at(&path)(e.into()))?;
        write_private(&path, &json).map_err(at(&path))
    }

    /// None: it is lmrun's alone.
    pub fn by_engine(&self, token: &str) -> Result<Option<ByEngine>> {
        read(&self.engine_path(token)?)
    }

    fn engine_path(&self, token: &str) -> Result<PathBuf> {
        check_token(token)?;
        Ok(self.0.join(format!("{token}.engine")))
    }

    /// Decides, unless it was decided before; tells whether `verdict` is what holds now.
    pub fn decide(&self, token: &str, verdict: Verdict) -> Result<bool> {
        let (from, running) = (self.path(token, Entry::Open)?, self.path(token, Entry::Running)?);
        let to = match verdict {
            Verdict::Running => running.clone(),
            Verdict::Aborted => self.path(token, Entry::Aborted)?,
        };
        match fs::rename(&from, &to) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == ErrorKind::NotFound => {
                let runs = running.try_exists().map_err(at(&running))?;
                Ok(runs == (verdict == Verdict::Running))
            }
            Err(e) => Err(at(&to)(e)),
        }
    }

    /// How an entry is now, and what it is about.
    pub fn look(&self, token: &str) -> Result<(Entry, Option<Arrival>)> {
        for entry in [Entry::Open, Entry::Running, Entry::Aborted] {
            if let Some(arrival) = read(&self.path(token, entry)?)? {
                return Ok((entry, Some(arrival)));
            }
        }
        Ok((Entry::Gone, None))
    }

    /// When this returns, what was decided survives a loss of power.
    pub fn sync(&self) -> Result<()> {
        sync(&self.0).map_err(at(&self.0))
    }

    /// Whoever asks from now on is told that it never ran here.
    pub fn remove(&self, token: &str) -> Result<()> {
        let entries = [Entry::Open, Entry::Aborted, Entry::Running];
        entries.into_iter().try_for_each(|entry| gone(&self.path(token, entry)?))?;
        gone(&self.engine_path(token)?)
    }

    /// All entries, by token.
    pub fn all(&self) -> Result<Vec<(String, Entry, Arrival)>> {
        let entries = match fs::read_dir(&self.0) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(at(&self.0))?,
        };
        let mut all = Vec::new();
        for entry in entries {
            let name = entry.map_err(at(&self.0))?.file_name();
            let token = name.to_str().and_then(|name| name.split_once('.')).map(|(token, _)| token);
            if let Some(token) = token.filter(|token| check_token(token).is_ok())
                && let (entry, Some(arrival)) = self.look(token)?
            {
                all.push((token.to_owned(), entry, arrival));
            }
        }
        Ok(all)
    }
}

fn write_private(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(content)
}

fn sync(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// None: there is no such file.
fn read<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<Option<T>> {
    match fs::read(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        read => read.and_then(|json| Ok(serde_json::from_slice(&json)?)).map(Some).map_err(at(path)),
    }
}

fn gone(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(at(path)(e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("lmrun-ledger-{}-{name}", std::process::id()));
            fs::create_dir_all(&dir).unwrap();
            Scratch(dir)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn arrival() -> Arrival {
        Arrival::own("web1", Path::new("/run/lmrun")).unwrap()
    }

    #[test]
    fn a_note_is_there_until_it_is_removed() {
        let dir = Scratch::new("note");
        let note = Note {
            token: token().unwrap(),
            destination: "ssh://b".into(),
            container: "web1".into(),
            keep_source: true,
        };
        assert_eq!(Note::read(&dir.0).unwrap(), None);
        note.write(&dir.0).unwrap();
        assert_eq!(Note::read(&dir.0).unwrap(), Some(note));
        assert_eq!(fs::read_dir(&dir.0).unwrap().count(), 1);
        Note::remove(&dir.0).unwrap();
        Note::remove(&dir.0).unwrap();
        assert_eq!(Note::read(&dir.0).unwrap(), None);
        fs::write(dir.0.join(NOTE), "{").unwrap();
        assert!(Note::read(&dir.0).is_err(), "a note that cannot be read is not none");
    }

    #[test]
    fn an_owner_is_judged_in_its_own_pid_namespace() {
        let own = arrival();
        let dead = Arrival { owner: Process { start_time: own.owner.start_time + 1, ..own.owner }, ..own.clone() };
        assert!(!own.is_orphaned() && dead.is_orphaned());
        assert!(!Arrival { pid_namespace: 1, ..dead }.is_orphaned());
    }

    #[test]
    fn the_first_word_counts() {
        let dir = Scratch::new("first");
        let incoming = Incoming::at(dir.0.join("sub"));
        for (first, entry) in [(Verdict::Running, Entry::Running), (Verdict::Aborted, Entry::Aborted)] {
            let token = token().unwrap();
            incoming.open(&token, &arrival()).unwrap();
            assert!(incoming.open(&token, &arrival()).is_err(), "a token is for one migration");
            assert_eq!(incoming.look(&token).unwrap(), (Entry::Open, Some(arrival())));
            for verdict in [first, Verdict::Running, Verdict::Aborted] {
                assert_eq!(incoming.decide(&token, verdict).unwrap(), verdict == first);
            }
            assert_eq!(incoming.look(&token).unwrap(), (entry, Some(arrival())));
            assert!(incoming.open(&token, &arrival()).is_err(), "decided is decided");
            incoming.sync().unwrap();
            assert_eq!(incoming.all().unwrap(), [(token.clone(), entry, arrival())]);
            incoming.remove(&token).unwrap();
            assert_eq!(incoming.look(&token).unwrap(), (Entry::Gone, None));
            assert!(!incoming.decide(&token, Verdict::Running).unwrap(), "what is gone cannot come to run");
            assert!(incoming.decide(&token, Verdict::Aborted).unwrap());
        }
        assert!(Incoming::at("/nonexistent").all().unwrap().is_empty());
    }

    #[test]
    fn only_one_of_many_at_once_decides() {
        let dir = Scratch::new("many");
        let incoming = Incoming::at(&dir.0);
        for _ in 0..50 {
            let token = token().unwrap();
            incoming.open(&token, &arrival()).unwrap();
            let said = std::thread::scope(|scope| {
                let each = |n| if n % 2 == 0 { Verdict::Running } else { Verdict::Aborted };
                let (incoming, token) = (&incoming, &token);
                let all: Vec<_> =
                    (0..6).map(each).map(|v| scope.spawn(move || (v, incoming.decide(token, v).unwrap()))).collect();
                all.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
            });
            let (entry, _) = incoming.look(&token).unwrap();
            let holds = if entry == Entry::Running { Verdict::Running } else { Verdict::Aborted };
            assert!(said.iter().all(|&(verdict, won)| won == (verdict == holds)), "{entry:?}: {said:?}");
        }
    }

    #[test]
    fn tokens_are_no_paths() {
        let made = token().unwrap();
        check_token(&made).unwrap();
        assert_ne!(made, token().unwrap());
        for bad in ["", "..", "../../../../etc/passwd-0123456789ab", &made[1..], &made.to_uppercase().replace('0', "A")]
        {
            assert!(check_token(bad).is_err(), "{bad}");
        }
    }
}
