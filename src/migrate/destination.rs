//! The end that the container goes to.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::Instant;

use super::events::{Parts, micros};
use super::handover::Verdict;
use super::ledger::{self, Arrival, Incoming};
use super::place::{Place, Records};
use super::transport::{Channel, Input, Output};
use super::urgency::Urgency;
use super::wire::message::{
    Commit, Done, Extent, Findings, Hello, Image, Lack, Offer, Part, Ping, Pong, Present, Ready, Refuse, Round,
    RoundDone, RoundEnd, Running, TreeEnd,
};
use super::wire::{self, Content, Message, PROTOCOL, Reader, Writer};
use super::{Error, Result, disk, network, preflight, settle};
use crate::engine::standby::Standby;
use crate::engine::{ClockOffsets, Peers, Puppet};
use crate::image::pages::{PAGE_SIZE, PagesOf, Span};
use crate::runtime::Store;
use crate::sys::clock;

/// How often the clocks are compared; the quickest answer counts.
const PINGS: usize = 5;

/// Receives one container over a connection, or tells what became of one.
pub fn run(store: &Store, channel: Channel) -> Result<()> {
    let Channel { reader, writer, link } = channel;
    let mut ear =
        Ear { reader, writer, disk: None, urgency: Urgency::begin(), id: String::new(), init: 0, network: None };
    let hello: Hello = ear.reader.expect()?;
    ledger::check_token(&hello.token)?;
    ear.writer.say(&Hello::of(&hello.token))?;
    if hello.protocol != PROTOCOL {
        return Err(Error::Other(format!("the source speaks version {} of the protocol", hello.protocol)));
    }
    let received = match ear.reader.recv()? {
        Message::Settle(_) => {
            let running = settle::there(&Incoming::default(), &hello.token)? == Verdict::Running;
            ear.writer.say(&wire::message::Verdict { running })?;
            if ear.reader.expect::<Done>().is_ok() {
                Incoming::default().remove(&hello.token)?;
            }
            Ok(())
        }
        Message::Offer(offer) => ear.receive(store, &hello.token, offer),
        other => Ok(other.expect::<Offer>().map(drop)?),
    };
    if let Err(error) = &received {
        let _ = ear.writer.say(&super::wire::message::Abort { reason: error.to_string() });
    }
    drop(ear);
    drop(link);
    received
}

/// The entry of a migration on which nothing was decided. Dropped, it is aborted, and gone.
struct Undecided<'a> {
    incoming: Incoming,
    token: &'a str,
}

impl<'a> Undecided<'a> {
    fn open(store: &Store, token: &'a str, id: &str) -> Result<Self> {
        let incoming = Incoming::default();
        incoming.open(token, &Arrival::own(id, store.root())?)?;
        Ok(Undecided { incoming, token })
    }

    /// From now on it is decided that the container runs here.
    fn decide(self) -> Result<Incoming> {
        match self.incoming.decide(self.token, Verdict::Running)? {
            true => Ok(self.incoming.clone()),
            false => Err(Error::Other("the migration was aborted by whoever settled it meanwhile".into())),
        }
    }
}

impl Drop for Undecided<'_> {
    fn drop(&mut self) {
        let aborted = self.incoming.decide(self.token, Verdict::Aborted);
        let removed = aborted.and_then(|aborted| if aborted { self.incoming.remove(self.token) } else { Ok(()) });
        if let Err(error) = removed {
            tracing::warn!(%error, "cannot abort");
        }
    }
}

/// The conversation with the source.
struct Ear {
    reader: Reader<Input>,
    writer: Writer<Output>,
    /// The container's file systems that come along.
    disk: Option<disk::Target>,
    urgency: Urgency,
    /// The container's.
    id: String,
    /// Host pid of the container's first process, once there is one.
    init: i32,
    /// None: the container has no network of its own.
    network: Option<network::Arriving>,
}

