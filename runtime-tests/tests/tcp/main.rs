//! TCP sockets moved between network namespaces by the engine's own parts. Needs root, iproute2 and nft.

mod net;
mod stream;

mod closing;
mod guard;
mod latency;
mod lock;
mod moves;
mod options;
mod stalls;

/// Whether the test can run; says why not.
pub fn able() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("SKIP: needs root");
    }
    root
}
