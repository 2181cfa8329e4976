//! What must be known after a crash: at the source that it gave its right up, at the destination what was decided.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Error, Result};

/// In the container's directory at the source.
const GIVEN_UP: &str = "migration.json";
/// Verdicts of the destination, one file each.
const INCOMING: &str = "/var/lib/lmrun/incoming";

/// The source's note.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub struct GivenUp {
    pub token: String,
    pub destination: String,
}

/// What became of a migration at the destination; the first word counts for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    Running,
    Aborted,
}

impl Decision {
    fn word(self) -> &'static str {
        match self {
            Decision::Running => "running",
            Decision::Aborted => "aborted",
        }
    }
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.display().to_string();
    move |e| Error::Other(format!("{path}: {e}"))
}

/// A name for a migration: 128 random bits in hex.
pub fn token() -> Result<String> {
    let path = "/proc/sys/kernel/random/uuid";
    Ok(fs::read_to_string(path).map_err(failed(Path::new(path)))?.trim().replace('-', ""))
}

/// It becomes a part of paths.
pub fn check_token(token: &str) -> Result<()> {
    match token.len() == 32 && token.bytes().all(|b| b.is_ascii_hexdigit()) {
        true => Ok(()),
        false => {
            Err(Error::Other("the source names the migration by something else than 32 hexadecimal digits".into()))
        }
    }
}

/// Writes that this side has given up its right to run the container. Durable when it returns.
pub fn give_up(dir: &Path, note: &GivenUp) -> Result<()> {
    let path = dir.join(GIVEN_UP);
    let json = serde_json::to_vec(note).map_err(|e| failed(&path)(e.into()))?;
    durable(&path, &json, |from, to| fs::rename(from, to)).map_err(failed(&path))
}

/// The note, if there is one.
pub fn given_up(dir: &Path) -> Result<Option<GivenUp>> {
    let path = dir.join(GIVEN_UP);
    match fs::read(&path) {
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        read => read.and_then(|json| Ok(serde_json::from_slice(&json)?)).map(Some).map_err(failed(&path)),
    }
}

/// Takes the note away.
pub fn forget(dir: &Path) -> Result<()> {
    let path = dir.join(GIVEN_UP);
    match fs::remove_file(&path) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(failed(&path)(e)),
        _ => Ok(()),
    }
}

/// Decides, unless somebody has decided before; gives what holds. Durable when it returns.
pub fn decide(token: &str, decision: Decision) -> Result<Decision> {
    let path = PathBuf::from(INCOMING).join(token);
    fs::create_dir_all(INCOMING).map_err(failed(Path::new(INCOMING)))?;
    // link(2) fails where there is one: whoever is first decides.
    match durable(&path, decision.word().as_bytes(), |from, to| fs::hard_link(from, to)) {
        Ok(()) => Ok(decision),
        Err(e) if e.kind() == ErrorKind::AlreadyExists => {
            let said = fs::read_to_string(&path).map_err(failed(&path))?;
            Ok(if said == Decision::Running.word() { Decision::Running } else { Decision::Aborted })
        }
        Err(e) => Err(failed(&path)(e)),
    }
}

fn durable(path: &Path, content: &[u8], place: impl FnOnce(&Path, &Path) -> io::Result<()>) -> io::Result<()> {
    let new = path.with_extension(format!("{}.new", std::process::id()));
    let written = File::create(&new).and_then(|mut file| {
        file.write_all(content)?;
        file.sync_all()
    });
    let placed = written.and_then(|()| place(&new, path));
    let _ = fs::remove_file(&new);
    placed?;
    File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}
