// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The physical blocks of a pool and the way each goes round:
//!
//! ```text
//!          refill (Reserve, durable)      take               release         scrub (zeroed, durable)
//!  clean ───────────────────────► reserve ────► leased ──────────────► dirty ───────────────► clean
//! ```
//!
//! Only a *clean* block is known to be zero on its medium and recorded so; recovery takes every block that
//! is neither in a map nor clean for dirty. That is why a block is recorded as reserved *before* a tenant
//! may write to it: otherwise a crash would leave one tenant's bytes in a block that counts as clean.
//!
//! The reserve is the pool's, not a lane's. A first write takes the ledger's lock anyway, for its journal
//! record; a reserve in each lane would save nothing and let one lane sit on the last block that another
//! needs.
//!
//! Pure bookkeeping: it knows neither journal nor media, and a caller holds the ledger's lock.

use vssd_protocol::units::{BlockSize, PhysicalBlock};

use crate::bitmap::Bitmap;
use crate::types::{Class, MediumKind};

/// Consecutive physical blocks of one medium.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PhysicalRun {
    pub(crate) start: u32,
    pub(crate) count: u32,
}

/// What one medium contributes.
#[derive(Debug, Default)]
struct Side {
    first: u32,
    count: u32,
    clean: u32,
    leased: u32,
    scrubbing: u32,
    /// Ready for first writes; the next one is at the end.
    reserve: Vec<u32>,
    /// Reserved by a journal record that may not be durable yet: (its position, the blocks).
    pending: Vec<(u64, Vec<u32>)>,
    cursor: u32,
    /// Blocks that vSSDs confined to this medium are promised and have not taken yet.
    promised_here: i64,
}

impl Side {
    fn end(&self) -> u32 {
        self.first + self.count
    }

    fn reserved(&self) -> usize {
        self.reserve.len() + self.pending.iter().map(|(_, blocks)| blocks.len()).sum::<usize>()
    }

    /// Whether a vSSD that may go elsewhere may take a block here without breaking a promise.
    fn has_room_for_any(&self) -> bool {
        i64::from(self.count - self.leased) > self.promised_here
    }
}

/// How many blocks are where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) clean: u32,
    pub(crate) reserved: u32,
    pub(crate) leased: u32,
    /// Waiting to be zeroed, or being zeroed.
    pub(crate) dirty: u32,
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Blocks {
    clean: Bitmap,
    dirty: Bitmap,
    sides: [Side; 2],
    reserve_target: usize,
}

impl Blocks {
    /// `counts`: blocks of each medium, indexed like [`MediumKind::ALL`]. What is neither clean nor leased is dirty.
    pub(crate) fn new(block_size: BlockSize, counts: [u32; 2], clean: Bitmap, leased: &Bitmap) -> Self {
        let mut dirty = Bitmap::new(clean.len());
        let mut sides = [Side::default(), Side::default()];
        let mut first = 0;
        for (side, count) in sides.iter_mut().zip(counts) {
            side.first = first;
            side.count = count;
            side.cursor = first;
            first += count;
            for block in side.first..side.end() {
                if leased.contains(block) {
                    side.leased += 1;
                } else if clean.contains(block) {
                    side.clean += 1;
                } else {
                    dirty.insert(block);
                }
            }
        }
        // 64 MiB in hand last a few hundredths of a second at full speed, longer than a journal commit; a
        // crash makes the scrubber do that much over again.
        let reserve_target = usize::try_from((64 << 20) / block_size.bytes()).unwrap_or(1024).clamp(8, 1024);
        Self { clean, dirty, sides, reserve_target }
    }

    pub(crate) fn kind_of(&self, block: PhysicalBlock) -> MediumKind {
        if block.0 < self.sides[0].end() { MediumKind::Nvram } else { MediumKind::Ssd }
    }

    pub(crate) fn counts_of(&self, kind: MediumKind) -> Counts {
        let side = &self.sides[kind.index()];
        let reserved = u32::try_from(side.reserved()).unwrap_or(u32::MAX);
        Counts {
            clean: side.clean,
            reserved,
            leased: side.leased,
            dirty: side.count - side.clean - side.leased - reserved,
        }
    }

    pub(crate) fn counts(&self) -> Counts {
        let [a, b] = MediumKind::ALL.map(|kind| self.counts_of(kind));
        Counts {
            clean: a.clean + b.clean,
            reserved: a.reserved + b.reserved,
            leased: a.leased + b.leased,
            dirty: a.dirty + b.dirty,
        }
    }

    /// The set that checkpoints record.
    pub(crate) fn clean(&self) -> &Bitmap {
        &self.clean
    }

    /// How many blocks vSSDs confined to `kind` are promised beyond what they hold.
    pub(crate) fn set_promised(&mut self, kind: MediumKind, blocks: i64) {
        self.sides[kind.index()].promised_here = blocks;
    }

