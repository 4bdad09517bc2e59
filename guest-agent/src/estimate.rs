// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What could go, before anybody asks: what sources say of it, and the host is told.

use serde::Serialize;

/// How much could go, in blocks, by what it would cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Estimate {
    /// Used by nothing already.
    pub(crate) held_blocks: u32,
    /// Free: costs nothing but the room.
    pub(crate) free_blocks: u32,
    /// Copies of what is elsewhere, not asked for lately.
    pub(crate) clean_cold_blocks: u32,
    /// Copies of what is elsewhere, in use.
    pub(crate) clean_hot_blocks: u32,
    /// Must be written elsewhere first.
    pub(crate) dirty_blocks: u32,
}

impl Estimate {
    /// All that could go beyond what is held, whatever it costs.
    pub(crate) fn more_blocks(&self) -> u32 {
        [self.free_blocks, self.clean_cold_blocks, self.clean_hot_blocks, self.dirty_blocks]
            .into_iter()
            .fold(0, u32::saturating_add)
    }

    /// Of a disk with so many blocks: what is said to be dearest is left out first.
    pub(crate) fn within(self, mut blocks: u32) -> Self {
        let mut take = |wanted: u32| {
            let taken = wanted.min(blocks);
            blocks -= taken;
            taken
        };
        Self {
            held_blocks: take(self.held_blocks),
            free_blocks: take(self.free_blocks),
            clean_cold_blocks: take(self.clean_cold_blocks),
            clean_hot_blocks: take(self.clean_hot_blocks),
            dirty_blocks: take(self.dirty_blocks),
        }
    }
}
