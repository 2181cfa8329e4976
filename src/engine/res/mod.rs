//! Kinds of kernel objects, one file each with every verb in it.

pub mod fd;
pub mod mm;
pub mod sysv;
pub mod task;
pub mod tmpfs;
