//! A container that is expected: its processes stand ready as puppets, and memory that arrives goes to its final place.
//!
//! For each round of a [`Departure`](super::departure::Departure): [`Standby::follow`] makes processes and mappings what the
//! records say, [`Standby::present`] and [`Standby::pages`] take the memory. What is lacking ([`Standby::missing`]) is
//! asked for again: after a process had to be made anew, say. [`Standby::complete`] adds all the rest, and
//! [`Ready::go`](super::rebuild::Ready::go) lets the container run. Dropped before, all of it dies.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::fcntl::{FallocateFlags, fallocate};

use super::fill;
use super::network::{Peers, Revival};
use super::plan::{Birth, Plan, is_file_mapping};
use super::rebuild::{self, Built, Ready, Site, family, space};
use super::res::mm::{self, Content};
use super::res::sysv;
use super::spans::Spans;
use super::tree::{Process, Tree};
use super::{Error, Puppet, Result};
use crate::image::dir::ImageDir;
use crate::image::pages::{PAGE_SIZE, PagesOf, Span};
use crate::image::records::files::RegFileEntry;
use crate::image::records::mm::{VmaEntry, vma_status};
use crate::sys::file;
use crate::sys::uffd::Uffd;

/// The memory of a process or of a shared object, as far as it has arrived.
#[derive(Debug, Default)]
struct Arrived {
    landed: Spans,
    /// Of that, what is its maker's too: written only where it differs, so that it stays shared.
    inherited: Spans,
    /// Pages of zeros that came where nothing was, and still is.
    hollow: Spans,
    /// What the source has, by its last account.
    there: Spans,
    /// For pages that are missing yet; none for objects.
    uffd: Option<Uffd>,
}

/// A regular file that has a name.
#[derive(Debug, Clone, PartialEq, Eq)]
struct FileId {
    name: Vec<u8>,
    flags: u32,
    dev: u64,
    inode: u64,
}

/// A container in the making. See the module.
#[derive(Debug)]
pub struct Standby {
    site: Site,
    all: BTreeMap<u32, Built>,
    stand_ins: family::StandIns,
    /// What tells the files of the last round's records from each other, by id.
    files: HashMap<u32, FileId>,
    arrived: HashMap<PagesOf, Arrived>,
}

impl Standby {
    /// Makes the processes that the records in `images` tell of around the first puppet.
    pub fn raise(images: &Path, first: Puppet) -> Result<Standby> {
        let mut plan = plan(images)?;
        strip(&mut plan.tree);
        let (mut site, init) = Site::begin(plan, first)?;
        let mut all = BTreeMap::from([(1, init)]);
        family::root(&mut site, &mut all)?;
        let stand_ins = family::StandIns::default();
        let mut standby = Standby { site, all, stand_ins, files: HashMap::new(), arrived: HashMap::new() };
        standby.files = standby.identify();
        standby.receive(1)?;
        Ok(standby)
    }

    /// Follows the container to what it is now.
    pub fn follow(&mut self, images: &Path) -> Result<()> {
        let mut next = plan(images)?;
        let stage = self.site.plan.stage;
        if super::plan::mappings(&next.tree).any(|(start, end)| start < stage.end() && stage.start < end) {
            let what = "the container has mapped memory where its standby is driven from".into();
            return Err(Error::BadRecord { what });
        }
        next.stage = stage;
        strip(&mut next.tree);
        let init = self.all.get(&1).ok_or_else(|| rebuild::missing(1))?.pid;
        rebuild::fill_tmpfs(init, &mut next)?;
        let shop = rebuild::workshop(init, &mut next)?;
        self.follow_segments(init, &next)?;
        let was = std::mem::replace(&mut self.site.plan, next);
        self.site.shop = shop;
        self.site.files.clear();
        let now_files = self.identify();
        let old_files = std::mem::replace(&mut self.files, now_files);
        let now = self.site.plan.tree.processes.clone();
        family::part(&mut self.all, &was.tree.processes, &now)?;
        let staying = &self.all;
        self.arrived.retain(|of, _| !matches!(of, PagesOf::Task(pid) if !staying.contains_key(pid)));
        for p in &now {
            let before = was.tree.processes.iter().find(|b| b.entry.pid == p.entry.pid);
            self.reshape(p, before, &old_files)?;
        }
        let known: Vec<u32> = self.all.keys().copied().collect();
        known.into_iter().try_for_each(|pid| self.receive(pid))
    }

