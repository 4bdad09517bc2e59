// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The vhost-user side: sockets, guest memory, rings, and the threads that serve them.
//!
//! ```text
//!   frontends ── a thread a front-end ─► session (vhost messages) ──► commands ──► worker (queues) ──► device::execute
//!                                          │ backend channel: config changes          ▲ mailbox: guest-channel replies
//! ```
//!
//! * [`frontends`]: opens and closes the sockets, one thread for each socket and each connection.
//! * [`session`]: one connection's life, the handler of vhost-user messages. [`seat`]: which connection may run the rings.
//! * [`backend_channel`]: the descriptor for messages to the front-end, and how it is reached.
//! * [`worker`]: a fixed pool of threads; each owns its queues, an epoll set and a pool lane. [`poller`]: how long it looks
//!   for work before it sleeps. [`mailbox`]: how it is told what to do.
//! * [`queue`] ► [`ring`] ► [`dirty_log`] ► [`chain`] ► [`table`] ► [`memory`], and [`inflight`]: what a worker works with.
//! * [`sigbus`]: what becomes of memory that a front-end shares and takes away again.
//!
//! Nothing outside this module knows vhost, rings or guest addresses; nothing here knows blocks or sizes.
//!
//! The split ring is walked here and not by `virtio-queue`: replaying the requests that a crashed daemon left behind
//! needs a chain made from its head alone, for their slots of the avail ring may be long overwritten, and that crate
//! makes chains only from the avail ring. (It also signals drivers that asked for silence, and cannot batch used entries.)

pub mod backend_channel;
pub mod chain;
pub mod dirty_log;
pub mod frontends;
pub mod inflight;
pub mod mailbox;
pub mod memory;
pub mod poller;
pub mod queue;
pub mod ring;
pub mod seat;
pub mod session;
pub mod sigbus;
mod sync;
pub mod table;
pub mod worker;
