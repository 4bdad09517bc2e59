// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The journal: what changed since the last checkpoint, in order.
//!
//! A circular region of pages of 4 KiB. Page `n` (counted from the pool's first) lies at slot `n mod pages`:
//!
//! ```text
//! 0   u32      magic "VJPG"
//! 4   u32      CRC-32C of the 64 bytes of header (this field as zero) and of the records
//! 8   u64      sequence number n
//! 16  u64      first page of the commit it belongs to: every page before that one was durable before this was written
//! 24  [u8;16]  pool
//! 40  u32      bytes of records
//! 44           zero
//! 64           records
//! ```
//!
//! *Group commit.* Records are appended to a page in memory under the ledger's lock, the same lock under
//! which the maps change, so that the journal's order is the order of the changes. A commit seals the
//! page, writes all sealed pages and makes them durable with one flush; whoever waits meanwhile is served by
//! the next. Pages are never rewritten: a commit of one record uses up a page, but can never damage a record
//! that was durable before.
//!
//! *Reading back.* Replay runs from the checkpoint's page to the first that is missing or invalid. If the
//! power failed within a commit, any of its pages may be there or not; they all name a commit that
//! starts at or before the hole, and are ignored. A valid page that names a commit starting *after* the hole
//! proves that the missing page once was durable: that is damage, and is never skipped. Each open starts
//! a new stretch beyond the highest number ever seen, from a new checkpoint, so that an ignored page
//! can never be taken for a successor of a page written later.
//!
//! *The end of the process.* A guest outlives the daemon and goes on with the next one, so what was answered to it must
//! outlive the daemon too, flushed or not. Before a lane answers, [`Journal::hand_over`] has written the records behind
//! what it answers to the medium; only a flush waits for them to be durable.
//!
//! *Failure.* After a failed write or flush nothing is committed any more: what is on the medium is not
//! known, so nothing may be acknowledged.

use std::io;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use crate::blocks::Blocks;
use crate::crc::{Crc, crc32c};
use crate::error::{Error, Result};
use crate::lock;
use crate::record::{Record, SLOT};
use crate::sabotage::{Sabotage, active};
use crate::store::Store;
use crate::types::Uuid;

pub(crate) const PAGE: usize = 4096;
/// Pages and checkpoints on a medium have lower numbers: higher ones could overflow when counting on, and no pool lives that long.
pub(crate) const NUMBERS: u64 = u64::MAX / 2;
const HEADER: usize = 64;
const MAGIC: u32 = u32::from_le_bytes(*b"VJPG");

/// How many one-slot records fit in a page.
pub(crate) const RECORDS_PER_PAGE: usize = (PAGE - HEADER) / SLOT;

/// Where the journal lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Region {
    pub(crate) offset: u64,
    pub(crate) pages: u64,
}

#[derive(Debug)]
struct Page {
    sequence: u64,
    used: usize,
    bytes: Box<[u8; PAGE]>,
}

/// Records that are not on the medium yet.
#[derive(Debug)]
pub(crate) struct Buffer {
    /// The number the next page will get.
    next: u64,
    open: Option<Page>,
    sealed: Vec<Page>,
    spare: Vec<Page>,
}

impl Buffer {
    fn new(next: u64) -> Self {
        Self { next, open: None, sealed: Vec::new(), spare: Vec::new() }
    }

    /// Adds a record and returns its position: it is durable when [`Journal::durable`] has reached that.
    pub(crate) fn append(&mut self, record: &Record) -> u64 {
        let len = record.slots() * SLOT;
        if self.open.as_ref().is_some_and(|page| page.used + len > PAGE) {
            self.seal();
        }
        let page = match &mut self.open {
            Some(page) => page,
            None => {
                let mut page = self.spare.pop().unwrap_or_else(|| Page {
                    sequence: 0,
                    used: HEADER,
                    bytes: Box::new([0; PAGE]),
                });
                page.sequence = self.next;
                page.used = HEADER;
                page.bytes.fill(0);
                self.next += 1;
                self.open.insert(page)
            }
        };
        record.encode(&mut page.bytes[page.used..page.used + len]);
        page.used += len;
        page.sequence
    }

    /// The position that covers everything appended so far.
    pub(crate) fn position(&self) -> u64 {
        self.next - 1
    }

    /// Closes the current page. Whatever is appended from now on has a position of at least what this returns.
    pub(crate) fn seal(&mut self) -> u64 {
        self.sealed.extend(self.open.take());
        self.next
    }
}

