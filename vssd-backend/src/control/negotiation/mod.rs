// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The negotiation of one vSSD's size: what is asked, what the guest answers, when the host acts itself.
//!
//! ```text
//!   operator ─ Resize, Cancel, Limits ─┐                     ┌─ Answer, AnswerState ──► the guest's request
//!   guest ──── Guest(request) ─────────┼─► apply(event, now) ├─ Unplug, Plug, TakeBlocks, GiveBlocks ──► pool
//!   pool ───── PoolDone, Granted ──────┤     (pure)          ├─ StoreRequested, TryGrant, SetCapacity
//!   time ───── Tick (wake_at says when)┘                     └─ Job, Emit ──► operators
//! ```
//!
//! A pure state machine: the same events give the same effects. It knows no clock, lock, socket, queue or pool;
//! it does not even know *which* blocks are plugged, only how many. Replies and pool operations are numbers, so a
//! state can be cloned, compared and hashed, and a model checker can run it against a model of a driver.
//!
//! # Decisions
//!
//! * **The target is a level.** `requested` says what the host wants; whoever may act (the guest's driver, or the
//!   host where no driver takes part) moves `plugged` towards it. News to the guest carry a number, `seq`, which
//!   advances when requested size, deadline or reason change, and when the host changes the plugged set itself.
//! * **A job is an operator's interest in a target.** There is at most one a vSSD. A job may end while its target
//!   stays (`expired` under policy `wait`), and a target may exist without a job (an answer to PULL).
//! * **A decline ends a job unless there is still time.** Without a deadline, or under policy `fail`, the job ends
//!   `refused` (nothing moved) or `partial`, and the target is withdrawn: `requested` becomes `plugged`, so that both
//!   sides agree and nothing drifts later. With a deadline and policy `wait` or `force` the decline is noted in the
//!   job's message, and the target stands until the deadline: a guest that gets new hints goes on by itself.
//! * **Withdrawing** follows the guest's requests that are still on their way through the pool: when they end,
//!   `requested` is set to what came out.
//! * **The host acts alone** in four cases: nobody is connected; no driver runs; the driver is a stock one; or force
//!   is due. While it does, UNPLUG and PLUG are answered BUSY. It never drops data unless forced: it takes only
//!   blocks above the last one that holds data, all that are asked for or none.
//! * **A driver is settling** for [`SETTLE_MS`] after it could first have spoken, and only then held for a stock
//!   driver. Any message of the guest channel, even with an old epoch, proves the contrary.
//! * **A guest that reboots in mid-shrink** may spend a while under a stock driver. A job that was offered to a
//!   vSSD driver waits for one to come back; it never turns into the host taking blocks.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use vssd_protocol::control::{DriverKind, ErrorCode, JobState, Policy};
use vssd_protocol::guest::{self, RangeStatus, Reason, Response, Sizes};
use vssd_protocol::units::{BlockRange, BlockSize};

mod deadline;
mod job;
mod plan;
#[cfg(test)]
mod random;
mod session;
#[cfg(test)]
mod tests;

pub use job::{Actor, JobView};
pub use plan::{Plan, Refusal, Route, Tail, Wish};

use deadline::Pace;
use job::Job;
use session::Session;

/// How long a driver may stay silent after its queues started before it is held for a stock driver.
pub const SETTLE_MS: u64 = 3_000;
/// No progress for so long: the guest is inactive.
pub const INACTIVE_MS: u64 = 5_000;
/// No progress for so long: the guest is uncooperative.
pub const UNCOOPERATIVE_MS: u64 = 20_000;
/// The guest has met a pool without space for so long: its grow ends, if neither it nor the policy has a deadline.
pub const SPACE_MS: u64 = 60_000;
/// Progress of a job is shown no more often than this.
pub const PROGRESS_MS: u64 = 100;
/// What a guest can cause at will is told to operators no more often than this.
const GUEST_EVENT_MS: u64 = 1_000;

/// Names a guest's request that is owed an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReplyId(pub u64);

/// Names a pool operation in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OpId(pub u64);

/// What the negotiation starts from.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Setup {
    pub name: String,
    pub block_size: BlockSize,
    pub total: u32,
    pub min: u32,
    pub requested: u32,
    pub counts: Counts,
    pub policy: Policy,
}

