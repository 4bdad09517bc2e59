// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The one owner of all sizes: everything that can change how large a vSSD is happens here, one thing after another.
//!
//! ```text
//!   DeviceEvent (queues, front-ends) ─┐                                  ┌─► Reply (a guest's answer)
//!   Completion (the pool's keeper) ───┼─► Negotiation::apply ─► Effect ──┼─► Pool::{unplug, plug, set_attrs}
//!   operators' calls, time ───────────┘                                  └─► Frontends, jobs, events
//! ```
//!
//! The owner lives on the control thread and holds no lock. It never waits for a guest or a client; it does wait for
//! the pool where an operator is owed a durable answer. It knows neither sockets nor queues. What it decides is
//! decided by [`Negotiation`]; what is here carries out and translates: block counts into the pool's ranges, ids into
//! replies, effects into calls.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::io;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use control_server::{About, Clock, EventLog};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::OwnedFd;
use serde_json::{Value, json};
use tracing::{debug, error, info, warn};
use vssd_pool::turns::Pace;
use vssd_pool::{Pool, Vssd, VssdAttrs, VssdId};
use vssd_protocol::control::DriverKind;
use vssd_protocol::guest::{self, RequestType, Response, ResponseBody};
use vssd_protocol::letter::Report;
use vssd_protocol::units::{BlockRange, ByteOffset};

use super::{DeviceEvent, FrontendError, Frontends, GuestCall, Reply};
use crate::control::jobs::Jobs;
use crate::control::negotiation::{
    Actor, Counts, Effect, Event, Negotiation, News, OpId, Outcome, Pick, ReplyId, Resize, Setup,
};
use crate::control::reclaim::{Reclaim, Seen};

mod alarm;
mod operator;
mod pick;
mod stored;
mod sync;

use alarm::Alarm;
use stored::{Deadline, Stored};
use sync::Syncs;

/// Most ranges in one STATE answer, however large the guest's buffer is.
const MAX_STATE_RANGES: usize = 65_536;

/// Why the owner cannot serve the pool.
#[derive(Debug, thiserror::Error)]
pub enum OwnerError {
    #[error("cannot make an eventfd")]
    Eventfd(#[source] io::Error),
    #[error("cannot get random numbers")]
    Random(#[source] io::Error),
    #[error("cannot serve vSSD {name}")]
    Open { name: String, source: FrontendError },
}

/// A guest's request that is owed an answer.
#[derive(Debug)]
struct Owed {
    reply: Reply,
    kind: RequestType,
    room: usize,
}

#[derive(Debug)]
struct Device {
    vssd: Arc<Vssd>,
    negotiation: Negotiation,
    /// Of a guest that cannot negotiate.
    reclaim: Reclaim,
    /// How much the guest last said it could give, and when.
    estimate: Option<(u64, guest::Estimate)>,
    owed: HashMap<ReplyId, Owed>,
    /// It is being deleted: nothing new begins.
    closing: bool,
}

/// A pool operation that has ended, on its way from the keeper's thread.
#[derive(Debug)]
struct Completion {
    device: VssdId,
    op: OpId,
    outcome: Outcome,
    /// One past the highest block it may have plugged.
    reach: u32,
}

/// All vSSDs of a pool and whoever may change them.
pub struct Owner {
    pool: Arc<Pool>,
    frontends: Box<dyn Frontends>,
    events: mpsc::Receiver<DeviceEvent>,
    devices: BTreeMap<VssdId, Device>,
    done: mpsc::Sender<Completion>,
    completions: mpsc::Receiver<Completion>,
    done_wake: Arc<OwnedFd>,
    syncs: Syncs,
    /// Capacities to be published once the events at hand are done with.
    capacities: BTreeSet<VssdId>,
    next_reply: u64,
    /// Of one message of a guest.
    max_ranges: u32,
    /// Epochs of sessions: a guest must not be able to guess another's.
    epochs: StdRng,
    jobs: Jobs,
    log: EventLog,
    clock: Clock,
    alarm: Alarm,
    /// A worker may share the control thread's processor, and a guest's request is worth more than an operator's.
    pace: Pace,
}

impl std::fmt::Debug for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Owner").field("devices", &self.devices).finish_non_exhaustive()
    }
}

