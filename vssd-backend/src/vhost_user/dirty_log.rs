// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The dirty log: in which pages of guest memory the device wrote, for a front-end that moves its guest elsewhere while it runs
//! (vhost-user, "Migration").
//!
//! ```text
//!   bytes of answers are written ─► Ring::publish ─► mark every writable byte of the batch's chains, and the used entries
//!                                                 ─► used index ─► mark the used index
//! ```
//!
//! The log is a bitmap in memory that the front-end shares, one bit for each 4 KiB of guest address space. The front-end takes
//! bits out of it while we put bits in; so a bit is set after the bytes it stands for were written, never before, and by an atomic
//! OR that is not skipped when the bit seems to be set already.
//!
//! What an answer may have changed is found by walking its chain once more when it is published. Requests therefore carry nothing
//! for the log, and those that were in flight when logging began are covered. A driver that changes a chain while the
//! device has it (which virtio forbids) spoils the copy of its own memory and nothing else. A batch pays one test of an
//! `Option` while nothing is logged.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use vssd_pool::sigbus::Alarm;

use super::chain::{self, Segments};
use super::memory::GuestMemory;
use super::sigbus::{MappingError, SharedMapping};
use super::table::DescriptorTable;

/// Bytes that one bit stands for (vhost-user, "Migration": "dirty pages are of size 0x1000").
const PAGE: u64 = 0x1000;
/// Bytes that one byte of the log stands for.
const PER_BYTE: u64 = 8 * PAGE;

