//! `lmrun start`

use super::report::Failure;
use crate::runtime::{self, Store};

/// Start the workload of a created container
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The name of the container
    id: String,
}

impl Args {
    pub fn run(&self, store: &Store) -> Result<u8, Failure> {
        runtime::start(store, &self.id).map_err(|e| Failure::new(format!("cannot start container {}", self.id), e))?;
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Cli, Command};
    use clap::Parser;

    #[test]
    fn takes_one_id() {
        assert!(matches!(Cli::try_parse_from(["lmrun", "start", "c"]).unwrap().command, Command::Start(_)));
        assert!(Cli::try_parse_from(["lmrun", "start"]).is_err());
    }
}
