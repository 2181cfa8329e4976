//! `lmrun receive`

use super::report::Failure;
use crate::migrate::transport::{self, Channel};
use crate::migrate::{Error, destination};
use crate::runtime::Store;

/// Receive a container that `lmrun migrate` sends
#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("from").required(true))]
pub struct Args {
    /// Speak over standard input and output: what `lmrun migrate` starts by ssh
    #[arg(long, group = "from")]
    stdio: bool,
    /// Wait at this address for hosts that `lmrun pair` has made known, for tls://; the usual port is 7677
    #[arg(long, group = "from", value_name = "HOST:PORT")]
    listen: Option<String>,
    /// Standard input is a connection of such a host: how systemd starts it
    #[arg(long, group = "from")]
    socket: bool,
}

impl Args {
    pub fn run(&self, store: &Store) -> Result<u8, Failure> {
        match &self.listen {
            Some(address) => transport::listen(address, |channel| match receive(store, channel) {
                Ok(()) => 0,
                Err(failure) => {
                    failure.print();
                    1
                }
            })
            .map(|never| match never {})
            .map_err(|e| Failure::new("cannot receive containers", e)),
            None if self.socket => receive(store, transport::socket()).map(|()| 0),
            None => receive(store, transport::stdio()).map(|()| 0),
        }
    }
}

fn receive(store: &Store, channel: transport::Result<Channel>) -> Result<(), Failure> {
    let received = channel.map_err(Error::from).and_then(|channel| destination::run(store, channel));
    received.map_err(|e| Failure::new("cannot receive a container", e))
}

#[cfg(test)]
mod tests {
    use super::super::Cli;
    use clap::Parser;

    #[test]
    fn one_way_must_be_said() {
        let parsed = |line: &str| Cli::try_parse_from(line.split(' '));
        assert!(parsed("lmrun receive").is_err());
        assert!(parsed("lmrun receive --stdio --socket").is_err());
        assert!(parsed("lmrun receive --stdio").is_ok());
        assert!(parsed("lmrun receive --listen [::]:7677").is_ok());
    }
}
