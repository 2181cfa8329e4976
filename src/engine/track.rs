//! Dirty tracking between checkpoints. (Interim.)

use super::{DumpReport, DumpRequest, Error, Result, Subject};
use crate::image::dir::ImageDir;

pub struct Tracking;

impl Tracking {
    pub fn of_parent(_: &Subject, _: Option<&ImageDir>) -> Result<Option<Tracking>> {
        Ok(None)
    }
}

pub fn pre_dump(_: DumpRequest<'_>) -> Result<DumpReport> {
    Err(Error::BadRecord { what: "pending".into() })
}
