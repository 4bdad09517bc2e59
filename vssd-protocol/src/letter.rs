// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Letters: how an agent speaks with the host through a driver that knows nothing of vSSDs (`protocol.md`, §17).
//!
//! ```text
//!   agent ── reads of single logical blocks, each one's number a byte ──► device: Mailbox::take   ──► Letter
//!   agent ◄── answer to the next GET_ID on that queue, "vssd=…"      ──── device: Notice::encode  ◄── host
//! ```
//!
//! All that a stock `virtio_blk` lets user space do is to read, write, flush and discard, and to read the serial number, for
//! which it sends a GET_ID each time. A letter is made of reads that are harmless: what is read does not matter, only where. It
//! begins with a mark and ends with a checksum; no program reads these places one after the other by chance.
//!
//! This module knows neither rings nor disks.

use crate::guest::Estimate;

/// Reads that make a letter.
pub const LEN: usize = 32;
/// One past the highest block that is read.
pub const SPAN: u64 = 256;
/// The first reads of every letter.
const MARK: [u8; 4] = [0xb5, 0x1e, 0x7a, 0xc3];
const VERSION: u8 = 1;
/// In the place that says which letter it is; 0 asks.
const REPORT: u8 = 1;
/// Bytes of an id, and of a notice.
pub const ID_LEN: usize = 20;
/// What a notice begins with. An id begins with `vssd-`.
const NOTICE: &[u8] = b"vssd=";
/// Crockford's digits, which no reader takes for each other.
const DIGITS: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
/// Bytes of a notice that are written in such digits, five bits each.
const NOTICE_BYTES: usize = 9;

/// Why the guest holds less than it was asked to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Shortfall {
    /// It does not, or it has not tried yet.
    #[default]
    None = 0,
    Nothing = 1,
    Busy = 2,
    Policy = 3,
    Error = 4,
}

impl Shortfall {
    /// Its word in control messages; none for [`Shortfall::None`].
    pub fn word(self) -> Option<&'static str> {
        match self {
            Self::None => None,
            Self::Nothing => Some("nothing"),
            Self::Busy => Some("busy"),
            Self::Policy => Some("policy"),
            Self::Error => Some("error"),
        }
    }
}

/// What an agent writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Letter {
    /// Only to hear what the host says.
    Ask,
    Report(Report),
}

/// What an agent tells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Of the notice that it answers; 0 if it has seen none.
    pub seq: u8,
    pub shortfall: Shortfall,
    /// Blocks that nothing uses for as long as the notice stands.
    pub held: u32,
    /// What could go beyond those. The classes together are at most as many blocks as the disk has; `dirty` is not told.
    pub free: u32,
    pub clean_cold: u32,
    pub clean_hot: u32,
    /// How many blocks it would like to use again.
    pub want: u32,
}

impl Report {
    pub fn estimate(&self) -> Estimate {
        let Self { free, clean_cold, clean_hot, .. } = *self;
        Estimate { free, clean_cold, clean_hot, dirty: 0 }
    }
}

