// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Messages of the guest channel: decoding, and the negotiation behind it.
//!
//! Oracles: no panic; what was decoded encodes to what decodes the same; each request is answered at most once, with a response
//! that decodes; the target stays within its bounds; a step has a bounded number of effects.

#![no_main]
#![allow(clippy::unwrap_used, reason = "a target that cannot be set up has failed")]

use std::collections::{BTreeMap, VecDeque};

use libfuzzer_sys::fuzz_target;
use vssd_backend::control::negotiation::{
    Actor, Counts, Effect, Event, Negotiation, OpId, Outcome, ReplyId, Resize, Setup, Tail, Wish,
};
use vssd_fuzz::{Input, setup};
use vssd_protocol::control::{OnTimeout, Policy, PullPolicy};
use vssd_protocol::guest::{RangeStatus, Request, RequestType, Response, ResponseBody};
use vssd_protocol::units::BlockSize;

const TOTAL: u32 = 16;
const MIN: u32 = 2;

struct World {
    machine: Negotiation,
    now: u64,
    counts: Counts,
    owed: BTreeMap<ReplyId, RequestType>,
    /// Operations, how many blocks each may move, and whether upwards.
    ops: VecDeque<(OpId, usize, bool)>,
    epoch: u64,
}

impl World {
    fn apply(&mut self, event: Event) {
        let effects = self.machine.apply(event, self.now);
        assert!(effects.len() < 32, "effect storm");
        let mut granted = None;
        for effect in effects {
            match effect {
                Effect::Answer { reply, response } => self.answer(reply, &response),
                Effect::AnswerState { reply, sizes, start, .. } => {
                    assert!(start <= TOTAL);
                    let body = ResponseBody::State { next: TOTAL, ranges: Vec::new() };
                    let result = vssd_protocol::guest::RequestResult::Ok;
                    self.answer(reply, &Response { result, sizes, body });
                }
                Effect::Unplug { op, ranges } => self.ops.push_back((op, ranges.len(), false)),
                Effect::Plug { op, ranges, .. } => self.ops.push_back((op, ranges.len(), true)),
                Effect::TakeBlocks { op, .. } => self.ops.push_back((op, 0, false)),
                Effect::GiveBlocks { op, .. } => self.ops.push_back((op, 0, true)),
                Effect::TryGrant { requested } => granted = Some(requested),
                Effect::StoreRequested { blocks } => assert!((MIN..=TOTAL).contains(&blocks)),
                Effect::SetCapacity { blocks } => assert!(blocks <= TOTAL),
                Effect::NoteEstimate(_) | Effect::Job(_) | Effect::Emit(_) => {}
            }
        }
        if let Some(requested) = granted {
            self.apply(Event::Granted { requested });
        }
        assert!((MIN..=TOTAL).contains(&self.machine.requested()));
    }

    fn answer(&mut self, reply: ReplyId, response: &Response) {
        let kind = self.owed.remove(&reply).expect("answered twice, or never asked");
        if let ResponseBody::Hello(hello) = &response.body {
            self.epoch = hello.epoch;
        }
        let bytes = response.encode(kind);
        let again = Response::decode(kind, &bytes).expect("an answer that does not decode");
        assert_eq!(bytes, again.encode(kind));
    }

    fn end_op(&mut self, input: &mut Input<'_>) {
        let Some((op, ranges, plug)) = self.ops.pop_front() else { return };
        let choice = input.u8();
        let moved = u32::from(choice >> 4);
        let plugged = if plug {
            (self.counts.plugged + moved).min(self.machine.requested().max(self.counts.plugged))
        } else {
            self.counts.plugged.saturating_sub(moved).max(MIN)
        };
        let moved = plugged.abs_diff(self.counts.plugged);
        self.counts = Counts { plugged, end: plugged };
        let outcome = if choice & 1 == 1 && moved == 0 {
            Outcome::Failed
        } else {
            Outcome::Ranges { statuses: vec![RangeStatus::Ok; ranges], moved, lost: 0 }
        };
        let counts = self.counts;
        self.apply(Event::PoolDone { op, outcome, counts });
    }
}

