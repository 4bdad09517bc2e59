// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The map of one vSSD: for each block, whether it is plugged and where its data lies.
//!
//! One flat array of atomics, four bytes a block; a read is one load and takes no lock. A maximum that is
//! raised later adds a segment behind the first and never moves what is there, so a reader needs no care.
//!
//! ```text
//! bit 31   fenced: an unplug is on its way, new requests wait
//! bits 0…  0 unplugged · 1 plugged, no data (reads as zeroes) · p + 2 plugged, data in physical block p
//! ```
//!
//! Who may change what: lanes turn *empty* into *mapped* and back, by compare-and-exchange under the
//! ledger's lock, and never touch a fenced entry. Only the keeper sets and clears the fence, plugs and
//! unplugs. The map knows no journal; whoever changes it appends the record under the same lock, so that
//! the journal's order is the map's order.

use std::fmt;

use vssd_protocol::units::{BlockIndex, PhysicalBlock};

use crate::sync::{AtomicU32, OnceLock, Ordering, zeroed};

const FENCED: u32 = 1 << 31;
const UNPLUGGED: u32 = 0;
const EMPTY: u32 = 1;
const FIRST_MAPPED: u32 = 2;

/// The most physical blocks a pool can have: what the encoding leaves room for.
pub(crate) const MAX_PHYSICAL_BLOCKS: u32 = FENCED - FIRST_MAPPED;

/// The most blocks a vSSD can have (its map then takes 4 GiB).
pub(crate) const MAX_VSSD_BLOCKS: u32 = 1 << 30;

/// How many times larger than its pool a vSSD may be. Nobody overcommits like that, and what a damaged medium claims beyond it would
/// cost seconds and gigabytes to look at.
const MAX_STRETCH: u32 = 4096;

/// The most blocks a vSSD of a pool of `physical` blocks can have.
pub(crate) fn most_blocks(physical: u32) -> u32 {
    physical.saturating_mul(MAX_STRETCH).min(MAX_VSSD_BLOCKS)
}

/// Segments beyond the first; each doubles the length. 2³⁰ blocks are reached from any start.
const EXTENSIONS: usize = 31;

/// What a map says about one block.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry(u32);

impl Entry {
    pub(crate) const UNPLUGGED: Self = Self(UNPLUGGED);
    pub(crate) const EMPTY: Self = Self(EMPTY);

    /// `block` must be below [`MAX_PHYSICAL_BLOCKS`].
    pub(crate) fn mapped(block: PhysicalBlock) -> Self {
        Self(block.0 + FIRST_MAPPED)
    }

    pub(crate) fn is_fenced(self) -> bool {
        self.0 & FENCED != 0
    }

    pub(crate) fn is_plugged(self) -> bool {
        self.0 & !FENCED != UNPLUGGED
    }

    pub(crate) fn is_empty(self) -> bool {
        self.0 & !FENCED == EMPTY
    }

    /// Where the data lies, fenced or not.
    pub(crate) fn physical(self) -> Option<PhysicalBlock> {
        (self.0 & !FENCED).checked_sub(FIRST_MAPPED).map(PhysicalBlock)
    }

    pub(crate) fn unfenced(self) -> Self {
        Self(self.0 & !FENCED)
    }

    /// The form kept in checkpoints, without the fence.
    pub(crate) fn to_bits(self) -> u32 {
        self.0 & !FENCED
    }

    pub(crate) fn from_bits(bits: u32) -> Self {
        Self(bits & !FENCED)
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fence = if self.is_fenced() { "fenced " } else { "" };
        match (self.is_plugged(), self.physical()) {
            (false, _) => write!(f, "{fence}unplugged"),
            (true, None) => write!(f, "{fence}empty"),
            (true, Some(block)) => write!(f, "{fence}at {}", block.0),
        }
    }
}

/// See the module's text.
pub(crate) struct Map {
    first: Box<[AtomicU32]>,
    /// `first.len()` rounded up to a power of two, as a shift: extension `i` covers
    /// `2^(shift + i) .. 2^(shift + i + 1)`, and what lies between `first.len()` and `2^shift` is in
    /// `gap`.
    shift: u32,
    gap: OnceLock<Box<[AtomicU32]>>,
    extensions: [OnceLock<Box<[AtomicU32]>>; EXTENSIONS],
    len: AtomicU32,
}

impl fmt::Debug for Map {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Map({} blocks)", self.len())
    }
}

/// The map of a large, hardly plugged vSSD takes no memory.
fn unplugged_entries(len: usize) -> Box<[AtomicU32]> {
    const { assert!(UNPLUGGED == 0) };
    zeroed(len)
}

impl Map {
    /// `len` unplugged blocks; `len` is at most [`MAX_VSSD_BLOCKS`].
    pub(crate) fn new(len: u32) -> Self {
        Self {
            first: unplugged_entries(len as usize),
            shift: len.max(1).next_power_of_two().trailing_zeros(),
            gap: OnceLock::new(),
            extensions: [const { OnceLock::new() }; EXTENSIONS],
            len: AtomicU32::new(len),
        }
    }

    pub(crate) fn len(&self) -> u32 {
        self.len.load(Ordering::Acquire)
    }

    /// Makes room for `len` blocks in all; the new ones are unplugged. Never shrinks.
    pub(crate) fn extend(&self, len: u32) {
        let base = 1usize << self.shift;
        if len as usize > self.first.len() && base > self.first.len() {
            self.gap.get_or_init(|| unplugged_entries(base - self.first.len()));
        }
        for (i, extension) in self.extensions.iter().enumerate() {
            let start = base << i;
            if start >= len as usize {
                break;
            }
            extension.get_or_init(|| unplugged_entries(start));
        }
        self.len.fetch_max(len, Ordering::Release);
    }

