//! All that can happen to both machines: every interleaving, messages that are lost in either direction or come late, crashes
//! between any two actions, actions that fail, and people who settle from either side.

use std::collections::{HashSet, VecDeque};

use super::destination::{self, Destination};
use super::settle::{AtSource, Entry, Next, at_destination, at_source};
use super::source::{self, Source};
use super::{Verdict, destination::Action as D, source::Action as S};

/// What one end tells the other one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Said {
    // By the source.
    All,
    Commit,
    Done,
    // By the destination.
    Ready,
    Running,
    // By either.
    Abort,
}

/// One direction of the connection.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
struct Way {
    under_way: VecDeque<Said>,
    /// Nothing gets through any more.
    cut: bool,
}

impl Way {
    fn say(&mut self, said: Said) {
        if !self.cut {
            self.under_way.push_back(said);
        }
    }
}

/// What stands by at the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Standby {
    None,
    /// Dies with the destination's process.
    Held,
    Detached {
        frozen: bool,
    },
}

/// A process that carries out a role: its state, and the actions that are still to be done.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Process<State, Action> {
    state: State,
    to_do: VecDeque<Action>,
}

/// Who waits for an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Asker {
    Source,
    /// A person at the source.
    Operator,
    /// A person at the destination.
    Nobody,
}

/// A process at the destination that settles: what it has to do, and what to answer then.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Settler {
    to_do: VecDeque<D>,
    asker: Asker,
    /// None: it has not looked yet.
    answer: Option<Verdict>,
}

/// A person's `--settle` at the source.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Operator {
    to_do: VecDeque<S>,
    waits: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct World {
    source: Option<Process<Source, S>>,
    /// The source's container: alive, frozen by its cgroup, held by ptrace.
    alive: bool,
    frozen: bool,
    held: bool,
    note: bool,
    destination: Option<Process<Destination, D>>,
    standby: Standby,
    entry: Entry,
    /// What is on the disk for sure.
    synced: Entry,
    to_source: Way,
    to_destination: Way,
    settlers: Vec<Settler>,
    operator: Option<Operator>,
    rebooted: bool,
    /// How many more crashes of processes, settlings by hand, and reboots of the destination there may be.
    crashes: u8,
    settlings: u8,
    reboots: u8,
}

impl World {
    fn new(crashes: u8, settlings: u8, reboots: u8) -> World {
        World {
            source: Some(Process { state: Source::Copying, to_do: VecDeque::new() }),
            alive: true,
            frozen: false,
            held: false,
            note: false,
            destination: Some(Process { state: Destination::Receiving, to_do: VecDeque::new() }),
            standby: Standby::Held,
            entry: Entry::Open,
            synced: Entry::Open,
            to_source: Way::default(),
            to_destination: Way::default(),
            settlers: Vec::new(),
            operator: None,
            rebooted: false,
            crashes,
            settlings,
            reboots,
        }
    }

    fn runs_at_source(&self) -> bool {
        self.alive && !self.frozen && !self.held
    }

    fn runs_at_destination(&self) -> bool {
        self.standby == Standby::Detached { frozen: false }
    }

    /// What must hold at any time.
    fn check(&self) {
        let (here, there) = (self.runs_at_source(), self.runs_at_destination());
        assert!(!(here && there), "two run: {self:#?}");
        assert!(self.alive || there || self.rebooted, "lost: {self:#?}");
        // Silence is explained: somebody is at work, or the container is frozen and the note says why.
        let said = self.note && self.frozen && self.alive;
        assert!(here || there || self.rebooted || self.source.is_some() || said, "none without a word: {self:#?}");
        assert!(self.entry != Entry::Running || !here, "decided, and runs at the source: {self:#?}");
    }

    /// The source's process hears of something.
    fn source_hears(&mut self, event: source::Event) {
        let Some(process) = &mut self.source else { return };
        let (state, actions) = process.state.on(event);
        if event == source::Event::Failed {
            // It does not listen any more.
            self.to_source = Way { cut: true, ..Way::default() };
            process.to_do.clear();
        }
        process.state = state;
        process.to_do.extend(actions);
    }

    fn destination_hears(&mut self, event: destination::Event) {
        let Some(process) = &mut self.destination else { return };
        let (state, actions) = process.state.on(event);
        if event == destination::Event::Failed {
            self.to_destination = Way { cut: true, ..Way::default() };
            process.to_do.clear();
        }
        process.state = state;
        process.to_do.extend(actions);
    }

