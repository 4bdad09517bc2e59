// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Moving bytes to and from memory that is larger than any cache, and outlives the power.
//!
//! A copy to such memory through the cache first reads every line that it overwrites. Non-temporal stores do not, which
//! halves the traffic; they also leave no line behind that would have to be written back for durability. They are
//! weakly ordered: [`settle`] orders them before all later stores of the thread (Intel SDM volume 1, §10.4.6.2).

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{can_write_back, copy, prefetch, prefetch_page, settle, write_back};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::{asm, x86_64};
    use std::sync::OnceLock;

    /// Bytes of a cache line.
    const LINE: usize = 64;
    /// Below this, what was written is likely to be metadata that is soon read or written again.
    const SMALLEST_STREAM: usize = 2048;

    /// Lines fetched ahead of a read; further ones the processor fetches by itself (measured: more gain nothing).
    const READ_AHEAD: usize = 4;

    /// Starts to fetch what a copy from `at` will touch first. A hint: any address will do.
    pub(in super::super) fn prefetch(at: *const u8, len: usize) {
        prefetch_lines(at, len.div_ceil(LINE).min(READ_AHEAD));
    }

    /// Starts to look up the page at `at`, where a copy will go. A hint: any address will do.
    pub(in super::super) fn prefetch_page(at: *const u8) {
        prefetch_lines(at, 1);
    }

    fn prefetch_lines(at: *const u8, lines: usize) {
        for line in 0..lines {
            // SAFETY: a prefetch accesses nothing that a program could notice, whatever the address.
            unsafe { x86_64::_mm_prefetch::<{ x86_64::_MM_HINT_T1 }>(at.wrapping_add(line * LINE).cast()) };
        }
    }

    /// Copies; true if bytes may have gone through the cache. Not ordered before later stores until [`settle`].
    ///
    /// # Safety
    /// `to` must be valid for writes and `from` for reads of `len` bytes. Others may access them at the same time; the
    /// ranges may overlap.
    pub(in super::super) unsafe fn copy(to: *mut u8, from: *const u8, len: usize) -> bool {
        let is_aligned = to.addr().is_multiple_of(LINE) && len.is_multiple_of(LINE);
        let overlap = to.addr() < from.addr() + len && from.addr() < to.addr() + len;
        if len < SMALLEST_STREAM || !is_aligned || overlap {
            // SAFETY: as the caller says.
            unsafe { std::ptr::copy(from, to, len) };
            return true;
        }
        for at in (0..len).step_by(LINE) {
            // SAFETY: `at + LINE` is at most `len`; SSE2 is part of the x86-64 baseline; `to` is aligned as the stores demand,
            // and the loads demand nothing.
            unsafe {
                let (from, to) =
                    (from.add(at).cast::<x86_64::__m128i>(), to.add(at).cast::<x86_64::__m128i>());
                let quarter = [0, 1, 2, 3].map(|i| x86_64::_mm_loadu_si128(from.add(i)));
                for (i, quarter) in quarter.into_iter().enumerate() {
                    x86_64::_mm_stream_si128(to.add(i), quarter);
                }
            }
        }
        false
    }

    /// Orders this thread's streamed stores and write-backs before its later stores.
    pub(in super::super) fn settle() {
        // SAFETY: SFENCE is part of the x86-64 baseline.
        unsafe { x86_64::_mm_sfence() };
    }

    #[derive(Clone, Copy, PartialEq, Eq)]
    enum Instruction {
        None,
        /// Evicts the line besides writing it back.
        ClFlushOpt,
        ClWb,
    }

    fn instruction() -> Instruction {
        static FOUND: OnceLock<Instruction> = OnceLock::new();
        *FOUND.get_or_init(|| {
            // Leaf 7, EBX: bit 24 is CLWB, bit 23 CLFLUSHOPT (Intel SDM volume 2, CPUID).
            if x86_64::__cpuid(0).eax < 7 {
                return Instruction::None;
            }
            let features = x86_64::__cpuid_count(7, 0).ebx;
            if features & (1 << 24) != 0 {
                Instruction::ClWb
            } else if features & (1 << 23) != 0 {
                Instruction::ClFlushOpt
            } else {
                Instruction::None
            }
        })
    }

    pub(in super::super) fn can_write_back() -> bool {
        instruction() != Instruction::None
    }

    /// Begins to write back what was stored through the cache; over with [`settle`].
    pub(in super::super) fn write_back(at: *const u8, len: usize) {
        let first = at.addr() & !(LINE - 1);
        let end = at.addr() + len;
        let instruction = instruction();
        for line in (first..end).step_by(LINE) {
            match instruction {
                // SAFETY: the CPU has the instruction; the line lies in the mapping the caller stored to
                // (mappings start on page boundaries), and writing it back changes no value.
                Instruction::ClWb => unsafe {
                    asm!("clwb [{0}]", in(reg) line, options(nostack, preserves_flags));
                },
                // SAFETY: as above.
                Instruction::ClFlushOpt => unsafe {
                    asm!("clflushopt [{0}]", in(reg) line, options(nostack, preserves_flags));
                },
                Instruction::None => {}
            }
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
pub(super) use portable::{can_write_back, copy, prefetch, prefetch_page, settle, write_back};

#[cfg(not(target_arch = "x86_64"))]
mod portable {
    pub(in super::super) fn prefetch(_at: *const u8, _len: usize) {}

    pub(in super::super) fn prefetch_page(_at: *const u8) {}

    /// # Safety
    /// `to` must be valid for writes and `from` for reads of `len` bytes. Others may access them at the same time.
    pub(in super::super) unsafe fn copy(to: *mut u8, from: *const u8, len: usize) -> bool {
        // SAFETY: as the caller says.
        unsafe { std::ptr::copy(from, to, len) };
        true
    }

    pub(in super::super) fn settle() {}

    pub(in super::super) fn can_write_back() -> bool {
        false
    }

    pub(in super::super) fn write_back(_at: *const u8, _len: usize) {}
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_byte_arrives_and_none_beside(
            len in prop_oneof![0usize..200, 1900usize..2200, Just(4096), Just(8192)],
            to in 0usize..130, from in 0usize..130,
        ) {
            let source: Vec<u8> = (0..9000usize).map(|i| u8::try_from(i % 251).unwrap()).collect();
            let mut target = vec![0xee_u8; 9000];
            let to = if len % 64 == 0 { to.next_multiple_of(64) + target.as_ptr().align_offset(64) } else { to };
            super::prefetch(source[from..].as_ptr(), len);
            // SAFETY: both vectors are longer than `len` and the offsets together.
            let cached = unsafe { super::copy(target[to..].as_mut_ptr(), source[from..].as_ptr(), len) };
            super::write_back(target[to..].as_ptr(), len);
            super::settle();
            prop_assert!(cached || len >= 2048);
            prop_assert_eq!(&target[to..to + len], &source[from..from + len]);
            prop_assert!(target[..to].iter().chain(&target[to + len..]).all(|byte| *byte == 0xee));
        }

        #[test]
        fn overlapping_ranges_are_moved(len in 2000usize..5000, to in 0usize..4000, from in 0usize..4000) {
            let mut bytes: Vec<u8> = (0..9000usize).map(|i| u8::try_from(i % 249).unwrap()).collect();
            let expected = bytes[from..from + len].to_vec();
            let start = bytes.as_mut_ptr();
            // SAFETY: both ranges lie within the vector.
            unsafe { super::copy(start.add(to), start.add(from), len) };
            super::settle();
            prop_assert_eq!(&bytes[to..to + len], &expected[..]);
        }
    }
}
