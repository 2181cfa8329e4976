//! Plain amounts of something, for measurements: `workload NAME AMOUNT`.

use crate::memory_map::Map;
use crate::stage::{Check, Fallible, Setup, Stage, same};
use crate::threads::{Answerer, tids};

pub const WORKLOADS: &[(&str, Setup)] = &[("load-memory", memory), ("load-threads", threads)];

fn amount() -> Fallible<usize> {
    let word = std::env::args().nth(2).ok_or("an amount is missing")?;
    word.parse().map_err(|e| format!("{word}: {e}"))
}

/// So many MiB.
fn memory(_: &mut Stage) -> Fallible<Check> {
    let map = Map::private(amount()? << 20)?;
    map.fill(1);
    Ok(Box::new(move || map.holds("memory", 1)))
}

/// So many threads, the first included, that wait.
fn threads(_: &mut Stage) -> Fallible<Check> {
    let others = (1..amount()?).map(|_| Answerer::start(|| Ok(()))).collect::<Fallible<Vec<_>>>()?;
    let all = tids()?;
    Ok(Box::new(move || {
        others.iter().try_for_each(|thread| thread.ask(|| Ok(())))?;
        same("threads", &all, &tids()?)
    }))
}