    /// Leases a block that is zero and recorded as reserved, given how far the journal is durable. `None`:
    /// none is at hand now.
    pub(crate) fn take(&mut self, class: Class, durable: u64) -> Option<PhysicalBlock> {
        for kind in MediumKind::ALL {
            let strict = class.strict();
            let side = &mut self.sides[kind.index()];
            if strict.is_some_and(|only| only != kind) || (strict.is_none() && !side.has_room_for_any()) {
                continue;
            }
            if side.reserve.is_empty()
                && let Some(ready) = side.pending.iter().position(|(position, _)| *position <= durable)
            {
                side.reserve = side.pending.swap_remove(ready).1;
            }
            if let Some(block) = side.reserve.pop() {
                side.leased += 1;
                side.promised_here -= i64::from(strict.is_some());
                return Some(PhysicalBlock(block));
            }
        }
        None
    }

    /// Undoes a [`Blocks::take`] whose block was not used.
    pub(crate) fn put_back(&mut self, block: PhysicalBlock, class: Class) {
        let kind = self.kind_of(block);
        let side = &mut self.sides[kind.index()];
        side.leased -= 1;
        side.promised_here += i64::from(class.strict() == Some(kind));
        side.reserve.push(block.0);
    }

    /// A leased block of a vSSD of `class` was given back and awaits scrubbing.
    pub(crate) fn release(&mut self, block: PhysicalBlock, class: Class) {
        let kind = self.kind_of(block);
        let side = &mut self.sides[kind.index()];
        side.leased -= 1;
        side.promised_here += i64::from(class.strict() == Some(kind));
        self.dirty.insert(block.0);
    }

    /// Which media's reserves are low while there are clean blocks.
    pub(crate) fn wants_refill(&self) -> bool {
        self.sides.iter().any(|side| self.refill_size(side) > 0)
    }

    fn refill_size(&self, side: &Side) -> usize {
        // Of a small pool an eighth: what is in reserve is zeroed once more after a crash.
        let target = self.reserve_target.min((side.count as usize / 8).max(4));
        let reserved = side.reserved();
        if reserved > target / 2 { 0 } else { (target - reserved).min(side.clean as usize) }
    }

    /// Takes clean blocks out of the clean set, for records `Reserve` that the caller appends to the journal
    /// under the same lock, then reports with [`Blocks::reserved`]. At most `max` runs.
    pub(crate) fn refill(&mut self, max: usize) -> Vec<PhysicalRun> {
        let mut runs = Vec::new();
        for i in 0..self.sides.len() {
            let mut wanted = u32::try_from(self.refill_size(&self.sides[i])).unwrap_or(u32::MAX);
            let side = &mut self.sides[i];
            while wanted > 0 && runs.len() < max {
                let found = self
                    .clean
                    .next(side.cursor, side.end())
                    .or_else(|| self.clean.next(side.first, side.end()));
                let Some(start) = found else { break };
                let count = self.clean.run(start, side.end().min(start.saturating_add(wanted)));
                for block in start..start + count {
                    self.clean.remove(block);
                }
                side.clean -= count;
                side.cursor = start + count;
                wanted -= count;
                runs.push(PhysicalRun { start, count });
            }
        }
        runs
    }

    /// The runs of a refill were recorded; `position` is that of the last record.
    pub(crate) fn reserved(&mut self, runs: &[PhysicalRun], position: u64) {
        for side in &mut self.sides {
            let of_side = |run: &&PhysicalRun| run.start >= side.first && run.start < side.end();
            let mut blocks: Vec<u32> =
                runs.iter().filter(of_side).flat_map(|run| run.start..run.start + run.count).collect();
            if !blocks.is_empty() {
                // Taken from the end: consecutive first writes then get consecutive blocks.
                blocks.reverse();
                side.pending.push((position, blocks));
            }
        }
    }

    /// Everything in reserve goes back to the clean set. Only sound once no lane can take any more, and before
    /// a checkpoint.
    pub(crate) fn return_reserve(&mut self) {
        for side in &mut self.sides {
            let pending = side.pending.drain(..).flat_map(|(_, blocks)| blocks);
            for block in side.reserve.drain(..).chain(pending) {
                self.clean.insert(block);
                side.clean += 1;
            }
        }
    }

    pub(crate) fn has_dirty(&self) -> bool {
        self.dirty.ones() > 0
    }

