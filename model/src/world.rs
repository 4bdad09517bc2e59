// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Everything that takes part in the negotiation of one vSSD, and the steps it can make.

use std::hash::{Hash, Hasher};

use vssd_backend::control::negotiation::{
    self as machine, Actor, Event, Negotiation, Plan, Resize, SETTLE_MS, Setup,
};
use vssd_protocol::control::{JobState, OnTimeout, Policy};
use vssd_protocol::units::BlockSize;

use crate::blocks::Blocks;
use crate::guest::{Driver, Guest, Message, Slot, When};
use crate::pool::{Attrs, Pool, Stepped};
use crate::rules::Rule;
use crate::scene::{Budget, Kind, Sabotage, Scene, Wish};

/// As the daemon does with a deadline that passed while it was away.
const LEAST_LEFT_MS: u64 = 10_000;
/// No quiet run is as long.
const LONGEST_QUIET: u16 = 200;
const OPERATOR: Actor = Actor { uid: 0, pid: 1 };

/// The front-end's connection, and the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Line {
    Down,
    /// Connected; the queue does not run.
    Idle,
    /// The queue takes no new requests.
    Stopping,
    Running,
}

/// What operators know of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Job {
    pub(crate) state: JobState,
    /// A driver with the guest channel heard of it.
    pub(crate) offered: bool,
    /// The host may drop data from this moment on.
    pub(crate) force_at: Option<u64>,
}

/// A state of the model.
#[derive(Clone, Debug)]
pub struct World {
    pub(crate) machine: Negotiation,
    pub(crate) now: u64,
    pub(crate) pool: Pool,
    pub(crate) guest: Guest,
    pub(crate) line: Line,
    /// The next start of the queue is at index 0.
    fresh: bool,
    /// Until when a running driver has spoken for sure.
    settle_at: Option<u64>,
    /// Numbers connections, and drivers on them: what is answered to one that is gone goes nowhere.
    pub(crate) connection: u64,
    /// The session, as the device's answers say.
    pub(crate) session: Option<u64>,
    next_epoch: u64,
    pub(crate) jobs: Vec<Job>,
    /// A size that the second operator read.
    looked_at: u32,
    pub(crate) capacity: u32,
    pub(crate) left: Budget,
    pub(crate) broken: Option<Rule>,
    /// Steps since the last disturbance. No part of the state's identity.
    quiet: u16,
}

impl PartialEq for World {
    fn eq(&self, other: &Self) -> bool {
        self.identity() == other.identity()
    }
}

impl Eq for World {}

impl Hash for World {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.identity().hash(state);
    }
}

/// One of a driver's two requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Which {
    Call,
    Wait,
}

/// A step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    // Progress.
    Connect,
    QueueStarts,
    QueueStops,
    PowerOn(Kind),
    /// The device takes a request from the ring.
    Take(Which),
    /// The driver reads an answer.
    Hear(Which),
    /// The driver makes the n-th call that it could make.
    Call(u8),
    ArmWait,
    PoolStep,
    /// Time goes on to the next timer.
    Tick,
    /// The driver looks by itself, long after.
    Poll,
    // Disturbances.
    Order(u8),
    /// The second operator reads the size …
    Look,
    /// … and orders a resize, should the size still be that.
    OrderIfUnchanged(u8),
    Cancel,
    Kill,
    HangUp,
    PowerOff,
    Reboot(Kind),
    Pause,
    LoseNews,
    Give(u32),
    Pull,
    Write(u32),
    PoolFails,
}

impl Action {
    fn is_progress(self) -> bool {
        matches!(
            self,
            Self::Connect
                | Self::QueueStarts
                | Self::QueueStops
                | Self::PowerOn(_)
                | Self::Take(_)
                | Self::Hear(_)
                | Self::Call(_)
                | Self::ArmWait
                | Self::PoolStep
                | Self::Tick
                | Self::Poll
        )
    }
}

fn block_size() -> BlockSize {
    BlockSize::DEFAULT
}

