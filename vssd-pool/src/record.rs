// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the journal says, record by record, and how it is written.
//!
//! A record is one or more slots of 32 bytes, little-endian:
//!
//! ```text
//! 0  u8   kind
//! 1  u8   slots it takes
//! 2  u16  flags (of Vssd: 1 = new)
//! 4  u32  vSSD, or first physical block of Reserve and Clean
//! 8  u32  first block
//! 12 u32  how many blocks
//! 16 u32  first physical block (Map)
//! 20      zero
//! ```
//!
//! A `Vssd` record instead carries from byte 4 on: blocks plugged at first (u32), then the directory entry,
//! which checkpoints hold in the same form. Records are absolute ("block b is at p", never "one more"), so
//! that replaying one that a checkpoint already contains changes nothing.

use vssd_protocol::units::PhysicalBlock;

use crate::blocks::PhysicalRun;
use crate::map::{MAX_PHYSICAL_BLOCKS, MAX_VSSD_BLOCKS};
use crate::types::{Class, Uuid, VssdAttrs, VssdId};

/// Bytes of a slot.
pub(crate) const SLOT: usize = 32;

pub(crate) const MAX_NAME: usize = 64;
pub(crate) const MAX_POLICY: usize = 256;

/// The most bytes a directory entry takes.
pub(crate) const MAX_ENTRY: usize = ENTRY_FIXED + MAX_NAME + MAX_POLICY;
const ENTRY_FIXED: usize = 4 + 16 + 4 + 4 + 4 + 1 + 1 + 2;

/// What the directory holds of a vSSD.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Meta {
    pub(crate) id: VssdId,
    pub(crate) uuid: Uuid,
    pub(crate) name: String,
    pub(crate) max_blocks: u32,
    pub(crate) attrs: VssdAttrs,
}

/// One change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Record {
    /// Consecutive blocks of a vSSD hold data in consecutive physical blocks.
    Map { vssd: VssdId, start: u32, count: u32, physical: PhysicalBlock },
    /// Blocks are plugged and hold nothing, after having held something.
    Empty { vssd: VssdId, start: u32, count: u32 },
    /// Blocks are plugged and hold nothing, after having been unplugged.
    Plug { vssd: VssdId, start: u32, count: u32 },
    /// Blocks are not plugged.
    Unplug { vssd: VssdId, start: u32, count: u32 },
    /// Physical blocks may hold a tenant's bytes from now on.
    Reserve(PhysicalRun),
    /// Physical blocks are zero, durably, and nobody's.
    Clean(PhysicalRun),
    /// A vSSD is new (then so many blocks are plugged), or its entry changed.
    Vssd { meta: Box<Meta>, new: Option<u32> },
    /// A vSSD is gone.
    Delete { vssd: VssdId },
}

const MAP: u8 = 1;
const EMPTY: u8 = 2;
const PLUG: u8 = 3;
const UNPLUG: u8 = 4;
const RESERVE: u8 = 5;
const CLEAN: u8 = 6;
const VSSD: u8 = 7;
const DELETE: u8 = 8;

impl Record {
    /// How many slots it takes.
    pub(crate) fn slots(&self) -> usize {
        match self {
            Self::Vssd { meta, .. } => (8 + encoded_len(meta)).div_ceil(SLOT),
            _ => 1,
        }
    }

