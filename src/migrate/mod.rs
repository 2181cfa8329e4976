//! Live migration: a container goes on at another host.

pub mod wire;
