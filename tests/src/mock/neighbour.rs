// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Another tenant, who must not notice what happens to the first.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Result, anyhow, ensure};

use super::load::{Load, Profile};
use super::machine::Options;
use super::site::{BLOCK, MIB, Site};

const SIZE: u64 = 32 * MIB;

/// A second vSSD under verified I/O for as long as the test runs.
#[derive(Debug)]
pub struct Neighbour {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<u64>>,
}

impl Neighbour {
    /// Makes the vSSD `neighbour` and begins.
    pub fn start(site: &mut Site) -> Result<Self> {
        let mut machine = site.machine("neighbour", SIZE, Options::default())?;
        let queues = vec![machine.take_queue(0)?, machine.take_queue(1)?];
        let unit = machine.logical_block()?.into();
        let profile = Profile { bytes: 0..SIZE, unit, block: BLOCK, depth: 4, zeroing: true, tables: true };
        let mut load = Load::new(queues, profile, super::seed("neighbour"))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                load.run(20)?;
                thread::sleep(Duration::from_millis(1));
            }
            load.verify()?;
            machine.disconnect();
            Ok(load.counts.reads + load.counts.writes)
        });
        Ok(Self { stop, thread })
    }

    /// Its I/O must still be going on.
    pub fn end(self) -> Result<()> {
        ensure!(!self.thread.is_finished(), "the neighbour's I/O has stopped");
        self.stop.store(true, Ordering::Relaxed);
        let requests = self.thread.join().map_err(|_| anyhow!("the neighbour panicked"))??;
        ensure!(requests > 0, "the neighbour did nothing");
        println!("the neighbour did {requests} verified requests meanwhile");
        Ok(())
    }
}
