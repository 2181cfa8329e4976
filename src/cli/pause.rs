//! `lmrun pause`

use super::report::Failure;
use crate::runtime::{self, Store};

/// Stop all processes of a container
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The name of the container
    id: String,
}

impl Args {
    pub fn run(&self, store: &Store) -> Result<u8, Failure> {
        runtime::pause(store, &self.id).map_err(|e| Failure::new(format!("cannot pause container {}", self.id), e))?;
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Cli, Command};
    use clap::Parser;

    #[test]
    fn takes_one_id() {
        assert!(matches!(Cli::try_parse_from(["lmrun", "pause", "c"]).unwrap().command, Command::Pause(_)));
    }
}