    /// Makes a process, now that its memory comes: that of the process which makes it has come, and is its own as far
    /// as it does not differ.
    fn bring(&mut self, pid: u32) -> Result<()> {
        let before: Vec<u32> = self.all.keys().copied().collect();
        family::bring(&mut self.site, &mut self.all, &mut self.stand_ins, pid)?;
        let made: Vec<u32> = self.all.keys().copied().filter(|pid| !before.contains(pid)).collect();
        for pid in made {
            let parent = self.site.process(pid)?.entry.ppid;
            let of_maker = self.arrived.get(&PagesOf::Task(parent)).map(|a| a.landed.clone()).unwrap_or_default();
            let inherited = rebuild::built(&mut self.all, pid)?.inherited.clone();
            if !matches!(self.site.plan.births[&pid], Birth::Child { .. }) {
                // Its maker is not its parent: what that had, and when, nobody has noted.
                inherited.iter().try_for_each(|span| self.punch(PagesOf::Task(pid), *span))?;
                self.receive(pid)?;
                continue;
            }
            let parts = inherited.iter().flat_map(|span| of_maker.split(*span));
            let landed: Spans = parts.filter(|(_, there)| *there).map(|(span, _)| span).collect();
            let arrived = Arrived { inherited: landed.clone(), landed, ..Arrived::default() };
            self.arrived.insert(PagesOf::Task(pid), arrived);
            self.receive(pid)?;
        }
        Ok(())
    }

    /// The regular files of the records as they are here now. Nameless ones are made anew for each round.
    fn identify(&self) -> HashMap<u32, FileId> {
        let regular = self.site.plan.tree.files.iter().filter_map(|f| f.reg.as_ref());
        let named = regular.filter(|r| !self.site.shop.ghosts.is_of(r.id));
        let identity = |r: &RegFileEntry| {
            let there = file::open_in(&self.site.shop.root, &r.name, libc::O_PATH as u32).and_then(file::stat).ok()?;
            Some((r.id, FileId { name: r.name.clone(), flags: r.flags, dev: there.dev, inode: there.inode }))
        };
        named.filter_map(identity).collect()
    }

    fn reshape(&mut self, p: &Process, before: Option<&Process>, old_files: &HashMap<u32, FileId>) -> Result<()> {
        let Some(built) = self.all.get_mut(&p.entry.pid) else { return Ok(()) };
        let (Some(alive), Some(before)) = (&p.alive, before.and_then(|b| b.alive.as_ref())) else { return Ok(()) };
        let new_files = &self.files;
        let same = |a: &VmaEntry, b: &VmaEntry| {
            let late = (libc::MAP_LOCKED | libc::MAP_NONBLOCK) as u32;
            let offset = b.start.wrapping_sub(a.start);
            let shifted = |a: &VmaEntry| a.pgoff.wrapping_add(offset);
            (a.flags & !late) == (b.flags & !late)
                && match (mm::content(a), mm::content(b)) {
                    (Content::Sysv(x), Content::Sysv(y)) => x == y && (a.start, a.end) == (b.start, b.end),
                    (Content::Shmem(x), Content::Shmem(y)) => x == y && shifted(a) == b.pgoff,
                    (Content::Private | Content::File, Content::Private | Content::File)
                        if is_file_mapping(a) && is_file_mapping(b) =>
                    {
                        let (old, new) = (old_files.get(&(a.shmid as u32)), new_files.get(&(b.shmid as u32)));
                        shifted(a) == b.pgoff && old.is_some() && old == new
                    }
                    (Content::Private, Content::Private) => !is_file_mapping(a) && !is_file_mapping(b),
                    _ => false,
                }
        };
        let kept = space::reshape(&mut self.site, built, alive, &before.mm, &same)?;
        let kept: Spans = kept.into_iter().collect();
        let arrived = self.arrived.entry(PagesOf::Task(p.entry.pid)).or_default();
        for gone in arrived.hollow.without(&kept) {
            arrived.hollow.remove(gone);
        }
        for gone in arrived.landed.without(&kept) {
            arrived.landed.remove(gone);
            arrived.inherited.remove(gone);
        }
        Ok(())
    }

    /// Segments can be added; that one has gone cannot be followed, as it may be attached here.
    fn follow_segments(&mut self, init: i32, next: &Plan) -> Result<()> {
        let known = &self.site.plan.tree.sysv;
        if let Some(gone) = known.iter().find(|k| next.tree.sysv.iter().all(|n| n.desc.id != k.desc.id)) {
            let what = format!("System V segment {} was removed while its standby followed it", gone.desc.id);
            return Err(Error::BadRecord { what });
        }
        for new in next.tree.sysv.iter().filter(|n| known.iter().all(|k| k.desc.id != n.desc.id)) {
            sysv::create(init, new, &[])?;
        }
        Ok(())
    }

