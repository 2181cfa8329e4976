use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};

use super::*;
use crate::migrate::wire::message::{Abort, Hello};

#[test]
fn both_ends_hear_each_other() {
    let (a, b) = UnixStream::pair().unwrap();
    let end = |socket: UnixStream| {
        Channel::over(socket.try_clone().unwrap().into(), socket.into(), "x".into(), None).unwrap()
    };
    let (mut a, mut b) = (end(a), end(b));
    a.writer.say(&Hello { protocol: 1, ..Hello::default() }).unwrap();
    assert_eq!(b.reader.expect::<Hello>().unwrap().protocol, 1);
    b.writer.say(&Abort::default()).unwrap();
    assert!(matches!(a.reader.recv(), Ok(wire::Message::Abort(_))));
    drop(b);
    assert!(matches!(a.reader.recv(), Err(wire::Error::Closed)));
    assert!(matches!(a.writer.say(&Abort::default()), Err(wire::Error::Closed)));
}

#[test]
fn silence_is_noticed_in_both_directions() {
    let (a, _b) = UnixStream::pair().unwrap();
    let mut a = Channel::over(a.try_clone().unwrap().into(), a.into(), "x".into(), None).unwrap();
    a.link.patience.set(Duration::from_millis(1));
    assert!(matches!(a.reader.recv(), Err(wire::Error::Silent)));
    // Nobody reads: at some time no more fits in between.
    let full = (0..100).find_map(|_| a.writer.send_disk(&[0; 1 << 20]).err());
    assert!(matches!(full, Some(wire::Error::Silent)));
}

#[test]
fn a_program_that_connects_us_says_why_it_ended() {
    let end = |script: &str| {
        let mut child =
            Command::new("sh").args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (input, output) = (child.stdout.take().unwrap(), child.stdin.take().unwrap());
        let mut channel = Channel::over(input.into(), output.into(), "b".into(), None).unwrap();
        channel.link.program = Some(("ssh".into(), child));
        let error = channel.reader.recv().unwrap_err();
        channel.link.explain(error).to_string()
    };
    assert_eq!(end("exit 255"), "ssh ended (exit status: 255; it has said why)");
    assert!(end("exit 127").contains("is lmrun there"));
    assert_eq!(end("exit 0"), "the other end has closed the connection");
}
