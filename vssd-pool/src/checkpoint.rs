// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Checkpoints: the whole metadata at one place, so that the journal can start over.
//!
//! Two slots take turns. A slot, little-endian:
//!
//! ```text
//! 0   [u8;8]   magic "vSSDckpt"         4096  u32  next vSSD's id; u32 how many vSSDs
//! 8   u32      CRC-32C of this page           per vSSD: u32 length, directory entry, then
//! 12  u32      CRC-32C of the body            its plugged blocks in runs: u32 start, u32 count,
//! 16  [u8;16]  pool                           u32 map entry of the first; end mark ffff ffff 0 0
//! 32  u64      checkpoint number              then the set of clean blocks, one bit each
//! 40  u64      journal page to replay from
//! 48  u64      bytes of the body
//! ```
//!
//! A checkpoint is taken while lanes go on mapping and discarding blocks, so it is no snapshot of one
//! moment. It need not be: records are absolute, and every change that the scan may have missed is in the
//! journal from `begin` on, which was fixed before the scan. The order, and what each step is there for:
//!
//! 1. fix `begin` (the keeper, which alone plugs, unplugs and edits the directory, does nothing else until 5);
//! 2. make the older slot's header zero, durably: a half-written body must not look like damage;
//! 3. write the body;
//! 4. commit the journal up to now: the scan may have seen a block both where it was and, after it
//!    went round, where it is; the records that tell which is right must not be missing;
//! 5. make the body durable, then write the header, then make that durable: now it counts, and the journal
//!    before the *other* slot's `begin` may be overwritten (not before its own: should this slot ever be
//!    unreadable, the other one still leads to the same state).

use std::io;

use vssd_protocol::units::{BlockIndex, PhysicalBlock};

use crate::bitmap::Bitmap;
use crate::crc::{Crc, crc32c};
use crate::error::{Error, Result};
use crate::journal::{NUMBERS, PAGE};
use crate::map::{Entry, Map, most_blocks};
use crate::record::{MAX_ENTRY, Meta, decode_meta, encode_meta};
use crate::state::State;
use crate::store::Store;
use crate::types::Uuid;

const MAGIC: &[u8; 8] = b"vSSDckpt";
const RUN: usize = 12;
const END_MARK: u32 = u32::MAX;
/// Room that a directory entry takes: its length before it, its runs' end mark behind.
const ENTRY_ROOM: u64 = 4 + MAX_ENTRY as u64 + RUN as u64;
/// Bytes written at a time.
const PIECE: usize = 1 << 20;

/// What a slot must hold in the worst case: every promised block a run of its own.
pub(crate) fn slot_len(total_blocks: u64, overcommit_percent: u32, max_vssds: u32) -> u64 {
    let promisable = total_blocks.saturating_mul(u64::from(overcommit_percent)) / 100;
    let body =
        8 + u64::from(max_vssds) * ENTRY_ROOM + promisable * RUN as u64 + total_blocks.div_ceil(64) * 8;
    (PAGE as u64 + body).next_multiple_of(PAGE as u64)
}

/// One of the two places.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

/// What to write.
pub(crate) struct Contents<'a> {
    pub(crate) next_id: u32,
    pub(crate) vssds: &'a mut dyn ExactSizeIterator<Item = (Meta, &'a Map)>,
    pub(crate) clean: &'a Bitmap,
}

/// A valid slot's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) number: u64,
    pub(crate) begin: u64,
    body_len: u64,
    body_crc: u32,
}

struct BodyWriter<'a> {
    store: &'a dyn Store,
    slot: Slot,
    written: u64,
    buf: Vec<u8>,
    crc: Crc,
}

impl BodyWriter<'_> {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.buf.extend_from_slice(bytes);
        if self.buf.len() >= PIECE {
            let rest = self.buf.split_off(PIECE);
            self.write_out()?;
            self.buf = rest;
        }
        Ok(())
    }

    fn write_out(&mut self) -> io::Result<()> {
        let padded = self.buf.len().next_multiple_of(PAGE);
        let at = PAGE as u64 + self.written;
        if at + padded as u64 > self.slot.len {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        self.crc.update(&self.buf);
        self.written += self.buf.len() as u64;
        self.buf.resize(padded, 0);
        self.store.write_at(self.slot.offset + at, &self.buf)
    }
}

