//! One file per kind of kernel object.

pub mod fd;
