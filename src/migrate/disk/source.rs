//! The side that the container leaves: finds out what has changed, and tells it.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::digest::{self, Ledger};
use super::message::{End, Message, Op, ROOT};
use super::watch::{Events, Watches};
use super::{Error, Result, Root};

mod tree;

use tree::{Now, Tree};

/// A change this long before a round counts as one that the round may have missed: times of files are those of the last clock
/// tick, and the list of [`Busy`] files was made a little earlier.
const SLACK: Duration = Duration::from_secs(1);

/// Whether the container runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// What changes while it is read is read again in the next round.
    Live,
    /// It is frozen: what changes is an error.
    Last,
}

/// A file that a process of the container may change without anybody being told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Busy {
    /// As the container sees it.
    pub path: PathBuf,
    /// There is a writable, shared mapping of it; otherwise it is just open for writing.
    pub mapped: bool,
}

/// What a round did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Round {
    /// Files that were looked at.
    pub looked: u64,
    /// Bytes of content that were compared with what was sent before.
    pub compared: u64,
    /// Bytes of content that were sent.
    pub sent: u64,
    pub messages: u64,
    /// Every entry was looked at, not just those that the kernel told of.
    pub scanned: bool,
    pub took: Duration,
}

/// A digest of all that is kept of a directory nobody writes to, but the times of directories: those of an image's layer are of
/// the moment when it was unpacked. Two layers with one digest are the same.
pub fn digest_of(path: &Path) -> Result<[u8; digest::SIZE]> {
    let root = Root { name: String::new(), path: path.to_owned(), view: None, inside: PathBuf::from("/") };
    let (mut ledger, mut dirs) = (Ledger::default(), BTreeSet::from([ROOT]));
    // Numbers are given in the order of names: they are the same for the same tree.
    let mut emit = |mut message: Message| {
        match &mut message.op {
            Some(Op::Create(create)) if create.kind == libc::S_IFDIR => drop(dirs.insert(create.id)),
            Some(Op::Meta(meta)) if dirs.contains(&meta.id) => (meta.mtime, meta.mtime_nanos) = (0, 0),
            _ => {}
        }
        message.op.iter().for_each(|op| ledger.apply(message.root, op));
        Ok(())
    };
    Source::open_still(vec![root])?.round(Stage::Last, &[], &mut emit)?;
    Ok(ledger.digest())
}

/// All roots with what the destination knows of them.
pub struct Source {
    trees: Vec<Tree>,
    /// None: something cannot be watched, and every round looks at everything.
    watches: Option<Watches>,
    /// The next round looks at everything.
    missed: bool,
    ledger: Ledger,
}

/// Where a round puts its messages, and counts them.
struct Out<'a> {
    emit: &'a mut dyn FnMut(Message) -> io::Result<()>,
    ledger: &'a mut Ledger,
    watches: &'a mut Option<Watches>,
    root: u32,
    round: &'a mut Round,
}

fn collect(watches: &mut Option<Watches>) -> Result<()> {
    watches.as_mut().map_or(Ok(()), Watches::collect).map_err(|source| Error::Watch { source })
}

impl Out<'_> {
    fn put(&mut self, op: Op) -> Result<()> {
        // The kernel keeps notes for us, but not many.
        collect(self.watches)?;
        self.round.messages += 1;
        self.ledger.apply(self.root, &op);
        (self.emit)(Message::new(self.root, op)).map_err(|source| Error::Emit { source })
    }
}

impl Source {
    pub fn open(roots: Vec<Root>) -> Result<Self> {
        let mut seed = [0; 8];
        let random = Path::new("/dev/urandom");
        let read = |file: File| io::Read::read_exact(&mut &file, &mut seed);
        File::open(random).and_then(read).map_err(Error::io("read", random))?;
        let seed = u64::from_ne_bytes(seed);
        let trees = (0..).zip(roots).map(|(index, root)| Tree::open(index, root, seed)).collect::<Result<_>>()?;
        // Without it (fs.inotify.max_user_instances) there is looking at everything.
        let watches = Watches::new().ok();
        Ok(Self { trees, watches, missed: true, ledger: Ledger::default() })
    }

    /// As [`open`](Self::open), for what nobody writes to (an image's layer).
    pub fn open_still(roots: Vec<Root>) -> Result<Self> {
        Ok(Self { watches: None, ..Self::open(roots)? })
    }

    /// Takes over what the kernel has to tell: it keeps fs.inotify.max_queued_events, and if there are more the next round
    /// looks at everything. To be called now and then between rounds.
    pub fn drain(&mut self) -> Result<()> {
        collect(&mut self.watches)
    }

    /// Sends what has changed since the last round; the first: everything. `busy` was found out less than a second ago.
    ///
    /// After an error there is no other round: start anew.
    pub fn round(
        &mut self,
        stage: Stage,
        busy: &[Busy],
        emit: &mut dyn FnMut(Message) -> io::Result<()>,
    ) -> Result<Round> {
        let started = Instant::now();
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().saturating_sub(SLACK);
        let events = match &mut self.watches {
            Some(watches) => watches.take().map_err(|source| Error::Watch { source })?,
            None => Events { missed: true, ..Events::default() },
        };
        let all = self.missed || events.missed;
        self.missed = false;
        for ((root, dir), names) in events.touched {
            self.trees[root as usize].touched(dir, names);
        }
        for (root, dir) in events.unwatched {
            self.trees[root as usize].unwatched(dir);
        }
        for file in busy {
            self.name_busy(file);
        }
        let now = Now { stage, all, since };
        let mut round = Round { scanned: all, ..Round::default() };
        for tree in &mut self.trees {
            tree.look(now, &mut self.watches, &mut round)?;
            let (ledger, watches, root) = (&mut self.ledger, &mut self.watches, tree.index);
            tree.tell(now, &mut Out { emit: &mut *emit, ledger, watches, root, round: &mut round })?;
        }
        let digest = self.ledger.digest().to_vec();
        let end = Op::End(End { last: stage == Stage::Last, digest });
        let (ledger, watches) = (&mut self.ledger, &mut self.watches);
        Out { emit, ledger, watches, root: 0, round: &mut round }.put(end)?;
        round.took = started.elapsed();
        Ok(round)
    }

    /// The root that has it is the one that lies deepest in the container.
    fn name_busy(&mut self, file: &Busy) {
        let inside = |tree: &&mut Tree| file.path.starts_with(&tree.root.inside);
        let depth = |tree: &&mut Tree| tree.root.inside.components().count();
        let Some(tree) = self.trees.iter_mut().filter(inside).max_by_key(depth) else { return };
        let Ok(below) = file.path.strip_prefix(&tree.root.inside) else { return };
        let names = below.components().filter_map(|component| match component {
            Component::Normal(name) => Some(name),
            _ => None,
        });
        tree.name_busy(names, file.mapped);
    }
}
