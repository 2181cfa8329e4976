//! runc's command line parser takes a long option with one dash; containerd relies on it
//! (`-no-subreaper`). Here such words get their second dash.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};

use clap::CommandFactory;

/// The command line with two dashes before every long option that lmrun knows.
pub fn normalized(argv: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let argv: Vec<OsString> = argv.into_iter().collect();
    // Nearly always there is no such word, and nothing to look up.
    if !argv.iter().any(|word| is_candidate(word)) {
        return argv;
    }
    let known = long_options();
    let mut literal = false;
    argv.into_iter()
        .map(|word| {
            literal |= word == "--";
            let name = word.to_str().and_then(|word| word.strip_prefix('-'));
            let name = name.map(|option| option.split_once('=').map_or(option, |(name, _)| name));
            if literal || !name.is_some_and(|name| known.contains(name)) {
                return word;
            }
            let mut long = OsString::from("-");
            long.push(word);
            long
        })
        .collect()
}

/// One dash, and more than one letter.
fn is_candidate(word: &OsStr) -> bool {
    matches!(word.as_encoded_bytes(), [b'-', first, _, ..] if *first != b'-')
}

fn long_options() -> HashSet<String> {
    let mut command = super::Cli::command();
    command.build();
    let options = |command: &clap::Command| -> Vec<String> {
        command.get_arguments().filter_map(|arg| arg.get_long().map(str::to_owned)).collect()
    };
    let mut all: HashSet<String> = options(&command).into_iter().collect();
    for subcommand in command.get_subcommands() {
        all.extend(options(subcommand));
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_dash_becomes_two_for_known_options_only() {
        let given =
            ["lmrun", "restore", "-no-subreaper", "-d", "-image-path=/i", "--bundle", "/b", "-x", "--", "-bundle"];
        let expected =
            ["lmrun", "restore", "--no-subreaper", "-d", "--image-path=/i", "--bundle", "/b", "-x", "--", "-bundle"];
        assert_eq!(normalized(given.map(OsString::from)), expected.map(OsString::from));
    }
}
