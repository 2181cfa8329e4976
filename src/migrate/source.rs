//! The end that the container comes from.
//!
//! ```text
//! connect -> verify -> rounds of pre-copy -> freeze: the last round -> Ready -> given up -> Commit -> Running -> end
//! ```
//! Whatever fails before `given up` (see [`ledger`]), the container runs on here.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use super::events::{self, Event, Parts, Phase, Summary, micros};
use super::handover::Verdict;
use super::ledger::{self, Note};
use super::outlet::Mouth;
use super::subject::Subject;
use super::transport::{self, Channel, Link, Output};
use super::urgency::Urgency;
use super::wire::message::{
    Accept, Commit, Done, Findings, Hello, Lack, Part, Ping, Pong, Ready, Refuse, Round, RoundDone, RoundEnd, Running,
};
use super::wire::{self, Message, PROTOCOL, Reader};
use super::{
    Container, Destination, Error, Failed, Now, Observer, Options, Outcome, Result, interrupt, network, settle, stop,
};
use crate::engine::departure::{Brake, BusyFile, Departure, Held, Outlet};
use crate::image::pages::{PAGE_SIZE, PagesOf, Span};
use crate::runtime::Store;
use crate::runtime::departure::Leaving;
use crate::sys::clock;

/// How long the other end may be silent while the container stands still.
const FREEZE_PATIENCE: Duration = Duration::from_secs(5);

/// Moves a container.
///
/// # Errors
/// Why it did not move, and how it is now.
pub fn run(
    store: &Store,
    container: &Container,
    destination: &Destination,
    options: &Options,
    observer: Observer<'_>,
) -> std::result::Result<Outcome, Failed> {
    let begun = Instant::now();
    options.check_supported().map_err(Failed::untouched)?;
    settle::sweep(&ledger::Incoming::default());
    let mut subject = Subject::find(store, container).map_err(Failed::untouched)?;
    let token = ledger::token().map_err(Failed::untouched)?;
    observer(Event::Start {
        container: container.to_string(),
        destination: destination.to_string(),
        token: token.clone(),
        lmrun: env!("CARGO_PKG_VERSION").into(),
    });
    observer(Event::Phase { phase: Phase::Connect });
    let pace = options.bandwidth.map(transport::Pace::new);
    let channel = transport::connect(destination, &[], pace).map_err(Failed::untouched)?;
    let mut session = Session::open(channel, &token, options, observer).map_err(Failed::untouched)?;
    let mut departure = subject.leaving.depart().map_err(Failed::untouched)?;
    departure.verify().map_err(|e| session.running(e.into()))?;
    let accept = session.verify(&subject, options).map_err(|e| session.untouched(e))?;
    if options.check {
        return Ok(Outcome::Checked);
    }
    session.prepare(&mut subject, &accept).map_err(|e| session.untouched(e))?;
    session.send_addresses(&subject.leaving).map_err(|e| session.untouched(e))?;
    let mut missing = Vec::new();
    session.pre_copy(&mut departure, &subject.leaving, &mut missing, options).map_err(|e| session.running(e))?;
    let held = session.freeze(&mut departure, &subject.leaving, &missing).map_err(|e| session.running(e))?;
    let summary = session.hand_over(held, &mut subject, destination, options)?;
    drop(departure);
    subject
        .remove()
        .map_err(|error| {
            observer(Event::Warning { text: format!("cannot clean up: {error}") });
        })
        .ok();
    observer(Event::Moved(Summary { total_us: micros(begun.elapsed()), ..summary }));
    Ok(Outcome::Moved)
}

/// A conversation with the destination.
struct Session<'a> {
    reader: Reader<transport::Input>,
    mouth: Mouth<Output>,
    link: Link,
    /// None: the container has no network of its own.
    network: Option<network::Leaving>,
    token: String,
    urgency: Urgency,
    rounds: u32,
    pages: u64,
    observer: Observer<'a>,
}

