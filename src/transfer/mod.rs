//! Pages over the network: server and client in CRIU's protocol; connections between hosts that know each other.

pub mod inbox;
pub mod page_client;
pub mod page_server;
pub mod pki;
pub mod protocol;
pub mod tls;

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};

use crate::image;

/// Why pages did not get to the other side.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot connect to the page server {peer}")]
    Connect { peer: String, source: io::Error },
    #[error("cannot listen on {address}")]
    Listen { address: SocketAddr, source: io::Error },
    #[error("{address} is not a loopback address, and there is neither encryption nor authentication")]
    Exposed { address: SocketAddr },
    #[error("{path}")]
    Io { path: PathBuf, source: io::Error },
    #[error("connection with {peer}")]
    Connection { peer: SocketAddr, source: io::Error },
    #[error("{peer} broke the protocol")]
    Protocol { peer: SocketAddr, source: protocol::ProtocolError },
    #[error("the page server {peer} could not store the pages (status {status})")]
    NotStored { peer: SocketAddr, status: i32 },
    #[error("{path}: another page server receives into it")]
    Busy { path: PathBuf },
    #[error("{path}: holds the pages of a checkpoint already")]
    Occupied { path: PathBuf },
    #[error(transparent)]
    Image(#[from] image::Error),
}

impl Error {
    /// For `map_err`: an I/O error at `path`.
    fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { path: path.to_owned(), source }
    }
}

pub type Result<T> = std::result::Result<T, Error>;

/// How long the other host may be silent before it is taken for dead.
const PATIENCE: Duration = Duration::from_secs(30);

/// Readies a connection for large transfers and for peers that vanish. A frozen
/// container waits for it: it must not wait for ever.
fn tune(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    setsockopt(stream, sockopt::KeepAlive, &true)?;
    setsockopt(stream, sockopt::TcpKeepIdle, &10)?;
    setsockopt(stream, sockopt::TcpKeepInterval, &5)?;
    setsockopt(stream, sockopt::TcpKeepCount, &4)?;
    setsockopt(stream, sockopt::TcpUserTimeout, &(PATIENCE.as_millis() as u32))?;
    Ok(())
}