impl World {
    /// A running guest that is at peace with the host.
    pub(crate) fn new(scene: &Scene) -> Self {
        let pool = Pool::new(scene.total, scene.min, scene.plugged, scene.data);
        let guest = match scene.driver {
            Kind::Stock => Guest::Stock,
            Kind::Vssd => Guest::Vssd(Box::new(Driver::new())),
        };
        let machine = Self::fresh_machine(scene, &pool);
        let mut world = Self {
            capacity: machine.capacity(),
            machine,
            now: 1_000,
            looked_at: pool.attrs.requested,
            pool,
            guest,
            line: Line::Down,
            fresh: true,
            settle_at: None,
            connection: 0,
            session: None,
            next_epoch: 1,
            jobs: Vec::new(),
            left: scene.budget,
            broken: None,
            quiet: 0,
        };
        world.rest(scene);
        world
    }

    fn fresh_machine(scene: &Scene, pool: &Pool) -> Negotiation {
        let policy = Policy { pull: scene.pull, ..Policy::default() };
        Negotiation::new(Setup {
            name: String::new(),
            block_size: block_size(),
            total: scene.total,
            min: scene.min,
            requested: pool.attrs.requested,
            counts: pool.counts(),
            policy,
        })
    }

    fn identity(&self) -> impl Eq + Hash + '_ {
        (
            (&self.machine, self.now, &self.pool, &self.guest, self.line, self.fresh, self.settle_at),
            (self.connection, self.session, self.next_epoch, &self.jobs, self.looked_at),
            (self.capacity, self.left, self.broken),
        )
    }

    /// Steps that bring the world to rest: any of them may come next.
    pub(crate) fn progress(&self, scene: &Scene, actions: &mut Vec<Action>) {
        if self.broken.is_some() {
            return;
        }
        let start = actions.len();
        let running = self.line == Line::Running;
        match (self.line, &self.guest) {
            (_, Guest::Off) => actions.extend(scene.reboots_into.iter().map(|kind| Action::PowerOn(*kind))),
            (Line::Down, _) => actions.push(Action::Connect),
            (Line::Idle, _) => actions.push(Action::QueueStarts),
            (Line::Stopping, guest) => {
                let busy = matches!(guest, Guest::Vssd(driver) if matches!(driver.call, Slot::AtDevice(_)));
                if !busy {
                    actions.push(Action::QueueStops);
                }
            }
            (Line::Running, _) => {}
        }
        if !self.pool.is_idle() {
            actions.push(Action::PoolStep);
        }
        if let Some(at) = self.machine.wake_at()
            && !(matches!(self.guest, Guest::Vssd(_)) && self.settle_at.is_some_and(|settle| at >= settle))
        {
            actions.push(Action::Tick);
        }
        let mut later = None;
        if let Guest::Vssd(driver) = &self.guest {
            for (which, slot) in [(Which::Call, &driver.call), (Which::Wait, &driver.wait)] {
                match slot {
                    Slot::Sent(_) if running => actions.push(Action::Take(which)),
                    // One work item does both: news are read between calls.
                    Slot::Answered(..) if which == Which::Wait && driver.call != Slot::Idle => {}
                    Slot::Answered(..) => actions.push(Action::Hear(which)),
                    Slot::Unnoticed(..) if driver.call == Slot::Idle => later = Some(vec![Action::Poll]),
                    _ => {}
                }
            }
            if driver.may_arm() {
                actions.push(Action::ArmWait);
            }
            if let Some((when, calls)) = driver.calls(scene.total, scene.willing) {
                let calls = (0u8..).zip(calls).map(|(n, _)| Action::Call(n));
                match when {
                    When::Now => actions.extend(calls),
                    When::Later => later.get_or_insert_default().extend(calls),
                }
            }
        }
        // What waits for a back-off comes when nothing else is left.
        if actions.len() == start {
            actions.extend(later.into_iter().flatten());
        }
    }

    /// Steps that the budget still allows.
    pub(crate) fn disturbances(&self, scene: &Scene, actions: &mut Vec<Action>) {
        if self.broken.is_some() {
            return;
        }
        let left = &self.left;
        if left.orders > 0 {
            for (n, _) in (0u8..).zip(scene.wishes) {
                actions.extend([Action::Order(n), Action::OrderIfUnchanged(n)]);
            }
            if self.looked_at != self.machine.requested() {
                actions.push(Action::Look);
            }
            if self.machine.job().is_some() {
                actions.push(Action::Cancel);
            }
        }
        if left.kills > 0 {
            actions.push(Action::Kill);
        }
        if self.guest == Guest::Off {
            return;
        }
        if left.reboots > 0 {
            actions.extend(scene.reboots_into.iter().map(|kind| Action::Reboot(*kind)));
        }
        if left.power_offs > 0 {
            actions.push(Action::PowerOff);
        }
        if left.hang_ups > 0 && self.line != Line::Down {
            actions.push(Action::HangUp);
        }
        if left.pauses > 0 && self.line == Line::Running {
            actions.push(Action::Pause);
        }
        if left.pool_failures > 0 && self.pool.may_fail() {
            actions.push(Action::PoolFails);
        }
        if left.writes > 0 && self.line == Line::Running {
            let nominated = match &self.guest {
                Guest::Vssd(driver) => driver.fenced,
                _ => Blocks::NONE,
            };
            let clean = self.pool.served().without(self.pool.data).without(nominated);
            actions.extend(clean.iter().map(Action::Write));
        }
        let Guest::Vssd(driver) = &self.guest else { return };
        if left.lost > 0 && matches!(driver.wait, Slot::Answered(..)) {
            actions.push(Action::LoseNews);
        }
        if driver.call == Slot::Idle && driver.epoch.is_some() && driver.known {
            if left.gifts > 0 {
                actions.extend(driver.view.and(scene.willing).lowest(1).iter().map(Action::Give));
            }
            if left.pulls > 0 {
                actions.push(Action::Pull);
            }
        }
    }

    /// Makes a step.
    pub(crate) fn act(&mut self, scene: &Scene, action: Action) {
        self.quiet = if action.is_progress() { self.quiet + 1 } else { 0 };
        if self.quiet > LONGEST_QUIET {
            self.breaks(Rule::QuietRunEnds);
        }
        match action {
            Action::Connect => {
                self.line = Line::Idle;
                self.connection += 1;
                self.session = None;
                self.apply(scene, Event::Connected);
            }
            Action::QueueStarts => {
                self.line = Line::Running;
                self.settle_at = Some(self.now + SETTLE_MS);
                let fresh = std::mem::take(&mut self.fresh);
                if fresh {
                    self.session = None;
                }
                self.apply(scene, Event::QueueStarted { queue: 0, fresh });
            }
            Action::QueueStops => self.line = Line::Idle,
            Action::PowerOn(kind) => self.boot(kind),
            Action::Take(which) => self.take(scene, which),
            Action::Hear(which) => {
                let Guest::Vssd(driver) = &mut self.guest else { return };
                match which {
                    Which::Call => driver.hear_call(),
                    Which::Wait => driver.hear_wait(),
                }
            }
            Action::Call(n) => {
                let Guest::Vssd(driver) = &mut self.guest else { return };
                let calls =
                    driver.calls(scene.total, scene.willing).map(|(_, calls)| calls).unwrap_or_default();
                if let Some(message) = calls.get(usize::from(n)) {
                    driver.send(*message);
                }
            }
            Action::ArmWait => {
                if let Guest::Vssd(driver) = &mut self.guest {
                    driver.arm();
                }
            }
            Action::PoolStep => {
                if let Some(Stepped::Ended { op, outcome }) = self.pool.step(scene.sabotage) {
                    let counts = self.pool.counts();
                    self.apply(scene, Event::PoolDone { op, outcome, counts });
                }
            }
            Action::Tick => {
                self.now = self.now.max(self.machine.wake_at().unwrap_or(0));
                self.apply(scene, Event::Tick);
                if self.machine.wake_at().is_some_and(|at| at <= self.now) {
                    self.breaks(Rule::NoDueTimerLeft);
                }
            }
            Action::Poll => {
                if let Guest::Vssd(driver) = &mut self.guest {
                    driver.hear_wait();
                }
            }
            disturbance => self.disturb(scene, disturbance),
        }
        self.look_around(scene);
    }

    fn disturb(&mut self, scene: &Scene, action: Action) {
        match action {
            Action::Order(n) => {
                self.left.orders -= 1;
                self.order(scene, scene.wishes[usize::from(n)], None);
            }
            Action::Look => {
                self.looked_at = self.machine.requested();
            }
            Action::OrderIfUnchanged(n) => {
                self.left.orders -= 1;
                let expected = self.looked_at;
                self.order(scene, scene.wishes[usize::from(n)], Some(expected));
            }
            Action::Cancel => {
                self.left.orders -= 1;
                self.apply(scene, Event::Cancel(OPERATOR));
            }
            Action::Kill => {
                self.left.kills -= 1;
                self.kill(scene);
            }
            Action::HangUp => {
                self.left.hang_ups -= 1;
                self.hang_up(scene);
            }
            Action::PowerOff => {
                self.left.power_offs -= 1;
                self.hang_up(scene);
                self.guest = Guest::Off;
            }
            Action::Reboot(kind) => {
                self.left.reboots -= 1;
                if self.line == Line::Running {
                    self.quiesce(scene);
                }
                if self.line != Line::Down {
                    self.line = Line::Idle;
                }
                self.boot(kind);
            }
            Action::Pause => {
                self.left.pauses -= 1;
                self.line = Line::Stopping;
                self.quiesce(scene);
            }
            Action::LoseNews => {
                self.left.lost -= 1;
                if let Guest::Vssd(driver) = &mut self.guest
                    && let Slot::Answered(message, answer) = &driver.wait
                {
                    driver.wait = Slot::Unnoticed(*message, answer.clone());
                }
            }
            Action::Give(block) => {
                self.left.gifts -= 1;
                if let Guest::Vssd(driver) = &mut self.guest
                    && let Some(epoch) = driver.epoch
                {
                    driver.send(Message::Unplug { epoch, blocks: Blocks::one(block) });
                }
            }
            Action::Pull => {
                self.left.pulls -= 1;
                if let Guest::Vssd(driver) = &mut self.guest
                    && let Some(epoch) = driver.epoch
                {
                    driver.send(Message::Pull { epoch });
                }
            }
            Action::Write(block) => {
                self.left.writes -= 1;
                self.pool.data = self.pool.data.with(Blocks::one(block));
            }
            Action::PoolFails => {
                self.left.pool_failures -= 1;
                self.pool.fail_next();
            }
            _ => {}
        }
    }

    /// A driver begins anew: the ring is empty, whatever was on its way to the one before is lost.
    fn boot(&mut self, kind: Kind) {
        self.guest = match kind {
            Kind::Stock => Guest::Stock,
            Kind::Vssd => Guest::Vssd(Box::new(Driver::new())),
        };
        self.fresh = true;
        self.connection += 1;
    }

    fn hang_up(&mut self, scene: &Scene) {
        if self.line != Line::Down {
            self.line = Line::Down;
            self.session = None;
            self.connection += 1;
            self.apply(scene, Event::Disconnected);
        }
        if let Guest::Vssd(driver) = &mut self.guest {
            driver.replay();
        }
    }

    fn quiesce(&mut self, scene: &Scene) {
        if scene.sabotage != Some(Sabotage::WaitKeptOnStop) {
            self.apply(scene, Event::Quiesce);
        }
        if let Guest::Vssd(driver) = &self.guest
            && matches!(driver.wait, Slot::AtDevice(_))
        {
            self.breaks(Rule::WaitFreedOnStop);
        }
    }

    /// The daemon dies, and another begins with what is on the media.
    fn kill(&mut self, scene: &Scene) {
        self.pool.crash();
        self.line = Line::Down;
        self.session = None;
        self.connection += 1;
        if let Guest::Vssd(driver) = &mut self.guest {
            driver.replay();
        }
        self.jobs.retain(|job| job.state.is_final());
        self.machine = Self::fresh_machine(scene, &self.pool);
        self.capacity = self.machine.capacity();
        let deadline = self.pool.attrs.deadline;
        let left = deadline.map(|(at, then)| (at.saturating_sub(self.now).max(LEAST_LEFT_MS), then));
        if let Some(plan) = self.machine.plan_resumed(left)
            && scene.sabotage != Some(Sabotage::NotResumed)
        {
            self.begin(scene, plan);
        }
    }

    fn order(&mut self, scene: &Scene, wish: Wish, expected: Option<u32>) {
        let size = block_size();
        let unchanged = expected.is_none_or(|expected| expected == self.machine.requested());
        let wish = machine::Wish {
            to_bytes: size.bytes_of(wish.to),
            expected_bytes: expected.map(|blocks| size.bytes_of(blocks)),
            deadline_ms: wish.deadline_ms,
            on_timeout: Some(wish.on_timeout),
            force: wish.force,
        };
        let Ok(plan) = self.machine.plan(&wish, self.pool.tail()) else { return };
        if !unchanged {
            self.breaks(Rule::CompareAndSet);
        }
        let deadline = plan.deadline_ms.filter(|_| plan.to < plan.from);
        let deadline = deadline.map(|ms| (self.now + ms, plan.on_timeout));
        if plan.to != self.machine.requested() || deadline.is_some() {
            self.pool.attrs = Attrs { requested: plan.to, deadline };
        }
        self.begin(scene, plan);
    }

    fn begin(&mut self, scene: &Scene, plan: Plan) {
        let force_at = match plan.deadline_ms {
            _ if plan.force => Some(self.now),
            Some(ms) if plan.on_timeout == OnTimeout::Force => Some(self.now + ms),
            _ => None,
        };
        self.jobs.push(Job { state: JobState::Created, offered: false, force_at });
        let job = self.jobs.len() as u64;
        self.apply(scene, Event::Resize(Resize { job, plan, actor: OPERATOR, note: "" }));
    }

    fn take(&mut self, scene: &Scene, which: Which) {
        let connection = self.connection;
        let Guest::Vssd(driver) = &mut self.guest else { return };
        let slot = match which {
            Which::Call => &mut driver.call,
            Which::Wait => &mut driver.wait,
        };
        let Slot::Sent(message) = *slot else { return };
        *slot = Slot::AtDevice(message);
        self.settle_at = None;
        let mut request = message.request();
        if scene.sabotage == Some(Sabotage::EpochUnchecked)
            && let Some(session) = self.session
        {
            request = message.with_epoch(session).request();
        }
        let fresh_epoch = self.next_epoch;
        if message == Message::Hello {
            self.next_epoch += 1;
        }
        let foreign = message.epoch().is_some_and(|epoch| Some(epoch) != self.session);
        let reply = machine::ReplyId(connection * 2 + u64::from(which == Which::Wait));
        self.apply(scene, Event::Guest { reply, request, fresh_epoch });
        if foreign && !self.was_told_stale(which) {
            self.breaks(Rule::StaleChangesNothing);
        }
    }

    fn was_told_stale(&self, which: Which) -> bool {
        let Guest::Vssd(driver) = &self.guest else { return false };
        let slot = if which == Which::Call { &driver.call } else { &driver.wait };
        matches!(slot, Slot::Answered(_, answer) if answer.is_stale())
    }

    pub(crate) fn breaks(&mut self, rule: Rule) {
        self.broken.get_or_insert(rule);
    }

    /// Goes on without disturbances, some way or other.
    pub(crate) fn rest(&mut self, scene: &Scene) {
        let mut actions = Vec::new();
        loop {
            actions.clear();
            self.progress(scene, &mut actions);
            let Some(action) = actions.first() else { break };
            self.act(scene, *action);
        }
        self.quiet = 0;
    }

    /// Nothing goes on by itself any more.
    pub(crate) fn is_at_rest(&self, scene: &Scene) -> bool {
        let mut actions = Vec::new();
        self.progress(scene, &mut actions);
        actions.is_empty()
    }

    /// A driver with the guest channel comes after all.
    pub(crate) fn reboot_into_vssd(&mut self, scene: &Scene) {
        self.left.reboots += 1;
        self.act(scene, Action::Reboot(Kind::Vssd));
    }
}
