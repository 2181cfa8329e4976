//! The container's network in a move: [`address`](super::address), [`capture`](super::capture) and
//! [`conntrack`](super::conntrack), in the order in which the two ends need them.
//!
//! ```text
//! source                                          destination
//! Leaving::of
//! addresses ------------------------------------> Arriving::stand_by       there, and silent
//! Leaving::prepare
//! tracked connections --------------------------> Arriving::take
//! (frozen) Leaving::hush
//! (given up) Leaving::give_up
//! (given up) frames, Commit --------------------> Arriving::take, speak    it runs
//! frames that came since ----------------------->
//! Leaving::keep_silent
//! ```
//! A container moves its addresses when its network namespace is its own. What it shares with others (the host, a pod) stays as
//! it is, and its addresses have to be at the destination by other means (`--on-commit`).

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use prost::Message;

use super::address::{Announcement, Error, Interfaces, Result, Silence, Silencer, announce};
use super::capture::{Capture, Frames, Injector};
use super::conntrack::{self, Entries};
use crate::engine;

/// What one end's network says to the other's.
#[derive(Clone, PartialEq, Eq, ::prost::Message)]
struct Word {
    #[prost(oneof = "Matter", tags = "1, 2, 3")]
    matter: Option<Matter>,
}

#[derive(Clone, PartialEq, Eq, ::prost::Oneof)]
enum Matter {
    /// [`Interfaces`]
    #[prost(bytes, tag = "1")]
    Interfaces(Vec<u8>),
    /// [`Entries`], one message of several.
    #[prost(bytes, tag = "2")]
    Tracked(Vec<u8>),
    /// [`Frames`]
    #[prost(bytes, tag = "3")]
    Frames(Vec<u8>),
}

impl Matter {
    fn into_bytes(self) -> Vec<u8> {
        Word { matter: Some(self) }.encode_to_vec()
    }
}

/// The network of a container that leaves. Dropped, it is heard again.
#[derive(Debug)]
pub struct Leaving {
    netns: File,
    interfaces: Interfaces,
    silencer: Option<Silencer>,
    capture: Option<Capture>,
    silence: Option<Silence>,
    /// For the time when this process may end, and the container must not be heard all the same.
    lasting: Lasting,
}

#[derive(Debug)]
enum Lasting {
    Unprepared,
    Prepared(Silencer),
    Imposed(Silence),
    /// It stays.
    Kept,
}

