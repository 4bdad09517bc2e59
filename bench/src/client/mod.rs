// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The client: the public `virtio-driver` crate on a vhost-user socket, which knows neither backend.
//!
//! [`session`]: a connection with its queues and buffers. [`load`]: which requests are made. [`mod@drive`]: one thread makes them on
//! any number of sessions, asleep or looking while there is nothing to collect.

pub mod drive;
pub mod load;
pub mod session;

pub use drive::{Tally, Timing, Waiting, drive};
pub use load::{Addresses, Kind, Load};
pub use session::Session;
