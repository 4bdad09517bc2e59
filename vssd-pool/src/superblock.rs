// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The superblock: what a medium is part of, and where things lie on it.
//!
//! ```text
//! medium:  superblock ·· superblock ·· 1 MiB │ checkpoint A │ checkpoint B │ journal │ blocks …
//!          at 0          at 512 KiB            (where the superblock says; on some medium)
//! ```
//!
//! Two equal copies, so that neither a torn write nor a stray partition table takes both. Little-endian,
//! 4096 bytes:
//!
//! ```text
//! 0    [u8;8]   magic "vSSDpool"
//! 8    u32      version (1)
//! 12   u32      CRC-32C of the page with this field as zero
//! 16   u64      incompatible features: an unknown bit forbids opening
//! 24   u64      compatible features: unknown bits are ignored
//! 32   [u8;16]  pool
//! 48   2×[u8;16] NV-RAM medium and SSD medium; zero where there is none
//! 80   2×u32    blocks on each
//! 88   u8       which of the two this is (0 NV-RAM, 1 SSD)
//! 89   u8       medium of the journal
//! 90   u8       medium of the checkpoints
//! 91   u8       log2 of the block size
//! 92   u32      overcommit, per cent
//! 96   u64      first byte of the blocks on this medium
//! 104  2×u64    checkpoint slots; 120 u64 bytes of each
//! 128  u64      journal; 136 u64 pages in it
//! 144  u32      the most vSSDs
//! 148  u8       bytes of name; 149 … the name
//! ```
//!
//! It is written once, when the pool is made, last of all: a medium has a superblock only when everything
//! that it points to is durable, and the metadata medium gets its own after the other. Nothing in it changes
//! later, so nothing about it has to be ordered later.

use std::io;
use std::path::Path;

use vssd_protocol::units::BlockSize;

use crate::arbiter::Capacity;
use crate::crc::crc32c;
use crate::error::{Error, Result};
use crate::journal::{PAGE, Region};
use crate::map::MAX_PHYSICAL_BLOCKS;
use crate::record::MAX_NAME;
use crate::store::Store;
use crate::types::{MediumKind, Uuid};

pub(crate) const COPIES: [u64; 2] = [0, 512 << 10];
/// What is set aside for superblocks on each medium.
pub(crate) const HEADER: u64 = 1 << 20;
pub(crate) const SIZE: usize = 4096;

const MAGIC: &[u8; 8] = b"vSSDpool";
const VERSION: u32 = 1;
const KNOWN_INCOMPATIBLE: u64 = 0;

/// What all media of a pool agree on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) pool: Uuid,
    pub(crate) name: String,
    pub(crate) block_size: BlockSize,
    pub(crate) overcommit_percent: u32,
    /// Indexed like [`MediumKind::ALL`]; all zero where there is none.
    pub(crate) media: [Uuid; 2],
    pub(crate) blocks: [u32; 2],
    pub(crate) journal_on: MediumKind,
    pub(crate) journal: Region,
    pub(crate) slots_on: MediumKind,
    pub(crate) slots: [u64; 2],
    pub(crate) slot_len: u64,
    pub(crate) max_vssds: u32,
}

/// One medium's superblock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Superblock {
    pub(crate) layout: Layout,
    pub(crate) kind: MediumKind,
    pub(crate) data_offset: u64,
}

impl Layout {
    pub(crate) fn total_blocks(&self) -> u32 {
        self.blocks[0] + self.blocks[1]
    }

    pub(crate) fn capacity(&self) -> Capacity {
        Capacity { physical: self.blocks, overcommit_percent: self.overcommit_percent }
    }

    pub(crate) fn has(&self, kind: MediumKind) -> bool {
        self.media[kind.index()] != Uuid([0; 16])
    }
}

fn round_up(value: u64, to: u64) -> u64 {
    value.div_ceil(to) * to
}

