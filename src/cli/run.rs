//! `lmrun run`

use super::create::Making;
use super::report::Failure;
use crate::runtime::{self, Attachment, Store};

/// Create and start a container; attached, exit with its exit code
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    making: Making,
    #[command(flatten)]
    attaching: Attaching,
    id: String,
}

/// Options of the commands that may stay with the container.
#[derive(Debug, clap::Args)]
pub struct Attaching {
    /// Return as soon as the container runs
    #[arg(short, long)]
    detach: bool,
    /// Do not adopt processes that the container leaves behind
    #[arg(long)]
    no_subreaper: bool,
}

impl Attaching {
    pub fn attachment(&self) -> Attachment {
        Attachment { detach: self.detach, no_subreaper: self.no_subreaper }
    }
}

impl Args {
    pub fn run(&self, store: &Store) -> Result<u8, Failure> {
        let code = runtime::run(store, &self.id, &self.making.options(), self.attaching.attachment())
            .map_err(|e| Failure::new(format!("cannot run container {}", self.id), e))?;
        Ok(code.to_le_bytes()[0])
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Cli, Command};
    use clap::Parser;

    #[test]
    fn detached_in_both_spellings() {
        for flag in ["-d", "--detach"] {
            let cli = Cli::try_parse_from(["lmrun", "run", flag, "-b", "/b", "c"]).unwrap();
            let Command::Run(args) = cli.command else { panic!() };
            assert!(args.attaching.attachment().detach);
        }
    }
}