/// What the pool holds for the vSSD, in blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Counts {
    pub plugged: u32,
    /// One past the highest plugged block.
    pub end: u32,
}

impl Counts {
    /// Whether blocks below the end are unplugged.
    pub fn has_holes(self) -> bool {
        self.plugged < self.end
    }
}

/// A resize that [`Negotiation::plan`] has accepted and whose promise the pool has made durable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resize {
    pub job: u64,
    pub plan: Plan,
    pub actor: Actor,
    /// What the job says for itself at first; empty: what it waits for.
    pub note: &'static str,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    Connected,
    Disconnected,
    QueueStarted {
        queue: u16,
        fresh: bool,
    },
    /// A queue is about to stop: nothing may stay parked.
    Quiesce,
    /// `fresh_epoch` is a random number other than zero, used if the request begins a session.
    Guest {
        reply: ReplyId,
        request: guest::Request,
        fresh_epoch: u64,
    },
    Resize(Resize),
    Cancel(Actor),
    /// Raising `total` ends the session, for a session's address space is constant.
    Limits {
        min: u32,
        total: u32,
        policy: Policy,
    },
    /// Answer to [`Effect::TryGrant`]: the promise is durable.
    Granted {
        requested: u32,
    },
    PoolDone {
        op: OpId,
        outcome: Outcome,
        counts: Counts,
    },
    /// The vSSD is being deleted.
    Deleted(Actor),
    Tick,
}

/// How a pool operation ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Ranges {
        statuses: Vec<RangeStatus>,
        /// Blocks that changed.
        moved: u32,
        /// Of those taken by the host: how many held data.
        lost: u32,
    },
    /// The pool failed; nothing is known to have changed.
    Failed,
}

/// Which blocks the host takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pick {
    /// The highest plugged ones; without `data` all of them must be above the last block that holds data, else none.
    Tail { data: bool },
    /// Empty ones, then those that hold data; of each the highest first.
    LeastHarm,
}

/// What is to be done, in this order.
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    Answer {
        reply: ReplyId,
        response: Response,
    },
    /// A STATE response: the ranges are filled in by whoever knows them.
    AnswerState {
        reply: ReplyId,
        sizes: Sizes,
        start: u32,
        empty_only: bool,
    },
    Unplug {
        op: OpId,
        ranges: Vec<BlockRange>,
    },
    Plug {
        op: OpId,
        ranges: Vec<BlockRange>,
        limit: u32,
    },
    /// The host takes up to `blocks` blocks itself.
    TakeBlocks {
        op: OpId,
        blocks: u32,
        pick: Pick,
    },
    /// The host plugs the lowest `blocks` unplugged blocks.
    GiveBlocks {
        op: OpId,
        blocks: u32,
        limit: u32,
    },
    /// Make a lower `requested` durable.
    StoreRequested {
        blocks: u32,
    },
    /// Promise up to so many blocks in all if the pool can; [`Event::Granted`] says how far it went.
    TryGrant {
        requested: u32,
    },
    /// What a driver without the guest channel is to see as the size of the disk.
    SetCapacity {
        blocks: u32,
    },
    /// The guest said how much it could give.
    NoteEstimate(guest::Estimate),
    Job(JobView),
    Emit(News),
}

/// An event for operators.
#[derive(Clone, Debug, PartialEq)]
pub struct News {
    pub event: &'static str,
    pub job: Option<u64>,
    pub data: Value,
}

/// Who drives the device.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Driver {
    Detached,
    /// Connected, but no queue runs.
    Idle,
    Settling {
        until_ms: u64,
    },
    Stock,
    /// It spoke on the guest channel; it may have lost its session and not come back yet.
    Vssd,
}

/// A pool operation in flight.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Op {
    by: OpBy,
    /// Most blocks it can change.
    blocks: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum OpBy {
    Guest { reply: ReplyId, epoch: u64, unplug: bool },
    Host { take: bool, forced: bool },
}

/// Keeps a guest from flooding the operators' event log.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Quiet {
    until_ms: u64,
    dropped: u64,
}

impl Quiet {
    /// `Some(dropped before)` if an event may be told now.
    pub(super) fn admit(&mut self, now: u64) -> Option<u64> {
        if now < self.until_ms {
            self.dropped += 1;
            return None;
        }
        self.until_ms = now + GUEST_EVENT_MS;
        Some(std::mem::take(&mut self.dropped))
    }
}

