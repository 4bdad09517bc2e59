// SPDX-License-Identifier: Apache-2.0 OR MIT

//! One vSSD: its map, its directory entry and its counters. It knows neither journal nor media; the keeper
//! and the lanes change it, each what `map` says is theirs.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};

use vssd_protocol::units::{BlockIndex, BlockRange, BlockSize};

use crate::arbiter::Promise;
use crate::lock;
use crate::map::Map;
use crate::record::Meta;
use crate::types::{Class, MediumKind, Uuid, VssdAttrs, VssdId, VssdStats};

/// One resizable disk of the pool. Every method is cheap and may be called from any thread; [`Vssd::attrs`] takes a
/// short lock of its own, [`Vssd::plugged_ranges`] and [`Vssd::last_allocated_block`] scan the map.
#[derive(Debug)]
pub struct Vssd {
    id: VssdId,
    uuid: Uuid,
    name: String,
    block_size: BlockSize,
    /// Which opening of which pool it belongs to.
    instance: u64,
    map: Map,
    plugged: AtomicU32,
    allocated: AtomicU32,
    deleted: AtomicBool,
    attrs: Mutex<VssdAttrs>,
    /// `attrs.class` for lanes; changes under the ledger's lock.
    class: AtomicU8,
    counters: [Counters; COUNTER_SHARDS],
}

/// Lanes count in different cache lines; more than this many share them again.
const COUNTER_SHARDS: usize = 8;

#[repr(align(128))]
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) reads: AtomicU64,
    pub(crate) writes: AtomicU64,
    pub(crate) flushes: AtomicU64,
    pub(crate) discards: AtomicU64,
    pub(crate) bytes_read: [AtomicU64; 2],
    pub(crate) bytes_written: [AtomicU64; 2],
    pub(crate) evicted: AtomicU64,
    pub(crate) first_touches: AtomicU64,
}

pub(crate) fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

impl Vssd {
    pub(crate) fn new(meta: Meta, map: Map, block_size: BlockSize, instance: u64) -> Self {
        let (mut plugged, mut allocated) = (0, 0);
        for (_, count, entry) in map.runs(0) {
            plugged += count;
            allocated += if entry.is_empty() { 0 } else { count };
        }
        Self {
            id: meta.id,
            uuid: meta.uuid,
            name: meta.name,
            block_size,
            instance,
            map,
            plugged: AtomicU32::new(plugged),
            allocated: AtomicU32::new(allocated),
            deleted: AtomicBool::new(false),
            class: AtomicU8::new(class_to_bits(meta.attrs.class)),
            attrs: Mutex::new(meta.attrs),
            counters: std::array::from_fn(|_| Counters::default()),
        }
    }

    pub fn id(&self) -> VssdId {
        self.id
    }