    /// Writes it to `out`, which is [`Record::slots`] times [`SLOT`] zero bytes.
    pub(crate) fn encode(&self, out: &mut [u8]) {
        let (kind, words, flags) = match self {
            Self::Map { vssd, start, count, physical } => (MAP, [vssd.0, *start, *count, physical.0], 0),
            Self::Empty { vssd, start, count } => (EMPTY, [vssd.0, *start, *count, 0], 0),
            Self::Plug { vssd, start, count } => (PLUG, [vssd.0, *start, *count, 0], 0),
            Self::Unplug { vssd, start, count } => (UNPLUG, [vssd.0, *start, *count, 0], 0),
            Self::Reserve(run) => (RESERVE, [run.start, 0, run.count, 0], 0),
            Self::Clean(run) => (CLEAN, [run.start, 0, run.count, 0], 0),
            Self::Vssd { new, .. } => (VSSD, [new.unwrap_or(0), 0, 0, 0], u16::from(new.is_some())),
            Self::Delete { vssd } => (DELETE, [vssd.0, 0, 0, 0], 0),
        };
        out[0] = kind;
        // 12 at most.
        out[1] = u8::try_from(self.slots()).unwrap_or(u8::MAX);
        out[2..4].copy_from_slice(&flags.to_le_bytes());
        if let Self::Vssd { meta, .. } = self {
            out[4..8].copy_from_slice(&words[0].to_le_bytes());
            let mut entry = Vec::with_capacity(MAX_ENTRY);
            encode_meta(meta, &mut entry);
            out[8..8 + entry.len()].copy_from_slice(&entry);
        } else {
            for (i, word) in words.iter().enumerate() {
                out[4 + 4 * i..8 + 4 * i].copy_from_slice(&word.to_le_bytes());
            }
        }
    }

    /// The record at the start of `bytes` and how many slots it takes, all of which are there; `None` if it is none of ours.
    pub(crate) fn decode(bytes: &[u8]) -> Option<(Self, usize)> {
        let (&kind, &slots) = (bytes.first()?, bytes.get(1)?);
        let slots = usize::from(slots);
        let bytes = bytes.get(..slots * SLOT)?;
        let flags = u16::from_le_bytes(bytes.get(2..4)?.try_into().ok()?);
        let word = |i: usize| Some(u32::from_le_bytes(bytes.get(4 + 4 * i..8 + 4 * i)?.try_into().ok()?));
        if kind == VSSD {
            let (meta, used) = decode_meta(bytes.get(8..)?)?;
            let new = (flags & 1 != 0).then_some(word(0)?);
            let fits =
                slots == (8 + used).div_ceil(SLOT) && new.is_none_or(|plugged| plugged <= meta.max_blocks);
            return fits.then(|| (Self::Vssd { meta: Box::new(meta), new }, slots));
        }
        let (vssd, start, count, physical) = (VssdId(word(0)?), word(1)?, word(2)?, word(3)?);
        let run = PhysicalRun { start: word(0)?, count };
        let block_range_ok = count > 0 && start.checked_add(count).is_some_and(|end| end <= MAX_VSSD_BLOCKS);
        let physical_ok = |start: u32| start.checked_add(count).is_some_and(|end| end <= MAX_PHYSICAL_BLOCKS);
        let record = match kind {
            MAP if block_range_ok && physical_ok(physical) => {
                Self::Map { vssd, start, count, physical: PhysicalBlock(physical) }
            }
            EMPTY if block_range_ok => Self::Empty { vssd, start, count },
            PLUG if block_range_ok => Self::Plug { vssd, start, count },
            UNPLUG if block_range_ok => Self::Unplug { vssd, start, count },
            RESERVE if count > 0 && physical_ok(run.start) => Self::Reserve(run),
            CLEAN if count > 0 && physical_ok(run.start) => Self::Clean(run),
            DELETE => Self::Delete { vssd },
            _ => return None,
        };
        (slots == 1).then_some((record, 1))
    }
}

fn encoded_len(meta: &Meta) -> usize {
    ENTRY_FIXED + meta.name.len() + meta.attrs.policy.len()
}

/// Appends a directory entry.
pub(crate) fn encode_meta(meta: &Meta, out: &mut Vec<u8>) {
    out.extend(meta.id.0.to_le_bytes());
    out.extend(meta.uuid.0);
    out.extend(meta.max_blocks.to_le_bytes());
    out.extend(meta.attrs.requested_blocks.to_le_bytes());
    out.extend(meta.attrs.min_blocks.to_le_bytes());
    out.push(match meta.attrs.class {
        Class::Any => 0,
        Class::Nvram => 1,
        Class::Ssd => 2,
    });
    // Both lengths are checked before a Meta is made.
    out.push(u8::try_from(meta.name.len()).unwrap_or(u8::MAX));
    out.extend(u16::try_from(meta.attrs.policy.len()).unwrap_or(u16::MAX).to_le_bytes());
    out.extend(meta.name.as_bytes());
    out.extend(meta.attrs.policy.as_bytes());
}

