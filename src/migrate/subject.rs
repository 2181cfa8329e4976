//! What leaves: a container of lmrun's alone, or one of an engine, which is told afterwards.

use std::io::Read;
use std::os::fd::AsFd;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::disk::Root;
use super::engines::{Agent, Description};
use super::transport::Output;
use super::wire::Writer;
use super::wire::message::{Keepalive, Offer};
use super::{Container, Error, Options, Result, preflight};
use crate::engine::departure::Held;
use crate::runtime::Store;
use crate::runtime::departure::Leaving;

/// How often the destination is told that we are alive while the engine works.
const SIGN: Duration = Duration::from_secs(2);
/// Bytes of an image's archive in one message.
const PIECE: usize = 256 << 10;

/// A running container that is to leave.
pub struct Subject {
    /// As on the command line.
    pub name: String,
    pub leaving: Leaving,
    owner: Option<Owner>,
}

/// A container's engine, and what it knows of it.
pub struct Owner {
    agent: Agent,
    about: Description,
}

impl Owner {
    /// None: lmrun alone. To be called early ([`Agent::spawn`]).
    pub fn find(container: &Container) -> Result<Option<Owner>> {
        if let Container::Lmrun(_) = container {
            return Ok(None);
        }
        let mut agent = Agent::spawn()?;
        let about = agent.describe(container)?;
        Ok(Some(Owner { agent, about }))
    }

    /// Where lmrun has the container, and under which id.
    pub fn place(&self) -> (Store, String) {
        (Store::new(&self.about.root), self.about.id.clone())
    }

    /// See [`Agent::retire`].
    pub fn retire(&mut self, keep: bool, init: i32, let_go: impl FnOnce()) -> Result<()> {
        Ok(self.agent.retire(&self.about, keep, init, let_go)?)
    }
}

impl Subject {
    /// To be called early ([`Agent::spawn`]).
    pub fn find(store: &Store, container: &Container) -> Result<Subject> {
        let owner = Owner::find(container)?;
        let leaving = match &owner {
            None => Leaving::begin(store, container.name())?,
            Some(owner) => {
                let (store, id) = owner.place();
                Leaving::begin(&store, &id)?
            }
        };
        Ok(Subject { name: container.to_string(), leaving, owner })
    }

    pub fn offer(&self, options: &Options) -> Result<Offer> {
        let state = self.leaving.state();
        let bundle = options.bundle.as_deref().unwrap_or(&state.bundle).as_os_str().as_encoded_bytes().to_vec();
        let engine = match &self.owner {
            Some(owner) => serde_json::to_string(&owner.about).map_err(|e| Error::Other(e.to_string()))?,
            None => String::new(),
        };
        Ok(Offer {
            id: state.id.clone(),
            bundle: self.owner.is_none().then_some(bundle),
            annotations: state.annotations.clone().into_iter().collect(),
            manner: options.manner(),
            engine,
            images: vec!["config.json".into()],
            host: Box::new(preflight::host(&state.bundle)),
            needs: preflight::needs(&self.leaving.pids()?, options.post_copy, !options.offline),
        })
    }

    /// Whether the destination's engine has its turn before files are sent, and once more before memory is.
    pub fn has_engine(&self) -> bool {
        self.owner.is_some()
    }

    /// Sends the image, but for the content of its lowest `known` layers.
    pub fn send_image(&mut self, known: usize, writer: &mut Writer<Output>) -> Result<()> {
        let Some(Owner { agent, about }) = &mut self.owner else { return Ok(()) };
        let failed = |e: std::io::Error| Error::Other(format!("the image's archive: {e}"));
        let (mut archive, theirs) = std::io::pipe().map_err(failed)?;
        agent.begin_export(about, known, theirs)?;
        let mut piece = vec![0; PIECE];
        loop {
            let timeout = PollTimeout::try_from(SIGN).unwrap_or(PollTimeout::MAX);
            let ready = poll(&mut [PollFd::new(archive.as_fd(), PollFlags::POLLIN)], timeout);
            if ready.map_err(|e| failed(e.into()))? == 0 {
                writer.say(&Keepalive {})?;
                continue;
            }
            match archive.read(&mut piece).map_err(failed)? {
                0 => break,
                length => writer.send_engine(&piece[..length])?,
            }
        }
        agent.finished()?;
        // That was all.
        writer.send_engine(&[])?;
        Ok(writer.flush()?)
    }

    /// The directories that go along: what the container has changed, or its whole root, and these volumes.
    pub fn roots(&self, volumes: &[String]) -> Result<Vec<Root>> {
        let root = |path: &std::path::Path| Root {
            name: "rootfs".into(),
            path: path.to_owned(),
            view: None,
            inside: "/".into(),
        };
        let Some(Owner { about, .. }) = &self.owner else {
            return Ok(vec![root(&self.leaving.state().rootfs)]);
        };
        let upper = about.rootfs.upper.as_ref();
        let upper = upper.ok_or_else(|| Error::Other("the container has no directory of its changes".into()))?;
        let mut roots = vec![Root { view: Some(about.rootfs.mount.clone()), ..root(upper) }];
        for name in volumes {
            let volume = about.volumes.iter().find(|volume| volume.name.as_ref() == Some(name) && volume.is_local());
            let volume = volume.ok_or_else(|| Error::Other(format!("the destination asks for a volume {name}")))?;
            roots.push(Root {
                name: format!("volume {name}"),
                path: volume.source.clone(),
                view: None,
                inside: volume.target.clone(),
            });
        }
        Ok(roots)
    }

    /// It has moved: its processes end, and its engine removes what else there is of it, or keeps it stopped.
    ///
    /// # Errors
    /// It may stand still here then.
    pub fn end(&mut self, held: Held, keep: bool) -> Result<()> {
        let Some(owner) = &mut self.owner else { return Ok(held.end()?) };
        let mut held = Some(held);
        let mut ended = Ok(());
        let retired = owner.retire(keep, self.leaving.init(), || {
            ended = held.take().map_or(Ok(()), Held::end);
        });
        // The engine has not killed it. It must not run, and must not be started again by who thinks that it has failed.
        if let Some(held) = held {
            held.leave();
        }
        ended?;
        retired
    }

    /// Removes what is left of a container that has ended.
    pub fn remove(self) -> Result<()> {
        match self.owner {
            Some(_) => Ok(()),
            None => Ok(self.leaving.remove()?),
        }
    }
}
