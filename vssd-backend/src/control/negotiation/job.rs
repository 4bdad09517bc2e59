// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The job: one operator's resize, from `created` to one of its final states.

use serde_json::{Value, json};
use vssd_protocol::control::{ErrorCode, JobKind, JobState, OnTimeout};
use vssd_protocol::guest::{DeclineReason, Reason};
use vssd_protocol::units::ByteCount;

use super::{Driver, Effect, Negotiation, News, OpBy, PROGRESS_MS, Pick, Resize, Route, SPACE_MS};

/// Who asked, as the kernel says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Actor {
    pub uid: u32,
    pub pid: i32,
}

impl Actor {
    /// Names the actor in an event's data.
    pub fn add_to(self, data: &mut Value) {
        data["uid"] = self.uid.into();
        data["pid"] = self.pid.into();
    }
}

/// How the blocks of a job come to move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Way {
    /// Whether a driver takes part is not known yet.
    Open,
    /// The guest's driver chooses.
    Guest,
    /// The host moves blocks that hold no data.
    Host,
}

/// A job as operators see it, in blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobView {
    pub id: u64,
    pub kind: JobKind,
    pub state: JobState,
    pub from: u32,
    pub target: u32,
    pub plugged: u32,
    /// On the clock of [`Negotiation::apply`].
    pub started_ms: u64,
    /// Of a final state.
    pub ended_ms: Option<u64>,
    /// How much time was given.
    pub deadline_ms: Option<u64>,
    pub message: String,
    pub error: Option<ErrorCode>,
    pub actor: Actor,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Job {
    pub(super) id: u64,
    pub(super) state: JobState,
    pub(super) actor: Actor,
    from: u32,
    target: u32,
    started_ms: u64,
    deadline_ms: Option<u64>,
    /// The deadline passed and was acted upon.
    deadline_over: bool,
    on_timeout: OnTimeout,
    way: Way,
    /// The host is to take blocks, data or not.
    force: bool,
    /// The guest's last word, told once its requests in flight have ended.
    declined: Option<String>,
    message: String,
    /// When progress was last shown.
    shown_ms: u64,
    /// Without a deadline: how long the guest may meet a pool without space.
    patience_ms: Option<u64>,
    /// Since when the guest has met nothing else.
    starved_ms: Option<u64>,
}

/// What a job says while the guest asks for blocks that the pool does not have.
const STARVED: &str = "the pool has no space for the blocks that the guest asks for";

impl Job {
    /// When it is to end whatever has become of it. The guest is told of a deadline only, for it cannot make space.
    pub(super) fn ends_at(&self) -> Option<u64> {
        let starved = self.starved_ms.zip(self.patience_ms).filter(|_| !self.deadline_over);
        let starved = starved.map(|(since, patience)| since.saturating_add(patience));
        [self.deadline_at(), starved].into_iter().flatten().min()
    }

    pub(super) fn is_starved(&self) -> bool {
        self.starved_ms.is_some()
    }

    pub(super) fn deadline_at(&self) -> Option<u64> {
        let at = self.started_ms.saturating_add(self.deadline_ms?);
        (!self.deadline_over).then_some(at)
    }

    /// It is for the guest to do, and the guest does not know yet.
    pub(super) fn is_untold(&self) -> bool {
        self.state == JobState::Created && self.way == Way::Guest && !self.force
    }

    fn grows(&self) -> bool {
        self.target > self.from
    }

    fn reached(&self, plugged: u32) -> bool {
        if self.grows() { plugged >= self.target } else { plugged <= self.target }
    }

    fn view(&self, plugged: u32) -> JobView {
        JobView {
            id: self.id,
            kind: JobKind::Resize,
            state: self.state,
            from: self.from,
            target: self.target,
            plugged,
            started_ms: self.started_ms,
            ended_ms: None,
            deadline_ms: self.deadline_ms,
            message: self.message.clone(),
            error: None,
            actor: self.actor,
        }
    }
}

