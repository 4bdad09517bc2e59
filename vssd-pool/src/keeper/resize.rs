// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Plugging and unplugging: choose → fence → (grace) → journal, durable → map → tell.
//!
//! A group of resizes is cut into steps, each told of by one record. A message of a guest can bring thousands, and a lane may
//! have to share the keeper's processor, so the work is done at a [`Pace`] that lets others in between small pieces.

use std::collections::BTreeMap;
use std::sync::Arc;

use vssd_protocol::units::{BlockIndex, BlockRange, PhysicalBlock};

use super::{Keeper, RELEASE_AT_ONCE};
use crate::arbiter::Promise;
use crate::command::Resize;
use crate::error::{Error, Result};
use crate::map::Entry;
use crate::record::Record;
use crate::turns::Pace;
use crate::types::{RangeStatus, VssdId};
use crate::vssd::Vssd;

/// A part of a resize that one record tells of.
pub(super) struct Step<'a> {
    pub(super) vssd: &'a Vssd,
    pub(super) start: u32,
    pub(super) count: u32,
}

impl Step<'_> {
    fn blocks(&self) -> impl Iterator<Item = BlockIndex> + use<> {
        (self.start..self.start + self.count).map(BlockIndex)
    }

    pub(super) fn fence(&self, pace: &Pace) {
        for block in self.blocks() {
            self.vssd.map().fence(block);
            pace.did(1);
        }
    }

    pub(super) fn unfence(&self) {
        self.blocks().for_each(|block| self.vssd.map().unfence(block));
    }

    fn holds_data(&self) -> bool {
        self.blocks().any(|block| self.vssd.map().get(block).physical().is_some())
    }
}

/// A resize of a vSSD that there is, and what it is to keep to.
type Found<T> = (Arc<Vssd>, Resize, T);

/// The resizes whose vSSD there is; the others are told that there is none.
fn with_vssds<T>(keeper: &Keeper, group: Vec<(Resize, T)>) -> Vec<Found<T>> {
    let mut found = Vec::with_capacity(group.len());
    for (resize, bound) in group {
        match keeper.find(resize.id) {
            Ok(vssd) => found.push((vssd, resize, bound)),
            Err(error) => (resize.done)(Err(error)),
        }
    }
    found
}

impl Keeper {
    /// Each leaves alone what holds data, if it says so.
    pub(super) fn unplug(&mut self, group: Vec<(Resize, bool)>) {
        let group = with_vssds(self, group);
        // What each vSSD loses in this group, in blocks.
        let mut going: BTreeMap<VssdId, u32> = BTreeMap::new();
        let mut steps = Vec::with_capacity(group.iter().map(|(_, resize, _)| resize.ranges.len()).sum());
        let mut statuses = Vec::with_capacity(group.len());
        for (vssd, resize, empty_only) in &group {
            let going = going.entry(resize.id).or_default();
            let min = vssd.attrs().min_blocks;
            let choose = |range: &BlockRange| {
                choose_unplug(vssd, *range, *empty_only, min, going, &mut steps, &self.pace)
            };
            statuses.push(resize.ranges.iter().map(choose).collect());
        }
        let result = self.unplug_steps(&steps);
        self.finish_resize(group, statuses, result);
    }

    fn unplug_steps(&mut self, steps: &[Step<'_>]) -> Result<()> {
        let mut result = if steps.is_empty() || self.core.grace.synchronize(&self.core.stop) {
            Ok(())
        } else {
            Err(Error::Busy { what: "the pool".to_owned() })
        };
        for chunk in steps.chunks(self.records_at_once()) {
            if result.is_ok() {
                let record = |step: &Step<'_>| Record::Unplug {
                    vssd: step.vssd.id(),
                    start: step.start,
                    count: step.count,
                };
                result = self.journal(chunk.iter().map(record));
            }
            if result.is_ok() { self.drop_from_map(chunk) } else { chunk.iter().for_each(Step::unfence) }
        }
        result
    }

