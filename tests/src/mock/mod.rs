// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A front-end and a guest's driver in one process: vhost-user sockets, rings in shared memory, block requests and the
//! guest channel, without a virtual machine. Everything can also be done wrong on purpose.
//!
//! ```text
//!   Operator ── JSON-RPC ──► daemon ◄── vhost-user ── Frontend ◄── Machine ── GuestRam (memfd)
//!                               ▲                                     │ rings, inflight region
//!                               └───────── kick, call ────────────────┴── Queue ◄── Driver, Load
//! ```
//!
//! A [`machine::Machine`] keeps what a guest and its monitor keep while the daemon is away: memory, rings, the inflight
//! region. A [`queue::Queue`] speaks virtio-blk, a [`driver::Driver`] the guest channel on top of one; a [`load::Load`] runs
//! I/O on queues and knows what every sector must hold.
//!
//! None of this shares code with the daemon, but for the codec of the guest channel.

pub mod arena;
pub mod driver;
pub mod follower;
pub mod frontend;
pub mod honest;
pub mod latency;
pub mod load;
pub mod machine;
pub mod media;
pub mod neighbour;
pub mod operator;
pub mod probe;
pub mod queue;
pub mod ram;
pub mod ring;
pub mod scene;
pub mod site;
pub mod tenant;
pub mod trace;

use std::env;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rand::SeedableRng;
use rand::rngs::StdRng;

/// How long a working daemon may take for anything on a busy machine. Only a hang takes longer.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Overrides the seed of randomised tests.
pub const SEED_ENV: &str = "VSSD_SEED";

/// The seed of a randomised test: from [`SEED_ENV`], else another each time. Printed, so that a failure can be replayed.
pub fn seed(test: &str) -> u64 {
    let given = env::var(SEED_ENV).ok().and_then(|text| text.trim().parse().ok());
    let seed = given.unwrap_or_else(|| {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        now.as_secs() << 20 | u64::from(now.subsec_micros())
    });
    println!("{test}: {SEED_ENV}={seed}");
    seed
}

/// The generator for a seed.
pub fn rng(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}
