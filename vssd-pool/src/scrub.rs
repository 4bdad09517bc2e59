// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The scrubber: zeroes what was given back, durably, and records it as clean.
//!
//! One round: take dirty blocks → make the journal durable (so that no crash can bring back an owner of a
//! block that is being zeroed) → wait until no request is on its way to them → zero → flush → record.

use std::sync::atomic::Ordering;

use vssd_protocol::units::PhysicalBlock;

use crate::blocks::PhysicalRun;
use crate::core::Core;
use crate::record::Record;
use crate::sabotage::{Sabotage, active};
use crate::types::MediumKind;

/// Bytes zeroed in one round.
const ROUND: u64 = 64 << 20;
/// Bytes zeroed in one call.
const PIECE: u64 = 4 << 20;
const MAX_RUNS: usize = 120;

/// What a round came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Round {
    /// There was nothing to do.
    Idle,
    /// Some blocks are clean now.
    Cleaned,
    /// The journal has no room, the media take no zeroes, or the pool is closing.
    Stuck,
}

pub(crate) fn round(core: &Core) -> Round {
    let block_size = core.layout.block_size;
    let (runs, position) = {
        let mut ledger = core.journal.ledger();
        if !ledger.blocks.has_dirty() {
            return Round::Idle;
        }
        if core.journal.room(&ledger) < core.scrub_room() {
            core.keeper_bell.ring();
            return Round::Stuck;
        }
        let blocks = u32::try_from(ROUND / block_size.bytes()).unwrap_or(1).max(1);
        (ledger.blocks.take_dirty(blocks, MAX_RUNS), ledger.buffer.position())
    };
    let is_safe = core.journal.commit(position).is_ok() && core.grace.synchronize(&core.stop);
    let (zeroed, failed): (Vec<_>, Vec<_>) = runs.into_iter().partition(|run| is_safe && zero(core, *run));
    let is_durable = flush(core, &zeroed);
    let mut ledger = core.journal.ledger();
    failed.into_iter().for_each(|run| ledger.blocks.still_dirty(run));
    if zeroed.is_empty() || !is_durable {
        zeroed.into_iter().for_each(|run| ledger.blocks.still_dirty(run));
        return Round::Stuck;
    }
    let mut position = 0;
    for run in zeroed {
        ledger.blocks.cleaned(run);
        position = ledger.buffer.append(&Record::Clean(run));
    }
    let has_more = ledger.blocks.has_dirty();
    // Lanes that wait for space need the reserve, and the reserve needs clean blocks.
    let has_refilled = core.refill(&mut ledger);
    drop(ledger);
    core.appended(position);
    if !has_more || has_refilled {
        core.commit_soon();
    }
    core.wake_lanes();
    Round::Cleaned
}

/// Whether the run reads as zeroes now.
fn zero(core: &Core, run: PhysicalRun) -> bool {
    let block_size = core.layout.block_size;
    let first = PhysicalBlock(run.start);
    let (_, Some(medium)) = core.medium_of(first) else { return false };
    let mut at = medium.offset_of(first, block_size);
    let end = at + block_size.bytes_of(run.count);
    while at < end {
        if core.stop.load(Ordering::Relaxed) {
            return false;
        }
        let len = PIECE.min(end - at);
        if active(Sabotage::ForgetZero) {
            return true;
        }
        if let Err(error) = medium.store.zero(at, len) {
            tracing::error!(medium = %medium.store.path().display(), offset = at, %error, "cannot zero a block");
            return false;
        }
        at += len;
    }
    true
}

/// Makes the zeroes of these runs durable.
fn flush(core: &Core, runs: &[PhysicalRun]) -> bool {
    for kind in MediumKind::ALL {
        let Some(medium) = &core.media[kind.index()] else { continue };
        if runs.iter().any(|run| core.medium_of(PhysicalBlock(run.start)).0 == kind)
            && let Err(error) = medium.store.sync()
        {
            core.journal.fail(&error);
            return false;
        }
    }
    true
}
