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
    /// Connections on their way to being established are not taken along by any means
    #[arg(long, hide = true)]
    tcp_skip_in_flight: bool,
    /// Files without a name are taken along without it
    #[arg(long, hide = true)]
    link_remap: bool,
    #[command(flatten)]
    accepted: Accepted,
    /// The name of the container
    id: String,
}

/// Options of runc that ask for what lmrun does anyway, or refuses by name where it cannot; and those that
/// it must refuse.
#[derive(Debug, clap::Args)]
pub struct Accepted {
    #[arg(long, hide = true)]
    file_locks: bool,
    #[arg(long, hide = true)]
    ext_unix_sk: bool,
    #[arg(long, hide = true)]
    shell_job: bool,
    /// Cgroups are made as config.json has them
    #[arg(long, hide = true, value_parser = ["soft", "full", "strict", "ignore"])]
    manage_cgroups_mode: Option<String>,
    /// A network namespace is always made anew; how it is connected is the engine's affair
    #[arg(long, hide = true, value_parser = ["network"])]
    empty_ns: Vec<String>,
    /// Parents are left as they are
    #[arg(long, hide = true)]
    auto_dedup: bool,
    /// Refused
    #[arg(long, hide = true)]
    lazy_pages: bool,
    /// Says when lazy pages can be served; without them there is nothing to say
    #[arg(long, hide = true, value_name = "FD", allow_negative_numbers = true)]
    status_fd: Option<i32>,
}

impl Accepted {
    /// # Errors
    /// What was asked for and cannot be had.
    pub fn check(&self) -> Result<(), &'static str> {
        if self.lazy_pages {
            return Err("--lazy-pages: lmrun restores all memory before a container runs");
        }
        Ok(())
    }
}

impl Args {
    pub fn run(&self, store: &Store) -> Result<u8, Failure> {
        let what = || format!("cannot checkpoint container {}", self.id);
        self.accepted.check().map_err(|why| Failure::new(what(), why))?;
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
    fn every_flag_of_runcs() {
        let argv = "lmrun checkpoint --image-path /i --work-path /w --parent-path ../p --leave-running --tcp-established \
                    --tcp-skip-in-flight --link-remap --ext-unix-sk --shell-job --lazy-pages --status-fd 7 \
                    --page-server 127.0.0.1:9 --file-locks --pre-dump --manage-cgroups-mode soft --empty-ns network \
                    --auto-dedup c";
        let argv = argv.split_whitespace();
        let Command::Checkpoint(args) = Cli::try_parse_from(argv).unwrap().command else { panic!() };
        assert!(args.accepted.check().unwrap_err().contains("--lazy-pages"));
        for wrong in [["--empty-ns", "pid"], ["--manage-cgroups-mode", "none"]] {
            assert!(Cli::try_parse_from(["lmrun", "checkpoint", wrong[0], wrong[1], "c"]).is_err(), "{wrong:?}");
        }
    }

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