impl Leaving {
    /// None: the container (its first process is `init`, all are `pids`) has no network that is its own.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn of(init: i32, pids: &[i32]) -> Result<Option<Leaving>> {
        let Some(netns) = own_netns(init, pids)? else { return Ok(None) };
        let interfaces = Interfaces::read(netns.as_fd())?;
        let this =
            Leaving { netns, interfaces, silencer: None, capture: None, silence: None, lasting: Lasting::Unprepared };
        Ok((!this.interfaces.interfaces.is_empty()).then_some(this))
    }

    /// What the destination makes early.
    pub fn addresses(&self) -> Vec<u8> {
        Matter::Interfaces(self.interfaces.to_bytes()).into_bytes()
    }

    /// Shortly before the freeze: makes ready all that takes time.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn prepare(&mut self) -> Result<()> {
        self.silencer = Some(Silencer::open(self.netns.as_fd())?);
        self.lasting = Lasting::Prepared(Silencer::lasting(self.netns.as_fd())?);
        self.capture = Some(Capture::open(self.netns.as_fd())?);
        Ok(())
    }

    /// What this host's connection tracking knows, a message each.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn tracked(&self) -> Result<Vec<Vec<u8>>> {
        let addresses = self.interfaces.addresses();
        let mut all = conntrack::read(host()?.as_fd(), &addresses)?.to_messages();
        all.extend(conntrack::read(self.netns.as_fd(), &addresses)?.to_messages());
        Ok(all.into_iter().map(|entries| Matter::Tracked(entries).into_bytes()).collect())
    }

    /// From now on nothing that comes reaches the container, and all of it is kept. Just before its sockets are read.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn hush(&mut self) -> Result<()> {
        // In this order: what comes in between is taken twice, which TCP expects of a network.
        self.capture.iter().try_for_each(Capture::begin)?;
        if let Some(silencer) = self.silencer.take() {
            self.silence = Some(silencer.impose()?);
        }
        Ok(())
    }

    /// What has come since. None: nothing.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn frames(&self) -> Result<Option<Vec<u8>>> {
        let Some(capture) = &self.capture else { return Ok(None) };
        let frames = capture.drain()?;
        if frames.lost > 0 {
            tracing::warn!("{} frames that came during the move are lost; TCP sends again", frames.lost);
        }
        Ok((!frames.frames.is_empty()).then(|| Matter::Frames(frames.to_bytes()).into_bytes()))
    }

    /// The right to run is given up: from now on the silence does not end with this process. Takes some 50 us.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn give_up(&mut self) -> Result<()> {
        if let Lasting::Prepared(silencer) = std::mem::replace(&mut self.lasting, Lasting::Unprepared) {
            self.lasting = Lasting::Imposed(silencer.impose()?);
        }
        Ok(())
    }

    /// The right to run is taken back: it is heard again. Takes some 50 us.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn take_back(&mut self) -> Result<()> {
        if let Lasting::Imposed(silence) = std::mem::replace(&mut self.lasting, Lasting::Unprepared) {
            silence.lift()?;
        }
        self.silence.take().map_or(Ok(()), Silence::lift)
    }

    /// It is not known whether the container may be heard here, or known that it may not: others must not find it.
    pub fn keep_silent(mut self) {
        self.lasting = Lasting::Kept;
    }
}

impl Drop for Leaving {
    fn drop(&mut self) {
        if let Some(silence) = self.silence.take()
            && let Err(error) = silence.lift()
        {
            tracing::warn!(%error, "the container's interfaces are heard again when lmrun ends");
        }
        // Unprepared: or it was taken back.
        if !matches!(self.lasting, Lasting::Kept)
            && let Err(error) = Silence::lift_kept(self.netns.as_fd())
        {
            tracing::warn!(%error, "the container's interfaces stay silent");
        }
        if let Some(capture) = self.capture.take() {
            capture.close();
        }
    }
}

/// The network of the container of `init`, which was given up or was to come, is heard from now on. Nothing to be done is no error.
///
/// # Errors
/// What the kernel says.
pub fn hear_again(init: i32) -> Result<()> {
    let netns = File::open(format!("/proc/{init}/ns/net")).map_err(Error::Namespace)?;
    if Silence::lift_kept(netns.as_fd())? {
        announce(netns.as_fd(), &Interfaces::read(netns.as_fd())?)?.wait();
    }
    Ok(())
}

/// The network of a container that is expected.
#[derive(Debug)]
pub struct Arriving {
    netns: File,
    interfaces: Interfaces,
    /// None: it may be heard.
    silence: Option<Silence>,
    injector: Injector,
    /// What is for the container when it runs.
    waiting: Vec<Frames>,
    announced: Option<Announcement>,
    /// What the namespace had, which stays if the container does not come.
    before: Interfaces,
}

impl Arriving {
    /// Makes the network of `init`, which is to be the first process of container `id`, what `word` says, in silence. With it comes what could
    /// not be done, one sentence each. None: its network is not its own.
    ///
    /// # Errors
    /// A word that makes no sense; what the kernel says.
    pub fn stand_by(init: i32, id: &str, word: &[u8]) -> super::Result<Option<(Arriving, Vec<String>)>> {
        let Some(Matter::Interfaces(interfaces)) = decode(word)? else {
            return Err(Error::Wrong("addresses have to come first".to_owned()).into());
        };
        let interfaces = Interfaces::from_bytes(&interfaces)?;
        let Some(netns) = own_netns(init, &[init])? else { return Ok(None) };
        let before = Interfaces::read(netns.as_fd())?;
        let (silence, mut problems) = interfaces.stand_by(netns.as_fd())?;
        engine::take_back(init, id)?;
        let (here, injector) = (Interfaces::read(netns.as_fd())?, Injector::open(netns.as_fd(), host()?.as_fd())?);
        let here = here.addresses();
        if let Some(lacking) = interfaces.addresses().iter().find(|address| !here.contains(address)) {
            let why = problems.join(", ");
            return Err(Error::Wrong(format!("address {lacking} cannot be at the destination: {why}")).into());
        }
        problems.extend(injector.problems.iter().cloned());
        let (silence, waiting, announced) = (Some(silence), Vec::new(), None);
        let this = Arriving { netns, interfaces, silence, injector, waiting, announced, before };
        Ok(Some((this, problems)))
    }

