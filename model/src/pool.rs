// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The pool as far as the negotiation can see it: operations that take effect in steps, of which a crash undoes what was
//! not journalled.
//!
//! Whatever a block's space was is taken by another vSSD in the very moment it is free: the worst that can happen.

use std::collections::VecDeque;

use vssd_backend::control::negotiation::{Counts, OpId, Outcome, Pick, Tail};
use vssd_protocol::control::OnTimeout;
use vssd_protocol::guest::RangeStatus;

use crate::blocks::Blocks;
use crate::scene::Sabotage;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Task {
    Unplug {
        blocks: Blocks,
        /// No data may go: nothing goes if one of them holds some.
        only_empty: bool,
    },
    Plug {
        blocks: Blocks,
        limit: u32,
    },
}

/// How far an operation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Step {
    Queued,
    /// Fenced, judged, and the first of its two effects done: the journal's, unless sabotaged.
    Half,
    /// In force; whoever asked is to be told.
    Done,
    /// Told, but not durable yet: only when sabotaged.
    Told,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Op {
    pub(crate) id: OpId,
    pub(crate) task: Task,
    /// One for each block, ascending, once judged.
    statuses: Vec<RangeStatus>,
    step: Step,
    failed: bool,
}

/// What a step led to.
#[derive(Clone, Debug)]
pub(crate) enum Stepped {
    Nothing,
    /// The negotiation is to hear of it.
    Ended {
        op: OpId,
        outcome: Outcome,
    },
}

/// What was stored with the vSSD.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Attrs {
    pub(crate) requested: u32,
    pub(crate) deadline: Option<(u64, OnTimeout)>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Pool {
    total: u32,
    min: u32,
    /// Plugged, as lanes see it.
    pub(crate) live: Blocks,
    /// Plugged, as the journal says.
    pub(crate) durable: Blocks,
    pub(crate) data: Blocks,
    /// Blocks whose space belongs to another vSSD now.
    pub(crate) given_away: Blocks,
    pub(crate) attrs: Attrs,
    /// Data went that was to stay.
    pub(crate) lost: bool,
    ops: VecDeque<Op>,
}

impl Pool {
    pub(crate) fn new(total: u32, min: u32, plugged: Blocks, data: Blocks) -> Self {
        let attrs = Attrs { requested: plugged.len(), deadline: None };
        let given_away = Blocks::first(total).without(plugged);
        Self {
            total,
            min,
            live: plugged,
            durable: plugged,
            data: data.and(plugged),
            given_away,
            attrs,
            lost: false,
            ops: VecDeque::new(),
        }
    }

    pub(crate) fn counts(&self) -> Counts {
        Counts { plugged: self.live.len(), end: self.live.end() }
    }

    pub(crate) fn tail(&self) -> Tail {
        let data_end = self.data.end();
        Tail { free: self.live.without(Blocks::first(data_end)).len(), data_end }
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.ops.is_empty()
    }

    /// A step of the oldest operation may fail.
    pub(crate) fn may_fail(&self) -> bool {
        self.ops.front().is_some_and(|op| op.step == Step::Queued)
    }

    /// Blocks that lanes hand out to the guest's reads and writes.
    pub(crate) fn served(&self) -> Blocks {
        let fenced = self.ops.iter().filter(|op| op.step != Step::Queued).fold(Blocks::NONE, |set, op| {
            match op.task {
                Task::Unplug { blocks, .. } => set.with(blocks),
                Task::Plug { .. } => set,
            }
        });
        self.live.without(fenced)
    }

    pub(crate) fn queue(&mut self, id: OpId, task: Task) {
        self.ops.push_back(Op { id, task, statuses: Vec::new(), step: Step::Queued, failed: false });
    }

    pub(crate) fn fail_next(&mut self) {
        if let Some(op) = self.ops.front_mut() {
            op.failed = true;
            op.step = Step::Done;
        }
    }

    /// Blocks that the host takes.
    pub(crate) fn pick(&self, count: u32, pick: Pick) -> Blocks {
        match pick {
            Pick::Tail { data: false } if count > self.tail().free => Blocks::NONE,
            Pick::Tail { .. } => self.live.highest(count),
            Pick::LeastHarm => {
                let empty = self.live.without(self.data).highest(count);
                empty.with(self.live.and(self.data).highest(count - empty.len()))
            }
        }
    }

