//! What the processor saves of a task's registers (Intel SDM volume 1, chapter 13).
#![allow(unsafe_code)]

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};

/// State components of the xsave area.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Xsave {
    /// XCR0: one bit for each component that the kernel has enabled.
    pub features: u64,
    /// Bytes of the area with these.
    pub size: u32,
}

/// None: the kernel does not use xsave.
#[allow(unused_unsafe)] // later versions of the compiler call cpuid safe
pub fn xsave() -> Option<Xsave> {
    const OSXSAVE: u32 = 1 << 27;
    // SAFETY: every x86_64 processor has cpuid, and leaf 1.
    let has = unsafe { __cpuid(1) }.ecx & OSXSAVE != 0;
    has.then(|| {
        let (low, high): (u32, u32);
        // SAFETY: with OSXSAVE set, xgetbv of register 0 is allowed to everybody, and changes nothing but eax and edx.
        unsafe {
            asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack, preserves_flags))
        };
        // SAFETY: leaf 13 exists where xsave does.
        let size = unsafe { __cpuid_count(13, 0) }.ebx;
        Xsave { features: u64::from(high) << 32 | u64::from(low), size }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_legacy_area_is_always_a_part() {
        if let Some(Xsave { features, size }) = xsave() {
            assert_eq!(features & 3, 3, "x87 and SSE");
            assert!(size >= 576, "{size}");
        }
    }
}
