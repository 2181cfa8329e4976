//! What a scenario needs of its host. A skip prints `SKIP` and its reason, and is a failure unless
//! `LMRUN_ALLOW_SKIP=1` is set or `LMRUN_EXPECT_SKIP` (comma-separated words) has a word that the reason contains.

use std::path::PathBuf;

/// Ends a scenario that cannot run here: returns where skips are allowed, panics where they are not.
pub fn skip(reason: &str) {
    println!("SKIP {reason}");
    let expected = std::env::var("LMRUN_EXPECT_SKIP").unwrap_or_default();
    let allowed = std::env::var("LMRUN_ALLOW_SKIP").is_ok_and(|v| v == "1");
    let known = expected.split(',').any(|word| !word.is_empty() && reason.contains(word));
    assert!(allowed || known, "unexpected skip: {reason} (LMRUN_ALLOW_SKIP=1 allows skips)");
}

/// Whether scenarios that make containers can run; prints the skip where they cannot.
pub fn root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        skip("scenarios need root");
    }
    root
}

/// A program that was built with this one: `lmrun` (or what `LMRUN` names), `workload`.
pub fn built(name: &str) -> PathBuf {
    let named = std::env::var_os(name.to_uppercase()).map(PathBuf::from);
    let own = std::env::current_exe().unwrap_or_default();
    let beside = own.ancestors().skip(1).take(2).map(|dir| dir.join(name)).find(|path| path.is_file());
    named.or(beside).unwrap_or_else(|| panic!("{name} is not built: cargo build --workspace"))
}

/// A program on the PATH.
pub fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|dir| dir.join(name))
        .find(|p| p.is_file())
}
