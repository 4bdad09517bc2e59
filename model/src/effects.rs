// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Carries out what the negotiation says, as the daemon's owner does, and holds every effect and state against the rules.

use std::collections::VecDeque;

use vssd_backend::control::negotiation::{Effect, Event, JobView, OpId, Pick, ReplyId};
use vssd_protocol::control::JobState;
use vssd_protocol::guest::{RangeStatus, RequestResult, Response, ResponseBody};

use crate::blocks::Blocks;
use crate::guest::{Answer, Guest, Message, Slot};
use crate::pool::{Attrs, Task};
use crate::rules::Rule;
use crate::scene::{Sabotage, Scene};
use crate::world::{Line, World};

impl World {
    pub(crate) fn apply(&mut self, scene: &Scene, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            for effect in self.machine.apply(event, self.now) {
                events.extend(self.perform(scene, effect));
            }
        }
    }

    /// What an effect brings about at once is returned, to be applied next.
    fn perform(&mut self, scene: &Scene, effect: Effect) -> Option<Event> {
        match effect {
            Effect::Answer { reply, response } => self.answer(scene, reply, &response),
            Effect::AnswerState { reply, sizes, .. } => {
                let body = ResponseBody::State { next: scene.total, ranges: self.pool.live.ranges() };
                self.answer(scene, reply, &Response { result: RequestResult::Ok, sizes, body });
            }
            Effect::Unplug { op, ranges } => {
                let blocks = Blocks::from_ranges(&ranges);
                self.pool.queue(op, Task::Unplug { blocks, only_empty: false });
            }
            Effect::Plug { op, ranges, limit } => {
                let blocks = Blocks::from_ranges(&ranges);
                self.pool.queue(op, Task::Plug { blocks, limit });
            }
            Effect::TakeBlocks { op, blocks, pick } => self.take_blocks(op, blocks, pick),
            Effect::GiveBlocks { op, blocks, limit } => {
                let blocks = Blocks::first(scene.total).without(self.pool.live).lowest(blocks);
                self.pool.queue(op, Task::Plug { blocks, limit });
            }
            Effect::StoreRequested { blocks } => {
                if scene.sabotage != Some(Sabotage::TargetNotStored) {
                    self.pool.attrs = Attrs { requested: blocks, deadline: None };
                }
            }
            Effect::TryGrant { requested } => {
                if requested > self.machine.requested() {
                    self.pool.attrs = Attrs { requested, deadline: None };
                    return Some(Event::Granted { requested });
                }
            }
            Effect::SetCapacity { blocks } => self.capacity = blocks,
            Effect::Job(view) => self.job_changed(&view),
            Effect::NoteEstimate(_) | Effect::Emit(_) => {}
        }
        None
    }

    fn take_blocks(&mut self, op: OpId, count: u32, pick: Pick) {
        let forced = pick != (Pick::Tail { data: false });
        let job = self
            .machine
            .job()
            .and_then(|id| self.jobs.get(usize::try_from(id).ok()?.checked_sub(1)?))
            .copied();
        let may_force = job.and_then(|job| job.force_at).is_some_and(|at| at <= self.now);
        if forced && !may_force {
            self.breaks(Rule::OnlyNominated);
        }
        if !forced && self.session.is_some() {
            self.breaks(Rule::NotWhileGuestTakesPart);
        }
        if !forced && job.is_some_and(|job| job.offered) {
            self.breaks(Rule::OfferedStaysTheGuests);
        }
        let blocks = self.pool.pick(count, pick);
        self.pool.queue(op, Task::Unplug { blocks, only_empty: !forced });
    }

    fn job_changed(&mut self, view: &JobView) {
        let Some(job) = usize::try_from(view.id).ok().and_then(|id| self.jobs.get_mut(id.checked_sub(1)?))
        else {
            return;
        };
        let was_final = job.state.is_final();
        job.state = view.state;
        if was_final {
            self.breaks(Rule::FinalIsFinal);
        }
    }

    fn answer(&mut self, scene: &Scene, reply: ReplyId, response: &Response) {
        if reply.0 / 2 != self.connection {
            return; // to one that is gone
        }
        let Guest::Vssd(driver) = &mut self.guest else { return };
        let slot = if reply.0.is_multiple_of(2) { &mut driver.call } else { &mut driver.wait };
        let Slot::AtDevice(message) = *slot else {
            self.breaks(Rule::OneAnswer);
            return;
        };
        let news = matches!(response.body, ResponseBody::Wait { .. });
        if news && scene.sabotage == Some(Sabotage::NewsDropped) {
            return;
        }
        *slot = Slot::Answered(message, Answer::of(response));
        let foreign = message.epoch().is_some_and(|epoch| Some(epoch) != self.session);
        if response.result == RequestResult::Ok {
            if foreign {
                self.breaks(Rule::StaleChangesNothing);
            }
            self.check_ok(message, response);
        }
    }

    fn check_ok(&mut self, message: Message, response: &Response) {
        match &response.body {
            ResponseBody::Hello(hello) => {
                self.session = Some(hello.epoch);
                self.heard_of_job();
            }
            ResponseBody::Wait { .. } => self.heard_of_job(),
            ResponseBody::Ranges(statuses) => {
                let (Message::Unplug { blocks, .. } | Message::Plug { blocks, .. }) = message else { return };
                let wanted = matches!(message, Message::Plug { .. });
                let kept = blocks.iter().zip(statuses).all(|(block, status)| {
                    !matches!(status, RangeStatus::Ok | RangeStatus::Already)
                        || (self.pool.live.has(block) == wanted && self.pool.durable.has(block) == wanted)
                });
                if !kept || statuses.len() != blocks.len() as usize {
                    self.breaks(Rule::DurableAnswer);
                }
            }
            ResponseBody::Plain | ResponseBody::State { .. } => {}
        }
    }

    fn heard_of_job(&mut self) {
        if let Some(job) = self.machine.job()
            && let Some(job) = usize::try_from(job).ok().and_then(|id| self.jobs.get_mut(id.checked_sub(1)?))
        {
            job.offered = true;
        }
    }

    /// What must hold after every step.
    pub(crate) fn look_around(&mut self, scene: &Scene) {
        let given_away = self.pool.given_away;
        if !given_away.and(self.pool.live.with(self.pool.durable)).is_empty() {
            self.breaks(Rule::OneOwner);
        }
        if self.pool.lost {
            self.breaks(Rule::NoDataTaken);
        }
        let (requested, counts) = (self.machine.requested(), self.machine.counts());
        if !(scene.min..=scene.total).contains(&requested) || counts.plugged < scene.min {
            self.breaks(Rule::TargetInBounds);
        }
        let open = self.jobs.iter().filter(|job| !job.state.is_final()).count();
        if open != usize::from(self.machine.job().is_some()) {
            self.breaks(Rule::FinalIsFinal);
        }
    }

    /// Why this is no place for a quiet run to end, if it is none.
    pub fn disagreement(&self, scene: &Scene) -> Option<&'static str> {
        let pool = &self.pool;
        let settled = [
            (pool.is_idle() && pool.live == pool.durable, "the pool has not ended"),
            (self.machine.counts() == pool.counts(), "device and pool count differently"),
            (self.machine.requested() == pool.attrs.requested, "a restart would find another target"),
            (self.capacity == pool.counts().end.max(1), "capacity is not the end of the disk"),
            (self.line == Line::Running, "the guest's queue does not run"),
        ];
        if let Some((_, why)) = settled.iter().find(|(holds, _)| !holds) {
            return Some(why);
        }
        let (requested, plugged) = (self.machine.requested(), pool.live.len());
        let Guest::Vssd(driver) = &self.guest else {
            return self.disagreement_without_driver(scene);
        };
        let nothing_to_give = driver.view.and(scene.willing).is_empty();
        let agreed = [
            (driver.epoch.is_some() && driver.epoch == self.session, "the driver has no session"),
            (driver.view == pool.live, "the driver believes in another plugged set"),
            (driver.fenced.is_empty(), "the driver holds a fence for ever"),
            (driver.call == Slot::Idle, "a request was never answered"),
            (matches!(driver.wait, Slot::AtDevice(_)), "no WAIT is with the device"),
            (driver.requested == requested, "the driver follows another target"),
            (self.machine.job().is_none(), "a job hangs"),
            (
                requested == plugged || (requested < plugged && nothing_to_give && driver.has_declined()),
                "the target is not reached",
            ),
        ];
        agreed.iter().find(|(holds, _)| !holds).map(|(_, why)| *why)
    }

    /// The host does what it may; what waits for a driver that can choose must end once there is one.
    fn disagreement_without_driver(&self, scene: &Scene) -> Option<&'static str> {
        let (requested, plugged) = (self.machine.requested(), self.pool.live.len());
        if plugged < requested {
            return Some("the host has not plugged what is asked for");
        }
        if plugged == requested {
            return self.machine.job().map(|_| "a job hangs");
        }
        if self.machine.job().is_some() {
            let mut with_driver = self.clone();
            with_driver.reboot_into_vssd(scene);
            with_driver.rest(scene);
            return with_driver.disagreement(scene);
        }
        // Only a job that expired leaves its target behind.
        let expired = self.jobs.iter().any(|job| job.state == JobState::Expired);
        (!expired).then_some("the target is nobody's any more")
    }
}