/// Why a log cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DirtyLogError {
    #[error("dirty log of {size:#x} bytes at offset {offset:#x} is empty or wraps around")]
    Bounds { size: u64, offset: u64 },
    #[error("dirty log needs {needed:#x} bytes of its file, which has {actual:#x}")]
    FileTooShort { needed: u64, actual: u64 },
    #[error("dirty log covers guest addresses below {covered:#x}, memory ends at {end:#x}")]
    TooSmall { covered: u64, end: u64 },
    #[error("cannot examine the file of the dirty log")]
    Stat(#[source] std::io::Error),
    #[error("cannot map the dirty log")]
    Map(#[source] MappingError),
}

/// A bitmap shared with the front-end.
#[derive(Debug)]
pub struct DirtyLog {
    /// The first byte of the bitmap; in `_mapping`.
    bits: *mut u8,
    len: u64,
    _mapping: SharedMapping,
}

// SAFETY: `bits` leads into `_mapping`, which lives as long; its bytes are only accessed with atomics.
unsafe impl Send for DirtyLog {}
// SAFETY: as above.
unsafe impl Sync for DirtyLog {}

impl DirtyLog {
    /// Maps `size` bytes of `file` from `offset` on. `alarm` is raised when the front-end shortens the file later.
    pub fn map(file: File, size: u64, offset: u64, alarm: &Alarm) -> Result<Self, DirtyLogError> {
        let bounds = || DirtyLogError::Bounds { size, offset };
        let needed = offset.checked_add(size).filter(|_| size > 0).ok_or_else(bounds)?;
        let actual = file.metadata().map_err(DirtyLogError::Stat)?.len();
        // What has no length is no file for a log.
        if actual < needed {
            return Err(DirtyLogError::FileTooShort { needed, actual });
        }
        // Mappings begin at pages, logs need not.
        let before = offset % PAGE;
        let len = size.checked_add(before).and_then(|len| usize::try_from(len).ok()).ok_or_else(bounds)?;
        let mapping = SharedMapping::new(file, offset - before, len, alarm).map_err(DirtyLogError::Map)?;
        // Fits: less than a page.
        let bits = mapping.as_ptr().wrapping_add(usize::try_from(before).unwrap_or(0));
        Ok(Self { bits, len: size, _mapping: mapping })
    }

    /// An error unless every byte of `mem` has its bit.
    pub fn expect_covers(&self, mem: &GuestMemory) -> Result<(), DirtyLogError> {
        let (covered, end) = (self.len.saturating_mul(PER_BYTE), mem.end());
        if covered < end { Err(DirtyLogError::TooSmall { covered, end }) } else { Ok(()) }
    }

    /// Notes that `len` bytes at guest address `guest` were written. What lies beyond the log is not noted.
    pub fn mark(&self, guest: u64, len: u64) {
        if len == 0 {
            return;
        }
        let mut page = guest / PAGE;
        let last = guest.saturating_add(len - 1) / PAGE;
        while page <= last && page / 8 < self.len {
            let end = last.min(page | 7);
            let mask = (0xff_u8 << (page % 8)) & (0xff_u8 >> (7 - end % 8));
            // Fits: below `len`, which was mapped with a usize.
            let at = self.bits.wrapping_add(usize::try_from(page / 8).unwrap_or(0));
            // SAFETY: `at` lies within the `len` mapped bytes (checked above); the front-end uses atomics too.
            let byte = unsafe { AtomicU8::from_ptr(at) };
            // Release: whoever takes the bit sees the bytes that it stands for.
            byte.fetch_or(mask, Ordering::Release);
            page = end + 1;
        }
    }
}

/// What of a queue's writes goes to which log.
#[derive(Clone, Debug)]
pub struct QueueLog {
    log: Arc<DirtyLog>,
    /// Under which guest address writes to the used ring are noted, if they are (VHOST_VRING_F_LOG).
    used: Option<u64>,
}

impl QueueLog {
    pub fn new(log: Arc<DirtyLog>, used: Option<u64>) -> Self {
        Self { log, used }
    }
}

/// A ring's logging, while it is on.
#[derive(Debug)]
pub struct RingLog {
    to: QueueLog,
    segments: Segments,
}

impl RingLog {
    pub fn new(to: QueueLog) -> Self {
        Self { to, segments: Segments::default() }
    }

    /// Notes what the answer to the chain at `head` may have changed: all that it lets the device write.
    pub fn mark_chain(&mut self, table: &DescriptorTable, head: u16) {
        // A chain that breaks off was answered unread, or its memory went meanwhile: what there is of it is noted.
        let _ = chain::walk(table, head, &mut self.segments);
        for segment in &self.segments.writable {
            if let Some(guest) = table.memory().guest_of_host(segment.iov_base.cast()) {
                self.to.log.mark(guest, segment.iov_len as u64);
            }
        }
    }

    /// Notes that `len` bytes at `offset` of the used ring were written.
    pub fn mark_used(&self, offset: usize, len: usize) {
        if let Some(used) = self.to.used {
            self.to.log.mark(used.saturating_add(offset as u64), len as u64);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::super::memory::tests::{file, memory};
    use super::super::ring::{Ring, RingSpec};
    use super::*;

    /// A log of `size` bytes at `offset` in a file of `len`.
    fn log(len: u64, size: u64, offset: u64) -> Result<DirtyLog, DirtyLogError> {
        DirtyLog::map(file(len), size, offset, &Alarm::new().unwrap())
    }

    /// Takes the marks out of a log, as a front-end does.
    fn harvest(log: &DirtyLog) -> BTreeSet<u64> {
        let byte = |at: u64| {
            // SAFETY: within the mapped bytes.
            unsafe { AtomicU8::from_ptr(log.bits.add(usize::try_from(at).unwrap())) }
        };
        (0..log.len)
            .flat_map(|at| {
                let bits = byte(at).swap(0, Ordering::AcqRel);
                (0..8).filter(move |bit| bits >> bit & 1 != 0).map(move |bit| 8 * at + bit)
            })
            .collect()
    }

    #[test]
    fn a_log_that_lies_about_its_size_is_refused() {
        assert!(log(0x2000, 0x1000, 0x1000).is_ok());
        assert!(log(0x2000, 0x10, 0x1234).is_ok(), "a log may begin anywhere in its file");
        assert!(matches!(log(0x2000, 0x1001, 0x1000), Err(DirtyLogError::FileTooShort { .. })));
        assert!(matches!(log(0x2000, 0x2000, u64::MAX - 0xfff), Err(DirtyLogError::Bounds { .. })));
        assert!(matches!(log(0x2000, u64::MAX, 1), Err(DirtyLogError::Bounds { .. })));
        assert!(matches!(log(0x2000, 0, 0), Err(DirtyLogError::Bounds { .. })));
        let null = File::options().read(true).write(true).open("/dev/zero").unwrap();
        assert!(DirtyLog::map(null, 0x1000, 0, &Alarm::new().unwrap()).is_err(), "a device has no length");
    }

    #[test]
    fn memory_beyond_the_log_is_refused_and_marks_beyond_it_are_dropped() {
        let log = log(2, 2, 0).unwrap();
        assert!(log.expect_covers(&memory(&[(0, 0x8000), (0x8000, 0x8000)])).is_ok());
        assert!(log.expect_covers(&memory(&[(0, 0x8000), (0x10000, 0x1000)])).is_err());
        log.mark(0xf000, 0x5000);
        log.mark(u64::MAX - 5, 100);
        assert_eq!(harvest(&log), BTreeSet::from([15]));
    }

    proptest! {
        #[test]
        fn marks_are_those_of_a_naive_bitmap(
            offset in 0u64..0x1800,
            writes in prop::collection::vec((0u64..0x20_0000, 0u64..0x9_0000), 0..8),
        ) {
            let log = log(0x2000, 64, offset).unwrap();
            let mut naive = BTreeSet::new();
            for (guest, len) in writes {
                log.mark(guest, len);
                naive.extend((guest..guest + len).step_by(64).chain((len > 0).then(|| guest + len - 1)).map(|at| at / PAGE));
            }
            naive.retain(|page| *page < 8 * 64);
            prop_assert_eq!(harvest(&log), naive);
        }

        /// Whatever the chains, the batches and the moments at which marks are taken: every byte that differs between two
        /// snapshots lies in a page that was marked.
        #[test]
        fn every_byte_that_changed_between_two_snapshots_lies_in_a_marked_page(
            rounds in prop::collection::vec(
                prop::collection::vec((0u64..0xe000, 1u32..0x2800, 0u64..0xfff0, any::<bool>()), 1..5), 1..12),
            event_idx in any::<bool>(),
            seed in any::<u8>(),
        ) {
            // Two regions with a hole between them; the ring lies in the first, near the end of a page.
            const DATA: u64 = 0x2_0000;
            let mem = Arc::new(memory(&[(0, 0x6000), (DATA, 0x8000), (DATA + 0x8000, 0x8000)]));
            let spec = RingSpec { size: 8, desc: 0, avail: 0x1000, used: 0x2fe0, event_idx, next_avail: 0 };
            let mut ring = Ring::new(spec, Arc::clone(&mem), None).unwrap();
            let log = Arc::new(log(0x1000, 0x1000, 0).unwrap());
            let peek = |guest: u64| {
                // SAFETY: one mapped byte.
                unsafe { mem.translate_whole(guest, 1).unwrap().read_volatile() }
            };
            let poke = |guest: u64, bytes: &[u8]| {
                for (at, byte) in (guest..).zip(bytes) {
                    // SAFETY: one mapped byte.
                    unsafe { mem.translate_whole(at, 1).unwrap().write_volatile(*byte) };
                }
            };
            let all = || (0..0x6000).chain(DATA..DATA + 0x1_0000);
            let mut value = seed;
            for (number, round) in rounds.iter().enumerate() {
                // In each round other chains, two descriptors each, are used in one batch or singly.
                for (head, (guest, len, status, _)) in (0u16..).step_by(2).zip(round) {
                    let (guest, len) = (DATA + guest, u64::from(*len).min(0x1_0000 - guest));
                    for (index, addr, len, flags) in [(head, guest, len, 3u16), (head + 1, DATA + status, 1, 2)] {
                        let mut desc = [addr.to_le_bytes(), len.to_le_bytes()].concat();
                        desc[12..14].copy_from_slice(&flags.to_le_bytes());
                        desc[14..16].copy_from_slice(&(index + 1).to_le_bytes());
                        poke(u64::from(index) * 16, &desc);
                    }
                }
                let before: Vec<u8> = all().map(peek).collect();
                if number > 0 {
                    ring.disable_kick();
                }
                for (head, (guest, len, status, alone)) in (0u16..).step_by(2).zip(round) {
                    value = value.wrapping_add(1);
                    let len = u64::from(*len).min(0x1_0000 - guest);
                    poke(DATA + guest, &vec![value; usize::try_from(len).unwrap()]);
                    poke(DATA + status, &[value]);
                    ring.push_used(head, 1);
                    if number > 0 && *alone {
                        ring.publish();
                    }
                }
                // The first batch was in flight when logging began.
                if number == 0 {
                    ring.set_log(Some(QueueLog::new(Arc::clone(&log), Some(0x2fe0))));
                }
                ring.publish();
                ring.enable_kick();
                let marked = harvest(&log);
                for (at, was) in all().zip(before) {
                    prop_assert!(peek(at) == was || marked.contains(&(at / PAGE)), "{at:#x} in round {number}");
                }
                // And not all of memory is said to be dirty.
                prop_assert!(marked.iter().all(|page| *page >= 2 && *page < 0x30), "{marked:?}");
            }
        }
    }

    #[test]
    fn writes_to_the_used_ring_are_noted_under_the_address_given_for_them() {
        let mem = Arc::new(memory(&[(0, 0x6000)]));
        let spec = RingSpec { size: 8, desc: 0, avail: 0x1000, used: 0x2000, event_idx: true, next_avail: 0 };
        let mut ring = Ring::new(spec, mem, None).unwrap();
        let log = Arc::new(log(0x1000, 0x1000, 0).unwrap());
        for (used, pages) in [(Some(0x7_0000), BTreeSet::from([0x70])), (None, BTreeSet::new())] {
            ring.set_log(Some(QueueLog::new(Arc::clone(&log), used)));
            ring.push_used(3, 0);
            ring.publish();
            // An empty descriptor lets nothing be written.
            assert_eq!(harvest(&log), pages);
        }
        ring.set_log(None);
        ring.push_used(3, 0);
        ring.publish();
        assert_eq!(harvest(&log), BTreeSet::new());
    }
}
