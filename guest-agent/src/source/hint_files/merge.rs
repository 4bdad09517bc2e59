// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The hints of several programs as one list. Pure.
//!
//! * A program's own order is kept: only it knows which of its blocks matters less.
//! * Of what programs could lose next, the cheapest goes first, by the cost that they state: whatever is free goes before
//!   anybody's copies, unless its own program puts it later.
//! * Among equals programs take turns of [`TURN`] blocks. So each gives as many as the others until it has no more, and none
//!   is worse off for having named more. (Shares in proportion to what is named would teach programs to name little.)
//! * A block goes once, at its first place.

use vssd_client::Cost;
use vssd_protocol::units::BlockRange;

use crate::blocks::BlockSet;

/// Few enough that no program gives noticeably more than another, and so many that what goes to the host is few ranges.
const TURN: u32 = 16;

/// How far one list has been used.
#[derive(Debug)]
struct Cursor<'a> {
    rest: &'a [(Cost, BlockRange)],
    /// Blocks of the first range that are used.
    used: u32,
}

impl Cursor<'_> {
    fn cost(&self) -> Option<Cost> {
        self.rest.first().map(|(cost, _)| *cost)
    }

    /// The next block, if it costs `cost`.
    fn next(&mut self, cost: Cost) -> Option<u32> {
        let (_, range) = self.rest.first().filter(|(class, _)| *class == cost)?;
        let block = range.start.saturating_add(self.used);
        self.used += 1;
        if self.used >= range.count {
            self.rest = &self.rest[1..];
            self.used = 0;
        }
        Some(block)
    }
}

