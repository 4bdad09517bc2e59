// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the host wishes of a guest whose driver cannot give blocks up, and what becomes of it (`protocol.md`, §17).
//!
//! ```text
//!   operator ─ set, cancel ──────┐                      ┌─ notice ──► the guest's agent, when it asks
//!   agent ──── report ───────────┼─► Reclaim (pure) ────┤
//!   pool ───── blocks with data ─┤                      └─ Job, Emit ──► operators
//!   time ───── look (wake_at) ───┘
//! ```
//!
//! The wish is a level, the *soft size*: how many blocks the guest is asked to use at most. Nothing enforces it, since a driver
//! that does not know of unplugged blocks must never meet one. So a job about it ends by what the host sees itself, blocks
//! that hold data, never by what the agent says; the agent can only end it early, by saying that it cannot.
//!
//! A pure state machine: it knows no clock, socket or pool.

use serde_json::json;
use vssd_protocol::control::{ErrorCode, JobKind, JobState};
use vssd_protocol::letter::{Notice, Report, Shortfall};
use vssd_protocol::units::{BlockSize, ByteCount};

use super::negotiation::{Actor, Effect, JobView, News, Quiet};

/// A job without a deadline of its own, or of its policy's, has so long: there may be no agent at all.
pub const DEADLINE_MS: u64 = 120_000;
/// How often the host looks what the guest uses while a job runs.
const LOOK_MS: u64 = 250;

/// What the host sees when it is asked.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// Blocks that hold data.
    pub allocated: u32,
    pub total: u32,
    /// On the clock of all other calls, which never goes back.
    pub now: u64,
}

/// An operator's order.
#[derive(Clone, Copy, Debug)]
pub struct Order {
    pub job: u64,
    pub actor: Actor,
    pub deadline_ms: u64,
}

#[derive(Clone, Debug)]
struct Job {
    order: Order,
    from: u32,
    started_ms: u64,
    state: JobState,
    message: String,
    looked_ms: u64,
}

/// The wish of one vSSD.
#[derive(Clone, Debug)]
pub struct Reclaim {
    block_size: BlockSize,
    soft: Option<u32>,
    has_holes: bool,
    seq: u8,
    job: Option<Job>,
    heard: Option<(u64, Report)>,
    pull_quiet: Quiet,
}

impl Reclaim {
    pub fn new(block_size: BlockSize, soft: Option<u32>) -> Self {
        Self {
            block_size,
            soft,
            has_holes: false,
            seq: 1,
            job: None,
            heard: None,
            pull_quiet: Quiet::default(),
        }
    }

    /// The soft size in blocks, if there is a wish.
    pub fn soft(&self) -> Option<u32> {
        self.soft
    }

    pub fn notice(&self) -> Notice {
        // At most 21.
        let block_shift = u8::try_from(self.block_size.bytes().trailing_zeros()).unwrap_or(u8::MAX);
        Notice { seq: self.seq, block_shift, has_holes: self.has_holes, soft_blocks: self.soft }
    }

    /// Whether blocks below the end of the disk are unplugged.
    pub fn set_holes(&mut self, has_holes: bool) {
        if self.has_holes != has_holes {
            self.has_holes = has_holes;
            self.renumber();
        }
    }

    /// The newest report of the agent, and when it came.
    pub fn heard(&self) -> Option<(u64, Report)> {
        self.heard
    }

    pub fn job(&self) -> Option<u64> {
        self.job.as_ref().map(|job| job.order.job)
    }

    /// When [`Reclaim::look`] is due, if at all.
    pub fn wake_at(&self) -> Option<u64> {
        let job = self.job.as_ref()?;
        let ends = job.started_ms.saturating_add(job.order.deadline_ms);
        Some(ends.min(job.looked_ms.saturating_add(LOOK_MS)))
    }

    /// The guest is gone, and its agent with it.
    pub fn forget_agent(&mut self) {
        self.heard = None;
    }

    /// Sets the wish, which is durable already, or takes it back.
    pub fn set(&mut self, soft: Option<u32>, order: Order, seen: Seen) -> Vec<Effect> {
        let mut fx = Vec::new();
        let message = format!("job {} took its place", order.job);
        self.finish(JobState::Superseded, message, Some(ErrorCode::Conflict), seen, &mut fx);
        self.wish(soft);
        let event = if soft.is_some() { "reclaim.requested" } else { "reclaim.ended" };
        let mut data =
            json!({ "soft_bytes": soft.map(|soft| self.bytes(soft)), "deadline_ms": order.deadline_ms });
        order.actor.add_to(&mut data);
        let is_wish = soft.is_some();
        fx.push(Effect::Emit(News { event, job: is_wish.then_some(order.job), data }));
        if is_wish {
            let heard = if self.heard.is_some() {
                "the guest's agent is told"
            } else {
                "waiting for an agent in the guest"
            };
            self.job = Some(Job {
                order,
                from: seen.allocated,
                started_ms: seen.now,
                state: JobState::Created,
                message: heard.to_owned(),
                looked_ms: seen.now,
            });
            self.show(seen, &mut fx);
            self.check(seen, &mut fx);
        }
        fx
    }

