//! Ctrl-C. A container survives the end of lmrun at any instant before the hand-over, and runs on: so that is what is done.

use std::io;
use std::sync::{Mutex, PoisonError};
use std::thread;

use nix::sys::signal::{SigSet, Signal};

static GATE: Mutex<()> = Mutex::new(());

/// From now on nobody interrupts us any more.
pub fn refuse() {
    std::mem::forget(GATE.lock().unwrap_or_else(PoisonError::into_inner));
}

/// Ends this process, with the code for "not moved", when a signal asks for it, until that is [refused](refuse). `last` is called
/// before. To be called while there is one thread only.
pub fn watch(last: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
    // In all threads to come, too; programs that are started get none of it.
    signals.thread_block()?;
    thread::Builder::new().name("signals".into()).spawn(move || {
        if signals.wait().is_ok() {
            let _gate = GATE.lock().unwrap_or_else(PoisonError::into_inner);
            last();
            std::process::exit(1);
        }
    })?;
    Ok(())
}
