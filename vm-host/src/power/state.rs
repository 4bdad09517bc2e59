// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What follows from power events. Values and the time in, effects out: no clock, no lock, no I/O.
//!
//! ```text
//!              on battery: PreArm                critical: SaveAll
//!    ┌────────┐ ─────────────► ┌────────────┐ ─────────────────────► ┌──────────┐
//!    │ online │                │ on_battery │                        │ critical │ ◄─┐
//!    └────────┘ ◄───────────── └────────────┘            ┌─────────► └──────────┘   │ some failed, and the
//!      ▲  │ ▲    online for disarm_after_ms: DisArm      │             │            │ power is not back:
//!      │  │ │                                            │             │ the save   │ SaveAll again,
//!      │  │ │      critical: SaveAll                     │             ▼ has ended  │ after retry_ms
//!      │  └─┼────────────────────────────────────────────┤           ┌───────┐ ─────┘
//!      │    │                    critical again: SaveAll │           │ saved │
//!      │    └─ ResumeFinished ─ ┌──────────┐ ────────────┘           └───────┘
//!      └─────────────────────── │ resuming │ ◄─────────────────────────┘
//!                               └──────────┘   online for resume_after_ms: ResumeAll
//! ```
//!
//! | state | on battery | critical | shutdown planned | online (stable) | SaveFinished | ResumeFinished |
//! |---|---|---|---|---|---|---|
//! | online | on_battery, PreArm | critical, SaveAll | critical, SaveAll | | | |
//! | on_battery | | critical, SaveAll | critical, SaveAll | online, DisArm | | |
//! | critical | | | noted | noted | saved | |
//! | saved | | | noted, AllowShutdown | resuming, ResumeAll; not when a shutdown is planned | | |
//! | resuming | PreArm | critical, SaveAll | critical, SaveAll | DisArm | | online or on_battery |
//!
//! *Critical* is: low battery, a forced shutdown, a fallen power-good line, a planned shutdown, less runtime left than saving needs
//! with its margin, on battery for longer than configured, or a supply that went silent on battery.
//!
//! A supply that goes silent while online is no power failure: an event tells of it, and from then on it vouches for nothing. So of two
//! supplies under policy `all`, one lost and one on battery make the machine on battery; and where no supply is heard that ever was
//! off-line, the machine counts as online.
//!
//! A save that has begun is never broken off: power that comes back before its end is used afterwards. Power has to stay for a while
//! before it counts (`disarm_after_ms`, `resume_after_ms`), its failure counts at once.
//!
//! A planned shutdown is not undone by power, which was there all the time: the VMs resume with the next start of the daemon, unless
//! the host says that it does not shut down after all.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::observation::{Kind, Observation, Role, SourceId};

/// What the state machine is to be like. Times in milliseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    pub supplies: Supplies,
    /// Between a critical event and darkness, where nothing is known that is better.
    pub window_ms: u64,
    /// Of single sources, by their place; `None` where the common window counts.
    pub source_windows_ms: Vec<Option<u64>>,
    /// What the whole save needs: see [`super::budget`]. Changes with [`Machine::set_needed`].
    pub needed_ms: u64,
    /// With less than this and `needed_ms` left, it is saved.
    pub margin_ms: u64,
    /// On battery for longer than this, it is saved.
    pub save_after_ms: Option<u64>,
    /// A supply that is silent for longer while on battery counts as about to end.
    pub lost_grace_ms: u64,
    /// Online for so long, it is no longer on battery.
    pub disarm_after_ms: u64,
    /// Online for so long, what was saved is resumed.
    pub resume_after_ms: u64,
    /// What could not be saved is tried again after.
    pub retry_ms: u64,
}

/// How many of several supplies it takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Supplies {
    /// The machine needs each of them: what befalls one befalls the machine.
    #[default]
    Any,
    /// They are redundant: the machine fares as well as the best of them.
    All,
}

