//! The command line, which is runc's: one command, one file.
//!
//! Each command is `Args` and a `run`; what it prints on success is its own, what it prints on failure is
//! [`report`]'s.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand};

use nix::sys::prctl;

use crate::runtime::Store;
use crate::sys::own_exe;

mod argv;
mod checkpoint;
mod create;
mod criu;
mod delete;
mod events;
mod exec;
mod features;
mod kill;
mod list;
mod log;
mod migrate;
mod page_server;
mod pair;
mod pause;
mod progress;
mod ps;
mod receive;
mod report;
mod restore;
mod resume;
mod run;
mod spec;
mod start;
mod state;
mod update;

/// What `--version` prints behind the name: three lines, as engines expect.
const VERSION: &str =
    concat!("version ", env!("CARGO_PKG_VERSION"), "\ncommit: v", env!("CARGO_PKG_VERSION"), "\nspec: 1.3.0");

/// An OCI runtime with live migration built in
#[derive(Debug, Parser)]
#[command(name = "lmrun", version = VERSION, args_override_self = true, disable_version_flag = true)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Options before the command.
#[derive(Debug, Args)]
struct Global {
    /// Directory for the state of containers [default: /run/lmrun; for another user than root $XDG_RUNTIME_DIR/lmrun]
    #[arg(long)]
    root: Option<PathBuf>,
    /// File for the log [default: standard error]
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// What the log is written as
    #[arg(long, value_enum, default_value_t = log::Format::Text)]
    log_format: log::Format,
    /// Log everything
    #[arg(long)]
    debug: bool,
    /// Have systemd make the cgroups: linux.cgroupsPath is slice:prefix:name
    #[arg(long)]
    systemd_cgroup: bool,
    /// Print version
    #[arg(short, short_alias = 'V', long, action = clap::ArgAction::Version)]
    version: Option<bool>,
    /// Go without cgroups that one has no right to make; auto: unless one is root on the host
    #[arg(long, value_name = "BOOL", default_value = "auto", value_parser = rootless)]
    rootless: Rootless,
    /// Accepted for runc's sake
    #[arg(long, value_name = "PATH", hide = true)]
    criu: Option<PathBuf>,
}

/// None: whoever calls decides.
type Rootless = Option<bool>;

fn rootless(word: &str) -> Result<Rootless, String> {
    match word {
        "auto" => Ok(None),
        "true" => Ok(Some(true)),
        "false" => Ok(Some(false)),
        _ => Err("true, false or auto".into()),
    }
}

