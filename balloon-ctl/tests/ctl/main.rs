// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The built command against a scripted peer on a real socket: what it asks, what it prints, how it ends.

// Helpers of tests fail by panicking, as tests do.
#![expect(clippy::unwrap_used)]
// Values of a script are made where they are given.
#![expect(clippy::needless_pass_by_value)]

mod devices;
mod doctor;
mod failures;
mod fixtures;
mod offline;
mod peer;
mod pool_events;
mod reclaim;
mod resize;
mod server;
mod terminal;
