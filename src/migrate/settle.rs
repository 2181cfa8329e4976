//! What became of a migration: asked by a source that has not heard the end, or by a person on either host; answered at the
//! destination. What follows from it is in [`handover::settle`].

use super::engines::Agent;
use super::handover::settle::{AtSource, Entry, Next, at_destination, at_source};
use super::handover::{Verdict, destination, source};
use super::ledger::{self, Arrival, ByEngine, Incoming, Note};
use super::subject::Owner;
use super::transport::{self, Channel};
use super::wire::message::{self, Done, Hello, Settle};
use super::{Container, Destination, Error, Failed, Now, Result, network};
use crate::engine;
use crate::runtime::{self, Status, Store, departure};

/// A connection on which the destination was asked.
pub struct Question(Channel);

impl Question {
    /// Asks what became of a migration. If it was not decided, it is aborted by that.
    pub fn ask(destination: &Destination, token: &str) -> Result<(Question, Verdict)> {
        let mut channel = transport::connect(destination, &[], None)?;
        let verdict = (|| {
            channel.writer.say(&Hello::of(token))?;
            channel.reader.expect::<Hello>()?;
            channel.writer.say(&Settle {})?;
            channel.reader.expect::<message::Verdict>()
        })();
        match verdict {
            Ok(message::Verdict { running: true }) => Ok((Question(channel), Verdict::Running)),
            Ok(message::Verdict { running: false }) => Ok((Question(channel), Verdict::Aborted)),
            Err(error) => Err(channel.link.explain(error)),
        }
    }

    /// Tells the destination that nobody will ask again.
    pub fn done(mut self) {
        // If it does not hear of it, a small file stays there.
        let _ = self.0.writer.say(&Done {});
    }
}

/// Settles the migration of a container at the source. Gives the result in words.
///
/// # Errors
/// What stands in the way, and how the container is.
pub fn here(store: &Store, container: &Container) -> std::result::Result<String, Failed> {
    let mut owner = Owner::find(container).map_err(Failed::untouched)?;
    let (store, id) = owner.as_ref().map_or((store.clone(), container.name().to_owned()), Owner::place);
    let (store, id) = (&store, id.as_str());
    let dir = store.dir(id);
    let again = Now::Frozen { settle: format!("lmrun migrate --settle {container}") };
    let frozen = |error: Error| Failed { error, now: again.clone() };
    let Some(note) = Note::read(&dir).map_err(Failed::untouched)? else {
        return Err(Failed::untouched(Error::Other(format!("no migration of {container} waits to be settled"))));
    };
    let _alone = departure::alone(store, id).map_err(Failed::untouched)?;
    let state = store.load(id).map_err(Failed::untouched)?;
    let status = runtime::status(&state);
    let facts = AtSource { note: true, frozen: status == Status::Paused, alive: status != Status::Stopped };
    let mut act = |actions: &[source::Action]| {
        actions.iter().try_for_each(|action| carry_out(store, id, owner.as_mut(), &note, *action))
    };
    if let Next::Do(actions) = facts.begin() {
        act(&actions).map_err(Failed::untouched)?;
        if !facts.alive
            && let Ok(destination) = note.destination.parse()
            && let Ok((question, _)) = Question::ask(&destination, &note.token)
        {
            // It need not remember what became of it any longer.
            question.done();
        }
        return Ok(match facts.alive {
            true => format!("container {container} runs here: its migration did not get as far as to be in doubt"),
            false => format!("container {container} has ended here"),
        });
    }
    let destination: Destination = note.destination.parse().map_err(|e: transport::Error| frozen(e.into()))?;
    let (question, verdict) = Question::ask(&destination, &note.token).map_err(frozen)?;
    act(&at_source(verdict)).map_err(frozen)?;
    question.done();
    Ok(match verdict {
        Verdict::Running => format!("container {container} runs at {destination}, and was ended here"),
        Verdict::Aborted => format!("container {container} did not come to run at {destination}, and runs on here"),
    })
}

fn carry_out(store: &Store, id: &str, owner: Option<&mut Owner>, note: &Note, action: source::Action) -> Result<()> {
    use source::Action::*;
    if let (EndContainer, Some(owner)) = (action, owner) {
        let init = match departure::init(store, id) {
            // Its engine knows already.
            Err(runtime::Error::NotRunning) => return Ok(()),
            init => init?,
        };
        let mut killed = Ok(());
        owner.retire(note.keep_source, init, || killed = departure::kill(store, id))?;
        return Ok(killed?);
    }
    match action {
        EndContainer if note.keep_source => Ok(departure::kill(store, id)?),
        EndContainer => Ok(departure::end(store, id)?),
        ThawCgroup => {
            network::hear_again(departure::init(store, id)?)?;
            engine::take_back(departure::init(store, id)?, id)?;
            Ok(departure::thaw(store, id)?)
        }
        RemoveNote => Ok(Note::remove(&store.dir(id))?),
        // Done is said by whoever holds the connection; nothing else is settled by.
        _ => Ok(()),
    }
}