impl Ear {
    fn receive(&mut self, store: &Store, token: &str, offer: Offer) -> Result<()> {
        // Before one looks for what is in the way.
        settle::sweep(&Incoming::default());
        let config = self.file("config.json")?;
        let mut place = Place::find(&offer)?;
        let mut list = preflight::compare(&offer.host, &preflight::host(place.dir()), &offer.needs);
        list.extend(place.check(store, &offer, &config)?);
        let refused = list.iter().any(|finding| finding.blocks);
        self.writer.say(&Findings { list })?;
        if refused {
            self.writer.say(&Refuse { reason: "see the findings".into() })?;
            return Ok(());
        }
        let clocks = self.clocks()?;
        let accept = place.accept()?;
        self.writer.say(&accept)?;
        if offer.manner.check {
            return Ok(());
        }
        let entry = Undecided::open(store, token, &offer.id)?;
        place.make(&accept, &config, &mut self.reader, &mut self.writer)?;
        if let Some(target) = place.target()? {
            self.disk = Some(target);
            self.disk_round()?;
        }
        let records = Records::make(store, token)?;
        let (arriving, puppet) = place.raise(store, clocks, self.disk.as_mut(), &mut self.writer)?;
        (self.id, self.init) = (offer.id.clone(), puppet.pid);
        let standby = self.rounds(&records, puppet)?;
        self.images(&records.dir)?;
        if let Some(disk) = &mut self.disk {
            disk.finish()?;
        }
        let peers = if self.network.is_some() { Peers::AreKeptAway } else { Peers::Hear };
        let ready = standby.complete(&records.dir, arriving.external(&records.dir)?, peers)?;
        self.writer.say(&Ready {})?;
        let _: Commit = self.expect()?;
        let (committed, mut parts) = (Instant::now(), Parts::begin());
        let freezer = arriving.freezer()?;
        let detached = ready.detach(&*freezer)?;
        let mut resident = arriving.finish(&Incoming::default(), token)?;
        parts.end("detach");
        let entry = match entry.decide() {
            Ok(entry) => entry,
            Err(error) => {
                resident.remove()?;
                return Err(error);
            }
        };
        // Its files are its own from now on.
        let files = self.disk.take().map(disk::Target::commit);
        resident.keep();
        // From here on it is this one or none: what fails is said, and it runs all the same.
        if let Some(Err(error)) = self.network.as_mut().map(network::Arriving::speak) {
            tracing::warn!(%error, "the container's addresses");
        }
        parts.end("address");
        if let Err(error) = detached.go_live() {
            tracing::warn!(%error, "connections are lost");
        }
        if let Some(network) = &mut self.network {
            network.deliver();
        }
        parts.end("connections");
        freezer.thaw().map_err(|e| Error::Other(format!("thaw the container: {e}; `lmrun resume` does, too")))?;
        parts.end("thaw");
        entry.sync()?;
        // Whether anybody hears it or not, it runs.
        let parts = parts.all.into_iter().map(|part| Part { name: part.name, micros: part.us }).collect();
        let _ = self.writer.say(&Running { micros: micros(committed.elapsed()), parts });
        // As long as there is an entry, somebody removes them if we cannot.
        drop(records);
        if self.expect::<Done>().is_ok() {
            entry.remove(token)?;
        }
        if let Some(network) = self.network.take() {
            network.finish();
        }
        if let Some(files) = files {
            files.sync()?;
        }
        resident.settle();
        Ok(())
    }

    /// The message that is due, after what the network has to say.
    fn expect<M: wire::Control>(&mut self) -> Result<M> {
        loop {
            match self.reader.recv()? {
                Message::Network(word) => self.hear_network(&word)?,
                other => return Ok(other.expect()?),
            }
        }
    }

    fn hear_network(&mut self, word: &[u8]) -> Result<()> {
        let problems = match &mut self.network {
            Some(network) => network.take(word)?,
            None => match network::Arriving::stand_by(self.init, &self.id, word)? {
                Some((network, problems)) => {
                    self.network = Some(network);
                    problems
                }
                None => return Err(Error::Other(
                    "the container's network namespace is its own at the source, and shared here; hint: give it one in the bundle's config.json".into())),
            },
        };
        problems.iter().for_each(|problem| tracing::warn!("{problem}"));
        Ok(())
    }

    /// A file that was announced.
    fn file(&mut self, name: &str) -> Result<Vec<u8>> {
        let mut images = super::wire::message::Images::new(16 << 20);
        loop {
            match self.reader.recv()? {
                Message::Image(part) => {
                    let more = part.more;
                    images.add(part)?;
                    if !more {
                        break;
                    }
                }
                other => return Ok(other.expect::<TreeEnd>().map(|_| Vec::new())?),
            }
        }
        images.finish()?.remove(name).ok_or_else(|| Error::Other(format!("{name} was not sent")))
    }

    /// How far the container's clocks are ahead of ours.
    fn clocks(&mut self) -> Result<ClockOffsets> {
        let mut best: Option<(i128, ClockOffsets)> = None;
        for _ in 0..PINGS {
            let before = clock::monotonic();
            let boot_shift = clock::boottime() - before;
            self.writer.say(&Ping { sent: before as i64 })?;
            let pong: Pong = self.reader.expect()?;
            let took = clock::monotonic() - before;
            // As of the middle of the round trip.
            let here = before + took / 2;
            let ahead = |theirs: i64, ours: i128| {
                let by = i128::from(theirs) - ours;
                (by.div_euclid(clock::NANOS) as i64, by.rem_euclid(clock::NANOS) as u32)
            };
            let offsets = ClockOffsets {
                monotonic: ahead(pong.monotonic, here),
                boottime: ahead(pong.boottime, here + boot_shift),
            };
            if best.is_none_or(|(least, _)| took < least) {
                best = Some((took, offsets));
            }
        }
        Ok(best.map(|(_, offsets)| offsets).unwrap_or_default())
    }