    /// Takes dirty blocks to be zeroed, at most `max_blocks` in at most `max_runs` runs.
    pub(crate) fn take_dirty(&mut self, max_blocks: u32, max_runs: usize) -> Vec<PhysicalRun> {
        let mut runs = Vec::new();
        let mut left = max_blocks;
        for side in &mut self.sides {
            let mut at = side.first;
            while left > 0
                && runs.len() < max_runs
                && let Some(start) = self.dirty.next(at, side.end())
            {
                let count = self.dirty.run(start, side.end().min(start.saturating_add(left)));
                for block in start..start + count {
                    self.dirty.remove(block);
                }
                side.scrubbing += count;
                left -= count;
                at = start + count;
                runs.push(PhysicalRun { start, count });
            }
        }
        runs
    }

    /// A run from [`Blocks::take_dirty`] is zero, durably. The caller appends the record `Clean`.
    pub(crate) fn cleaned(&mut self, run: PhysicalRun) {
        let kind = self.kind_of(PhysicalBlock(run.start));
        let side = &mut self.sides[kind.index()];
        side.scrubbing -= run.count;
        side.clean += run.count;
        for block in run.start..run.start + run.count {
            self.clean.insert(block);
        }
    }

    /// A run from [`Blocks::take_dirty`] could not be zeroed; it stays dirty.
    pub(crate) fn still_dirty(&mut self, run: PhysicalRun) {
        let kind = self.kind_of(PhysicalBlock(run.start));
        self.sides[kind.index()].scrubbing -= run.count;
        for block in run.start..run.start + run.count {
            self.dirty.insert(block);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all_clean(counts: [u32; 2]) -> Blocks {
        let total = counts[0] + counts[1];
        let mut clean = Bitmap::new(total);
        for block in 0..total {
            clean.insert(block);
        }
        Blocks::new(BlockSize::DEFAULT, counts, clean, &Bitmap::new(total))
    }

    fn refill_now(blocks: &mut Blocks) {
        let runs = blocks.refill(usize::MAX);
        blocks.reserved(&runs, 1);
    }

    #[test]
    fn reserved_block_is_not_taken_before_its_record_is_durable() {
        let mut blocks = all_clean([4, 0]);
        let runs = blocks.refill(usize::MAX);
        assert_eq!(runs, [PhysicalRun { start: 0, count: 4 }]);
        blocks.reserved(&runs, 7);
        assert_eq!(blocks.take(Class::Any, 6), None);
        assert_eq!(blocks.take(Class::Any, 7), Some(PhysicalBlock(0)));
    }

    #[test]
    fn any_prefers_nvram_but_leaves_what_confined_vssds_are_promised() {
        let mut blocks = all_clean([3, 3]);
        refill_now(&mut blocks);
        blocks.set_promised(MediumKind::Nvram, 2);
        assert_eq!(blocks.take(Class::Any, 1), Some(PhysicalBlock(0)));
        assert_eq!(blocks.take(Class::Any, 1), Some(PhysicalBlock(3)));
        assert_eq!(blocks.take(Class::Nvram, 1), Some(PhysicalBlock(1)));
        assert_eq!(blocks.take(Class::Any, 1), Some(PhysicalBlock(4)));
        assert_eq!(blocks.take(Class::Nvram, 1), Some(PhysicalBlock(2)));
        assert_eq!(blocks.take(Class::Nvram, 1), None);
    }

    proptest! {
        /// Whatever happens, every block is in exactly one place and none is lost.
        #[test]
        fn blocks_go_round_without_loss(
            counts in prop::array::uniform2(0u32..40), ops in prop::collection::vec((0u8..6, 0usize..64), 0..400)
        ) {
            let mut blocks = all_clean(counts);
            let mut leased: Vec<PhysicalBlock> = Vec::new();
            let mut scrubbing: Vec<PhysicalRun> = Vec::new();
            for (op, pick) in ops {
                match op {
                    0 => refill_now(&mut blocks),
                    1 => if let Some(block) = blocks.take(Class::Any, 1) {
                        prop_assert!(!leased.contains(&block), "{block:?} leased twice");
                        prop_assert!(!scrubbing.iter().any(|r| (r.start..r.start + r.count).contains(&block.0)));
                        leased.push(block);
                    },
                    2 if !leased.is_empty() => {
                        let block = leased.swap_remove(pick % leased.len());
                        blocks.release(block, Class::Any);
                    }
                    3 => scrubbing.extend(blocks.take_dirty(u32::try_from(pick).unwrap(), 3)),
                    4 if !scrubbing.is_empty() => {
                        let run = scrubbing.swap_remove(pick % scrubbing.len());
                        if pick % 3 == 0 { blocks.still_dirty(run) } else { blocks.cleaned(run) }
                    }
                    5 => blocks.return_reserve(),
                    _ => {}
                }
                let sum = blocks.counts();
                prop_assert_eq!(sum.leased as usize, leased.len());
                prop_assert_eq!(sum.clean + sum.reserved + sum.leased + sum.dirty, counts[0] + counts[1]);
                prop_assert_eq!(sum.clean, blocks.clean().ones());
            }
        }
    }
}