/// What changes together: the journal's tail and the blocks' whereabouts. Maps change under its lock too.
#[derive(Debug)]
pub(crate) struct Ledger {
    pub(crate) buffer: Buffer,
    pub(crate) blocks: Blocks,
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Journal {
    store: Arc<dyn Store>,
    region: Region,
    pool: Uuid,
    ledger: Mutex<Ledger>,
    /// Held while pages are written; its content is the pages being written, in one piece.
    writing: Mutex<Vec<u8>>,
    /// Held while the medium is flushed.
    flushing: Mutex<()>,
    /// The last page written.
    written: AtomicU64,
    durable: AtomicU64,
    /// How many changes were announced, and how many of those have their records on the medium.
    announced: AtomicU64,
    handed_over: AtomicU64,
    /// The oldest page that a valid checkpoint needs.
    needed_from: AtomicU64,
    /// The errno of the first failure, or 0.
    failed: AtomicI32,
}

impl Journal {
    /// A journal whose next page is `next`; the checkpoint to start from is already durable.
    pub(crate) fn new(
        store: Arc<dyn Store>,
        region: Region,
        pool: Uuid,
        next: u64,
        needed_from: u64,
        blocks: Blocks,
    ) -> Self {
        Self {
            store,
            region,
            pool,
            ledger: Mutex::new(Ledger { buffer: Buffer::new(next), blocks }),
            writing: Mutex::new(Vec::new()),
            flushing: Mutex::new(()),
            written: AtomicU64::new(next - 1),
            durable: AtomicU64::new(next - 1),
            announced: AtomicU64::new(0),
            handed_over: AtomicU64::new(0),
            needed_from: AtomicU64::new(needed_from),
            failed: AtomicI32::new(0),
        }
    }

    /// Never held during I/O.
    pub(crate) fn ledger(&self) -> MutexGuard<'_, Ledger> {
        lock(&self.ledger)
    }

    /// Everything up to this position survives a power cut.
    pub(crate) fn durable(&self) -> u64 {
        self.durable.load(Ordering::Acquire)
    }

    /// Whether a commit is quick enough for a worker to do it itself.
    pub(crate) fn is_instant(&self) -> bool {
        self.store.sync_is_instant()
    }

    pub(crate) fn pages(&self) -> u64 {
        self.region.pages
    }

    /// How many pages may be written before one that a checkpoint needs would be overwritten.
    pub(crate) fn room(&self, ledger: &Ledger) -> u64 {
        let used = ledger.buffer.next - self.needed_from.load(Ordering::Acquire);
        self.region.pages.saturating_sub(used)
    }

    /// A checkpoint made pages before `page` dispensable.
    pub(crate) fn set_needed_from(&self, page: u64) {
        self.needed_from.store(page, Ordering::Release);
    }