    /// Whatever else the source says. Gives what could not be done, one sentence each.
    ///
    /// # Errors
    /// A word that makes no sense; what the kernel says.
    pub fn take(&mut self, word: &[u8]) -> Result<Vec<String>> {
        match decode(word)? {
            Some(Matter::Tracked(entries)) => conntrack::write(host()?.as_fd(), &Entries::from_message(&entries)?),
            Some(Matter::Frames(frames)) => {
                self.waiting.push(Frames::from_bytes(&frames)?);
                if self.silence.is_none() {
                    self.deliver();
                }
                Ok(Vec::new())
            }
            _ => Err(Error::Wrong("addresses come once".to_owned())),
        }
    }

    /// It is decided that the container runs here: it can be heard, and everybody learns where it is.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn speak(&mut self) -> Result<()> {
        if let Some(silence) = self.silence.take() {
            silence.lift()?;
        }
        let announced = announce(self.netns.as_fd(), &self.interfaces)?;
        for problem in &announced.problems {
            tracing::warn!("{problem}");
        }
        self.announced = Some(announced);
        Ok(())
    }

    /// Waits until all has been said, within a second.
    pub fn finish(mut self) {
        if let Some(announced) = self.announced.take() {
            announced.wait();
        }
        if let Err(error) = Silence::lift_kept(self.netns.as_fd()) {
            tracing::warn!(%error, "a table of nftables is left in the container's network");
        }
    }

    /// Gives the container what came for it on its way. Its connections have to be alive.
    pub fn deliver(&mut self) {
        for frames in std::mem::take(&mut self.waiting) {
            self.injector.inject(&frames);
        }
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        let Some(silence) = self.silence.take() else { return };
        let undone = self.before.apply(self.netns.as_fd()).and_then(|_| match silence.was_kept() {
            // A container that was here before and has left: its addresses are elsewhere.
            true => Ok(false),
            false => Silence::lift_kept(self.netns.as_fd()),
        });
        if let Err(error) = undone {
            tracing::warn!(%error, "the network that was prepared for the container keeps its addresses");
        }
    }
}

fn decode(word: &[u8]) -> Result<Option<Matter>> {
    Word::decode(word).map(|word| word.matter).map_err(|e| Error::Wrong(e.to_string()))
}

/// This host's network: that of the calling thread.
fn host() -> Result<File> {
    File::open("/proc/thread-self/ns/net").map_err(Error::Namespace)
}

/// The network namespace of the process `init`. None: not all that is in it is in `pids`.
fn own_netns(init: i32, pids: &[i32]) -> Result<Option<File>> {
    let netns = File::open(format!("/proc/{init}/ns/net")).map_err(Error::Namespace)?;
    let inode = |file: io::Result<fs::Metadata>| file.map(|metadata| metadata.ino());
    let own = inode(netns.metadata()).map_err(Error::Namespace)?;
    let processes = fs::read_dir("/proc").map_err(Error::Namespace)?.filter_map(|entry| {
        let pid: i32 = entry.ok()?.file_name().to_str()?.parse().ok()?;
        (!pids.contains(&pid)).then_some(pid)
    });
    for pid in processes {
        // One that ends meanwhile is no sharer.
        if inode(fs::metadata(format!("/proc/{pid}/ns/net"))).is_ok_and(|inode| inode == own) {
            return Ok(None);
        }
    }
    Ok(Some(netns))
}
