//! The end that the container comes from.

use super::{Container, Destination, Error, Failed, Observer, Options, Outcome};
use crate::runtime::Store;

/// Moves a container.
///
/// # Errors
/// Why it did not move, and how it is now.
pub fn run(
    _store: &Store,
    container: &Container,
    destination: &Destination,
    _options: &Options,
    _observer: Observer<'_>,
) -> Result<Outcome, Failed> {
    let error = Error::Other(format!("this build of lmrun cannot move {container} to {destination} yet"));
    Err(Failed::untouched(error))
}

/// Finds out what became of a migration of the container `id` whose end was not heard of, and acts on it. Gives the result
/// in words.
pub fn settle(_store: &Store, id: &str, _observer: Observer<'_>) -> Result<String, Failed> {
    let error = Error::Other(format!("this build of lmrun cannot settle the migration of {id} yet"));
    Err(Failed::untouched(error))
}