/// Writes a checkpoint; `commit` makes the journal durable up to the moment it is called.
pub(crate) fn write(
    store: &dyn Store,
    slot: Slot,
    pool: Uuid,
    (number, begin): (u64, u64),
    contents: Contents<'_>,
    commit: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let failed = |source| Error::io("cannot write a checkpoint", source);
    store.write_at(slot.offset, &[0; PAGE]).and_then(|()| store.sync()).map_err(failed)?;
    let mut body = BodyWriter { store, slot, written: 0, buf: Vec::new(), crc: Crc::new() };
    write_body(&mut body, contents).map_err(failed)?;
    commit()?;
    store.sync().map_err(failed)?;
    let mut page = [0u8; PAGE];
    page[..8].copy_from_slice(MAGIC);
    page[12..16].copy_from_slice(&body.crc.finish().to_le_bytes());
    page[16..32].copy_from_slice(&pool.0);
    page[32..40].copy_from_slice(&number.to_le_bytes());
    page[40..48].copy_from_slice(&begin.to_le_bytes());
    page[48..56].copy_from_slice(&body.written.to_le_bytes());
    let crc = crc32c(&page);
    page[8..12].copy_from_slice(&crc.to_le_bytes());
    store.write_at(slot.offset, &page).and_then(|()| store.sync()).map_err(failed)
}

