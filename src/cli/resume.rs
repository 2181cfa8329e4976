//! `lmrun resume`

use super::report::Failure;
use crate::runtime::{self, Store};

/// Let the processes of a paused container run again
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The name of the container
    id: String,
}

impl Args {
    pub fn run(&self, store: &Store) -> Result<u8, Failure> {
        runtime::resume(store, &self.id)
            .map_err(|e| Failure::new(format!("cannot resume container {}", self.id), e))?;
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Cli, Command};
    use clap::Parser;

    #[test]
    fn takes_one_id() {
        assert!(matches!(Cli::try_parse_from(["lmrun", "resume", "c"]).unwrap().command, Command::Resume(_)));
    }
}
