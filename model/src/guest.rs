// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The guest: off, under a driver that does not know the guest channel, or under one that does what `protocol.md` asks of drivers.
//!
//! The driver acts as `vssd.ko`: one call at a time beside one WAIT, level-triggered, what it did not hear it learns by asking.

use vssd_protocol::guest::{
    DeclineReason, NEWS_STATE, RangeStatus, Request, RequestResult, Response, ResponseBody, Sizes, Urgency,
};

use crate::blocks::Blocks;

/// In vain so often, and the driver says so to the host.
const TRIES: u8 = 3;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Guest {
    Off,
    Stock,
    Vssd(Box<Driver>),
}

/// A request as the model keeps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Message {
    Hello,
    State { epoch: u64 },
    Wait { epoch: u64, seen: u64 },
    Unplug { epoch: u64, blocks: Blocks },
    Plug { epoch: u64, blocks: Blocks },
    Decline { epoch: u64, seq: u64 },
    Pull { epoch: u64 },
}

impl Message {
    pub(crate) fn epoch(self) -> Option<u64> {
        match self {
            Self::Hello => None,
            Self::State { epoch }
            | Self::Wait { epoch, .. }
            | Self::Unplug { epoch, .. }
            | Self::Plug { epoch, .. }
            | Self::Decline { epoch, .. }
            | Self::Pull { epoch } => Some(epoch),
        }
    }

    /// The same request of another session.
    pub(crate) fn with_epoch(mut self, new: u64) -> Self {
        match &mut self {
            Self::Hello => {}
            Self::State { epoch }
            | Self::Wait { epoch, .. }
            | Self::Unplug { epoch, .. }
            | Self::Plug { epoch, .. }
            | Self::Decline { epoch, .. }
            | Self::Pull { epoch } => *epoch = new,
        }
        self
    }

    pub(crate) fn request(self) -> Request {
        match self {
            Self::Hello => Request::Hello { version: 1, features: 0, driver: String::new() },
            Self::State { epoch } => Request::State { epoch, flags: 0, start: 0 },
            Self::Wait { epoch, seen } => Request::Wait { epoch, seq_seen: seen },
            Self::Unplug { epoch, blocks } => Request::Unplug { epoch, ranges: blocks.ranges() },
            Self::Plug { epoch, blocks } => Request::Plug { epoch, ranges: blocks.ranges() },
            Self::Decline { epoch, seq } => {
                Request::Decline { epoch, seq, could_give: 0, reason: DeclineReason::Nothing }
            }
            Self::Pull { epoch } => Request::Pull { epoch, want_blocks: 1, urgency: Urgency::Wish },
        }
    }
}

/// What the driver reads in an answer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Answer {
    result: RequestResult,
    seq: u64,
    requested: u32,
    plugged: u32,
    body: Body,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Body {
    Plain,
    Hello { epoch: u64 },
    State { set: Blocks },
    Wait { flags: u32 },
    Ranges(Vec<RangeStatus>),
}

impl Answer {
    pub(crate) fn of(response: &Response) -> Self {
        let Response { result, sizes, body } = response;
        let Sizes { seq, requested_blocks: requested, plugged_blocks: plugged } = *sizes;
        let body = match body {
            ResponseBody::Plain => Body::Plain,
            ResponseBody::State { ranges, .. } => Body::State { set: Blocks::from_ranges(ranges) },
            ResponseBody::Wait { flags, .. } => Body::Wait { flags: *flags },
            ResponseBody::Ranges(statuses) => Body::Ranges(statuses.clone()),
            ResponseBody::Hello(hello) => Body::Hello { epoch: hello.epoch },
        };
        Self { result: *result, seq, requested, plugged, body }
    }

    pub(crate) fn is_stale(&self) -> bool {
        self.result == RequestResult::Stale
    }
}

/// Where a request is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Slot {
    Idle,
    /// In the ring, not seen by the device.
    Sent(Message),
    AtDevice(Message),
    /// In the ring, not seen by the driver.
    Answered(Message, Answer),
    /// The same, and the interrupt was lost.
    Unnoticed(Message, Answer),
}

/// Whether the driver may act at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum When {
    Now,
    /// Only once a back-off has passed, and that is longer than whatever else is under way.
    Later,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Driver {
    pub(crate) epoch: Option<u64>,
    /// What it believes to be plugged.
    pub(crate) view: Blocks,
    /// Nominated: no I/O goes there.
    pub(crate) fenced: Blocks,
    /// The plugged set was read in this session.
    pub(crate) known: bool,
    pub(crate) call: Slot,
    pub(crate) wait: Slot,
    pub(crate) declined: Option<u64>,
    pub(crate) requested: u32,
    /// Newest news that WAIT told.
    seen: u64,
    /// Newest news that any answer told.
    heard: u64,
    resync: Option<When>,
    /// The last call was in vain.
    tries: u8,
}

impl Driver {
    pub(crate) fn new() -> Self {
        Self {
            epoch: None,
            view: Blocks::NONE,
            fenced: Blocks::NONE,
            known: false,
            call: Slot::Idle,
            wait: Slot::Idle,
            declined: None,
            requested: 0,
            seen: 0,
            heard: 0,
            resync: None,
            tries: 0,
        }
    }

    /// Requests that the device had when it died are in the ring again (V-38).
    pub(crate) fn replay(&mut self) {
        for slot in [&mut self.call, &mut self.wait] {
            if let Slot::AtDevice(message) = *slot {
                *slot = Slot::Sent(message);
            }
        }
    }

