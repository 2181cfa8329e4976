//! `make manual`: man pages and shell completions, from the definition of the command line.
//!
//! Options are clap's affair; what a page has besides (examples, files, exit codes) is in `pages.roff`, a part for each
//! page behind a line `.\" === NAME`.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Error, Result};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Command;
use clap_complete::Shell;
use clap_mangen::Man;

const PAGES: &str = include_str!("pages.roff");
/// What the foot of a page says.
const VERSION: &str = concat!("lmrun ", env!("CARGO_PKG_VERSION"));
/// The part that ends each page which has no exit codes of its own.
const EXIT_STATUS: &str = "EXIT STATUS";

fn main() -> ExitCode {
    let Some(dir) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: manual DIR");
        return ExitCode::from(2);
    };
    match write(&dir) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("manual: {e}");
            ExitCode::FAILURE
        }
    }
}

fn write(dir: &Path) -> Result<()> {
    let mut command = lmrun::cli::definition();
    command.build();
    let mut parts = parts();
    let exit_status = parts.remove(EXIT_STATUS).unwrap_or_default();
    let man = dir.join("man8");
    fs::create_dir_all(&man)?;
    // clap's own `help` says what --help says.
    let pages = command.get_subcommands().filter(|c| !c.is_hide_set() && c.get_name() != "help");
    let commands: Vec<Command> = pages.cloned().collect();
    for sub in commands {
        let name = format!("lmrun-{}", sub.get_name());
        // `lmrun run` in the synopsis, `lmrun-run` in the title.
        let page = Page { command: sub.display_name(&name), name };
        page.write(&man, &mut parts, exit_status)?;
    }
    Page { name: "lmrun".into(), command: command.clone() }.write(&man, &mut parts, exit_status)?;
    if let Some(name) = parts.keys().next() {
        return Err(Error::other(format!("pages.roff: there is no page {name}")));
    }
    let completions = dir.join("completions");
    fs::create_dir_all(&completions)?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut command, "lmrun", &completions)?;
    }
    Ok(())
}

struct Page {
    name: String,
    command: Command,
}

impl Page {
    fn write(self, dir: &Path, parts: &mut BTreeMap<&str, &str>, exit_status: &str) -> Result<()> {
        let part = parts.remove(&*self.name);
        let part = part.ok_or_else(|| Error::other(format!("pages.roff has nothing for {}", self.name)))?;
        let man = Man::new(self.command).title(&self.name).section("8").manual("lmrun").source(VERSION).date("");
        let mut page = Vec::new();
        man.render_title(&mut page)?;
        man.render_name_section(&mut page)?;
        man.render_synopsis_section(&mut page)?;
        man.render_description_section(&mut page)?;
        man.render_options_section(&mut page)?;
        page.extend(part.as_bytes());
        if !part.contains(EXIT_STATUS) {
            page.extend(exit_status.as_bytes());
        }
        page.extend(see_also(&self.name).as_bytes());
        fs::write(dir.join(format!("{}.8", self.name)), page)
    }
}

fn see_also(name: &str) -> String {
    let other = if name == "lmrun" { ".BR runc (8)" } else { ".BR lmrun (8)" };
    format!(".SH \"SEE ALSO\"\n{other},\n.I /usr/share/doc/lmrun\n")
}

/// The parts by the names of their pages.
fn parts() -> BTreeMap<&'static str, &'static str> {
    let parts = PAGES.split(".\\\" === ").skip(1);
    parts.filter_map(|part| part.split_once('\n')).collect()
}