/// Places everything on media of the given sizes; returns the layout and each medium's `data_offset`.
pub(crate) fn plan(
    name: &str,
    sizes: [Option<u64>; 2],
    block_size: BlockSize,
    overcommit_percent: u32,
) -> Result<(Layout, [u64; 2])> {
    let too_small = |kind: MediumKind, needs: u64| {
        let has = sizes[kind.index()].unwrap_or(0);
        Error::invalid(format!("the {kind} medium has {has} bytes, the pool's layout needs at least {needs}"))
    };
    let random = || Uuid::random().map_err(|source| Error::io("cannot get random bytes", source));
    // The blocks are a little fewer, for what the metadata takes; the difference is slack in the slots.
    let total: u64 = sizes.iter().flatten().map(|size| size >> block_size.shift()).sum();
    if total > u64::from(MAX_PHYSICAL_BLOCKS) {
        return Err(Error::invalid(format!(
            "{total} blocks are too many, at most {MAX_PHYSICAL_BLOCKS}; use larger ones"
        )));
    }
    // The bound above makes it fit.
    let max_vssds = u32::try_from(total / 4).unwrap_or(1024).clamp(16, 1024);
    let slot_len = crate::checkpoint::slot_len(total, overcommit_percent, max_vssds);
    let [nvram, ssd] = sizes;
    let journal_on = if nvram.is_some() { MediumKind::Nvram } else { MediumKind::Ssd };
    // Checkpoints are written rarely and in bulk: they must not eat up a small NV-RAM beside a large SSD.
    let slots_on = match (nvram, ssd) {
        (Some(size), Some(_)) if 2 * slot_len > size / 4 => MediumKind::Ssd,
        (Some(_), _) => MediumKind::Nvram,
        (None, _) => MediumKind::Ssd,
    };
    let mut next = [HEADER; 2];
    let slots_at = next[slots_on.index()];
    next[slots_on.index()] += 2 * slot_len;
    let journal_size = sizes[journal_on.index()].unwrap_or(0);
    let journal = Region {
        offset: next[journal_on.index()],
        pages: (journal_size / 256).clamp(256 << 10, 64 << 20) / PAGE as u64,
    };
    next[journal_on.index()] += journal.pages * PAGE as u64;
    let mut layout = Layout {
        pool: random()?,
        name: name.to_owned(),
        block_size,
        overcommit_percent,
        media: [Uuid([0; 16]); 2],
        blocks: [0; 2],
        journal_on,
        journal,
        slots_on,
        slots: [slots_at, slots_at + slot_len],
        slot_len,
        max_vssds,
    };
    let mut data_offsets = [0; 2];
    for kind in MediumKind::ALL {
        let i = kind.index();
        let Some(size) = sizes[i] else { continue };
        let data_offset = round_up(next[i], block_size.bytes());
        let blocks = size.checked_sub(data_offset).and_then(|len| block_size.blocks_in(len)).unwrap_or(0);
        if blocks == 0 {
            return Err(too_small(kind, data_offset + block_size.bytes()));
        }
        data_offsets[i] = data_offset;
        layout.blocks[i] = blocks;
        layout.media[i] = random()?;
    }
    Ok((layout, data_offsets))
}

/// How large one medium must be for a pool that holds `data_bytes` for vSSDs, with its own metadata on the same
/// medium and nothing overcommitted.
pub fn medium_bytes(data_bytes: u64, block_size: BlockSize) -> Result<u64> {
    let too_many = || Error::invalid(format!("{data_bytes} bytes are too many blocks of {block_size}"));
    let wanted = block_size
        .blocks_for(data_bytes)
        .filter(|&blocks| blocks < MAX_PHYSICAL_BLOCKS)
        .ok_or_else(too_many)?
        .max(1);
    // The header, the smallest journal and a block for rounding, and then what the first guess was short of. The metadata grows with the
    // medium, but by far less than the blocks that it is for: a few rounds get there.
    let mut size = block_size.bytes_of(wanted + 1) + HEADER + (512 << 10);
    for _ in 0..64 {
        let (layout, _) = plan("", [None, Some(size)], block_size, 100).map_err(|_| too_many())?;
        let blocks = layout.total_blocks();
        if blocks >= wanted {
            return Ok(size);
        }
        size += block_size.bytes_of(wanted - blocks);
    }
    Err(too_many())
}

