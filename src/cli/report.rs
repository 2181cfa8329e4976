//! How a failure is told: to a person on standard error, and to an engine as the last line of the log.

use std::error::Error;

use crate::runtime::chain;

/// What could not be done and why.
#[derive(Debug)]
pub struct Failure {
    what: String,
    cause: Box<dyn Error>,
    /// What state the container is in now, where that is not obvious.
    container: Option<String>,
    code: u8,
}

impl Failure {
    /// `what` in lower case without a full stop: "cannot start container web1".
    pub fn new(what: impl Into<String>, cause: impl Into<Box<dyn Error>>) -> Self {
        Failure { what: what.into(), cause: cause.into(), container: None, code: 1 }
    }

    /// What lmrun exits with, if not 1.
    pub fn exit_code(mut self, code: u8) -> Self {
        self.code = code;
        self
    }

    pub fn code(&self) -> u8 {
        self.code
    }

    /// Adds what has become of the container.
    pub fn container(mut self, now: impl Into<String>) -> Self {
        self.container = Some(now.into());
        self
    }

    /// Engines show the first line of standard error, or the log's last error: both carry the whole chain.
    pub fn print(&self) {
        let line = format!("{}: {}", self.what, chain(&*self.cause));
        if super::log::to_file() {
            tracing::error!("{line}");
        }
        eprintln!("lmrun: {line}");
        for detail in self.details() {
            eprintln!("  {detail}");
        }
    }

    /// One line per link of a chain that has several.
    fn details(&self) -> Vec<String> {
        let mut causes = Vec::new();
        let mut next = self.cause.source();
        while let Some(cause) = next {
            causes.push(format!("caused by: {cause}"));
            next = cause.source();
        }
        if !causes.is_empty() {
            causes.insert(0, format!("caused by: {}", self.cause));
        }
        causes.extend(self.container.as_ref().map(|now| format!("container: {now}")));
        causes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime;

    #[test]
    fn a_single_cause_is_said_once_and_a_chain_is_spelled_out() {
        let plain = Failure::new("cannot start container c", runtime::Error::NotFound).container("still running");
        assert_eq!(plain.details(), ["container: still running"]);
        let source = std::io::Error::from_raw_os_error(2);
        let deep = Failure::new("cannot start container c", runtime::Error::Io { path: "/x".into(), source });
        assert_eq!(deep.details(), ["caused by: /x", "caused by: No such file or directory (os error 2)"]);
    }
}
