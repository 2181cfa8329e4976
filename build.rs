//! How the program is linked. It begins before the C library does, at `sys::own_exe::lmrun_entry`; and its addresses that are to be
//! relocated are listed in a few kilobytes instead of 400.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    for flag in ["--entry=lmrun_entry", "-z,pack-relative-relocs"] {
        println!("cargo:rustc-link-arg-bin=lmrun=-Wl,{flag}");
    }
}