fn write_body(body: &mut BodyWriter<'_>, contents: Contents<'_>) -> io::Result<()> {
    body.put(&contents.next_id.to_le_bytes())?;
    let count = u32::try_from(contents.vssds.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    body.put(&count.to_le_bytes())?;
    let mut entry_bytes = Vec::new();
    for (meta, map) in contents.vssds {
        entry_bytes.clear();
        encode_meta(&meta, &mut entry_bytes);
        let len = u32::try_from(entry_bytes.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        body.put(&len.to_le_bytes())?;
        body.put(&entry_bytes)?;
        for (start, count, entry) in map.runs(0) {
            put_run(body, [start, count, entry.to_bits()])?;
        }
        put_run(body, [END_MARK, 0, 0])?;
    }
    for word in contents.clean.words() {
        body.put(&word.to_le_bytes())?;
    }
    body.write_out()
}

fn put_run(body: &mut BodyWriter<'_>, run: [u32; 3]) -> io::Result<()> {
    let mut bytes = [0; RUN];
    for (to, word) in bytes.chunks_exact_mut(4).zip(run) {
        to.copy_from_slice(&word.to_le_bytes());
    }
    body.put(&bytes)
}

/// What a slot holds.
#[derive(Debug)]
pub(crate) enum Found {
    /// A header that is no checkpoint of this pool: never written, or being written when the power failed.
    Nothing,
    /// A good header over a body that is not what was written.
    Corrupt(Header, String),
    Good(Header, State),
}

/// Reads a slot.
pub(crate) fn read(store: &dyn Store, slot: Slot, pool: Uuid, total_blocks: u32) -> io::Result<Found> {
    let mut page = [0u8; PAGE];
    store.read_at(slot.offset, &mut page)?;
    let Some(header) = parse_header(&mut page, pool, slot.len) else { return Ok(Found::Nothing) };
    // Bounded by the slot's length, which lies within the medium.
    let len = usize::try_from(header.body_len).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut body = vec![0; len];
    store.read_at(slot.offset + PAGE as u64, &mut body)?;
    if crc32c(&body) != header.body_crc {
        return Ok(Found::Corrupt(header, "its checksum is wrong".to_owned()));
    }
    Ok(match parse_body(&body, total_blocks) {
        Some(state) => Found::Good(header, state),
        None => Found::Corrupt(header, "its content makes no sense".to_owned()),
    })
}

fn parse_header(page: &mut [u8; PAGE], pool: Uuid, slot_len: u64) -> Option<Header> {
    let long = |at: usize| Some(u64::from_le_bytes(page.get(at..at + 8)?.try_into().ok()?));
    let word = |at: usize| Some(u32::from_le_bytes(page.get(at..at + 4)?.try_into().ok()?));
    let header = Header { number: long(32)?, begin: long(40)?, body_len: long(48)?, body_crc: word(12)? };
    let crc = word(8)?;
    let is_ours = page[..8] == MAGIC[..] && page[16..32] == pool.0;
    page[8..12].fill(0);
    let is_sane = header.body_len <= slot_len - PAGE as u64
        && header.number < NUMBERS
        && (1..NUMBERS).contains(&header.begin);
    (is_ours && crc32c(page) == crc && is_sane).then_some(header)
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (now, later) = self.0.split_at_checked(len)?;
        self.0 = later;
        Some(now)
    }

    fn word(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }
}

fn parse_body(body: &[u8], total_blocks: u32) -> Option<State> {
    let mut reader = Reader(body);
    let mut state = State::new(total_blocks);
    state.next_id = reader.word()?;
    for _ in 0..reader.word()? {
        let len = reader.word()? as usize;
        let (meta, used) = decode_meta(reader.take(len)?)?;
        if used != len || meta.max_blocks > most_blocks(total_blocks) {
            return None;
        }
        let map = Map::new(meta.max_blocks);
        loop {
            let (start, count, bits) = (reader.word()?, reader.word()?, reader.word()?);
            if start == END_MARK {
                break;
            }
            let entry = Entry::from_bits(bits);
            let end = start.checked_add(count).filter(|&end| count > 0 && end <= map.len())?;
            let first = entry.physical();
            if !entry.is_plugged() || first.is_some_and(|first| !fits(first, count, total_blocks)) {
                return None;
            }
            for block in start..end {
                let entry =
                    first.map_or(entry, |first| Entry::mapped(PhysicalBlock(first.0 + (block - start))));
                map.set(BlockIndex(block), entry);
            }
        }
        if state.vssds.insert(meta.id, (meta, map)).is_some() {
            return None;
        }
    }
    let words = reader.0.chunks_exact(8).map(|chunk| {
        let mut word = [0; 8];
        word.copy_from_slice(chunk);
        u64::from_le_bytes(word)
    });
    if !reader.0.len().is_multiple_of(8) {
        return None;
    }
    state.clean = Bitmap::from_words(words.collect(), total_blocks)?;
    Some(state)
}

fn fits(first: PhysicalBlock, count: u32, total_blocks: u32) -> bool {
    first.0.checked_add(count).is_some_and(|end| end <= total_blocks)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::store::MemStore;
    use crate::types::{MediumKind, VssdAttrs, VssdId};

    const POOL: Uuid = Uuid([3; 16]);
    const TOTAL: u32 = 100;

    fn slot() -> Slot {
        Slot { offset: 8192, len: slot_len(u64::from(TOTAL), 100, 16) }
    }

    fn sample() -> (Meta, Map, Bitmap) {
        let meta = Meta {
            id: VssdId(4),
            uuid: Uuid([7; 16]),
            name: "a".to_owned(),
            max_blocks: 64,
            attrs: VssdAttrs::default(),
        };
        let map = Map::new(64);
        for block in [0, 1, 2, 10, 11, 30] {
            map.set(BlockIndex(block), Entry::mapped(PhysicalBlock(90 - block)));
        }
        for block in 12..20 {
            map.set(BlockIndex(block), Entry::EMPTY);
        }
        let mut clean = Bitmap::new(TOTAL);
        for i in 0..50 {
            clean.insert(i);
        }
        (meta, map, clean)
    }

    fn write_sample(store: &MemStore) -> (Meta, Map, Bitmap) {
        write_numbered(store, (9, 77))
    }

    fn write_numbered(store: &MemStore, (number, begin): (u64, u64)) -> (Meta, Map, Bitmap) {
        let (meta, map, clean) = sample();
        let mut list = vec![(meta.clone(), &map)].into_iter();
        let contents = Contents { next_id: 5, vssds: &mut list, clean: &clean };
        write(store, slot(), POOL, (number, begin), contents, || Ok(())).unwrap();
        (meta, map, clean)
    }

    #[test]
    fn numbers_that_could_not_be_counted_on_are_no_checkpoint() {
        let store = MemStore::new(MediumKind::Nvram, 1 << 20);
        for (numbers, counts) in [
            ((9, 77), true),
            ((u64::MAX, 77), false),
            ((9, u64::MAX), false),
            ((9, 0), false),
            ((0, 1), true),
        ] {
            write_numbered(&store, numbers);
            let found = read(&store, slot(), POOL, TOTAL).unwrap();
            assert_eq!(matches!(found, Found::Good(..)), counts, "{numbers:?}: {found:?}");
        }
    }

    #[test]
    fn checkpoint_comes_back_as_it_went() {
        let store = MemStore::new(MediumKind::Nvram, 1 << 20);
        let (meta, map, clean) = write_sample(&store);
        let Found::Good(header, state) = read(&store, slot(), POOL, TOTAL).unwrap() else {
            panic!("not good")
        };
        assert_eq!((header.number, header.begin, state.next_id), (9, 77, 5));
        assert_eq!(state.clean, clean);
        let (held, held_map) = &state.vssds[&VssdId(4)];
        assert_eq!(*held, meta);
        for block in (0..64).map(BlockIndex) {
            assert_eq!(held_map.get(block), map.get(block));
        }
    }

    #[test]
    fn any_flipped_byte_is_noticed() {
        let store = MemStore::new(MediumKind::Nvram, 1 << 20);
        write_sample(&store);
        let Found::Good(header, _) = read(&store, slot(), POOL, TOTAL).unwrap() else { panic!("not good") };
        for at in (0..56).chain(PAGE as u64..PAGE as u64 + header.body_len) {
            let mut byte = [0];
            store.read_at(slot().offset + at, &mut byte).unwrap();
            store.write_at(slot().offset + at, &[byte[0] ^ 0x20]).unwrap();
            let found = read(&store, slot(), POOL, TOTAL).unwrap();
            assert!(!matches!(found, Found::Good(..)), "byte {at}");
            store.write_at(slot().offset + at, &byte).unwrap();
        }
    }

    proptest! {
        /// Behind a forged checksum anything may stand.
        #[test]
        fn any_body_is_parsed_or_refused(
            changes in prop::collection::vec((0usize..250, any::<u8>()), 0..12), cut in prop::option::of(0usize..250)
        ) {
            let store = MemStore::new(MediumKind::Nvram, 1 << 20);
            write_sample(&store);
            let Found::Good(header, _) = read(&store, slot(), POOL, TOTAL).unwrap() else { panic!("not good") };
            let mut body = vec![0; usize::try_from(header.body_len).unwrap()];
            store.read_at(slot().offset + PAGE as u64, &mut body).unwrap();
            for (at, byte) in changes {
                let at = at % body.len();
                body[at] = byte;
            }
            body.truncate(cut.unwrap_or(body.len()));
            if let Some(state) = parse_body(&body, TOTAL) {
                prop_assert_eq!(state.clean.len(), TOTAL);
                for (_, map) in state.vssds.values() {
                    prop_assert!(map.runs(0).take(100).all(|(start, count, _)| start + count <= map.len()));
                }
            }
        }
    }

    #[test]
    fn body_that_does_not_fit_is_an_error() {
        let store = MemStore::new(MediumKind::Nvram, 1 << 20);
        let (meta, map, clean) = sample();
        let mut list = vec![(meta, &map)].into_iter();
        let contents = Contents { next_id: 5, vssds: &mut list, clean: &clean };
        let short = Slot { offset: 8192, len: PAGE as u64 };
        assert!(write(&store, short, POOL, (1, 1), contents, || Ok(())).is_err());
    }
}
