//! The two ends of a move between engines, one step at a time, for scenarios: run on the hosts themselves.
//!
//! ```text
//! engine_ends describe CONTAINER            prints the description
//! engine_ends known DESCRIPTION             prints how many layers are here, or `all`
//! engine_ends export DESCRIPTION KNOWN      writes the image to standard output
//! engine_ends receive DESCRIPTION IMAGES [ARCHIVE]   until the container runs from a checkpoint's images
//! engine_ends retire DESCRIPTION KEEP       the container, frozen by `lmrun pause`, ends and goes
//! ```

use std::error::Error;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use lmrun::engine::{self, RestoreRequest};
use lmrun::migrate::engines::{Agent, Description};
use lmrun::runtime::StandbySocket;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use runtime_tests::needs;

const LIMIT: Duration = Duration::from_secs(60);

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match act(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("engine_ends: {e}");
            ExitCode::FAILURE
        }
    }
}

fn act(words: &[&str]) -> Result<()> {
    let mut agent = Agent::spawn()?;
    match words {
        ["describe", container] => println!("{}", serde_json::to_string_pretty(&agent.describe(&container.parse()?)?)?),
        ["known", description] => match agent.known_layers(&read(description)?)? {
            Some(known) => println!("{known}"),
            None => println!("all"),
        },
        ["export", description, known] => {
            let (mut reader, writer) = std::io::pipe()?;
            agent.begin_export(&read(description)?, known.parse()?, writer)?;
            std::io::copy(&mut reader, &mut std::io::stdout())?;
            agent.finished()?;
        }
        ["receive", description, images] => receive(agent, &read(description)?, Path::new(images), None)?,
        ["receive", description, images, archive] => {
            receive(agent, &read(description)?, Path::new(images), Some(archive))?;
        }
        ["retire", description, keep] => retire(agent, &read(description)?, *keep == "true")?,
        _ => return Err("unknown words".into()),
    }
    Ok(())
}

fn read(description: &str) -> Result<Description> {
    Ok(serde_json::from_slice(&fs::read(description)?)?)
}

fn receive(mut agent: Agent, wanted: &Description, images: &Path, archive: Option<&str>) -> Result<()> {
    for note in agent.check(wanted)? {
        eprintln!("{}: {} ({})", note.place, note.what, note.remedy);
        if note.blocks {
            return Err("refused".into());
        }
    }
    if let Some(archive) = archive {
        agent.begin_import(wanted, File::open(archive)?)?;
        agent.finished()?;
    }
    let prepared = agent.prepare(wanted)?;
    println!("{}", prepared.id);
    std::io::stdout().flush()?;
    // Whoever called brings what is in the container's file system, and says so.
    std::io::stdin().read_exact(&mut [0])?;

    fs::create_dir_all(images.join("work"))?;
    let request = RestoreRequest { images: images.into(), work: images.join("work"), tcp_established: true };
    let mut plan = engine::plan(request)?;
    let socket = StandbySocket::bind(&prepared.id, &prepared.bundle, plan.clock_offsets())?;
    agent.begin_start()?;
    let polled = &mut [&agent as &dyn std::os::fd::AsFd, &socket].map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN));
    poll(polled, PollTimeout::try_from(LIMIT)?)?;
    let engine_gave_up = polled[0].any() == Some(true);
    if engine_gave_up {
        agent.started()?;
        return Err("the engine has started the container without its processes".into());
    }
    let arrived = socket.accept(LIMIT)?.ok_or("the container does not come")?;
    plan.replace(arrived.external(images)?);
    plan.rebuild(arrived.puppet()?)?;
    if std::env::var_os("GIVE_UP").is_some() {
        return Err("given up".into());
    }
    arrived.release(Ok(()))?;
    for note in agent.started()? {
        eprintln!("{}: {} ({})", note.place, note.what, note.remedy);
    }
    Ok(())
}

/// The container is stopped by its cgroup.
fn retire(mut agent: Agent, left: &Description, keep: bool) -> Result<()> {
    let lmrun = |words: &[&str]| Command::new(needs::built("lmrun")).arg("--root").arg(&left.root).args(words).output();
    let state: serde_json::Value = serde_json::from_slice(&lmrun(&["state", &left.id])?.stdout)?;
    let init = state["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).ok_or("it has no process")?;
    agent.retire(left, keep, init, || drop(lmrun(&["resume", &left.id])))?;
    Ok(())
}