impl<'a> Session<'a> {
    fn open(channel: Channel, token: &str, options: &Options, observer: Observer<'a>) -> Result<Session<'a>> {
        let Channel { reader, writer, link } = channel;
        let mut session = Session {
            reader,
            mouth: Mouth::new(writer, options.compression),
            link,
            network: None,
            token: token.to_owned(),
            urgency: Urgency::begin(),
            rounds: 0,
            pages: 0,
            observer,
        };
        let hello = session.greet()?;
        observer(Event::Connected { lmrun: hello.lmrun_version, streams: 1 });
        Ok(session)
    }

    fn greet(&mut self) -> Result<Hello> {
        self.mouth.say(&Hello::of(&self.token)).or_else(|e| self.explained(e))?;
        let theirs: Hello = self.hear()?;
        if theirs.protocol != PROTOCOL {
            return Err(Error::Other(format!(
                "the destination's lmrun {} speaks version {} of the protocol, this one version {PROTOCOL}: use the same lmrun",
                theirs.lmrun_version, theirs.protocol
            )));
        }
        Ok(theirs)
    }

    fn explained<T>(&mut self, error: Error) -> Result<T> {
        Err(match error {
            Error::Wire(error) => self.link.explain(error),
            error => error,
        })
    }

    /// The message that is due.
    fn hear<M: wire::Control>(&mut self) -> Result<M> {
        match self.reader.expect() {
            Ok(message) => Ok(message),
            Err(error) => Err(self.link.explain(error)),
        }
    }

    fn untouched(&mut self, error: Error) -> Failed {
        self.abort(&error);
        Failed::untouched(error)
    }

    fn running(&mut self, error: Error) -> Failed {
        self.abort(&error);
        Failed { error, now: Now::Running }
    }

    fn abort(&mut self, error: &Error) {
        // It notices the end of the connection, too.
        let _ = self.mouth.say(&super::wire::message::Abort { reason: error.to_string() });
    }

    /// Offers the container and answers what the destination asks until it accepts.
    fn verify(&mut self, subject: &Subject, options: &Options) -> Result<Accept> {
        (self.observer)(Event::Phase { phase: Phase::Verify });
        let leaving = &subject.leaving;
        self.mouth.say(&subject.offer(options)?)?;
        self.mouth.writer().send_image("config.json", &leaving.config()?)?;
        self.mouth.writer().flush()?;
        let mut found = Vec::new();
        let accept = loop {
            match self.reader.recv() {
                Ok(Message::Ping(Ping { sent })) => {
                    let (monotonic, boottime) = leaving.clocks();
                    let realtime = clock::realtime() as i64;
                    let (monotonic, boottime) = (monotonic as i64, boottime as i64);
                    self.mouth.say(&Pong { sent, monotonic, boottime, realtime })?;
                }
                Ok(Message::Findings(Findings { list })) => {
                    list.iter().for_each(|f| (self.observer)(f.into()));
                    found.extend(list);
                }
                Ok(Message::Accept(accept)) => break accept,
                Ok(Message::Refuse(_)) if found.iter().any(|f| f.blocks) => return Err(Error::Refused(found)),
                Ok(Message::Refuse(Refuse { reason })) => return Err(Error::Other(reason)),
                Ok(other) => {
                    other.expect::<Accept>()?;
                }
                Err(e) => return Err(self.link.explain(e)),
            }
        };
        (self.observer)(Event::Verified { blocks: 0, warns: found.len() as u32 });
        Ok(accept)
    }

    /// All that is sent before memory: an image, the first copy of file systems.
    fn prepare(&mut self, subject: &mut Subject, accept: &Accept) -> Result<()> {
        (self.observer)(Event::Phase { phase: Phase::Prepare });
        if subject.has_engine() {
            if let Some(known) = accept.known_layers {
                subject.send_image(known as usize, self.mouth.writer())?;
            }
            self.await_engine()?;
        }
        if accept.disk {
            self.mouth.send_disk(subject.roots(&accept.volumes)?)?;
            self.mouth.writer().flush()?;
        }
        if subject.has_engine() {
            self.await_engine()?;
        }
        Ok(())
    }

    /// Until the destination's engine has done its part.
    fn await_engine(&mut self) -> Result<()> {
        match self.reader.recv() {
            Ok(message) => Ok(message.expect_engine().map(drop)?),
            Err(e) => Err(self.link.explain(e)),
        }
    }

    /// The addresses that move with the container.
    fn send_addresses(&mut self, leaving: &Leaving) -> Result<()> {
        self.network = network::Leaving::of(leaving.init(), &leaving.pids()?)?;
        let Some(network) = &self.network else { return Ok(()) };
        Ok(self.mouth.writer().send_network(&network.addresses())?)
    }

    fn pre_copy(
        &mut self,
        departure: &mut Departure,
        leaving: &Leaving,
        missing: &mut Vec<(PagesOf, Span)>,
        options: &Options,
    ) -> Result<()> {
        (self.observer)(Event::Phase { phase: Phase::PreCopy });
        let mut brake: Option<Box<dyn Brake>> = match leaving.throttle() {
            Ok(throttle) => Some(Box::new(throttle)),
            Err(error) => {
                tracing::debug!(%error, "the container cannot be throttled");
                None
            }
        };
        let mut throttle = 100;
        // There is no post-copy yet.
        let rule = stop::Rule { post_copy: false, ..options.rule(brake.is_some()) };
        let mut rounds: Vec<stop::Round> = Vec::new();
        loop {
            let begun = Instant::now();
            self.rounds += 1;
            let before = self.mouth.sent();
            self.mouth.say(&Round { number: self.rounds, last: false })?;
            let mut out = Watched {
                mouth: &mut self.mouth,
                observer: self.observer,
                now: events::Progress {
                    round: self.rounds,
                    dirty_pages_per_second: rounds
                        .last()
                        .filter(|_| rounds.len() > 1)
                        .map_or(0, |r| stop::rate(r) as u64),
                    expected_downtime_us: if rounds.is_empty() { 0 } else { micros(stop::expected(&rounds)) },
                    ..events::Progress::default()
                },
                told: (begun, before.0),
                urgency: &self.urgency,
            };
            self.urgency.urgent();
            let sent = departure.round(missing, &mut out)?;
            self.mouth.say(&RoundEnd { number: self.rounds })?;
            let done: RoundDone = self.hear()?;
            *missing = lacking(&done)?;
            self.pages += sent.pages_sent;
            let after = self.mouth.sent();
            let interval = rounds.last().map_or(Duration::ZERO, |last| last.took);
            let took = begun.elapsed();
            rounds.push(stop::Round {
                pages: sent.pages_sent,
                interval,
                took,
                sending: took.saturating_sub(sent.frozen),
                fixed: sent.collecting * 4,
                throttle,
            });
            let decision = stop::decide(&rule, &rounds);
            let last = rounds[rounds.len() - 1];
            (self.observer)(Event::Round(events::Round {
                round: self.rounds,
                last: false,
                pages: sent.pages_sent,
                skipped: after.1 - before.1,
                bytes: after.0 - before.0,
                duration_us: micros(took),
                frozen_us: micros(sent.frozen),
                // Nobody knows of the first round what was written.
                dirty_pages_per_second: if rounds.len() > 1 { stop::rate(&last) as u64 } else { 0 },
                expected_downtime_us: micros(stop::expected(&rounds)),
                decision: decision.to_string(),
            }));
            match decision {
                stop::Decision::Another => {}
                stop::Decision::GiveUp { why } => return Err(Error::Other(why)),
                stop::Decision::Throttle(percent) => {
                    if let Some(brake) = brake.take().or_else(|| departure.brake()) {
                        (self.observer)(Event::Throttle { percent });
                        departure.slow(brake, percent)?;
                    }
                    throttle = percent;
                }
                stop::Decision::Freeze | stop::Decision::PostCopy => return Ok(()),
            }
        }
    }

    /// The last round. When this returns, the destination has all and stands still, too.
    fn freeze(
        &mut self,
        departure: &mut Departure,
        leaving: &Leaving,
        missing: &[(PagesOf, Span)],
    ) -> Result<Standing> {
        (self.observer)(Event::Phase { phase: Phase::Freeze });
        self.link.patience.set(FREEZE_PATIENCE);
        self.rounds += 1;
        let number = self.rounds;
        if let Some(network) = &mut self.network {
            network.prepare()?;
            network.tracked()?.iter().try_for_each(|word| self.mouth.writer().send_network(word))?;
        }
        let (begun, before) = (Instant::now(), self.mouth.sent());
        let mut parts = Parts::begin();
        self.urgency.urgent();
        let mut stopped = departure.stop(&leaving.extra_files())?;
        self.mouth.say(&Round { number, last: true })?;
        parts.end("freeze and collect");
        self.mouth.freeze();
        stopped.send(missing, &mut self.mouth)?;
        parts.end("send memory");
        loop {
            self.mouth.say(&RoundEnd { number })?;
            let done: RoundDone = self.hear()?;
            let lacks = lacking(&done)?;
            if lacks.is_empty() {
                break;
            }
            stopped.send_missing(&lacks, &mut self.mouth)?;
        }
        parts.end("land memory");
        self.network.as_mut().map_or(Ok(()), network::Leaving::hush)?;
        let held = stopped.lock(&mut self.mouth)?;
        parts.end("connections");
        let _: Ready = self.hear()?;
        parts.end("complete");
        let (sent, after) = (held.sent(), self.mouth.sent());
        self.pages += sent.pages_sent;
        (self.observer)(Event::Round(events::Round {
            round: number,
            last: true,
            pages: sent.pages_sent,
            skipped: after.1 - before.1,
            bytes: after.0 - before.0,
            duration_us: micros(begun.elapsed()),
            frozen_us: micros(sent.frozen),
            dirty_pages_per_second: 0,
            expected_downtime_us: micros(sent.frozen),
            decision: "hand over".into(),
        }));
        Ok(Standing { held, parts })
    }

    /// What has come for the container since it was silenced.
    fn send_frames(&mut self) -> Result<()> {
        let frames = self.network.as_ref().map_or(Ok(None), network::Leaving::frames)?;
        Ok(frames.map_or(Ok(()), |frames| self.mouth.writer().send_network(&frames))?)
    }

    /// The right to run is ours again, and the container runs.
    fn taken_back(&mut self, mut held: Held, leaving: &Leaving, error: Error) -> Failed {
        if let Some(Err(error)) = self.network.as_mut().map(network::Leaving::take_back) {
            (self.observer)(Event::Warning { text: format!("the container is not heard: {error}") });
        }
        let thawed = held.take_back().map_err(Error::from).and_then(|()| Ok(Note::remove(&leaving.dir())?));
        if let Err(error) = thawed {
            (self.observer)(Event::Warning { text: error.to_string() });
        }
        self.running(error)
    }

    /// From `Ready` to the end of the container here.
    fn hand_over(
        &mut self,
        standing: Standing,
        subject: &mut Subject,
        destination: &Destination,
        options: &Options,
    ) -> std::result::Result<Summary, Failed> {
        (self.observer)(Event::Phase { phase: Phase::Handover });
        interrupt::refuse();
        let Standing { mut held, mut parts } = standing;
        let leaving = &subject.leaving;
        let freezer = leaving.freezer();
        let id = leaving.state().id.clone();
        let note = Note {
            token: self.token.clone(),
            destination: destination.to_string(),
            container: subject.name.clone(),
            keep_source: options.keep_source,
        };
        // The note first: a container that is frozen says why.
        let given_up = note.write(&leaving.dir()).map_err(Error::from).and_then(|()| Ok(held.give_up(freezer)?));
        let given_up = given_up.and_then(|()| Ok(self.network.as_mut().map_or(Ok(()), network::Leaving::give_up)?));
        if let Err(error) = given_up {
            return Err(self.taken_back(held, leaving, error));
        }
        parts.end("give up");
        let answer = self.send_frames().and_then(|()| self.mouth.say(&Commit {})).and_then(|()| {
            if let Some(command) = &options.on_commit {
                run_hook(command, &id)?;
            }
            self.hear::<Running>()
        });
        let running = match answer {
            Ok(running) => running,
            Err(error) => match settle::Question::ask(destination, &self.token) {
                Ok((question, Verdict::Running)) => {
                    (self.observer)(Event::Warning {
                        text: format!("the end of the move had to be asked for: {error}"),
                    });
                    question.done();
                    Running::default()
                }
                Ok((_, Verdict::Aborted)) => return Err(self.taken_back(held, leaving, error)),
                Err(unanswered) => {
                    (self.observer)(Event::Warning { text: format!("the destination cannot be asked: {unanswered}") });
                    held.leave();
                    if let Some(network) = self.network.take() {
                        network.keep_silent();
                    }
                    let settle = format!("lmrun migrate --settle {}", subject.name);
                    return Err(Failed { error, now: Now::Frozen { settle } });
                }
            },
        };
        parts.end("commit");
        let sent = held.sent();
        let frozen = sent.frozen;
        let moved = Event::Phase { phase: Phase::Cleanup };
        (self.observer)(moved);
        if let Err(error) = subject.end(held, options.keep_source) {
            (self.observer)(Event::Warning { text: format!("cannot end the container here: {error}") });
        }
        // Whatever has come meanwhile.
        let _ = self.send_frames().and_then(|()| self.mouth.say(&Done {}));
        if let Some(network) = self.network.take() {
            network.keep_silent();
        }
        let mut downtime = parts.all;
        downtime.extend(running.parts.into_iter().map(|p: Part| events::Part { name: p.name, us: p.micros }));
        Ok(Summary {
            total_us: 0,
            downtime_us: micros(frozen),
            downtime,
            rounds: self.rounds,
            pages: self.pages,
            bytes: self.mouth.sent().0,
        })
    }
}

/// Tells how far a round is.
struct Watched<'a> {
    mouth: &'a mut Mouth<Output>,
    observer: Observer<'a>,
    now: events::Progress,
    /// When, and how many bytes had been sent by then.
    told: (Instant, u64),
    urgency: &'a Urgency,
}

