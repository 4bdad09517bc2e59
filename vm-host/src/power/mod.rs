// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Power: what tells of a failure, and what follows from it. Knows nothing of VMs, of NV-RAM, or of operators' sockets.
//!
//! ```text
//!   sources::nut     ─┐                                                      ┌─► PreArm, DisArm
//!   sources::logind  ─┤  Observation                                         ├─► SaveAll { ticket, reason, deadline }
//!   sources::uevent  ─┼──────────────►  host's loop  ──►  state::Machine  ───┼─► ResumeAll { ticket }
//!   sources::signal  ─┤   (channel)       ▲    ▲            (pure)           ├─► AllowShutdown ──► Monitor::allow_shutdown
//!   sources::edge    ─┘                   │    │               ▲             └─► Event
//!      ▲ Monitor::pretend                 │    └ wake_at_ms ───┘ needed_ms
//!                    SaveFinished, ResumeFinished              │
//!                                                 budget::Budget::plan (pure)
//! ```
//!
//! Each source is a thread that says what is the case at its end. The host has one loop, which gives observations, the ends of its own
//! saves and resumes, and the passing of time to [`Machine::apply`], and does what comes out of it. Nothing else decides.
//!
//! What the host does, in full:
//!
//! 1. In `main`, before any thread: [`block_signals`], where SIGPWR is a source.
//! 2. [`Monitor::start`]. When it returns, a planned shutdown waits for us.
//! 3. `Machine::new(config.policy(plan.needed_ms()), &config.roles(), now)`.
//! 4. Wait for an observation (or the eventfd of [`Monitor::start_notifying`]), an answer, or [`Machine::wake_at_ms`]; apply it.
//! 5. When VMs come, go or were measured: [`Budget::plan`], [`Machine::set_needed`], `apply(Input::Time)`. Before one comes:
//!    [`Budget::admits`].

pub mod budget;
pub mod config;
mod monitor;
pub mod observation;
pub mod sources;
pub mod state;

pub use budget::{Budget, Plan, Refusal};
pub use config::{ConfigError, PowerConfig, SourceConfig};
pub use monitor::{Monitor, Pretended, StartError};
pub use observation::{Kind, Observation, Role, SourceId};
pub use sources::Health;
pub use sources::signal::block as block_signals;
pub use state::{Effect, Event, Input, Machine, Policy, Reason, State, Supplies, Ticket, View};
