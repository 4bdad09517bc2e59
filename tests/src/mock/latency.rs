// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How long requests took, in little memory however many they are.

use std::time::Duration;

/// Parts of each power of two: a percentile is right to one in sixteen.
const PARTS: u32 = 16;
const BUCKETS: usize = 64 * PARTS as usize;

/// Counts of durations by size.
#[derive(Clone, Debug)]
pub struct Latency {
    counts: Vec<u64>,
    total: u64,
}

impl Default for Latency {
    fn default() -> Self {
        Self { counts: vec![0; BUCKETS], total: 0 }
    }
}

fn bucket(nanos: u64) -> usize {
    let nanos = nanos.max(u64::from(PARTS));
    let power = nanos.ilog2();
    let part = (nanos >> (power - PARTS.ilog2())) & u64::from(PARTS - 1);
    usize::try_from(u64::from(power * PARTS) + part).unwrap_or(BUCKETS - 1)
}

/// The smallest duration of a bucket.
fn start(bucket: usize) -> Duration {
    let (power, part) = (bucket as u64 / u64::from(PARTS), bucket as u64 % u64::from(PARTS));
    Duration::from_nanos((u64::from(PARTS) + part) << power.saturating_sub(u64::from(PARTS.ilog2())))
}

impl Latency {
    pub fn add(&mut self, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.counts[bucket(nanos)] += 1;
        self.total += 1;
    }

    /// Adds all that `other` counted.
    pub fn merge(&mut self, other: &Self) {
        self.counts.iter_mut().zip(&other.counts).for_each(|(count, other)| *count += other);
        self.total += other.total;
    }

    pub fn count(&self) -> u64 {
        self.total
    }

    /// What `percent` of all durations do not exceed by more than a bucket. Zero if there is none.
    pub fn percentile(&self, percent: u64) -> Duration {
        let mut left = (self.total * percent).div_ceil(100);
        for (bucket, count) in self.counts.iter().enumerate() {
            if left > 0 && *count >= left {
                return start(bucket);
            }
            left -= count;
        }
        Duration::ZERO
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_right_to_a_sixteenth() {
        let mut latency = Latency::default();
        assert_eq!(latency.percentile(99), Duration::ZERO);
        (1..=1000).for_each(|micros| latency.add(Duration::from_micros(micros)));
        for (percent, micros) in [(1, 10), (50, 500), (99, 990), (100, 1000)] {
            let (found, right) = (latency.percentile(percent), Duration::from_micros(micros));
            assert!(found <= right && found >= right * 15 / 16, "{percent}: {found:?}");
        }
    }
}