/// Which save or resume is meant; counts up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct Ticket(pub u64);

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// Of a source, or of the operator's test trigger ([`SourceId::TEST`], whose "online" ends the test).
    Observed(Observation),
    /// What [`Effect::SaveAll`] asked for is over.
    SaveFinished { ticket: Ticket, ok: u32, failed: u32 },
    /// What [`Effect::ResumeAll`] asked for is over. One that was overtaken by a save need not be reported.
    ResumeFinished { ticket: Ticket },
    /// Nothing but time has passed: for [`Machine::wake_at_ms`].
    Time,
}

/// What is to be done now, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Make saving as short as possible: a failure is likely.
    PreArm,
    /// It did not come.
    DisArm,
    /// Save all VMs that are not saved yet and report [`Input::SaveFinished`]. Ends pre-arming, and overtakes a resume.
    SaveAll {
        ticket: Ticket,
        reason: Reason,
        /// When darkness is to be expected, on the clock of `now_ms`.
        deadline_ms: u64,
    },
    /// Let all VMs run that were saved, and report [`Input::ResumeFinished`].
    ResumeAll { ticket: Ticket },
    /// All is saved and a shutdown waits for it: let it go on.
    AllowShutdown,
    /// For the log and for subscribers.
    Event(Event),
}

/// Why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "reason", rename_all = "kebab-case")]
pub enum Reason {
    OnBattery {
        source: SourceId,
    },
    LowBattery {
        source: SourceId,
    },
    ForcedShutdown {
        source: SourceId,
    },
    PowerFailing {
        source: SourceId,
    },
    ShutdownPlanned,
    RuntimeShort {
        source: SourceId,
        left_ms: u64,
        needed_ms: u64,
    },
    LongOnBattery {
        ms: u64,
    },
    SilentOnBattery {
        source: SourceId,
    },
    /// Some VMs could not be saved.
    Retry {
        failed: u32,
    },
    PowerStable {
        ms: u64,
    },
    TestEnded,
    ShutdownCancelled,
    SaveEnded {
        ok: u32,
        failed: u32,
    },
    ResumeEnded,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OnBattery { source } => write!(f, "{source} is on battery"),
            Self::LowBattery { source } => write!(f, "{source} has a low battery"),
            Self::ForcedShutdown { source } => write!(f, "{source} is going to be switched off"),
            Self::PowerFailing { source } => write!(f, "power is failing at {source}"),
            Self::ShutdownPlanned => f.write_str("the host is shutting down"),
            Self::RuntimeShort { source, left_ms, needed_ms } => {
                write!(f, "{source} lasts for {left_ms} ms, saving needs {needed_ms} ms with its margin")
            }
            Self::LongOnBattery { ms } => write!(f, "on battery for {ms} ms"),
            Self::SilentOnBattery { source } => write!(f, "{source} went silent on battery"),
            Self::Retry { failed } => write!(f, "{failed} VMs could not be saved"),
            Self::PowerStable { ms } => write!(f, "online for {ms} ms"),
            Self::TestEnded => f.write_str("the test has ended"),
            Self::ShutdownCancelled => f.write_str("the host does not shut down"),
            Self::SaveEnded { ok, failed } => write!(f, "the save has ended, {ok} saved, {failed} failed"),
            Self::ResumeEnded => f.write_str("the VMs run again"),
        }
    }
}

/// What is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    StateChanged {
        from: State,
        to: State,
        #[serde(flatten)]
        reason: Reason,
    },
    /// An alarm: the next failure may come unseen, or this one may be nearer than known.
    SourceLost {
        source: SourceId,
        on_battery: bool,
    },
    SourceBack {
        source: SourceId,
    },
    /// An alarm.
    SaveIncomplete {
        ok: u32,
        failed: u32,
    },
}

/// Where the machine is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    Online,
    OnBattery,
    /// Being saved.
    Critical,
    Saved,
    Resuming,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Online => "online",
            Self::OnBattery => "on battery",
            Self::Critical => "critical",
            Self::Saved => "saved",
            Self::Resuming => "resuming",
        })
    }
}

/// For people: where it is, since when, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct View {
    pub state: State,
    pub since_ms: u64,
    /// Of the last transition; `None` before the first.
    pub reason: Option<Reason>,
    pub on_battery_since_ms: Option<u64>,
    pub shutdown_planned: bool,
    pub testing: bool,
    pub needed_ms: u64,
}