/// The negotiation of one vSSD.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Negotiation {
    name: String,
    block_size: BlockSize,
    total: u32,
    min: u32,
    requested: u32,
    counts: Counts,
    reason: Reason,
    policy: Policy,
    /// Of one message of the guest, as its driver is told at HELLO.
    max_ranges: u32,
    driver: Driver,
    /// The last driver that was heard of spoke the guest channel, so its guest copes with holes.
    last_was_vssd: bool,
    driver_name: Option<String>,
    session: Option<Session>,
    ops: BTreeMap<OpId, Op>,
    next_op: u64,
    job: Option<Job>,
    pace: Option<Pace>,
    withdrawing: bool,
    /// The host tried in vain; it does not try again before something changes.
    stuck: bool,
    capacity: u32,
    pull_quiet: Quiet,
    driver_quiet: Quiet,
    /// As last told: kind and name.
    told_driver: (DriverKind, Option<String>),
}

impl Negotiation {
    pub fn new(setup: Setup) -> Self {
        let Setup { name, block_size, total, min, requested, counts, policy } = setup;
        Self {
            name,
            block_size,
            total,
            min,
            requested,
            counts,
            reason: if requested == counts.plugged { Reason::None } else { Reason::Operator },
            policy,
            max_ranges: guest::MAX_RANGES,
            driver: Driver::Detached,
            last_was_vssd: false,
            driver_name: None,
            session: None,
            ops: BTreeMap::new(),
            next_op: 1,
            job: None,
            pace: None,
            withdrawing: false,
            stuck: false,
            capacity: counts.end.max(1),
            pull_quiet: Quiet::default(),
            driver_quiet: Quiet::default(),
            told_driver: (DriverKind::None, None),
        }
    }

    /// What sessions are told that begin from now on.
    pub fn set_max_ranges(&mut self, max_ranges: u32) {
        self.max_ranges = max_ranges;
    }

    /// Takes note of `event` at `now` (milliseconds of a clock that never goes back) and says what is to be done.
    pub fn apply(&mut self, event: Event, now: u64) -> Vec<Effect> {
        let mut fx = Vec::new();
        match event {
            Event::Connected => {
                self.end_session(&mut fx);
                self.driver = Driver::Idle;
                self.driver_name = None;
            }
            Event::Disconnected => {
                self.end_session(&mut fx);
                self.driver = Driver::Detached;
                self.driver_name = None;
            }
            Event::QueueStarted { queue, fresh } => self.queue_started(queue, fresh, now, &mut fx),
            Event::Quiesce => {
                self.release_parked(guest::RequestResult::NoNews, &mut fx);
                self.release_asked(guest::RequestResult::Busy, &mut fx);
            }
            Event::Guest { reply, request, fresh_epoch } => {
                self.guest(reply, request, fresh_epoch, now, &mut fx);
            }
            Event::Resize(resize) => self.resize(resize, now, &mut fx),
            Event::Cancel(actor) => self.cancel(actor, now, &mut fx),
            Event::Limits { min, total, policy } => {
                if total != self.total {
                    self.end_session(&mut fx);
                }
                self.min = min;
                self.total = total;
                self.policy = policy;
            }
            Event::Granted { requested } => self.granted(requested, &mut fx),
            Event::PoolDone { op, outcome, counts } => self.pool_done(op, outcome, counts, now, &mut fx),
            Event::Deleted(actor) => {
                self.end_session(&mut fx);
                let message = "the vSSD was deleted".to_owned();
                self.finish(JobState::Cancelled, message, None, Some(actor), now, &mut fx);
                return fx;
            }
            Event::Tick => {}
        }
        self.keep_time(now, &mut fx);
        self.converge(now, &mut fx);
        self.watch_pace(now, &mut fx);
        self.tell_driver(now, &mut fx);
        self.deliver(now, &mut fx);
        self.publish_capacity(&mut fx);
        fx
    }

    /// When [`Event::Tick`] is due at the latest, if at all.
    pub fn wake_at(&self) -> Option<u64> {
        let settle = match self.driver {
            Driver::Settling { until_ms } => Some(until_ms),
            _ => None,
        };
        let job = self.job.as_ref().and_then(Job::ends_at);
        let pace = self.pace.as_ref().and_then(Pace::wake_at);
        [settle, job, pace].into_iter().flatten().min()
    }

