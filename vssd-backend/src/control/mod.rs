// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Control of the vSSDs' sizes, and the sockets over which operators do it.
//!
//! ```text
//!   socket ► server (epoll) ► session (lines) ► verbs (JSON-RPC) ► device::owner ► negotiation (pure)
//!                 ▲                                                     │
//!                 └──────────── answers, events, changed jobs ──────────┘
//! ```
//!
//! * [`negotiation`] decides about one vSSD's size; it knows nothing of what is here.
//! * [`reclaim`] decides about what is wished of a guest that cannot negotiate; likewise.
//! * `verbs` knows the methods and their parameters, not who sends them.
//! * `session` knows one client's bytes, not what they mean.
//! * [`server`] alone knows sockets and waits.

pub mod clock;
pub mod events;
pub mod fault;
pub mod jobs;
pub mod negotiation;
pub mod reclaim;
pub mod server;
mod session;
#[cfg(test)]
pub(crate) mod testkit;
#[cfg(test)]
mod tests;
mod verbs;

pub use server::{Server, ServerError, ServerOptions};
