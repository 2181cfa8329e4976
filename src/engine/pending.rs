//! The engine's verbs until they are there: each refuses.

use super::{ClockOffsets, DumpReport, DumpRequest, Puppet, RestoreRequest};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("this build of lmrun has no checkpoint engine")]
    Missing,
}

pub fn dump(_: DumpRequest<'_>) -> Result<DumpReport, Error> {
    Err(Error::Missing)
}

pub fn pre_dump(_: DumpRequest<'_>) -> Result<DumpReport, Error> {
    Err(Error::Missing)
}

pub fn plan(_: RestoreRequest) -> Result<Plan, Error> {
    Err(Error::Missing)
}

pub struct Plan;
pub struct RestoreReport;

impl Plan {
    pub fn clock_offsets(&self) -> ClockOffsets {
        ClockOffsets::default()
    }

    pub fn rebuild(self, _: Puppet) -> Result<RestoreReport, Error> {
        Err(Error::Missing)
    }
}
