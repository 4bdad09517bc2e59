// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What lanes, keeper, scrubber and committer share: the media, the journal with its ledger, the directory
//! and the bells by which they wake each other. It decides nothing.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use vssd_protocol::units::{BlockSize, PhysicalBlock};

use crate::arbiter::Capacity;
use crate::bell::Bell;
use crate::command::Command;
use crate::error::{Error, Result};
use crate::grace::{Grace, MAX_LANES};
use crate::journal::{Journal, Ledger};
use crate::sabotage::{Sabotage, active};
use crate::store::Store;
use crate::superblock::Layout;
use crate::syncs::Syncs;
use crate::types::{MediumKind, VssdId};
use crate::vssd::Vssd;

/// A medium and where its blocks lie.
#[derive(Clone, Debug)]
pub(crate) struct Medium {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) data_offset: u64,
    /// The pool's number of its first block.
    pub(crate) first_block: u32,
}

impl Medium {
    /// Where a block of this medium begins.
    pub(crate) fn offset_of(&self, block: PhysicalBlock, block_size: BlockSize) -> u64 {
        self.data_offset + block_size.bytes_of(block.0 - self.first_block)
    }
}

/// What others see of a lane.
#[repr(align(128))]
#[derive(Debug, Default)]
pub(crate) struct LaneSlot {
    /// Some request of the lane waits for a fence, for space or for the journal.
    pub(crate) waiting: AtomicBool,
    /// It should look again.
    pub(crate) woken: AtomicBool,
    /// Made with the slot's first lane and kept, so that a late wake-up never meets a closed descriptor.
    event: OnceLock<OwnedFd>,
    /// Writes that have completed, and their bytes, on each medium; written by the lane alone.
    pub(crate) writes: [AtomicU64; 2],
    pub(crate) data_bytes_written: [AtomicU64; 2],
}

impl LaneSlot {
    /// Only the lane calls it. From here on a sync of the medium is needed for what it wrote.
    pub(crate) fn completed(&self, kind: MediumKind, writes: u64) {
        Self::add(&self.writes[kind.index()], writes);
    }

    /// Only the lane calls it.
    pub(crate) fn moved(&self, kind: MediumKind, bytes: u64) {
        Self::add(&self.data_bytes_written[kind.index()], bytes);
    }

    /// To a counter that only this thread writes.
    fn add(counter: &AtomicU64, by: u64) {
        counter.store(counter.load(Ordering::Relaxed) + by, Ordering::Release);
    }

    pub(crate) fn event(&self) -> std::io::Result<&OwnedFd> {
        if let Some(event) = self.event.get() {
            return Ok(event);
        }
        let event = rustix::event::eventfd(
            0,
            rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK,
        )?;
        Ok(self.event.get_or_init(|| event))
    }

    pub(crate) fn ring(&self) {
        if let Some(event) = self.event.get() {
            // Full means that it is readable already.
            let _ = rustix::io::write(event.as_fd(), &1u64.to_ne_bytes());
        }
    }

    pub(crate) fn event_raw(&self) -> Option<i32> {
        self.event.get().map(AsRawFd::as_raw_fd)
    }
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Core {
    /// Tells this opening from every other in the process.
    pub(crate) instance: u64,
    pub(crate) layout: Layout,
    /// Indexed like [`MediumKind::ALL`].
    pub(crate) media: [Option<Medium>; 2],
    pub(crate) journal: Journal,
    pub(crate) grace: Grace,
    pub(crate) vssds: RwLock<BTreeMap<VssdId, Arc<Vssd>>>,
    pub(crate) lanes: [LaneSlot; MAX_LANES],
    /// Per medium, the sum over lanes of `writes` that the last flush covered.
    pub(crate) synced: [AtomicU64; 2],
    pub(crate) commands: Mutex<VecDeque<Command>>,
    pub(crate) keeper_bell: Bell,
    pub(crate) scrub_bell: Bell,
    pub(crate) commit_bell: Bell,
    pub(crate) syncs: Syncs,
    /// The journal page from which on a new checkpoint is due.
    pub(crate) checkpoint_at: AtomicU64,
    pub(crate) checkpoints: AtomicU64,
    /// Nothing new is accepted.
    pub(crate) closing: AtomicBool,
    /// Background work ends, grace periods are cut short.
    pub(crate) stop: AtomicBool,
    pub(crate) read_only: bool,
    pub(crate) has_threads: bool,
    pub(crate) space_wait: Duration,
}

impl Core {
    /// A first write's record needs this many free journal pages; the rest is for scrubber and keeper.
    pub(crate) fn lane_room(&self) -> u64 {
        self.journal.pages() / 4
    }