    /// The agent said how things are.
    pub fn report(&mut self, report: Report, seen: Seen) -> Vec<Effect> {
        let mut fx = Vec::new();
        if self.heard.is_none() {
            let data = json!({ "held_bytes": self.bytes(report.held) });
            fx.push(Effect::Emit(News { event: "guest.agent", job: None, data }));
        }
        self.heard = Some((seen.now, report));
        if report.want > 0
            && let Some(dropped) = self.pull_quiet.admit(seen.now)
        {
            let mut data = json!({ "want_bytes": self.bytes(report.want), "soft_bytes": self.soft.map(|soft| self.bytes(soft)) });
            if dropped > 0 {
                data["pulls_not_told"] = dropped.into();
            }
            fx.push(Effect::Emit(News { event: "guest.pull", job: None, data }));
        }
        self.check(seen, &mut fx);
        if let Some(job) = &mut self.job
            && report.seq == self.seq
        {
            let why = match report.shortfall {
                Shortfall::None => {
                    job.state = JobState::Offered;
                    "the guest's agent gives back what it can".clone_into(&mut job.message);
                    self.show(seen, &mut fx);
                    return fx;
                }
                Shortfall::Nothing => "nothing more can be given up",
                Shortfall::Busy => "what could be given is in use",
                Shortfall::Policy => "its own rules forbid it",
                Shortfall::Error => "it failed, see its log",
            };
            let held = ByteCount(self.bytes(report.held));
            let message = format!("the guest's agent keeps {held} unused: {why}");
            self.finish_short(message, ErrorCode::GuestRefused, seen, &mut fx);
        }
        fx
    }

    /// Looks whether the job is at its end.
    pub fn look(&mut self, seen: Seen) -> Vec<Effect> {
        let mut fx = Vec::new();
        if let Some(job) = &mut self.job {
            job.looked_ms = seen.now;
        }
        self.check(seen, &mut fx);
        if let Some(job) = &self.job
            && job.started_ms.saturating_add(job.order.deadline_ms) <= seen.now
        {
            let heard = job.state != JobState::Created;
            let message = if heard {
                "the deadline passed; the wish stands"
            } else {
                "the deadline passed, and no agent was heard of; the wish stands"
            };
            self.finish(JobState::Expired, message.to_owned(), Some(ErrorCode::TimedOut), seen, &mut fx);
        }
        fx
    }

    /// Ends the job for the reason `why`; the caller has taken the wish back.
    pub fn cancel(&mut self, why: &str, seen: Seen) -> Vec<Effect> {
        let mut fx = Vec::new();
        self.wish(None);
        self.finish(JobState::Cancelled, why.to_owned(), None, seen, &mut fx);
        fx
    }

    fn wish(&mut self, soft: Option<u32>) {
        if soft != self.soft {
            self.soft = soft;
            self.renumber();
        }
    }

    fn renumber(&mut self) {
        self.seq = self.seq.checked_add(1).unwrap_or(1);
    }

    fn bytes(&self, blocks: u32) -> u64 {
        self.block_size.bytes_of(blocks)
    }

    fn check(&mut self, seen: Seen, fx: &mut Vec<Effect>) {
        if self.job.is_some() && self.soft.is_some_and(|soft| seen.allocated <= soft) {
            self.finish(JobState::Done, String::new(), None, seen, fx);
        }
    }

    /// `partial` if anything came back, else `refused`.
    fn finish_short(&mut self, message: String, error: ErrorCode, seen: Seen, fx: &mut Vec<Effect>) {
        let Some(job) = &self.job else { return };
        let state = if seen.allocated < job.from { JobState::Partial } else { JobState::Refused };
        self.finish(state, message, Some(error), seen, fx);
    }

    fn finish(
        &mut self,
        state: JobState,
        message: String,
        error: Option<ErrorCode>,
        seen: Seen,
        fx: &mut Vec<Effect>,
    ) {
        let Some(mut job) = self.job.take() else { return };
        job.state = state;
        job.message = message;
        let mut view = self.view(&job, seen);
        view.ended_ms = Some(seen.now);
        view.error = error;
        let event = match state {
            JobState::Done => Some("reclaim.done"),
            JobState::Partial => Some("reclaim.partial"),
            JobState::Refused => Some("reclaim.refused"),
            JobState::Expired => Some("reclaim.expired"),
            JobState::Cancelled => Some("reclaim.cancelled"),
            // The event of the job that takes its place says so.
            _ => None,
        };
        if let Some(event) = event {
            let mut data = json!({
                "soft_bytes": self.bytes(view.target),
                "from_bytes": self.bytes(view.from),
                "allocated_bytes": self.bytes(view.plugged),
                "elapsed_ms": seen.now.saturating_sub(job.started_ms),
                "message": view.message,
            });
            job.order.actor.add_to(&mut data);
            fx.push(Effect::Emit(News { event, job: Some(view.id), data }));
        }
        fx.push(Effect::Job(view));
    }