impl Negotiation {
    /// Begins a job; the pool has the promise already.
    pub(super) fn resize(&mut self, resize: Resize, now: u64, fx: &mut Vec<Effect>) {
        let Resize { job: id, plan, actor, note } = resize;
        let had_deadline = self.job.as_ref().and_then(Job::deadline_at).is_some();
        let superseded = self.job();
        self.finish(
            JobState::Superseded,
            format!("job {id} took its place"),
            Some(ErrorCode::Conflict),
            None,
            now,
            fx,
        );
        self.withdrawing = false;
        self.stuck = false;
        let told = self.set_requested(plan.to, Reason::Operator, false, fx);
        if !told && (had_deadline || plan.deadline_ms.is_some()) {
            self.news_target();
        }
        let way = match plan.route {
            Route::Nothing | Route::HostGrow | Route::HostTail => Way::Host,
            Route::AskGuest | Route::AwaitDriver => Way::Guest,
            Route::Force | Route::Settling => Way::Open,
        };
        // A job with a deadline ends by that alone.
        let patience_ms = match plan.deadline_ms {
            Some(_) => None,
            None => Some(self.policy.deadline_ms).filter(|ms| *ms > 0).or(Some(SPACE_MS)),
        };
        let job = Job {
            id,
            state: JobState::Created,
            actor,
            from: plan.from,
            target: plan.to,
            started_ms: now,
            deadline_ms: plan.deadline_ms,
            deadline_over: false,
            on_timeout: plan.on_timeout,
            way,
            force: plan.force && plan.to < plan.from,
            declined: None,
            message: if note.is_empty() { plan.route.waits_for().to_owned() } else { note.to_owned() },
            shown_ms: now,
            patience_ms,
            starved_ms: None,
        };
        let mut data = json!({
            "from_bytes": self.bytes(job.from),
            "to_bytes": self.bytes(job.target),
            "reason": "operator",
            "deadline_ms": job.deadline_ms,
            "force": job.force,
        });
        if let Some(superseded) = superseded {
            data["supersedes"] = superseded.into();
        }
        if !note.is_empty() {
            data["note"] = note.into();
        }
        actor.add_to(&mut data);
        let event = if job.grows() { "grow.requested" } else { "shrink.requested" };
        fx.push(Effect::Emit(News { event, job: Some(id), data }));
        fx.push(Effect::Job(job.view(self.counts.plugged)));
        self.job = Some(job);
    }

    /// Ends the job on an operator's word; the target goes back to what is plugged.
    pub(super) fn cancel(&mut self, actor: Actor, now: u64, fx: &mut Vec<Effect>) {
        if self.job.is_none() {
            return;
        }
        self.finish(JobState::Cancelled, "cancelled".to_owned(), None, Some(actor), now, fx);
        self.withdraw(fx);
    }

    /// A driver said HELLO: the job is offered to it, also what the host has not done yet of one that was the host's.
    pub(super) fn offer_job(&mut self) {
        if let Some(job) = &mut self.job
            && !job.force
        {
            job.way = Way::Guest;
        }
    }

    /// Which blocks the host is to take now, if any.
    pub(super) fn host_take(&self) -> Option<Pick> {
        let job = self.job.as_ref()?;
        if job.grows() || matches!(self.driver, Driver::Settling { .. }) {
            return None;
        }
        if job.force {
            return Some(if self.last_was_vssd { Pick::LeastHarm } else { Pick::Tail { data: true } });
        }
        match job.way {
            // A driver that takes part may have come since.
            Way::Host if self.host_acts() => Some(Pick::Tail { data: false }),
            Way::Open if self.driver == Driver::Stock => Some(Pick::Tail { data: false }),
            Way::Host | Way::Open | Way::Guest => None,
        }
    }

    /// The host is about to take blocks by force, and waits for the guest's requests in flight.
    pub(super) fn force_is_due(&self) -> bool {
        self.job.as_ref().is_some_and(|job| job.force)
    }

    /// A running job enters another state or says something else.
    pub(super) fn job_state(&mut self, state: JobState, message: &str, now: u64, fx: &mut Vec<Effect>) {
        let plugged = self.counts.plugged;
        let Some(job) = &mut self.job else { return };
        if job.state == state && job.message == message {
            return;
        }
        job.state = state;
        message.clone_into(&mut job.message);
        job.shown_ms = now;
        fx.push(Effect::Job(job.view(plugged)));
    }

