// SPDX-License-Identifier: Apache-2.0 OR MIT

//! When the host is asked for the blocks that programs would like to have. Pure.
//!
//! A wish belongs to a version of a file. It is fulfilled when as many blocks have come as were asked for, and stays so until its
//! file is replaced: else a program that is slow to take its line out would be given the same again. What does not come is
//! asked for again after [`AGAIN`], whatever has changed meanwhile.

use std::path::PathBuf;
use std::time::{Duration, Instant};

/// A host that did not grant a wish is asked again after so long.
const AGAIN: Duration = Duration::from_secs(60);

/// What one file asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Want {
    pub(super) path: PathBuf,
    /// Another for each file that had this path: number of the inode and time of its change.
    pub(super) version: (u64, i64, u64),
    pub(super) blocks: u32,
}

#[derive(Debug, Default)]
pub(super) struct Wish {
    asked: Option<Asked>,
    fulfilled: Vec<Want>,
}

/// What the host was asked for and has not granted yet.
#[derive(Debug)]
struct Asked {
    at: Instant,
    wants: Vec<Want>,
    blocks: u32,
    /// Blocks that were gone then.
    evicted: u32,
}

impl Wish {
    /// How many blocks to ask for now, of the `evicted` ones that are gone.
    pub(super) fn want(&mut self, wants: Vec<Want>, evicted: u32, now: Instant) -> Option<u32> {
        let mut missing = u32::MAX;
        if let Some(asked) = &self.asked {
            missing = asked.blocks.saturating_sub(asked.evicted.saturating_sub(evicted));
            if missing == 0 {
                self.fulfilled.extend(self.asked.take().into_iter().flat_map(|asked| asked.wants));
            }
        }
        self.fulfilled.retain(|want| wants.contains(want));
        let wants: Vec<Want> = wants.into_iter().filter(|want| !self.fulfilled.contains(want)).collect();
        let mut blocks = wants.iter().fold(0u32, |sum, want| sum.saturating_add(want.blocks));
        if let Some(asked) = &self.asked {
            if now.duration_since(asked.at) < AGAIN {
                return None;
            }
            if asked.wants == wants {
                blocks = blocks.min(missing);
            }
        }
        let blocks = blocks.min(evicted);
        if blocks == 0 {
            self.asked = None;
            return None;
        }
        self.asked = Some(Asked { at: now, wants, blocks, evicted });
        Some(blocks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn want(program: &str, version: u64, blocks: u32) -> Want {
        Want { path: program.into(), version: (version, 0, 0), blocks }
    }

    /// Asks at second `at`.
    struct Case(Wish, Instant);

    impl Case {
        fn new() -> Self {
            Self(Wish::default(), Instant::now())
        }

        fn at(&mut self, at: u64, wants: &[Want], evicted: u32) -> Option<u32> {
            self.0.want(wants.to_vec(), evicted, self.1 + Duration::from_secs(at))
        }
    }

    #[test]
    fn wishes_are_added_up_and_asked_for_once_a_minute() {
        let mut case = Case::new();
        let wants = [want("a", 1, 10), want("b", 1, 5)];
        assert_eq!(case.at(0, &[], 100), None);
        assert_eq!(case.at(1, &wants, 100), Some(15));
        assert_eq!(case.at(2, &wants, 100), None);
        assert_eq!(case.at(3, &[want("a", 2, 90)], 100), None, "nor for anything else meanwhile");
        assert_eq!(case.at(60, &wants, 100), None);
        assert_eq!(case.at(61, &wants, 100), Some(15));
    }

    #[test]
    fn what_was_granted_is_not_asked_for_again_until_its_file_is_replaced() {
        let mut case = Case::new();
        let (a, both) = ([want("a", 1, 10)], [want("a", 1, 10), want("b", 1, 7)]);
        assert_eq!(case.at(0, &a, 100), Some(10));
        assert_eq!(case.at(1, &a, 90), None);
        assert_eq!(case.at(100, &a, 90), None, "it came");
        assert_eq!(case.at(101, &both, 90), Some(7), "another's wish is another matter");
        assert_eq!(case.at(102, &both, 83), None);
        assert_eq!(case.at(103, &[want("a", 2, 10)], 83), Some(10));
    }

    #[test]
    fn of_what_came_in_part_the_rest_is_asked_for() {
        let mut case = Case::new();
        let a = [want("a", 1, 10)];
        assert_eq!(case.at(0, &a, 100), Some(10));
        assert_eq!(case.at(61, &a, 96), Some(6));
        assert_eq!(case.at(122, &a, 97), Some(6), "that others gave more meanwhile does not count");
        assert_eq!(case.at(123, &a, 91), None);
    }

    #[test]
    fn what_came_for_another_wish_is_not_taken_off() {
        let mut case = Case::new();
        assert_eq!(case.at(0, &[want("a", 1, 10)], 100), Some(10));
        assert_eq!(case.at(61, &[want("a", 2, 8)], 95), Some(8));
    }

    #[test]
    fn no_more_is_asked_for_than_is_gone() {
        let mut case = Case::new();
        assert_eq!(case.at(0, &[want("a", 1, 10)], 0), None);
        assert_eq!(case.at(1, &[want("a", 1, 10), want("b", 1, u32::MAX)], 4), Some(4));
    }

    #[test]
    fn a_wish_that_is_taken_back_leaves_nothing_behind() {
        let mut case = Case::new();
        assert_eq!(case.at(0, &[want("a", 1, 10)], 100), Some(10));
        assert_eq!(case.at(70, &[], 100), None);
        assert_eq!(case.at(71, &[want("a", 2, 3)], 100), Some(3));
    }
}
