// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The size negotiation under a model checker.
//!
//! ```text
//!   operators ──► ┌──────────────────────────┐ ◄── requests ─┬─ guest's driver (model, D-1 … D-15)
//!   time ───────► │ control::negotiation     │               │
//!                 │ (the daemon's own code)  │ ── answers ──►┘
//!                 └──────────┬───────────────┘
//!                            ▼ effects, as device::owner carries them out
//!                 pool (model: live map, durable map, whose a block is now)
//! ```
//!
//! The device's side is the state machine that the daemon runs, unchanged. Around it: a driver that follows the driver's
//! requirements of `protocol.md`, a pool that carries operations out in steps between which the daemon may die, two
//! operators, and whatever else goes wrong: kills, reboots into either driver, pauses, lost notifications, deadlines.
//! The checker walks every order in which these can happen, breadth first, within the [`Budget`] of a [`Scene`].
//!
//! # Safety and convergence
//!
//! Safety rules are looked at in every step. Convergence is a rule about ends: steps are either *disturbances*, of which a
//! scene allows a number, or *progress*. A state without a step of progress left is where some quiet run ended; there,
//! everybody must agree and no job may be left ([`World::disagreement`]). As the checker walks all orders, that covers every quiet
//! run from every state. A run that does not end is found by its length.
//!
//! # What it does not know
//!
//! Ranges (each block is one), more than one unanswered call of a driver (`vssd.ko` has one and a WAIT), sizes changing
//! (`total_blocks`, `min_blocks`), and queues other than the first. One assumption is built in: a running vSSD driver speaks within
//! [`SETTLE_MS`](vssd_backend::control::negotiation::SETTLE_MS) after its queue started.

#![forbid(unsafe_code)]

mod blocks;
mod check;
mod effects;
mod guest;
mod pool;
mod rules;
mod scene;
mod world;

pub use blocks::Blocks;
pub use check::{Outcome, check};
pub use rules::Rule;
pub use scene::{Budget, Kind, Sabotage, Scene, Wish};
pub use world::{Action, Which, World};
