//! What the migration scenarios have in place of ssh(1): `ssh -T -- ADDRESS COMMAND...` connects to port 22 there, says the
//! command in one line (`runtime_tests::remote` listens), and carries bytes both ways. Fast, and without keys.
//!
//! SIGUSR1 has it put the content of `$LMRUN_TEST_GARBAGE` between the bytes to the other end, SIGUSR2 between those from there.

use std::fs;
use std::io::{Read, Result, Write, stdin, stdout};
use std::net::{Shutdown, TcpStream};
use std::process::ExitCode;
use std::thread;

use nix::sys::signal::{SigSet, Signal};

fn main() -> ExitCode {
    match carry() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("ssh: {e}");
            // As ssh(1) says it.
            ExitCode::from(255)
        }
    }
}

fn carry() -> Result<()> {
    let mut words = std::env::args().skip_while(|word| word != "--").skip(1);
    let address = words.next().unwrap_or_default();
    let command: Vec<String> = words.collect();
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGUSR1);
    signals.add(Signal::SIGUSR2);
    signals.thread_block()?;

    let connection = TcpStream::connect((address.as_str(), 22))?;
    connection.set_nodelay(true)?;
    writeln!(&connection, "{}", command.join(" "))?;
    let (hostile, up) = (connection.try_clone()?, connection.try_clone()?);
    thread::spawn(move || {
        while let Ok(signal) = signals.wait() {
            let garbage =
                std::env::var_os("LMRUN_TEST_GARBAGE").and_then(|path| fs::read(path).ok()).unwrap_or_default();
            let _ = match signal {
                Signal::SIGUSR1 => (&hostile).write_all(&garbage),
                // Not by way of Stdout, which is locked.
                _ => {
                    fs::File::options().write(true).open("/proc/self/fd/1").and_then(|mut out| out.write_all(&garbage))
                }
            };
        }
    });
    thread::spawn(move || {
        let _ = pump(&mut stdin().lock(), &mut &up);
        let _ = up.shutdown(Shutdown::Write);
    });
    pump(&mut &connection, &mut stdout().lock())
}

/// Until the end of `from`.
fn pump(from: &mut impl Read, to: &mut impl Write) -> Result<()> {
    let mut room = vec![0; 1 << 20];
    loop {
        let read = from.read(&mut room)?;
        if read == 0 {
            return Ok(());
        }
        to.write_all(&room[..read])?;
        to.flush()?;
    }
}
