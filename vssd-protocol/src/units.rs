// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Units. Sizes in people's hands are bytes, on a virtio queue sectors, in the map blocks; mixing
//! them up is the oldest bug of block storage, so each has its own type and converts explicitly.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Bytes per virtio-blk sector (virtio 1.3, §5.2: always 512, whatever the logical block size).
pub const SECTOR_SIZE: u64 = 512;

/// A position on a vSSD as virtio-blk counts it, in sectors of 512 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sector(pub u64);

impl Sector {
    /// The byte offset, or `None` where it does not fit in 64 bits.
    pub fn to_offset(self) -> Option<ByteOffset> {
        self.0.checked_mul(SECTOR_SIZE).map(ByteOffset)
    }
}

/// A position on a vSSD or a medium, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteOffset(pub u64);

/// A block of a vSSD: the unit in which it grows and shrinks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BlockIndex(pub u32);

/// A block of the pool, counted over all its media.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PhysicalBlock(pub u32);

/// `count` consecutive blocks of a vSSD from `start` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BlockRange {
    pub start: u32,
    pub count: u32,
}

impl BlockRange {
    pub fn new(start: u32, count: u32) -> Self {
        Self { start, count }
    }

    /// One past the last block, or `None` where that does not fit in 32 bits.
    pub fn end(self) -> Option<u32> {
        self.start.checked_add(self.count)
    }

    /// Whether the range is not empty and lies wholly below `total` blocks.
    pub fn is_within(self, total: u32) -> bool {
        self.count > 0 && self.end().is_some_and(|end| end <= total)
    }
}

/// The size of a block: a power of two from 4 KiB to 2 MiB, constant for a pool's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockSize(u32);

impl BlockSize {
    pub const MIN: u32 = 4 << 10;
    pub const MAX: u32 = 2 << 20;
    pub const DEFAULT: Self = Self(64 << 10);

    /// `None` unless `bytes` is a power of two within [`Self::MIN`]..=[`Self::MAX`].
    pub fn new(bytes: u32) -> Option<Self> {
        (bytes.is_power_of_two() && (Self::MIN..=Self::MAX).contains(&bytes)).then_some(Self(bytes))
    }

    pub fn bytes(self) -> u64 {
        u64::from(self.0)
    }

    pub fn shift(self) -> u32 {
        self.0.trailing_zeros()
    }

    /// How many blocks `bytes` fill, rounded down; `None` past 2³²−1 blocks.
    pub fn blocks_in(self, bytes: u64) -> Option<u32> {
        u32::try_from(bytes >> self.shift()).ok()
    }

    /// How many blocks it takes to hold `bytes`, rounded up; `None` past 2³²−1 blocks.
    pub fn blocks_for(self, bytes: u64) -> Option<u32> {
        u32::try_from(bytes.div_ceil(self.bytes())).ok()
    }

    /// The bytes that `blocks` blocks hold.
    pub fn bytes_of(self, blocks: u32) -> u64 {
        u64::from(blocks) << self.shift()
    }
}

impl fmt::Display for BlockSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        ByteCount(self.bytes()).fmt(f)
    }
}

/// A number of bytes as people read and write it: `64 KiB`, `1.5 GiB`; parsed from `64K`, `64KiB`, `65536`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteCount(pub u64);

const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

impl fmt::Display for ByteCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut unit = 0;
        while unit + 1 < UNITS.len() && self.0 >> (10 * (unit + 1)) != 0 {
            unit += 1;
        }
        let whole = self.0 >> (10 * unit);
        let rest = self.0 - (whole << (10 * unit));
        let text = if unit == 0 || rest == 0 {
            format!("{whole} {}", UNITS[unit])
        } else {
            // One decimal, rounded down: a size is never shown larger than it is.
            let tenth = (rest >> (10 * (unit - 1))) * 10 / 1024;
            format!("{whole}.{tenth} {}", UNITS[unit])
        };
        f.pad(&text)
    }
}

/// Why a text is no size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a size: write a whole number of bytes or one with K, M, G, T, P (10G, 10GiB, 1.5G)")]
pub struct ParseByteCountError {
    text: String,
}

impl std::str::FromStr for ByteCount {
    type Err = ParseByteCountError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_byte_count(text).map(Self).ok_or_else(|| ParseByteCountError { text: text.to_owned() })
    }
}

fn parse_byte_count(text: &str) -> Option<u64> {
    let text = text.trim();
    let number_len = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(number_len);
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        "p" | "pib" => 50,
        _ => return None,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    if whole.is_empty() || fraction.is_empty() || fraction.len() > 9 || (shift == 0 && number.contains('.')) {
        return None;
    }
    let whole: u64 = whole.parse().ok()?;
    let scale = 10u128.pow(u32::try_from(fraction.len()).ok()?);
    let fraction: u128 = fraction.parse().ok()?;
    let bytes = (u128::from(whole) << shift) + ((fraction << shift) / scale);
    u64::try_from(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_count_parses_what_people_write() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("4K", 4096),
            ("64KiB", 65536),
            ("10 GiB", 10 << 30),
            ("1.5G", 3 << 29),
            ("0.25m", 1 << 18),
        ] {
            assert_eq!(text.parse(), Ok(ByteCount(bytes)), "{text}");
        }
        for text in ["", "G", "-1", "1.5", "1..5G", "10X", "1e9", "20000000P", ".5G", "5.G"] {
            assert!(text.parse::<ByteCount>().is_err(), "{text}");
        }
    }

    #[test]
    fn byte_count_is_shown_rounded_down() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            ((20 << 30) - 1, "19.9 GiB"),
            (20 << 30, "20 GiB"),
            (u64::MAX, "15.9 EiB"),
        ] {
            assert_eq!(ByteCount(bytes).to_string(), text);
        }
    }

    #[test]
    fn block_size_refuses_what_is_no_power_of_two_in_bounds() {
        assert!(BlockSize::new(4096).is_some() && BlockSize::new(2 << 20).is_some());
        for bytes in [0, 1, 2048, 4097, 3 << 20, 4 << 20, u32::MAX] {
            assert!(BlockSize::new(bytes).is_none(), "{bytes}");
        }
    }

    #[test]
    fn block_range_end_does_not_wrap() {
        assert!(BlockRange::new(0, 1).is_within(1));
        assert!(!BlockRange::new(1, 1).is_within(1));
        assert!(!BlockRange::new(0, 0).is_within(1));
        assert!(!BlockRange::new(u32::MAX, 2).is_within(u32::MAX));
    }
}
