// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The keeper: the one that changes what vSSDs there are and which of their blocks are plugged, and that takes
//! checkpoints. One at a time, in the order asked, so nothing of this ever races with itself.
//!
//! An unplug goes *fence → grace → journal, durable → drop from the map → tell*. New requests meet the
//! fence and wait; those that passed before it are waited for; only when no crash can bring the block back is it
//! dropped, and only then can the scrubber get it. Consecutive unplugs share one grace period, and
//! consecutive plugs one commit.
//!
//! Between appending a record and making its change in the map no checkpoint may begin, or the
//! checkpoint would claim to contain a change that it does not. Each step here that appends also finishes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::SyncSender;
use std::time::Duration;

use vssd_protocol::units::{BlockIndex, BlockRange};

use crate::arbiter::{Capacity, Promise};
use crate::checkpoint::{self, Contents, Slot};
use crate::core::Core;
use crate::error::{Error, Result};
use crate::journal::RECORDS_PER_PAGE;
use crate::lock;
use crate::map::{Entry, Map, most_blocks};
use crate::pool::ResizeDone;
use crate::record::{MAX_NAME, MAX_POLICY, Meta, Record};
use crate::sabotage::{Sabotage, active};
use crate::types::{Class, MediumKind, RangeStatus, Uuid, VssdAttrs, VssdId, VssdSpec};
use crate::vssd::Vssd;

/// How long a sleeping keeper lets waiting lanes go without a look at their deadlines.
const TICK: Duration = Duration::from_millis(50);
/// Blocks released under one hold of the ledger's lock.
const RELEASE_AT_ONCE: usize = 1024;

pub(crate) type Reply<T> = SyncSender<Result<T>>;

/// What the keeper is asked to do.
pub(crate) enum Command {
    Create(Box<VssdSpec>, Reply<Arc<Vssd>>),
    Delete(VssdId, Reply<()>),
    SetAttrs(VssdId, Box<VssdAttrs>, Reply<()>),
    Extend(VssdId, u32, Reply<()>),
    Unplug(Resize),
    Plug(Resize, u32),
    Checkpoint(Reply<()>),
}

impl std::fmt::Debug for Command {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Create(..) => "Create",
            Self::Delete(..) => "Delete",
            Self::SetAttrs(..) => "SetAttrs",
            Self::Extend(..) => "Extend",
            Self::Unplug(..) => "Unplug",
            Self::Plug(..) => "Plug",
            Self::Checkpoint(..) => "Checkpoint",
        })
    }
}

/// A plug or unplug under way.
pub(crate) struct Resize {
    pub(crate) id: VssdId,
    pub(crate) ranges: Vec<BlockRange>,
    /// Unplug: leave alone what holds data.
    pub(crate) empty_only: bool,
    pub(crate) done: ResizeDone,
}

/// A part of a resize that one record tells of.
struct Step {
    vssd: Arc<Vssd>,
    start: u32,
    count: u32,
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Keeper {
    core: Arc<Core>,
    next_id: u32,
    /// The number of the newest checkpoint, which slot it is in, and where its replay begins.
    checkpoint: (u64, usize, u64),
}

impl Keeper {
    pub(crate) fn new(core: Arc<Core>, next_id: u32, checkpoint: (u64, usize, u64)) -> Self {
        Self { core, next_id, checkpoint }
    }

    /// The keeper's thread.
    pub(crate) fn run(mut self) -> Self {
        let _guard = NobodyWaitsForTheDead(Arc::clone(&self.core));
        while !self.core.stop.load(Ordering::Acquire) {
            if self.step() {
                continue;
            }
            let waits = self.core.any_lane_waits();
            self.core.keeper_bell.wait(waits.then_some(TICK));
            if waits {
                self.core.wake_lanes();
            }
        }
        self
    }

