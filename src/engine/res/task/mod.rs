//! What belongs to a process or a thread and is no file and no memory.
//!
//! The state that only the task itself can tell is asked for by remote calls: `ask` adds them to a batch, `answer` takes
//! the results out of it, and `apply` adds the calls that bring the state about in a puppet.

pub mod creds;
pub mod regs;
pub mod sched;
pub mod seccomp;
pub mod signals;
pub mod thread;
pub mod timers;
