// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Another tenant, who must not notice what happens to the first.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};

use super::load::{Load, Profile};
use super::machine::{Machine, Options};
use super::queue::{Queue, S_OK};
use super::site::{BLOCK, MIB, Site};

const SIZE: u64 = 32 * MIB;
/// The part at the end of the disk in which single requests are timed.
const TIMED: u64 = MIB;
const TIMED_LEN: usize = 4096;
/// Percentiles are taken of windows this long.
pub const WINDOW: Duration = Duration::from_millis(100);

/// From one moment to another.
pub type Span = (Instant, Instant);

type Times = Arc<Mutex<Vec<(Instant, Duration)>>>;

/// A second vSSD under verified I/O for as long as the test runs.
#[derive(Debug)]
pub struct Neighbour {
    stop: Arc<AtomicBool>,
    threads: [JoinHandle<Result<u64>>; 2],
    times: Times,
    /// Keeps the connection open.
    _machine: Machine,
}

impl Neighbour {
    /// Makes the vSSD `neighbour` and begins.
    pub fn start(site: &mut Site) -> Result<Self> {
        let mut machine = site.machine("neighbour", SIZE, Options::default())?;
        let (loaded, timed) = (machine.take_queue(0)?, machine.take_queue(1)?);
        let unit = machine.logical_block()?.into();
        let bytes = 0..SIZE - TIMED;
        let profile = Profile { bytes, unit, block: BLOCK, depth: 4, zeroing: true, tables: true };
        let mut load = Load::new(vec![loaded], profile, super::seed("neighbour"))?;
        let stop = Arc::new(AtomicBool::new(false));
        let times = Times::default();
        let timing = {
            let (times, stopped) = (Arc::clone(&times), Arc::clone(&stop));
            thread::spawn(move || time_requests(timed, &times, &stopped))
        };
        let stopped = Arc::clone(&stop);
        let loading = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                load.run(10)?;
                thread::sleep(Duration::from_millis(2));
            }
            load.verify()?;
            Ok(load.counts.reads + load.counts.writes)
        });
        Ok(Self { stop, threads: [timing, loading], times, _machine: machine })
    }

    /// The 99th percentile of single requests in these spans of time: the median of those of their windows. `None` if no span
    /// has a whole window.
    pub fn p99(&self, spans: &[Span]) -> Option<Duration> {
        let times = self.times.lock().unwrap_or_else(PoisonError::into_inner);
        let mut windows = Vec::new();
        for (from, to) in spans {
            let mut begin = *from;
            while begin + WINDOW <= *to {
                windows.push(p99_of(&times, begin));
                begin += WINDOW;
            }
        }
        windows.sort_unstable();
        windows.get(windows.len() / 2).copied()
    }

    /// Its I/O must still be going on.
    pub fn end(self) -> Result<()> {
        let stopped = self.threads.iter().any(JoinHandle::is_finished);
        self.stop.store(true, Ordering::Relaxed);
        let mut requests = 0;
        for thread in self.threads {
            requests += thread.join().map_err(|_| anyhow!("the neighbour panicked"))??;
        }
        ensure!(!stopped, "the neighbour's I/O has stopped");
        ensure!(requests > 0, "the neighbour did nothing");
        println!("the neighbour did {requests} verified requests meanwhile");
        Ok(())
    }
}

/// The 99th percentile of the requests begun in the window at `begin`. They are in the order in which they began.
fn p99_of(times: &[(Instant, Duration)], begin: Instant) -> Duration {
    let first = times.partition_point(|(at, _)| *at < begin);
    let end = times.partition_point(|(at, _)| *at < begin + WINDOW);
    let mut window: Vec<Duration> = times[first..end].iter().map(|(_, time)| *time).collect();
    window.sort_unstable();
    // Fewer than a hundred answers in a window: the slowest counts, however slow.
    window.get(window.len().saturating_sub(1 + window.len() / 100)).copied().unwrap_or(WINDOW)
}

/// Writes and reads back one small piece after the other.
fn time_requests(mut queue: Queue, times: &Times, stop: &AtomicBool) -> Result<u64> {
    let mut count = 0u64;
    while !stop.load(Ordering::Relaxed) {
        let at = SIZE - TIMED + count % (TIMED / 4096) * 4096;
        let bytes = count.to_le_bytes().repeat(TIMED_LEN / 8);
        let begin = Instant::now();
        ensure!(queue.write(at, &bytes)? == S_OK, "write at {at:#x}");
        let between = Instant::now();
        ensure!(queue.read(at, TIMED_LEN)? == Ok(bytes), "wrong data at {at:#x}");
        let mut times = times.lock().unwrap_or_else(PoisonError::into_inner);
        times.extend([(begin, between - begin), (between, between.elapsed())]);
        drop(times);
        count += 1;
        thread::sleep(Duration::from_micros(500));
    }
    Ok(2 * count)
}