    /// Does all that has been asked so far; whether that was anything.
    pub(crate) fn step(&mut self) -> bool {
        let mut commands = std::mem::take(&mut *lock(&self.core.commands));
        let mut worked = !commands.is_empty();
        while let Some(command) = commands.pop_front() {
            match command {
                Command::Create(spec, reply) => drop(reply.send(self.create(*spec))),
                Command::Delete(id, reply) => drop(reply.send(self.delete(id))),
                Command::SetAttrs(id, attrs, reply) => drop(reply.send(self.set_attrs(id, *attrs))),
                Command::Extend(id, blocks, reply) => drop(reply.send(self.extend(id, blocks))),
                Command::Checkpoint(reply) => drop(reply.send(self.take_checkpoint())),
                Command::Unplug(first) => {
                    let mut group = vec![first];
                    while let Some(Command::Unplug(_)) = commands.front() {
                        if let Some(Command::Unplug(next)) = commands.pop_front() {
                            group.push(next);
                        }
                    }
                    self.unplug(group);
                }
                Command::Plug(first, limit) => {
                    let mut group = vec![(first, limit)];
                    while let Some(Command::Plug(..)) = commands.front() {
                        if let Some(Command::Plug(next, limit)) = commands.pop_front() {
                            group.push((next, limit));
                        }
                    }
                    self.plug(group);
                }
            }
        }
        if self.checkpoint_is_due() && !self.core.read_only && !self.core.journal.has_failed() {
            worked = true;
            if let Err(error) = self.take_checkpoint() {
                tracing::error!(%error, "checkpoint failed");
            }
        }
        worked
    }

    fn find(&self, id: VssdId) -> Result<Arc<Vssd>> {
        self.core.vssd(id).ok_or_else(|| Error::NotFound { what: id.to_string() })
    }

    fn promises_except(&self, except: Option<VssdId>) -> Vec<Promise> {
        self.core.vssds().iter().filter(|vssd| Some(vssd.id()) != except).map(|vssd| vssd.promise()).collect()
    }

    fn admit(&self, id: Option<VssdId>, current: Option<Promise>, wanted: Promise) -> Result<()> {
        self.core.capacity().admit(&self.promises_except(id), current, wanted).map_err(|shortage| {
            Error::PoolFull { requested_blocks: shortage.requested, available_blocks: shortage.available }
        })
    }

    /// After a promise changed: what first writes elsewhere must leave for confined vSSDs.
    pub(crate) fn refresh_promises(&self) {
        let vssds = self.core.vssds();
        let mut ledger = self.core.journal.ledger();
        for kind in MediumKind::ALL {
            // With overcommit no block can be kept back for anybody: all together may be promised more than there is.
            let is_kept = self.core.layout.overcommit_percent == 100;
            let promised = if is_kept { vssds.iter().map(|vssd| vssd.promised_on(kind)).sum() } else { 0 };
            ledger.blocks.set_promised(kind, promised);
        }
    }

    /// How many records may be appended between two checks for room.
    fn records_at_once(&self) -> usize {
        let pages = usize::try_from(self.core.keeper_room() / 2).unwrap_or(usize::MAX);
        (pages * RECORDS_PER_PAGE).min(1 << 14)
    }

    /// Appends records and makes them durable; takes a checkpoint first where the journal is short of room.
    fn journal(&mut self, records: impl IntoIterator<Item = Record>) -> Result<()> {
        self.core.journal.health()?;
        self.make_room()?;
        let position = {
            let mut ledger = self.core.journal.ledger();
            for record in records {
                ledger.buffer.append(&record);
            }
            ledger.buffer.position()
        };
        self.core.journal.commit(position)?;
        self.core.wake_lanes();
        Ok(())
    }

    fn make_room(&mut self) -> Result<()> {
        // The first checkpoint frees what the one before the last needed, the second the rest.
        for _ in 0..2 {
            if self.core.journal.room(&self.core.journal.ledger()) >= self.core.keeper_room() {
                return Ok(());
            }
            self.take_checkpoint()?;
        }
        Ok(())
    }

