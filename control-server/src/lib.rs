// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the daemons' control sockets have in common, so that whoever knows one knows the others: lines of JSON-RPC, errors with
//! stable codes, clients of which a bounded amount is kept, a log of events.
//!
//! ```text
//!   socket ─► Session (bounded lines) ─► rpc::parse ─► Call ─► the daemon's own verbs
//!   socket ◄─ Session ◄─────────────────────────────── rpc::success | failure ◄─┘
//!                └◄─ Entry ◄─ EventLog ◄─ what happened
//! ```
//!
//! Knows no method but those that every daemon has, and not what a daemon does. Who waits, and for what, is the daemon's
//! choice: nothing here blocks or starts a thread but [`blocking`], for daemons that want just that.

#![deny(unsafe_code)]

mod bind;
pub mod blocking;
pub mod clock;
pub mod events;
mod fault;
mod peer;
pub mod rpc;
mod session;

pub use bind::{bind, group_id};
pub use clock::Clock;
pub use events::{About, Entry, EventLog};
pub use fault::Fault;
pub use peer::{Peer, peer_of};
pub use rpc::{Call, Door};
pub use session::{Input, Session};