    /// An action at the source, by its process or by a person.
    fn act_at_source(&mut self, action: S, by: Asker) {
        match action {
            S::WriteNote => self.note = true,
            S::RemoveNote => self.note = false,
            S::FreezeCgroup => self.frozen = true,
            S::ThawCgroup => self.frozen = false,
            S::Release => self.held = false,
            S::SayCommit => {
                assert!(self.note && self.frozen, "committed without having given up: {self:#?}");
                self.to_destination.say(Said::Commit);
            }
            S::SayAbort => self.to_destination.say(Said::Abort),
            S::SayDone if by == Asker::Source => self.to_destination.say(Said::Done),
            // On the connection of the question; the settler removes the entry, if it gets there.
            S::SayDone => {}
            S::EndContainer => {
                let known = self.synced == Entry::Running || self.entry == Entry::Gone;
                assert!(
                    self.runs_at_destination() || self.rebooted && known,
                    "ended, and does not run there: {self:#?}"
                );
                (self.alive, self.held) = (false, false);
            }
            S::Ask => self.settlers.push(Settler { to_do: VecDeque::new(), asker: by, answer: None }),
        }
    }

    /// An action at the destination. Gives what its process hears of it.
    fn act_at_destination(&mut self, action: D) -> Option<destination::Event> {
        match action {
            D::SayReady => self.to_source.say(Said::Ready),
            D::SayRunning => {
                assert!(self.runs_at_destination(), "{self:#?}");
                self.to_source.say(Said::Running);
            }
            D::SayAbort => {
                assert!(self.entry != Entry::Running, "{self:#?}");
                self.to_source.say(Said::Abort);
            }
            D::Detach => self.standby = Standby::Detached { frozen: true },
            D::DecideRunning => {
                assert_eq!(self.standby, Standby::Detached { frozen: true });
                let first = self.entry == Entry::Open;
                if first {
                    self.entry = Entry::Running;
                }
                return Some(destination::Event::Decided(first));
            }
            D::DecideAborted => {
                assert_ne!(self.entry, Entry::Running, "only the process itself decides that: {self:#?}");
                self.entry = if self.entry == Entry::Open { Entry::Aborted } else { self.entry };
                return Some(destination::Event::Decided(true));
            }
            D::SyncEntry => self.synced = self.entry,
            // It has gone with the host.
            D::Thaw if self.rebooted => {}
            D::Thaw => {
                assert!(matches!(self.standby, Standby::Detached { .. }), "{self:#?}");
                assert!(self.entry == Entry::Running || self.runs_at_destination(), "{self:#?}");
                self.standby = Standby::Detached { frozen: false };
            }
            D::Unmake => {
                assert!(!self.runs_at_destination(), "unmade while it runs: {self:#?}");
                self.standby = Standby::None;
            }
            D::RemoveEntry => self.entry = Entry::Gone,
        }
        None
    }

    fn crash_of_source(&mut self) {
        self.source = None;
        self.held = false;
        self.to_source.cut = true;
    }

    fn crash_of_destination(&mut self) {
        self.destination = None;
        self.to_destination.cut = true;
        if self.standby == Standby::Held {
            self.standby = Standby::None;
        }
    }

    fn facts(&self) -> AtSource {
        AtSource { note: self.note, frozen: self.frozen, alive: self.alive }
    }

    /// Everything that can happen next.
    fn next(&self) -> Vec<World> {
        let mut all = Vec::new();
        let mut or = |change: &dyn Fn(&mut World)| {
            let mut world = self.clone();
            change(&mut world);
            all.push(world);
        };
        self.source_goes_on(&mut or);
        self.destination_goes_on(&mut or);
        self.settlers_go_on(&mut or);
        self.operator_goes_on(&mut or);
        // A direction of the connection is cut, with all that is under way there.
        if !self.to_source.cut {
            or(&|w| w.to_source = Way { cut: true, ..Way::default() });
        }
        if !self.to_destination.cut {
            or(&|w| w.to_destination = Way { cut: true, ..Way::default() });
        }
        if self.crashes > 0 {
            if self.source.is_some() {
                or(&|w| (w.crashes -= 1, w.crash_of_source()).1);
            }
            if self.destination.is_some() {
                or(&|w| (w.crashes -= 1, w.crash_of_destination()).1);
            }
            for at in 0..self.settlers.len() {
                or(&|w| (w.crashes -= 1, drop(w.settlers.remove(at))).1);
            }
            if self.operator.is_some() {
                or(&|w| (w.crashes -= 1, w.operator = None).1);
            }
        }
        if self.reboots > 0 {
            or(&|w| {
                w.reboots -= 1;
                w.crash_of_destination();
                (w.standby, w.rebooted) = (Standby::None, true);
                w.settlers.clear();
            });
            // What was not synced may be there or not.
            or(&|w| {
                w.reboots -= 1;
                w.crash_of_destination();
                (w.standby, w.entry, w.rebooted) = (Standby::None, w.synced, true);
                w.settlers.clear();
            });
        }
        all
    }