/// How a supply fares, as far as is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    Online,
    Battery,
    Critical,
}

#[derive(Clone, Copy, Debug)]
struct Source {
    role: Role,
    /// The last word about power, and when it came.
    word: Option<(Kind, u64)>,
    /// Since when it has not been heard.
    lost_since: Option<u64>,
}

/// What the supplies, or a test, amount to.
#[derive(Clone, Copy, Debug)]
struct Verdict {
    level: Level,
    /// Of the level; `None` when online.
    reason: Option<Reason>,
    /// Whose window counts.
    source: Option<SourceId>,
}

const ONLINE: Verdict = Verdict { level: Level::Online, reason: None, source: None };

/// The state machine.
#[derive(Clone, Debug)]
pub struct Machine {
    policy: Policy,
    sources: Vec<Source>,
    test: Source,
    state: State,
    since_ms: u64,
    reason: Option<Reason>,
    /// Since when the supplies' verdict is online without a break.
    online_since: Option<u64>,
    /// Since when the machine is on battery, short returns of power included.
    battery_since: Option<u64>,
    armed: bool,
    /// Since when a shutdown is planned and for how long it waits.
    planned: Option<(u64, Option<u64>)>,
    /// One that was planned when saving began was called off.
    cancelled: bool,
    ticket: Ticket,
    failed: u32,
    /// The latest time that it was told.
    now_ms: u64,
}

impl Machine {
    /// One for sources with these roles, in the order of their [`SourceId`]s. Nothing has been heard yet.
    pub fn new(policy: Policy, roles: &[Role], now_ms: u64) -> Self {
        let source = |role| Source { role, word: None, lost_since: None };
        Self {
            policy,
            sources: roles.iter().map(|&role| source(role)).collect(),
            test: source(Role::Supply),
            state: State::Online,
            since_ms: now_ms,
            reason: None,
            // Power that was there before the daemon need not prove itself.
            online_since: Some(0),
            battery_since: None,
            armed: false,
            planned: None,
            cancelled: false,
            ticket: Ticket(0),
            failed: 0,
            now_ms,
        }
    }

    pub fn state(&self) -> State {
        self.state
    }

    pub fn view(&self) -> View {
        View {
            state: self.state,
            since_ms: self.since_ms,
            reason: self.reason,
            on_battery_since_ms: self.battery_since,
            shutdown_planned: self.planned.is_some(),
            testing: self.test.word.is_some(),
            needed_ms: self.policy.needed_ms,
        }
    }

    /// What the whole save needs now, as VMs come and go. Follow with [`Input::Time`]: it may have become urgent.
    pub fn set_needed(&mut self, needed_ms: u64) {
        self.policy.needed_ms = needed_ms;
    }

    /// Says what follows. A time before the latest one counts as that.
    pub fn apply(&mut self, input: Input, now_ms: u64) -> Vec<Effect> {
        let now_ms = now_ms.max(self.now_ms);
        self.now_ms = now_ms;
        let mut effects = Vec::new();
        match input {
            Input::Observed(observation) => self.observe(observation, now_ms, &mut effects),
            Input::SaveFinished { ticket, ok, failed } => {
                if self.state == State::Critical && ticket == self.ticket {
                    self.failed = failed;
                    if failed > 0 {
                        effects.push(Effect::Event(Event::SaveIncomplete { ok, failed }));
                    }
                    self.change(State::Saved, Reason::SaveEnded { ok, failed }, now_ms, &mut effects);
                    self.allow_shutdown(&mut effects);
                }
            }
            Input::ResumeFinished { ticket } => {
                if self.state == State::Resuming && ticket == self.ticket {
                    let next = if self.battery_since.is_some() { State::OnBattery } else { State::Online };
                    self.change(next, Reason::ResumeEnded, now_ms, &mut effects);
                }
            }
            Input::Time => {}
        }
        let verdict = self.look(now_ms);
        self.settle(&verdict, now_ms, &mut effects);
        effects
    }

