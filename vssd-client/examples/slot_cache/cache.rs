// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The cache: an object a slot, a slot a block of the vSSD; which object is where, and its checksum, in memory only.
//!
//! ```text
//!   the host asks ──► the slots used longest ago are forgotten ──► hinted, the coldest first ──► gone ──► back, free
//! ```
//!
//! It works whatever the agent and the host do. A slot that it hinted is not used before the host has what it wanted; and a
//! slot that goes all the same (by force, or because a hint was read that it had just taken back) is a miss and no more: reading it
//! fails, writing it fails, or it is back and zero, which its checksum does not match.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::Duration;

use rustix::fs::OFlags;
use rustix::io::Errno;
use vssd_client::{BlockRange, Cost, Disk, HintFile, Hints, Request};

/// Direct I/O is in units of this.
const PAGE: usize = 4096;
/// One slot in so many is hinted beyond what is asked for: one that cannot go just then must not cost another round.
const SPARE: u32 = 10;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CacheError {
    #[error(transparent)]
    Client(#[from] vssd_client::Error),
    #[error("cannot {what} slot {slot}")]
    Io { what: &'static str, slot: u32, source: io::Error },
    #[error("cannot open {path}")]
    Open { path: String, source: io::Error },
    /// Neither what was put nor zeroes: somebody else wrote there, or the disk is broken.
    #[error("slot {slot} does not hold what was put there for object {key}")]
    Corrupt { slot: u32, key: u64 },
}

type Result<T> = std::result::Result<T, CacheError>;

/// What has happened, and how the slots stand.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    pub(crate) hits: u64,
    pub(crate) misses: u64,
    pub(crate) puts: u64,
    /// Objects in slots that went without having been hinted.
    pub(crate) lost: u64,
    /// Writes to such slots.
    pub(crate) refused: u64,
    pub(crate) used: usize,
    pub(crate) free: usize,
    pub(crate) hinted: usize,
    pub(crate) gone: usize,
}

/// Hints that were published.
#[derive(Debug)]
pub(crate) struct Published {
    pub(crate) seq: u64,
    pub(crate) to_give: u32,
    /// Slots in the order in which they may go, and when each was last used; 0 for a free one.
    pub(crate) hints: Vec<(u32, u64)>,
    /// When the coldest slot that is kept was last used.
    pub(crate) coldest_kept: Option<u64>,
}

/// Where an object is.
#[derive(Clone, Copy, Debug)]
struct Entry {
    slot: u32,
    len: usize,
    checksum: u64,
    last_use: u64,
}

/// What is in a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    Free,
    Object {
        key: u64,
    },
    /// Forgotten, and named to the host.
    Hinted,
    Gone,
}

#[derive(Debug)]
pub(crate) struct SlotCache {
    disk: Disk,
    hint_file: HintFile,
    device: File,
    slot_len: usize,
    slots: Vec<Slot>,
    free: BTreeSet<u32>,
    /// In the order of their hints, with their last use.
    hinted: Vec<(u32, u64)>,
    index: HashMap<u64, Entry>,
    /// Last use to key: the coldest object comes first.
    by_use: BTreeMap<u64, u64>,
    clock: u64,
    buffer: Pages,
    counters: Counters,
}

impl SlotCache {
    /// An empty cache on the vSSD called `disk`, whose hints have the name `program`.
    pub(crate) fn open(disk: &str, program: &str) -> Result<Self> {
        let disk = Disk::open(disk)?;
        // Takes back what an earlier run had hinted: this one uses those slots.
        let hint_file = disk.hint_file(program)?;
        let status = disk.status()?;
        let path = format!("/dev/{}", disk.name());
        let direct = OFlags::DIRECT.bits().cast_signed();
        let device = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(direct)
            .open(&path)
            .map_err(|source| CacheError::Open { path, source })?;
        let slot_len = status.block_size as usize;
        let mut cache = Self {
            disk,
            hint_file,
            device,
            slot_len,
            slots: vec![Slot::Free; status.total_blocks as usize],
            free: (0..status.total_blocks).collect(),
            hinted: Vec::new(),
            index: HashMap::new(),
            by_use: BTreeMap::new(),
            clock: 0,
            buffer: Pages::new(slot_len),
            counters: Counters::default(),
        };
        cache.see_what_is_gone()?;
        Ok(cache)
    }

