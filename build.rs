//! The program begins before the C library does: `sys::own_exe::lmrun_entry`.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-link-arg-bin=lmrun=-Wl,--entry=lmrun_entry");
}
