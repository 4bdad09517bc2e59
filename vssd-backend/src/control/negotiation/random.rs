// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Random histories of operators, a guest, the pool, time and crashes, against what must hold in all of them.
//! A failure prints its shortest history and is kept with its seed in `proptest-regressions`.

use std::collections::BTreeSet;

use proptest::prelude::*;
use vssd_protocol::control::{OnTimeout, PullPolicy};
use vssd_protocol::guest::{DeclineReason, Request, RequestResult, ResponseBody, Urgency};

use super::tests::{OPERATOR, Rig};
use super::*;

#[derive(Clone, Debug)]
enum Act {
    Resize {
        to: u32,
        force: bool,
        deadline_ms: Option<u64>,
        on_timeout: OnTimeout,
    },
    Cancel,
    SetMin(u32),
    Connect,
    Disconnect,
    Queue {
        queue: u16,
        fresh: bool,
    },
    Quiesce,
    Hello,
    Wait {
        seen: u64,
    },
    Unplug {
        start: u32,
        count: u32,
    },
    Plug {
        start: u32,
        count: u32,
    },
    Decline {
        back: u64,
    },
    Pull(u32),
    /// A request with the epoch of nobody.
    Stranger,
    Write(u32),
    PoolStep,
    Pass(u64),
    PoolFails(bool),
    /// The daemon is killed and started again. Pool operations at hand happen, or not.
    Crash {
        ops_done: bool,
    },
}

fn act() -> impl Strategy<Value = Act> {
    let on_timeout = prop_oneof![Just(OnTimeout::Wait), Just(OnTimeout::Fail), Just(OnTimeout::Force)];
    let deadline = prop_oneof![Just(None), (1u64..30_000).prop_map(Some)];
    prop_oneof![
        4 => (0u32..1005, prop::bool::weighted(0.1), deadline, on_timeout).prop_map(
            |(to, force, deadline_ms, on_timeout)| Act::Resize { to, force, deadline_ms, on_timeout }
        ),
        1 => Just(Act::Cancel),
        1 => (1u32..200).prop_map(Act::SetMin),
        1 => Just(Act::Connect),
        1 => Just(Act::Disconnect),
        1 => (0u16..2, any::<bool>()).prop_map(|(queue, fresh)| Act::Queue { queue, fresh }),
        1 => Just(Act::Quiesce),
        2 => Just(Act::Hello),
        3 => (0u64..20).prop_map(|seen| Act::Wait { seen }),
        4 => (0u32..1005, 0u32..300).prop_map(|(start, count)| Act::Unplug { start, count }),
        4 => (0u32..1005, 0u32..300).prop_map(|(start, count)| Act::Plug { start, count }),
        2 => (0u64..3).prop_map(|back| Act::Decline { back }),
        1 => (0u32..300).prop_map(Act::Pull),
        1 => Just(Act::Stranger),
        1 => (0u32..1000).prop_map(Act::Write),
        8 => Just(Act::PoolStep),
        3 => (1u64..25_000).prop_map(Act::Pass),
        1 => prop::bool::weighted(0.2).prop_map(Act::PoolFails),
        1 => any::<bool>().prop_map(|ops_done| Act::Crash { ops_done }),
    ]
}

/// A history in progress, with what an onlooker knows.
struct World {
    rig: Rig,
    epoch: u64,
    sent: BTreeSet<ReplyId>,
    waits: BTreeSet<ReplyId>,
    /// Somebody allowed the host to drop data.
    force_allowed: bool,
}

impl World {
    fn new() -> Self {
        let policy = Policy { pull: PullPolicy::Grant, ..Policy::default() };
        let rig = Rig::with_policy(500, policy);
        Self { rig, epoch: 0, sent: BTreeSet::new(), waits: BTreeSet::new(), force_allowed: false }
    }

    fn send(&mut self, request: Request) -> ReplyId {
        let waits = matches!(request, Request::Wait { .. });
        let reply = self.rig.send(request);
        self.sent.insert(reply);
        if waits {
            self.waits.insert(reply);
        }
        reply
    }

    fn hello(&mut self) {
        let reply = self.send(Request::Hello { version: 1, features: 0, driver: "vssd 1".into() });
        if let ResponseBody::Hello(hello) = &self.rig.answers[&reply].body {
            self.epoch = hello.epoch;
        }
    }

