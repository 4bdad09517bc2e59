// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Time: when a driver counts as settled, when a job is over, when a guest counts as inactive.
//!
//! A guest is inactive when it does not move blocks at a minimum rate, for "one block every few seconds" is the way
//! to look busy for ever. Progress since the last mark counts when it is at least one per cent of the way, or at
//! least 1 MiB a second on average; then the mark moves on. A guest that declined is not inactive, for it has answered; nor is one whose blocks the pool has not got.

use serde_json::json;

use super::job::Job;
use super::{Effect, INACTIVE_MS, Negotiation, News, UNCOOPERATIVE_MS};

const MIN_RATE_BYTES_PER_S: u64 = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Stall {
    None,
    Inactive,
    Uncooperative,
}

/// Watches a guest that was asked to move blocks.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Pace {
    mark_ms: u64,
    mark_plugged: u32,
    /// All that is to be moved.
    way: u32,
    stall: Stall,
}

impl Pace {
    pub(super) fn wake_at(&self) -> Option<u64> {
        match self.stall {
            Stall::None => Some(self.mark_ms + INACTIVE_MS),
            Stall::Inactive => Some(self.mark_ms + UNCOOPERATIVE_MS),
            Stall::Uncooperative => None,
        }
    }

    pub(super) fn is_uncooperative(&self) -> bool {
        self.stall == Stall::Uncooperative
    }

    fn is_progress(&self, moved: u32, moved_bytes: u64, now: u64) -> bool {
        let elapsed_ms = now.saturating_sub(self.mark_ms);
        moved > 0
            && (u64::from(moved) * 100 >= u64::from(self.way)
                || moved_bytes.saturating_mul(1000) >= MIN_RATE_BYTES_PER_S.saturating_mul(elapsed_ms))
    }

    fn stall_after(elapsed_ms: u64) -> Stall {
        match elapsed_ms {
            UNCOOPERATIVE_MS.. => Stall::Uncooperative,
            INACTIVE_MS.. => Stall::Inactive,
            _ => Stall::None,
        }
    }
}

impl Negotiation {
    /// Acts on times that have come.
    pub(super) fn keep_time(&mut self, now: u64, fx: &mut Vec<Effect>) {
        self.settle(now);
        self.check_deadline(now, fx);
    }

    /// Watches whether the guest moves towards the target.
    pub(super) fn watch_pace(&mut self, now: u64, fx: &mut Vec<Effect>) {
        let (requested, plugged) = (self.requested, self.counts.plugged);
        // Space that nobody ordered for it a guest may take or leave.
        let due = plugged > requested || (plugged < requested && self.job.is_some());
        let is_starved = self.job.as_ref().is_some_and(Job::is_starved);
        let answered = is_starved || self.session.as_ref().is_none_or(|session| session.declined);
        let asked = due && !answered && !self.host_op_in_flight();
        if !asked {
            self.pace = None;
            return;
        }
        let fresh = Pace {
            mark_ms: now,
            mark_plugged: plugged,
            way: requested.abs_diff(plugged),
            stall: Stall::None,
        };
        let pace = self.pace.get_or_insert(fresh);
        let moved = if requested < plugged {
            pace.mark_plugged.saturating_sub(plugged)
        } else {
            plugged.saturating_sub(pace.mark_plugged)
        };
        if pace.is_progress(moved, self.block_size.bytes_of(moved), now) {
            pace.mark_ms = now;
            pace.mark_plugged = plugged;
            pace.stall = Stall::None;
            return;
        }
        let elapsed_ms = now.saturating_sub(pace.mark_ms);
        let stall = Pace::stall_after(elapsed_ms);
        if stall <= pace.stall {
            return;
        }
        pace.stall = stall;
        let event = if stall == Stall::Inactive { "guest.inactive" } else { "guest.uncooperative" };
        let data = json!({
            "requested_bytes": self.bytes(requested),
            "plugged_bytes": self.bytes(plugged),
            "no_progress_ms": elapsed_ms,
        });
        fx.push(Effect::Emit(News { event, job: self.job(), data }));
        let message = format!("the guest made no progress for {} s", elapsed_ms / 1000);
        if let Some(state) = self.job.as_ref().map(|job| job.state) {
            self.job_state(state, &message, now, fx);
        }
    }
}