/// Merges lists of ranges that are not empty and lie below `total`.
pub(super) fn merge(lists: &[Vec<(Cost, BlockRange)>], total: u32) -> Vec<(Cost, BlockRange)> {
    let mut cursors: Vec<Cursor<'_>> = lists.iter().map(|list| Cursor { rest: list, used: 0 }).collect();
    let mut merged: Vec<(Cost, BlockRange)> = Vec::new();
    let mut taken = BlockSet::new(total);
    while let Some(cost) = cursors.iter().filter_map(Cursor::cost).min() {
        for cursor in &mut cursors {
            let mut turn = TURN;
            while turn > 0
                && let Some(block) = cursor.next(cost)
            {
                if taken.contains(block) {
                    continue;
                }
                turn -= 1;
                taken.insert(BlockRange::new(block, 1));
                match merged.last_mut() {
                    Some((class, last)) if *class == cost && last.end() == Some(block) => last.count += 1,
                    _ => merged.push((cost, BlockRange::new(block, 1))),
                }
            }
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashSet};

    use proptest::prelude::*;

    use super::*;

    fn list(cost: Cost, ranges: &[(u32, u32)]) -> Vec<(Cost, BlockRange)> {
        ranges.iter().map(|&(start, count)| (cost, BlockRange::new(start, count))).collect()
    }

    fn blocks(list: &[(Cost, BlockRange)]) -> Vec<(Cost, u32)> {
        list.iter()
            .flat_map(|(cost, range)| (range.start..range.start + range.count).map(|block| (*cost, block)))
            .collect()
    }

    #[test]
    fn programs_take_turns_and_the_one_that_named_more_gives_the_rest() {
        let merged = merge(&[list(Cost::CleanCold, &[(0, 20)]), list(Cost::CleanCold, &[(100, 100)])], 300);
        assert_eq!(merged, list(Cost::CleanCold, &[(0, 16), (100, 16), (16, 4), (116, 84)]));
    }

    #[test]
    fn what_is_free_goes_before_anybodys_copies() {
        let copies = list(Cost::CleanCold, &[(0, 50)]);
        let mut mixed = list(Cost::Free, &[(100, 40)]);
        mixed.extend(list(Cost::Dirty, &[(150, 10)]));
        let merged = merge(&[copies.clone(), mixed], 300);
        let mut expected = list(Cost::Free, &[(100, 40)]);
        expected.extend(copies);
        expected.extend(list(Cost::Dirty, &[(150, 10)]));
        assert_eq!(merged, expected);
    }

    #[test]
    fn a_program_that_puts_a_free_block_last_loses_it_last() {
        let mut odd = list(Cost::Dirty, &[(0, 1)]);
        odd.extend(list(Cost::Free, &[(1, 1)]));
        let merged = merge(&[odd, list(Cost::CleanHot, &[(2, 1)])], 10);
        assert_eq!(
            merged,
            [list(Cost::CleanHot, &[(2, 1)]), list(Cost::Dirty, &[(0, 1)]), list(Cost::Free, &[(1, 1)])]
                .concat()
        );
    }

    #[test]
    fn a_block_that_two_name_goes_once_and_takes_no_ones_turn() {
        let merged = merge(&[list(Cost::Free, &[(0, 16)]), list(Cost::Free, &[(0, 16), (40, 20)])], 100);
        assert_eq!(merged, list(Cost::Free, &[(0, 16), (40, 20)]));
    }

    fn lists() -> impl Strategy<Value = Vec<Vec<(Cost, BlockRange)>>> {
        let range = (0usize..4, 0u32..180, 1u32..20)
            .prop_map(|(cost, start, count)| (Cost::ALL[cost], BlockRange::new(start, count)));
        prop::collection::vec(prop::collection::vec(range, 0..12), 0..5)
    }

    proptest! {
        #[test]
        fn each_named_block_comes_once_and_every_order_is_kept(lists in lists()) {
            let merged = blocks(&merge(&lists, 200));
            let place: BTreeMap<u32, usize> =
                merged.iter().enumerate().map(|(place, (_, block))| (*block, place)).collect();
            prop_assert_eq!(place.len(), merged.len(), "a block came twice");
            let named: HashSet<u32> = lists.iter().flat_map(|list| blocks(list)).map(|(_, block)| block).collect();
            prop_assert_eq!(named, place.keys().copied().collect::<HashSet<_>>());
            // A block that several name has the place that one of them gives it, so only blocks of one alone show the order.
            let mut namers: BTreeMap<u32, usize> = BTreeMap::new();
            for list in &lists {
                for block in blocks(list).into_iter().map(|(_, block)| block).collect::<HashSet<_>>() {
                    *namers.entry(block).or_default() += 1;
                }
            }
            for list in &lists {
                let mut seen = HashSet::new();
                let own: Vec<usize> = blocks(list)
                    .into_iter()
                    .map(|(_, block)| block)
                    .filter(|block| namers[block] == 1 && seen.insert(*block))
                    .map(|block| place[&block])
                    .collect();
                prop_assert!(own.is_sorted(), "{:?}", own);
            }
        }

        #[test]
        fn lists_in_order_of_cost_make_one_in_order_of_cost(lists in lists()) {
            let mut lists = lists;
            lists.iter_mut().for_each(|list| list.sort_by_key(|(cost, _)| *cost));
            prop_assert!(merge(&lists, 200).is_sorted_by_key(|(cost, _)| *cost));
        }

        #[test]
        fn nobody_gives_more_than_a_turn_more_than_another_that_has_more(
            lens in prop::collection::vec(1u32..200, 2..5), cut: prop::sample::Index,
        ) {
            let lists: Vec<_> = (0u32..).zip(&lens).map(|(i, len)| list(Cost::CleanCold, &[(i * 1000, *len)])).collect();
            let merged = blocks(&merge(&lists, 5000));
            let gone = &merged[..cut.index(merged.len() + 1)];
            let given = |i: u32| u32::try_from(gone.iter().filter(|(_, block)| block / 1000 == i).count()).unwrap();
            for (i, _) in (0u32..).zip(&lens) {
                for (j, len) in (0u32..).zip(&lens) {
                    prop_assert!(given(i) <= given(j) + TURN || given(j) == *len);
                }
            }
        }
    }
}
