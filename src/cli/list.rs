//! `lmrun list`

use clap::ValueEnum;

use super::report::Failure;
use super::state::json;
use crate::runtime::{self, State, Status, Store};

/// List the containers under the root directory
#[derive(Debug, clap::Args)]
pub struct Args {
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    format: Format,
    /// Only the ids
    #[arg(short, long)]
    quiet: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    Table,
    Json,
}

impl Args {
    pub fn run(&self, store: &Store) -> Result<u8, Failure> {
        let containers = runtime::list(store).map_err(|e| Failure::new("cannot list containers", e))?;
        if self.quiet {
            containers.iter().for_each(|(state, _)| println!("{}", state.id));
        } else {
            match self.format {
                Format::Json => {
                    let all: Vec<_> = containers.iter().map(|(state, status)| json(state, *status)).collect();
                    println!("{}", serde_json::Value::from(all));
                }
                Format::Table => print!("{}", table(&containers)),
            }
        }
        Ok(0)
    }
}

fn table(containers: &[(State, Status)]) -> String {
    let head = ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(str::to_owned);
    let rows = containers.iter().map(|(state, status)| {
        let pid = state.init.filter(|_| *status != Status::Stopped).map_or(0, |init| init.pid);
        let bundle = state.bundle.display().to_string();
        [state.id.clone(), pid.to_string(), status.to_string(), bundle, state.created.clone(), state.owner.clone()]
    });
    let rows: Vec<_> = std::iter::once(head).chain(rows).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<_> = (0..6).map(width).collect();
    let line = |row: &[String; 6]| {
        let cells: Vec<_> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        format!("{}\n", cells.join("   ").trim_end())
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::super::{Cli, Command};
    use super::*;
    use clap::Parser;

    #[test]
    fn formats() {
        let Command::List(args) = Cli::try_parse_from(["lmrun", "list", "--format", "json"]).unwrap().command else {
            panic!()
        };
        assert!(matches!(args.format, Format::Json));
    }

    #[test]
    fn an_empty_table_is_its_head() {
        assert_eq!(table(&[]), "ID   PID   STATUS   BUNDLE   CREATED   OWNER\n");
    }
}
