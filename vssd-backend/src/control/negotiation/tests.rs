// SPDX-License-Identifier: Apache-2.0 OR MIT

//! One test a rule. The rig plays pool: a set of plugged blocks that hold data or not.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use vssd_protocol::control::{OnTimeout, PullPolicy};
use vssd_protocol::guest::{DeclineReason, Estimate, Request, RequestResult, ResponseBody, Urgency};

use super::*;

const BLOCK: u64 = 64 << 10;
pub(super) const OPERATOR: Actor = Actor { uid: 0, pid: 42 };

/// The negotiation of a vSSD of 1000 blocks (1..=1000, minimum 10) with a pool beside it.
pub(super) struct Rig {
    pub(super) n: Negotiation,
    pub(super) now: u64,
    /// Plugged blocks; `true`: holds data.
    pub(super) blocks: BTreeMap<u32, bool>,
    /// What the pool is to do; done by [`Rig::run_pool`].
    pub(super) queue: VecDeque<Effect>,
    pub(super) answers: BTreeMap<ReplyId, Response>,
    pub(super) jobs: BTreeMap<u64, JobView>,
    pub(super) events: Vec<News>,
    pub(super) estimate: Option<Estimate>,
    pub(super) capacity: u32,
    pub(super) pool_fails: bool,
    pub(super) can_plug: u32,
    pub(super) grants: u32,
    /// What a restarted daemon would find.
    pub(super) durable_requested: u32,
    next_reply: u64,
    next_job: u64,
}

impl Rig {
    pub(super) fn new(plugged: u32) -> Self {
        Self::with_policy(plugged, Policy::default())
    }

    pub(super) fn with_policy(plugged: u32, policy: Policy) -> Self {
        let blocks = (0..plugged).map(|b| (b, false)).collect();
        let counts = Counts { plugged, end: plugged };
        let setup = Setup {
            name: "vm1".into(),
            block_size: BlockSize::DEFAULT,
            total: 1000,
            min: 10,
            requested: plugged,
            counts,
            policy,
        };
        let n = Negotiation::new(setup);
        Self {
            capacity: n.capacity(),
            n,
            now: 1_000,
            blocks,
            queue: VecDeque::new(),
            answers: BTreeMap::new(),
            jobs: BTreeMap::new(),
            events: Vec::new(),
            estimate: None,
            pool_fails: false,
            can_plug: 1000,
            grants: 1000,
            durable_requested: plugged,
            next_reply: 0,
            next_job: 0,
        }
    }

    pub(super) fn counts(&self) -> Counts {
        let end = self.blocks.last_key_value().map_or(0, |(b, _)| b + 1);
        Counts { plugged: u32::try_from(self.blocks.len()).unwrap(), end }
    }

    pub(super) fn apply(&mut self, event: Event) {
        let fx = self.n.apply(event, self.now);
        assert!(fx.len() < 32, "effect storm: {fx:?}");
        let mut grants = Vec::new();
        for effect in fx {
            match effect {
                Effect::Answer { reply, response } => {
                    assert!(self.answers.insert(reply, response).is_none(), "{reply:?} answered twice");
                }
                Effect::AnswerState { reply, sizes, .. } => {
                    let body = ResponseBody::State { next: 1000, ranges: Vec::new() };
                    let response = Response { result: RequestResult::Ok, sizes, body };
                    assert!(self.answers.insert(reply, response).is_none(), "{reply:?} answered twice");
                }
                Effect::Job(view) => {
                    let old = self.jobs.insert(view.id, view);
                    assert!(old.is_none_or(|v| !v.state.is_final()), "a job changed after its end");
                }
                Effect::Emit(news) => self.events.push(news),
                Effect::NoteEstimate(estimate) => self.estimate = Some(estimate),
                Effect::SetCapacity { blocks } => self.capacity = blocks,
                Effect::StoreRequested { blocks } => self.durable_requested = blocks,
                Effect::TryGrant { requested } => grants.push(requested.min(self.grants)),
                pool => self.queue.push_back(pool),
            }
        }
        for requested in grants {
            self.durable_requested = self.durable_requested.max(requested);
            self.apply(Event::Granted { requested });
        }
    }

    /// Does the oldest pool operation. `false` if there is none.
    pub(super) fn run_pool_once(&mut self) -> bool {
        let Some(effect) = self.queue.pop_front() else { return false };
        let mut lost = 0;
        let before = self.blocks.len();
        let (op, statuses) = match effect {
            Effect::Unplug { op, ranges } => {
                (op, ranges.iter().map(|r| self.unplug(*r, self.n.min())).collect())
            }
            Effect::Plug { op, ranges, limit } => (op, ranges.iter().map(|r| self.plug(*r, limit)).collect()),
            Effect::TakeBlocks { op, blocks, pick } => {
                let mut order: Vec<(u32, bool)> = self.blocks.iter().rev().map(|(b, d)| (*b, *d)).collect();
                if pick == Pick::LeastHarm {
                    order.sort_by_key(|(_, data)| *data);
                }
                order.truncate(blocks as usize);
                if pick == (Pick::Tail { data: false }) && order.iter().any(|(_, data)| *data) {
                    order.clear();
                }
                let take = if self.pool_fails { Vec::new() } else { order };
                for (block, data) in take {
                    lost += u32::from(data);
                    self.blocks.remove(&block);
                }
                (op, Vec::new())
            }
            Effect::GiveBlocks { op, blocks, limit } => {
                let free: Vec<u32> = (0..1000).filter(|b| !self.blocks.contains_key(b)).collect();
                for block in free.into_iter().take(blocks as usize) {
                    self.plug(BlockRange::new(block, 1), limit);
                }
                (op, Vec::new())
            }
            other => panic!("not for the pool: {other:?}"),
        };
        let moved = u32::try_from(before.abs_diff(self.blocks.len())).unwrap();
        let outcome =
            if self.pool_fails { Outcome::Failed } else { Outcome::Ranges { statuses, moved, lost } };
        let counts = self.counts();
        self.apply(Event::PoolDone { op, outcome, counts });
        true
    }

    pub(super) fn run_pool(&mut self) {
        let mut steps = 0;
        while self.run_pool_once() {
            steps += 1;
            assert!(steps < 1000, "the host never stops");
        }
    }