    pub fn requested(&self) -> u32 {
        self.requested
    }

    pub fn counts(&self) -> Counts {
        self.counts
    }

    pub fn min(&self) -> u32 {
        self.min
    }

    pub fn total(&self) -> u32 {
        self.total
    }

    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// The size a stock driver sees, in blocks.
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    pub fn job(&self) -> Option<u64> {
        self.job.as_ref().map(|job| job.id)
    }

    pub fn driver_kind(&self) -> DriverKind {
        match self.driver {
            Driver::Detached | Driver::Idle | Driver::Settling { .. } => DriverKind::None,
            Driver::Stock => DriverKind::Stock,
            Driver::Vssd => DriverKind::Vssd,
        }
    }

    pub fn driver_name(&self) -> Option<&str> {
        self.driver_name.as_deref()
    }

    /// What the guest said it could give, in its last DECLINE of this session.
    pub fn could_give(&self) -> Option<u32> {
        self.session.as_ref().and_then(|s| s.could_give)
    }

    /// Whether the guest made no progress for [`UNCOOPERATIVE_MS`].
    pub fn is_uncooperative(&self) -> bool {
        self.pace.as_ref().is_some_and(Pace::is_uncooperative)
    }

    fn bytes(&self, blocks: u32) -> u64 {
        self.block_size.bytes_of(blocks)
    }

    /// Nobody but the host can move blocks: no driver takes part, and none is expected any moment.
    fn host_acts(&self) -> bool {
        matches!(self.driver, Driver::Detached | Driver::Idle | Driver::Stock)
    }

    fn host_op_in_flight(&self) -> bool {
        self.ops.values().any(|op| matches!(op.by, OpBy::Host { .. }))
    }

    fn start_op(&mut self, by: OpBy, blocks: u32) -> OpId {
        let op = OpId(self.next_op);
        self.next_op += 1;
        self.ops.insert(op, Op { by, blocks });
        op
    }

    fn queue_started(&mut self, queue: u16, fresh: bool, now: u64, fx: &mut Vec<Effect>) {
        // A driver that initialises the device starts every queue at index 0, and queue 0 exists in every device.
        // Other queues may be at index 0 because they were never used, under a driver that goes on.
        let new_driver = fresh && queue == 0;
        if new_driver {
            self.end_session(fx);
            self.driver_name = None;
        }
        if new_driver || matches!(self.driver, Driver::Detached | Driver::Idle) {
            self.driver = Driver::Settling { until_ms: now + SETTLE_MS };
        }
    }

    /// Sets the target, which is durable already unless `store`. Returns whether that is news.
    fn set_requested(&mut self, blocks: u32, reason: Reason, store: bool, fx: &mut Vec<Effect>) -> bool {
        let changed = blocks != self.requested;
        if !changed && reason == self.reason {
            return false;
        }
        self.stuck = false;
        self.requested = blocks;
        self.reason = reason;
        self.pace = None;
        if changed && store {
            fx.push(Effect::StoreRequested { blocks });
        }
        self.news_target();
        true
    }

    /// Takes the target back to what is plugged.
    fn withdraw(&mut self, fx: &mut Vec<Effect>) {
        let blocks = self.counts.plugged.clamp(self.min, self.total);
        self.set_requested(blocks, Reason::None, true, fx);
        self.withdrawing = !self.ops.is_empty();
    }

    fn granted(&mut self, requested: u32, fx: &mut Vec<Effect>) {
        if requested <= self.requested || requested > self.total {
            return;
        }
        let data = json!({
            "from_bytes": self.bytes(self.counts.plugged),
            "to_bytes": self.bytes(requested),
            "reason": "pull",
        });
        self.withdrawing = false;
        self.set_requested(requested, Reason::Pull, false, fx);
        fx.push(Effect::Emit(News { event: "grow.requested", job: None, data }));
    }

