// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Control of the vSSDs' sizes, and the sockets over which operators do it.
//!
//! ```text
//!   socket ► server (epoll) ► Session (lines) ► verbs (calls) ► device::owner ► negotiation (pure)
//!                 ▲                                                  │
//!                 └─────────── answers, events, changed jobs ────────┘
//! ```
//!
//! * [`negotiation`] decides about one vSSD's size; it knows nothing of what is here.
//! * [`reclaim`] decides about what is wished of a guest that cannot negotiate; likewise.
//! * `verbs` knows the methods and their parameters, not who sends them.
//! * [`control_server`] has what all daemons' control sockets share: a client's bytes, JSON-RPC, the log of events.
//! * [`server`] alone knows sockets and waits.

pub mod fault;
pub mod jobs;
pub mod negotiation;
pub mod reclaim;
pub mod server;
#[cfg(test)]
mod sync_tests;
#[cfg(test)]
pub(crate) mod testkit;
#[cfg(test)]
mod tests;
mod verbs;

pub use server::{Server, ServerError, ServerOptions};
