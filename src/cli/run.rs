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
    /// Leave the container when it has stopped, to be deleted later
    #[arg(long)]
    keep: bool,
    /// The name of the container
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
        Attachment { detach: self.detach, no_subreaper: self.no_subreaper, keep: false }
    }
}

impl Args {
    pub fn run(&self, store: &Store) -> Result<u8, Failure> {
        let attachment = Attachment { keep: self.keep, ..self.attaching.attachment() };
        let code = runtime::run(store, &self.id, &self.making.options(), attachment)
            .map_err(|e| Failure::new(format!("cannot run container {}", self.id), e))?;
        Ok(code.to_le_bytes()[0])
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Cli, Command};
    use clap::Parser;

    #[test]
    fn every_flag() {
        let argv = "lmrun run --bundle /b --console-socket /c --pidfd-socket /p --detach --keep --pid-file /f --no-subreaper \
                    --no-pivot --no-new-keyring --preserve-fds 2 c";
        let Command::Run(args) = Cli::try_parse_from(argv.split_whitespace()).unwrap().command else { panic!() };
        let options = args.making.options();
        assert!(args.keep && args.attaching.attachment().no_subreaper && options.no_pivot && options.no_new_keyring);
        assert_eq!((options.preserve_fds, options.pidfd_socket.unwrap().to_str()), (2, Some("/p")));
    }

    #[test]
    fn detached_in_both_spellings() {
        for flag in ["-d", "--detach"] {
            let cli = Cli::try_parse_from(["lmrun", "run", flag, "-b", "/b", "c"]).unwrap();
            let Command::Run(args) = cli.command else { panic!() };
            assert!(args.attaching.attachment().detach);
        }
    }
}
