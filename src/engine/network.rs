//! TCP connections: the bracket in which they are read, and their revival. (Interim: refuses all sockets.)

use std::os::fd::OwnedFd;

use super::collect::Collection;
use super::tree::Tree;
use super::{Error, Result, Subject};
use crate::image::records::files::FileEntry;

pub struct Watch;
pub struct Bracket;

impl Watch {
    pub fn prepare(_: &Subject, _: bool) -> Result<Watch> {
        Ok(Watch)
    }
    pub fn enter(self, _: &mut Collection) -> Result<Bracket> {
        Ok(Bracket)
    }
}

impl Bracket {
    pub fn table(&self) -> Option<String> {
        None
    }
    pub fn leave(self) -> Result<()> {
        Ok(())
    }
    pub fn hold(self) -> Result<()> {
        Ok(())
    }
}

#[derive(Debug)]
pub struct Revival;

impl Revival {
    pub fn prepare(_: i32, _: &mut Tree) -> Result<Revival> {
        Ok(Revival)
    }
    pub fn create(&mut self, e: &FileEntry) -> Result<OwnedFd> {
        Err(Error::BadRecord { what: format!("file {} is a socket", e.id) })
    }
    pub fn go_live(&mut self) -> Result<()> {
        Ok(())
    }
}