impl Global {
    fn root(&self) -> PathBuf {
        let own = std::env::var_os("XDG_RUNTIME_DIR").filter(|_| !nix::unistd::geteuid().is_root());
        let default = || own.map_or_else(|| PathBuf::from("/run/lmrun"), |dir| PathBuf::from(dir).join("lmrun"));
        self.root.clone().unwrap_or_else(default)
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    Checkpoint(checkpoint::Args),
    Create(create::Args),
    Delete(delete::Args),
    Events(events::Args),
    Exec(exec::Args),
    Features(features::Args),
    Kill(kill::Args),
    List(list::Args),
    Migrate(Box<migrate::Args>),
    PageServer(page_server::Args),
    Pair(pair::Args),
    Pause(pause::Args),
    Ps(ps::Args),
    Receive(receive::Args),
    Restore(restore::Args),
    Resume(resume::Args),
    Run(run::Args),
    Spec(spec::Args),
    Start(start::Args),
    State(state::Args),
    Update(update::Args),
}

impl Command {
    /// Gives lmrun's exit code.
    fn run(&self, store: &Store) -> Result<u8, report::Failure> {
        match self {
            Command::Checkpoint(args) => args.run(store),
            Command::Create(args) => args.run(store),
            Command::Delete(args) => args.run(store),
            Command::Events(args) => args.run(store),
            Command::Exec(args) => args.run(store),
            Command::Features(args) => args.run(),
            Command::Kill(args) => args.run(store),
            Command::List(args) => args.run(store),
            Command::Migrate(args) => args.run(store),
            Command::PageServer(args) => args.run(),
            Command::Pair(args) => args.run(),
            Command::Pause(args) => args.run(store),
            Command::Ps(args) => args.run(store),
            Command::Receive(args) => args.run(store),
            Command::Restore(args) => args.run(store),
            Command::Resume(args) => args.run(store),
            Command::Run(args) => args.run(store),
            Command::Spec(args) => args.run(),
            Command::Start(args) => args.run(store),
            Command::State(args) => args.run(store),
            Command::Update(args) => args.run(store),
        }
    }
}

/// The command line, for man pages and completions.
pub fn definition() -> clap::Command {
    <Cli as clap::CommandFactory>::command()
}

/// lmrun, from the command line to the exit code.
pub fn main() -> ExitCode {
    if criu::is_asked_for(std::env::args_os().next().as_deref()) {
        return criu::main();
    }
    if own_exe::is_to_be_sealed(std::env::args_os())
        && let Err(failure) = seal()
    {
        failure.print();
        return ExitCode::FAILURE;
    }
    let cli = match Cli::try_parse_from(argv::normalized(std::env::args_os())) {
        Ok(cli) => cli,
        Err(error) => return misused(&error, std::env::args_os()),
    };
    match log::start(&cli.global).and_then(|()| {
        let root = std::path::absolute(cli.global.root()).map_err(|e| report::Failure::new("root directory", e))?;
        cli.command.run(&Store::new(root).with_systemd(cli.global.systemd_cgroup).with_rootless(cli.global.rootless))
    }) {
        Ok(code) => ExitCode::from(code),
        Err(failure) => {
            failure.print();
            ExitCode::from(failure.code())
        }
    }
}

/// Shows help that was asked for, or what is wrong with the command line: that in runc's words too, where engines look
/// for them.
fn misused(error: &clap::Error, argv: impl Iterator<Item = OsString>) -> ExitCode {
    use clap::error::{ContextKind, ContextValue, ErrorKind};
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => text.split(' ').next().unwrap_or_default(),
        _ => "",
    };
    let option = || text(ContextKind::InvalidArg).trim_start_matches('-');
    match error.kind() {
        ErrorKind::InvalidValue if text(ContextKind::InvalidValue).is_empty() => {
            eprintln!("flag needs an argument: -{}", option());
        }
        ErrorKind::UnknownArgument => eprintln!("flag provided but not defined: -{}", option()),
        _ => {}
    }
    let _ = error.print();
    ExitCode::from(match error.kind() {
        ErrorKind::InvalidSubcommand => 3,
        _ if error.use_stderr() && is_lmruns_own(argv) => migrate::MISUSED,
        _ => u8::from(error.use_stderr()),
    })
}

/// Whether the command is one that runc does not have, whose exit codes are lmrun's own.
fn is_lmruns_own(mut argv: impl Iterator<Item = OsString>) -> bool {
    let commands = Cli::command();
    let command = argv.find(|word| commands.get_subcommands().any(|known| word == known.get_name()));
    command.is_some_and(|command| command == "migrate" || command == "receive")
}

/// Goes on in a program file that the container cannot write to; comes back only when it does.
fn seal() -> Result<(), report::Failure> {
    let what = "cannot protect lmrun's own program file from the container";
    if own_exe::is_sealed().map_err(|e| report::Failure::new(what, e))? {
        let _ = prctl::set_name(c"lmrun"); // it was executed through a descriptor
        return Ok(());
    }
    Err(report::Failure::new(what, own_exe::execute_sealed()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_version_has_runcs_three_lines() {
        let text = Cli::command().render_version();
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(lines[0].starts_with("lmrun version "));
        assert!(lines[2].starts_with("spec: 1."));
    }

    #[test]
    fn globals_as_containerd_gives_them() {
        let argv = [
            "lmrun",
            "--root",
            "/r",
            "--log",
            "/b/log.json",
            "--log-format",
            "json",
            "--systemd-cgroup",
            "kill",
            "c",
            "15",
        ];
        let cli = Cli::try_parse_from(argv).unwrap();
        assert_eq!(cli.global.root(), PathBuf::from("/r"));
        assert!(matches!(cli.global.log_format, log::Format::Json));
    }
}
