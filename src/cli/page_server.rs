//! `lmrun page-server`, and the address of one.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::str::FromStr;

use super::report::Failure;
use crate::image::pages::PageSink;
use crate::transfer::page_client::PageClient;
use crate::transfer::{self, page_server};

/// Receive the pages of a checkpoint that is made elsewhere
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Directory for the images
    #[arg(long, value_name = "DIR")]
    image_path: PathBuf,
    #[arg(long, default_value = "127.0.0.1")]
    address: String,
    #[arg(long)]
    port: u16,
    /// Images of an earlier --pre-dump, relative to the image directory
    #[arg(long, value_name = "DIR")]
    parent_path: Option<PathBuf>,
    /// Allow an address that others can reach: anybody there can then write the images
    #[arg(long)]
    insecure: bool,
}

impl Args {
    pub fn run(&self) -> Result<u8, Failure> {
        let what = "cannot receive pages";
        let endpoint = Endpoint { host: self.address.clone(), port: self.port };
        let address = endpoint.resolve(self.insecure).map_err(|e| Failure::new(what, e))?;
        let received = page_server::listen(address, self.insecure)
            .and_then(|listener| page_server::serve(&listener, &self.image_path, self.parent_path.as_deref()))
            .map_err(|e| Failure::new(what, e))?;
        tracing::debug!(?received, "all pages are stored");
        Ok(0)
    }
}

/// Where a page server listens: `HOST:PORT`, an IPv6 address in brackets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    host: String,
    port: u16,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0:?} is not HOST:PORT")]
    Malformed(String),
    #[error("cannot resolve {0}")]
    Resolve(String, #[source] std::io::Error),
    #[error(
        "{0} is reachable by others, and without TLS anybody could read or write the container's memory: use a \
             loopback address (and a tunnel), or say --insecure"
    )]
    Exposed(IpAddr),
    #[error(transparent)]
    Connect(#[from] transfer::Error),
}

impl FromStr for Endpoint {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let parsed = text.rsplit_once(':').and_then(|(host, port)| {
            let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
            Some(Endpoint { host: host.to_owned(), port: port.parse().ok()? })
        });
        parsed.filter(|endpoint| !endpoint.host.is_empty()).ok_or_else(|| Error::Malformed(text.to_owned()))
    }
}

impl Endpoint {
    /// A sink that sends its pages there.
    pub fn connect(&self, insecure: bool) -> Result<Box<dyn PageSink>, Error> {
        Ok(Box::new(PageClient::connect(self.resolve(insecure)?)?))
    }

    /// The first address, which must be of this host unless `insecure`.
    fn resolve(&self, insecure: bool) -> Result<SocketAddr, Error> {
        let address = match self.host.parse::<IpAddr>() {
            Ok(ip) => SocketAddr::new(ip, self.port),
            Err(_) => {
                let failed = |e| Error::Resolve(self.host.clone(), e);
                let mut all = (self.host.as_str(), self.port).to_socket_addrs().map_err(failed)?;
                all.next().ok_or_else(|| failed(std::io::ErrorKind::NotFound.into()))?
            }
        };
        if !insecure && !address.ip().is_loopback() {
            return Err(Error::Exposed(address.ip()));
        }
        Ok(address)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Cli, Command};
    use super::*;
    use clap::Parser;

    #[test]
    fn memory_stays_on_this_host_unless_told() {
        let resolve = |text: &str, insecure| text.parse::<Endpoint>().unwrap().resolve(insecure);
        assert!(resolve("127.0.0.1:9", false).is_ok());
        assert!(resolve("[::1]:9", false).is_ok());
        assert!(matches!(resolve("192.0.2.1:9", false), Err(Error::Exposed(_))));
        assert!(matches!(resolve("0.0.0.0:9", false), Err(Error::Exposed(_))));
        assert!(resolve("192.0.2.1:9", true).is_ok());
        for bad in ["127.0.0.1", ":9", "h:", "h:99999"] {
            assert!(matches!(bad.parse::<Endpoint>(), Err(Error::Malformed(_))), "{bad}");
        }
    }

    #[test]
    fn as_criu_spells_it() {
        let argv = "lmrun page-server --image-path /i --address ::1 --port 27 --parent-path ../p";
        let Command::PageServer(args) = Cli::try_parse_from(argv.split(' ')).unwrap().command else { panic!() };
        assert_eq!((args.address.as_str(), args.port), ("::1", 27));
    }
}