    /// The largest object.
    pub(crate) fn slot_len(&self) -> usize {
        self.slot_len
    }

    pub(crate) fn counters(&self) -> Counters {
        let count = |what| self.slots.iter().filter(|slot| **slot == what).count();
        Counters {
            used: self.index.len(),
            free: self.free.len(),
            hinted: self.hinted.len(),
            gone: count(Slot::Gone),
            ..self.counters
        }
    }

    /// The object of `key`, if it is here.
    pub(crate) fn get(&mut self, key: u64) -> Result<Option<&[u8]>> {
        let Some(entry) = self.index.get(&key).copied() else {
            self.counters.misses += 1;
            return Ok(None);
        };
        let offset = self.offset(entry.slot);
        let found = match self.device.read_exact_at(self.buffer.first(entry.len), offset) {
            Ok(()) if checksum(&self.buffer.first(entry.len)[..entry.len]) == entry.checksum => true,
            // It went and came back.
            Ok(()) if self.buffer.first(entry.len).iter().all(|byte| *byte == 0) => false,
            Ok(()) => return Err(CacheError::Corrupt { slot: entry.slot, key }),
            Err(error) if Errno::from_io_error(&error) == Some(Errno::NODATA) => false,
            Err(source) => return Err(CacheError::Io { what: "read", slot: entry.slot, source }),
        };
        if !found {
            self.counters.lost += 1;
            self.counters.misses += 1;
            self.forget(key);
            self.see_what_is_gone()?;
            return Ok(None);
        }
        self.counters.hits += 1;
        self.clock += 1;
        self.by_use.remove(&entry.last_use);
        self.by_use.insert(self.clock, key);
        self.index.insert(key, Entry { last_use: self.clock, ..entry });
        Ok(Some(&self.buffer.first(entry.len)[..entry.len]))
    }

