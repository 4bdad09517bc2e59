// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The guest's side of the negotiation: sessions, news, and the answer to each request.

use serde_json::json;
use vssd_protocol::control::{JobState, PullPolicy};
use vssd_protocol::guest::{
    self, DeclineReason, HelloBody, Request, RequestResult, Response, ResponseBody, Sizes, Urgency,
};
use vssd_protocol::units::BlockRange;

use super::job::Job;
use super::{Driver, Effect, Negotiation, News, OpBy, ReplyId};

/// What was agreed with one driver since its HELLO.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Session {
    pub(super) epoch: u64,
    /// Number of the newest news.
    seq: u64,
    /// Number of the newest news of each kind.
    target_seq: u64,
    state_seq: u64,
    parked: Option<Parked>,
    /// STATE requests that came while blocks were moved by others than this session.
    asked: Vec<Asked>,
    pub(super) could_give: Option<u32>,
    /// The driver declined the newest target and has made no progress since.
    pub(super) declined: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Parked {
    reply: ReplyId,
    seq_seen: u64,
}

/// A STATE request.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Asked {
    reply: ReplyId,
    start: u32,
    empty_only: bool,
}

impl Negotiation {
    pub(super) fn sizes(&self) -> Sizes {
        Sizes {
            seq: self.session.as_ref().map_or(0, |s| s.seq),
            requested_blocks: self.requested,
            plugged_blocks: self.counts.plugged,
        }
    }

    /// Requested size, deadline or reason changed.
    pub(super) fn news_target(&mut self) {
        if let Some(session) = &mut self.session {
            session.seq += 1;
            session.target_seq = session.seq;
            session.declined = false;
        }
    }

    /// The plugged set changed without this driver's doing.
    pub(super) fn news_state(&mut self) {
        if let Some(session) = &mut self.session {
            session.seq += 1;
            session.state_seq = session.seq;
        }
    }

    /// Ends the session; whatever carries its epoch from now on is stale.
    pub(super) fn end_session(&mut self, fx: &mut Vec<Effect>) {
        self.release_parked(RequestResult::Stale, fx);
        self.release_asked(RequestResult::Stale, fx);
        self.session = None;
        self.pace = None;
    }

    /// Sends a parked WAIT back.
    pub(super) fn release_parked(&mut self, result: RequestResult, fx: &mut Vec<Effect>) {
        let sizes = self.sizes();
        if let Some(parked) = self.session.as_mut().and_then(|s| s.parked.take()) {
            fx.push(Effect::Answer { reply: parked.reply, response: Response::plain(result, sizes) });
        }
    }

    /// Sends STATE requests back.
    pub(super) fn release_asked(&mut self, result: RequestResult, fx: &mut Vec<Effect>) {
        let asked = self.session.as_mut().map(|s| std::mem::take(&mut s.asked)).unwrap_or_default();
        for Asked { reply, .. } in asked {
            self.answer(reply, result, fx);
        }
    }

    /// Answers STATE requests, once blocks stand still but for what the session itself does: sizes and ranges of an answer
    /// are of one moment.
    pub(super) fn answer_asked(&mut self, fx: &mut Vec<Effect>) {
        let sizes = self.sizes();
        let Some(session) = &mut self.session else { return };
        let mine = |by: &OpBy| matches!(by, OpBy::Guest { epoch, .. } if *epoch == session.epoch);
        if self.ops.values().all(|op| mine(&op.by)) {
            let answer =
                |Asked { reply, start, empty_only }| Effect::AnswerState { reply, sizes, start, empty_only };
            fx.extend(session.asked.drain(..).map(answer));
        }
    }

    /// Answers a parked WAIT if there is news for it.
    pub(super) fn deliver(&mut self, now: u64, fx: &mut Vec<Effect>) {
        let sizes = self.sizes();
        let Some(session) = &mut self.session else { return };
        let seq = session.seq;
        let Some(parked) = session.parked.take_if(|parked| parked.seq_seen < seq) else { return };
        let mut flags = 0;
        if session.target_seq > parked.seq_seen {
            flags |= guest::NEWS_TARGET;
        }
        if session.state_seq > parked.seq_seen {
            flags |= guest::NEWS_STATE;
        }
        let deadline_ms = self.job.as_ref().and_then(Job::deadline_at).map_or(0, |at| {
            // A deadline of this very moment is still one: 0 would mean that there is none.
            u32::try_from(at.saturating_sub(now)).unwrap_or(u32::MAX).max(1)
        });
        let body = ResponseBody::Wait { flags, reason: self.reason, deadline_ms };
        let response = Response { result: RequestResult::Ok, sizes, body };
        fx.push(Effect::Answer { reply: parked.reply, response });
        self.guest_was_told(now, fx);
    }