impl Owner {
    /// Serves every vSSD of the pool.
    pub fn open(
        pool: Arc<Pool>,
        frontends: Box<dyn Frontends>,
        events: mpsc::Receiver<DeviceEvent>,
    ) -> Result<Self, OwnerError> {
        let epochs = StdRng::try_from_os_rng().map_err(|error| OwnerError::Random(error.into()))?;
        let (done, completions) = mpsc::channel();
        let wake = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)
            .map_err(|errno| OwnerError::Eventfd(errno.into()))?;
        let mut owner = Self {
            pool,
            frontends,
            events,
            devices: BTreeMap::new(),
            done,
            completions,
            done_wake: Arc::new(wake),
            syncs: Syncs::new(),
            capacities: BTreeSet::new(),
            next_reply: 0,
            max_ranges: guest::MAX_RANGES,
            epochs,
            jobs: Jobs::default(),
            log: EventLog::default(),
            clock: Clock::start(),
            alarm: Alarm::default(),
            pace: Pace::default(),
        };
        for vssd in owner.pool.vssds() {
            let name = vssd.name().to_owned();
            owner.serve(vssd).map_err(|source| OwnerError::Open { name, source })?;
        }
        owner.alarm.soon(0);
        Ok(owner)
    }

    /// What a message may carry in sessions that begin from now on.
    pub fn set_max_ranges(&mut self, max_ranges: u32) {
        self.max_ranges = max_ranges;
        for device in self.devices.values_mut() {
            device.negotiation.set_max_ranges(max_ranges);
        }
    }

    /// Readable while pool operations have ended that [`Owner::run`] or [`Owner::take_synced`] has not seen.
    pub fn completion_wake(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.done_wake)
    }

    pub fn pace(&self) -> &Pace {
        &self.pace
    }

    pub fn clock(&self) -> Clock {
        self.clock
    }

    pub fn log(&self) -> &EventLog {
        &self.log
    }

    pub fn jobs(&mut self) -> &mut Jobs {
        &mut self.jobs
    }

    pub fn pool_name(&self) -> String {
        self.pool.info().name
    }

    /// When [`Owner::run`] has something to do at the latest, whatever else happens.
    pub fn wake_at(&self) -> Option<u64> {
        let wake_at = |device: &Device| {
            [device.negotiation.wake_at(), device.reclaim.wake_at()].into_iter().flatten().min()
        };
        let devices = self.devices.values().filter_map(wake_at).min();
        [devices, self.alarm.due()].into_iter().flatten().min()
    }

    /// Takes in whatever has happened.
    pub fn run(&mut self) {
        loop {
            let mut idle = true;
            while let Ok(event) = self.events.try_recv() {
                self.device_event(event);
                self.pace.breathe();
                idle = false;
            }
            idle &= !self.take_completions();
            if idle {
                break;
            }
        }
        self.tick();
        self.publish_capacities();
    }

    /// Ends service: every front-end is disconnected, every answer given.
    pub fn shut_down(&mut self) {
        for id in self.devices.keys().copied().collect::<Vec<_>>() {
            self.apply(id, Event::Quiesce);
            if let Err(error) = self.close_frontend(id) {
                warn!(device = id.0, %error, "cannot close the vSSD's socket");
            }
        }
        self.devices.clear();
    }

    /// Begins to serve a vSSD.
    fn serve(&mut self, vssd: Arc<Vssd>) -> Result<(), FrontendError> {
        let id = vssd.id();
        let attrs = vssd.attrs();
        let stored = Stored::decode(&attrs.policy).unwrap_or_else(|error| {
            error!(device = vssd.name(), %error, "stored policy is unreadable, the default is used");
            Stored::default()
        });
        let total = vssd.total_blocks();
        let counts = Counts { plugged: vssd.plugged_blocks(), end: pick::end(&vssd, total) };
        let setup = Setup {
            name: vssd.name().to_owned(),
            block_size: vssd.block_size(),
            total,
            min: attrs.min_blocks,
            requested: attrs.requested_blocks.clamp(attrs.min_blocks.min(total), total),
            counts,
            policy: stored.policy,
        };
        let mut negotiation = Negotiation::new(setup);
        negotiation.set_max_ranges(self.max_ranges);
        let capacity = ByteOffset(vssd.block_size().bytes_of(negotiation.capacity()));
        self.frontends.open(&vssd, capacity)?;
        let unix_now = self.clock.unix_ms(self.clock.now_ms());
        let deadline = stored.deadline.map(|deadline| (deadline.left_ms(unix_now), deadline.on_timeout));
        let resumed = negotiation.plan_resumed(deadline);
        let mut reclaim = Reclaim::new(vssd.block_size(), stored.soft.filter(|soft| *soft < total));
        reclaim.set_holes(counts.has_holes());
        self.frontends.set_notice(id, reclaim.notice());
        let owed = HashMap::new();
        self.devices.insert(id, Device { vssd, negotiation, reclaim, estimate: None, owed, closing: false });
        if let Some(plan) = resumed {
            let job = self.jobs.next_id();
            let actor = Actor {
                uid: rustix::process::getuid().as_raw(),
                pid: rustix::process::getpid().as_raw_nonzero().get(),
            };
            let note = "resumed after restart";
            self.apply(id, Event::Resize(Resize { job, plan, actor, note }));
        }
        Ok(())
    }

    fn device_event(&mut self, event: DeviceEvent) {
        let now = self.clock.now_ms();
        match event {
            DeviceEvent::Guest(call) => self.guest_call(call),
            DeviceEvent::Connected { device, .. }
            | DeviceEvent::Disconnected { device, .. }
            | DeviceEvent::QueueStarted { device, .. }
                if self.devices.get(&device).is_none_or(|device| device.closing) => {}
            DeviceEvent::Connected { device, pid } => {
                self.emit(device, "device.connected", None, json!({ "pid": pid }));
                self.apply(device, Event::Connected);
                self.alarm.soon(now);
            }
            DeviceEvent::Disconnected { device, reason } => {
                if let Some(device) = self.devices.get_mut(&device) {
                    device.estimate = None;
                    device.reclaim.forget_agent();
                }
                let data = reason.map_or(Value::Null, |reason| json!({ "reason": reason }));
                self.emit(device, "device.disconnected", None, data);
                self.apply(device, Event::Disconnected);
            }
            DeviceEvent::QueueStarted { device, queue, fresh } => {
                self.apply(device, Event::QueueStarted { queue, fresh });
            }
            DeviceEvent::Report { device, report } => self.report(device, report),
            DeviceEvent::Quiesce { device, done } => {
                self.apply(device, Event::Quiesce);
                // Whoever waited may have given up.
                let _ = done.send(());
            }
        }
    }

    fn guest_call(&mut self, call: GuestCall) {
        let GuestCall { device: id, request, response_room, reply } = call;
        let Some(device) = self.devices.get_mut(&id) else {
            return; // the reply answers itself
        };
        // The codec refuses only what no device takes.
        if let guest::Request::Unplug { ranges, .. } | guest::Request::Plug { ranges, .. } = &request
            && ranges.len() > self.max_ranges as usize
        {
            return; // V-1: unsent, the reply says IOERR
        }
        if device.closing {
            let busy = Response::plain(guest::RequestResult::Busy, guest::Sizes::default());
            reply.send(busy.encode(request.kind()));
            return;
        }
        self.next_reply += 1;
        let key = ReplyId(self.next_reply);
        device.owed.insert(key, Owed { reply, kind: request.kind(), room: response_room });
        let fresh_epoch = self.epochs.random::<u64>().max(1);
        self.apply(id, Event::Guest { reply: key, request, fresh_epoch });
    }

    /// Returns whether there were any.
    fn take_completions(&mut self) -> bool {
        let mut any = false;
        while let Ok(completion) = self.completions.try_recv() {
            self.complete(completion);
            self.pace.breathe();
            any = true;
        }
        any
    }

    fn complete(&mut self, completion: Completion) {
        let Completion { device: id, op, outcome, reach } = completion;
        self.alarm.soon(self.clock.now_ms());
        let Some(device) = self.devices.get(&id) else { return };
        let high = reach.max(device.negotiation.counts().end);
        let counts = Counts { plugged: device.vssd.plugged_blocks(), end: pick::end(&device.vssd, high) };
        self.apply(id, Event::PoolDone { op, outcome, counts });
        if let Some(job) = self.devices.get(&id).and_then(|device| device.negotiation.job()) {
            self.jobs.set_plugged(job, counts.plugged);
        }
    }

    /// Lets time act.
    fn tick(&mut self) {
        let now = self.clock.now_ms();
        let due: Vec<VssdId> = self
            .devices
            .iter()
            .filter(|(_, device)| device.negotiation.wake_at().is_some_and(|at| at <= now))
            .map(|(id, _)| *id)
            .collect();
        for id in due {
            self.apply(id, Event::Tick);
        }
        let is_due = |device: &Device| device.reclaim.wake_at().is_some_and(|at| at <= now);
        let due: Vec<VssdId> =
            self.devices.iter().filter(|(_, device)| is_due(device)).map(|(id, _)| *id).collect();
        for id in due {
            self.reclaim(id, Reclaim::look);
        }
        if self.alarm.due().is_some_and(|at| at <= now) {
            let connected = self.devices.keys().any(|id| self.frontends.status(*id).connected);
            for (event, data) in self.alarm.check(&self.pool.info(), now, connected) {
                self.log.push(self.clock.unix_ms(now), event, About::NOTHING, data);
            }
        }
    }

    /// Feeds one vSSD's negotiation and carries out what it says.
    fn apply(&mut self, id: VssdId, event: Event) {
        let now = self.clock.now_ms();
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let Some(device) = self.devices.get_mut(&id) else { return };
            for effect in device.negotiation.apply(event, now) {
                if let Some(follow_up) = self.perform(id, effect, now) {
                    events.push_back(follow_up);
                }
            }
        }
        let Some(device) = self.devices.get(&id) else { return };
        let has_holes = device.negotiation.counts().has_holes();
        if device.reclaim.notice().has_holes != has_holes {
            self.reclaim(id, |reclaim, _| {
                reclaim.set_holes(has_holes);
                Vec::new()
            });
        }
    }

    /// An agent wrote through a stock driver. One that has ours speaks through it; what it wrote before says nothing any more.
    fn report(&mut self, id: VssdId, report: Report) {
        let now = self.clock.now_ms();
        let Some(device) = self.devices.get_mut(&id).filter(|device| !device.closing) else { return };
        if device.negotiation.driver_kind() == DriverKind::Vssd {
            return;
        }
        if u64::from(report.held) + report.estimate().sum() > device.vssd.total_blocks().into() {
            debug!(device = device.vssd.name(), ?report, "an agent speaks of more than there is");
            return;
        }
        device.estimate = Some((now, report.estimate()));
        self.reclaim(id, |reclaim, seen| reclaim.report(report, seen));
    }

    /// Feeds what is wished of a guest that cannot negotiate, and carries out what it says.
    fn reclaim(&mut self, id: VssdId, step: impl FnOnce(&mut Reclaim, Seen) -> Vec<Effect>) {
        let now = self.clock.now_ms();
        let Some(device) = self.devices.get_mut(&id) else { return };
        let (allocated, total) = (device.vssd.allocated_blocks(), device.vssd.total_blocks());
        let before = device.reclaim.notice();
        let effects = step(&mut device.reclaim, Seen { allocated, total, now });
        let notice = device.reclaim.notice();
        if notice != before {
            self.frontends.set_notice(id, notice);
        }
        for effect in effects {
            self.perform(id, effect, now);
        }
    }

    /// Carries out one effect. What it brings about at once is returned, to be applied next.
    fn perform(&mut self, id: VssdId, effect: Effect, now: u64) -> Option<Event> {
        let device = self.devices.get_mut(&id)?;
        let vssd = &device.vssd;
        match effect {
            Effect::Answer { reply, response } => device.answer(reply, &response),
            Effect::AnswerState { reply, sizes, start, empty_only } => {
                let room = device.owed.get(&reply).map_or(0, |owed| guest::state_capacity(owed.room));
                let (next, ranges) = pick::state(vssd, start, empty_only, room.min(MAX_STATE_RANGES));
                let body = ResponseBody::State { next, ranges };
                device.answer(reply, &Response { result: guest::RequestResult::Ok, sizes, body });
            }
            Effect::Unplug { op, ranges } => {
                let done = self.completion(id, op, &ranges, 0);
                self.pool.unplug(id, ranges, done);
            }
            Effect::Plug { op, ranges, limit } => {
                let done = self.completion(id, op, &ranges, 0);
                self.pool.plug(id, ranges, limit, done);
            }
            Effect::TakeBlocks { op, blocks, pick } => {
                let picked = pick::to_take(vssd, blocks, pick);
                if picked.with_data > 0 {
                    warn!(
                        device = vssd.name(),
                        blocks,
                        with_data = picked.with_data,
                        "taking blocks by force: data in them is lost"
                    );
                }
                let done = self.completion(id, op, &picked.ranges, picked.with_data);
                if pick == (Pick::Tail { data: false }) {
                    // A guest may have written there since the choice was made.
                    self.pool.unplug_empty(id, picked.ranges, done);
                } else {
                    self.pool.unplug(id, picked.ranges, done);
                }
            }
            Effect::GiveBlocks { op, blocks, limit } => {
                let ranges = pick::to_give(vssd, blocks);
                let done = self.completion(id, op, &ranges, 0);
                self.pool.plug(id, ranges, limit, done);
            }
            Effect::StoreRequested { blocks } => {
                if let Err(error) = self.store_requested(id, blocks, None) {
                    // What is in force now is right; a restart would resume the older target.
                    error!(device = id.0, %error, "cannot store the requested size");
                }
            }
            Effect::TryGrant { requested } => return self.grant(id, requested),
            Effect::SetCapacity { .. } => {
                self.capacities.insert(id);
            }
            Effect::NoteEstimate(estimate) => device.estimate = Some((now, estimate)),
            Effect::Job(view) => {
                let (name, size) = (vssd.name().to_owned(), vssd.block_size());
                // A guest can cause many of the steps in between.
                if view.state.is_final() {
                    info!(device = name, job = view.id, state = ?view.state, why = view.message, "job ended");
                } else {
                    debug!(device = name, job = view.id, state = ?view.state, why = view.message, "job");
                }
                self.jobs.update(&name, size, view);
            }
            Effect::Emit(News { event, job, data }) => {
                self.log.push(self.clock.unix_ms(now), event, about(vssd.name()).job(job), data);
            }
        }
        None
    }

    fn emit(&mut self, id: VssdId, event: &str, job: Option<u64>, data: Value) {
        if let Some(device) = self.devices.get(&id) {
            let unix_ms = self.clock.unix_ms(self.clock.now_ms());
            self.log.push(unix_ms, event, about(device.vssd.name()).job(job), data);
            self.pace.breathe();
        }
    }

    /// What the keeper calls once `ranges` are done with: it hands over and wakes the control thread.
    fn completion(
        &self,
        device: VssdId,
        op: OpId,
        ranges: &[BlockRange],
        lost: u32,
    ) -> vssd_pool::ResizeDone {
        let counts: Vec<u32> = ranges.iter().map(|range| range.count).collect();
        let reach = ranges.iter().filter_map(|range| range.end()).max().unwrap_or(0);
        let (done, wake) = (self.done.clone(), Arc::clone(&self.done_wake));
        Box::new(move |result| {
            let outcome = match result {
                Ok(statuses) => {
                    let moved = statuses
                        .iter()
                        .zip(&counts)
                        .filter(|(status, _)| **status == vssd_pool::RangeStatus::Ok)
                        .fold(0u32, |sum, (_, count)| sum.saturating_add(*count));
                    let lost = lost.min(moved);
                    Outcome::Ranges {
                        statuses: statuses.into_iter().map(range_status).collect(),
                        moved,
                        lost,
                    }
                }
                Err(error) => {
                    error!(device = device.0, %error, "resize failed in the pool");
                    Outcome::Failed
                }
            };
            // Fails only once the owner is gone, and then nobody waits for the answer.
            if done.send(Completion { device, op, outcome, reach }).is_ok() {
                let _ = rustix::io::write(&wake, &1u64.to_ne_bytes());
            }
        })
    }

    /// Makes a target durable, and with it the deadline of the resize that it is for.
    fn store_requested(&self, id: VssdId, blocks: u32, deadline: Option<Deadline>) -> vssd_pool::Result<()> {
        let Some(device) = self.devices.get(&id) else { return Ok(()) };
        let mut attrs = VssdAttrs { requested_blocks: blocks, ..device.vssd.attrs() };
        let stored = Stored { policy: device.negotiation.policy(), deadline, soft: device.reclaim.soft() };
        match stored.encode() {
            Ok(text) => attrs.policy = text,
            Err(error) => error!(device = device.vssd.name(), %error, "cannot encode a policy"),
        }
        self.pool.set_attrs(id, &attrs)
    }

    /// Grants a PULL as far as the pool's promise goes.
    fn grant(&self, id: VssdId, requested: u32) -> Option<Event> {
        let negotiation = &self.devices.get(&id)?.negotiation;
        let info = self.pool.info();
        let available = info.promisable_blocks.saturating_sub(info.promised_blocks);
        let promised = negotiation.requested().max(negotiation.counts().plugged);
        let most = u64::from(promised).saturating_add(available);
        let requested = u32::try_from(most).unwrap_or(u32::MAX).min(requested);
        if requested <= negotiation.requested() {
            return None;
        }
        match self.store_requested(id, requested, None) {
            Ok(()) => Some(Event::Granted { requested }),
            Err(error) => {
                debug!(device = id.0, %error, "a guest's wish cannot be granted");
                None
            }
        }
    }

    fn publish_capacities(&mut self) {
        for id in std::mem::take(&mut self.capacities) {
            if let Some(device) = self.devices.get(&id).filter(|device| !device.closing) {
                let bytes = device.vssd.block_size().bytes_of(device.negotiation.capacity());
                self.frontends.set_capacity(id, ByteOffset(bytes));
            }
        }
    }

    /// Closes a vSSD's socket and waits for its queues to stop. A queue that stops waits for this thread to give back what is
    /// parked: so the events go on being served meanwhile.
    fn close_frontend(&mut self, id: VssdId) -> Result<(), FrontendError> {
        const SLICE: Duration = Duration::from_millis(5);
        /// Pool operations end in far less; the guest asks again for what is not answered.
        const PATIENCE: Duration = Duration::from_secs(2);
        if let Some(device) = self.devices.get_mut(&id) {
            device.closing = true;
        }
        let give_up = Instant::now() + PATIENCE;
        while self.devices.get(&id).is_some_and(|device| !device.owed.is_empty()) && Instant::now() < give_up
        {
            if let Ok(completion) = self.completions.recv_timeout(SLICE) {
                self.complete(completion);
            }
        }
        self.frontends.close(id)?;
        while !self.frontends.is_closed(id) {
            if let Ok(event) = self.events.recv_timeout(SLICE) {
                self.device_event(event);
            }
            self.take_completions();
        }
        Ok(())
    }
}

impl Device {
    fn answer(&mut self, key: ReplyId, response: &Response) {
        if let Some(owed) = self.owed.remove(&key) {
            owed.reply.send(response.encode(owed.kind));
        }
    }
}

/// An event about the vSSD of this name.
fn about(name: &str) -> About<'_> {
    About::object("device", name)
}

fn range_status(status: vssd_pool::RangeStatus) -> guest::RangeStatus {
    use vssd_pool::RangeStatus as Pool;
    match status {
        Pool::Ok => guest::RangeStatus::Ok,
        Pool::Already => guest::RangeStatus::Already,
        Pool::Range => guest::RangeStatus::Range,
        Pool::Busy => guest::RangeStatus::Busy,
        Pool::Protected => guest::RangeStatus::Protected,
        Pool::Limit => guest::RangeStatus::Limit,
        Pool::NoSpace => guest::RangeStatus::NoSpace,
    }
}
