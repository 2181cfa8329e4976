//! The end that the container goes to.

use std::io::{Read, Write};

use super::{Error, Result};
use crate::runtime::Store;

/// Receives one container over a connection.
pub fn run(_store: &Store, _from: impl Read + Send, _to: impl Write + Send) -> Result<()> {
    Err(Error::Other("this build of lmrun cannot receive a container yet".into()))
}