    fn unplug(&mut self, range: BlockRange, min: u32) -> RangeStatus {
        if self.pool_fails {
            return RangeStatus::Busy;
        }
        if !range.is_within(1000) {
            return RangeStatus::Range;
        }
        let hit: Vec<u32> =
            (range.start..range.start + range.count).filter(|b| self.blocks.contains_key(b)).collect();
        if hit.is_empty() {
            return RangeStatus::Already;
        }
        if self.blocks.len() - hit.len() < min as usize {
            return RangeStatus::Protected;
        }
        for block in hit {
            self.blocks.remove(&block);
        }
        RangeStatus::Ok
    }

    fn plug(&mut self, range: BlockRange, limit: u32) -> RangeStatus {
        if self.pool_fails {
            return RangeStatus::Busy;
        }
        if !range.is_within(1000) {
            return RangeStatus::Range;
        }
        let new: Vec<u32> =
            (range.start..range.start + range.count).filter(|b| !self.blocks.contains_key(b)).collect();
        let after = self.counts().plugged + u32::try_from(new.len()).unwrap();
        if new.is_empty() {
            RangeStatus::Already
        } else if after > limit {
            RangeStatus::Limit
        } else if after > self.can_plug {
            RangeStatus::NoSpace
        } else {
            self.blocks.extend(new.into_iter().map(|b| (b, false)));
            RangeStatus::Ok
        }
    }

    /// The daemon starts again: what is durable stays, everything else is gone.
    pub(super) fn crash(&mut self) {
        self.queue.clear();
        self.jobs.retain(|_, job| job.state.is_final());
        let setup = Setup {
            name: "vm1".into(),
            block_size: BlockSize::DEFAULT,
            total: self.n.total(),
            min: self.n.min(),
            requested: self.durable_requested,
            counts: self.counts(),
            policy: self.n.policy(),
        };
        self.n = Negotiation::new(setup);
        self.capacity = self.n.capacity();
        let policy = self.n.policy();
        let deadline = Some((policy.deadline_ms, policy.on_timeout)).filter(|(ms, _)| *ms > 0);
        if let Some(plan) = self.n.plan_resumed(deadline) {
            self.next_job += 1;
            let job = self.next_job;
            self.apply(Event::Resize(Resize { job, plan, actor: OPERATOR, note: "resumed after restart" }));
        }
    }

    /// Whether a tick is due that only did not come because no time has passed.
    pub(super) fn is_tick_due(&self) -> bool {
        self.n.wake_at().is_some_and(|at| at == self.now)
    }

    pub(super) fn tail(&self) -> Tail {
        Tail {
            free: u32::try_from(self.blocks.values().rev().take_while(|data| !**data).count()).unwrap(),
            data_end: self.blocks.iter().rev().find(|(_, data)| **data).map_or(0, |(b, _)| b + 1),
        }
    }

    pub(super) fn send(&mut self, request: Request) -> ReplyId {
        self.next_reply += 1;
        let reply = ReplyId(self.next_reply);
        self.apply(Event::Guest { reply, request, fresh_epoch: 0xe000 + self.next_reply });
        reply
    }

    pub(super) fn hello(&mut self) -> u64 {
        let reply = self.send(Request::Hello { version: 1, features: 0, driver: "vssd 1".into() });
        match &self.answers[&reply].body {
            ResponseBody::Hello(hello) => hello.epoch,
            other => panic!("{other:?}"),
        }
    }

    /// Connects a front-end whose guest has a vSSD driver.
    fn vssd_guest(plugged: u32) -> (Self, u64) {
        let mut rig = Self::new(plugged);
        let epoch = rig.boot();
        (rig, epoch)
    }

    pub(super) fn boot(&mut self) -> u64 {
        self.apply(Event::Connected);
        self.apply(Event::QueueStarted { queue: 0, fresh: true });
        self.hello()
    }

    fn stock_guest(plugged: u32) -> Self {
        let mut rig = Self::new(plugged);
        rig.apply(Event::Connected);
        rig.apply(Event::QueueStarted { queue: 0, fresh: true });
        rig.pass(SETTLE_MS);
        assert_eq!(rig.n.driver_kind(), DriverKind::Stock);
        rig
    }

    pub(super) fn pass(&mut self, ms: u64) {
        let end = self.now + ms;
        // A timer that fires for ever without time passing would be a busy loop.
        let mut ticks = 0;
        while let Some(at) = self.n.wake_at().filter(|at| *at <= end) {
            self.now = self.now.max(at);
            self.apply(Event::Tick);
            ticks += 1;
            assert!(ticks < 100, "busy loop of ticks");
        }
        self.now = end;
        self.apply(Event::Tick);
    }

    fn wish(to_blocks: u32) -> Wish {
        Wish {
            to_bytes: u64::from(to_blocks) * BLOCK,
            expected_bytes: None,
            deadline_ms: None,
            on_timeout: None,
            force: false,
        }
    }

    pub(super) fn resize(&mut self, wish: Wish) -> Result<u64, Refusal> {
        let plan = self.n.plan(&wish, self.tail())?;
        self.next_job += 1;
        self.durable_requested = plan.to;
        self.apply(Event::Resize(Resize { job: self.next_job, plan, actor: OPERATOR, note: "" }));
        Ok(self.next_job)
    }

    fn resize_to(&mut self, blocks: u32) -> u64 {
        self.resize(Self::wish(blocks)).unwrap()
    }

    fn give(&mut self, epoch: u64, start: u32, count: u32) -> Response {
        let ranges = vec![BlockRange::new(start, count)];
        let reply = self.send(Request::Unplug { epoch, ranges });
        self.run_pool();
        self.answers[&reply].clone()
    }

    fn state(&self, job: u64) -> JobState {
        self.jobs[&job].state
    }

    fn has_event(&self, event: &str) -> bool {
        self.events.iter().any(|news| news.event == event)
    }

    fn sizes(&self) -> (u32, u32) {
        (self.n.requested(), self.n.counts().plugged)
    }
}

fn decline(epoch: u64, seq: u64) -> Request {
    Request::Decline { epoch, seq, could_give: 5, reason: DeclineReason::Busy }
}

