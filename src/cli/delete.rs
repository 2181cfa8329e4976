//! `lmrun delete`

use super::report::Failure;
use crate::runtime::{self, Store};

/// Remove a stopped container and all that belongs to it
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Kill it first; it is no error when it is gone
    #[arg(short, long)]
    force: bool,
    /// The name of the container
    id: String,
}

impl Args {
    pub fn run(&self, store: &Store) -> Result<u8, Failure> {
        runtime::delete(store, &self.id, self.force)
            .map_err(|e| Failure::new(format!("cannot delete container {}", self.id), e))?;
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Cli, Command};
    use clap::Parser;

    #[test]
    fn force_in_both_spellings() {
        for flag in ["-f", "--force"] {
            let cli = Cli::try_parse_from(["lmrun", "delete", flag, "c"]).unwrap();
            assert!(matches!(cli.command, Command::Delete(args) if args.force));
        }
    }
}
