// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Serves the vSSDs of one pool.
//!
//! ```text
//!   data:    vring ► vhost_user::worker ► device::request ► device::execute ► vssd_pool::Lane ► status ► used ring
//!   control: socket ► control::server ► control::negotiation (pure) ► device::owner ► effects ► {pool, notify, reply}
//! ```
//!
//! * [`vhost_user`] alone knows vhost and virtio types, eventfds and guest memory.
//! * [`device`] is a block device in plain words: requests, segments, events.
//! * [`nursery`] starts threads, [`sandbox`] takes away from the process what it does not need for this.
//! * [`control`] alone knows the control sockets and decides about sizes.

pub mod config;
pub mod control;
pub mod daemon;
pub mod device;
pub mod nursery;
pub mod pool_command;
pub mod sandbox;
pub mod vhost_user;