    /// Blocks moved on behalf of the job.
    pub(super) fn note_progress(&mut self, moved: u32, now: u64, fx: &mut Vec<Effect>) {
        if moved == 0 {
            return;
        }
        if let Some(session) = &mut self.session {
            session.declined = false;
        }
        let plugged = self.counts.plugged;
        let (plugged_bytes, by_guest) = (self.bytes(plugged), self.session.is_some());
        let Some(job) = &mut self.job else { return };
        job.starved_ms = None;
        if job.reached(plugged) {
            return; // the end is told, not the step before it
        }
        let first = matches!(job.state, JobState::Created | JobState::Offered);
        if !first && now < job.shown_ms + PROGRESS_MS {
            return;
        }
        job.state = JobState::Evacuating;
        if job.declined.is_none() {
            let (who, does) = if by_guest { ("guest", "gives") } else { ("host", "takes") };
            let does = match (job.target > job.from, by_guest) {
                (true, true) => "takes",
                (true, false) => "plugs",
                (false, _) => does,
            };
            job.message = format!("the {who} {does} blocks");
        }
        job.shown_ms = now;
        let (id, event) = (job.id, if job.grows() { "grow.progress" } else { "shrink.progress" });
        let (from, target) = (job.from, job.target);
        fx.push(Effect::Job(job.view(plugged)));
        let data = json!({
            "from_bytes": self.bytes(from),
            "to_bytes": self.bytes(target),
            "plugged_bytes": plugged_bytes,
        });
        fx.push(Effect::Emit(News { event, job: Some(id), data }));
    }

    /// The guest asked for blocks, and the pool had none.
    pub(super) fn note_starved(&mut self, now: u64, fx: &mut Vec<Effect>) {
        let Some(job) = self.job.as_mut().filter(|job| job.grows()) else { return };
        job.starved_ms.get_or_insert(now);
        let state = job.state;
        self.job_state(state, STARVED, now, fx);
    }

    /// The guest declined the newest target.
    pub(super) fn job_declined(
        &mut self,
        could_give: u32,
        reason: DeclineReason,
        now: u64,
        fx: &mut Vec<Effect>,
    ) {
        let could_give = ByteCount(self.bytes(could_give));
        let plugged = self.counts.plugged;
        let Some(job) = &mut self.job else { return };
        if job.way == Way::Host || job.force {
            return;
        }
        let why = match reason {
            DeclineReason::Nothing => "nothing can be given up",
            DeclineReason::Busy => "what could be given is in use",
            DeclineReason::Policy => "its own rules forbid it",
            DeclineReason::Error => "its driver failed",
        };
        let mut message = format!("the guest declined: {why}");
        if !job.grows() {
            message += &format!("; it could give {could_give} if asked again");
        }
        let goes_on = job.deadline_at().is_some() && job.on_timeout != OnTimeout::Fail;
        if goes_on {
            job.message = message + "; it has until the deadline";
            job.shown_ms = now;
            fx.push(Effect::Job(job.view(plugged)));
        } else {
            job.declined = Some(message);
        }
    }

    /// The host could not move blocks it was to move: trying again would end the same way.
    pub(super) fn host_gave_up(&mut self, error: ErrorCode, forced: bool, now: u64, fx: &mut Vec<Effect>) {
        let message = match error {
            ErrorCode::InUse if forced => "no more blocks could be taken",
            ErrorCode::InUse => "the blocks at the end of the disk hold data",
            ErrorCode::PoolFull => "the pool has no space for more blocks",
            _ => "the pool failed, see the daemon's log",
        };
        self.finish_short(message.to_owned(), error, now, fx);
        self.withdraw(fx);
        self.stuck = true;
    }

    /// `partial` if anything moved, else `refused`.
    fn finish_short(&mut self, message: String, error: ErrorCode, now: u64, fx: &mut Vec<Effect>) {
        let Some(job) = &self.job else { return };
        let state = if self.counts.plugged == job.from { JobState::Refused } else { JobState::Partial };
        self.finish(state, message, Some(error), None, now, fx);
    }