    pub(crate) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Acquire) != 0
    }

    /// Declares the pool's durability unknown.
    pub(crate) fn fail(&self, error: &io::Error) {
        if active(Sabotage::ForgetFailedFlush) {
            return;
        }
        let errno = error.raw_os_error().unwrap_or(libc::EIO);
        if self.failed.compare_exchange(0, errno, Ordering::AcqRel, Ordering::Acquire).is_ok() {
            tracing::error!(medium = %self.store.path().display(), %error, "write failed, the pool takes no more changes");
        }
    }

    /// `Ok` unless something failed before.
    pub(crate) fn health(&self) -> Result<()> {
        match self.failed.load(Ordering::Acquire) {
            0 => Ok(()),
            errno => Err(Error::io(
                "the pool takes no changes since a write to its medium failed",
                io::Error::from_raw_os_error(errno),
            )),
        }
    }

    /// To be called under the ledger's lock before a map is changed whose record follows under the same lock: whoever
    /// sees the change in the map then knows that there is something to hand over.
    pub(crate) fn announce(&self, _ledger: &Ledger) {
        self.announced.fetch_add(1, Ordering::Release);
    }

    /// Writes the records of every change announced so far to the medium, where they survive the end of this process.
    /// Without a change it costs two loads.
    pub(crate) fn hand_over(&self) -> Result<()> {
        if active(Sabotage::SkipHandOver) {
            return Ok(());
        }
        let wanted = self.announced.load(Ordering::Acquire);
        if self.handed_over.load(Ordering::Acquire) >= wanted {
            return Ok(());
        }
        let mut scratch = lock(&self.writing);
        if self.handed_over.load(Ordering::Acquire) >= wanted {
            return Ok(());
        }
        self.write_pages(&mut scratch)
    }

    /// Makes everything up to `position` durable.
    pub(crate) fn commit(&self, position: u64) -> Result<()> {
        if self.durable() >= position {
            return Ok(());
        }
        // Whoever waits here is served by one flush.
        let _flushing = lock(&self.flushing);
        self.health()?;
        if self.durable() >= position {
            return Ok(());
        }
        self.write_pages(&mut lock(&self.writing))?;
        let written = self.written.load(Ordering::Acquire);
        let flushed = if active(Sabotage::SkipFlush) { Ok(()) } else { self.store.sync() };
        if let Err(error) = flushed {
            self.fail(&error);
            return self.health();
        }
        self.durable.store(written, Ordering::Release);
        Ok(())
    }

    /// Writes every page that has records. The caller holds `writing`, whose content is `scratch`.
    fn write_pages(&self, scratch: &mut Vec<u8>) -> Result<()> {
        self.health()?;
        let (mut pages, announced) = {
            let mut ledger = self.ledger();
            ledger.buffer.seal();
            (std::mem::take(&mut ledger.buffer.sealed), self.announced.load(Ordering::Acquire))
        };
        if let Some(last) = pages.last().map(|page| page.sequence) {
            // All that a power cut can take until the next flush is one commit.
            let first = self.durable() + 1;
            if let Err(error) = self.write(&mut pages, first, scratch) {
                self.fail(&error);
                return self.health();
            }
            self.written.store(last, Ordering::Release);
            pages.truncate(8);
            self.ledger().buffer.spare = pages;
        }
        self.handed_over.store(announced, Ordering::Release);
        Ok(())
    }

    fn write(&self, pages: &mut [Page], first: u64, scratch: &mut Vec<u8>) -> io::Result<()> {
        let align = self.store.write_align() as usize;
        let needed = self.needed_from.load(Ordering::Acquire);
        scratch.clear();
        let mut scratch_at = 0;
        for page in pages {
            if page.sequence - needed >= self.region.pages {
                // Callers look at `room` first; better to stop than to overwrite what recovery needs.
                return Err(io::Error::from_raw_os_error(libc::ENOSPC));
            }
            finish_page(page, first, self.pool);
            let at = self.region.offset + (page.sequence % self.region.pages) * PAGE as u64;
            let len = page.used.next_multiple_of(align);
            if scratch_at + scratch.len() as u64 != at && !scratch.is_empty() {
                self.store.write_at(scratch_at, scratch)?;
                scratch.clear();
            }
            if scratch.is_empty() {
                scratch_at = at;
            }
            scratch.extend_from_slice(&page.bytes[..len]);
        }
        if !scratch.is_empty() {
            self.store.write_at(scratch_at, scratch)?;
        }
        Ok(())
    }
}

fn finish_page(page: &mut Page, group_start: u64, pool: Uuid) {
    let records = u32::try_from(page.used - HEADER).unwrap_or(0);
    let bytes = &mut page.bytes;
    bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
    bytes[8..16].copy_from_slice(&page.sequence.to_le_bytes());
    bytes[16..24].copy_from_slice(&group_start.to_le_bytes());
    bytes[24..40].copy_from_slice(&pool.0);
    bytes[40..44].copy_from_slice(&records.to_le_bytes());
    bytes[4..8].fill(0);
    let crc = crc32c(&bytes[..page.used]);
    bytes[4..8].copy_from_slice(&crc.to_le_bytes());
}

#[derive(Clone, Copy, Debug)]
struct Found {
    sequence: u64,
    group_start: u64,
    /// Where its records are within the region.
    at: usize,
    len: usize,
}

/// The journal as found on its medium.
#[derive(Debug)]
pub(crate) struct Scan {
    region: Vec<u8>,
    /// By sequence number.
    pages: Vec<Found>,
}