    /// Unplugs fenced blocks in the map and gives their physical blocks to the scrubber.
    pub(super) fn drop_from_map(&self, steps: &[Step<'_>]) {
        let mut freed = Vec::new();
        for step in steps {
            let vssd = step.vssd;
            let mut plugged = 0;
            for block in step.blocks() {
                let entry = vssd.map().get(block);
                plugged += u32::from(entry.is_plugged());
                vssd.map().set(block, Entry::UNPLUGGED);
                if let Some(physical) = entry.physical() {
                    freed.push((vssd, physical));
                    if freed.len() == RELEASE_AT_ONCE {
                        self.release(&mut freed);
                    }
                }
                self.pace.did(1);
            }
            vssd.sub_plugged(plugged);
        }
        self.release(&mut freed);
    }

    fn release(&self, freed: &mut Vec<(&Vssd, PhysicalBlock)>) {
        if freed.is_empty() {
            return;
        }
        let mut ledger = self.core.journal.ledger();
        for (vssd, physical) in freed.drain(..) {
            vssd.sub_allocated(1);
            ledger.blocks.release(physical, vssd.class());
        }
        drop(ledger);
        self.core.scrub_bell.ring();
    }

    /// Each names what its vSSD may have plugged in all.
    pub(super) fn plug(&mut self, group: Vec<(Resize, u32)>) {
        let group = with_vssds(self, group);
        // What each vSSD was given in this group, in blocks.
        let mut given: BTreeMap<VssdId, u32> = BTreeMap::new();
        let mut steps = Vec::with_capacity(group.iter().map(|(_, resize, _)| resize.ranges.len()).sum());
        let mut statuses = Vec::with_capacity(group.len());
        let mut promises: BTreeMap<VssdId, Promise> =
            self.core.vssds().iter().map(|vssd| (vssd.id(), vssd.promise())).collect();
        for (vssd, resize, limit) in &group {
            let given = given.entry(resize.id).or_default();
            // Others' promises stand still meanwhile.
            let promise = promises.remove(&resize.id).unwrap_or_else(|| vssd.promise());
            let others: Vec<_> = promises.values().copied().collect();
            let promisable = self.core.capacity().promisable_to(&others, promise);
            let choose = |range: &BlockRange| {
                choose_plug(vssd, *range, *limit, promisable, given, &mut steps, &self.pace)
            };
            statuses.push(resize.ranges.iter().map(choose).collect());
            let blocks = promise.blocks.max(vssd.plugged_blocks().saturating_add(*given));
            promises.insert(resize.id, Promise { blocks, ..promise });
        }
        let result = self.plug_steps(&steps);
        self.finish_resize(group, statuses, result);
    }

    fn plug_steps(&mut self, steps: &[Step<'_>]) -> Result<()> {
        let mut result = Ok(());
        for chunk in steps.chunks(self.records_at_once()) {
            if result.is_ok() {
                let record = |step: &Step<'_>| Record::Plug {
                    vssd: step.vssd.id(),
                    start: step.start,
                    count: step.count,
                };
                result = self.journal(chunk.iter().map(record));
            }
            let entry = if result.is_ok() { Entry::EMPTY } else { Entry::UNPLUGGED };
            for step in chunk {
                for block in step.blocks() {
                    step.vssd.map().set(block, entry);
                    self.pace.did(1);
                }
                step.vssd.add_plugged(if result.is_ok() { step.count } else { 0 });
            }
        }
        result
    }

    /// Tells each of the group, whose statuses are in its order.
    fn finish_resize<T>(&self, group: Vec<Found<T>>, statuses: Vec<Vec<RangeStatus>>, result: Result<()>) {
        self.refresh_promises();
        self.core.wake_lanes();
        let answers = group.into_iter().map(|(_, resize, _)| resize.done).zip(statuses);
        match result {
            Ok(()) => answers.for_each(|(done, statuses)| done(Ok(statuses))),
            Err(error) => {
                // Errors are not cloneable; all but the first to hear are told where the pool stands now.
                let mut error = Some(error);
                for (done, _) in answers {
                    let again = || {
                        self.core
                            .journal
                            .health()
                            .err()
                            .unwrap_or(Error::Busy { what: "the pool".to_owned() })
                    };
                    done(Err(error.take().unwrap_or_else(again)));
                }
            }
        }
    }
}

/// Decides on one range of an unplug and fences what it will take.
fn choose_unplug<'a>(
    vssd: &'a Vssd,
    range: BlockRange,
    empty_only: bool,
    min_blocks: u32,
    going: &mut u32,
    steps: &mut Vec<Step<'a>>,
    pace: &Pace,
) -> RangeStatus {
    if !range.is_within(vssd.total_blocks()) {
        return RangeStatus::Range;
    }
    // Fenced blocks are those that an earlier range of this group takes.
    let goes = |block: u32| {
        pace.did(1);
        let entry = vssd.map().get(BlockIndex(block));
        entry.is_plugged() && !entry.is_fenced()
    };
    let count = count_of(range, goes);
    if count == 0 {
        return RangeStatus::Already;
    }
    if vssd.plugged_blocks().saturating_sub(*going).saturating_sub(count) < min_blocks {
        return RangeStatus::Protected;
    }
    // Steps are made of exactly the blocks that go, so that their sum is what the vSSD loses.
    let first = steps.len();
    for_runs(range, count, goes, |start, count| {
        let step = Step { vssd, start, count };
        step.fence(pace);
        steps.push(step);
    });
    // Looked at behind the fence, where no block gets its first data any more.
    if empty_only && steps[first..].iter().any(Step::holds_data) {
        steps.drain(first..).for_each(|step| step.unfence());
        return RangeStatus::Busy;
    }
    *going += count;
    RangeStatus::Ok
}

