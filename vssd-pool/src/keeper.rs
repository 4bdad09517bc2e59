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

mod resize;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use vssd_protocol::units::BlockIndex;

use crate::arbiter::{Capacity, Promise};
use crate::checkpoint::{self, Contents, Slot};
use crate::command::Command;
use crate::core::Core;
use crate::error::{Error, Result};
use crate::journal::RECORDS_PER_PAGE;
use crate::lock;
use crate::map::{Entry, Map, most_blocks};
use crate::record::{MAX_NAME, MAX_POLICY, Meta, Record};
use crate::sabotage::{Sabotage, active};
use crate::turns::Pace;
use crate::types::{Class, MediumKind, Uuid, VssdAttrs, VssdId, VssdSpec};
use crate::vssd::Vssd;

use resize::Step;

/// How long a sleeping keeper lets waiting lanes go without a look at their deadlines.
const TICK: Duration = Duration::from_millis(50);
/// Blocks released under one hold of the ledger's lock.
const RELEASE_AT_ONCE: usize = 256;
/// Records appended under one.
const APPENDED_AT_ONCE: usize = 128;

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Keeper {
    core: Arc<Core>,
    next_id: u32,
    /// The number of the newest checkpoint, which slot it is in, and where its replay begins.
    checkpoint: (u64, usize, u64),
    pace: Pace,
}

impl Keeper {
    pub(crate) fn new(core: Arc<Core>, next_id: u32, checkpoint: (u64, usize, u64)) -> Self {
        Self { core, next_id, checkpoint, pace: Pace::default() }
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
            self.pace.has_slept();
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
                Command::Unplug(first, empty_only) => {
                    let mut group = vec![(first, empty_only)];
                    while let Some(Command::Unplug(..)) = commands.front() {
                        if let Some(Command::Unplug(next, empty_only)) = commands.pop_front() {
                            group.push((next, empty_only));
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
        // Where a commit costs nothing beside its bytes, lanes need not wait for a long one.
        let most = if self.core.journal.is_instant() { 1 << 9 } else { 1 << 14 };
        (pages * RECORDS_PER_PAGE).min(most)
    }

    /// Appends records and makes them durable; takes a checkpoint first where the journal is short of room.
    fn journal(&mut self, records: impl IntoIterator<Item = Record>) -> Result<()> {
        self.core.journal.health()?;
        self.make_room()?;
        let mut records = records.into_iter().peekable();
        let mut position = 0;
        while records.peek().is_some() {
            let mut ledger = self.core.journal.ledger();
            for record in records.by_ref().take(APPENDED_AT_ONCE) {
                position = ledger.buffer.append(&record);
            }
        }
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
        let whole = Step { start: 0, count: vssd.total_blocks(), vssd: &vssd };
        whole.fence(&self.pace);
        let result = if self.core.grace.synchronize(&self.core.stop) {
            self.journal([Record::Delete { vssd: id }])
        } else {
            Err(Error::Busy { what: "the pool".to_owned() })
        };
        if let Err(error) = result {
            whole.unfence();
            self.core.wake_lanes();
            return Err(error);
        }
        vssd.set_deleted();
        self.drop_from_map(&[whole]);
        self.core.vssds_mut().remove(&id);
        self.refresh_promises();
        self.core.wake_lanes();
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
