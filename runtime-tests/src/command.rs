//! Commands with a time limit, whose output is kept.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Seek};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// What a command did.
#[derive(Debug, Clone)]
pub struct Done {
    /// The command line, for messages.
    pub line: String,
    /// None when it was killed for taking too long.
    pub status: Option<ExitStatus>,
    pub out: String,
    pub err: String,
    pub took: Duration,
}

impl Done {
    pub fn succeeded(&self) -> bool {
        self.status.is_some_and(|s| s.success())
    }

    /// Demands success.
    #[track_caller]
    pub fn ok(self) -> Done {
        assert!(self.succeeded(), "{self}");
        self
    }

    /// Demands failure with a message.
    #[track_caller]
    pub fn failed(self) -> Done {
        assert!(self.status.is_some_and(|s| !s.success()), "expected a failure: {self}");
        self
    }
}

impl std::fmt::Display for Done {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let end = self.status.map_or("killed: it took too long".into(), |s| s.to_string());
        write!(f, "{}\n  {end} after {:?}", self.line, self.took)?;
        for (name, text) in [("out", &self.out), ("err", &self.err)] {
            text.lines().try_for_each(|line| write!(f, "\n  {name}: {line}"))?;
        }
        Ok(())
    }
}

/// Waits for a child up to `limit`, then kills it.
pub fn wait(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let begin = Instant::now();
    loop {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        if begin.elapsed() > limit {
            let _ = child.kill();
            let _ = child.wait();
            return None;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The command line as one would type it.
pub fn line(command: &Command) -> String {
    let words: Vec<_> =
        std::iter::once(command.get_program()).chain(command.get_args()).map(OsStr::to_string_lossy).collect();
    words.join(" ")
}

/// Runs a command to its end. Its output goes to unnamed files, so that a process which it leaves behind
/// holds nobody up.
pub fn run(command: &mut Command, limit: Duration) -> Done {
    let mut files = [scratch(), scratch()];
    let sinks = files.each_ref().map(|f| Stdio::from(f.try_clone().expect("a file can be duplicated")));
    let [out, err] = sinks;
    let begin = Instant::now();
    let line = line(command);
    let status = match command.stdin(Stdio::null()).stdout(out).stderr(err).spawn() {
        Ok(mut child) => wait(&mut child, limit),
        Err(e) => panic!("{line}: {e}"),
    };
    let took = begin.elapsed();
    let [out, err] = files.each_mut().map(|file| {
        let mut text = Vec::new();
        let _ = file.rewind();
        let _ = file.read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    });
    Done { line, status, out, err, took }
}

/// Runs a tool of the host, like `ip`; it must succeed.
#[track_caller]
pub fn tool(words: &str) -> Done {
    let mut parts = words.split_whitespace();
    let program = parts.next().unwrap_or_default();
    run(Command::new(program).args(parts), Duration::from_secs(20)).ok()
}

fn scratch() -> File {
    use std::os::unix::fs::OpenOptionsExt;
    let mut options = File::options();
    options.read(true).write(true).custom_flags(libc::O_TMPFILE);
    options.open(std::env::temp_dir()).expect("the directory for temporary files can be written")
}