    pub(crate) fn may_arm(&self) -> bool {
        self.epoch.is_some() && self.wait == Slot::Idle
    }

    /// Leaves a WAIT with the device (D-8).
    pub(crate) fn arm(&mut self) {
        if let Some(epoch) = self.epoch {
            self.wait = Slot::Sent(Message::Wait { epoch, seen: self.seen });
        }
    }

    /// What it would call next, and whether at once. Of several choices the driver may make any.
    pub(crate) fn calls(&self, total: u32, willing: Blocks) -> Option<(When, Vec<Message>)> {
        if self.call != Slot::Idle {
            return None;
        }
        let Some(epoch) = self.epoch else { return Some((When::Now, vec![Message::Hello])) };
        if let Some(when) = self.resync {
            return Some((when, vec![Message::State { epoch }]));
        }
        let plugged = self.view.len();
        let when = if self.tries > 0 { When::Later } else { When::Now };
        if plugged > self.requested {
            let need = plugged - self.requested;
            let can = self.view.and(willing);
            if can.is_empty() || self.tries >= TRIES {
                let seq = self.heard;
                // Once for each piece of news (D-15).
                return (self.declined != Some(seq))
                    .then(|| (When::Now, vec![Message::Decline { epoch, seq }]));
            }
            let all = Message::Unplug { epoch, blocks: can.highest(need) };
            let one = Message::Unplug { epoch, blocks: can.lowest(1) };
            return Some((when, if all == one { vec![all] } else { vec![all, one] }));
        }
        if plugged < self.requested && self.tries < TRIES {
            let blocks = Blocks::first(total).without(self.view).lowest(self.requested - plugged);
            return Some((when, vec![Message::Plug { epoch, blocks }]));
        }
        None
    }

    pub(crate) fn send(&mut self, message: Message) {
        match message {
            Message::Unplug { blocks, .. } => self.fenced = blocks,
            Message::Decline { seq, .. } => self.declined = Some(seq),
            _ => {}
        }
        self.call = Slot::Sent(message);
    }

    pub(crate) fn hear_wait(&mut self) {
        let (Slot::Answered(message, answer) | Slot::Unnoticed(message, answer)) = &self.wait else { return };
        let (message, answer) = (*message, answer.clone());
        self.wait = Slot::Idle;
        if message.epoch() != self.epoch {
            return; // of a session that is over
        }
        match (answer.result, &answer.body) {
            (RequestResult::Ok, Body::Wait { flags }) => {
                if flags & NEWS_STATE != 0 {
                    self.resync = Some(When::Now);
                }
                self.seen = self.seen.max(answer.seq);
                self.tries = 0;
                self.adopt(&answer);
            }
            (RequestResult::Stale, _) => self.epoch = None,
            _ => {}
        }
    }

    pub(crate) fn hear_call(&mut self) {
        let Slot::Answered(message, answer) = &self.call else { return };
        let (message, answer) = (*message, answer.clone());
        self.call = Slot::Idle;
        let fenced = std::mem::take(&mut self.fenced);
        match answer.result {
            RequestResult::Ok => {}
            RequestResult::Stale => {
                // It may have been carried out by a daemon that died: the set is read before anything else.
                if message.epoch() == self.epoch {
                    self.epoch = None;
                }
                return;
            }
            _ => {
                self.tries += 1;
                return;
            }
        }
        match (message, &answer.body) {
            (Message::Hello, Body::Hello { epoch }) => {
                self.epoch = Some(*epoch);
                self.known = false;
                self.seen = 0;
                self.heard = answer.seq;
                self.declined = None;
                self.requested = answer.requested;
                self.tries = 0;
                self.resync = Some(When::Now);
                return;
            }
            (Message::State { .. }, Body::State { set }) => {
                // The list and the count may be of different moments: then it is read again.
                self.resync = (set.len() != answer.plugged).then_some(When::Later);
                self.view = *set;
                self.known = true;
            }
            (Message::Unplug { .. }, Body::Ranges(statuses)) => {
                let (gone, kept) = sort(fenced, statuses);
                self.view = self.view.without(gone);
                self.tries = if kept.is_empty() { 0 } else { self.tries + 1 };
            }
            (Message::Plug { blocks, .. }, Body::Ranges(statuses)) => {
                let (came, refused) = sort(blocks, statuses);
                self.view = self.view.with(came);
                self.tries = if refused.is_empty() { 0 } else { self.tries + 1 };
            }
            _ => {}
        }
        self.adopt(&answer);
    }

    /// Takes over the sizes that come with each answer.
    fn adopt(&mut self, answer: &Answer) {
        if answer.plugged != self.view.len() && self.resync.is_none() {
            self.resync = Some(When::Later);
        }
        self.heard = self.heard.max(answer.seq);
        if answer.requested != self.requested {
            self.requested = answer.requested;
            self.tries = 0;
        }
    }

    /// Whether it said of the newest news that it will not get there.
    pub(crate) fn has_declined(&self) -> bool {
        self.declined == Some(self.heard)
    }
}

/// Which of `blocks` are as was asked for, and which are not.
fn sort(blocks: Blocks, statuses: &[RangeStatus]) -> (Blocks, Blocks) {
    let mut sets = (Blocks::NONE, Blocks::NONE);
    for (block, status) in blocks.iter().zip(statuses) {
        let one = Blocks::one(block);
        match status {
            RangeStatus::Ok | RangeStatus::Already => sets.0 = sets.0.with(one),
            _ => sets.1 = sets.1.with(one),
        }
    }
    sets
}
