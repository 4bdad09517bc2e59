// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a resize would do, before it does anything: the one validation that dry runs and real ones share.

use vssd_protocol::control::{ErrorCode, OnTimeout};
use vssd_protocol::units::ByteCount;

use super::{Driver, Negotiation};

/// What an operator wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wish {
    /// Rounded up to whole blocks.
    pub to_bytes: u64,
    pub expected_bytes: Option<u64>,
    /// `None`: the policy's; 0: none.
    pub deadline_ms: Option<u64>,
    pub on_timeout: Option<OnTimeout>,
    pub force: bool,
}

/// How much of a disk's end holds no data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tail {
    /// Plugged blocks above the last one that holds data.
    pub free: u32,
    /// One past the last block that holds data.
    pub data_end: u32,
}

/// Who will move the blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Route {
    Nothing,
    HostGrow,
    /// The host takes blocks at the end of the disk that hold no data.
    HostTail,
    AskGuest,
    /// A driver that knows the guest channel is to come back.
    AwaitDriver,
    /// Which driver there is will be known in a moment.
    Settling,
    Force,
}

impl Route {
    pub(super) fn waits_for(self) -> &'static str {
        match self {
            Self::Nothing | Self::HostGrow | Self::HostTail | Self::Force => "",
            Self::AskGuest => "waiting for the guest to listen",
            Self::AwaitDriver => "waiting for a driver that can choose blocks",
            Self::Settling => "waiting to learn which driver the guest has",
        }
    }
}

/// A resize that may be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    pub from: u32,
    pub to: u32,
    pub route: Route,
    pub force: bool,
    pub deadline_ms: Option<u64>,
    pub on_timeout: OnTimeout,
    /// For people.
    pub text: String,
}

/// Why a resize may not be done. Nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("{} is below the minimum size of {}", ByteCount(*requested_bytes), ByteCount(*min_bytes))]
    BelowMin { requested_bytes: u64, min_bytes: u64 },
    #[error("{} is above the maximum size of {}", ByteCount(*requested_bytes), ByteCount(*max_bytes))]
    AboveMax { requested_bytes: u64, max_bytes: u64 },
    #[error("the requested size is {actual_bytes} bytes, not {expected_bytes} bytes: somebody changed it")]
    Conflict { expected_bytes: u64, actual_bytes: u64 },
    #[error(
        "the guest cannot choose blocks, and the disk holds data up to {} ({last_allocated_bytes} bytes)",
        ByteCount(*last_allocated_bytes)
    )]
    InUse { requested_bytes: u64, smallest_bytes: u64, last_allocated_bytes: u64 },
}

impl Refusal {
    pub fn code(self) -> ErrorCode {
        match self {
            Self::BelowMin { .. } => ErrorCode::BelowMin,
            Self::AboveMax { .. } => ErrorCode::AboveMax,
            Self::Conflict { .. } => ErrorCode::Conflict,
            Self::InUse { .. } => ErrorCode::InUse,
        }
    }

    pub fn hint(self) -> &'static str {
        match self {
            Self::BelowMin { .. } => "lower the minimum size first: balloon-ctl limits NAME --min SIZE",
            Self::AboveMax { .. } => "raise the maximum size first: balloon-ctl limits NAME --max SIZE",
            Self::Conflict { .. } => "look at the size again and decide anew",
            Self::InUse { .. } => {
                "trim unused space in the guest (fstrim), load the vSSD driver there, or use force and lose the data"
            }
        }
    }
}

