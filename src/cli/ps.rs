//! `lmrun ps`

use clap::ValueEnum;

use super::report::Failure;
use crate::runtime::{self, Store};

/// List the processes of a container
#[derive(Debug, clap::Args)]
pub struct Args {
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    format: Format,
    /// The name of the container
    id: String,
    /// Options of ps(1) for the table: -ef, or -o COLUMN,...
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    options: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Table,
    Json,
}

/// With what ps calls them.
const FULL: [(&str, &str); 8] = [
    ("user", "UID"),
    ("pid", "PID"),
    ("ppid", "PPID"),
    ("c", "C"),
    ("stime", "STIME"),
    ("tty", "TTY"),
    ("time", "TIME"),
    ("cmd", "CMD"),
];

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
enum Error {
    #[error("ps option {0:?} is not known: -ef, or -o with columns")]
    Option(String),
    #[error("ps column {0:?} is not known")]
    Column(String),
}

impl Args {
    pub fn run(&self, store: &Store) -> Result<u8, Failure> {
        let what = || format!("cannot list the processes of container {}", self.id);
        let pids = runtime::processes(store, &self.id).map_err(|e| Failure::new(what(), e))?;
        match self.format {
            Format::Json => println!("{}", serde_json::json!(pids)),
            Format::Table => {
                let columns = columns(&self.options).map_err(|e| Failure::new(what(), e))?;
                print!("{}", table(&pids, &columns).map_err(|e| Failure::new(what(), e))?);
            }
        }
        Ok(0)
    }
}

/// Name and title of each column.
fn columns(options: &[String]) -> Result<Vec<(String, String)>, Error> {
    let mut chosen: Vec<String> = Vec::new();
    let mut options = options.iter();
    while let Some(option) = options.next() {
        let unknown = || Error::Option(option.clone());
        let letters = option.strip_prefix('-').unwrap_or(option);
        // "o" takes what follows it in the word, or the next word.
        match letters.split_once('o') {
            Some((before, list)) if before.chars().all(|c| "efA".contains(c)) => {
                let list = if list.is_empty() { options.next().ok_or_else(unknown)? } else { list };
                chosen.extend(list.split([',', ' ']).map(str::to_owned));
            }
            None if !letters.is_empty() && letters.chars().all(|c| "efFA".contains(c)) => {}
            _ => return Err(unknown()),
        }
    }
    if chosen.is_empty() {
        return Ok(FULL.map(|(name, title)| (name.to_owned(), title.to_owned())).to_vec());
    }
    let named = |column: String| match column.split_once('=') {
        Some((name, title)) => (name.to_lowercase(), title.to_owned()),
        None => (column.to_lowercase(), if column == "comm" { "COMMAND".into() } else { column.to_uppercase() }),
    };
    Ok(chosen.into_iter().map(named).collect())
}

fn table(pids: &[i32], columns: &[(String, String)]) -> Result<String, Error> {
    let mut rows = vec![columns.iter().map(|(_, title)| title.clone()).collect::<Vec<_>>()];
    // Also for nobody, so that an unknown column is always one.
    for (name, _) in columns {
        runtime::process_column(0, name).ok_or_else(|| Error::Column(name.clone()))?;
    }
    for pid in pids {
        rows.push(columns.iter().map(|(name, _)| runtime::process_column(*pid, name).unwrap_or_default()).collect());
    }
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<_> = (0..columns.len()).map(width).collect();
    let is_number = |column: usize| {
        rows.len() > 1 && rows[1..].iter().all(|row| row[column].chars().all(|c| c.is_ascii_digit() || c == '.'))
    };
    let right: Vec<_> = (0..columns.len()).map(is_number).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().enumerate().map(|(n, cell)| {
            let width = widths[n];
            if right[n] { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
        });
        format!("{}\n", cells.collect::<Vec<_>>().join(" ").trim_end())
    };
    Ok(rows.iter().map(line).collect())
}

#[cfg(test)]
mod tests {
    use super::super::{Cli, Command};
    use super::*;
    use clap::Parser;

    fn args(argv: &str) -> Args {
        let Command::Ps(args) = Cli::try_parse_from(argv.split(' ')).unwrap().command else { panic!() };
        args
    }

    #[test]
    fn as_containerd_calls_it() {
        assert_eq!(args("lmrun --root /r ps --format json c").format, Format::Json);
    }

    #[test]
    fn options_of_ps() {
        let names = |argv| {
            columns(&args(argv).options).map(|columns| columns.into_iter().map(|(name, _)| name).collect::<Vec<_>>())
        };
        assert_eq!(names("lmrun ps c").unwrap(), FULL.map(|(name, _)| name));
        assert_eq!(names("lmrun ps c -ef").unwrap().len(), 8);
        assert_eq!(names("lmrun ps c -o pid,comm").unwrap(), ["pid", "comm"]);
        assert_eq!(names("lmrun ps c -eo pid -oargs").unwrap(), ["pid", "args"]);
        assert_eq!(names("lmrun ps c aux"), Err(Error::Option("aux".into())));
        assert_eq!(table(&[], &[("x".into(), "X".into())]), Err(Error::Column("x".into())));
    }
}