    fn source_goes_on(&self, or: &mut impl FnMut(&dyn Fn(&mut World))) {
        let Some(process) = &self.source else { return };
        if process.state.is_end() && process.to_do.is_empty() {
            return or(&World::crash_of_source);
        }
        if let Some(&action) = process.to_do.front() {
            or(&|w| {
                w.source.as_mut().expect("it acts").to_do.pop_front();
                w.act_at_source(action, Asker::Source);
            });
            // It may fail instead; what is said after that is the end's affair.
            if matches!(action, S::WriteNote | S::FreezeCgroup | S::SayCommit | S::Ask) {
                or(&|w| w.source_hears(source::Event::Failed));
            }
            return;
        }
        match process.state {
            Source::Copying => or(&|w| {
                w.held = true;
                w.source_hears(source::Event::Frozen);
                w.to_destination.say(Said::All);
            }),
            Source::GivingUp => or(&|w| w.source_hears(source::Event::GivenUp)),
            _ => {}
        }
        if process.state != Source::Asking
            && let Some(&said) = self.to_source.under_way.front()
        {
            or(&|w| {
                w.to_source.under_way.pop_front();
                w.source_hears(match said {
                    Said::Ready => source::Event::Ready,
                    Said::Running => source::Event::Running,
                    Said::Abort => source::Event::Aborted,
                    _ => unreachable!("not said by a destination"),
                });
            });
        }
        // Silence, a lost connection, Ctrl-C.
        or(&|w| w.source_hears(source::Event::Failed));
    }

    fn destination_goes_on(&self, or: &mut impl FnMut(&dyn Fn(&mut World))) {
        let Some(process) = &self.destination else { return };
        if process.state.is_end() && process.to_do.is_empty() {
            return or(&World::crash_of_destination);
        }
        if let Some(&action) = process.to_do.front() {
            or(&|w| {
                w.destination.as_mut().expect("it acts").to_do.pop_front();
                if let Some(event) = w.act_at_destination(action) {
                    w.destination_hears(event);
                }
            });
            if action == D::Detach {
                or(&|w| w.destination_hears(destination::Event::Failed));
            }
            return;
        }
        if let Some(&said) = self.to_destination.under_way.front() {
            or(&|w| {
                w.to_destination.under_way.pop_front();
                w.destination_hears(match said {
                    Said::All => destination::Event::Complete,
                    Said::Commit => destination::Event::Commit,
                    Said::Abort => destination::Event::Abort,
                    Said::Done => destination::Event::Done,
                    _ => unreachable!("not said by a source"),
                });
            });
        }
        or(&|w| w.destination_hears(destination::Event::Failed));
    }

    fn settlers_go_on(&self, or: &mut impl FnMut(&dyn Fn(&mut World))) {
        if self.settlings > 0 && self.settlers.is_empty() {
            or(&|w| {
                w.settlings -= 1;
                w.settlers.push(Settler { to_do: VecDeque::new(), asker: Asker::Nobody, answer: None });
            });
        }
        for (at, settler) in self.settlers.iter().enumerate() {
            or(&|w| match (settler.to_do.front(), settler.answer) {
                (_, None) => {
                    if w.entry == Entry::Open {
                        w.entry = Entry::Aborted;
                    }
                    let (actions, verdict) = at_destination(w.entry, w.destination.is_some());
                    w.settlers[at].to_do = actions.into();
                    w.settlers[at].answer = Some(verdict);
                }
                (Some(&action), _) => {
                    w.settlers[at].to_do.pop_front();
                    w.act_at_destination(action);
                }
                (None, Some(verdict)) => {
                    w.settlers.remove(at);
                    match settler.asker {
                        Asker::Source if w.source.as_ref().is_some_and(|p| p.state == Source::Asking) => {
                            w.source_hears(source::Event::Verdict(verdict));
                        }
                        Asker::Operator if w.operator.as_ref().is_some_and(|o| o.waits) => {
                            w.operator = Some(Operator { to_do: at_source(verdict).into(), waits: false });
                        }
                        _ => {}
                    }
                }
            });
        }
    }

    /// A person settles at the source, where the lock keeps everybody else out.
    fn operator_goes_on(&self, or: &mut impl FnMut(&dyn Fn(&mut World))) {
        let Some(operator) = &self.operator else {
            if self.source.is_none() && self.settlings > 0 {
                or(&|w| {
                    w.settlings -= 1;
                    w.operator = Some(match w.facts().begin() {
                        Next::Do(actions) => Operator { to_do: actions.into(), waits: false },
                        Next::Ask => Operator { to_do: [S::Ask].into(), waits: true },
                    });
                });
            }
            return;
        };
        match operator.to_do.front() {
            Some(&action) => or(&|w| {
                w.operator.as_mut().expect("it acts").to_do.pop_front();
                w.act_at_source(action, Asker::Operator);
            }),
            None => or(&|w| w.operator = None), // it is done, or waits no longer
        }
    }