impl Scan {
    /// Reads the whole region.
    pub(crate) fn read(store: &dyn Store, region: Region, pool: Uuid) -> io::Result<Self> {
        let len = usize::try_from(region.pages * PAGE as u64).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut bytes = vec![0; len];
        store.read_at(region.offset, &mut bytes)?;
        let mut pages: Vec<Found> = bytes
            .chunks_exact(PAGE)
            .enumerate()
            .filter_map(|(slot, page)| {
                let (sequence, group_start, len) = parse_header(page, pool)?;
                (sequence % region.pages == slot as u64).then_some(Found {
                    sequence,
                    group_start,
                    at: slot * PAGE + HEADER,
                    len,
                })
            })
            .collect();
        pages.sort_unstable_by_key(|page| page.sequence);
        Ok(Self { region: bytes, pages })
    }

    /// One past the highest page number on the medium.
    pub(crate) fn end(&self) -> u64 {
        self.pages.last().map_or(0, |page| page.sequence + 1)
    }

    /// Hands over every record from page `begin` on and returns the first page that is not there.
    pub(crate) fn replay(&self, begin: u64, mut apply: impl FnMut(&Record) -> Result<()>) -> Result<u64> {
        let start = self.pages.partition_point(|page| page.sequence < begin);
        let mut next = begin;
        for page in &self.pages[start..] {
            if page.sequence != next {
                if page.group_start > next {
                    return Err(Error::damaged(format!(
                        "journal page {next} is missing or corrupt, although it was durable when page {} was written",
                        page.sequence
                    )));
                }
                // Part of the commit that the power cut short; a later one may still tell of damage.
                continue;
            }
            let mut records = &self.region[page.at..page.at + page.len];
            while !records.is_empty() {
                let (record, slots) = Record::decode(records).ok_or_else(|| {
                    Error::damaged(format!("journal page {} holds an unknown record", page.sequence))
                })?;
                apply(&record)?;
                records = &records[slots * SLOT..];
            }
            next += 1;
        }
        Ok(next)
    }
}

/// Sequence number, commit and bytes of records of a valid page.
fn parse_header(page: &[u8], pool: Uuid) -> Option<(u64, u64, usize)> {
    let word = |at: usize| Some(u32::from_le_bytes(page.get(at..at + 4)?.try_into().ok()?));
    let long = |at: usize| Some(u64::from_le_bytes(page.get(at..at + 8)?.try_into().ok()?));
    let len = word(40)? as usize;
    if word(0)? != MAGIC || page.get(24..40)? != pool.0 || len > PAGE - HEADER {
        return None;
    }
    let mut crc = Crc::new();
    crc.update(&page[..4]);
    crc.update(&[0; 4]);
    crc.update(&page[8..HEADER + len]);
    let (sequence, group_start) = (long(8)?, long(16)?);
    let is_whole = crc.finish() == word(4)? || active(Sabotage::IgnoreJournalChecksum);
    (is_whole && group_start <= sequence && sequence < NUMBERS).then_some((sequence, group_start, len))
}

#[cfg(test)]
mod tests {
    use vssd_protocol::units::BlockSize;

    use super::*;
    use crate::bitmap::Bitmap;
    use crate::store::MemStore;
    use crate::types::{MediumKind, VssdId};

    const REGION: Region = Region { offset: 4096, pages: 8 };
    const POOL: Uuid = Uuid([1; 16]);

    fn journal(store: &Arc<MemStore>, next: u64) -> Journal {
        let blocks = Blocks::new(BlockSize::DEFAULT, [0, 0], Bitmap::new(0), &Bitmap::new(0));
        Journal::new(Arc::clone(store) as Arc<dyn Store>, REGION, POOL, next, next, blocks)
    }

    fn store() -> Arc<MemStore> {
        Arc::new(MemStore::new(MediumKind::Nvram, 1 << 20))
    }

    fn record(n: u32) -> Record {
        Record::Delete { vssd: VssdId(n) }
    }

    fn commit_one(journal: &Journal, n: u32) {
        let position = journal.ledger().buffer.append(&record(n));
        journal.commit(position).unwrap();
    }

    fn replayed(store: &MemStore, begin: u64) -> Result<Vec<u32>> {
        let mut seen = Vec::new();
        Scan::read(store, REGION, POOL).unwrap().replay(begin, |record| {
            if let Record::Delete { vssd } = record {
                seen.push(vssd.0);
            }
            Ok(())
        })?;
        Ok(seen)
    }

    fn page_at(sequence: u64) -> u64 {
        REGION.offset + sequence % REGION.pages * PAGE as u64
    }