impl Letter {
    /// Which logical blocks to read, in this order.
    pub fn encode(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        bytes[..4].copy_from_slice(&MARK);
        bytes[4] = VERSION;
        if let Self::Report(Report { seq, shortfall, held, free, clean_cold, clean_hot, want }) = *self {
            bytes[5] = seq;
            bytes[6] = shortfall as u8;
            bytes[7] = REPORT;
            for (field, value) in [held, free, clean_cold, clean_hot, want].into_iter().enumerate() {
                let at = 8 + 4 * field;
                bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
            }
        }
        let sum = fletcher16(&bytes[..LEN - 2]);
        bytes[LEN - 2..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; LEN]) -> Option<Self> {
        let sum = u16::from_le_bytes([bytes[LEN - 2], bytes[LEN - 1]]);
        let shortfall = match bytes[6] {
            0 => Shortfall::None,
            1 => Shortfall::Nothing,
            2 => Shortfall::Busy,
            3 => Shortfall::Policy,
            4 => Shortfall::Error,
            _ => return None,
        };
        if bytes[4] != VERSION || bytes[7] > REPORT || sum != fletcher16(&bytes[..LEN - 2]) {
            return None;
        }
        if bytes[7] != REPORT {
            return Some(Self::Ask);
        }
        let field = |field: usize| {
            let at = 8 + 4 * field;
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        Some(Self::Report(Report {
            seq: bytes[5],
            shortfall,
            held: field(0),
            free: field(1),
            clean_cold: field(2),
            clean_hot: field(3),
            want: field(4),
        }))
    }
}

/// Fletcher's checksum of two sums modulo 255 (RFC 1146).
fn fletcher16(bytes: &[u8]) -> u16 {
    let (mut first, mut second) = (0u16, 0u16);
    for byte in bytes {
        first = (first + u16::from(*byte)) % 255;
        second = (second + first) % 255;
    }
    second << 8 | first
}

/// Puts letters together from the reads of a queue.
#[derive(Clone, Debug, Default)]
pub struct Mailbox {
    bytes: [u8; LEN],
    len: usize,
}

impl Mailbox {
    /// Takes note that the logical block `block` was read, and nothing else with it. Gives the letter that ends with it.
    pub fn take(&mut self, block: u64) -> Option<Letter> {
        let Ok(byte) = u8::try_from(block) else {
            self.len = 0;
            return None;
        };
        if self.len < MARK.len() && byte != MARK[self.len] {
            self.len = usize::from(byte == MARK[0]);
            self.bytes[0] = byte;
            return None;
        }
        self.bytes[self.len] = byte;
        self.len += 1;
        if self.len < LEN {
            return None;
        }
        self.len = 0;
        Letter::decode(&self.bytes)
    }
}

/// What the host tells an agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Notice {
    /// Changes whenever the rest does; never 0.
    pub seq: u8,
    /// log2 of the bytes of a block, less than 32.
    pub block_shift: u8,
    /// Blocks below the end of the disk are unplugged: an agent that cannot know which must not have any used again.
    pub has_holes: bool,
    /// How many blocks the host wishes the guest to use at most; `None`: it has no wish.
    pub soft_blocks: Option<u32>,
}

/// No wish, on the wire.
const NO_WISH: u32 = u32::MAX;
/// Bits of the byte that holds `block_shift`.
const SHIFT: u8 = 0x1f;
const HOLES: u8 = 0x80;

impl Notice {
    /// The answer to GET_ID, all ASCII.
    pub fn encode(&self) -> [u8; ID_LEN] {
        let mut bytes = [0; NOTICE_BYTES];
        bytes[0] = VERSION;
        bytes[1] = self.seq;
        bytes[2] = self.block_shift & SHIFT | if self.has_holes { HOLES } else { 0 };
        bytes[3..7].copy_from_slice(&self.soft_blocks.unwrap_or(NO_WISH).to_le_bytes());
        let sum = fletcher16(&bytes[..7]);
        bytes[7..].copy_from_slice(&sum.to_le_bytes());
        let mut id = [0; ID_LEN];
        id[..NOTICE.len()].copy_from_slice(NOTICE);
        let value = bytes.iter().fold(0u128, |value, byte| value << 8 | u128::from(*byte));
        for (place, digit) in id[NOTICE.len()..].iter_mut().rev().enumerate() {
            // At most 31.
            *digit = usize::try_from(value >> (5 * place) & 31)
                .ok()
                .and_then(|five| DIGITS.get(five))
                .copied()
                .unwrap_or(b'0');
        }
        id
    }