impl Negotiation {
    /// What `wish` would do.
    pub fn plan(&self, wish: &Wish, tail: Tail) -> Result<Plan, Refusal> {
        let actual_bytes = self.bytes(self.requested);
        if let Some(expected_bytes) = wish.expected_bytes
            && expected_bytes != actual_bytes
        {
            return Err(Refusal::Conflict { expected_bytes, actual_bytes });
        }
        let requested_bytes = wish.to_bytes;
        let to = match self.block_size.blocks_for(requested_bytes) {
            Some(blocks) if blocks <= self.total => blocks,
            _ => return Err(Refusal::AboveMax { requested_bytes, max_bytes: self.bytes(self.total) }),
        };
        if to < self.min {
            return Err(Refusal::BelowMin { requested_bytes, min_bytes: self.bytes(self.min) });
        }
        let from = self.counts.plugged;
        let settling = matches!(self.driver, Driver::Settling { .. });
        let route = if to == from {
            Route::Nothing
        } else if to < from && wish.force {
            Route::Force
        } else if settling {
            Route::Settling
        } else if self.host_acts() {
            if to > from { Route::HostGrow } else { Route::HostTail }
        } else if self.session.is_some() {
            Route::AskGuest
        } else {
            Route::AwaitDriver
        };
        if route == Route::HostTail && from - to > tail.free {
            let smallest_bytes = self.bytes(from.saturating_sub(tail.free).max(self.min));
            let last_allocated_bytes = self.bytes(tail.data_end);
            return Err(Refusal::InUse { requested_bytes, smallest_bytes, last_allocated_bytes });
        }
        let deadline_ms = match wish.deadline_ms {
            Some(given) => Some(given),
            None if to < from => Some(self.policy.deadline_ms),
            None => None,
        };
        let mut plan = Plan {
            from,
            to,
            route,
            force: wish.force,
            deadline_ms: deadline_ms.filter(|ms| *ms > 0),
            on_timeout: wish.on_timeout.unwrap_or(self.policy.on_timeout),
            text: String::new(),
        };
        plan.text = self.describe(&plan, wish.to_bytes);
        Ok(plan)
    }

    /// A plan for a target that was pending when the daemon started; `deadline` is the time left for it, in
    /// milliseconds, and what happens then.
    pub fn plan_resumed(&self, deadline: Option<(u64, OnTimeout)>) -> Option<Plan> {
        let (from, to) = (self.counts.plugged, self.requested);
        if from == to {
            return None;
        }
        let route = if to > from { Route::HostGrow } else { Route::Settling };
        Some(Plan {
            from,
            to,
            route,
            force: false,
            deadline_ms: deadline.map(|(left_ms, _)| left_ms).filter(|_| to < from),
            on_timeout: deadline.map_or(self.policy.on_timeout, |(_, on_timeout)| on_timeout),
            text: String::new(),
        })
    }

    fn describe(&self, plan: &Plan, to_bytes: u64) -> String {
        let amount = ByteCount(self.bytes(plan.from.abs_diff(plan.to)));
        let mut text = match plan.route {
            Route::Nothing => "nothing to move: that much is plugged".to_owned(),
            Route::HostGrow => format!("the host plugs {amount} at once"),
            Route::HostTail => {
                format!("the host takes {amount} at the end of the disk, where no data is, at once")
            }
            Route::AskGuest if plan.to > plan.from => format!("the guest is offered {amount}"),
            Route::AskGuest => format!("the guest is asked to give {amount} of blocks that it chooses"),
            Route::AwaitDriver => format!("{amount} move once the guest's vSSD driver is back"),
            Route::Settling => format!("{amount} move once it is known which driver the guest has"),
            Route::Force => {
                let which =
                    if self.last_was_vssd { "empty blocks first" } else { "from the end of the disk" };
                format!("the host takes {amount} without asking, {which}; data in them is lost")
            }
        };
        if let Some(ms) = plan.deadline_ms
            && matches!(plan.route, Route::AskGuest | Route::AwaitDriver | Route::Settling)
        {
            let then = match plan.on_timeout {
                OnTimeout::Wait => "the job ends, the guest is still asked",
                OnTimeout::Fail => "the request is withdrawn",
                OnTimeout::Force if plan.to > plan.from => "the job ends, the guest is still offered them",
                OnTimeout::Force => "the host takes what is missing, and data in it is lost",
            };
            text += &format!("; after {ms} ms {then}");
        }
        let rounded = self.bytes(plan.to);
        if rounded != to_bytes {
            text += &format!("; rounded up to {rounded} bytes, whole blocks of {}", self.block_size);
        }
        text
    }
}
