// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Which blocks: where the negotiation counts, this module names.
//!
//! It reads a vSSD's map, which the pool may change meanwhile; the pool judges every range again.

use vssd_pool::Vssd;
use vssd_protocol::guest::MAX_RANGES;
use vssd_protocol::units::{BlockIndex, BlockRange};

use crate::control::negotiation::{Pick, Tail};

/// One operation of the host moves no more ranges than one of a guest, so that nobody waits long behind it.
const MAX_PICKED: usize = MAX_RANGES as usize;

/// Blocks that the host is to take.
#[derive(Debug, Default)]
pub(super) struct Picked {
    pub(super) ranges: Vec<BlockRange>,
    pub(super) with_data: u32,
}

/// One past the highest plugged block below `high`.
pub(super) fn end(vssd: &Vssd, high: u32) -> u32 {
    let high = high.min(vssd.total_blocks());
    (0..high).rev().find(|block| vssd.is_plugged(BlockIndex(*block))).map_or(0, |block| block + 1)
}

/// How much could go at the end without loss.
pub(super) fn tail(vssd: &Vssd) -> Tail {
    let data_end = vssd.last_allocated_block().map_or(0, |block| block.0.saturating_add(1));
    let free = runs(vssd, data_end, false).iter().fold(0u32, |sum, run| sum.saturating_add(run.count));
    Tail { free, data_end }
}

/// At most `room` runs of plugged blocks from `start` on, and where to go on.
pub(super) fn state(vssd: &Vssd, start: u32, empty_only: bool, room: usize) -> (u32, Vec<BlockRange>) {
    let total = vssd.total_blocks();
    let mut ranges = Vec::new();
    if start >= total {
        return (total, ranges);
    }
    if room == 0 {
        return (start, ranges);
    }
    let next = vssd.plugged_ranges(BlockIndex(start), empty_only, room, &mut ranges);
    (next.map_or(total, |block| block.0), ranges)
}

/// Up to `blocks` plugged blocks that the host takes.
pub(super) fn to_take(vssd: &Vssd, blocks: u32, pick: Pick) -> Picked {
    let plugged = runs(vssd, 0, false);
    let empty = runs(vssd, 0, true);
    let mut ranges = Vec::new();
    match pick {
        Pick::Tail { data: false } if blocks > tail(vssd).free => return Picked::default(),
        Pick::Tail { .. } => {
            take_highest(plugged, blocks, &mut ranges);
        }
        Pick::LeastHarm => {
            let with_data = difference(&plugged, &empty);
            let left = take_highest(empty.clone(), blocks, &mut ranges);
            take_highest(with_data, left, &mut ranges);
        }
    }
    ranges.sort_unstable();
    let with_data = difference(&ranges, &empty).iter().map(|run| run.count).sum();
    Picked { ranges, with_data }
}

/// All runs of unplugged blocks from `start` on, ascending.
pub(super) fn gaps(vssd: &Vssd, start: u32) -> Vec<BlockRange> {
    let all = [BlockRange::new(start, vssd.total_blocks().saturating_sub(start))];
    difference(&all, &runs(vssd, start, false))
}

/// The lowest `blocks` unplugged blocks.
pub(super) fn to_give(vssd: &Vssd, blocks: u32) -> Vec<BlockRange> {
    let mut left = blocks;
    let mut ranges = Vec::new();
    for gap in gaps(vssd, 0) {
        if left == 0 || ranges.len() == MAX_PICKED {
            break;
        }
        let count = gap.count.min(left);
        ranges.push(BlockRange::new(gap.start, count));
        left -= count;
    }
    ranges
}

/// All runs of plugged blocks from `start` on, ascending.
fn runs(vssd: &Vssd, start: u32, empty_only: bool) -> Vec<BlockRange> {
    let mut ranges = Vec::new();
    let mut next = (start < vssd.total_blocks()).then_some(BlockIndex(start));
    while let Some(at) = next {
        next = vssd.plugged_ranges(at, empty_only, MAX_PICKED, &mut ranges).filter(|next| *next > at);
    }
    ranges
}

/// Cuts `blocks` blocks from the upper end of `runs`. Returns how many are still wanted.
fn take_highest(runs: Vec<BlockRange>, blocks: u32, out: &mut Vec<BlockRange>) -> u32 {
    let mut left = blocks;
    for run in runs.into_iter().rev() {
        if left == 0 || out.len() >= MAX_PICKED {
            break;
        }
        let count = run.count.min(left);
        out.push(BlockRange::new(run.start + (run.count - count), count));
        left -= count;
    }
    left
}

/// What of `all` is not in `without`; both ascending and without overlaps.
fn difference(all: &[BlockRange], without: &[BlockRange]) -> Vec<BlockRange> {
    let mut out = Vec::new();
    let mut holes = without.iter().peekable();
    for run in all {
        let run_end = run.start + run.count;
        let mut at = run.start;
        while let Some(hole) = holes.peek() {
            if hole.start >= run_end {
                break;
            }
            let hole_end = hole.start + hole.count;
            if hole.start > at {
                out.push(BlockRange::new(at, hole.start - at));
            }
            at = at.max(hole_end);
            if hole_end > run_end {
                break;
            }
            holes.next();
        }
        if at < run_end {
            out.push(BlockRange::new(at, run_end - at));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn from_bits(bits: &[bool]) -> Vec<BlockRange> {
        let mut out: Vec<BlockRange> = Vec::new();
        for (block, _) in bits.iter().enumerate().filter(|(_, set)| **set) {
            let block = u32::try_from(block).unwrap();
            match out.last_mut() {
                Some(last) if last.end() == Some(block) => last.count += 1,
                _ => out.push(BlockRange::new(block, 1)),
            }
        }
        out
    }

    fn blocks(ranges: &[BlockRange]) -> Vec<u32> {
        ranges.iter().flat_map(|r| r.start..r.start + r.count).collect()
    }

    proptest! {
        #[test]
        fn difference_is_what_a_set_says(bits in prop::collection::vec((any::<bool>(), any::<bool>()), 0..80)) {
            let (all, without): (Vec<bool>, Vec<bool>) = bits.into_iter().unzip();
            let expected: Vec<u32> = (0..all.len())
                .filter(|i| all[*i] && !without[*i])
                .map(|i| u32::try_from(i).unwrap())
                .collect();
            let actual = difference(&from_bits(&all), &from_bits(&without));
            prop_assert_eq!(blocks(&actual), expected);
        }

        #[test]
        fn take_highest_takes_the_highest(bits in prop::collection::vec(any::<bool>(), 0..80), want in 0u32..90) {
            let runs = from_bits(&bits);
            let mut expected = blocks(&runs);
            let keep = expected.len().saturating_sub(want as usize);
            let expected = expected.split_off(keep);
            let mut out = Vec::new();
            let left = take_highest(runs, want, &mut out);
            let mut actual = blocks(&out);
            actual.sort_unstable();
            prop_assert_eq!(left as usize, want as usize - actual.len());
            prop_assert_eq!(actual, expected);
        }
    }
}