/// protocol.md: V-20.
#[test]
fn shrink_is_offered_by_a_parked_wait_and_done_by_unplug() {
    let (mut rig, epoch) = Rig::vssd_guest(100);
    let wait = rig.send(Request::Wait { epoch, seq_seen: 1 });
    assert!(!rig.answers.contains_key(&wait), "no news yet");

    let job = rig.resize(Wish { deadline_ms: Some(9_000), ..Rig::wish(60) }).unwrap();

    let answer = &rig.answers[&wait];
    assert_eq!((answer.sizes.seq, answer.sizes.requested_blocks, answer.sizes.plugged_blocks), (2, 60, 100));
    let news = ResponseBody::Wait { flags: guest::NEWS_TARGET, reason: Reason::Operator, deadline_ms: 9_000 };
    assert_eq!(answer.body, news);
    assert_eq!(rig.state(job), JobState::Offered);
    let answer = rig.give(epoch, 20, 30);
    assert_eq!(answer.body, ResponseBody::Ranges(vec![RangeStatus::Ok]));
    assert_eq!(answer.sizes.plugged_blocks, 70);
    assert_eq!(rig.state(job), JobState::Evacuating);
    rig.give(epoch, 0, 10);
    assert_eq!(rig.state(job), JobState::Done);
    assert_eq!(rig.jobs[&job].plugged, 60);
    assert!(rig.has_event("shrink.requested") && rig.has_event("shrink.done"));
    assert_eq!(rig.n.wake_at(), None, "an idle vSSD needs no timer");
}

/// protocol.md: V-20, V-23.
#[test]
fn wait_with_old_seq_is_answered_at_once_with_newest_state() {
    let (mut rig, epoch) = Rig::vssd_guest(100);
    rig.resize_to(60);
    rig.resize_to(80);

    let wait = rig.send(Request::Wait { epoch, seq_seen: 0 });

    assert_eq!(rig.answers[&wait].sizes.requested_blocks, 80);
    assert_eq!(rig.answers[&wait].sizes.seq, 3);
}

/// protocol.md: V-21.
#[test]
fn newer_wait_sends_older_one_back_without_news() {
    let (mut rig, epoch) = Rig::vssd_guest(100);
    let first = rig.send(Request::Wait { epoch, seq_seen: 1 });
    let second = rig.send(Request::Wait { epoch, seq_seen: 1 });
    assert_eq!(rig.answers[&first].result, RequestResult::NoNews);
    assert!(!rig.answers.contains_key(&second));
}

/// protocol.md: V-22.
#[test]
fn stopping_queue_gets_its_wait_back_without_news() {
    let (mut rig, epoch) = Rig::vssd_guest(100);
    let wait = rig.send(Request::Wait { epoch, seq_seen: 1 });
    rig.apply(Event::Quiesce);
    assert_eq!(rig.answers[&wait].result, RequestResult::NoNews);
}

#[test]
fn wait_for_news_of_the_future_is_invalid() {
    let (mut rig, epoch) = Rig::vssd_guest(100);
    let wait = rig.send(Request::Wait { epoch, seq_seen: 2 });
    assert_eq!(rig.answers[&wait].result, RequestResult::Invalid);
}

/// protocol.md: V-14, V-15.
#[test]
fn old_epoch_is_stale_for_every_request_and_changes_nothing() {
    let (mut rig, old) = Rig::vssd_guest(100);
    let parked = rig.send(Request::Wait { epoch: old, seq_seen: 1 });
    let new = rig.hello();
    assert_ne!(old, new);
    assert_eq!(rig.answers[&parked].result, RequestResult::Stale);
    let ranges = vec![BlockRange::new(0, 1)];
    for request in [
        Request::State { epoch: old, flags: 0, start: 0 },
        Request::Wait { epoch: old, seq_seen: 0 },
        Request::Unplug { epoch: old, ranges: ranges.clone() },
        Request::Plug { epoch: old, ranges },
        decline(old, 1),
        Request::Pull { epoch: old, want_blocks: 1, urgency: Urgency::Wish },
    ] {
        let reply = rig.send(request.clone());
        assert_eq!(rig.answers[&reply].result, RequestResult::Stale, "{request:?}");
    }
    assert!(rig.queue.is_empty());
}

/// protocol.md: V-14.
#[test]
fn hello_of_version_zero_is_told_the_version_and_keeps_the_session() {
    let (mut rig, epoch) = Rig::vssd_guest(100);
    let hello = rig.send(Request::Hello { version: 0, features: 0, driver: String::new() });
    assert_eq!(rig.answers[&hello].result, RequestResult::Version);
    let state = rig.send(Request::State { epoch, flags: 0, start: 1000 });
    assert_eq!(rig.answers[&state].result, RequestResult::Ok);
}

/// protocol.md: V-19.
#[test]
fn state_with_unknown_flag_or_start_past_the_end_is_invalid() {
    let (mut rig, epoch) = Rig::vssd_guest(100);
    for (flags, start) in [(2, 0), (0, 1001), (u32::MAX, 0)] {
        let reply = rig.send(Request::State { epoch, flags, start });
        assert_eq!(rig.answers[&reply].result, RequestResult::Invalid);
    }
}

/// protocol.md: D-13.
#[test]
fn guest_may_volunteer_but_not_below_the_minimum() {
    let (mut rig, epoch) = Rig::vssd_guest(20);
    let answer = rig.give(epoch, 0, 10);
    assert_eq!(answer.body, ResponseBody::Ranges(vec![RangeStatus::Ok]));
    let answer = rig.give(epoch, 10, 1);
    assert_eq!(answer.body, ResponseBody::Ranges(vec![RangeStatus::Protected]));
}

/// protocol.md: V-6, V-27.
#[test]
fn plug_never_goes_beyond_requested() {
    let (mut rig, epoch) = Rig::vssd_guest(100);
    let job = rig.resize_to(110);
    let ranges = vec![BlockRange::new(100, 11), BlockRange::new(200, 10)];
    let reply = rig.send(Request::Plug { epoch, ranges });
    rig.run_pool();
    assert_eq!(rig.answers[&reply].body, ResponseBody::Ranges(vec![RangeStatus::Limit, RangeStatus::Ok]));
    assert_eq!(rig.state(job), JobState::Done);
    assert_eq!(rig.capacity, 210, "a hole below does not matter to the capacity");
}

