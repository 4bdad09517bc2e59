// SPDX-License-Identifier: Apache-2.0 OR MIT

//! When a file system asks for blocks back that the host has. Pure.
//!
//! Two marks keep it from asking all the time: it asks when less than `below` is free, for as much as makes `until` free, and
//! then not again before so much is free or [`AGAIN`] has gone by.

use std::time::{Duration, Instant};

use crate::config::Share;

/// A host that did not grant a wish is asked again after so long.
const AGAIN: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub(super) struct Pull {
    below: Share,
    until: Share,
    asked: Option<Instant>,
}

/// How it stands with the file system.
#[derive(Clone, Copy, Debug)]
pub(super) struct Need {
    /// Bytes of the file system, what has gone of it included.
    pub(super) size: u64,
    pub(super) free: u64,
    pub(super) block_size: u64,
    pub(super) evicted_blocks: u32,
}

impl Pull {
    pub(super) fn new(below: Share, until: Share) -> Self {
        Self { below, until, asked: None }
    }

    /// How many blocks to ask for now.
    pub(super) fn want(&mut self, need: Need, now: Instant) -> Option<u32> {
        let until = self.until.bytes(need.size);
        if need.free >= until {
            self.asked = None;
        }
        let is_quiet = self.asked.is_some_and(|asked| now.duration_since(asked) < AGAIN);
        if need.free >= self.below.bytes(need.size) || need.evicted_blocks == 0 || is_quiet {
            return None;
        }
        self.asked = Some(now);
        let blocks = until.saturating_sub(need.free).div_ceil(need.block_size);
        Some(u32::try_from(blocks).unwrap_or(u32::MAX).clamp(1, need.evicted_blocks))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn need(free: u64, evicted_blocks: u32) -> Need {
        Need { size: 1000 << 20, free: free << 20, block_size: 1 << 20, evicted_blocks }
    }

    #[test]
    fn it_asks_once_and_for_what_brings_it_to_the_upper_mark() {
        let mut pull = Pull::new(Share::Percent(3), Share::Percent(8));
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(pull.want(need(30, 500), at(0)), None);
        assert_eq!(pull.want(need(29, 500), at(1)), Some(51));
        assert_eq!(pull.want(need(5, 500), at(2)), None, "it has asked");
        assert_eq!(pull.want(need(5, 500), at(61)), Some(75), "nobody answered");
        assert_eq!(pull.want(need(40, 440), at(62)), None);
        assert_eq!(pull.want(need(20, 440), at(63)), None, "between the marks nothing has changed");
        assert_eq!(pull.want(need(80, 400), at(64)), None);
        assert_eq!(pull.want(need(20, 400), at(65)), Some(60), "the upper mark was reached meanwhile");
    }

    #[test]
    fn it_asks_for_no_more_than_has_gone() {
        let mut pull = Pull::new(Share::Bytes(64 << 20), Share::Bytes(128 << 20));
        assert_eq!(pull.want(need(0, 0), Instant::now()), None);
        assert_eq!(pull.want(need(0, 7), Instant::now()), Some(7));
        let mut odd = Pull::new(Share::Percent(8), Share::Percent(3));
        assert_eq!(odd.want(need(50, 7), Instant::now()), Some(1), "marks the wrong way round do no harm");
    }
}
