// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A set of small numbers, one bit each.

/// Numbers below `len`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bitmap {
    words: Vec<u64>,
    len: u32,
    ones: u32,
}

impl Bitmap {
    pub(crate) fn new(len: u32) -> Self {
        Self { words: vec![0; len.div_ceil(64) as usize], len, ones: 0 }
    }

    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    /// How many numbers are in the set.
    pub(crate) fn ones(&self) -> u32 {
        self.ones
    }

    pub(crate) fn contains(&self, i: u32) -> bool {
        self.words.get(i as usize / 64).is_some_and(|word| word >> (i % 64) & 1 != 0)
    }

    /// Whether it was new. Numbers from `len` on are ignored.
    pub(crate) fn insert(&mut self, i: u32) -> bool {
        if i >= self.len || self.contains(i) {
            return false;
        }
        self.words[i as usize / 64] |= 1 << (i % 64);
        self.ones += 1;
        true
    }

    /// Whether it was there.
    pub(crate) fn remove(&mut self, i: u32) -> bool {
        if !self.contains(i) {
            return false;
        }
        self.words[i as usize / 64] &= !(1 << (i % 64));
        self.ones -= 1;
        true
    }

    /// The first member within `from..end`.
    pub(crate) fn next(&self, from: u32, end: u32) -> Option<u32> {
        let end = end.min(self.len);
        let mut at = from;
        while at < end {
            let word = self.words[at as usize / 64] >> (at % 64);
            if word != 0 {
                let found = at + word.trailing_zeros();
                return (found < end).then_some(found);
            }
            at = (at / 64 + 1).checked_mul(64)?;
        }
        None
    }

    /// How many members follow each other from the member `start` on, at most up to `end`.
    pub(crate) fn run(&self, start: u32, end: u32) -> u32 {
        let end = end.min(self.len);
        let mut at = start;
        while at < end && self.contains(at) {
            at += 1;
        }
        at - start
    }

    pub(crate) fn words(&self) -> &[u64] {
        &self.words
    }

    /// From [`Bitmap::words`]; `None` unless the length fits and no bit beyond it is set.
    pub(crate) fn from_words(words: Vec<u64>, len: u32) -> Option<Self> {
        if words.len() != len.div_ceil(64) as usize {
            return None;
        }
        if !len.is_multiple_of(64) && words.last().is_some_and(|word| word >> (len % 64) != 0) {
            return None;
        }
        let ones = words.iter().map(|word| word.count_ones()).sum();
        Some(Self { words, len, ones })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn bitmap_is_a_set(ops in prop::collection::vec((any::<bool>(), 0u32..200), 0..300), from in 0u32..210, end in 0u32..210) {
            let mut bitmap = Bitmap::new(150);
            let mut oracle = BTreeSet::new();
            for (insert, i) in ops {
                if insert {
                    prop_assert_eq!(bitmap.insert(i), i < 150 && oracle.insert(i));
                } else {
                    prop_assert_eq!(bitmap.remove(i), oracle.remove(&i));
                }
            }
            prop_assert_eq!(bitmap.ones() as usize, oracle.len());
            let expected = oracle.iter().copied().find(|&i| i >= from && i < end);
            prop_assert_eq!(bitmap.next(from, end), expected);
            if let Some(start) = expected {
                let run = (start..end).take_while(|i| oracle.contains(i)).count();
                prop_assert_eq!(bitmap.run(start, end) as usize, run);
            }
            prop_assert_eq!(Bitmap::from_words(bitmap.words().to_vec(), 150), Some(bitmap));
        }
    }
}