    pub fn uuid(&self) -> Uuid {
        self.uuid
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn block_size(&self) -> BlockSize {
        self.block_size
    }

    /// How many blocks it can hold: its maximum.
    pub fn total_blocks(&self) -> u32 {
        self.map.len()
    }

    /// How many blocks are plugged.
    pub fn plugged_blocks(&self) -> u32 {
        self.plugged.load(Ordering::Acquire)
    }

    /// How many blocks hold data.
    pub fn allocated_blocks(&self) -> u32 {
        self.allocated.load(Ordering::Acquire)
    }

    pub fn attrs(&self) -> VssdAttrs {
        lock(&self.attrs).clone()
    }

    pub fn is_plugged(&self, block: BlockIndex) -> bool {
        self.map.get(block).is_plugged()
    }

    /// Appends at most `max` maximal runs of plugged blocks from `start` on, with `empty_only` only of
    /// those without data, and returns where to go on, or `None` at the end. A resize that runs meanwhile
    /// may or may not be seen.
    pub fn plugged_ranges(
        &self,
        start: BlockIndex,
        empty_only: bool,
        max: usize,
        out: &mut Vec<BlockRange>,
    ) -> Option<BlockIndex> {
        let first = out.len();
        for (at, count, entry) in self.map.runs(start.0) {
            if empty_only && !entry.is_empty() {
                continue;
            }
            // The map's runs also end where the physical blocks jump.
            if let Some(last) = out[first..].last_mut()
                && last.end() == Some(at)
            {
                last.count += count;
            } else if out.len() - first == max {
                return Some(BlockIndex(at));
            } else {
                out.push(BlockRange::new(at, count));
            }
        }
        None
    }

    /// The highest block that holds data: a disk cut above it loses nothing.
    pub fn last_allocated_block(&self) -> Option<BlockIndex> {
        (0..self.total_blocks()).rev().map(BlockIndex).find(|&block| self.map.get(block).physical().is_some())
    }

    /// Whether it was deleted; every block answers `Evicted` from then on.
    pub fn is_deleted(&self) -> bool {
        self.deleted.load(Ordering::Acquire)
    }

    pub fn stats(&self) -> VssdStats {
        let mut stats = VssdStats::default();
        for shard in &self.counters {
            let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
            stats.reads += get(&shard.reads);
            stats.writes += get(&shard.writes);
            stats.flushes += get(&shard.flushes);
            stats.discards += get(&shard.discards);
            stats.evicted += get(&shard.evicted);
            stats.first_touches += get(&shard.first_touches);
            for i in 0..2 {
                stats.bytes_read[i] += get(&shard.bytes_read[i]);
                stats.bytes_written[i] += get(&shard.bytes_written[i]);
            }
        }
        stats
    }

    pub(crate) fn instance(&self) -> u64 {
        self.instance
    }

    pub(crate) fn map(&self) -> &Map {
        &self.map
    }

    pub(crate) fn counters(&self, lane: usize) -> &Counters {
        &self.counters[lane % COUNTER_SHARDS]
    }

    pub(crate) fn class(&self) -> Class {
        match self.class.load(Ordering::Relaxed) {
            1 => Class::Nvram,
            2 => Class::Ssd,
            _ => Class::Any,
        }
    }

    pub(crate) fn promise(&self) -> Promise {
        let attrs = lock(&self.attrs);
        Promise::new(self.plugged_blocks(), attrs.requested_blocks, attrs.class)
    }

    pub(crate) fn meta(&self) -> Meta {
        Meta {
            id: self.id,
            uuid: self.uuid,
            name: self.name.clone(),
            max_blocks: self.total_blocks(),
            attrs: self.attrs(),
        }
    }

    /// Keeper only, under the ledger's lock.
    pub(crate) fn set_attrs(&self, attrs: VssdAttrs) {
        self.class.store(class_to_bits(attrs.class), Ordering::Relaxed);
        *lock(&self.attrs) = attrs;
    }

    /// Keeper only.
    pub(crate) fn set_deleted(&self) {
        self.deleted.store(true, Ordering::Release);
    }

    /// Keeper only.
    pub(crate) fn add_plugged(&self, count: u32) {
        self.plugged.fetch_add(count, Ordering::AcqRel);
    }

    /// Keeper only.
    pub(crate) fn sub_plugged(&self, count: u32) {
        self.plugged.fetch_sub(count, Ordering::AcqRel);
    }

    /// Under the ledger's lock.
    pub(crate) fn add_allocated(&self, count: u32) {
        self.allocated.fetch_add(count, Ordering::AcqRel);
    }

    /// Under the ledger's lock.
    pub(crate) fn sub_allocated(&self, count: u32) {
        self.allocated.fetch_sub(count, Ordering::AcqRel);
    }

    /// How many blocks confined to one medium it is promised and has not taken; under the ledger's lock.
    pub(crate) fn promised_on(&self, kind: MediumKind) -> i64 {
        if self.class().strict() == Some(kind) {
            i64::from(self.promise().blocks) - i64::from(self.allocated_blocks())
        } else {
            0
        }
    }
}

fn class_to_bits(class: Class) -> u8 {
    match class {
        Class::Any => 0,
        Class::Nvram => 1,
        Class::Ssd => 2,
    }
}

#[cfg(test)]
mod tests {
    use vssd_protocol::units::PhysicalBlock;

    use super::*;
    use crate::map::Entry;

    fn vssd() -> Vssd {
        let map = Map::new(20);
        for (block, physical) in [(2, 7), (3, 8), (4, 1), (9, 2)] {
            map.set(BlockIndex(block), Entry::mapped(PhysicalBlock(physical)));
        }
        for block in [5, 6, 12] {
            map.set(BlockIndex(block), Entry::EMPTY);
        }
        let meta = Meta {
            id: VssdId(1),
            uuid: Uuid([0; 16]),
            name: "a".to_owned(),
            max_blocks: 20,
            attrs: VssdAttrs::default(),
        };
        Vssd::new(meta, map, BlockSize::DEFAULT, 1)
    }

    #[test]
    fn plugged_ranges_are_paged_and_joined() {
        let vssd = vssd();
        let mut out = Vec::new();
        assert_eq!(vssd.plugged_ranges(BlockIndex(0), false, 2, &mut out), Some(BlockIndex(12)));
        assert_eq!(out, [BlockRange::new(2, 5), BlockRange::new(9, 1)]);
        out.clear();
        assert_eq!(vssd.plugged_ranges(BlockIndex(12), false, 2, &mut out), None);
        assert_eq!(out, [BlockRange::new(12, 1)]);
        out.clear();
        assert_eq!(vssd.plugged_ranges(BlockIndex(0), true, 9, &mut out), None);
        assert_eq!(out, [BlockRange::new(5, 2), BlockRange::new(12, 1)]);
    }

    #[test]
    fn counts_come_from_the_map() {
        let vssd = vssd();
        assert_eq!((vssd.plugged_blocks(), vssd.allocated_blocks()), (7, 4));
        assert_eq!(vssd.last_allocated_block(), Some(BlockIndex(9)));
        assert!(vssd.is_plugged(BlockIndex(12)) && !vssd.is_plugged(BlockIndex(13)));
    }
}