    /// When [`Input::Time`] is due, if nothing else comes first.
    pub fn wake_at_ms(&self) -> Option<u64> {
        let policy = &self.policy;
        let online_since = self.online_since.filter(|_| self.test.word.is_none());
        let mut times = Vec::new();
        match self.state {
            State::Online | State::OnBattery | State::Resuming => {
                let supplies = self.supplies().map(|(_, source)| source).chain([&self.test]);
                times.extend(supplies.filter_map(|source| self.critical_at(source)));
                if let Some(battery_since) = self.battery_since {
                    times.extend(match online_since {
                        Some(since) => Some(since.saturating_add(policy.disarm_after_ms)),
                        None => policy.save_after_ms.map(|after| battery_since.saturating_add(after)),
                    });
                }
            }
            State::Critical => {}
            State::Saved => {
                if self.planned.is_none() {
                    times.extend(online_since.map(|since| since.saturating_add(policy.resume_after_ms)));
                }
                if self.failed > 0 {
                    times.push(self.since_ms.saturating_add(policy.retry_ms));
                }
            }
        }
        // What is past has been considered: of redundant supplies, one may be at its end long before the machine is.
        times.into_iter().filter(|&at| at > self.now_ms).min()
    }

    fn observe(&mut self, observation: Observation, now_ms: u64, effects: &mut Vec<Effect>) {
        let Observation { source: id, kind } = observation;
        if id == SourceId::TEST {
            match kind {
                Kind::Online | Kind::Lost | Kind::NotAvailable => self.test.word = None,
                Kind::ShutdownPlanned { within_ms } => self.plan(within_ms, now_ms, effects),
                Kind::ShutdownCancelled => self.call_off(),
                _ => self.test.word = Some((kind, now_ms)),
            }
            return;
        }
        let Some(source) = self.sources.get_mut(usize::from(id.0)) else { return };
        match kind {
            Kind::Lost | Kind::NotAvailable => {
                if source.lost_since.is_none() {
                    source.lost_since = Some(now_ms);
                    let on_battery = source.word.is_some_and(|(word, _)| level_of(word) > Level::Online);
                    effects.push(Effect::Event(Event::SourceLost { source: id, on_battery }));
                }
                return;
            }
            _ => {
                if source.lost_since.take().is_some() {
                    effects.push(Effect::Event(Event::SourceBack { source: id }));
                }
            }
        }
        match kind {
            Kind::ShutdownPlanned { within_ms } => self.plan(within_ms, now_ms, effects),
            Kind::ShutdownCancelled => self.call_off(),
            _ => source.word = Some((kind, now_ms)),
        }
    }

    fn plan(&mut self, within_ms: Option<u64>, now_ms: u64, effects: &mut Vec<Effect>) {
        if self.planned.is_none() {
            self.planned = Some((now_ms, within_ms));
            self.allow_shutdown(effects);
        }
    }

    fn call_off(&mut self) {
        self.cancelled |= self.planned.take().is_some() && self.battery_since.is_none();
    }

    fn allow_shutdown(&self, effects: &mut Vec<Effect>) {
        if self.state == State::Saved && self.planned.is_some() && self.failed == 0 {
            effects.push(Effect::AllowShutdown);
        }
    }

    fn supplies(&self) -> impl Iterator<Item = (SourceId, &Source)> {
        let id = |place| u16::try_from(place).map_or(SourceId::TEST, SourceId);
        let all = self.sources.iter().enumerate().map(move |(place, source)| (id(place), source));
        all.filter(|(_, source)| source.role == Role::Supply)
    }

    /// When a supply's word becomes critical by itself, if nothing else comes first.
    fn critical_at(&self, source: &Source) -> Option<u64> {
        let (word, at) = source.word?;
        if level_of(word) != Level::Battery {
            return None;
        }
        let silent = source.lost_since.map(|since| since.saturating_add(self.policy.lost_grace_ms));
        let short = match word {
            Kind::OnBattery { runtime_left_ms: Some(left) } => {
                let needed = self.policy.needed_ms.saturating_add(self.policy.margin_ms);
                Some(at.saturating_add(left.saturating_sub(needed)))
            }
            _ => None,
        };
        [silent, short].into_iter().flatten().min()
    }

