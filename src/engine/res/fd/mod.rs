//! Kinds of open files.

pub mod sockopts;
pub mod tcp;