    fn guest_was_told(&mut self, now: u64, fx: &mut Vec<Effect>) {
        if self.job.as_ref().is_some_and(Job::is_untold) {
            self.job_state(JobState::Offered, "the guest was asked", now, fx);
        }
    }

    pub(super) fn guest(
        &mut self,
        reply: ReplyId,
        request: Request,
        fresh_epoch: u64,
        now: u64,
        fx: &mut Vec<Effect>,
    ) {
        if let Request::Hello { version, driver, .. } = request {
            self.hello(reply, version, driver, fresh_epoch, now, fx);
            return;
        }
        // Even a stale message proves that the driver knows the guest channel.
        if matches!(self.driver, Driver::Idle | Driver::Settling { .. } | Driver::Stock) {
            self.driver = Driver::Vssd;
            self.last_was_vssd = true;
        }
        if request.epoch() != self.session.as_ref().map(|s| s.epoch) {
            // Sizes are the session's; an old one learns nothing but that it is over.
            let response = Response::plain(RequestResult::Stale, Sizes::default());
            fx.push(Effect::Answer { reply, response });
            return;
        }
        match request {
            Request::Hello { .. } => {}
            Request::State { flags, start, .. } => {
                if flags & !guest::STATE_F_EMPTY != 0 || start > self.total {
                    self.answer(reply, RequestResult::Invalid, fx);
                } else {
                    let empty_only = flags & guest::STATE_F_EMPTY != 0;
                    let asked = Asked { reply, start, empty_only };
                    self.session.iter_mut().for_each(|session| session.asked.push(asked.clone()));
                    self.answer_asked(fx);
                }
            }
            Request::Wait { seq_seen, .. } => self.wait(reply, seq_seen, fx),
            Request::Unplug { ranges, .. } => self.pass_on(reply, ranges, true, fx),
            Request::Plug { ranges, .. } => self.pass_on(reply, ranges, false, fx),
            Request::Decline { seq, could_give, reason, .. } => {
                self.decline(reply, seq, could_give, reason, now, fx);
            }
            Request::Pull { want_blocks, urgency, .. } => self.pull(reply, want_blocks, urgency, now, fx),
            Request::Report { estimate, .. } => self.report(reply, estimate, fx),
        }
    }

    fn answer(&self, reply: ReplyId, result: RequestResult, fx: &mut Vec<Effect>) {
        fx.push(Effect::Answer { reply, response: Response::plain(result, self.sizes()) });
    }

    fn hello(
        &mut self,
        reply: ReplyId,
        version: u16,
        driver: String,
        fresh_epoch: u64,
        now: u64,
        fx: &mut Vec<Effect>,
    ) {
        let spoken = version >= guest::VERSION;
        if spoken {
            self.end_session(fx);
            self.driver = Driver::Vssd;
            self.last_was_vssd = true;
            self.driver_name = Some(driver);
            self.session = Some(Session {
                epoch: fresh_epoch,
                seq: 1,
                target_seq: 1,
                state_seq: 0,
                parked: None,
                asked: Vec::new(),
                could_give: None,
                declined: false,
            });
        }
        let body = HelloBody {
            version: guest::VERSION,
            features: 0,
            epoch: if spoken { fresh_epoch } else { 0 },
            block_size: u32::try_from(self.block_size.bytes()).unwrap_or(u32::MAX),
            total_blocks: self.total,
            min_blocks: self.min,
            max_ranges: self.max_ranges,
            name: self.name.clone(),
        };
        let result = if spoken { RequestResult::Ok } else { RequestResult::Version };
        let response = Response { result, sizes: self.sizes(), body: ResponseBody::Hello(body) };
        fx.push(Effect::Answer { reply, response });
        if spoken {
            self.offer_job();
            self.guest_was_told(now, fx);
        }
    }

