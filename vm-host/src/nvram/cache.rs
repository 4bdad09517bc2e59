// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Writing back cache lines of memory that outlives the power while the processors' caches do not.
//!
//! Caches are coherent, so a line is written back whichever processor holds it: one thread can make durable what all of a
//! guest's processors stored. It must look at every line of the range, dirty or not: tens of GiB a second.

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{can_write_back, write_back};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::{asm, x86_64};
    use std::sync::OnceLock;

    const LINE: usize = 64;

    /// Leaf 7, EBX: bit 24 is CLWB, bit 23 CLFLUSHOPT, which evicts the line besides (Intel SDM volume 2, CPUID).
    fn has_clwb() -> Option<bool> {
        static FOUND: OnceLock<Option<bool>> = OnceLock::new();
        *FOUND.get_or_init(|| {
            if x86_64::__cpuid(0).eax < 7 {
                return None;
            }
            let features = x86_64::__cpuid_count(7, 0).ebx;
            match (features & (1 << 24) != 0, features & (1 << 23) != 0) {
                (true, _) => Some(true),
                (false, true) => Some(false),
                (false, false) => None,
            }
        })
    }

    pub(in super::super) fn can_write_back() -> bool {
        has_clwb().is_some()
    }

    /// Returns when `len` bytes from `at` on, mapped memory, have left the caches.
    pub(in super::super) fn write_back(at: *const u8, len: usize) {
        let Some(has_clwb) = has_clwb() else { return };
        let first = at.addr() & !(LINE - 1);
        for line in (first..at.addr() + len).step_by(LINE) {
            if has_clwb {
                // SAFETY: the CPU has the instruction; the line lies in the mapping that the caller named (mappings start and
                // end on page boundaries), and writing it back changes no value.
                unsafe { asm!("clwb [{0}]", in(reg) line, options(nostack, preserves_flags)) };
            } else {
                // SAFETY: as above.
                unsafe { asm!("clflushopt [{0}]", in(reg) line, options(nostack, preserves_flags)) };
            }
        }
        // SAFETY: SFENCE is part of the x86-64 baseline.
        unsafe { x86_64::_mm_sfence() };
    }
}

#[cfg(not(target_arch = "x86_64"))]
pub(super) use other::{can_write_back, write_back};

#[cfg(not(target_arch = "x86_64"))]
mod other {
    pub(in super::super) fn can_write_back() -> bool {
        false
    }

    pub(in super::super) fn write_back(_at: *const u8, _len: usize) {}
}