/// A directory entry and its length.
pub(crate) fn decode_meta(bytes: &[u8]) -> Option<(Meta, usize)> {
    let word = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    let class = match bytes.get(32)? {
        0 => Class::Any,
        1 => Class::Nvram,
        2 => Class::Ssd,
        _ => return None,
    };
    let name_len = usize::from(*bytes.get(33)?);
    let policy_len = usize::from(u16::from_le_bytes(bytes.get(34..36)?.try_into().ok()?));
    let name_end = ENTRY_FIXED + name_len;
    let text = |range: std::ops::Range<usize>| String::from_utf8(bytes.get(range)?.to_vec()).ok();
    let meta = Meta {
        id: VssdId(word(0)?),
        uuid: Uuid(bytes.get(4..20)?.try_into().ok()?),
        name: text(ENTRY_FIXED..name_end)?,
        max_blocks: word(20)?,
        attrs: VssdAttrs {
            requested_blocks: word(24)?,
            min_blocks: word(28)?,
            class,
            policy: text(name_end..name_end + policy_len)?,
        },
    };
    let is_sane = (1..=MAX_NAME).contains(&name_len)
        && policy_len <= MAX_POLICY
        && meta.max_blocks <= MAX_VSSD_BLOCKS
        && meta.attrs.requested_blocks <= meta.max_blocks
        && meta.attrs.min_blocks <= meta.max_blocks;
    is_sane.then_some((meta, name_end + policy_len))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn meta(name: &str, policy: &str) -> Meta {
        Meta {
            id: VssdId(3),
            uuid: Uuid([9; 16]),
            name: name.to_owned(),
            max_blocks: 100,
            attrs: VssdAttrs {
                requested_blocks: 50,
                min_blocks: 5,
                class: Class::Ssd,
                policy: policy.to_owned(),
            },
        }
    }

    #[test]
    fn records_come_back_as_they_went() {
        let run = PhysicalRun { start: 8, count: 9 };
        let long = meta(&"n".repeat(MAX_NAME), &"p".repeat(MAX_POLICY));
        for record in [
            Record::Map { vssd: VssdId(1), start: 2, count: 3, physical: PhysicalBlock(4) },
            Record::Empty { vssd: VssdId(1), start: 2, count: 3 },
            Record::Plug { vssd: VssdId(1), start: 2, count: 3 },
            Record::Unplug { vssd: VssdId(1), start: 2, count: 3 },
            Record::Reserve(run),
            Record::Clean(run),
            Record::Vssd { meta: Box::new(meta("a", "")), new: Some(0) },
            Record::Vssd { meta: Box::new(long), new: None },
            Record::Delete { vssd: VssdId(7) },
        ] {
            let mut bytes = vec![0; record.slots() * SLOT];
            record.encode(&mut bytes);
            assert!(bytes.len() <= 8 + MAX_ENTRY + SLOT);
            assert_eq!(Record::decode(&bytes), Some((record.clone(), record.slots())), "{record:?}");
            for len in 0..bytes.len() {
                assert_eq!(Record::decode(&bytes[..len]), None, "{record:?} cut to {len} bytes");
            }
        }
    }

    proptest! {
        #[test]
        fn decode_takes_any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..400), kind in 0u8..12, slots in 0u8..14) {
            let mut bytes = bytes;
            if bytes.len() > 2 {
                bytes[0] = kind;
                bytes[1] = slots;
            }
            if let Some((record, slots)) = Record::decode(&bytes) {
                prop_assert_eq!(record.slots(), slots);
                prop_assert!(slots * SLOT <= bytes.len(), "{} slots of {} bytes", slots, bytes.len());
            }
        }
    }
}