/// Decides on one range of a plug. What it will give is fenced, which tells it from what is still free.
fn choose_plug<'a>(
    vssd: &'a Vssd,
    range: BlockRange,
    limit: u32,
    promisable: u64,
    given: &mut u32,
    steps: &mut Vec<Step<'a>>,
    pace: &Pace,
) -> RangeStatus {
    if !range.is_within(vssd.total_blocks()) {
        return RangeStatus::Range;
    }
    let comes = |block: u32| {
        pace.did(1);
        let entry = vssd.map().get(BlockIndex(block));
        !entry.is_plugged() && !entry.is_fenced()
    };
    let count = count_of(range, comes);
    if count == 0 {
        return RangeStatus::Already;
    }
    let Some(plugged) = vssd.plugged_blocks().checked_add(*given).and_then(|sum| sum.checked_add(count))
    else {
        return RangeStatus::Range;
    };
    if plugged > limit {
        return RangeStatus::Limit;
    }
    if u64::from(plugged) > promisable {
        return RangeStatus::NoSpace;
    }
    *given += count;
    for_runs(range, count, comes, |start, count| {
        let step = Step { vssd, start, count };
        step.fence(pace);
        steps.push(step);
    });
    RangeStatus::Ok
}

fn count_of(range: BlockRange, wanted: impl Fn(u32) -> bool) -> u32 {
    (range.start..range.start + range.count).map(|block| u32::from(wanted(block))).sum()
}

/// Calls `each` with every maximal run within `range` of blocks that are `wanted`, which are `count` in all.
fn for_runs(range: BlockRange, count: u32, wanted: impl Fn(u32) -> bool, mut each: impl FnMut(u32, u32)) {
    if count == range.count {
        return each(range.start, count);
    }
    let end = range.start + range.count;
    let mut at = range.start;
    while at < end {
        let mut next = at;
        while next < end && wanted(next) {
            next += 1;
        }
        if next > at {
            each(at, next - at);
        }
        at = next + 1;
    }
}
