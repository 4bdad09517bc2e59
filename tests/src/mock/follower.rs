// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest that follows the host's wishes in the background.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Result, anyhow};
use vssd_protocol::units::BlockRange;

use super::driver::Driver;

/// Ranges in one message: few, so that a resize takes many.
const BATCH: usize = 8;
/// How long it listens at a time.
const HEARS: Duration = Duration::from_millis(20);

/// A guest that follows the host's wishes with blocks of its upper half, through every crash.
#[derive(Debug)]
pub struct Follower {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Driver>>,
}

/// Blocks of the upper half, one by one and no two neighbours as long as there are others, so that a resize takes many
/// messages.
fn upper_half(driver: &Driver, count: u32) -> Vec<BlockRange> {
    let first = driver.hello.total_blocks / 2;
    let half = |odd: u32| driver.present().filter(move |block| *block >= first && block % 2 == odd);
    half(0).chain(half(1)).take(count as usize).map(|block| BlockRange::new(block, 1)).collect()
}

impl Follower {
    pub fn start(mut driver: Driver) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        driver.batch = BATCH;
        driver.device_may_crash = true;
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                driver.live(&mut upper_half, HEARS)?;
            }
            // What came since.
            driver.live(&mut upper_half, HEARS)?;
            Ok(driver)
        });
        Self { stop, thread }
    }

    /// Whether it goes on; [`Follower::end`] says why not.
    pub fn is_well(&self) -> bool {
        !self.thread.is_finished()
    }

    pub fn end(self) -> Result<Driver> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("the driver panicked"))?
    }
}
