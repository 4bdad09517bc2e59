// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a search begins with, and how much may go wrong in it.

use std::fmt;

use vssd_protocol::control::{OnTimeout, PullPolicy};

use crate::blocks::Blocks;

/// A guest's driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// One that does not know the guest channel.
    Stock,
    Vssd,
}

/// A resize that an operator may order, any number of times within the budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Wish {
    pub to: u32,
    pub deadline_ms: Option<u64>,
    pub on_timeout: OnTimeout,
    pub force: bool,
}

impl Wish {
    /// A resize without a deadline.
    pub const fn to(to: u32) -> Self {
        Self { to, deadline_ms: Some(0), on_timeout: OnTimeout::Wait, force: false }
    }

    #[must_use]
    pub const fn within(self, deadline_ms: u64, on_timeout: OnTimeout) -> Self {
        Self { deadline_ms: Some(deadline_ms), on_timeout, ..self }
    }

    #[must_use]
    pub const fn forced(self) -> Self {
        Self { force: true, ..self }
    }
}

/// How often each disturbance may happen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Budget {
    /// Resizes of either operator, and cancellations.
    pub orders: u8,
    /// The daemon is killed.
    pub kills: u8,
    /// The guest resets into another driver, or the same one.
    pub reboots: u8,
    /// The front-end goes, and comes back with the guest in another state.
    pub power_offs: u8,
    /// The connection breaks, the guest goes on.
    pub hang_ups: u8,
    /// The VM is stopped and goes on.
    pub pauses: u8,
    /// An answer to WAIT is not noticed.
    pub lost: u8,
    /// The guest gives a block it was not asked for.
    pub gifts: u8,
    pub pulls: u8,
    pub writes: u8,
    pub pool_failures: u8,
}

impl Budget {
    pub const NONE: Self = Self {
        orders: 0,
        kills: 0,
        reboots: 0,
        power_offs: 0,
        hang_ups: 0,
        pauses: 0,
        lost: 0,
        gifts: 0,
        pulls: 0,
        writes: 0,
        pool_failures: 0,
    };
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bounds = [
            (self.orders, "orders"),
            (self.kills, "kills"),
            (self.reboots, "reboots"),
            (self.power_offs, "power-offs"),
            (self.hang_ups, "hang-ups"),
            (self.pauses, "pauses"),
            (self.lost, "lost news"),
            (self.gifts, "gifts"),
            (self.pulls, "pulls"),
            (self.writes, "writes"),
            (self.pool_failures, "pool failures"),
        ];
        let told: Vec<String> =
            bounds.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{what} {n}")).collect();
        f.write_str(&told.join(", "))
    }
}

/// A defect put in on purpose: the checker must find it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sabotage {
    /// The pool answers, and frees, before its journal has it.
    AnswerBeforeJournal,
    /// Requests of an ended session are carried out.
    EpochUnchecked,
    /// A WAIT stays where it is when its queue stops.
    WaitKeptOnStop,
    /// The device keeps its news to itself.
    NewsDropped,
    /// A lowered target is not stored.
    TargetNotStored,
    /// A resize that was under way is not taken up again by the next daemon.
    NotResumed,
    /// The host does not look whether a block of the end holds data.
    TakesData,
}

/// Where a search begins.
#[derive(Clone, Copy, Debug)]
pub struct Scene {
    pub name: &'static str,
    pub total: u32,
    pub min: u32,
    pub plugged: Blocks,
    /// Blocks that hold data.
    pub data: Blocks,
    /// Blocks that the guest would give up.
    pub willing: Blocks,
    pub driver: Kind,
    /// What the guest may reboot into.
    pub reboots_into: &'static [Kind],
    pub pull: PullPolicy,
    pub wishes: &'static [Wish],
    pub budget: Budget,
    pub sabotage: Option<Sabotage>,
}

impl Scene {
    /// Four blocks, three plugged, a willing vSSD driver.
    pub const BASE: Self = Self {
        name: "base",
        total: 4,
        min: 1,
        plugged: Blocks::first(3),
        data: Blocks::of(0b0001),
        willing: Blocks::of(0b1111),
        driver: Kind::Vssd,
        reboots_into: &[Kind::Vssd, Kind::Stock],
        pull: PullPolicy::Grant,
        wishes: &[Wish::to(1), Wish::to(4)],
        budget: Budget { orders: 2, ..Budget::NONE },
        sabotage: None,
    };
}