/// protocol.md: V-41.
#[test]
fn decline_without_deadline_ends_refused_and_withdraws_the_target() {
    let (mut rig, epoch) = Rig::vssd_guest(100);
    let job = rig.resize_to(60);
    let reply = rig.send(decline(epoch, 2));
    assert_eq!(rig.answers[&reply].result, RequestResult::Ok);
    assert_eq!(rig.state(job), JobState::Refused);
    assert_eq!(rig.jobs[&job].error, Some(ErrorCode::GuestRefused));
    assert_eq!(rig.sizes(), (100, 100));
    assert_eq!(rig.n.could_give(), Some(5));
    assert!(rig.has_event("shrink.refused"));
}

/// protocol.md: V-41.
#[test]
fn decline_after_some_blocks_ends_partial() {
    let (mut rig, epoch) = Rig::vssd_guest(100);
    let job = rig.resize_to(60);
    rig.give(epoch, 0, 7);
    rig.send(decline(epoch, 2));
    assert_eq!(rig.state(job), JobState::Partial);
    assert_eq!(rig.sizes(), (93, 93));
}

#[test]
fn decline_waits_for_unplugs_in_flight() {
    let (mut rig, epoch) = Rig::vssd_guest(100);
    let job = rig.resize_to(60);
    rig.send(Request::Unplug { epoch, ranges: vec![BlockRange::new(0, 7)] });
    rig.send(decline(epoch, 2));
    assert!(!rig.state(job).is_final());
    rig.run_pool();
    assert_eq!(rig.state(job), JobState::Partial);
    assert_eq!(rig.sizes(), (93, 93));
}

/// protocol.md: V-41.
#[test]
fn decline_with_deadline_keeps_the_target_until_then() {
    let (mut rig, epoch) = Rig::vssd_guest(100);
    let job = rig.resize(Wish { deadline_ms: Some(60_000), ..Rig::wish(60) }).unwrap();
    rig.send(decline(epoch, 2));
    assert_eq!(rig.state(job), JobState::Created, "the guest has not read the news by WAIT");
    assert!(rig.jobs[&job].message.contains("declined"), "{}", rig.jobs[&job].message);
    rig.pass(30_000);
    assert!(!rig.has_event("guest.inactive"), "a guest that answered is not inactive");
    rig.give(epoch, 0, 40);
    assert_eq!(rig.state(job), JobState::Done, "new hints in time");
}

/// protocol.md: V-29.
#[test]
fn decline_of_older_news_does_not_end_the_newer_job() {
    let (mut rig, epoch) = Rig::vssd_guest(100);
    rig.resize_to(60);
    let job = rig.resize_to(50);
    rig.send(decline(epoch, 2));
    assert!(!rig.state(job).is_final());
    assert_eq!(rig.n.could_give(), None);
    let future = rig.send(decline(epoch, 9));
    assert_eq!(rig.answers[&future].result, RequestResult::Invalid);
}

/// protocol.md: section 14.
#[test]
fn deadline_with_wait_expires_and_goes_on_asking() {
    let (mut rig, epoch) = Rig::vssd_guest(100);
    let wish = Wish { deadline_ms: Some(4_000), on_timeout: Some(OnTimeout::Wait), ..Rig::wish(60) };
    let job = rig.resize(wish).unwrap();
    let wait = rig.send(Request::Wait { epoch, seq_seen: 2 });
    rig.pass(4_000);
    assert_eq!(rig.state(job), JobState::Expired);
    assert_eq!(rig.jobs[&job].error, Some(ErrorCode::TimedOut));
    assert_eq!(rig.sizes(), (60, 100));
    let ResponseBody::Wait { deadline_ms, .. } = rig.answers[&wait].body else { panic!("{wait:?}") };
    assert_eq!(deadline_ms, 0, "the deadline's end is news");
    rig.give(epoch, 0, 40);
    assert_eq!(rig.sizes(), (60, 60));
}

/// Asks for ten blocks as the guest's driver; what it is answered.
fn ask_for_ten(rig: &mut Rig, epoch: u64) -> RangeStatus {
    let ranges = vec![BlockRange::new(rig.counts().plugged, 10)];
    let reply = rig.send(Request::Plug { epoch, ranges });
    rig.run_pool();
    let ResponseBody::Ranges(statuses) = &rig.answers[&reply].body else { panic!("{reply:?}") };
    statuses[0]
}

/// protocol.md: V-50.
#[test]
fn grow_that_meets_a_full_pool_and_has_no_deadline_ends_all_the_same() {
    for on_timeout in [OnTimeout::Wait, OnTimeout::Fail, OnTimeout::Force] {
        let (mut rig, epoch) = Rig::vssd_guest(100);
        let patience = SPACE_MS;
        rig.can_plug = 110;
        let job = rig.resize(Wish { on_timeout: Some(on_timeout), ..Rig::wish(150) }).unwrap();
        rig.pass(2 * patience);
        assert!(!rig.state(job).is_final(), "a guest may take its time");
        assert_eq!(ask_for_ten(&mut rig, epoch), RangeStatus::Ok);
        let mut tries = 0;
        while !rig.state(job).is_final() {
            assert_eq!(ask_for_ten(&mut rig, epoch), RangeStatus::NoSpace);
            tries += 1;
            assert!(tries < 100 && rig.jobs[&job].message.contains("no space"), "{tries}");
            rig.pass(patience / 10);
        }
        assert_eq!(tries, 10);
        let view = &rig.jobs[&job];
        assert_eq!(
            (view.state, view.error, view.plugged),
            (JobState::Expired, Some(ErrorCode::PoolFull), 110)
        );
        assert!(view.message.contains("shrink or delete another vSSD"), "{}", view.message);
        let target = if on_timeout == OnTimeout::Fail { 110 } else { 150 };
        assert_eq!(rig.sizes(), (target, 110));
    }
}