    fn create(&mut self, spec: VssdSpec) -> Result<Arc<Vssd>> {
        check_name(&spec.name)?;
        check_attrs(&spec.attrs, spec.max_blocks, self.core.capacity())?;
        let most = most_blocks(self.core.layout.total_blocks());
        if spec.max_blocks == 0 || spec.max_blocks > most {
            return Err(Error::invalid(format!(
                "a vSSD of this pool has 1 to {most} blocks, {} were asked for",
                spec.max_blocks
            )));
        }
        if spec.initial_blocks > spec.max_blocks {
            return Err(Error::invalid(format!(
                "{} initial blocks are more than the maximum of {}",
                spec.initial_blocks, spec.max_blocks
            )));
        }
        let vssds = self.core.vssds();
        if vssds.iter().any(|vssd| vssd.name() == spec.name) {
            return Err(Error::Exists { what: format!("vSSD {:?}", spec.name) });
        }
        if vssds.len() >= self.core.layout.max_vssds as usize || self.next_id == u32::MAX {
            return Err(Error::invalid(format!(
                "the pool holds at most {} vSSDs",
                self.core.layout.max_vssds
            )));
        }
        self.admit(
            None,
            None,
            Promise::new(spec.initial_blocks, spec.attrs.requested_blocks, spec.attrs.class),
        )?;
        let meta = Meta {
            id: VssdId(self.next_id),
            uuid: Uuid::random().map_err(|source| Error::io("cannot get random bytes", source))?,
            name: spec.name,
            max_blocks: spec.max_blocks,
            attrs: spec.attrs,
        };
        let map = Map::new(spec.max_blocks);
        for block in 0..spec.initial_blocks {
            map.set(BlockIndex(block), Entry::EMPTY);
        }
        self.journal([Record::Vssd { meta: Box::new(meta.clone()), new: Some(spec.initial_blocks) }])?;
        self.next_id += 1;
        let id = meta.id;
        let vssd = Arc::new(Vssd::new(meta, map, self.core.layout.block_size, self.core.instance));
        self.core.vssds_mut().insert(id, Arc::clone(&vssd));
        self.refresh_promises();
        Ok(vssd)
    }

    fn delete(&mut self, id: VssdId) -> Result<()> {
        let vssd = self.find(id)?;
        let whole = Step { start: 0, count: vssd.total_blocks(), vssd };
        fence(&whole);
        let result = if self.core.grace.synchronize(&self.core.stop) {
            self.journal([Record::Delete { vssd: id }])
        } else {
            Err(Error::Busy { what: "the pool".to_owned() })
        };
        if let Err(error) = result {
            unfence(&whole);
            self.core.wake_lanes();
            return Err(error);
        }
        whole.vssd.set_deleted();
        self.drop_from_map(&whole);
        self.core.vssds_mut().remove(&id);
        self.refresh_promises();
        self.core.wake_lanes();
        self.core.scrub_bell.ring();
        Ok(())
    }

    fn set_attrs(&mut self, id: VssdId, attrs: VssdAttrs) -> Result<()> {
        let vssd = self.find(id)?;
        check_attrs(&attrs, vssd.total_blocks(), self.core.capacity())?;
        let wanted = Promise::new(vssd.plugged_blocks(), attrs.requested_blocks, attrs.class);
        self.admit(Some(id), Some(vssd.promise()), wanted)?;
        let meta = Meta { attrs: attrs.clone(), ..vssd.meta() };
        self.journal([Record::Vssd { meta: Box::new(meta), new: None }])?;
        {
            let _ledger = self.core.journal.ledger();
            vssd.set_attrs(attrs);
        }
        self.refresh_promises();
        Ok(())
    }

    fn extend(&mut self, id: VssdId, blocks: u32) -> Result<()> {
        let vssd = self.find(id)?;
        let most = most_blocks(self.core.layout.total_blocks());
        if blocks < vssd.total_blocks() || blocks > most {
            return Err(Error::invalid(format!(
                "a maximum can only be raised, from {} to at most {most} blocks; {blocks} were asked for",
                vssd.total_blocks()
            )));
        }
        let meta = Meta { max_blocks: blocks, ..vssd.meta() };
        self.journal([Record::Vssd { meta: Box::new(meta), new: None }])?;
        vssd.map().extend(blocks);
        Ok(())
    }

