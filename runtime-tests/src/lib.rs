//! Scenarios for lmrun: containers that check themselves, taken through checkpoints and restores.
//!
//! A *workload* (`src/bin/workload`) is a program that sets up one kind of state and can verify it. A *flavour*
//! ([`flavour`]) is a way to take a container through a checkpoint. The scenarios in `tests/` run the one through
//! the other. They need root; see [`needs`] for what happens where something is missing.

pub mod bench;
pub mod bundle;
pub mod command;
pub mod conformance;
pub mod container;
pub mod engines;
pub mod faults;
pub mod flavour;
pub mod fuzz;
pub mod host;
pub mod hosts;
pub mod journey;
pub mod migration;
pub mod needs;
pub mod network;
pub mod profile;
pub mod redis;
pub mod remote;
pub mod runtimes;
pub mod shell;
pub mod stats;
pub mod telling;
pub mod there_and_back;
