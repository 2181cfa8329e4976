//! The records of CRIU's images, one Rust struct per protobuf message, under its name in camel case.
//!
//! Fields keep CRIU's names and numbers. Where a message says `string` and the kernel says "any
//! bytes but NUL" (paths, names of tasks), the field is bytes: both look the same in the image.
//! Repeated scalars are not packed, as proto2 has it.

pub mod cgroup;
pub mod core;
pub mod files;
pub mod fsnotify;
pub mod inventory;
pub mod lmrun;
pub mod mm;
pub mod net;
pub mod ns;
pub mod sockets;
pub mod stats;
pub mod task;
pub mod tty;
