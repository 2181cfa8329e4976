//! The kernel's ABI: system calls, structures and /proc parsers. All `unsafe` of the
//! crate is here; what the modules export is safe to call.

pub mod bpf;
pub mod clock;
pub mod code;
pub mod cwd;
pub mod fdpass;
pub mod fds;
pub mod file;
pub mod fork;
pub mod identity;
pub mod inotify;
pub mod keyring;
pub mod mem;
pub mod mount;
pub mod namespace;
pub mod netlink;
pub mod netns;
pub mod own_exe;
pub mod packet;
pub mod pagemap;
pub mod personality;
pub mod pidfd;
pub mod proc;
pub mod ptrace;
pub mod rtnetlink;
pub mod sched;
pub mod seccomp;
pub mod segment;
pub mod signals;
pub mod sockopt;
pub mod sysv;
pub mod tcp;
pub mod terminal;
pub mod uffd;
pub mod unix_socket;
pub mod window;