    fn act(&mut self, act: &Act) {
        let epoch = self.epoch;
        match *act {
            Act::Resize { to, force, deadline_ms, on_timeout } => {
                let to_bytes = BlockSize::DEFAULT.bytes_of(to);
                let on_timeout = Some(on_timeout);
                self.force_allowed |= force || on_timeout == Some(OnTimeout::Force);
                let wish = Wish { to_bytes, expected_bytes: None, deadline_ms, on_timeout, force };
                let _ = self.rig.resize(wish);
            }
            Act::Cancel => self.rig.apply(Event::Cancel(OPERATOR)),
            Act::SetMin(min) => {
                // As the operator's call allows.
                if min <= self.rig.n.requested().min(self.rig.n.counts().plugged) && self.rig.queue.is_empty()
                {
                    let (total, policy) = (self.rig.n.total(), self.rig.n.policy());
                    self.rig.apply(Event::Limits { min, total, policy });
                }
            }
            Act::Connect => self.rig.apply(Event::Connected),
            Act::Disconnect => self.rig.apply(Event::Disconnected),
            Act::Queue { queue, fresh } => self.rig.apply(Event::QueueStarted { queue, fresh }),
            Act::Quiesce => {
                self.rig.apply(Event::Quiesce);
                let owed = self.sent.iter().filter(|reply| !self.rig.answers.contains_key(reply)).count();
                let moves = |effect: &&Effect| matches!(effect, Effect::Unplug { .. } | Effect::Plug { .. });
                let under_way = self.rig.queue.iter().filter(moves).count();
                assert_eq!(self.parked(), 0, "a WAIT is parked although its queue stops");
                assert!(owed <= under_way, "a STATE is parked although its queue stops");
            }
            Act::Hello => self.hello(),
            Act::Wait { seen } => {
                self.send(Request::Wait { epoch, seq_seen: seen });
            }
            Act::Unplug { start, count } => {
                let ranges = vec![BlockRange::new(start, count), BlockRange::new(start, 1)];
                self.send(Request::Unplug { epoch, ranges });
            }
            Act::Plug { start, count } => {
                let ranges = vec![BlockRange::new(start, count)];
                self.send(Request::Plug { epoch, ranges });
            }
            Act::Decline { back } => {
                let probe = self.send(Request::State { epoch, flags: 0, start: 1000 });
                // None while the host moves blocks.
                let seq = self.rig.answers.get(&probe).map_or(0, |answer| answer.sizes.seq);
                let seq = seq.saturating_sub(back);
                self.send(Request::Decline { epoch, seq, could_give: 3, reason: DeclineReason::Busy });
            }
            Act::Pull(want_blocks) => {
                self.send(Request::Pull { epoch, want_blocks, urgency: Urgency::Wish });
            }
            Act::Stranger => {
                let unplugs = |rig: &Rig| {
                    rig.queue.iter().filter(|effect| matches!(effect, Effect::Unplug { .. })).count()
                };
                let before = (unplugs(&self.rig), self.rig.n.requested());
                let reply = self.send(Request::Unplug { epoch: 1, ranges: vec![BlockRange::new(0, 9)] });
                assert_eq!(self.rig.answers[&reply].result, RequestResult::Stale);
                assert_eq!((unplugs(&self.rig), self.rig.n.requested()), before);
            }
            Act::Write(block) => {
                if let Some(data) = self.rig.blocks.get_mut(&block) {
                    *data = true;
                }
            }
            Act::PoolStep => {
                self.rig.run_pool_once();
            }
            Act::Pass(ms) => self.rig.pass(ms),
            Act::PoolFails(fails) => self.rig.pool_fails = fails,
            Act::Crash { ops_done } => {
                if ops_done {
                    self.rig.run_pool();
                }
                // The front-end sends unanswered requests again to the new daemon; here they are new requests.
                self.rig.crash();
                self.sent.retain(|reply| self.rig.answers.contains_key(reply));
                self.waits.retain(|reply| self.rig.answers.contains_key(reply));
                self.epoch = 0;
            }
        }
    }

    fn parked(&self) -> usize {
        self.waits.iter().filter(|reply| !self.rig.answers.contains_key(reply)).count()
    }