    pub(crate) fn scrub_room(&self) -> u64 {
        self.journal.pages() * 3 / 16
    }

    pub(crate) fn keeper_room(&self) -> u64 {
        self.journal.pages() / 8
    }

    pub(crate) fn medium_of(&self, block: PhysicalBlock) -> (MediumKind, Option<&Medium>) {
        let kind = if block.0 < self.layout.blocks[0] { MediumKind::Nvram } else { MediumKind::Ssd };
        (kind, self.media[kind.index()].as_ref())
    }

    pub(crate) fn stores(&self) -> impl Iterator<Item = &Arc<dyn Store>> {
        self.media.iter().flatten().map(|medium| &medium.store)
    }

    /// Makes everything written so far durable.
    pub(crate) fn sync_all(&self) -> Result<()> {
        for store in self.stores() {
            store
                .sync()
                .map_err(|source| Error::io(format!("cannot flush {}", store.path().display()), source))?;
        }
        Ok(())
    }

    /// Takes the room of journal and checkpoints, lest a full file system under a sparse file stops the whole pool.
    pub(crate) fn reserve_metadata(&self) -> Result<()> {
        for medium in self.media.iter().flatten() {
            medium.store.reserve(0, medium.data_offset).map_err(|source| {
                Error::io(format!("cannot reserve room on {}", medium.store.path().display()), source)
            })?;
        }
        Ok(())
    }

    /// To be called after appending to the journal, with the position.
    pub(crate) fn appended(&self, position: u64) {
        if position >= self.checkpoint_at.load(Ordering::Relaxed) {
            self.keeper_bell.ring();
        }
    }

    /// Gets the reserve filled up, if it is low: takes clean blocks and appends their records, which must be
    /// committed before the blocks can be used. Whether it did.
    pub(crate) fn refill(&self, ledger: &mut Ledger) -> bool {
        /// A page's worth of records.
        const RUNS: usize = 120;
        if !ledger.blocks.wants_refill() {
            return false;
        }
        let runs = ledger.blocks.refill(RUNS);
        let mut position = ledger.buffer.position();
        for run in runs.iter().filter(|_| !active(Sabotage::ForgetReserve)) {
            position = ledger.buffer.append(&crate::record::Record::Reserve(*run));
        }
        ledger.blocks.reserved(&runs, position);
        self.appended(position);
        !runs.is_empty()
    }

    /// Whether whoever needs a commit does it: where that is instant, or where there is no committer (any more).
    pub(crate) fn commits_inline(&self) -> bool {
        self.journal.is_instant() || !self.has_threads || self.closing.load(Ordering::Acquire)
    }

    /// Gets everything appended so far committed soon: at once where that is instant, else by the committer.
    pub(crate) fn commit_soon(&self) {
        if self.commits_inline() {
            let position = self.journal.ledger().buffer.position();
            // A failure is remembered by the journal and met by whoever needs the commit.
            if self.journal.commit(position).is_ok() {
                self.wake_lanes();
            }
        } else {
            self.commit_bell.ring();
        }
    }

    /// Makes every waiting lane look again. Call it after the change they may be waiting for.
    pub(crate) fn wake_lanes(&self) {
        // Pairs with the fence in the lane: either it sees the change, or this sees that it waits.
        fence(Ordering::SeqCst);
        for lane in &self.lanes {
            if lane.waiting.load(Ordering::Relaxed) {
                // In this order, so that a lane that finds itself woken can be sure to reset the event.
                lane.ring();
                lane.woken.store(true, Ordering::Release);
            }
        }
    }

    pub(crate) fn any_lane_waits(&self) -> bool {
        fence(Ordering::SeqCst);
        self.lanes.iter().any(|lane| lane.waiting.load(Ordering::Relaxed))
    }

    /// How many writes have completed on a medium, over all lanes. Two equal sums mean that none completed
    /// in between, for no summand ever shrinks.
    pub(crate) fn writes_on(&self, kind: MediumKind) -> u64 {
        self.lanes.iter().map(|lane| lane.writes[kind.index()].load(Ordering::Acquire)).sum()
    }
}

impl Core {
    pub(crate) fn capacity(&self) -> Capacity {
        self.layout.capacity()
    }

    pub(crate) fn vssds(&self) -> Vec<Arc<Vssd>> {
        self.vssds.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    pub(crate) fn vssd(&self, id: VssdId) -> Option<Arc<Vssd>> {
        self.vssds.read().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }

    /// Keeper only.
    pub(crate) fn vssds_mut(&self) -> std::sync::RwLockWriteGuard<'_, BTreeMap<VssdId, Arc<Vssd>>> {
        self.vssds.write().unwrap_or_else(PoisonError::into_inner)
    }
}
