//! `lmrun receive`

use super::report::Failure;
use crate::migrate::{Error, destination, transport};
use crate::runtime::Store;

/// Receive a container that `lmrun migrate` sends
#[derive(Debug, clap::Args)]
#[group(id = "from", required = true, multiple = false)]
pub struct Args {
    /// Speak over standard input and output: what `lmrun migrate` starts by ssh
    #[arg(long, group = "from")]
    stdio: bool,
}

impl Args {
    pub fn run(&self, store: &Store) -> Result<u8, Failure> {
        transport::stdio()
            .map_err(Error::from)
            .and_then(|channel| destination::run(store, channel))
            .map_err(|e| Failure::new("cannot receive a container", e))?;
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Cli;
    use clap::Parser;

    #[test]
    fn one_way_must_be_said() {
        assert!(Cli::try_parse_from(["lmrun", "receive"]).is_err());
        assert!(Cli::try_parse_from(["lmrun", "receive", "--stdio"]).is_ok());
    }
}