/// protocol.md: V-50.
#[test]
fn grow_that_meets_a_full_pool_goes_on_when_there_is_space_again() {
    let (mut rig, epoch) = Rig::vssd_guest(100);
    let patience = SPACE_MS;
    let job = rig.resize_to(150);
    for room in [110, 120, 130, 140] {
        rig.can_plug = room;
        assert_eq!(ask_for_ten(&mut rig, epoch), RangeStatus::Ok);
        assert_eq!(ask_for_ten(&mut rig, epoch), RangeStatus::NoSpace);
        rig.pass(patience - 1);
        assert!(!rig.state(job).is_final(), "{room}");
    }
    rig.can_plug = 1000;
    assert_eq!(ask_for_ten(&mut rig, epoch), RangeStatus::Ok);
    assert_eq!(rig.state(job), JobState::Done);
    assert!(
        rig.events.iter().all(|event| !event.event.starts_with("guest.")),
        "no fault of the guest's: {:?}",
        rig.events
    );
}

/// protocol.md: section 14.
#[test]
fn deadline_with_fail_withdraws() {
    let (mut rig, epoch) = Rig::vssd_guest(100);
    let wish = Wish { deadline_ms: Some(4_000), on_timeout: Some(OnTimeout::Fail), ..Rig::wish(60) };
    let job = rig.resize(wish).unwrap();
    rig.give(epoch, 0, 3);
    rig.pass(4_000);
    assert_eq!(rig.state(job), JobState::Expired);
    assert_eq!(rig.sizes(), (97, 97));
}

/// protocol.md: V-40.
#[test]
fn deadline_with_force_takes_empty_blocks_first_and_tells_the_guest() {
    let (mut rig, epoch) = Rig::vssd_guest(100);
    for block in 30..100 {
        rig.blocks.insert(block, true);
    }
    let wish = Wish { deadline_ms: Some(4_000), on_timeout: Some(OnTimeout::Force), ..Rig::wish(60) };
    let job = rig.resize(wish).unwrap();
    let wait = rig.send(Request::Wait { epoch, seq_seen: 3 - 1 });
    rig.pass(4_000);
    let busy = rig.send(Request::Unplug { epoch, ranges: vec![BlockRange::new(0, 1)] });
    assert_eq!(rig.answers[&busy].result, RequestResult::Busy, "the host is at work");
    rig.run_pool();
    assert_eq!(rig.state(job), JobState::Done);
    let left: Vec<u32> = rig.blocks.keys().copied().collect();
    assert_eq!(left, (30..90).collect::<Vec<u32>>(), "30 empty ones, then the 10 highest");
    let forced = rig.events.iter().find(|news| news.event == "shrink.forced").unwrap();
    assert_eq!(forced.data["lost_bytes"], 10 * BLOCK);
    assert!(rig.answers.contains_key(&wait));
    let wait = rig.send(Request::Wait { epoch, seq_seen: rig.answers[&wait].sizes.seq });
    let ResponseBody::Wait { flags, .. } = rig.answers[&wait].body else { panic!("parked") };
    assert_eq!(flags & guest::NEWS_STATE, guest::NEWS_STATE);
}

/// protocol.md: V-44.
#[test]
fn state_is_told_when_the_host_has_moved_its_blocks() {
    let (mut rig, epoch) = Rig::vssd_guest(100);
    let state = Request::State { epoch, flags: 0, start: 0 };
    rig.resize(Wish { force: true, ..Rig::wish(60) }).unwrap();
    let asked = rig.send(state.clone());
    assert!(!rig.answers.contains_key(&asked), "the ranges would be of another moment than the count");
    rig.run_pool();
    let answer = &rig.answers[&asked];
    assert_eq!((answer.result, answer.sizes.plugged_blocks), (RequestResult::Ok, 60));

    rig.resize(Wish { force: true, ..Rig::wish(50) }).unwrap();
    let stopped = rig.send(state.clone());
    rig.apply(Event::Quiesce);
    assert_eq!(rig.answers[&stopped].result, RequestResult::Busy, "its queue stops");
    let old = rig.send(state);
    rig.boot();
    assert_eq!(rig.answers[&old].result, RequestResult::Stale);
}

/// protocol.md: V-40.
#[test]
fn forced_resize_does_not_ask() {
    let (mut rig, _) = Rig::vssd_guest(100);
    rig.blocks.values_mut().for_each(|data| *data = true);
    let job = rig.resize(Wish { force: true, ..Rig::wish(90) }).unwrap();
    rig.run_pool();
    assert_eq!((rig.state(job), rig.sizes()), (JobState::Done, (90, 90)));
    assert!(rig.has_event("shrink.forced"));
}

#[test]
fn force_waits_for_the_guests_requests_in_flight() {
    let (mut rig, epoch) = Rig::vssd_guest(100);
    rig.send(Request::Unplug { epoch, ranges: vec![BlockRange::new(0, 5)] });
    rig.resize(Wish { force: true, ..Rig::wish(90) }).unwrap();
    rig.run_pool();
    assert_eq!(rig.sizes(), (90, 90), "5 from the guest and 5 by force, not 5 and 10");
}

#[test]
fn silent_guest_is_inactive_after_5_s_and_uncooperative_after_20_s() {
    let (mut rig, _) = Rig::vssd_guest(100);
    rig.resize_to(60);
    rig.pass(INACTIVE_MS - 1);
    assert!(!rig.has_event("guest.inactive"));
    rig.pass(1);
    assert!(rig.has_event("guest.inactive"));
    rig.pass(UNCOOPERATIVE_MS - INACTIVE_MS - 1);
    assert!(!rig.n.is_uncooperative());
    rig.pass(1);
    assert!(rig.n.is_uncooperative() && rig.has_event("guest.uncooperative"));
    assert_eq!(rig.n.wake_at(), None, "nothing more to wait for");
}

#[test]
fn one_block_a_second_is_no_progress_for_a_large_shrink() {
    let (mut rig, epoch) = Rig::vssd_guest(900);
    rig.resize_to(400);
    for block in 0..5 {
        rig.pass(1_000);
        rig.give(epoch, block, 1);
    }
    assert!(rig.has_event("guest.inactive"));
    let told = rig.events.iter().filter(|news| news.event == "guest.inactive").count();
    assert_eq!(told, 1, "told once, not at each block");
}

#[test]
fn one_per_cent_every_four_seconds_is_progress() {
    let (mut rig, epoch) = Rig::vssd_guest(900);
    rig.resize_to(400);
    for round in 0..10 {
        rig.pass(4_000);
        rig.give(epoch, round * 5, 5);
    }
    assert!(!rig.has_event("guest.inactive"));
}