impl Superblock {
    pub(crate) fn encode(&self) -> [u8; SIZE] {
        let layout = &self.layout;
        let mut page = [0u8; SIZE];
        let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, MAGIC);
        put(8, &VERSION.to_le_bytes());
        put(32, &layout.pool.0);
        for i in 0..2 {
            put(48 + 16 * i, &layout.media[i].0);
            put(80 + 4 * i, &layout.blocks[i].to_le_bytes());
            put(104 + 8 * i, &layout.slots[i].to_le_bytes());
        }
        let index = |kind: MediumKind| u8::from(kind == MediumKind::Ssd);
        // The shift is at most 21, the name at most 64 bytes.
        let shift = u8::try_from(layout.block_size.shift()).unwrap_or(0);
        put(88, &[index(self.kind), index(layout.journal_on), index(layout.slots_on), shift]);
        put(92, &layout.overcommit_percent.to_le_bytes());
        put(96, &self.data_offset.to_le_bytes());
        put(120, &layout.slot_len.to_le_bytes());
        put(128, &layout.journal.offset.to_le_bytes());
        put(136, &layout.journal.pages.to_le_bytes());
        put(144, &layout.max_vssds.to_le_bytes());
        put(148, &[u8::try_from(layout.name.len()).unwrap_or(0)]);
        put(149, layout.name.as_bytes());
        let crc = crc32c(&page);
        page[12..16].copy_from_slice(&crc.to_le_bytes());
        page
    }

    /// What is wrong with a page that is no superblock of ours.
    pub(crate) fn decode(page: &[u8; SIZE]) -> std::result::Result<Self, String> {
        let word = |at: usize| u32::from_le_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        let uuid = |at: usize| {
            let mut bytes = [0; 16];
            bytes.copy_from_slice(&page[at..at + 16]);
            Uuid(bytes)
        };
        if &page[..8] != MAGIC {
            return Err("there is no pool".to_owned());
        }
        let mut without_crc = *page;
        without_crc[12..16].fill(0);
        if crc32c(&without_crc) != word(12) {
            return Err("the checksum is wrong".to_owned());
        }
        if word(8) != VERSION {
            return Err(format!("its version is {}, this program knows {VERSION}", word(8)));
        }
        if long(16) & !KNOWN_INCOMPATIBLE != 0 {
            return Err(format!("it uses features {:#x} that this program does not know", long(16)));
        }
        let kind = |at: usize| match page[at] {
            0 => Ok(MediumKind::Nvram),
            1 => Ok(MediumKind::Ssd),
            other => Err(format!("it names a medium {other}")),
        };
        let name_len = usize::from(page[148]).min(MAX_NAME);
        let name =
            String::from_utf8(page[149..149 + name_len].to_vec()).map_err(|_| "its name is no text")?;
        let block_size = 1u32
            .checked_shl(u32::from(page[91]))
            .and_then(BlockSize::new)
            .ok_or_else(|| format!("its block size is 2^{}", page[91]))?;
        Ok(Self {
            layout: Layout {
                pool: uuid(32),
                name,
                block_size,
                overcommit_percent: word(92),
                media: [uuid(48), uuid(64)],
                blocks: [word(80), word(84)],
                journal_on: kind(89)?,
                journal: Region { offset: long(128), pages: long(136) },
                slots_on: kind(90)?,
                slots: [long(104), long(112)],
                slot_len: long(120),
                max_vssds: word(144),
            },
            kind: kind(88)?,
            data_offset: long(96),
        })
    }

    /// Whether everything it places on this medium lies within `size` bytes and apart; the checksum has vouched
    /// for the bytes, this guards against a medium that shrank.
    pub(crate) fn validate(&self, path: &Path, size: u64) -> Result<()> {
        let layout = &self.layout;
        let i = self.kind.index();
        let data = u64::from(layout.blocks[i]).checked_mul(layout.block_size.bytes());
        let mut parts = vec![(self.data_offset, data)];
        if layout.journal_on == self.kind {
            parts.push((layout.journal.offset, layout.journal.pages.checked_mul(PAGE as u64)));
        }
        if layout.slots_on == self.kind {
            parts.extend(layout.slots.map(|slot| (slot, Some(layout.slot_len))));
        }
        parts.sort_unstable();
        let mut end = HEADER;
        for (start, len) in parts {
            let next = len.and_then(|len| start.checked_add(len));
            match next {
                Some(next) if start >= end && next <= size => end = next,
                Some(next) if start >= end => {
                    return Err(Error::medium(
                        path,
                        format!("has {size} bytes, the pool needs {next}: it was truncated"),
                    ));
                }
                _ => {
                    return Err(Error::damaged(format!(
                        "the superblock of {} contradicts itself",
                        path.display()
                    )));
                }
            }
        }
        let total = u64::from(layout.blocks[0]) + u64::from(layout.blocks[1]);
        let needed = crate::checkpoint::slot_len(total, layout.overcommit_percent, layout.max_vssds);
        let is_sane = total <= u64::from(MAX_PHYSICAL_BLOCKS)
            && (100..=1000).contains(&layout.overcommit_percent)
            && layout.journal.pages >= 64
            && layout.slot_len >= needed
            && layout.has(self.kind)
            && layout.has(layout.journal_on)
            && layout.has(layout.slots_on)
            && self.data_offset.is_multiple_of(4096)
            && layout.journal.offset.is_multiple_of(4096)
            && layout.slots.iter().all(|slot| slot.is_multiple_of(4096));
        if is_sane {
            Ok(())
        } else {
            Err(Error::damaged(format!("the superblock of {} contradicts itself", path.display())))
        }
    }

    /// Writes both copies, durably.
    pub(crate) fn write(&self, store: &dyn Store) -> io::Result<()> {
        let page = self.encode();
        for at in COPIES {
            store.write_at(at, &page)?;
        }
        store.sync()
    }
}

