//! lmrun: an OCI runtime with live migration built in.
//!
//! Layers, arrows point down only (`docs/architecture.md`; a test holds the line):
//! `cli -> migrate -> runtime -> { engine, transfer } -> { tracee, image } -> sys`

pub mod cli;
pub mod engine;
pub mod image;
#[cfg(test)]
mod layers;
pub mod migrate;
pub mod runtime;
pub mod sys;
pub mod tracee;
pub mod transfer;