    /// Makes ready for pages whatever memory a process has.
    fn receive(&mut self, pid: u32) -> Result<()> {
        let Some(alive) = self.site.process(pid)?.alive else { return Ok(()) };
        let built = rebuild::built(&mut self.all, pid)?;
        let arrived = self.arrived.entry(PagesOf::Task(pid)).or_default();
        let uffd = match &mut arrived.uffd {
            Some(uffd) => uffd,
            none => none.insert(space::open_uffd(built)?),
        };
        for v in alive.mm.vmas.iter().filter(|v| v.status & vma_status::ANON_PRIVATE != 0) {
            uffd.fillable(v.start, v.end).map_err(Error::system("register memory with userfaultfd"))?;
        }
        Ok(())
    }

    /// The pages that `of` has now; all others become holes.
    pub fn present(&mut self, of: PagesOf, spans: &[Span]) -> Result<()> {
        if let PagesOf::Task(pid) = of {
            self.bring(pid)?;
        }
        let there: Spans = spans.iter().copied().collect();
        let holes = match self.arrived.get(&of) {
            Some(arrived) => arrived.landed.without(&there),
            None => Vec::new(),
        };
        for hole in &holes {
            self.punch(of, *hole)?;
        }
        let arrived = self.arrived.entry(of).or_default();
        for hole in holes {
            arrived.landed.remove(hole);
            arrived.inherited.remove(hole);
        }
        arrived.there = there;
        Ok(())
    }

    fn punch(&mut self, of: PagesOf, hole: Span) -> Result<()> {
        let len = hole.end() - hole.vaddr;
        match of {
            PagesOf::Task(pid) => {
                let built = rebuild::built(&mut self.all, pid)?;
                built.main.call("madvise", libc::SYS_madvise, [hole.vaddr, len, libc::MADV_DONTNEED as u64])?;
            }
            PagesOf::Shmem(id) => {
                let object = self.object(id)?;
                let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                let (at, len) = (hole.vaddr as i64, len as i64);
                fallocate(&object, how, at, len).map_err(|e| Error::system("empty shared memory")(e.into()))?;
            }
        }
        Ok(())
    }

    fn object(&self, id: u64) -> Result<std::fs::File> {
        let failed = |what: &str| Error::system(format!("{what} {id}"));
        if let Some(object) = self.site.objects.get(&id) {
            return Ok(object.try_clone().map_err(failed("shared memory object"))?.into());
        }
        let init = self.all.get(&1).ok_or_else(|| rebuild::missing(1))?.pid;
        match self.site.plan.tree.sysv.iter().find(|s| u64::from(s.desc.id) == id) {
            Some(s) => crate::sys::sysv::open(init, s.desc.id.cast_signed()).map_err(failed("System V segment")),
            None => Err(Error::BadRecord { what: format!("there is no shared memory object {id}") }),
        }
    }

    /// Content of pages. What has no place here is left out; it will be missed.
    pub fn pages(&mut self, of: PagesOf, vaddr: u64, bytes: &[u8]) -> Result<()> {
        let span = Span::between(vaddr, vaddr + bytes.len() as u64);
        if !(vaddr | bytes.len() as u64).is_multiple_of(PAGE_SIZE) {
            return Err(Error::BadRecord { what: format!("pages of {of} at {vaddr:#x} are no pages") });
        }
        match of {
            PagesOf::Task(pid) => {
                let Some(built) = self.all.get(&pid) else { return Ok(()) };
                let arrived = self.arrived.entry(of).or_default();
                let part_of = |part: Span| &bytes[(part.vaddr - vaddr) as usize..(part.end() - vaddr) as usize];
                let failed =
                    |part: Span| Error::system(format!("put {} pages at {:#x} of {of}", part.pages, part.vaddr));
                for (part, shared) in arrived.inherited.split(span) {
                    if shared {
                        fill::put_differing(part.vaddr, part_of(part), &built.memory).map_err(failed(part))?;
                        continue;
                    }
                    for (part, landed) in arrived.landed.split(part) {
                        let uffd = arrived.uffd.as_ref().filter(|_| !landed);
                        put(built, uffd, part, part_of(part)).map_err(failed(part))?;
                    }
                }
                arrived.landed.insert(span);
                arrived.hollow.remove(span);
                arrived.inherited.remove(span);
            }
            PagesOf::Shmem(id) => {
                let object = self.object(id)?;
                let size = object.metadata().map_err(Error::system("shared memory"))?.len();
                // A System V segment may end within its last page.
                let inside = bytes.len().min(size.saturating_sub(vaddr) as usize);
                object.write_all_at(&bytes[..inside], vaddr).map_err(Error::system("fill shared memory"))?;
                let arrived = self.arrived.entry(of).or_default();
                arrived.landed.insert(span);
                arrived.hollow.remove(span);
            }
        }
        self.site.report.pages += span.pages;
        Ok(())
    }

