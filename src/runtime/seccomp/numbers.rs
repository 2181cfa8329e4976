//! The numbers of system calls by name.

use std::collections::HashMap;

/// Name, and number in each ABI (`-` where it has none); x32's without its bit.
/// From arch/x86/entry/syscalls/syscall_{64,32}.tbl, up to Linux 6.17.
const TABLE: &str = include_str!("syscalls.tsv");

/// The ways into the kernel of an x86_64 machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Abi {
    X86_64 = 1,
    I386 = 2,
    X32 = 3,
}

/// All system calls of `abi`.
pub fn numbers(abi: Abi) -> HashMap<&'static str, u32> {
    TABLE
        .lines()
        .filter_map(|line| {
            let mut fields = line.split('\t');
            let name = fields.next()?;
            Some((name, fields.nth(abi as usize - 1)?.parse().ok()?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::libc;

    #[test]
    fn the_table_agrees_with_libc() {
        let native = numbers(Abi::X86_64);
        for (name, number) in [
            ("read", libc::SYS_read),
            ("clone3", libc::SYS_clone3),
            ("openat2", libc::SYS_openat2),
            ("futex_waitv", libc::SYS_futex_waitv),
        ] {
            assert_eq!(i64::from(native[name]), number, "{name}");
        }
        assert_eq!(numbers(Abi::I386)["socketcall"], 102);
        assert_eq!(numbers(Abi::X32)["execve"], 520);
        assert!(!native.contains_key("socketcall"));
    }
}