    /// How one supply fares; `None` where nothing is known.
    fn assess(&self, id: SourceId, source: &Source, now_ms: u64) -> Option<Verdict> {
        let (word, at) = source.word?;
        let level = level_of(word);
        if level == Level::Online {
            let heard = source.lost_since.is_none();
            return heard.then_some(ONLINE);
        }
        let of = |level, reason| Some(Verdict { level, reason: Some(reason), source: Some(id) });
        match word {
            Kind::LowBattery => return of(level, Reason::LowBattery { source: id }),
            Kind::ForcedShutdown => return of(level, Reason::ForcedShutdown { source: id }),
            Kind::PowerFailing => return of(level, Reason::PowerFailing { source: id }),
            _ => {}
        }
        if let Kind::OnBattery { runtime_left_ms: Some(left) } = word {
            let left_ms = left.saturating_sub(now_ms.saturating_sub(at));
            let needed_ms = self.policy.needed_ms.saturating_add(self.policy.margin_ms);
            if left_ms <= needed_ms {
                return of(Level::Critical, Reason::RuntimeShort { source: id, left_ms, needed_ms });
            }
        }
        if source.lost_since.is_some_and(|since| now_ms - since >= self.policy.lost_grace_ms) {
            return of(Level::Critical, Reason::SilentOnBattery { source: id });
        }
        of(Level::Battery, Reason::OnBattery { source: id })
    }

    /// What all supplies amount to by the policy.
    fn verdict(&self, now_ms: u64) -> Verdict {
        let known = self.supplies().filter_map(|(id, source)| self.assess(id, source, now_ms));
        // Of several with one level the first is named.
        let pick = match self.policy.supplies {
            Supplies::Any => known.reduce(|one, other| if other.level > one.level { other } else { one }),
            Supplies::All => known.reduce(|one, other| if other.level < one.level { other } else { one }),
        };
        pick.unwrap_or(ONLINE)
    }

    /// Brings what is derived from the words up to date, and says what is the case, a test included.
    fn look(&mut self, now_ms: u64) -> Verdict {
        let real = self.verdict(now_ms);
        if real.level == Level::Online {
            self.online_since = self.online_since.or(Some(now_ms));
        } else {
            self.online_since = None;
        }
        let test = self.assess(SourceId::TEST, &self.test, now_ms).unwrap_or(ONLINE);
        if test.level > real.level { test } else { real }
    }

    /// Makes all transitions that are due.
    fn settle(&mut self, verdict: &Verdict, now_ms: u64, effects: &mut Vec<Effect>) {
        let stable = |since: Option<u64>, ms: u64| since.is_some_and(|since| now_ms - since >= ms);
        let online = verdict.level == Level::Online;
        match self.state {
            State::Online | State::OnBattery | State::Resuming => {
                if !online && self.battery_since.is_none() {
                    self.battery_since = Some(now_ms);
                }
                if let Some(reason) = self.critical(verdict, now_ms) {
                    self.save(reason, verdict, now_ms, effects);
                } else if !online {
                    if !self.armed {
                        self.armed = true;
                        effects.push(Effect::PreArm);
                    }
                    if let (State::Online, Some(reason)) = (self.state, verdict.reason) {
                        self.change(State::OnBattery, reason, now_ms, effects);
                    }
                } else if self.battery_since.is_some()
                    && stable(self.online_since, self.policy.disarm_after_ms)
                {
                    self.battery_since = None;
                    if self.armed {
                        self.armed = false;
                        effects.push(Effect::DisArm);
                    }
                    if self.state == State::OnBattery {
                        self.change(State::Online, self.back(now_ms), now_ms, effects);
                    }
                }
            }
            State::Critical => {}
            State::Saved => {
                if self.planned.is_none() && online && stable(self.online_since, self.policy.resume_after_ms)
                {
                    let reason = if self.cancelled { Reason::ShutdownCancelled } else { self.back(now_ms) };
                    self.battery_since = None;
                    self.cancelled = false;
                    self.failed = 0;
                    self.ticket = Ticket(self.ticket.0 + 1);
                    effects.push(Effect::ResumeAll { ticket: self.ticket });
                    self.change(State::Resuming, reason, now_ms, effects);
                } else if self.failed > 0 && stable(Some(self.since_ms), self.policy.retry_ms) {
                    self.save(Reason::Retry { failed: self.failed }, verdict, now_ms, effects);
                }
            }
        }
    }