/// Settles a migration at the destination: decides it if nobody has, and finishes or removes what a process that is gone has left.
pub fn there(incoming: &Incoming, token: &str) -> Result<Verdict> {
    use destination::Action::*;
    let (mut entry, arrival) = incoming.look(token)?;
    if entry == Entry::Open {
        let aborted = incoming.decide(token, Verdict::Aborted)?;
        entry = if aborted { Entry::Aborted } else { Entry::Running };
    }
    let process = arrival.as_ref().is_some_and(|arrival| !arrival.is_orphaned());
    let (actions, verdict) = at_destination(entry, process);
    let by_engine = incoming.by_engine(token)?;
    for action in actions {
        if let Some(made) = by_engine.as_ref().filter(|_| matches!(action, Thaw | Unmake)) {
            settle_with_engine(made, action, process)?;
            continue;
        }
        match (action, &arrival) {
            (Thaw, Some(arrival)) => {
                on_own(arrival, departure::set_going)?;
                speak(arrival)?;
            }
            (Unmake, Some(arrival)) => {
                on_own(arrival, |store, id| runtime::delete(store, id, true))?;
                unmake_directory(arrival)?;
            }
            (SyncEntry, _) => incoming.sync()?,
            (RemoveEntry, _) => incoming.remove(token)?,
            _ => {}
        }
    }
    if let Some(arrival) = arrival.filter(|_| !process) {
        unmake_records(&arrival, token)?;
    }
    Ok(verdict)
}

/// What is to be done to a container that an engine has made for it; `process`: its receiver is alive.
fn settle_with_engine(made: &ByEngine, action: destination::Action, process: bool) -> Result<()> {
    let (store, id) = (Store::new(&made.root), &made.prepared.id);
    match action {
        destination::Action::Unmake => Ok(Agent::spawn()?.remove(&made.container, &made.prepared)?),
        _ => {
            departure::set_going(&store, id)?;
            if process { Ok(()) } else { Ok(network::hear_again(departure::init(&store, id)?)?) }
        }
    }
}

/// Removes what a process that is gone has left of its records.
fn unmake_records(arrival: &Arrival, token: &str) -> Result<()> {
    let dir = ledger::records(&arrival.root, token);
    match std::fs::remove_dir_all(&dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::Other(format!("{}: {e}", dir.display()))),
        _ => Ok(()),
    }
}

/// A container that has come to run is heard, if whoever was to see to that is gone.
fn speak(arrival: &Arrival) -> Result<()> {
    match departure::init(&Store::new(&arrival.root), &arrival.id) {
        Ok(init) if arrival.is_orphaned() => Ok(network::hear_again(init)?),
        _ => Ok(()),
    }
}

/// Does something to a container that has arrived, if it is still the one that did.
fn on_own(arrival: &Arrival, act: impl FnOnce(&Store, &str) -> runtime::Result<()>) -> Result<()> {
    let store = Store::new(&arrival.root);
    match store.load(&arrival.id) {
        Ok(state) if state.creator == arrival.owner => Ok(act(&store, &arrival.id)?),
        Ok(_) | Err(runtime::Error::NotFound) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Removes a directory in which no state was saved before its maker was killed.
fn unmake_directory(arrival: &Arrival) -> Result<()> {
    let store = Store::new(&arrival.root);
    match store.try_lock(&arrival.id) {
        // Who makes one holds its lock.
        Ok(Some(locked)) if matches!(locked.load(), Err(runtime::Error::NotFound)) => Ok(locked.remove()?),
        Ok(_) | Err(runtime::Error::NotFound) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Removes what earlier migrations to this host have left whose processes were killed. What cannot be removed waits for the next.
pub fn sweep(incoming: &Incoming) {
    let swept = incoming.all().map_err(Error::from).and_then(|all| {
        all.into_iter().filter(|(.., arrival)| arrival.is_orphaned()).try_for_each(|(token, entry, arrival)| {
            match entry {
                // Its source may still ask.
                Entry::Running => unmake_records(&arrival, &token),
                _ => there(incoming, &token).map(drop),
            }
        })
    });
    if let Err(error) = swept {
        tracing::warn!(%error, "cannot clean up after an earlier migration");
    }
}
