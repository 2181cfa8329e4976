//! `lmrun restore`

use std::path::PathBuf;

use super::checkpoint::Accepted;
use super::create::Making;
use super::report::Failure;
use super::run::Attaching;
use crate::runtime::{self, RestoreOptions, Store};

/// Make a container from a checkpoint; attached, exit with its exit code
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Directory with the images
    #[arg(long, value_name = "DIR", default_value = "checkpoint")]
    image_path: PathBuf,
    /// Directory for logs and statistics [default: the images']
    #[arg(long, value_name = "DIR")]
    work_path: Option<PathBuf>,
    /// Bring back established TCP connections
    #[arg(long)]
    tcp_established: bool,
    #[command(flatten)]
    making: Making,
    #[command(flatten)]
    attaching: Attaching,
    /// Mounts are made as config.json has them, with its label
    #[arg(long, hide = true, value_name = "CONTEXT")]
    lsm_mount_context: Option<String>,
    /// Refused: processes have the profile that they were dumped with
    #[arg(long, hide = true, value_name = "TYPE:NAME")]
    lsm_profile: Option<String>,
    #[command(flatten)]
    accepted: Accepted,
    /// The name of the container
    id: String,
}

impl Args {
    pub fn run(&self, store: &Store) -> Result<u8, Failure> {
        let what = || format!("cannot restore container {}", self.id);
        self.accepted.check().map_err(|why| Failure::new(what(), why))?;
        if self.lsm_profile.is_some() {
            return Err(Failure::new(what(), "--lsm-profile: processes keep the profile that they were dumped with"));
        }
        let options = RestoreOptions {
            create: self.making.options(),
            images: self.image_path.clone(),
            work: self.work_path.clone(),
            tcp_established: self.tcp_established,
            attachment: self.attaching.attachment(),
        };
        let code = runtime::restore(store, &self.id, &options).map_err(|e| Failure::new(what(), e))?;
        Ok(code.to_le_bytes()[0])
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Cli, Command, argv};
    use clap::Parser;

    #[test]
    fn every_flag_of_runcs() {
        let argv = "lmrun restore --console-socket /c --image-path /i --work-path /w --tcp-established --ext-unix-sk \
                    --shell-job --file-locks --manage-cgroups-mode ignore --bundle /b --detach --pid-file /p --no-subreaper \
                    --no-pivot --empty-ns network --auto-dedup --lazy-pages --lsm-profile selinux:x --lsm-mount-context x c";
        assert!(Cli::try_parse_from(argv.split_whitespace()).is_ok());
    }

    #[test]
    fn as_docker_calls_it() {
        let given = "lmrun restore --image-path /i --work-path /w --detach --pid-file /p -no-subreaper --bundle /b c";
        let cli = Cli::try_parse_from(argv::normalized(given.split(' ').map(Into::into))).unwrap();
        let Command::Restore(args) = cli.command else { panic!() };
        let attachment = args.attaching.attachment();
        assert!(attachment.detach && attachment.no_subreaper);
    }
}