    fn unplug(&mut self, group: Vec<Resize>) {
        // What each vSSD loses in this group, in blocks.
        let mut going: BTreeMap<VssdId, u32> = BTreeMap::new();
        let mut steps = Vec::new();
        let mut answers = Vec::new();
        for Resize { id, ranges, empty_only, done } in group {
            let vssd = match self.find(id) {
                Ok(vssd) => vssd,
                Err(error) => {
                    done(Err(error));
                    continue;
                }
            };
            let going = going.entry(id).or_default();
            let min = vssd.attrs().min_blocks;
            let mut choose = |range| choose_unplug(&vssd, range, empty_only, min, going, &mut steps);
            let statuses = ranges.into_iter().map(&mut choose).collect();
            answers.push((done, statuses));
        }
        let result = self.unplug_steps(&steps);
        self.finish_resize(answers, result);
        self.core.scrub_bell.ring();
    }

    fn unplug_steps(&mut self, steps: &[Step]) -> Result<()> {
        let mut result = if steps.is_empty() || self.core.grace.synchronize(&self.core.stop) {
            Ok(())
        } else {
            Err(Error::Busy { what: "the pool".to_owned() })
        };
        for chunk in steps.chunks(self.records_at_once()) {
            if result.is_ok() {
                let record = |step: &Step| Record::Unplug {
                    vssd: step.vssd.id(),
                    start: step.start,
                    count: step.count,
                };
                result = self.journal(chunk.iter().map(record));
            }
            for step in chunk {
                if result.is_ok() { self.drop_from_map(step) } else { unfence(step) }
            }
        }
        result
    }

    /// Unplugs fenced blocks in the map and gives their physical blocks to the scrubber.
    fn drop_from_map(&self, step: &Step) {
        let map = step.vssd.map();
        let mut plugged = 0;
        let mut freed = Vec::with_capacity(RELEASE_AT_ONCE.min(step.count as usize));
        let release = |freed: &mut Vec<_>| {
            let mut ledger = self.core.journal.ledger();
            let class = step.vssd.class();
            step.vssd.sub_allocated(u32::try_from(freed.len()).unwrap_or(0));
            freed.drain(..).for_each(|block| ledger.blocks.release(block, class));
        };
        for block in (step.start..step.start + step.count).map(BlockIndex) {
            let entry = map.get(block);
            plugged += u32::from(entry.is_plugged());
            map.set(block, Entry::UNPLUGGED);
            if let Some(physical) = entry.physical() {
                freed.push(physical);
                if freed.len() == RELEASE_AT_ONCE {
                    release(&mut freed);
                }
            }
        }
        release(&mut freed);
        step.vssd.sub_plugged(plugged);
    }

    fn plug(&mut self, group: Vec<(Resize, u32)>) {
        // What each vSSD was given in this group, in blocks.
        let mut given: BTreeMap<VssdId, u32> = BTreeMap::new();
        let mut promises: Vec<_> = self.core.vssds().iter().map(|vssd| (vssd.id(), vssd.promise())).collect();
        let mut steps = Vec::new();
        let mut answers = Vec::new();
        for (Resize { id, ranges, done, .. }, limit) in group {
            let vssd = match self.find(id) {
                Ok(vssd) => vssd,
                Err(error) => {
                    done(Err(error));
                    continue;
                }
            };
            let given = given.entry(id).or_default();
            let mut statuses = Vec::with_capacity(ranges.len());
            for range in ranges {
                statuses.push(choose_plug(
                    &vssd,
                    range,
                    limit,
                    given,
                    &mut promises,
                    self.core.capacity(),
                    &mut steps,
                ));
            }
            answers.push((done, statuses));
        }
        let result = self.plug_steps(&steps);
        self.finish_resize(answers, result);
    }

    fn plug_steps(&mut self, steps: &[Step]) -> Result<()> {
        let mut result = Ok(());
        for chunk in steps.chunks(self.records_at_once()) {
            if result.is_ok() {
                let record =
                    |step: &Step| Record::Plug { vssd: step.vssd.id(), start: step.start, count: step.count };
                result = self.journal(chunk.iter().map(record));
            }
            for step in chunk {
                let entry = if result.is_ok() { Entry::EMPTY } else { Entry::UNPLUGGED };
                for block in (step.start..step.start + step.count).map(BlockIndex) {
                    step.vssd.map().set(block, entry);
                }
                step.vssd.add_plugged(if result.is_ok() { step.count } else { 0 });
            }
        }
        result
    }

