//! runc's command line parser takes a long option with one dash (containerd relies on it: `-no-subreaper`), and a value
//! behind a switch (`--detach=true`). Here such words become what lmrun's own parser takes.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};

use clap::{ArgAction, CommandFactory};

/// The command line with two dashes before every long option that lmrun knows, and switches without values.
pub fn normalized(argv: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let argv: Vec<OsString> = argv.into_iter().collect();
    // Nearly always there is no such word, and nothing to look up.
    if !argv.iter().any(|word| is_candidate(word)) {
        return argv;
    }
    let known = long_options();
    let mut literal = false;
    argv.into_iter()
        .filter_map(|word| {
            literal |= word == "--";
            let option = word.to_str().and_then(|word| word.strip_prefix('-'));
            let option = option.map(|option| option.strip_prefix('-').unwrap_or(option)).unwrap_or_default();
            let (name, value) = option.split_once('=').map_or((option, None), |(name, value)| (name, Some(value)));
            let Some(is_switch) = known.get(name).filter(|_| !literal) else {
                return Some(word);
            };
            match value.filter(|_| *is_switch).map(is_true) {
                Some(Some(true)) => Some(format!("--{name}").into()),
                Some(Some(false)) => None,
                // Not for a switch, or nothing that means yes or no: the parser says so.
                _ => Some(format!("--{option}").into()),
            }
        })
        .collect()
}

/// What Go's strconv.ParseBool takes.
fn is_true(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// One dash and more than one letter, or two dashes and a value.
fn is_candidate(word: &OsStr) -> bool {
    match word.as_encoded_bytes() {
        [b'-', b'-', rest @ ..] => rest.contains(&b'='),
        [b'-', _, _, ..] => true,
        _ => false,
    }
}

/// All long options by name, and whether they take no value.
fn long_options() -> HashMap<String, bool> {
    let mut command = super::Cli::command();
    command.build();
    let options = |command: &clap::Command| -> Vec<(String, bool)> {
        let long = |arg: &clap::Arg| Some((arg.get_long()?.to_owned(), matches!(arg.get_action(), ArgAction::SetTrue)));
        command.get_arguments().filter_map(long).collect()
    };
    let mut all: HashMap<String, bool> = options(&command).into_iter().collect();
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

    #[test]
    fn a_switch_may_say_yes_or_no() {
        let given = [
            "lmrun",
            "run",
            "--detach=true",
            "-keep=false",
            "--no-pivot=maybe",
            "--bundle=/b",
            "c",
            "--",
            "--keep=true",
        ];
        let expected = ["lmrun", "run", "--detach", "--no-pivot=maybe", "--bundle=/b", "c", "--", "--keep=true"];
        assert_eq!(normalized(given.map(OsString::from)), expected.map(OsString::from));
    }
}
