// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What is in a hint file.
//!
//! ```text
//! # Lines of words. This one is passed over, and so are empty ones.
//! cost free            what the ranges below cost to lose: free, clean-cold (at first), clean-hot, dirty
//! 4096 1024            1024 blocks from block 4096 on; the most expendable ones come first
//! want 64              so many blocks more would be of use; the last such line counts
//! ```
//!
//! Every line ends with a newline, also the last: one without may be cut off. Whatever is wrong, the lines before it count.
//! It knows nothing of files, and of disks only how many blocks there are.

use std::fmt::Write as _;

use crate::BlockRange;

/// A larger file is not read.
pub const MOST_BYTES: usize = 4 << 20;
/// Of a line that is not understood, this much is shown.
const SHOWN: usize = 40;

/// What it costs the guest to lose blocks. Cheaper ones are less.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cost {
    /// Nothing: there is nothing in them.
    Free,
    /// Copies of what is elsewhere, not asked for lately.
    #[default]
    CleanCold,
    /// Copies of what is elsewhere, in use.
    CleanHot,
    /// What is in them must be written elsewhere first, which the program sees to when it is asked.
    Dirty,
}

impl Cost {
    /// All of them, the cheapest first.
    pub const ALL: [Self; 4] = [Self::Free, Self::CleanCold, Self::CleanHot, Self::Dirty];

    /// As it is written in a hint file.
    pub fn word(self) -> &'static str {
        match self {
            Self::Free => "free",
            Self::CleanCold => "clean-cold",
            Self::CleanHot => "clean-hot",
            Self::Dirty => "dirty",
        }
    }

    fn of_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|cost| cost.word() == word)
    }
}

/// What a hint file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HintList {
    /// In the order of the file.
    pub ranges: Vec<(Cost, BlockRange)>,
    /// Blocks that the program would like to have.
    pub wanted_blocks: u32,
    /// Why reading ended before the end.
    pub fault: Option<Fault>,
}

/// What is wrong with a hint file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {what}")]
pub struct Fault {
    /// Counted from 1.
    pub line: usize,
    /// What is wrong with it.
    pub what: FaultKind,
}

/// What is wrong with a line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FaultKind {
    /// It has no meaning.
    #[error("{text:?} is none of \"<start> <count>\", \"cost <class>\", \"want <blocks>\"")]
    Unknown {
        /// The line, or its beginning.
        text: String,
    },
    /// The range is empty or not on the disk.
    #[error("\"{start} {count}\" is not a range of blocks below {total}")]
    Outside {
        /// First block.
        start: u32,
        /// Blocks.
        count: u32,
        /// Blocks of the disk.
        total: u32,
    },
    /// The ranges up to here overlap, and that so often that reading them would take long.
    #[error("more blocks are named than the {total} of the disk")]
    TooMany {
        /// Blocks of the disk.
        total: u32,
    },
    /// It is the last line, and without an end.
    #[error("the line has no end: it may be cut off")]
    Unfinished,
}

/// Reads a hint file for a disk of `total_blocks`.
pub fn parse(text: &[u8], total_blocks: u32) -> HintList {
    let mut list = HintList::default();
    let mut cost = Cost::default();
    let mut left = total_blocks;
    for (index, line) in text.split_inclusive(|byte| *byte == b'\n').enumerate() {
        if let Err(what) = parse_line(line, total_blocks, &mut cost, &mut left, &mut list) {
            list.fault = Some(Fault { line: index + 1, what });
            break;
        }
    }
    list
}

fn parse_line(
    line: &[u8],
    total: u32,
    cost: &mut Cost,
    left: &mut u32,
    list: &mut HintList,
) -> Result<(), FaultKind> {
    let line = line.strip_suffix(b"\n").ok_or(FaultKind::Unfinished)?;
    let unknown = || {
        let text = String::from_utf8_lossy(&line[..line.len().min(SHOWN)]).into_owned();
        FaultKind::Unknown { text }
    };
    let mut words = str::from_utf8(line).map_err(|_not_text| unknown())?.split_ascii_whitespace();
    match (words.next(), words.next(), words.next()) {
        (None, ..) => {}
        (Some(word), ..) if word.starts_with('#') => {}
        (Some("cost"), Some(class), None) => *cost = Cost::of_word(class).ok_or_else(unknown)?,
        (Some("want"), Some(blocks), None) => list.wanted_blocks = number(blocks).ok_or_else(unknown)?,
        (Some(start), Some(count), None) => {
            let (start, count) = number(start).zip(number(count)).ok_or_else(unknown)?;
            let range = BlockRange::new(start, count);
            if count == 0 || range.end() > u64::from(total) {
                return Err(FaultKind::Outside { start, count, total });
            }
            *left = left.checked_sub(count).ok_or(FaultKind::TooMany { total })?;
            list.ranges.push((*cost, range));
        }
        _ => return Err(unknown()),
    }
    Ok(())
}

/// Digits only: `parse` alone would take a sign.
fn number(word: &str) -> Option<u32> {
    word.bytes().all(|byte| byte.is_ascii_digit()).then(|| word.parse().ok())?
}