    fn finish_resize(&mut self, answers: Vec<(ResizeDone, Vec<RangeStatus>)>, result: Result<()>) {
        self.refresh_promises();
        self.core.wake_lanes();
        match result {
            Ok(()) => answers.into_iter().for_each(|(done, statuses)| done(Ok(statuses))),
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

    fn checkpoint_is_due(&self) -> bool {
        let ledger = self.core.journal.ledger();
        // After a burst the last two checkpoints may lie so far apart that lanes run out of room before the
        // next one is due by its distance.
        ledger.buffer.position() >= self.core.checkpoint_at.load(Ordering::Relaxed)
            || self.core.journal.room(&ledger) < self.core.journal.pages() * 3 / 8
    }

    /// See `checkpoint` for the order and its reasons.
    pub(crate) fn take_checkpoint(&mut self) -> Result<()> {
        let core = &*self.core;
        core.journal.health()?;
        let (number, slot, last_begin) = self.checkpoint;
        let (number, slot) =
            (number + 1, if active(Sabotage::OverwriteLiveCheckpoint) { slot } else { 1 - slot });
        let (begin, clean) = {
            let mut ledger = core.journal.ledger();
            (ledger.buffer.seal(), ledger.blocks.clean().clone())
        };
        let place = Slot { offset: core.layout.slots[slot], len: core.layout.slot_len };
        let Some(medium) = &core.media[core.layout.slots_on.index()] else {
            return Err(Error::damaged("the medium of the checkpoints is missing"));
        };
        let vssds = core.vssds();
        let mut list = vssds.iter().map(|vssd| (vssd.meta(), vssd.map()));
        let contents = Contents { next_id: self.next_id, vssds: &mut list, clean: &clean };
        let commit = || {
            let position = core.journal.ledger().buffer.position();
            core.journal.commit(position)
        };
        let pool = core.layout.pool;
        checkpoint::write(&*medium.store, place, pool, (number, begin), contents, commit).inspect_err(
            |error| {
                // The other checkpoint is good, but whether this one counts after a crash is unknown.
                if let Error::Io { source, .. } = error {
                    core.journal.fail(source);
                }
            },
        )?;
        self.checkpoint = (number, slot, begin);
        core.journal.set_needed_from(last_begin);
        core.checkpoint_at.store(begin + core.journal.pages() / 4, Ordering::Relaxed);
        core.checkpoints.fetch_add(1, Ordering::Relaxed);
        core.wake_lanes();
        core.scrub_bell.ring();
        Ok(())
    }
}

/// Should the keeper's thread panic, those who asked it are told that nobody answers, and nobody can ask any more.
struct NobodyWaitsForTheDead(Arc<Core>);

impl Drop for NobodyWaitsForTheDead {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let mut commands = lock(&self.0.commands);
            self.0.closing.store(true, Ordering::Release);
            commands.clear();
        }
    }
}

fn fence(step: &Step) {
    for block in (step.start..step.start + step.count).map(BlockIndex) {
        step.vssd.map().fence(block);
    }
}

fn unfence(step: &Step) {
    for block in (step.start..step.start + step.count).map(BlockIndex) {
        step.vssd.map().unfence(block);
    }
}

fn holds_data(step: &Step) -> bool {
    let mut blocks = (step.start..step.start + step.count).map(BlockIndex);
    blocks.any(|block| step.vssd.map().get(block).physical().is_some())
}

/// Decides on one range of an unplug and fences what it will take.
fn choose_unplug(
    vssd: &Arc<Vssd>,
    range: BlockRange,
    empty_only: bool,
    min_blocks: u32,
    going: &mut u32,
    steps: &mut Vec<Step>,
) -> RangeStatus {
    if !range.is_within(vssd.total_blocks()) {
        return RangeStatus::Range;
    }
    // Fenced blocks are those that an earlier range of this group takes.
    let goes = |block: u32| {
        let entry = vssd.map().get(BlockIndex(block));
        entry.is_plugged() && !entry.is_fenced()
    };
    let count = (range.start..range.start + range.count).filter(|&block| goes(block)).count();
    let Ok(count @ 1..) = u32::try_from(count) else { return RangeStatus::Already };
    if vssd.plugged_blocks().saturating_sub(*going).saturating_sub(count) < min_blocks {
        return RangeStatus::Protected;
    }
    // Steps are made of exactly the blocks that go, so that their sum is what the vSSD loses.
    let first = steps.len();
    for_runs(range, goes, |start, count| {
        let step = Step { vssd: Arc::clone(vssd), start, count };
        fence(&step);
        steps.push(step);
    });
    // Looked at behind the fence, where no block gets its first data any more.
    if empty_only && steps[first..].iter().any(holds_data) {
        steps.drain(first..).for_each(|step| unfence(&step));
        return RangeStatus::Busy;
    }
    *going += count;
    RangeStatus::Ok
}

/// Decides on one range of a plug. What it will give is fenced, which tells it from what is still free.
fn choose_plug(
    vssd: &Arc<Vssd>,
    range: BlockRange,
    limit: u32,
    given: &mut u32,
    promises: &mut [(VssdId, Promise)],
    capacity: Capacity,
    steps: &mut Vec<Step>,
) -> RangeStatus {
    if !range.is_within(vssd.total_blocks()) {
        return RangeStatus::Range;
    }
    let comes = |block: u32| {
        let entry = vssd.map().get(BlockIndex(block));
        !entry.is_plugged() && !entry.is_fenced()
    };
    let count = (range.start..range.start + range.count).filter(|&block| comes(block)).count();
    let Ok(count @ 1..) = u32::try_from(count) else { return RangeStatus::Already };
    let Some(plugged) = vssd.plugged_blocks().checked_add(*given).and_then(|sum| sum.checked_add(count))
    else {
        return RangeStatus::Range;
    };
    if plugged > limit {
        return RangeStatus::Limit;
    }
    let Some(mine) = promises.iter().position(|(id, _)| *id == vssd.id()) else { return RangeStatus::Range };
    let current = promises[mine].1;
    let wanted = Promise { blocks: current.blocks.max(plugged), ..current };
    let others: Vec<_> =
        promises.iter().filter(|(id, _)| *id != vssd.id()).map(|(_, promise)| *promise).collect();
    if capacity.admit(&others, Some(current), wanted).is_err() {
        return RangeStatus::NoSpace;
    }
    promises[mine].1 = wanted;
    *given += count;
    for_runs(range, comes, |start, count| {
        let step = Step { vssd: Arc::clone(vssd), start, count };
        fence(&step);
        steps.push(step);
    });
    RangeStatus::Ok
}

/// Calls `each` with every maximal run within `range` of blocks that are `wanted` (asked before `each`
/// changes them).
fn for_runs(range: BlockRange, wanted: impl Fn(u32) -> bool, mut each: impl FnMut(u32, u32)) {
    let end = range.start + range.count;
    let mut at = range.start;
    while at < end {
        let count = (at..end).take_while(|&block| wanted(block)).count();
        // At most range.count, which is a u32.
        let count = u32::try_from(count).unwrap_or(0);
        if count > 0 {
            each(at, count);
        }
        at += count.max(1);
    }
}

fn check_name(name: &str) -> Result<()> {
    if name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control) {
        return Err(Error::invalid(format!(
            "a name has 1 to {MAX_NAME} bytes and no control characters, not {name:?}"
        )));
    }
    Ok(())
}

fn check_attrs(attrs: &VssdAttrs, max_blocks: u32, capacity: Capacity) -> Result<()> {
    let within = |what: &str, blocks: u32| {
        if blocks > max_blocks {
            return Err(Error::invalid(format!(
                "{blocks} {what} blocks are more than the maximum of {max_blocks}"
            )));
        }
        Ok(())
    };
    within("requested", attrs.requested_blocks)?;
    within("minimum", attrs.min_blocks)?;
    if attrs.policy.len() > MAX_POLICY {
        return Err(Error::invalid(format!(
            "a policy has at most {MAX_POLICY} bytes, not {}",
            attrs.policy.len()
        )));
    }
    if attrs.class != Class::Any
        && attrs.class.strict().is_some_and(|kind| capacity.physical[kind.index()] == 0)
    {
        return Err(Error::invalid("the pool has no medium of that class"));
    }
    Ok(())
}