    /// Goes on with what `goes_on` can do first, until nothing is left.
    fn run(mut self, goes_on: impl Fn(&World, &mut dyn FnMut(&dyn Fn(&mut World)))) -> World {
        loop {
            let mut next = None;
            goes_on(&self, &mut |change| {
                if next.is_none() {
                    let mut world = self.clone();
                    change(&mut world);
                    next = Some(world);
                }
            });
            match next {
                Some(world) => self = world,
                None => return self,
            }
            self.check();
        }
    }

    /// What a person gets who settles now, in peace: first at the source, then, for what is left over, at the destination.
    fn settled(&self) -> World {
        let mut world = self.clone();
        world.crash_of_source();
        world.operator = None;
        world.settlings = 1;
        let world = world.run(|w, mut or| {
            let waits = w.operator.as_ref().is_some_and(|o| o.waits && o.to_do.is_empty());
            w.settlers_go_on(&mut |change| {
                if !w.settlers.is_empty() {
                    or(change)
                }
            });
            if !waits {
                w.operator_goes_on(&mut or);
            }
        });
        let world = world.run(|w, mut or| w.destination_goes_on(&mut or));
        World { settlings: 1, ..world }.run(|w, mut or| w.settlers_go_on(&mut or))
    }
}

/// Goes through everything that can come of `first`; gives the number of worlds.
fn explore(first: World) -> usize {
    let mut seen = HashSet::from([first.clone()]);
    let mut open = vec![first];
    while let Some(world) = open.pop() {
        world.check();
        rolls_back(&world);
        settles(&world);
        for next in world.next() {
            if seen.insert(next.clone()) {
                open.push(next);
            }
        }
    }
    seen.len()
}

/// A source that has not committed and fails runs on by its own doing alone.
fn rolls_back(world: &World) {
    let Some(process) = &world.source else { return };
    if process.state.has_committed() || process.state.is_end() || !process.to_do.is_empty() {
        return;
    }
    let mut world = world.clone();
    world.source_hears(source::Event::Failed);
    let after = world.run(|w, mut or| w.source_goes_on(&mut or));
    assert!(after.runs_at_source() && !after.note, "does not roll back: {after:#?}");
}

/// Where the source's process is gone, settling leaves exactly one that runs, and nothing else.
fn settles(world: &World) {
    if world.source.is_some() || world.operator.is_some() || !world.settlers.is_empty() {
        return;
    }
    let after = world.settled();
    let (here, there) = (after.runs_at_source(), after.runs_at_destination());
    // With the host that it had moved to it has gone.
    let gone = after.rebooted && !after.alive;
    assert!(here != there || gone, "not settled: {after:#?}");
    assert!(!after.note && after.alive == here, "left behind: {after:#?}");
    assert!(!here || (after.standby == Standby::None && after.entry == Entry::Gone), "left behind: {after:#?}");
}

#[test]
fn one_runs_whatever_happens() {
    let worlds = explore(World::new(2, 2, 0));
    println!("{worlds} worlds");
    assert!(worlds > 10_000, "{worlds}");
}

#[test]
fn a_destination_may_lose_power() {
    let worlds = explore(World::new(1, 1, 1));
    println!("{worlds} worlds");
    assert!(worlds > 10_000, "{worlds}");
}

#[test]
fn without_faults_it_is_moved_and_nothing_is_left() {
    let mut world = World::new(0, 0, 0);
    let fault_free = |w: &World| {
        let mut next = None;
        let mut first = |change: &dyn Fn(&mut World)| {
            if next.is_none() {
                let mut world = w.clone();
                change(&mut world);
                next = Some(world);
            }
        };
        // Whoever has something to do or to hear goes on; the first choice of each is no fault.
        let waits = |state: &Process<Source, S>| {
            let moves = matches!(state.state, Source::Copying | Source::GivingUp) || state.state.is_end();
            state.to_do.is_empty() && w.to_source.under_way.is_empty() && !moves
        };
        if !w.source.as_ref().is_some_and(waits) {
            w.source_goes_on(&mut first);
        }
        let idle = |p: &Process<Destination, D>| {
            p.to_do.is_empty() && w.to_destination.under_way.is_empty() && !p.state.is_end()
        };
        if !w.destination.as_ref().is_some_and(idle) {
            w.destination_goes_on(&mut first);
        }
        next
    };
    while let Some(next) = fault_free(&world) {
        world = next;
        world.check();
    }
    assert!(world.runs_at_destination() && !world.alive && !world.note);
    assert!(world.source.is_none() && world.destination.is_none());
    assert_eq!(world.entry, Entry::Gone);
}