#[test]
fn guest_that_volunteers_is_not_inactive_for_not_taking_it_back() {
    let (mut rig, epoch) = Rig::vssd_guest(100);
    rig.give(epoch, 0, 20);
    rig.pass(60_000);
    assert!(!rig.has_event("guest.inactive") && !rig.n.is_uncooperative());
}

#[test]
fn progress_brings_an_uncooperative_guest_back() {
    let (mut rig, epoch) = Rig::vssd_guest(100);
    rig.resize_to(60);
    rig.pass(UNCOOPERATIVE_MS);
    rig.give(epoch, 0, 20);
    assert!(!rig.n.is_uncooperative());
}

/// protocol.md: V-43.
#[test]
fn stock_guest_gives_only_the_empty_tail_and_capacity_follows() {
    let mut rig = Rig::stock_guest(100);
    rig.blocks.insert(79, true);
    assert_eq!(
        rig.resize(Rig::wish(79)),
        Err(Refusal::InUse {
            requested_bytes: 79 * BLOCK,
            smallest_bytes: 80 * BLOCK,
            last_allocated_bytes: 80 * BLOCK,
        })
    );
    let job = rig.resize_to(80);
    assert_eq!(rig.capacity, 100, "unplug first, then the capacity");
    rig.run_pool();
    assert_eq!((rig.state(job), rig.sizes(), rig.capacity), (JobState::Done, (80, 80), 80));
}

#[test]
fn stock_guest_that_writes_to_the_tail_in_time_keeps_it() {
    let mut rig = Rig::stock_guest(100);
    let job = rig.resize_to(80);
    rig.blocks.insert(95, true);
    rig.run_pool();
    assert_eq!((rig.state(job), rig.sizes(), rig.capacity), (JobState::Refused, (100, 100), 100));
    assert_eq!(rig.jobs[&job].error, Some(ErrorCode::InUse));
}

#[test]
fn stock_guest_is_cut_through_data_only_by_force() {
    let mut rig = Rig::stock_guest(100);
    rig.blocks.insert(95, true);
    let job = rig.resize(Wish { force: true, ..Rig::wish(80) }).unwrap();
    rig.run_pool();
    assert_eq!((rig.state(job), rig.capacity), (JobState::Done, 80));
    assert_eq!(rig.events.iter().find(|e| e.event == "shrink.forced").unwrap().data["lost_bytes"], BLOCK);
}

/// protocol.md: V-42.
#[test]
fn stock_and_detached_grow_at_once_by_the_host() {
    for mut rig in [Rig::stock_guest(100), Rig::new(100)] {
        let job = rig.resize_to(150);
        rig.run_pool();
        assert_eq!((rig.state(job), rig.sizes(), rig.capacity), (JobState::Done, (150, 150), 150));
    }
}

#[test]
fn grow_beyond_the_pool_ends_and_withdraws() {
    let mut rig = Rig::new(100);
    rig.can_plug = 120;
    let job = rig.resize_to(150);
    rig.run_pool();
    assert_eq!((rig.state(job), rig.sizes()), (JobState::Partial, (120, 120)));
    assert_eq!(rig.jobs[&job].error, Some(ErrorCode::PoolFull));
}

#[test]
fn host_does_not_try_again_what_just_failed() {
    // Below its minimum (10), so that the target cannot be taken back to what is plugged.
    let mut rig = Rig::new(5);
    rig.can_plug = 5;
    let job = rig.resize_to(20);
    rig.run_pool();
    assert_eq!((rig.state(job), rig.sizes()), (JobState::Refused, (10, 5)));
    rig.can_plug = 1000;
    rig.resize_to(15);
    rig.run_pool();
    assert_eq!(rig.sizes(), (15, 15), "another wish is another try");
}

/// protocol.md: §15.
#[test]
fn host_tries_again_once_the_guest_has_moved_blocks() {
    let mut rig = Rig::stock_guest(100);
    rig.resize_to(90);
    rig.blocks.insert(95, true);
    rig.run_pool();
    assert_eq!(rig.sizes(), (100, 100), "the host gave up");
    let epoch = rig.boot();
    rig.give(epoch, 3, 1);
    rig.apply(Event::QueueStarted { queue: 0, fresh: true });
    rig.pass(SETTLE_MS);
    rig.run_pool();
    assert_eq!(rig.sizes(), (100, 100), "what the guest gave unasked was not plugged again");
}

/// protocol.md: V-40.
#[test]
fn host_leaves_its_job_to_a_driver_that_takes_part_meanwhile() {
    let (mut rig, epoch) = Rig::vssd_guest(100);
    rig.send(Request::Unplug { epoch, ranges: vec![BlockRange::new(50, 1)] });
    rig.apply(Event::QueueStarted { queue: 0, fresh: true });
    rig.pass(SETTLE_MS);
    let job = rig.resize_to(80);
    let epoch = rig.boot();
    rig.run_pool();
    assert_eq!(rig.sizes(), (80, 99), "the host took blocks that the guest's driver believes to have");
    assert!(rig.give(epoch, 0, 19).result == RequestResult::Ok && rig.state(job) == JobState::Done);
}

#[test]
fn failed_pool_ends_jobs_and_answers_guests() {
    let mut rig = Rig::new(100);
    rig.pool_fails = true;
    let job = rig.resize_to(150);
    rig.run_pool();
    assert_eq!((rig.state(job), rig.jobs[&job].error), (JobState::Refused, Some(ErrorCode::Media)));
    let epoch = rig.boot();
    let answer = rig.give(epoch, 0, 1);
    assert_eq!(answer.result, RequestResult::Busy);
}

#[test]
fn job_waits_while_the_driver_settles_then_goes_the_guests_way() {
    let mut rig = Rig::new(100);
    rig.apply(Event::Connected);
    rig.apply(Event::QueueStarted { queue: 0, fresh: false });
    let job = rig.resize_to(60);
    rig.run_pool();
    assert_eq!((rig.state(job), rig.sizes()), (JobState::Created, (60, 100)));
    let epoch = rig.hello();
    assert_eq!(rig.state(job), JobState::Offered);
    rig.pass(SETTLE_MS);
    rig.run_pool();
    rig.give(epoch, 0, 40);
    assert_eq!(rig.state(job), JobState::Done);
}

