// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A set of blocks of a small vSSD.

use std::fmt;

use vssd_protocol::units::BlockRange;

/// Most blocks that a scene can have.
pub(crate) const MAX: u32 = 8;

/// A set of blocks.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Blocks(u8);

impl Blocks {
    pub const NONE: Self = Self(0);

    /// Block `n` is bit `n`.
    pub const fn of(bits: u8) -> Self {
        Self(bits)
    }

    pub const fn first(count: u32) -> Self {
        Self(if count >= MAX { u8::MAX } else { (1 << count) - 1 })
    }

    pub fn len(self) -> u32 {
        self.0.count_ones()
    }

    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// One past the highest.
    pub fn end(self) -> u32 {
        u8::BITS - self.0.leading_zeros()
    }

    pub fn has(self, block: u32) -> bool {
        block < MAX && self.0 & (1 << block) != 0
    }

    #[must_use]
    pub fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    #[must_use]
    pub fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    pub fn one(block: u32) -> Self {
        Self(if block < MAX { 1 << block } else { 0 })
    }

    pub fn iter(self) -> impl DoubleEndedIterator<Item = u32> {
        (0..MAX).filter(move |block| self.has(*block))
    }

    #[must_use]
    pub fn lowest(self, count: u32) -> Self {
        self.iter().take(count as usize).fold(Self::NONE, |set, block| set.with(Self::one(block)))
    }

    #[must_use]
    pub fn highest(self, count: u32) -> Self {
        self.iter().rev().take(count as usize).fold(Self::NONE, |set, block| set.with(Self::one(block)))
    }

    /// A range for each.
    pub fn ranges(self) -> Vec<BlockRange> {
        self.iter().map(|block| BlockRange::new(block, 1)).collect()
    }

    pub fn from_ranges(ranges: &[BlockRange]) -> Self {
        ranges.iter().fold(Self::NONE, |set, range| set.with(Self::one(range.start)))
    }
}

impl fmt::Debug for Blocks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.iter()).finish()
    }
}