    fn pool_done(&mut self, id: OpId, outcome: Outcome, counts: Counts, now: u64, fx: &mut Vec<Effect>) {
        let Some(op) = self.ops.remove(&id) else { return };
        self.counts = counts;
        let epoch = self.session.as_ref().map(|s| s.epoch);
        let (moved, lost) = match &outcome {
            Outcome::Ranges { moved, lost, .. } => (*moved, *lost),
            Outcome::Failed => (0, 0),
        };
        if moved > 0 {
            self.stuck = false;
        }
        let by_this_session = matches!(op.by, OpBy::Guest { epoch: e, .. } if Some(e) == epoch);
        if moved > 0 && !by_this_session {
            self.news_state();
        }
        self.answer_asked(fx);
        match op.by {
            OpBy::Guest { reply, .. } => {
                self.note_progress(moved, now, fx);
                if let Outcome::Ranges { statuses, .. } = &outcome
                    && moved == 0
                    && statuses.contains(&RangeStatus::NoSpace)
                {
                    self.note_starved(now, fx);
                }
                let response = match outcome {
                    Outcome::Ranges { statuses, .. } => Response {
                        result: guest::RequestResult::Ok,
                        sizes: self.sizes(),
                        body: guest::ResponseBody::Ranges(statuses),
                    },
                    Outcome::Failed => Response::plain(guest::RequestResult::Busy, self.sizes()),
                };
                fx.push(Effect::Answer { reply, response });
            }
            OpBy::Host { take, forced } => {
                if forced && moved > 0 {
                    self.tell_forced(moved, lost, fx);
                }
                if moved == 0 {
                    let error = match (outcome, take) {
                        (Outcome::Failed, _) => ErrorCode::Media,
                        (_, true) => ErrorCode::InUse,
                        (_, false) => ErrorCode::PoolFull,
                    };
                    self.host_gave_up(error, forced, now, fx);
                } else {
                    self.note_progress(moved, now, fx);
                }
            }
        }
    }

    /// Moves towards the target where the host may.
    fn converge(&mut self, now: u64, fx: &mut Vec<Effect>) {
        if self.withdrawing {
            self.withdraw(fx);
        }
        self.check_job(now, fx);
        if self.host_op_in_flight() || self.counts.plugged == self.requested {
            return;
        }
        if self.counts.plugged < self.requested {
            if self.host_acts() && self.ops.is_empty() && !self.stuck {
                let blocks = self.requested - self.counts.plugged;
                let op = self.start_op(OpBy::Host { take: false, forced: false }, blocks);
                fx.push(Effect::GiveBlocks { op, blocks, limit: self.requested });
                self.job_state(JobState::Committing, "the host plugs blocks", now, fx);
            }
            return;
        }
        let Some(take) = self.host_take() else { return };
        if !self.ops.is_empty() {
            return;
        }
        let blocks = self.counts.plugged - self.requested;
        let forced = take != (Pick::Tail { data: false });
        let op = self.start_op(OpBy::Host { take: true, forced }, blocks);
        fx.push(Effect::TakeBlocks { op, blocks, pick: take });
        self.job_state(JobState::Committing, "the host takes blocks", now, fx);
    }

    fn publish_capacity(&mut self, fx: &mut Vec<Effect>) {
        let blocks = self.counts.end.max(1);
        if blocks != self.capacity {
            self.capacity = blocks;
            fx.push(Effect::SetCapacity { blocks });
        }
    }

    /// Tells operators which driver there is, once it is another.
    fn tell_driver(&mut self, now: u64, fx: &mut Vec<Effect>) {
        if matches!(self.driver, Driver::Settling { .. }) {
            return;
        }
        let current = (self.driver_kind(), self.driver_name.clone());
        if current == self.told_driver {
            return;
        }
        let Some(dropped) = self.driver_quiet.admit(now) else { return };
        let mut data = json!({ "kind": current.0, "name": current.1 });
        if dropped > 0 {
            data["changes_not_told"] = dropped.into();
        }
        fx.push(Effect::Emit(News { event: "device.driver", job: None, data }));
        self.told_driver = current;
    }

    fn tell_forced(&self, moved: u32, lost: u32, fx: &mut Vec<Effect>) {
        let mut data = json!({
            "blocks": moved,
            "bytes": self.bytes(moved),
            "lost_bytes": self.bytes(lost),
        });
        if let Some(job) = &self.job {
            job.actor.add_to(&mut data);
        }
        fx.push(Effect::Emit(News { event: "shrink.forced", job: self.job(), data }));
    }
}