    fn back(&self, now_ms: u64) -> Reason {
        match self.online_since {
            // It was never gone.
            Some(since) if self.battery_since.is_some_and(|battery| since < battery) => Reason::TestEnded,
            Some(since) => Reason::PowerStable { ms: now_ms - since },
            None => Reason::PowerStable { ms: 0 },
        }
    }

    /// Why it has to be saved, if it has to.
    fn critical(&self, verdict: &Verdict, now_ms: u64) -> Option<Reason> {
        if self.planned.is_some() {
            return Some(Reason::ShutdownPlanned);
        }
        match verdict.level {
            Level::Critical => verdict.reason,
            Level::Battery => {
                let ms = now_ms - self.battery_since?;
                (ms >= self.policy.save_after_ms?).then_some(Reason::LongOnBattery { ms })
            }
            Level::Online => None,
        }
    }

    fn save(&mut self, reason: Reason, verdict: &Verdict, now_ms: u64, effects: &mut Vec<Effect>) {
        self.armed = false;
        self.failed = 0;
        self.cancelled = false;
        self.ticket = Ticket(self.ticket.0 + 1);
        let deadline_ms = self.darkness(verdict, now_ms);
        effects.push(Effect::SaveAll { ticket: self.ticket, reason, deadline_ms });
        self.change(State::Critical, reason, now_ms, effects);
    }

    /// When it is to be expected: where each supply is needed, with the first that ends, else with the last. Of a supply
    /// that says how long it lasts, that counts, else its window from when it said that it is about to end.
    fn darkness(&self, verdict: &Verdict, now_ms: u64) -> u64 {
        let window = |id: SourceId| {
            let own = self.policy.source_windows_ms.get(usize::from(id.0)).copied().flatten();
            own.unwrap_or(self.policy.window_ms)
        };
        let end = |(id, source): (SourceId, &Source)| match source.word? {
            (Kind::OnBattery { runtime_left_ms }, at) => Some(at.saturating_add(runtime_left_ms?)),
            (word, at) if level_of(word) == Level::Critical => Some(at.saturating_add(window(id))),
            _ => None,
        };
        let failing = verdict.source.map(|source| {
            let ends = self.supplies().chain([(SourceId::TEST, &self.test)]).filter_map(end);
            let end = match self.policy.supplies {
                Supplies::Any => ends.min(),
                Supplies::All => ends.max(),
            };
            end.unwrap_or_else(|| now_ms.saturating_add(window(source)))
        });
        let planned =
            self.planned.map(|(since, within)| since.saturating_add(within.unwrap_or(self.policy.window_ms)));
        let known = [planned, failing].into_iter().flatten().min();
        known.unwrap_or_else(|| now_ms.saturating_add(self.policy.window_ms)).max(now_ms)
    }

    fn change(&mut self, to: State, reason: Reason, now_ms: u64, effects: &mut Vec<Effect>) {
        let from = std::mem::replace(&mut self.state, to);
        self.since_ms = now_ms;
        self.reason = Some(reason);
        effects.push(Effect::Event(Event::StateChanged { from, to, reason }));
    }
}

fn level_of(kind: Kind) -> Level {
    match kind {
        Kind::OnBattery { .. } => Level::Battery,
        Kind::LowBattery | Kind::ForcedShutdown | Kind::PowerFailing => Level::Critical,
        Kind::Online
        | Kind::ShutdownPlanned { .. }
        | Kind::ShutdownCancelled
        | Kind::Lost
        | Kind::NotAvailable => Level::Online,
    }
}

#[cfg(test)]
mod tests;