#[test]
fn job_waits_while_the_driver_settles_then_goes_the_stock_way() {
    let mut rig = Rig::new(100);
    rig.apply(Event::Connected);
    rig.apply(Event::QueueStarted { queue: 0, fresh: false });
    let job = rig.resize_to(60);
    rig.pass(SETTLE_MS);
    rig.run_pool();
    assert_eq!((rig.state(job), rig.capacity), (JobState::Done, 60));
}

#[test]
fn stale_message_of_a_guest_that_outlived_the_daemon_proves_its_driver() {
    let mut rig = Rig::new(100);
    rig.apply(Event::Connected);
    rig.apply(Event::QueueStarted { queue: 0, fresh: false });
    let reply = rig.send(Request::Wait { epoch: 77, seq_seen: 5 });
    assert_eq!(rig.answers[&reply].result, RequestResult::Stale);
    let job = rig.resize_to(60);
    rig.pass(SETTLE_MS * 4);
    rig.run_pool();
    assert_eq!((rig.state(job), rig.sizes()), (JobState::Created, (60, 100)), "not taken for a stock driver");
}

#[test]
fn hello_may_come_long_after_boot_and_ends_stock_rules() {
    let mut rig = Rig::stock_guest(100);
    rig.blocks.insert(99, true);
    rig.hello();
    let job = rig.resize_to(60);
    rig.run_pool();
    assert_eq!((rig.state(job), rig.sizes()), (JobState::Created, (60, 100)), "the guest is asked");
}

/// protocol.md: V-16, V-37, V-40.
#[test]
fn guest_rebooting_in_mid_shrink_is_not_cut_by_the_host() {
    let (mut rig, epoch) = Rig::vssd_guest(100);
    let job = rig.resize_to(60);
    rig.give(epoch, 0, 10);
    let parked = rig.send(Request::Wait { epoch, seq_seen: 2 });
    rig.apply(Event::QueueStarted { queue: 0, fresh: true });
    assert_eq!(rig.answers[&parked].result, RequestResult::Stale);
    rig.pass(60_000);
    rig.run_pool();
    assert_eq!((rig.state(job), rig.sizes()), (JobState::Created, (60, 90)));
    assert!(!rig.has_event("guest.uncooperative"), "nobody is there to be uncooperative");
    let epoch = rig.hello();
    rig.give(epoch, 10, 30);
    assert_eq!(rig.state(job), JobState::Done);
}

/// protocol.md: V-37.
#[test]
fn idle_queue_starting_at_index_zero_does_not_end_the_session() {
    let (mut rig, epoch) = Rig::vssd_guest(100);
    rig.apply(Event::QueueStarted { queue: 1, fresh: true });
    rig.apply(Event::QueueStarted { queue: 0, fresh: false });
    let reply = rig.send(Request::State { epoch, flags: 0, start: 1000 });
    assert_eq!(rig.answers[&reply].result, RequestResult::Ok);
}

#[test]
fn unplug_of_an_ended_session_is_news_to_the_next_one() {
    let (mut rig, old) = Rig::vssd_guest(100);
    let unplug = rig.send(Request::Unplug { epoch: old, ranges: vec![BlockRange::new(0, 5)] });
    let new = rig.hello();
    let wait = rig.send(Request::Wait { epoch: new, seq_seen: 1 });
    rig.run_pool();
    assert_eq!(rig.answers[&unplug].body, ResponseBody::Ranges(vec![RangeStatus::Ok]));
    let ResponseBody::Wait { flags, .. } = rig.answers[&wait].body else { panic!("no news") };
    assert_eq!(flags, guest::NEWS_STATE);
}

#[test]
fn newer_resize_supersedes_and_raising_cancels_the_shrink() {
    let (mut rig, epoch) = Rig::vssd_guest(100);
    let first = rig.resize_to(60);
    rig.give(epoch, 0, 10);
    let second = rig.resize_to(95);
    assert_eq!(rig.state(first), JobState::Superseded);
    let reply = rig.send(Request::Plug { epoch, ranges: vec![BlockRange::new(0, 5)] });
    rig.run_pool();
    assert_eq!(rig.answers[&reply].result, RequestResult::Ok);
    assert_eq!((rig.state(second), rig.sizes()), (JobState::Done, (95, 95)));
}

/// protocol.md: C-5.
#[test]
fn expected_size_that_is_not_the_requested_one_is_a_conflict() {
    let (mut rig, _) = Rig::vssd_guest(100);
    let first = rig.resize(Wish { expected_bytes: Some(100 * BLOCK), ..Rig::wish(60) }).unwrap();
    let second = rig.resize(Wish { expected_bytes: Some(100 * BLOCK), ..Rig::wish(50) });
    assert_eq!(second, Err(Refusal::Conflict { expected_bytes: 100 * BLOCK, actual_bytes: 60 * BLOCK }));
    assert!(!rig.state(first).is_final());
}

#[test]
fn bounds_are_checked_before_anything_happens() {
    let (mut rig, _) = Rig::vssd_guest(100);
    assert!(matches!(rig.resize(Rig::wish(9)), Err(Refusal::BelowMin { .. })));
    assert!(matches!(rig.resize(Rig::wish(0)), Err(Refusal::BelowMin { .. })));
    assert!(matches!(rig.resize(Rig::wish(1001)), Err(Refusal::AboveMax { .. })));
    let huge = Wish { to_bytes: u64::MAX, ..Rig::wish(0) };
    assert!(matches!(rig.resize(huge), Err(Refusal::AboveMax { .. })));
    assert!(rig.jobs.is_empty());
}

#[test]
fn size_between_blocks_is_rounded_up_and_said_so() {
    let (rig, _) = Rig::vssd_guest(100);
    let plan = rig.n.plan(&Wish { to_bytes: 60 * BLOCK - 1, ..Rig::wish(0) }, Tail::default()).unwrap();
    assert_eq!(plan.to, 60);
    assert!(plan.text.contains("rounded up"), "{}", plan.text);
}