fuzz_target!(|data: &[u8]| {
    setup();
    let mut input = Input(data);
    let counts = Counts { plugged: 8, end: 8 };
    let policy = Policy { pull: PullPolicy::Grant, ..Policy::default() };
    let machine = Negotiation::new(Setup {
        name: "fuzz".into(),
        block_size: BlockSize::DEFAULT,
        total: TOTAL,
        min: MIN,
        requested: 8,
        counts,
        policy,
    });
    let mut world = World { machine, now: 1, counts, owed: BTreeMap::new(), ops: VecDeque::new(), epoch: 0 };
    let mut next = 0;
    while !input.is_empty() && next < 200 {
        next += 1;
        match input.u8() {
            0 => world.apply(Event::Connected),
            1 => world.apply(Event::Disconnected),
            2 => world.apply(Event::QueueStarted { queue: u16::from(input.u8() & 1), fresh: true }),
            3 => world.apply(Event::QueueStarted { queue: 0, fresh: false }),
            4 => world.apply(Event::Quiesce),
            5 => world.apply(Event::Cancel(Actor { uid: 0, pid: 0 })),
            6 => {
                world.now += u64::from(input.u16());
                world.apply(Event::Tick);
            }
            7..=40 => world.end_op(&mut input),
            41..=70 => {
                let bits = input.u8();
                let wish = Wish {
                    to_bytes: u64::from(input.u8()) << 15,
                    expected_bytes: None,
                    deadline_ms: (bits & 1 == 1).then(|| u64::from(input.u16())),
                    on_timeout: [None, Some(OnTimeout::Wait), Some(OnTimeout::Fail), Some(OnTimeout::Force)]
                        [usize::from(bits >> 1 & 3)],
                    force: bits & 8 != 0,
                };
                let tail = Tail { free: u32::from(bits >> 4), data_end: 1 };
                if let Ok(plan) = world.machine.plan(&wish, tail) {
                    let actor = Actor { uid: 0, pid: 0 };
                    world.apply(Event::Resize(Resize { job: next, plan, actor, note: "" }));
                }
            }
            choice => {
                let kind = RequestType::ALL[usize::from(choice) % RequestType::ALL.len()];
                let len = usize::from(input.u8());
                let mut body = input.bytes(len).to_vec();
                // Most requests carry the session's epoch, or nothing would ever be carried out.
                if choice < 220 && kind != RequestType::Hello && body.len() >= 8 {
                    body[..8].copy_from_slice(&world.epoch.to_le_bytes());
                }
                let Ok(request) = Request::decode(kind, &body) else { continue };
                let encoded = request.encode();
                let again = Request::decode(kind, &encoded).unwrap();
                match (&request, &again) {
                    // Names are made printable, and cut.
                    (
                        Request::Hello { version, features, .. },
                        Request::Hello { version: v, features: f, .. },
                    ) => {
                        assert_eq!((version, features), (v, f));
                    }
                    _ => assert_eq!(again, request),
                }
                let reply = ReplyId(next);
                world.owed.insert(reply, kind);
                world.apply(Event::Guest { reply, request, fresh_epoch: 0x1000 + next });
            }
        }
    }
    // Whatever was asked is answered once the pool has ended and the queue stops.
    while !world.ops.is_empty() {
        world.end_op(&mut Input(&[0x10]));
    }
    world.apply(Event::Quiesce);
    while !world.ops.is_empty() {
        world.end_op(&mut Input(&[0x10]));
    }
    assert!(world.owed.is_empty(), "a request was never answered");

    for kind in RequestType::ALL {
        if let Ok(mut response) = Response::decode(kind, data) {
            if let ResponseBody::Hello(hello) = &mut response.body {
                // Names are made printable, and cut.
                hello.name.clear();
            }
            let bytes = response.encode(kind);
            assert_eq!(Response::decode(kind, &bytes).as_ref(), Ok(&response));
        }
    }
});
