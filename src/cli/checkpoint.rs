//! `lmrun checkpoint`

use std::path::PathBuf;

use super::page_server::Endpoint;
use super::progress::Bar;
use super::report::Failure;
use crate::runtime::{self, CheckpointOptions, Status, Store};

/// Write the state of a running container to a directory of images
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Directory for the images
    #[arg(long, value_name = "DIR", default_value = "checkpoint")]
    image_path: PathBuf,
    /// Directory for logs and statistics [default: the container's]
    #[arg(long, value_name = "DIR")]
    work_path: Option<PathBuf>,
    /// Images of an earlier --pre-dump, relative to the image directory
    #[arg(long, value_name = "DIR")]
    parent_path: Option<PathBuf>,
    /// Let the container go on
    #[arg(long)]
    leave_running: bool,
    /// Take established TCP connections along
    #[arg(long)]
    tcp_established: bool,
    /// Write the memory only, and let the container go on: a round of pre-copy
    #[arg(long)]
    pre_dump: bool,
    /// Send the pages there instead of writing them
    #[arg(long, value_name = "HOST:PORT")]
    page_server: Option<Endpoint>,
    /// Allow a page server elsewhere than on this host: memory then travels in the clear
    #[arg(long)]
    insecure: bool,
    #[command(flatten)]
    _accepted: Accepted,
    id: String,
}

/// Options of runc that ask for what lmrun does anyway, or refuses by name where it cannot.
#[derive(Debug, clap::Args)]
pub struct Accepted {
    #[arg(long, hide = true)]
    file_locks: bool,
    #[arg(long, hide = true)]
    ext_unix_sk: bool,
    #[arg(long, hide = true)]
    shell_job: bool,
    #[arg(long, hide = true, value_name = "MODE")]
    manage_cgroups_mode: Option<String>,
    #[arg(long, hide = true, value_name = "NS")]
    empty_ns: Vec<String>,
    #[arg(long, hide = true)]
    auto_dedup: bool,
}

impl Args {
    pub fn run(&self, store: &Store) -> Result<u8, Failure> {
        let what = || format!("cannot checkpoint container {}", self.id);
        let pages = match &self.page_server {
            None => None,
            Some(endpoint) => Some(endpoint.connect(self.insecure).map_err(|e| Failure::new(what(), e))?),
        };
        let options = CheckpointOptions {
            images: self.image_path.clone(),
            work: self.work_path.clone(),
            parent: self.parent_path.clone(),
            leave_running: self.leave_running,
            tcp_established: self.tcp_established,
            pre_dump: self.pre_dump,
            pages,
        };
        let bar = Bar::on_terminal();
        let draw = bar.as_ref().map(|bar| |done, all| bar.show(done, all));
        let progress = draw.as_ref().map(|draw| draw as &dyn Fn(u64, u64));
        let report = runtime::checkpoint(store, &self.id, options, progress).map_err(|e| {
            let failure = Failure::new(what(), e);
            match store.load(&self.id) {
                Ok(state) => failure.container(match runtime::status(&state) {
                    Status::Stopped => "stopped".to_owned(),
                    now => format!("still {now}"),
                }),
                Err(_) => failure,
            }
        })?;
        drop(bar);
        tracing::info!(
            id = self.id,
            pages_written = report.pages_written,
            pages_in_parent = report.pages_in_parent,
            pages_scanned = report.pages_scanned,
            freezing = ?report.freezing,
            frozen = ?report.frozen,
            "{}",
            if self.pre_dump { "pre-dumped" } else { "checkpointed" },
        );
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Cli, Command};
    use clap::Parser;

    #[test]
    fn as_podman_calls_it() {
        let argv = "lmrun checkpoint --image-path /i --work-path /w --leave-running --leave-running \
                    --tcp-established --file-locks --parent-path ../p c";
        let argv = argv.split_whitespace();
        let Command::Checkpoint(args) = Cli::try_parse_from(argv).unwrap().command else { panic!() };
        assert!(args.leave_running && args.tcp_established && !args.pre_dump);
        assert_eq!(args.parent_path.unwrap().to_str(), Some("../p"));
    }
}