    fn slot(&self, block: u32) -> Option<&AtomicU32> {
        let index = block as usize;
        if let Some(slot) = self.first.get(index) {
            return Some(slot);
        }
        if block >> self.shift == 0 {
            return self.gap.get()?.get(index - self.first.len());
        }
        let extension = block.ilog2() - self.shift;
        self.extensions.get(extension as usize)?.get()?.get(index - (1 << block.ilog2()))
    }

    /// What the map says; past its end, unplugged.
    pub(crate) fn get(&self, block: BlockIndex) -> Entry {
        Entry(self.slot(block.0).map_or(UNPLUGGED, |slot| slot.load(Ordering::Acquire)))
    }

    /// What a request needs to know of a block. The feature `identity-map` answers without the map, so that a benchmark can tell
    /// what the map costs; nothing is kept apart then.
    pub(crate) fn lookup(&self, block: BlockIndex) -> Entry {
        if cfg!(feature = "identity-map") { Entry::mapped(PhysicalBlock(block.0)) } else { self.get(block) }
    }

    /// Keeper and recovery only.
    pub(crate) fn set(&self, block: BlockIndex, entry: Entry) {
        if let Some(slot) = self.slot(block.0) {
            slot.store(entry.0, Ordering::Release);
        }
    }

    /// Turns `from` into `to` if it is still `from`; else says what is there.
    pub(crate) fn exchange(&self, block: BlockIndex, from: Entry, to: Entry) -> Result<(), Entry> {
        let slot = self.slot(block.0).ok_or(Entry::UNPLUGGED)?;
        slot.compare_exchange(from.0, to.0, Ordering::AcqRel, Ordering::Acquire).map(|_| ()).map_err(Entry)
    }

    /// Keeper only. What was there.
    pub(crate) fn fence(&self, block: BlockIndex) -> Entry {
        Entry(self.slot(block.0).map_or(UNPLUGGED, |slot| slot.fetch_or(FENCED, Ordering::AcqRel)))
    }

    /// Keeper only.
    pub(crate) fn unfence(&self, block: BlockIndex) {
        if let Some(slot) = self.slot(block.0) {
            slot.fetch_and(!FENCED, Ordering::AcqRel);
        }
    }

    /// Maximal runs of plugged blocks from `start` on, each empty throughout or with data in consecutive
    /// physical blocks: (first block, how many, entry of the first). A concurrent change may split a run.
    pub(crate) fn runs(&self, start: u32) -> impl Iterator<Item = (u32, u32, Entry)> + '_ {
        let len = self.len();
        let mut at = start;
        std::iter::from_fn(move || {
            let first = loop {
                if at >= len {
                    return None;
                }
                let entry = self.get(BlockIndex(at)).unfenced();
                if entry.is_plugged() {
                    break entry;
                }
                at += 1;
            };
            let begin = at;
            at += 1;
            while at < len {
                let expected = match first.physical() {
                    None => Entry::EMPTY,
                    Some(physical) => Entry::mapped(PhysicalBlock(physical.0 + (at - begin))),
                };
                if self.get(BlockIndex(at)).unfenced() != expected {
                    break;
                }
                at += 1;
            }
            Some((begin, at - begin, first))
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn entries_tell_their_states_apart() {
        let mapped = Entry::mapped(PhysicalBlock(MAX_PHYSICAL_BLOCKS - 1));
        assert!(mapped.is_plugged() && !mapped.is_empty() && !mapped.is_fenced());
        assert_eq!(mapped.physical(), Some(PhysicalBlock(MAX_PHYSICAL_BLOCKS - 1)));
        assert!(Entry::EMPTY.is_plugged() && Entry::EMPTY.is_empty());
        assert!(!Entry::UNPLUGGED.is_plugged());
        assert_eq!(Entry::EMPTY.physical(), None);
        assert_eq!(Entry::from_bits(mapped.to_bits()), mapped);
    }

    #[test]
    fn fenced_entry_keeps_its_place_and_refuses_exchange() {
        let map = Map::new(2);
        let block = BlockIndex(1);
        map.set(block, Entry::mapped(PhysicalBlock(7)));
        map.fence(block);
        assert!(map.get(block).is_fenced());
        assert_eq!(map.get(block).physical(), Some(PhysicalBlock(7)));
        assert!(map.exchange(block, Entry::mapped(PhysicalBlock(7)), Entry::EMPTY).is_err());
        map.unfence(block);
        assert_eq!(map.exchange(block, Entry::mapped(PhysicalBlock(7)), Entry::EMPTY), Ok(()));
    }

    proptest! {
        #[test]
        fn every_block_has_a_slot_of_its_own_through_any_extensions(
            first in 0u32..70, steps in prop::collection::vec(1u32..90, 0..5)
        ) {
            let map = Map::new(first);
            let mut len = first;
            for step in steps {
                for block in 0..len {
                    map.set(BlockIndex(block), Entry::mapped(PhysicalBlock(block)));
                }
                map.extend(len + step);
                for block in len..len + step {
                    prop_assert_eq!(map.get(BlockIndex(block)), Entry::UNPLUGGED);
                }
                len += step;
            }
            for block in 0..len {
                map.set(BlockIndex(block), Entry::mapped(PhysicalBlock(block)));
            }
            for block in 0..len {
                prop_assert_eq!(map.get(BlockIndex(block)).physical(), Some(PhysicalBlock(block)));
            }
            prop_assert_eq!(map.len(), len);
            prop_assert!(map.runs(0).map(|run| run.1).sum::<u32>() == len);
        }
    }
}
