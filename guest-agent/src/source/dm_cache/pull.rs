// SPDX-License-Identifier: Apache-2.0 OR MIT

//! When a cache asks for blocks back that the host has. Pure.
//!
//! It asks when it would make use of them: over the last interval it was full, brought in new blocks, and missed more than a share
//! of what was asked of it. Then it is quiet until it has missed less than a lower share in an interval, has another size, or [`AGAIN`] has
//! gone by. An interval in which its size or its table changed says nothing: it must become warm first.

use std::time::{Duration, Instant};

use super::text::{CacheStatus, Counters};
use crate::config::Percent;

/// What is looked at at a time.
const INTERVAL: Duration = Duration::from_secs(60);
/// A host that did not grant a wish is asked again after so long.
const AGAIN: Duration = Duration::from_secs(600);
/// Fewer requests in an interval are no reason for anything.
const LEAST_REQUESTS: u64 = 1000;
/// What is asked for: this part of what the cache has.
const STEP: u64 = 8;

#[derive(Debug)]
pub(super) struct Pull {
    above: Percent,
    until: Percent,
    begin: Option<Sample>,
    asked: Option<(Instant, u64)>,
    /// Requests that hit in the last whole interval.
    hits: Option<u64>,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    at: Instant,
    total: u64,
    counters: Counters,
}

impl Pull {
    pub(super) fn new(above: Percent, until: Percent) -> Self {
        Self { above, until, begin: None, asked: None, hits: None }
    }

    /// How many blocks that were asked for lately can at most be in the cache: each hit is one of one block. `None` before an interval is over.
    pub(super) fn recent_hits(&self) -> Option<u64> {
        self.hits
    }

    /// How many blocks of the cache to ask for now, if it could have `room` more.
    pub(super) fn want(&mut self, status: &CacheStatus, room: u64, now: Instant) -> Option<u64> {
        let sample = Sample { at: now, total: status.total, counters: status.counters };
        let Some(begin) = self.begin else {
            self.begin = Some(sample);
            return None;
        };
        let Some(seen) = since(&begin, &sample) else {
            self.begin = Some(sample);
            self.hits = None;
            return None;
        };
        if now.duration_since(begin.at) < INTERVAL {
            return None;
        }
        self.begin = Some(sample);
        self.hits = Some(seen.hits);
        let requests = seen.hits + seen.misses;
        let missed = |share: Percent| seen.misses * 100 > requests * u64::from(share.0);
        let is_quiet =
            self.asked.is_some_and(|(at, total)| now.duration_since(at) < AGAIN && total == status.total);
        if requests < LEAST_REQUESTS || !missed(self.until) {
            self.asked = None;
            return None;
        }
        let is_full = status.used >= status.total || seen.demotions > 0;
        if is_quiet || !missed(self.above) || !is_full || seen.promotions == 0 || room == 0 {
            return None;
        }
        self.asked = Some((now, status.total));
        Some((status.total / STEP).clamp(1, room))
    }
}

/// What happened between two samples of the same cache. The counters are of 32 bits and begin anew with a table.
fn since(begin: &Sample, end: &Sample) -> Option<Counters> {
    let (begin, end) = if begin.total == end.total { (begin.counters, end.counters) } else { return None };
    Some(Counters {
        hits: end.hits.checked_sub(begin.hits)?,
        misses: end.misses.checked_sub(begin.misses)?,
        demotions: end.demotions.checked_sub(begin.demotions)?,
        promotions: end.promotions.checked_sub(begin.promotions)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cache as it goes through minutes of requests.
    struct Cache {
        pull: Pull,
        start: Instant,
        minute: u32,
        status: CacheStatus,
    }

    impl Cache {
        fn new() -> Self {
            let pull = Pull::new(Percent(30), Percent(20));
            let status = CacheStatus { used: 800, total: 800, ..CacheStatus::default() };
            let mut cache = Self { pull, start: Instant::now(), minute: 0, status };
            assert_eq!(cache.pull.want(&cache.status, 500, cache.start), None, "nothing is known yet");
            cache
        }

        fn minute(&mut self, hits: u64, misses: u64, promotions: u64) -> Option<u64> {
            self.minute += 1;
            let counters = &mut self.status.counters;
            counters.hits += hits;
            counters.misses += misses;
            counters.promotions += promotions;
            self.pull.want(&self.status, 500, self.start + INTERVAL * self.minute)
        }
    }

    #[test]
    fn it_asks_once_when_a_larger_cache_would_be_used() {
        let mut cache = Cache::new();
        assert_eq!(cache.minute(6000, 4000, 50), Some(100));
        assert_eq!(cache.pull.recent_hits(), Some(6000));
        assert_eq!(cache.minute(6000, 4000, 50), None, "it has asked");
        for _ in 0..8 {
            assert_eq!(cache.minute(6000, 4000, 50), None);
        }
        assert_eq!(cache.minute(6000, 4000, 50), Some(100), "nobody answered for ten minutes");
        assert_eq!(cache.minute(7500, 2500, 50), None);
        assert_eq!(cache.minute(6000, 4000, 50), None, "between the marks nothing has changed");
        assert_eq!(cache.minute(8500, 1500, 50), None);
        assert_eq!(cache.minute(6000, 4000, 50), Some(100), "the lower mark was reached meanwhile");
    }

    #[test]
    fn it_does_not_ask_without_a_reason() {
        let mut cache = Cache::new();
        assert_eq!(cache.minute(8000, 2000, 50), None, "it hits");
        assert_eq!(cache.minute(100, 800, 50), None, "nobody asks much of it");
        assert_eq!(cache.minute(0, 9000, 0), None, "what is read is not worth to be brought in");
        cache.status.used = 700;
        assert_eq!(cache.minute(0, 9000, 50), None, "it is not full");
        cache.status.counters.demotions += 1;
        assert_eq!(cache.minute(0, 9000, 50), Some(100), "it makes room all the time");
        cache.status.total = 900;
        assert_eq!(cache.minute(0, 9000, 50), None, "it has another size");
        assert_eq!(cache.pull.recent_hits(), None);
        cache.status.used = 900;
        assert_eq!(cache.minute(0, 9000, 50), Some(112), "which was not enough");
        cache.status.counters.promotions = 0;
        assert_eq!(cache.minute(0, 9000, 0), None, "its table was loaded anew");
        assert_eq!(
            cache.pull.want(&cache.status, 500, cache.start + INTERVAL * cache.minute),
            None,
            "too soon"
        );
    }

    #[test]
    fn it_asks_for_no_more_than_it_could_have() {
        let mut cache = Cache::new();
        cache.status.counters = Counters { hits: 0, misses: 5000, demotions: 0, promotions: 9 };
        let later = cache.start + INTERVAL;
        assert_eq!(cache.pull.want(&cache.status, 0, later), None);
        cache.status.counters.misses += 5000;
        cache.status.counters.promotions += 1;
        assert_eq!(cache.pull.want(&cache.status, 7, later + INTERVAL), Some(7));
    }
}