    /// The first copy of its file systems.
    fn disk_round(&mut self) -> Result<()> {
        loop {
            match self.reader.recv()? {
                Message::Disk(bytes) if self.apply(&bytes)? => return Ok(()),
                Message::Disk(_) => {}
                other => return Ok(other.expect::<Round>().map(drop)?),
            }
        }
    }

    /// Does what a message for the disk says; true: it was the last of a round.
    fn apply(&mut self, bytes: &[u8]) -> Result<bool> {
        let message = disk::Message::parse(bytes).map_err(|e| Error::Other(format!("of the disk came {e}")))?;
        let end = matches!(message.op, Some(disk::message::Op::End(_)));
        let target = self.disk.as_mut().ok_or_else(|| Error::Other("files came that were not asked for".into()))?;
        target.apply(message)?;
        Ok(end)
    }

    /// Takes images into `dir` until the end of the tree.
    fn images(&mut self, dir: &Path) -> Result<()> {
        let mut open: Option<(String, File)> = None;
        let failed = |name: &str| {
            let what = format!("write {}", dir.join(name).display());
            move |e| Error::Other(format!("{what}: {e}"))
        };
        loop {
            match self.reader.recv()? {
                Message::Image(Image { name, more, bytes }) => {
                    let mut file = match open.take() {
                        Some((last, file)) if last == name => file,
                        _ => File::create(dir.join(&name)).map_err(failed(&name))?,
                    };
                    file.write_all(&bytes).map_err(failed(&name))?;
                    self.reader.recycle(bytes);
                    open = more.then_some((name, file));
                }
                Message::Disk(bytes) => drop(self.apply(&bytes)?),
                other => {
                    other.expect::<TreeEnd>()?;
                    return Ok(());
                }
            }
        }
    }

    /// All rounds, up to the last page of the last one.
    fn rounds(&mut self, records: &Records, puppet: Puppet) -> Result<Standby> {
        let mut puppet = Some(puppet);
        let mut standby: Option<Standby> = None;
        loop {
            let Round { number, last } = self.expect()?;
            if last {
                self.urgency.urgent()
            } else {
                self.urgency.bulk()
            }
            let begun = Instant::now();
            records.empty()?;
            self.images(&records.dir)?;
            match (&mut standby, puppet.take()) {
                (Some(standby), _) => standby.follow(&records.dir)?,
                (None, Some(puppet)) => standby = Some(Standby::raise(&records.dir, puppet)?),
                (None, None) => {}
            }
            let Some(standby) = &mut standby else { continue };
            let mut bytes = 0;
            loop {
                bytes += self.pages(standby, number)?;
                let missing = standby.missing();
                let lack = |(of, span): &(PagesOf, Span)| Lack {
                    of: (*of).into(),
                    extent: Extent { vaddr: span.vaddr, pages: span.pages },
                };
                let none = missing.is_empty();
                let missing = missing.iter().take(RoundDone::MOST).map(lack).collect();
                self.writer.say(&RoundDone { number, bytes, micros: micros(begun.elapsed()), missing })?;
                if none || !last {
                    break;
                }
            }
            if last {
                break;
            }
        }
        standby.ok_or_else(|| Error::Other("no round came".into()))
    }

    /// Takes pages up to the end of the round; gives the number of bytes.
    fn pages(&mut self, standby: &mut Standby, round: u32) -> Result<u64> {
        let mut room = Vec::new();
        let mut there: Vec<Span> = Vec::new();
        let mut landed = 0;
        loop {
            match self.reader.recv()? {
                Message::Pages(pages) => {
                    match pages.content(&mut room)? {
                        Content::Bytes(bytes) => standby.pages(pages.of, pages.vaddr, bytes)?,
                        Content::Zeros => standby.zeros(pages.of, Span { vaddr: pages.vaddr, pages: pages.count })?,
                        Content::Repeat(page) => {
                            for n in 0..pages.count {
                                standby.pages(pages.of, pages.vaddr + n * PAGE_SIZE, page)?;
                            }
                        }
                    }
                    landed += pages.count * PAGE_SIZE;
                    self.reader.recycle(pages.payload);
                }
                Message::Present(Present { of, start, end, extents }) => {
                    if start == 0 {
                        there.clear();
                    }
                    there.extend(extents.iter().map(|e| Span { vaddr: e.vaddr, pages: e.pages }));
                    if end == u64::MAX {
                        standby.present(of.try_into()?, &there)?;
                    }
                }
                other => {
                    let RoundEnd { number } = other.expect()?;
                    return match number == round {
                        true => Ok(landed),
                        false => Err(Error::Other(format!("round {number} ended inside of round {round}"))),
                    };
                }
            }
        }
    }
}