    /// Keeps an object, in the place of an older one if there is no room; not at all if there are no slots.
    pub(crate) fn put(&mut self, key: u64, object: &[u8]) -> Result<()> {
        self.forget(key);
        let slot = match self.free.pop_first() {
            Some(slot) => slot,
            None => match self.forget_coldest() {
                Some((slot, _)) => {
                    self.free.remove(&slot);
                    slot
                }
                None => return Ok(()),
            },
        };
        let offset = self.offset(slot);
        let pages = self.buffer.first(object.len());
        pages[..object.len()].copy_from_slice(object);
        match self.device.write_all_at(pages, offset) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::StorageFull => {
                self.counters.refused += 1;
                self.free.insert(slot);
                return self.see_what_is_gone();
            }
            Err(source) => return Err(CacheError::Io { what: "write", slot, source }),
        }
        self.counters.puts += 1;
        self.clock += 1;
        let entry = Entry { slot, len: object.len(), checksum: checksum(object), last_use: self.clock };
        self.slots[slot as usize] = Slot::Object { key };
        self.by_use.insert(self.clock, key);
        self.index.insert(key, entry);
        Ok(())
    }

    /// Does what the host asks, if there is news of it: to be called every now and then. Gives the hints that this published.
    pub(crate) fn heed(&mut self) -> Result<Option<Published>> {
        if !self.disk.wait(Duration::ZERO)? {
            return Ok(None);
        }
        // What is gone before what is still to go: the other way round, what went in between would be made up for.
        self.see_what_is_gone()?;
        let request = self.disk.request()?;
        if request.to_give_blocks == 0 {
            // In this order: what is hinted no more and not gone is the cache's again.
            if !self.hinted.is_empty() {
                self.hint_file.withdraw()?;
            }
            self.see_what_is_gone()?;
            for (slot, _) in self.hinted.drain(..) {
                self.slots[slot as usize] = Slot::Free;
                self.free.insert(slot);
            }
            return Ok(None);
        }
        self.give(&request)
    }

    /// Forgets enough slots, the coldest first, and then names them.
    fn give(&mut self, request: &Request) -> Result<Option<Published>> {
        let enough = (request.to_give_blocks + request.to_give_blocks / SPARE) as usize;
        let before = self.hinted.len();
        while self.hinted.len() < enough {
            // What is free costs nothing.
            let Some((slot, last_use)) =
                self.free.last().map(|slot| (*slot, 0)).or_else(|| self.forget_coldest())
            else {
                break;
            };
            self.free.remove(&slot);
            self.slots[slot as usize] = Slot::Hinted;
            self.hinted.push((slot, last_use));
        }
        if self.hinted.len() == before {
            return Ok(None);
        }
        let mut hints = Hints::new();
        for (slot, last_use) in &self.hinted {
            let cost = if *last_use == 0 { Cost::Free } else { Cost::CleanCold };
            hints.push(cost, BlockRange::new(*slot, 1));
        }
        self.hint_file.publish(&hints)?;
        Ok(Some(Published {
            seq: request.seq,
            to_give: request.to_give_blocks,
            hints: self.hinted.clone(),
            coldest_kept: self.by_use.first_key_value().map(|(last_use, _)| *last_use),
        }))
    }

    /// Learns from the driver which slots are gone; those that came back are free.
    fn see_what_is_gone(&mut self) -> Result<()> {
        let mut gone = vec![false; self.slots.len()];
        for range in self.disk.evicted()? {
            gone.iter_mut().skip(range.start as usize).take(range.count as usize).for_each(|is| *is = true);
        }
        for (slot, is_gone) in (0u32..).zip(gone) {
            match (self.slots[slot as usize], is_gone) {
                (Slot::Gone, false) => {
                    self.slots[slot as usize] = Slot::Free;
                    self.free.insert(slot);
                }
                (Slot::Gone, true) | (_, false) => {}
                (was, true) => {
                    if let Slot::Object { key } = was {
                        self.counters.lost += 1;
                        self.forget(key);
                    }
                    self.free.remove(&slot);
                    self.slots[slot as usize] = Slot::Gone;
                }
            }
        }
        let slots = &self.slots;
        self.hinted.retain(|(slot, _)| slots[*slot as usize] == Slot::Hinted);
        Ok(())
    }

    fn forget(&mut self, key: u64) {
        if let Some(entry) = self.index.remove(&key) {
            self.by_use.remove(&entry.last_use);
            self.slots[entry.slot as usize] = Slot::Free;
            self.free.insert(entry.slot);
        }
    }

    /// Gives the slot that has become free, and when it was last used.
    fn forget_coldest(&mut self) -> Option<(u32, u64)> {
        let (last_use, key) = self.by_use.first_key_value().map(|(last_use, key)| (*last_use, *key))?;
        let slot = self.index.get(&key)?.slot;
        self.forget(key);
        Some((slot, last_use))
    }

    fn offset(&self, slot: u32) -> u64 {
        u64::from(slot) * self.slot_len as u64
    }
}

/// Tells what was put from anything else that may be there; it need not withstand somebody who means harm.
fn checksum(bytes: &[u8]) -> u64 {
    let mut sum = 0xcbf2_9ce4_8422_2325 ^ bytes.len() as u64;
    for chunk in bytes.chunks(8) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        sum = (sum ^ u64::from_le_bytes(word)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    }
    sum
}

/// A slot's bytes in memory, aligned as direct I/O wants it.
#[derive(Debug)]
struct Pages {
    bytes: Vec<u8>,
    begin: usize,
}

impl Pages {
    fn new(len: usize) -> Self {
        let bytes = vec![0; len + PAGE];
        let begin = bytes.as_ptr().align_offset(PAGE);
        Self { bytes, begin }
    }

    /// The pages that hold the first `len` bytes.
    fn first(&mut self, len: usize) -> &mut [u8] {
        &mut self.bytes[self.begin..][..len.next_multiple_of(PAGE)]
    }
}