    #[test]
    fn committed_records_are_replayed_in_order_and_uncommitted_ones_are_not() {
        let store = store();
        let journal = journal(&store, 1);
        commit_one(&journal, 1);
        let mut ledger = journal.ledger();
        for n in 2..=200 {
            ledger.buffer.append(&record(n));
        }
        let position = ledger.buffer.position();
        drop(ledger);
        journal.commit(position).unwrap();
        journal.ledger().buffer.append(&record(201));
        assert_eq!(replayed(&store, 1).unwrap(), (1..=200).collect::<Vec<_>>());
        assert_eq!(journal.durable(), 3);
    }

    #[test]
    fn what_was_handed_over_outlives_the_process_and_is_durable_with_the_next_commit() {
        let store = store();
        let journal = journal(&store, 1);
        commit_one(&journal, 1);
        let change = |n| {
            let mut ledger = journal.ledger();
            journal.announce(&ledger);
            ledger.buffer.append(&record(n))
        };
        for n in 2..=4 {
            change(n);
            journal.hand_over().unwrap();
            assert_eq!(replayed(&store, 1).unwrap(), (1..=n).collect::<Vec<_>>());
        }
        assert_eq!(journal.durable(), 1);
        let position = journal.ledger().buffer.position();
        journal.commit(position).unwrap();
        assert_eq!(journal.durable(), 4);
        journal.hand_over().unwrap();
        assert_eq!(journal.ledger().buffer.position(), 4, "nothing new, nothing written");
    }

    #[test]
    fn pages_that_were_only_handed_over_are_one_commit_to_a_power_cut() {
        let store = store();
        let journal = journal(&store, 1);
        commit_one(&journal, 1);
        for n in 2..=4 {
            let mut ledger = journal.ledger();
            journal.announce(&ledger);
            ledger.buffer.append(&record(n));
            drop(ledger);
            journal.hand_over().unwrap();
        }
        // Of pages 2, 3 and 4 the power cut took the first.
        store.zero(page_at(2), PAGE as u64).unwrap();
        assert_eq!(replayed(&store, 1).unwrap(), [1]);
    }

    #[test]
    fn torn_commit_is_ignored() {
        let store = store();
        let journal = journal(&store, 1);
        commit_one(&journal, 1);
        let mut ledger = journal.ledger();
        for n in 0..300 {
            ledger.buffer.append(&record(n));
        }
        let position = ledger.buffer.position();
        drop(ledger);
        journal.commit(position).unwrap();
        // Of the commit of pages 2, 3 and 4, the first was lost.
        store.zero(page_at(2), PAGE as u64).unwrap();
        assert_eq!(replayed(&store, 1).unwrap(), [1]);
    }

    #[test]
    fn damage_before_a_later_commit_is_an_error() {
        let store = store();
        let journal = journal(&store, 1);
        for n in 1..=3 {
            commit_one(&journal, n);
        }
        store.zero(page_at(2) + 70, 1).unwrap();
        assert!(replayed(&store, 1).is_ok(), "the byte was zero already");
        store.write_at(page_at(2) + 128, &[1; 64]).unwrap();
        assert!(replayed(&store, 1).is_ok(), "not part of the page's records");
        store.write_at(page_at(2) + 64, &[1; 64]).unwrap();
        assert!(matches!(replayed(&store, 1), Err(Error::Damaged { .. })));
        assert_eq!(replayed(&store, 3).unwrap(), [3]);
    }

    #[test]
    fn journal_goes_round_and_stops_before_what_is_needed() {
        let store = store();
        let journal = journal(&store, 1);
        for n in 1..=8 {
            commit_one(&journal, n);
        }
        assert_eq!(journal.room(&journal.ledger()), 0);
        journal.set_needed_from(5);
        assert_eq!(journal.room(&journal.ledger()), 4);
        for n in 9..=12 {
            commit_one(&journal, n);
        }
        assert_eq!(replayed(&store, 5).unwrap(), (5..=12).collect::<Vec<_>>());
        let position = journal.ledger().buffer.append(&record(13));
        assert!(journal.commit(position).is_err());
        assert!(journal.health().is_err());
        assert_eq!(replayed(&store, 5).unwrap(), (5..=12).collect::<Vec<_>>());
    }

    #[test]
    fn pages_of_another_pool_are_not_seen() {
        let store = store();
        commit_one(&journal(&store, 1), 1);
        assert_eq!(Scan::read(&*store, REGION, Uuid([2; 16])).unwrap().end(), 0);
    }
}
