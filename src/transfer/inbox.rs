//! Where received pages are kept. Until all are there, files have names that no reader takes for
//! images (`*.tmp`); if they never are, they are removed.

use std::fs::{self, DirBuilder, File};
use std::io::{self, BufWriter, IoSlice, Write};
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::{Error, Result};
use crate::image::dir::{ImageDir, PARENT, create_new, open_parent, sync};
use crate::image::format::{RecordWriter, pages_name};
use crate::image::page_store::{has_pagemap, pagemap_entry, pagemap_of};
use crate::image::pages::{PagesOf, Written};
use crate::image::records::mm::{PagemapHead, pe};

/// What a page server received.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Received {
    /// Tasks and shared memory objects.
    pub targets: usize,
    pub written: Written,
}

/// A directory that receives pages.
pub struct Inbox {
    dir: PathBuf,
    /// The parent image, and the link that leads there from `dir`.
    parent: Option<(ImageDir, PathBuf)>,
    /// The final names of the files so far.
    names: Vec<String>,
    targets: Vec<PagesOf>,
    written: Written,
    /// Tells other servers that the directory is taken.
    _lock: Flock<File>,
}

/// A target that pages come for.
pub struct Target {
    of: PagesOf,
    pagemap: RecordWriter<BufWriter<File>>,
    pages: File,
    path: PathBuf,
    has_parent: bool,
    written: Written,
}

impl Inbox {
    /// Makes the directory `dir` ready for pages; `link` leads from there to the parent image.
    ///
    /// # Errors
    /// [`Error::Occupied`] if there are pagemaps already, [`Error::Busy`] if somebody else is
    /// receiving, and whatever is wrong with the parent.
    pub fn open(dir: &Path, link: Option<&Path>) -> Result<Self> {
        let at = || Error::io(dir);
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(at())?;
        let lock = Flock::lock(File::open(dir).map_err(at())?, FlockArg::LockExclusiveNonblock);
        let lock = lock.map_err(|(_, e)| match e {
            Errno::EWOULDBLOCK => Error::Busy { path: dir.to_owned() },
            e => at()(e.into()),
        })?;
        for entry in fs::read_dir(dir).map_err(at())? {
            let entry = entry.map_err(at())?;
            let name = entry.file_name();
            let name = name.as_encoded_bytes();
            if name.starts_with(b"page") && name.ends_with(b".img.tmp") {
                // A server was killed.
                fs::remove_file(entry.path()).map_err(Error::io(&entry.path()))?;
            } else if name.starts_with(b"pagemap-") {
                return Err(Error::Occupied { path: dir.to_owned() });
            }
        }
        let parent = link.map(|link| open_parent(dir, link).map(|images| (images, link.to_owned()))).transpose()?;
        Ok(Self {
            dir: dir.to_owned(),
            parent,
            names: Vec::new(),
            targets: Vec::new(),
            written: Written::default(),
            _lock: lock,
        })
    }

    /// Whether the parent image knows a target.
    pub fn has_parent(&self, of: PagesOf) -> Result<bool> {
        Ok(has_pagemap(self.parent.as_ref().map(|parent| &parent.0), of)?)
    }

    /// Begins a target; None if there was one of this name.
    pub fn begin(&mut self, of: PagesOf) -> Result<Option<Target>> {
        if self.targets.contains(&of) {
            return Ok(None);
        }
        let has_parent = has_pagemap(self.parent.as_ref().map(|parent| &parent.0), of)?;
        self.targets.push(of);
        let pages_id = self.targets.len() as u32;
        let (kind, id) = pagemap_of(of);
        let (file, path) = self.create(kind.name(id))?;
        let mut pagemap = RecordWriter::new(kind, BufWriter::new(file), path)?;
        pagemap.record(&PagemapHead { pages_id })?;
        let (pages, path) = self.create(pages_name(pages_id))?;
        Ok(Some(Target { of, pagemap, pages, path, has_parent, written: Written::default() }))
    }

    /// All pages of a target are there.
    pub fn end(&mut self, target: Target) -> Result<()> {
        target.pagemap.finish()?;
        self.written.pages += target.written.pages;
        self.written.in_parent += target.written.in_parent;
        Ok(())
    }

    /// All targets are there: makes them durable and gives the files their names.
    pub fn commit(mut self) -> Result<Received> {
        for name in &self.names {
            sync(&self.dir.join(unfinished(name)))?;
        }
        if let Some((_, link)) = &self.parent {
            let place = self.dir.join(PARENT);
            match symlink(link, &place) {
                Err(_) if fs::read_link(&place).is_ok_and(|there| there == *link) => {}
                done => done.map_err(Error::io(&place))?,
            }
        }
        // A pagemap comes after the pages that it speaks of.
        self.names.sort_by_key(|name| name.starts_with("pagemap-"));
        for name in std::mem::take(&mut self.names) {
            let to = self.dir.join(&name);
            fs::rename(self.dir.join(unfinished(&name)), &to).map_err(Error::io(&to))?;
        }
        sync(&self.dir)?;
        Ok(Received { targets: self.targets.len(), written: self.written })
    }

    fn create(&mut self, name: String) -> Result<(File, PathBuf)> {
        let path = self.dir.join(unfinished(&name));
        let file = create_new(&path).map_err(Error::io(&path))?;
        self.names.push(name);
        Ok((file, path))
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        for name in &self.names {
            let _ = fs::remove_file(self.dir.join(unfinished(name)));
        }
    }
}

impl Target {
    pub fn of(&self) -> PagesOf {
        self.of
    }

    /// Whether the parent image knows it.
    pub fn has_parent(&self) -> bool {
        self.has_parent
    }

    /// Adds pages. The bytes of those that are [`pe::PRESENT`] have to be stored next.
    pub fn add(&mut self, vaddr: u64, pages: u64, flags: u32) -> Result<()> {
        self.pagemap.record(&pagemap_entry(vaddr, pages, flags))?;
        let present = flags & pe::PRESENT != 0;
        *(if present { &mut self.written.pages } else { &mut self.written.in_parent }) += pages;
        Ok(())
    }

    /// Takes bytes of pages.
    pub fn store(&mut self, mut bytes: &mut [IoSlice<'_>]) -> Result<()> {
        while !bytes.is_empty() {
            match self.pages.write_vectored(bytes) {
                Ok(0) => return Err(Error::io(&self.path)(io::ErrorKind::WriteZero.into())),
                Ok(len) => IoSlice::advance_slices(&mut bytes, len),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::io(&self.path)(e)),
            }
        }
        Ok(())
    }
}

fn unfinished(name: &str) -> String {
    format!("{name}.tmp")
}