    /// Does the next step of the oldest operation. `None` if there is none.
    pub(crate) fn step(&mut self, sabotage: Option<Sabotage>) -> Option<Stepped> {
        let early = sabotage == Some(Sabotage::AnswerBeforeJournal);
        let mut op = self.ops.pop_front()?;
        match op.step {
            Step::Queued => {
                op.statuses = self.judge(op.task, sabotage);
                op.step = Step::Half;
                if early {
                    self.drop_from_map(&op);
                } else {
                    self.journal(&op);
                }
                self.ops.push_front(op);
            }
            Step::Half if early => {
                op.step = Step::Told;
                let ended = Self::ended(&op);
                self.ops.push_front(op);
                return Some(ended);
            }
            Step::Half => {
                self.drop_from_map(&op);
                op.step = Step::Done;
                self.ops.push_front(op);
            }
            Step::Done => return Some(Self::ended(&op)),
            Step::Told => self.journal(&op),
        }
        Some(Stepped::Nothing)
    }

    fn ended(op: &Op) -> Stepped {
        if op.failed {
            return Stepped::Ended { op: op.id, outcome: Outcome::Failed };
        }
        let moved = op.statuses.iter().filter(|status| **status == RangeStatus::Ok).count();
        let moved = u32::try_from(moved).unwrap_or(u32::MAX);
        Stepped::Ended {
            op: op.id,
            // How much data went is only told to operators.
            outcome: Outcome::Ranges { statuses: op.statuses.clone(), moved, lost: 0 },
        }
    }

    fn judge(&self, task: Task, sabotage: Option<Sabotage>) -> Vec<RangeStatus> {
        let mut plugged = self.durable;
        match task {
            Task::Unplug { blocks, only_empty } => {
                let refused =
                    only_empty && !blocks.and(self.data).is_empty() && sabotage != Some(Sabotage::TakesData);
                let judge = |block: u32| {
                    if block >= self.total {
                        RangeStatus::Range
                    } else if !plugged.has(block) {
                        RangeStatus::Already
                    } else if refused {
                        RangeStatus::Busy
                    } else if plugged.len() <= self.min {
                        RangeStatus::Protected
                    } else {
                        plugged = plugged.without(Blocks::one(block));
                        RangeStatus::Ok
                    }
                };
                blocks.iter().map(judge).collect()
            }
            Task::Plug { blocks, limit } => {
                let judge = |block: u32| {
                    if block >= self.total {
                        RangeStatus::Range
                    } else if plugged.has(block) {
                        RangeStatus::Already
                    } else if plugged.len() >= limit {
                        RangeStatus::Limit
                    } else {
                        plugged = plugged.with(Blocks::one(block));
                        RangeStatus::Ok
                    }
                };
                blocks.iter().map(judge).collect()
            }
        }
    }

    fn journal(&mut self, op: &Op) {
        let changed = op.changed();
        match op.task {
            Task::Unplug { .. } => self.durable = self.durable.without(changed),
            Task::Plug { .. } => {
                self.durable = self.durable.with(changed);
                self.given_away = self.given_away.without(changed);
            }
        }
    }

    fn drop_from_map(&mut self, op: &Op) {
        let changed = op.changed();
        match op.task {
            Task::Unplug { only_empty, .. } => {
                self.lost |= only_empty && !changed.and(self.data).is_empty();
                self.live = self.live.without(changed);
                self.data = self.data.without(changed);
                self.given_away = self.given_away.with(changed);
            }
            Task::Plug { .. } => {
                self.live = self.live.with(changed);
                self.given_away = self.given_away.without(changed);
            }
        }
    }

    /// The daemon dies; the next one knows what was journalled.
    pub(crate) fn crash(&mut self) {
        // What was journalled took effect; what was only in force did not.
        self.given_away = self.given_away.with(self.live.without(self.durable));
        self.live = self.durable;
        self.data = self.data.and(self.durable);
        self.ops.clear();
    }
}

impl Op {
    fn blocks(&self) -> Blocks {
        match self.task {
            Task::Unplug { blocks, .. } | Task::Plug { blocks, .. } => blocks,
        }
    }

    fn changed(&self) -> Blocks {
        let changed = self.blocks().iter().zip(&self.statuses);
        changed
            .filter(|(_, status)| **status == RangeStatus::Ok)
            .fold(Blocks::NONE, |set, (block, _)| set.with(Blocks::one(block)))
    }
}