/// The first good copy among the pages read at [`COPIES`], and what is wrong with each bad one.
pub(crate) fn choose(copies: &[[u8; SIZE]; 2]) -> (Option<Superblock>, Vec<String>) {
    let mut chosen = None;
    let mut wrong = Vec::new();
    for (copy, at) in copies.iter().zip(COPIES) {
        match Superblock::decode(copy) {
            Ok(superblock) => {
                if chosen.is_none() {
                    chosen = Some(superblock);
                } else if chosen.as_ref() != Some(&superblock) {
                    wrong.push(format!("superblock at byte {at} differs from the first"));
                }
            }
            Err(what) => wrong.push(format!("superblock at byte {at}: {what}")),
        }
    }
    (chosen, wrong)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn example() -> Superblock {
        let (layout, offsets) =
            plan("p", [Some(64 << 20), Some(256 << 20)], BlockSize::DEFAULT, 100).unwrap();
        Superblock { layout, kind: MediumKind::Nvram, data_offset: offsets[0] }
    }

    #[test]
    fn superblock_comes_back_as_it_went() {
        let superblock = example();
        assert_eq!(Superblock::decode(&superblock.encode()), Ok(superblock.clone()));
        superblock.validate(Path::new("m"), 64 << 20).unwrap();
    }

    #[test]
    fn shrunken_medium_is_named() {
        let error = example().validate(Path::new("m"), 63 << 20).unwrap_err();
        assert_eq!(error.code(), "E_MEDIUM");
    }

    #[test]
    fn unknown_incompatible_feature_is_refused() {
        let mut page = example().encode();
        page[16] = 1;
        page[12..16].fill(0);
        let crc = crc32c(&page);
        page[12..16].copy_from_slice(&crc.to_le_bytes());
        assert!(Superblock::decode(&page).unwrap_err().contains("features 0x1"));
    }

    #[test]
    fn medium_bytes_suffice_and_waste_little() {
        for shift in [12, 16, 21] {
            let block_size = BlockSize::new(1 << shift).unwrap();
            for data in [0, 1, 1 << 20, (1 << 30) - 1, 1 << 30, 1 << 40, 3 << 41] {
                let size = medium_bytes(data, block_size).unwrap();
                let (layout, _) = plan("p", [None, Some(size)], block_size, 100).unwrap();
                assert!(block_size.bytes_of(layout.blocks[1]) >= data, "{data} in blocks of {block_size}");
                assert!(
                    size <= data + data / 16 + (8 << 20),
                    "{size} bytes for {data} in blocks of {block_size}"
                );
            }
            assert_eq!(medium_bytes(u64::MAX, block_size).unwrap_err().code(), "E_INVALID");
        }
    }

    #[test]
    fn small_nvram_beside_large_ssd_leaves_checkpoints_to_the_ssd() {
        let (layout, _) = plan("p", [Some(16 << 20), Some(1 << 40)], BlockSize::DEFAULT, 100).unwrap();
        assert_eq!((layout.journal_on, layout.slots_on), (MediumKind::Nvram, MediumKind::Ssd));
        assert!(layout.blocks[0] > 200);
    }

    proptest! {
        #[test]
        fn any_flipped_bit_is_noticed(bit in 0..SIZE * 8) {
            let good = example();
            let mut page = good.encode();
            page[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Superblock::decode(&page).is_err());
        }

        #[test]
        fn planned_layout_is_valid(nvram in prop::option::of(0u64..1 << 34), ssd in prop::option::of(0u64..1 << 44),
                                   shift in 12u32..22, overcommit in 100u32..1000) {
            let block_size = BlockSize::new(1 << shift).unwrap();
            if let Ok((layout, offsets)) = plan("p", [nvram, ssd], block_size, overcommit) {
                for (kind, size) in MediumKind::ALL.into_iter().zip([nvram, ssd]) {
                    let Some(size) = size else { continue };
                    let superblock = Superblock { layout: layout.clone(), kind, data_offset: offsets[kind.index()] };
                    superblock.validate(Path::new("m"), size).unwrap();
                }
            }
        }
    }
}