#[test]
fn cancel_takes_the_target_back_and_follows_what_is_in_flight() {
    let (mut rig, epoch) = Rig::vssd_guest(100);
    let job = rig.resize_to(60);
    rig.send(Request::Unplug { epoch, ranges: vec![BlockRange::new(0, 7)] });
    rig.apply(Event::Cancel(OPERATOR));
    assert_eq!((rig.state(job), rig.sizes()), (JobState::Cancelled, (100, 100)));
    rig.run_pool();
    assert_eq!(rig.sizes(), (93, 93), "both sides agree");
}

/// protocol.md: V-30.
#[test]
fn pull_is_told_and_granted_only_by_policy() {
    let pull = |epoch| Request::Pull { epoch, want_blocks: 50, urgency: Urgency::Pressure };
    let (mut rig, epoch) = Rig::vssd_guest(100);
    rig.send(pull(epoch));
    assert_eq!(rig.sizes(), (100, 100));
    assert_eq!(rig.events.last().unwrap().data["want_bytes"], 50 * BLOCK);

    let mut rig = Rig::with_policy(100, Policy { pull: PullPolicy::Grant, ..Policy::default() });
    rig.grants = 130;
    let epoch = rig.boot();
    let wait = rig.send(Request::Wait { epoch, seq_seen: 1 });
    rig.send(pull(epoch));
    assert_eq!(rig.sizes(), (130, 100), "as far as the pool goes");
    let ResponseBody::Wait { reason, .. } = rig.answers[&wait].body else { panic!("no news") };
    assert_eq!(reason, Reason::Pull);
}

#[test]
fn pull_during_a_shrink_is_not_granted() {
    let mut rig = Rig::with_policy(100, Policy { pull: PullPolicy::Grant, ..Policy::default() });
    let epoch = rig.boot();
    rig.resize_to(60);
    rig.send(Request::Pull { epoch, want_blocks: 50, urgency: Urgency::Wish });
    assert_eq!(rig.sizes(), (60, 100));
}

/// protocol.md: V-51.
#[test]
fn a_report_is_noted_and_one_of_more_than_there_is_is_not() {
    let (mut rig, epoch) = Rig::vssd_guest(100);
    let estimate = Estimate { free: 1, clean_cold: 2, clean_hot: 3, dirty: rig.n.total() - 6 };
    let sizes = rig.sizes();
    let fits = rig.send(Request::Report { epoch, estimate });
    assert_eq!((rig.answers[&fits].result, rig.estimate.take()), (RequestResult::Ok, Some(estimate)));
    for estimate in
        [Estimate { free: 2, ..estimate }, Estimate { free: u32::MAX, dirty: u32::MAX, ..estimate }]
    {
        let more = rig.send(Request::Report { epoch, estimate });
        assert_eq!((rig.answers[&more].result, rig.estimate), (RequestResult::Invalid, None));
    }
    let stale = rig.send(Request::Report { epoch: epoch ^ 1, estimate });
    assert_eq!((rig.answers[&stale].result, rig.estimate), (RequestResult::Stale, None));
    assert_eq!(rig.sizes(), sizes, "nothing follows from it");
}

#[test]
fn guest_cannot_flood_the_event_log() {
    let (mut rig, epoch) = Rig::vssd_guest(100);
    let before = rig.events.len();
    for i in 0..1000 {
        rig.send(Request::Pull { epoch, want_blocks: 1, urgency: Urgency::Wish });
        rig.send(Request::Hello { version: 1, features: 0, driver: format!("liar {i}") });
    }
    assert!(rig.events.len() - before <= 4, "{:?}", &rig.events[before..]);
}

#[test]
fn disconnect_in_mid_grow_lets_the_host_finish() {
    let (mut rig, epoch) = Rig::vssd_guest(100);
    let job = rig.resize_to(150);
    rig.send(Request::Plug { epoch, ranges: vec![BlockRange::new(100, 5)] });
    rig.apply(Event::Disconnected);
    rig.run_pool();
    assert_eq!((rig.state(job), rig.sizes()), (JobState::Done, (150, 150)));
}

#[test]
fn pending_target_of_a_restarted_daemon_becomes_a_job() {
    let mut rig = Rig::new(100);
    rig.durable_requested = 60;
    rig.crash();
    rig.run_pool();
    assert_eq!((rig.state(1), rig.jobs[&1].message.as_str()), (JobState::Created, "resumed after restart"));
    let epoch = rig.boot();
    rig.give(epoch, 0, 40);
    assert_eq!(rig.state(1), JobState::Done);
}

/// protocol.md: V-17.
#[test]
fn raising_the_maximum_ends_the_session_for_its_address_space_is_constant() {
    let (mut rig, epoch) = Rig::vssd_guest(100);
    let wait = rig.send(Request::Wait { epoch, seq_seen: 1 });
    rig.apply(Event::Limits { min: 10, total: 2000, policy: Policy::default() });
    assert_eq!(rig.answers[&wait].result, RequestResult::Stale);
    let hello = rig.send(Request::Hello { version: 1, features: 0, driver: "vssd 1".into() });
    let ResponseBody::Hello(hello) = &rig.answers[&hello].body else { panic!("no hello") };
    assert_eq!(hello.total_blocks, 2000);
}

#[test]
fn progress_events_are_at_least_100_ms_apart() {
    let (mut rig, epoch) = Rig::vssd_guest(900);
    rig.resize_to(400);
    for block in 0..200 {
        rig.now += 5;
        rig.give(epoch, block, 1);
    }
    let told = rig.events.iter().filter(|news| news.event == "shrink.progress").count();
    assert!((5..=11).contains(&told), "{told} events in one second");
}

#[test]
fn deleting_ends_the_job_and_frees_the_parked_wait() {
    let (mut rig, epoch) = Rig::vssd_guest(100);
    let job = rig.resize_to(60);
    let wait = rig.send(Request::Wait { epoch, seq_seen: 2 });
    rig.apply(Event::Deleted(OPERATOR));
    assert_eq!(rig.state(job), JobState::Cancelled);
    assert_eq!(rig.answers[&wait].result, RequestResult::Stale);
}

#[test]
fn states_can_be_kept_in_a_set() {
    let (rig, _) = Rig::vssd_guest(100);
    let mut set = std::collections::HashSet::new();
    assert!(set.insert(rig.n.clone()) && !set.insert(rig.n));
    let _: BTreeSet<ReplyId> = rig.answers.into_keys().collect();
}
