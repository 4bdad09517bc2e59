// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Throughput over time, what it was before a cut and when it is that again; and what a ledger has lost. Values only.

use crate::stats::median;

/// Full speed is this share of what it was before.
pub(super) const FULL: f64 = 0.9;
/// A single second is noise.
const WINDOW: usize = 5;

/// The rate of a second that ended then.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Point {
    /// Seconds after the cut; negative before it.
    pub(super) at: f64,
    pub(super) tps: f64,
}

/// The median of the last `count` seconds before the cut.
pub(super) fn before(points: &[Point], count: usize) -> f64 {
    let rates: Vec<f64> = points.iter().filter(|point| point.at <= 0.0).map(|point| point.tps).collect();
    median(&rates[rates.len().saturating_sub(count)..])
}

/// The end of the first second after `back` that reached full speed and began five whose median did; nothing as long as there is none.
pub(super) fn full_speed(points: &[Point], back: f64, before: f64) -> Option<f64> {
    let after: Vec<Point> = points.iter().filter(|point| point.at > back).copied().collect();
    after.windows(WINDOW).find_map(|window| {
        let rates: Vec<f64> = window.iter().map(|point| point.tps).collect();
        let enough = FULL * before;
        (rates[0] >= enough && median(&rates) >= enough).then(|| window[0].at)
    })
}

/// How many of the updates up to `acknowledged` are not there, if the first after the cut makes the ledger `next`. One that was made and
/// whose acknowledgement the cut took away is none.
pub(super) fn lost(acknowledged: u64, next: u64) -> u64 {
    (acknowledged + 1).saturating_sub(next)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ledger_that_goes_on_behind_the_last_acknowledged_update_has_lost_none() {
        assert_eq!([lost(41, 42), lost(41, 43)], [0, 0]);
        assert_eq!([lost(41, 41), lost(41, 1)], [1, 41], "made again");
    }

    fn points(from: f64, rates: &[f64]) -> Vec<Point> {
        (0u32..).map(f64::from).zip(rates).map(|(at, tps)| Point { at: from + at, tps: *tps }).collect()
    }

    #[test]
    fn before_the_cut_only_its_last_seconds_count() {
        let mut all = points(-5.0, &[1.0, 2.0, 100.0, 110.0, 90.0]);
        all.extend(points(1.0, &[7.0; 9]));
        assert_eq!(before(&all, 3), 100.0);
        assert_eq!(before(&[], 3), 0.0);
    }

    #[test]
    fn a_single_fast_second_is_not_full_speed() {
        let slow = points(6.0, &[95.0, 10.0, 20.0, 30.0, 95.0, 60.0]);
        assert_eq!(full_speed(&slow, 5.0, 100.0), None);
        let fast = points(6.0, &[95.0, 10.0, 20.0, 30.0, 91.0, 60.0, 99.0, 100.0, 95.0]);
        assert_eq!(full_speed(&fast, 5.0, 100.0), Some(10.0));
    }

    #[test]
    fn seconds_before_the_power_is_back_do_not_count() {
        let all = points(0.0, &[100.0; 12]);
        assert_eq!(full_speed(&all, 5.0, 100.0), Some(6.0));
        assert_eq!(full_speed(&all, 8.0, 100.0), None, "five seconds are needed");
    }
}
