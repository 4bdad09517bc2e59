// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What runs gave. One during which other programs used more than [`FOREIGN_LIMIT`] of a processor is repeated, at most
//! [`REPEATS`] times; if none was quiet the quietest counts, and the result says so.

use anyhow::{Context, Result};
use serde::Serialize;

use crate::client::Tally;
use crate::meter::Usage;
use crate::stats::{median, spread};

/// Processors that others may use during a run.
pub const FOREIGN_LIMIT: f64 = 0.15;
/// How often a disturbed run is made again.
pub const REPEATS: usize = 3;
/// What one run gave.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Sample {
    pub iops: f64,
    pub bytes_per_second: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    /// Processors that the backend kept busy.
    pub backend_cores: f64,
    /// Processors that other programs kept busy.
    pub foreign_cores: f64,
    /// Flushes of the disk a second.
    pub media_flushes: f64,
}

impl Sample {
    /// The figures of one session.
    #[allow(clippy::cast_precision_loss, reason = "figures for people")]
    pub fn of(tally: &Tally) -> Self {
        let us = |quantile| tally.latencies.value_at_quantile(quantile) as f64 / 1e3;
        Self {
            iops: tally.iops(),
            bytes_per_second: tally.bytes_per_second(),
            p50_us: us(0.5),
            p99_us: us(0.99),
            ..Self::default()
        }
    }

    /// All sessions together; no latencies.
    pub fn sum(tallies: &[Tally]) -> Self {
        let mut sum = tallies.first().map(Self::of).unwrap_or_default();
        sum.iops = tallies.iter().map(Tally::iops).sum();
        sum.bytes_per_second = tallies.iter().map(Tally::bytes_per_second).sum();
        sum
    }

    /// Adds what it cost.
    #[must_use]
    pub fn with(self, usage: Usage) -> Self {
        Self {
            backend_cores: usage.backend_cores,
            foreign_cores: usage.foreign_cores,
            media_flushes: usage.media_flushes,
            ..self
        }
    }

    pub fn iops_per_core(&self) -> f64 {
        if self.backend_cores > 0.0 { self.iops / self.backend_cores } else { 0.0 }
    }
}

/// All runs of one contender in one case.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Series {
    pub samples: Vec<Sample>,
    /// Runs made again because others used the machine.
    pub repeated: usize,
}

impl Series {
    pub fn median(&self) -> Sample {
        let of = |figure: fn(&Sample) -> f64| median(&self.samples.iter().map(figure).collect::<Vec<_>>());
        Sample {
            iops: of(|s| s.iops),
            bytes_per_second: of(|s| s.bytes_per_second),
            p50_us: of(|s| s.p50_us),
            p99_us: of(|s| s.p99_us),
            backend_cores: of(|s| s.backend_cores),
            foreign_cores: of(|s| s.foreign_cores),
            media_flushes: of(|s| s.media_flushes),
        }
    }

    /// Runs that count although others used the machine.
    pub fn disturbed(&self) -> usize {
        self.samples.iter().filter(|sample| sample.foreign_cores > FOREIGN_LIMIT).count()
    }

    pub fn spread(&self) -> f64 {
        spread(&self.samples.iter().map(|s| s.iops).collect::<Vec<_>>())
    }

    /// Makes a run, again if it was disturbed, and keeps the best.
    pub fn add(&mut self, mut run: impl FnMut() -> Result<Sample>) -> Result<()> {
        let mut best: Option<Sample> = None;
        for attempt in 0..=REPEATS {
            let sample = run()?;
            self.repeated += usize::from(attempt > 0);
            if best.is_none_or(|best| sample.foreign_cores < best.foreign_cores) {
                best = Some(sample);
            }
            if sample.foreign_cores <= FOREIGN_LIMIT {
                break;
            }
        }
        self.samples.push(best.context("no run was made")?);
        Ok(())
    }
}