    /// `None` for anything else than a notice, such as an id.
    pub fn decode(id: &[u8]) -> Option<Self> {
        let digits: &[u8; ID_LEN - 5] = id.strip_prefix(NOTICE)?.try_into().ok()?;
        let value = digits.iter().try_fold(0u128, |value, digit| {
            let five = DIGITS.iter().position(|known| known == digit)?;
            Some(value << 5 | u128::try_from(five).ok()?)
        })?;
        let all = value.to_be_bytes();
        let (before, bytes) = all.split_at(all.len() - NOTICE_BYTES);
        let sum = u16::from_le_bytes([bytes[7], bytes[8]]);
        if bytes[0] != VERSION || sum != fletcher16(&bytes[..7]) || before.iter().any(|byte| *byte != 0) {
            return None;
        }
        let soft = u32::from_le_bytes([bytes[3], bytes[4], bytes[5], bytes[6]]);
        Some(Self {
            seq: bytes[1],
            block_shift: bytes[2] & SHIFT,
            has_holes: bytes[2] & HOLES != 0,
            soft_blocks: (soft != NO_WISH).then_some(soft),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn letters() -> impl Strategy<Value = Letter> {
        let shortfall = prop_oneof![Just(Shortfall::None), Just(Shortfall::Policy), Just(Shortfall::Error)];
        let report = (any::<u8>(), shortfall, any::<[u32; 5]>()).prop_map(
            |(seq, shortfall, [held, free, clean_cold, clean_hot, want])| {
                Letter::Report(Report { seq, shortfall, held, free, clean_cold, clean_hot, want })
            },
        );
        prop_oneof![1 => Just(Letter::Ask), 9 => report]
    }

    fn read(mailbox: &mut Mailbox, blocks: &[u8]) -> Vec<Letter> {
        blocks.iter().filter_map(|block| mailbox.take((*block).into())).collect()
    }

    /// Agents of any age and devices of any age must agree on these bytes.
    #[test]
    fn bytes_never_change() {
        let letter = Letter::Report(Report {
            seq: 3,
            shortfall: Shortfall::Busy,
            held: 0x0102_0304,
            free: 5,
            clean_cold: 6,
            clean_hot: 7,
            want: 8,
        });
        let bytes = letter.encode();
        assert_eq!(bytes[..12], [0xb5, 0x1e, 0x7a, 0xc3, 1, 3, 2, 1, 4, 3, 2, 1]);
        assert_eq!(bytes[12..30], [5, 0, 0, 0, 6, 0, 0, 0, 7, 0, 0, 0, 8, 0, 0, 0, 0, 0]);
        assert_eq!(Letter::Ask.encode()[..30], [&MARK[..], &[1], &[0; 25]].concat());
        let notice = Notice { seq: 9, block_shift: 16, has_holes: false, soft_blocks: Some(1000) };
        assert_eq!(&notice.encode(), b"vssd=00gj4780c0001ht");
    }

    proptest! {
        #[test]
        fn a_letter_arrives_whatever_was_read_before(
            letter in letters(), before in prop::collection::vec(any::<u8>(), 0..80)
        ) {
            let mut mailbox = Mailbox::default();
            read(&mut mailbox, &before);
            // Noise may look like the beginning of a letter: then that one is lost, and the next is not.
            let mut found = read(&mut mailbox, &letter.encode());
            if found.is_empty() {
                found = read(&mut mailbox, &letter.encode());
                found.extend(read(&mut mailbox, &letter.encode()));
            }
            prop_assert_eq!(found.first(), Some(&letter));
        }

        #[test]
        fn a_letter_with_a_read_in_it_that_is_none_of_it_is_no_letter(
            letter in letters(), at in 0..LEN, stranger: u8
        ) {
            let mut blocks = letter.encode().to_vec();
            blocks.insert(at, stranger);
            let arrived = read(&mut Mailbox::default(), &blocks);
            prop_assert!(arrived.iter().all(|arrived| *arrived == letter));
            let mut blocks = letter.encode().map(u64::from).to_vec();
            blocks.insert(at, 256);
            let mut mailbox = Mailbox::default();
            let arrived = blocks.iter().filter_map(|block| mailbox.take(*block)).count();
            prop_assert_eq!(arrived, usize::from(at == 0));
        }

        #[test]
        fn a_notice_survives_and_a_changed_one_does_not(
            seq: u8, block_shift in 0u8..32, has_holes: bool, soft in any::<Option<u32>>(), at in 0..ID_LEN, change: u8
        ) {
            let soft_blocks = soft.filter(|soft| *soft != NO_WISH);
            let notice = Notice { seq, block_shift, has_holes, soft_blocks };
            let id = notice.encode();
            prop_assert!(id.iter().all(|byte| byte.is_ascii_graphic()));
            prop_assert_eq!(Notice::decode(&id), Some(notice));
            let mut changed = id;
            changed[at] ^= change;
            prop_assert!(changed == id || Notice::decode(&changed) != Some(notice));
        }

        #[test]
        fn any_bytes_are_judged(id in prop::collection::vec(any::<u8>(), 0..24)) {
            let _ = Notice::decode(&id);
        }
    }

    #[test]
    fn an_id_is_no_notice() {
        assert_eq!(Notice::decode(b"vssd-vm1"), None);
        assert_eq!(Notice::decode(b"vssd=000000000000000"), None);
        assert_eq!(Notice::decode(b""), None);
    }
}
