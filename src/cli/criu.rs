//! `criu`: lmrun under another name.
//!
//! Podman, CRI-O and containerd's CRI checkpoint nothing unless a program of this name answers, in CRIU's protocol
//! (protobuf messages on the socket that `criu swrk FD` was given; field numbers are those of CRIU's rpc.proto): which
//! version it is, and what it can. All else they ask of the runtime.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::ExitCode;

use nix::sys::socket::{MsgFlags, recv, send};
use prost::Message;

use crate::engine;
use crate::sys::fds;

/// The version of CRIU whose images lmrun writes and reads; engines compare it with what they need.
const MAJOR: i32 = 4;
const MINOR: i32 = 2;
/// Longest request that is read, in bytes: engines send a few.
const LONGEST: usize = 4096;

const CHECK: i32 = 3;
const FEATURE_CHECK: i32 = 9;
const VERSION: i32 = 10;

#[derive(Clone, PartialEq, Message)]
struct Request {
    #[prost(int32, required, tag = "1")]
    kind: i32,
    #[prost(message, optional, tag = "5")]
    features: Option<Features>,
}

#[derive(Clone, PartialEq, Message)]
struct Response {
    #[prost(int32, required, tag = "1")]
    kind: i32,
    #[prost(bool, required, tag = "2")]
    success: bool,
    #[prost(message, optional, tag = "8")]
    features: Option<Features>,
    #[prost(string, optional, tag = "9")]
    error: Option<String>,
    #[prost(message, optional, tag = "10")]
    version: Option<Version>,
}

#[derive(Clone, Copy, PartialEq, Message)]
struct Features {
    /// Rounds of pre-copy.
    #[prost(bool, optional, tag = "1")]
    mem_track: Option<bool>,
    /// Post-copy.
    #[prost(bool, optional, tag = "2")]
    lazy_pages: Option<bool>,
    /// A file descriptor store for pidfds between rounds.
    #[prost(bool, optional, tag = "3")]
    pidfd_store: Option<bool>,
}

#[derive(Clone, PartialEq, Message)]
struct Version {
    #[prost(int32, required, tag = "1")]
    major: i32,
    #[prost(int32, required, tag = "2")]
    minor: i32,
    #[prost(string, optional, tag = "6")]
    name: Option<String>,
}

/// Whether this program was called by CRIU's name.
pub fn is_asked_for(argv0: Option<&std::ffi::OsStr>) -> bool {
    argv0.map(std::path::Path::new).and_then(|path| path.file_name()).is_some_and(|name| name == "criu")
}

/// `criu`, from the command line to the exit code.
pub fn main() -> ExitCode {
    let words: Vec<String> = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["swrk", fd] => match fd.parse().map_err(io::Error::other).and_then(fds::inherited).and_then(|fd| serve(&fd)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(e) => refuse(&format!("swrk {fd}: {e}")),
        },
        ["--version" | "-V" | "version"] => {
            println!("Version: {MAJOR}.{MINOR}\nGitID: lmrun {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        ["check", "--feature", feature] => check_feature(feature),
        ["check", ..] => {
            println!("Looks good.");
            ExitCode::SUCCESS
        }
        _ => refuse("lmrun answers criu's swrk, check and --version; use lmrun checkpoint and restore for the rest"),
    }
}

fn refuse(why: &str) -> ExitCode {
    eprintln!("criu: {why}");
    ExitCode::FAILURE
}

fn check_feature(feature: &str) -> ExitCode {
    match feature {
        "mem_dirty_track" if engine::can_track() => ExitCode::SUCCESS,
        _ => refuse(&format!("feature {feature} is not there")),
    }
}

/// Answers requests, one per packet, until the other side closes.
fn serve(socket: &OwnedFd) -> io::Result<()> {
    let mut room = vec![0; LONGEST];
    loop {
        let length = recv(socket.as_raw_fd(), &mut room, MsgFlags::MSG_TRUNC)?;
        if length == 0 {
            return Ok(());
        }
        let request = room.get(..length).ok_or(io::ErrorKind::FileTooLarge)?;
        let response = answer(&Request::decode(request)?);
        send(socket.as_raw_fd(), &response.encode_to_vec(), MsgFlags::MSG_NOSIGNAL)?;
    }
}

fn answer(request: &Request) -> Response {
    let done = Response { kind: request.kind, success: true, ..Response::default() };
    match request.kind {
        VERSION => {
            Response { version: Some(Version { major: MAJOR, minor: MINOR, name: Some("lmrun".into()) }), ..done }
        }
        FEATURE_CHECK => {
            let asked = request.features.unwrap_or_default();
            let features = Features {
                mem_track: asked.mem_track.map(|_| engine::can_track()),
                lazy_pages: asked.lazy_pages.map(|_| false),
                pidfd_store: asked.pidfd_store.map(|_| false),
            };
            Response { features: Some(features), ..done }
        }
        CHECK => done,
        other => {
            Response { success: false, error: Some(format!("lmrun does not serve requests of type {other}")), ..done }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn podmans_question_is_answered_as_criu_does() {
        let response = answer(&Request::decode(&[0x08, 0x0a][..]).unwrap());
        let version = [0x08, 4, 0x10, 2, 0x32, 5, b'l', b'm', b'r', b'u', b'n'];
        let expected = [&[0x08, 0x0a, 0x10, 1, 0x52, version.len() as u8][..], &version].concat();
        assert_eq!(response.encode_to_vec(), expected);
    }

    #[test]
    fn only_features_that_were_asked_for_are_told() {
        let features = Some(Features { lazy_pages: Some(true), ..Features::default() });
        let response = answer(&Request { kind: FEATURE_CHECK, features });
        assert_eq!(response.features, Some(Features { lazy_pages: Some(false), ..Features::default() }));
        assert!(!answer(&Request { kind: 1, features: None }).success);
    }

    #[test]
    fn the_name_decides() {
        for (argv0, expected) in [("criu", true), ("/usr/sbin/criu", true), ("lmrun", false), ("criu/lmrun", false)] {
            assert_eq!(is_asked_for(Some(argv0.as_ref())), expected, "{argv0}");
        }
    }
}