    /// Pages of zeros: a hole is as good where nothing was.
    pub fn zeros(&mut self, of: PagesOf, span: Span) -> Result<()> {
        static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
        let file = |v: &VmaEntry| is_file_mapping(v) && v.start < span.end() && span.vaddr < v.end;
        let hollow = |pid: u32| {
            let alive = self.site.plan.tree.processes.iter().find(|p| p.entry.pid == pid)?.alive.as_ref();
            alive.map(|a| !a.mm.vmas.iter().any(file))
        };
        let hollow = match of {
            PagesOf::Task(pid) => hollow(pid).unwrap_or(true),
            PagesOf::Shmem(_) => true,
        };
        for (part, landed) in self.arrived.entry(of).or_default().landed.split(span) {
            if !landed && hollow {
                self.arrived.entry(of).or_default().hollow.insert(part);
                continue;
            }
            for at in (part.vaddr..part.end()).step_by(ZEROS.len()) {
                self.pages(of, at, &ZEROS[..(part.end() - at).min(ZEROS.len() as u64) as usize])?;
            }
        }
        Ok(())
    }

    /// Pages that the source has and that have not come, or not to stay.
    pub fn missing(&self) -> Vec<(PagesOf, Span)> {
        let lacks = |(of, a): (&PagesOf, &Arrived)| -> Vec<(PagesOf, Span)> {
            let lacking = a.there.without(&a.landed).into_iter().flat_map(|span| a.hollow.split(span));
            lacking.filter(|(_, hollow)| !hollow).map(|(span, _)| (*of, span)).collect()
        };
        self.arrived.iter().flat_map(lacks).collect()
    }

    /// All that is left, from the records that were made last. `external`: what takes the place of files from outside.
    pub fn complete(mut self, images: &Path, external: Vec<(String, OwnedFd)>, peers: Peers) -> Result<Ready> {
        // A page that is touched from here on must not wait for us.
        self.arrived.clear();
        let mut last = plan(images)?;
        last.replace(external);
        last.stage = self.site.plan.stage;
        let highest =
            last.tree.processes.iter().filter_map(|p| p.alive.as_ref()).flat_map(|a| &a.fds).map(|f| f.fd).max();
        if highest.is_some_and(|fd| fd as i32 >= self.site.parking) {
            let what = format!("the container has opened descriptor {} meanwhile", highest.unwrap_or(0));
            return Err(Error::BadRecord { what });
        }
        let init = rebuild::built(&mut self.all, 1)?.pid;
        // Those of the last round are open and mapped already.
        last.ghosts = std::mem::take(&mut self.site.shop.ghosts);
        self.site.shop = rebuild::workshop(init, &mut last)?;
        self.site.shop.network = Revival::prepare(init, &mut last.tree, peers)?;
        self.site.files.clear();
        self.site.plan = last;
        family::raise(&mut self.site, &mut self.all, &mut self.stand_ins)?;
        family::settle(&self.site, &mut self.all, self.stand_ins)?;
        self.site.finish(self.all)
    }
}

fn plan(images: &Path) -> Result<Plan> {
    Plan::of_records(&ImageDir::open(images)?, images.to_owned())
}

/// Leaves only what mappings need: a standby has no connections, and nobody hears from it.
fn strip(tree: &mut Tree) {
    tree.files.retain(|f| f.reg.is_some());
    tree.streams.clear();
    tree.socket_queues.clear();
    tree.pipe_data.clear();
}

/// `missing`: for pages that are not there yet.
fn put(built: &Built, missing: Option<&Uffd>, at: Span, bytes: &[u8]) -> std::io::Result<()> {
    if let Some(uffd) = missing {
        match uffd.copy(at.vaddr, bytes) {
            // Not anonymous memory, or there already in part (inherited): written over.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::EEXIST | libc::EINVAL)) => {}
            done => return done,
        }
    }
    built.memory.force_write(at.vaddr, bytes)
}
