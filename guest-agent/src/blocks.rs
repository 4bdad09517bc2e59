// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Sets of a vSSD's blocks: one bit a block, so that a disk of 32 GiB takes 64 KiB.

use vssd_protocol::units::BlockRange;

/// A set of the blocks `0..total`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BlockSet {
    words: Vec<u64>,
    total: u32,
    len: u32,
}

impl BlockSet {
    pub(crate) fn new(total: u32) -> Self {
        Self { words: vec![0; (total as usize).div_ceil(64)], total, len: 0 }
    }

    pub(crate) fn of(total: u32, ranges: impl IntoIterator<Item = BlockRange>) -> Self {
        let mut set = Self::new(total);
        for range in ranges {
            set.insert(range);
        }
        set
    }

    /// How many blocks are in it.
    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn contains(&self, block: u32) -> bool {
        self.words.get(block as usize / 64).is_some_and(|word| word >> (block % 64) & 1 == 1)
    }

    /// Adds the blocks of a range that lie below the set's total.
    pub(crate) fn insert(&mut self, range: BlockRange) {
        let end = range.start.saturating_add(range.count).min(self.total);
        for block in range.start..end {
            let (word, bit) = (block as usize / 64, 1 << (block % 64));
            if self.words[word] & bit == 0 {
                self.words[word] |= bit;
                self.len += 1;
            }
        }
    }

    /// Adds the blocks of `other`.
    pub(crate) fn extend(&mut self, other: &Self) {
        for (word, theirs) in self.words.iter_mut().zip(&other.words) {
            *word |= theirs;
        }
        self.len = self.words.iter().map(|word| word.count_ones()).sum();
    }

    /// The blocks that are in this set and not in `other`.
    pub(crate) fn without(&self, other: &Self) -> Self {
        let mut words = self.words.clone();
        for (word, theirs) in words.iter_mut().zip(&other.words) {
            *word &= !theirs;
        }
        let len = words.iter().map(|word| word.count_ones()).sum();
        Self { words, total: self.total, len }
    }

    /// The blocks in ascending order, neighbours as one range.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = BlockRange> + '_ {
        let mut next = 0;
        std::iter::from_fn(move || {
            let start = self.find(next, true)?;
            let end = self.find(start, false).unwrap_or(self.total);
            next = end;
            Some(BlockRange::new(start, end - start))
        })
    }

    /// The first block from `from` on that is in the set, or is not.
    fn find(&self, from: u32, present: bool) -> Option<u32> {
        let mut block = from;
        while block < self.total {
            let word = self.words[block as usize / 64];
            let word = if present { word } else { !word } >> (block % 64);
            if word != 0 {
                let found = block + word.trailing_zeros();
                return (found < self.total).then_some(found);
            }
            block = (block / 64 + 1) * 64;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn blocks(set: &BlockSet) -> Vec<u32> {
        set.ranges().flat_map(|range| range.start..range.start + range.count).collect()
    }

    proptest! {
        #[test]
        fn it_is_a_set(total in 1u32..300, one in prop::collection::vec((0u32..320, 0u32..90), 0..8),
                       two in prop::collection::vec((0u32..320, 0u32..90), 0..8)) {
            let make = |list: &[(u32, u32)]| {
                let set = BlockSet::of(total, list.iter().map(|&(start, count)| BlockRange::new(start, count)));
                let naive: BTreeSet<u32> =
                    list.iter().flat_map(|&(start, count)| start..start + count).filter(|b| *b < total).collect();
                (set, naive)
            };
            let ((one, naive_one), (two, naive_two)) = (make(&one), make(&two));
            prop_assert_eq!(blocks(&one), naive_one.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(one.len() as usize, naive_one.len());
            let difference = one.without(&two);
            prop_assert_eq!(blocks(&difference), naive_one.difference(&naive_two).copied().collect::<Vec<_>>());
            prop_assert_eq!(difference.is_empty(), naive_one.is_subset(&naive_two));
            let mut both = one.clone();
            both.extend(&two);
            prop_assert_eq!(blocks(&both), naive_one.union(&naive_two).copied().collect::<Vec<_>>());
            prop_assert_eq!(both.len() as usize, naive_one.union(&naive_two).count());
            for block in 0..total {
                prop_assert_eq!(one.contains(block), naive_one.contains(&block));
            }
            let ranges: Vec<_> = one.ranges().collect();
            prop_assert!(ranges.windows(2).all(|pair| pair[0].start + pair[0].count < pair[1].start));
        }
    }
}