    fn show(&self, seen: Seen, fx: &mut Vec<Effect>) {
        if let Some(job) = &self.job {
            fx.push(Effect::Job(self.view(job, seen)));
        }
    }

    fn view(&self, job: &Job, seen: Seen) -> JobView {
        JobView {
            id: job.order.job,
            kind: JobKind::Reclaim,
            state: job.state,
            from: job.from,
            target: self.soft.unwrap_or(seen.total),
            plugged: seen.allocated,
            started_ms: job.started_ms,
            ended_ms: None,
            deadline_ms: Some(job.order.deadline_ms),
            message: job.message.clone(),
            error: None,
            actor: job.order.actor,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ACTOR: Actor = Actor { uid: 1, pid: 2 };

    fn seen(allocated: u32, now: u64) -> Seen {
        Seen { allocated, total: 1000, now }
    }

    fn order(job: u64) -> Order {
        Order { job, actor: ACTOR, deadline_ms: 10_000 }
    }

    fn ends(fx: &[Effect]) -> Vec<(u64, JobState)> {
        fx.iter()
            .filter_map(|effect| match effect {
                Effect::Job(view) => Some((view.id, view.state)),
                _ => None,
            })
            .collect()
    }

    #[test]
    fn a_job_ends_by_what_the_host_sees_not_by_what_the_agent_says() {
        let mut reclaim = Reclaim::new(BlockSize::DEFAULT, None);
        assert_eq!(reclaim.notice().soft_blocks, None);
        let first = reclaim.notice().seq;
        assert_eq!(ends(&reclaim.set(Some(300), order(1), seen(800, 0))), [(1, JobState::Created)]);
        let notice = reclaim.notice();
        assert!(notice.soft_blocks == Some(300) && notice.seq != first && notice.block_shift == 16);
        let boast = Report { seq: notice.seq, held: 900, ..Report::default() };
        assert_eq!(ends(&reclaim.report(boast, seen(800, 100))), [(1, JobState::Offered)]);
        assert_eq!(ends(&reclaim.look(seen(301, 400))), []);
        assert_eq!(ends(&reclaim.look(seen(300, 700))), [(1, JobState::Done)]);
        assert_eq!(reclaim.wake_at(), None);
        assert_eq!(reclaim.notice(), notice, "the wish stands");
    }

    #[test]
    fn an_agent_that_cannot_ends_it_at_once_and_only_for_the_wish_it_knows() {
        let mut reclaim = Reclaim::new(BlockSize::DEFAULT, None);
        reclaim.set(Some(300), order(1), seen(800, 0));
        let old =
            Report { seq: reclaim.notice().seq - 1, shortfall: Shortfall::Nothing, ..Report::default() };
        assert_eq!(ends(&reclaim.report(old, seen(800, 1))), []);
        let new = Report { seq: reclaim.notice().seq, ..old };
        assert_eq!(ends(&reclaim.report(new, seen(800, 2))), [(1, JobState::Refused)]);
        reclaim.set(Some(200), order(2), seen(800, 3));
        let new = Report { seq: reclaim.notice().seq, ..old };
        assert_eq!(ends(&reclaim.report(new, seen(500, 4))), [(2, JobState::Partial)]);
        // Said in the moment in which it was reached after all.
        reclaim.set(Some(100), order(3), seen(800, 5));
        let new = Report { seq: reclaim.notice().seq, ..old };
        assert_eq!(ends(&reclaim.report(new, seen(100, 6))), [(3, JobState::Done)]);
    }

    #[test]
    fn without_an_agent_the_deadline_ends_it() {
        let mut reclaim = Reclaim::new(BlockSize::DEFAULT, None);
        reclaim.set(Some(300), order(1), seen(800, 0));
        let mut now = 0;
        let mut looks = 0;
        while let Some(at) = reclaim.wake_at() {
            assert!(at > now, "time stands still at {at}");
            now = at;
            looks += 1;
            let ended = ends(&reclaim.look(seen(800, now)));
            assert_eq!(ended, if now < 10_000 { vec![] } else { vec![(1, JobState::Expired)] });
        }
        assert_eq!((now, looks), (10_000, 40));
    }

    #[test]
    fn taking_it_back_changes_the_notice_and_ends_the_job() {
        let mut reclaim = Reclaim::new(BlockSize::DEFAULT, Some(7));
        let resumed = reclaim.notice();
        assert_eq!(resumed.soft_blocks, Some(7));
        reclaim.set(Some(300), order(1), seen(800, 0));
        assert_eq!(ends(&reclaim.set(None, order(2), seen(800, 1))), [(1, JobState::Superseded)]);
        assert_eq!((reclaim.notice().soft_blocks, reclaim.job()), (None, None));
        reclaim.set(Some(300), order(3), seen(800, 2));
        assert_eq!(ends(&reclaim.cancel("cancelled", seen(800, 3))), [(3, JobState::Cancelled)]);
        assert_eq!(reclaim.notice().soft_blocks, None);
        // The number of a notice comes round, and 0 stays "none seen".
        for blocks in 0..600 {
            reclaim.wish(Some(blocks));
            assert_ne!(reclaim.notice().seq, 0);
        }
    }
}