    fn wait(&mut self, reply: ReplyId, seq_seen: u64, fx: &mut Vec<Effect>) {
        self.release_parked(RequestResult::NoNews, fx);
        let Some(session) = &mut self.session else { return };
        if seq_seen > session.seq {
            self.answer(reply, RequestResult::Invalid, fx);
        } else {
            session.parked = Some(Parked { reply, seq_seen });
        }
    }

    /// Hands an UNPLUG or PLUG to the pool, which judges each range.
    fn pass_on(&mut self, reply: ReplyId, ranges: Vec<BlockRange>, unplug: bool, fx: &mut Vec<Effect>) {
        // The host's own work counts blocks; a guest that moves some meanwhile would make it take too many.
        if self.host_op_in_flight() || self.force_is_due() {
            self.answer(reply, RequestResult::Busy, fx);
            return;
        }
        let epoch = self.session.as_ref().map_or(0, |s| s.epoch);
        let blocks = ranges.iter().fold(0u32, |sum, range| sum.saturating_add(range.count));
        let op = self.start_op(OpBy::Guest { reply, epoch, unplug }, blocks);
        fx.push(if unplug {
            Effect::Unplug { op, ranges }
        } else {
            Effect::Plug { op, ranges, limit: self.requested }
        });
    }

    fn decline(
        &mut self,
        reply: ReplyId,
        seq: u64,
        could_give: u32,
        reason: DeclineReason,
        now: u64,
        fx: &mut Vec<Effect>,
    ) {
        let (total, pending) = (self.total, self.requested != self.counts.plugged);
        let Some(session) = &mut self.session else { return };
        if seq > session.seq || could_give > total {
            self.answer(reply, RequestResult::Invalid, fx);
            return;
        }
        // A decline of older news says nothing about the newest (V-29).
        let newest = seq == session.seq;
        if newest {
            session.could_give = Some(could_give);
        }
        let current = newest && pending;
        if current {
            session.declined = true;
        }
        self.answer(reply, RequestResult::Ok, fx);
        if current {
            self.pace = None;
            self.job_declined(could_give, reason, now, fx);
        }
    }

    fn pull(&mut self, reply: ReplyId, want: u32, urgency: Urgency, now: u64, fx: &mut Vec<Effect>) {
        if want == 0 {
            self.answer(reply, RequestResult::Invalid, fx);
            return;
        }
        let wanted = self.requested.saturating_add(want).min(self.total);
        // What an operator is taking away is not given back on the guest's word.
        let shrinking = self.job.is_some() || self.requested < self.counts.plugged;
        let grant = self.policy.pull == PullPolicy::Grant && !shrinking && wanted > self.requested;
        if let Some(dropped) = self.pull_quiet.admit(now) {
            let mut data = json!({
                "want_bytes": self.bytes(want),
                "requested_bytes": self.bytes(self.requested),
                "urgency": match urgency {
                    Urgency::Wish => "wish",
                    Urgency::Pressure => "pressure",
                    Urgency::Critical => "critical",
                },
                "granting": grant,
            });
            if dropped > 0 {
                data["pulls_not_told"] = dropped.into();
            }
            fx.push(Effect::Emit(News { event: "guest.pull", job: None, data }));
        }
        self.answer(reply, RequestResult::Ok, fx);
        if grant {
            fx.push(Effect::TryGrant { requested: wanted });
        }
    }

    /// What the guest could give is for operators to know; nothing follows from it here.
    fn report(&mut self, reply: ReplyId, estimate: guest::Estimate, fx: &mut Vec<Effect>) {
        if estimate.sum() > self.total.into() {
            self.answer(reply, RequestResult::Invalid, fx);
        } else {
            self.answer(reply, RequestResult::Ok, fx);
            fx.push(Effect::NoteEstimate(estimate));
        }
    }

    /// The driver had its time to say HELLO: it is a stock one.
    pub(super) fn settle(&mut self, now: u64) {
        if matches!(self.driver, Driver::Settling { until_ms } if until_ms <= now) {
            self.driver = Driver::Stock;
            self.last_was_vssd = false;
        }
    }
}