    fn check(&self) {
        let n = &self.rig.n;
        assert!((n.min()..=n.total()).contains(&n.requested()), "requested is out of bounds");
        assert!(n.counts().plugged >= n.min(), "fell below the minimum");
        assert_eq!(n.requested(), self.rig.durable_requested, "a restart would forget the target");
        assert!(self.parked() <= 1, "more than one WAIT is parked");
        if self.rig.queue.is_empty() {
            assert_eq!(n.counts(), self.rig.counts(), "pool and negotiation disagree");
            assert_eq!(
                self.rig.capacity,
                self.rig.counts().end.max(1),
                "capacity is not the end of the disk"
            );
        }
        let lost = self.rig.events.iter().any(|news| news.event == "shrink.forced");
        assert!(!lost || self.force_allowed, "data was dropped though nobody allowed it");
        if let Some(at) = n.wake_at() {
            assert!(at > self.rig.now || self.rig.is_tick_due(), "a timer in the past is left");
        }
        let open = self.rig.jobs.values().filter(|job| !job.state.is_final()).count();
        assert_eq!(open, usize::from(n.job().is_some()), "a job was left behind");
    }

    /// A willing guest comes, and everything must come to its end.
    fn come_to_an_end(&mut self) {
        self.rig.pool_fails = false;
        self.rig.run_pool();
        self.rig.apply(Event::Disconnected);
        self.rig.run_pool();
        self.rig.apply(Event::Connected);
        self.rig.apply(Event::QueueStarted { queue: 0, fresh: true });
        self.hello();
        let epoch = self.epoch;
        for _ in 0..20 {
            self.rig.run_pool();
            let (requested, plugged) = (self.rig.n.requested(), self.rig.counts().plugged);
            if plugged > requested {
                let ranges = self.rig.blocks.keys().take((plugged - requested) as usize);
                let ranges = ranges.map(|block| BlockRange::new(*block, 1)).collect();
                self.send(Request::Unplug { epoch, ranges });
            } else if plugged < requested {
                let free = (0..1000).filter(|block| !self.rig.blocks.contains_key(block));
                let ranges = free.take((requested - plugged) as usize);
                let ranges = ranges.map(|block| BlockRange::new(block, 1)).collect();
                self.send(Request::Plug { epoch, ranges });
            }
        }
        self.rig.apply(Event::Quiesce);
        self.rig.run_pool();
        self.check();
        assert_eq!(self.rig.n.requested(), self.rig.counts().plugged, "both sides agree in the end");
        assert!(self.rig.jobs.values().all(|job| job.state.is_final()), "a job hangs");
        let answered: BTreeSet<ReplyId> = self.rig.answers.keys().copied().collect();
        assert!(self.sent.is_subset(&answered), "a request was never answered");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_000, ..ProptestConfig::default() })]

    #[test]
    fn every_history_keeps_the_rules_and_comes_to_an_end(history in prop::collection::vec(act(), 1..60)) {
        let mut world = World::new();
        for act in &history {
            world.act(act);
            world.check();
        }
        world.come_to_an_end();
    }

    #[test]
    fn every_job_with_a_deadline_ends_by_then(
        history in prop::collection::vec(act(), 1..40),
        on_timeout in prop_oneof![Just(OnTimeout::Wait), Just(OnTimeout::Fail), Just(OnTimeout::Force)],
        to in 200u32..900,
    ) {
        let mut world = World::new();
        for act in &history {
            world.act(act);
        }
        world.rig.pool_fails = false;
        world.force_allowed |= on_timeout == OnTimeout::Force;
        let wish = Wish {
            to_bytes: BlockSize::DEFAULT.bytes_of(to),
            expected_bytes: None,
            deadline_ms: Some(10_000),
            on_timeout: Some(on_timeout),
            force: false,
        };
        let Ok(job) = world.rig.resize(wish) else { return Ok(()) };
        world.rig.run_pool();
        world.rig.pass(10_000 + SETTLE_MS);
        world.rig.run_pool();
        prop_assert!(world.rig.jobs[&job].state.is_final(), "{:?}", world.rig.jobs[&job]);
        world.check();
    }

    #[test]
    fn same_history_gives_the_same_state(history in prop::collection::vec(act(), 1..40)) {
        let run = || {
            let mut world = World::new();
            history.iter().for_each(|act| world.act(act));
            world.rig.n
        };
        prop_assert_eq!(run(), run());
    }
}