/// Writes what [`parse`] reads.
pub(crate) fn text(ranges: &[(Cost, BlockRange)], wanted_blocks: u32) -> String {
    let mut text = String::new();
    let mut last = Cost::default();
    if wanted_blocks > 0 {
        let _ = writeln!(text, "want {wanted_blocks}");
    }
    for (cost, range) in ranges {
        if *cost != last {
            let _ = writeln!(text, "cost {}", cost.word());
            last = *cost;
        }
        let _ = writeln!(text, "{} {}", range.start, range.count);
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(start: u32, count: u32) -> BlockRange {
        BlockRange::new(start, count)
    }

    #[test]
    fn a_file_is_read_in_its_order() {
        let text = b"# cold ones\n\n7 2\ncost free\n 100\t4 \nwant 3\ncost dirty\n0 1\nwant 5\n";
        let list = parse(text, 104);
        let expected =
            [(Cost::CleanCold, range(7, 2)), (Cost::Free, range(100, 4)), (Cost::Dirty, range(0, 1))];
        assert_eq!(list, HintList { ranges: expected.to_vec(), wanted_blocks: 5, fault: None });
        assert_eq!(parse(b"", 1), HintList::default());
    }

    #[test]
    fn what_comes_before_a_fault_counts_and_what_comes_after_does_not() {
        let unknown = |text: &str| FaultKind::Unknown { text: text.to_owned() };
        let outside = |start, count| FaultKind::Outside { start, count, total: 100 };
        for (line, what) in [
            ("1", unknown("1")),
            ("1 2 3", unknown("1 2 3")),
            ("-1 2", unknown("-1 2")),
            ("+1 2", unknown("+1 2")),
            ("1 4294967296", unknown("1 4294967296")),
            ("0x1 2", unknown("0x1 2")),
            ("cost cheap", unknown("cost cheap")),
            ("cost", unknown("cost")),
            ("want much", unknown("want much")),
            ("clear", unknown("clear")),
            ("1 0", outside(1, 0)),
            ("100 1", outside(100, 1)),
            ("99 2", outside(99, 2)),
            ("4294967295 4294967295", outside(u32::MAX, u32::MAX)),
            ("0 98", FaultKind::TooMany { total: 100 }),
        ] {
            let list = parse(format!("5 3\n{line}\n9 1\n").as_bytes(), 100);
            assert_eq!(list.ranges, [(Cost::CleanCold, range(5, 3))], "{line}");
            assert_eq!(list.fault, Some(Fault { line: 2, what }), "{line}");
        }
    }

    #[test]
    fn a_line_that_may_be_cut_off_does_not_count() {
        let list = parse(b"5 3\n12 4", 100);
        assert_eq!(list.ranges, [(Cost::CleanCold, range(5, 3))]);
        assert_eq!(list.fault, Some(Fault { line: 2, what: FaultKind::Unfinished }));
    }

    #[test]
    fn what_is_no_text_is_shown_without_harm() {
        let mut text = b"\xff\x1b[2J".to_vec();
        text.extend([b'x'; 1000]);
        text.push(b'\n');
        let fault = parse(&text, 100).fault.unwrap().to_string();
        assert!(fault.len() < 200 && !fault.contains('\x1b'), "{fault}");
    }

    fn ranges() -> impl Strategy<Value = Vec<(Cost, BlockRange)>> {
        let one = (0usize..4, 0u32..1000, 1u32..20);
        prop::collection::vec(
            one.prop_map(|(cost, start, count)| (Cost::ALL[cost], range(start, count))),
            0..60,
        )
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(ranges in ranges(), wanted_blocks: u32) {
            let list = parse(text(&ranges, wanted_blocks).as_bytes(), 2000);
            prop_assert_eq!(list, HintList { ranges, wanted_blocks, fault: None });
        }

        /// Cut off anywhere, a file names no block that the whole does not name, and says so unless it is cut between lines.
        #[test]
        fn a_part_of_a_file_is_a_part_of_its_hints(ranges in ranges(), at: prop::sample::Index) {
            let text = text(&ranges, 0);
            let cut = at.index(text.len() + 1);
            let list = parse(&text.as_bytes()[..cut], 2000);
            prop_assert!(ranges.starts_with(&list.ranges));
            prop_assert_eq!(list.fault.is_none(), cut == 0 || text.as_bytes()[cut - 1] == b'\n');
        }

        #[test]
        fn whatever_is_read_lies_on_the_disk_and_is_bounded(text: Vec<u8>, total: u32) {
            let list = parse(&text, total);
            prop_assert!(list.ranges.iter().all(|(_, range)| range.count > 0 && range.end() <= total.into()));
            let named: u64 = list.ranges.iter().map(|(_, range)| u64::from(range.count)).sum();
            prop_assert!(named <= total.into());
        }

        #[test]
        fn of_nearly_right_lines_only_right_ones_are_read(text in "([0-9]{1,4} [0-9]{1,3}|cost (free|dirty|x)|want [0-9]|#x|)(\n| )*") {
            let list = parse(text.as_bytes(), 500);
            prop_assert!(list.ranges.iter().all(|(_, range)| range.count > 0 && range.end() <= 500));
        }
    }
}
