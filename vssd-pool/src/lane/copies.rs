// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Copies from and to media that are memory, a few requests behind.
//!
//! A block that was not touched for a while is far from the processor. So a copy is first announced, and made when
//! some more were announced or the batch ends: meanwhile its bytes are on their way. Copies are made in the order in which they came,
//! and all of them before the batch's requests are reported to anyone.

use super::ring::Direction;
use crate::core::Core;
use crate::types::MediumKind;

/// How many copies are under way: what a processor core fetches at once, and no more.
const DEPTH: usize = 8;

#[derive(Clone, Copy, Debug)]
pub(super) struct Copy {
    pub(super) direction: Direction,
    pub(super) medium: MediumKind,
    pub(super) offset: u64,
    pub(super) memory: *mut u8,
    pub(super) len: usize,
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Copies {
    waiting: [Option<Copy>; DEPTH],
    /// Where the next one goes; the oldest is there too when there are `DEPTH`.
    next: usize,
    /// Copies to each medium since the last `finish`. They count as completed only then: a flush of another lane must
    /// not take what is still to be copied for covered.
    wrote: [u64; 2],
}

impl Copies {
    pub(super) fn new() -> Self {
        Self { waiting: [None; DEPTH], next: 0, wrote: [0; 2] }
    }

    /// Takes a copy over, or makes it.
    ///
    /// # Safety
    /// Its memory must stay valid for `len` bytes until [`Copies::finish`].
    pub(super) unsafe fn push(&mut self, core: &Core, copy: Copy) -> std::io::Result<()> {
        let is_write = copy.direction == Direction::Write;
        self.wrote[copy.medium.index()] += u64::from(is_write);
        let Some(medium) = &core.media[copy.medium.index()] else { return Ok(()) };
        if !medium.store.prepare_copy(copy.offset, copy.len, is_write) {
            // SAFETY: the caller keeps the memory valid.
            return unsafe { make(core, copy) };
        }
        let oldest = self.waiting[self.next].replace(copy);
        self.next = (self.next + 1) % DEPTH;
        if let Some(oldest) = oldest {
            // SAFETY: whoever pushed it keeps its memory valid until `finish`.
            unsafe { make_announced(core, oldest) };
        }
        Ok(())
    }

    /// Makes all that wait, and counts them for the lane; other threads may rely on them afterwards.
    pub(super) fn finish(&mut self, core: &Core, slot: usize) {
        for i in 0..DEPTH {
            if let Some(copy) = self.waiting[(self.next + i) % DEPTH].take() {
                // SAFETY: whoever pushed it keeps its memory valid until this call.
                unsafe { make_announced(core, copy) };
            }
        }
        self.next = 0;
        let wrote = std::mem::take(&mut self.wrote);
        if wrote != [0; 2] {
            core.media.iter().flatten().for_each(|medium| medium.store.settle());
            for kind in MediumKind::ALL {
                core.lanes[slot].completed(kind, wrote[kind.index()]);
            }
        }
    }
}

/// # Safety
/// The copy's memory must be valid.
unsafe fn make(core: &Core, copy: Copy) -> std::io::Result<()> {
    let Some(medium) = &core.media[copy.medium.index()] else { return Ok(()) };
    // SAFETY: as the caller says.
    unsafe {
        match copy.direction {
            Direction::Read => medium.store.copy_out(copy.offset, copy.memory, copy.len),
            Direction::Write => medium.store.copy_in(copy.offset, copy.memory, copy.len),
        }
    }
}

/// # Safety
/// As for `make`.
unsafe fn make_announced(core: &Core, copy: Copy) {
    // SAFETY: as the caller says.
    if let Err(error) = unsafe { make(core, copy) } {
        // The medium said that this cannot be.
        core.journal.fail(&error);
    }
}
