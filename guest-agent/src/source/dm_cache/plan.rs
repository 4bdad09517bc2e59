// SPDX-License-Identifier: Apache-2.0 OR MIT

//! How long a cache may be, and which blocks of the vSSD it can do without. Pure.
//!
//! ```text
//!   0         offset                          end of the linear device          end of the disk
//!   │ others'  │ cache blocks … cache blocks  │  held, then evicted              │
//! ```
//!
//! The cache's blocks end on both sides' borders: its length is a multiple of the cache's block, and what is behind it counts in whole
//! blocks of the vSSD.

use vssd_protocol::units::BlockRange;

use crate::blocks::BlockSet;

pub(super) const SECTOR: u64 = 512;
/// What is nominated at a time. Within a range the lowest block goes first; ranges of this length from the end of the disk on leave a hole of less
/// than one where a shrink is given up half-way.
const STRIDE: u32 = 256;

/// Where a cache's fast device lies, in bytes of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) offset: u64,
    pub(super) len: u64,
    /// Of the cache.
    pub(super) cache_block: u64,
    /// Of the vSSD.
    pub(super) block: u64,
    /// Blocks of the disk.
    pub(super) total: u32,
}

impl Place {
    /// The longest that ends where block `end` begins, or before.
    pub(super) fn len_below(&self, end: u32) -> u64 {
        let room = (u64::from(end) * self.block).saturating_sub(self.offset);
        room / self.cache_block * self.cache_block
    }

    /// The longest that has no evicted block in it.
    pub(super) fn longest(&self, evicted: &BlockSet) -> u64 {
        let inside = BlockRange::new(self.first_block(), u32::MAX);
        let outside = evicted.without(&BlockSet::of(self.total, [inside]));
        let first = evicted.without(&outside).ranges().next();
        self.len_below(first.map_or(self.total, |range| range.start))
    }

    /// The shortest that leaves `least` bytes, and at least one block.
    pub(super) fn shortest(&self, least: u64) -> u64 {
        least.div_ceil(self.cache_block).max(1) * self.cache_block
    }

    /// The length that sets `want` blocks free, or as many as leave `shortest`. Not less than now: none can be.
    pub(super) fn shorter(&self, want: u32, shortest: u64) -> u64 {
        let end = behind(self.offset + self.len, self.block);
        self.len_below(end.saturating_sub(want)).max(shortest).min(self.len)
    }

    /// The first block that is this cache's, wholly or in part.
    fn first_block(&self) -> u32 {
        u32::try_from(self.offset / self.block).unwrap_or(u32::MAX)
    }
}

/// The first block that lies wholly behind the first `bytes` of the disk.
pub(super) fn behind(bytes: u64, block: u64) -> u32 {
    u32::try_from(bytes.div_ceil(block)).unwrap_or(u32::MAX)
}

/// The blocks from `first` on, the last ones first: so that what stays is in one piece. `wanted` is how many are to be left of the disk; what
/// lies below is held for no other reason than that the cache's blocks are larger, and goes last.
pub(super) fn from_the_end(first: u32, total: u32, wanted: u32) -> Vec<BlockRange> {
    let mut ranges = Vec::new();
    let wanted = wanted.clamp(first.min(total), total);
    for (floor, top) in [(wanted, total), (first, wanted)] {
        let mut end = top;
        while end > floor {
            let start = end.saturating_sub(STRIDE).max(floor);
            ranges.push(BlockRange::new(start, end - start));
            end = start;
        }
    }
    ranges
}

/// The blocks of pieces `(offset, len)` of a disk, in bytes, wholly or in part.
pub(super) fn touched(pieces: impl IntoIterator<Item = (u64, u64)>, block: u64, total: u32) -> BlockSet {
    let ranges = pieces.into_iter().filter(|(_, len)| *len > 0).map(|(offset, len)| {
        let first = u32::try_from(offset / block).unwrap_or(u32::MAX);
        BlockRange::new(first, behind(offset.saturating_add(len), block).saturating_sub(first))
    });
    BlockSet::of(total, ranges)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn place() -> Place {
        Place { offset: 4 * MIB, len: 60 * MIB, cache_block: 256 << 10, block: 64 << 10, total: 1024 }
    }

    fn evicted(ranges: &[(u32, u32)]) -> BlockSet {
        BlockSet::of(1024, ranges.iter().map(|&(start, count)| BlockRange::new(start, count)))
    }

    #[test]
    fn a_cache_reaches_up_to_the_first_evicted_block_that_is_its() {
        let place = place();
        assert_eq!(place.longest(&evicted(&[])), 60 * MIB);
        assert_eq!(place.longest(&evicted(&[(800, 224)])), 46 * MIB);
        assert_eq!(place.longest(&evicted(&[(801, 1)])), 46 * MIB, "a part of a cache block is none");
        assert_eq!(place.longest(&evicted(&[(803, 1), (900, 1)])), 46 * MIB);
        assert_eq!(
            place.longest(&evicted(&[(3, 1), (804, 1)])),
            46 * MIB + (256 << 10),
            "one in front of it is another's"
        );
        assert_eq!(place.longest(&evicted(&[(64, 1)])), 0);
    }

    #[test]
    fn it_becomes_shorter_by_what_is_wanted_down_to_its_least() {
        let place = place();
        assert_eq!(place.shorter(16, MIB), 59 * MIB);
        assert_eq!(place.shorter(1, MIB), 60 * MIB - (256 << 10));
        assert_eq!(place.shorter(5000, 10 * MIB), 10 * MIB);
        assert_eq!(place.shorter(16, 100 * MIB), 60 * MIB, "it does not become longer");
        assert_eq!((place.shortest(0), place.shortest(MIB + 1)), (256 << 10, MIB + (256 << 10)));
    }

    #[test]
    fn the_end_of_the_disk_goes_first_and_what_is_not_wanted_last() {
        let list = |first, wanted| -> Vec<_> {
            from_the_end(first, 1024, wanted).iter().map(|range| (range.start, range.count)).collect()
        };
        assert_eq!(list(400, 402), [(768, 256), (512, 256), (402, 110), (400, 2)]);
        assert_eq!(list(400, 0), [(768, 256), (512, 256), (400, 112)]);
        assert_eq!(list(1024, 0), []);
        assert_eq!(list(1000, 1024), [(1000, 24)]);
    }

    proptest! {
        #[test]
        fn no_block_is_both_used_and_held(
            offset in 0u64..200, cache_block in 1u64..40, block in 0u32..4, len in 1u64..500, want in 0u32..600, least in 0u64..9000,
        ) {
            let (offset, cache_block) = (offset * 4096, cache_block * 32768);
            let block = 65536u64 << block;
            let total = u32::try_from((offset + len * cache_block).div_ceil(block)).unwrap();
            let place = Place { offset, len: len * cache_block, cache_block, block, total };
            let new = place.shorter(want, place.shortest(least * 4096));
            prop_assert!(new > 0 && new <= place.len && new.is_multiple_of(cache_block));
            let first = behind(offset + new, block);
            let used = touched([(offset, new)], block, total);
            let held = BlockSet::of(total, from_the_end(first, total, total.saturating_sub(want)));
            prop_assert_eq!(used.without(&held).len(), used.len());
            prop_assert_eq!(held.len(), total - first);
            // As much as was wanted, unless the least is kept.
            let before = total - behind(offset + place.len, block);
            prop_assert!(held.len() >= before + want || new == place.shortest(least * 4096).min(place.len) || new <= cache_block);
            // And with these gone it may be as long again as it is.
            prop_assert!(place.longest(&held) >= new && place.longest(&held) < new + cache_block.max(block));
        }
    }
}