impl Watched<'_> {
    const EVERY: Duration = Duration::from_millis(100);

    fn tell(&mut self) {
        let (then, bytes) = self.told;
        let since = then.elapsed();
        if since >= Watched::EVERY {
            let sent = self.mouth.sent().0;
            self.now.bytes_per_second = ((sent - bytes) as f64 / since.as_secs_f64()) as u64;
            (self.observer)(Event::Progress(self.now));
            self.told = (Instant::now(), sent);
        }
    }
}

impl Outlet for Watched<'_> {
    fn files(&mut self, busy: &[BusyFile]) -> io::Result<()> {
        // It has been looked at, and runs again.
        self.urgency.bulk();
        self.mouth.files(busy)
    }

    fn images(&mut self, dir: &Path) -> io::Result<()> {
        self.mouth.images(dir)
    }

    fn present(&mut self, of: PagesOf, spans: &[Span]) -> io::Result<()> {
        self.now.total += spans.iter().map(|span| span.pages).sum::<u64>();
        self.mouth.present(of, spans)
    }

    fn pages(&mut self, of: PagesOf, vaddr: u64, bytes: &[u8]) -> io::Result<()> {
        self.mouth.pages(of, vaddr, bytes)?;
        self.now.done += bytes.len() as u64 / PAGE_SIZE;
        self.tell();
        Ok(())
    }
}

/// Runs a command of the user's by sh(1).
fn run_hook(command: &str, id: &str) -> Result<()> {
    let status = std::process::Command::new("/bin/sh").arg("-c").arg(command).env("LMRUN_CONTAINER", id).status();
    match status {
        Ok(status) if status.success() => {}
        Ok(status) => tracing::warn!("--on-commit: {status}"),
        Err(error) => tracing::warn!(%error, "--on-commit"),
    }
    Ok(())
}

/// A container that stands still here and is complete there.
struct Standing {
    held: Held,
    parts: Parts,
}

fn lacking(done: &RoundDone) -> Result<Vec<(PagesOf, Span)>> {
    let each = |lack: &Lack| Ok((lack.of.try_into()?, Span { vaddr: lack.extent.vaddr, pages: lack.extent.pages }));
    done.missing.iter().map(each).collect()
}