    /// Ends the job if it is at its end; keeps its state in step with what is in flight.
    pub(super) fn check_job(&mut self, now: u64, fx: &mut Vec<Effect>) {
        let Some(job) = &mut self.job else { return };
        if job.reached(self.counts.plugged) {
            let message = if job.from == job.target { "nothing to do" } else { "" };
            self.finish(JobState::Done, message.to_owned(), None, None, now, fx);
            return;
        }
        if self.ops.is_empty()
            && let Some(message) = job.declined.take()
        {
            self.finish_short(message, ErrorCode::GuestRefused, now, fx);
            self.withdraw(fx);
            return;
        }
        let grows = job.grows();
        if job.way == Way::Guest && !grows && self.session.is_none() && job.state != JobState::Created {
            self.job_state(JobState::Created, Route::AwaitDriver.waits_for(), now, fx);
            return;
        }
        let left = self.counts.plugged.abs_diff(job.target);
        let coming: u32 = self
            .ops
            .values()
            .filter(|op| matches!(op.by, OpBy::Guest { unplug, .. } if unplug != grows))
            .fold(0, |sum, op| sum.saturating_add(op.blocks));
        if coming >= left {
            self.job_state(JobState::Committing, "the last blocks are being committed", now, fx);
        }
    }

    /// Acts on a deadline that has passed.
    pub(super) fn check_deadline(&mut self, now: u64, fx: &mut Vec<Effect>) {
        let Some(job) = &mut self.job else { return };
        if job.ends_at().is_none_or(|at| at > now) || job.reached(self.counts.plugged) {
            return;
        }
        let error = if job.is_starved() { ErrorCode::PoolFull } else { ErrorCode::TimedOut };
        let unheard = job.state == JobState::Created && job.way != Way::Host;
        let why = match &job.declined {
            Some(declined) => declined.clone(),
            None if job.is_starved() => {
                format!("the time is over, and {STARVED}: shrink or delete another vSSD, then ask again")
            }
            None if unheard => {
                "the deadline passed, and no driver that can choose blocks was there".to_owned()
            }
            None => "the deadline passed".to_owned(),
        };
        match job.on_timeout {
            OnTimeout::Force if !job.grows() => {
                job.deadline_over = true;
                job.force = true;
                job.message = format!("{why}; the host takes blocks by force");
                job.shown_ms = now;
                fx.push(Effect::Job(job.view(self.counts.plugged)));
                self.news_target();
            }
            OnTimeout::Fail => {
                self.finish(JobState::Expired, why, Some(error), None, now, fx);
                self.withdraw(fx);
            }
            OnTimeout::Wait | OnTimeout::Force => {
                let message = format!("{why}; the guest is still asked");
                self.finish(JobState::Expired, message, Some(error), None, now, fx);
                self.news_target(); // the deadline is gone
            }
        }
    }

    /// Ends the job, if there is one.
    pub(super) fn finish(
        &mut self,
        state: JobState,
        message: String,
        error: Option<ErrorCode>,
        by: Option<Actor>,
        now: u64,
        fx: &mut Vec<Effect>,
    ) {
        let plugged = self.counts.plugged;
        let Some(mut job) = self.job.take() else { return };
        job.state = state;
        job.message = message;
        let mut view = job.view(plugged);
        view.ended_ms = Some(now);
        view.error = error;
        let event = match (job.grows(), state) {
            (false, JobState::Done) => Some("shrink.done"),
            (false, JobState::Partial) => Some("shrink.partial"),
            (false, JobState::Refused) => Some("shrink.refused"),
            (false, JobState::Expired) => Some("shrink.expired"),
            (false, JobState::Cancelled) => Some("shrink.cancelled"),
            (true, JobState::Done) => Some("grow.done"),
            (true, JobState::Partial) => Some("grow.partial"),
            (true, JobState::Refused) => Some("grow.refused"),
            (true, JobState::Expired) => Some("grow.expired"),
            (true, JobState::Cancelled) => Some("grow.cancelled"),
            // The event of the job that takes its place says so.
            (_, _) => None,
        };
        if let Some(event) = event {
            let mut data = json!({
                "from_bytes": self.bytes(job.from),
                "to_bytes": self.bytes(job.target),
                "plugged_bytes": self.bytes(plugged),
                "elapsed_ms": now.saturating_sub(job.started_ms),
                "message": view.message,
            });
            by.unwrap_or(job.actor).add_to(&mut data);
            fx.push(Effect::Emit(News { event, job: Some(job.id), data }));
        }
        fx.push(Effect::Job(view));
    }
}
