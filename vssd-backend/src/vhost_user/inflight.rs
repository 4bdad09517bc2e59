// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The record of requests in flight that survives a crash of the daemon (vhost-user protocol, "Inflight I/O tracking",
//! split virtqueue).
//!
//! ```text
//!   per queue, each 64-aligned:
//!   0  le64 features = 0      12 le16 last_batch_head     16 + 16·i: { u8 inflight, u8[5] pad, le16 next, le64 counter }
//!   8  le16 version = 1       14 le16 used_idx
//!   10 le16 desc_num
//! ```
//!
//! The region lives in memory that the front-end keeps while the daemon is away. The front-end may write to it, so what
//! is read back is checked: at worst a lying front-end replays its own guest's requests wrongly.
//!
//! The order of stores makes every instant recoverable, a crash being a stop between two of them:
//! begin: counter, then inflight = 1. End: used entries are written; `next`/`last_batch_head` link the batch; the used
//! index is published; the marks are cleared; `used_idx` follows. If the published index and `used_idx` differ, the batch
//! that `last_batch_head` leads is done and only its marks are left over.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};
use vssd_pool::sigbus::Alarm;

use super::sigbus::{MappingError, SharedMapping};

const HEADER: usize = 16;
const ENTRY: usize = 16;
const ALIGN: usize = 64;
const VERSION: u16 = 1;

/// Why an inflight region was refused.
#[derive(Debug, thiserror::Error)]
pub enum InflightError {
    #[error("inflight region for {queues} queues of {size} is out of bounds")]
    Bounds { queues: u16, size: u16 },
    #[error("inflight region needs {needed} bytes of its file, which has {actual}")]
    TooShort { needed: u64, actual: u64 },
    #[error("cannot make the inflight region")]
    Create(#[source] std::io::Error),
    #[error("cannot map the inflight region")]
    Map(#[source] MappingError),
}

/// The region of all queues of one connection.
#[derive(Clone, Debug)]
pub struct InflightRegion {
    mapping: Arc<SharedMapping>,
    queues: u16,
    queue_size: u16,
}

fn queue_bytes(queue_size: u16) -> usize {
    (HEADER + ENTRY * usize::from(queue_size)).next_multiple_of(ALIGN)
}

impl InflightRegion {
    /// Bytes that a region takes.
    pub fn len(queues: u16, queue_size: u16) -> u64 {
        queue_bytes(queue_size) as u64 * u64::from(queues)
    }

    /// A new region, all requests done, and the file to hand to the front-end. Sealed, so that nobody can shrink it
    /// under our mapping.
    pub fn create(queues: u16, queue_size: u16, alarm: &Alarm) -> Result<(Self, File), InflightError> {
        if queues == 0 || queue_size == 0 {
            return Err(InflightError::Bounds { queues, size: queue_size });
        }
        let len = Self::len(queues, queue_size);
        let make = || -> std::io::Result<File> {
            let fd =
                rustix::fs::memfd_create("vssd-inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
            let file = File::from(fd);
            file.set_len(len)?;
            rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
            Ok(file)
        };
        let file = make().map_err(InflightError::Create)?;
        let copy = file.try_clone().map_err(InflightError::Create)?;
        Ok((Self::map(copy, 0, len, (queues, queue_size), alarm)?, file))
    }

    /// The region that the front-end kept. It may be a file of its own, which it can shorten: that raises `alarm`.
    pub fn open(
        file: File,
        offset: u64,
        len: u64,
        (queues, queue_size): (u16, u16),
        alarm: &Alarm,
    ) -> Result<Self, InflightError> {
        let needed = Self::len(queues, queue_size);
        if queues == 0 || queue_size == 0 || len < needed {
            return Err(InflightError::Bounds { queues, size: queue_size });
        }
        let actual = file.metadata().map_err(InflightError::Create)?.len();
        let end = offset.checked_add(needed).ok_or(InflightError::Bounds { queues, size: queue_size })?;
        if actual < end {
            return Err(InflightError::TooShort { needed: end, actual });
        }
        Self::map(file, offset, needed, (queues, queue_size), alarm)
    }

    fn map(
        file: File,
        offset: u64,
        len: u64,
        (queues, queue_size): (u16, u16),
        alarm: &Alarm,
    ) -> Result<Self, InflightError> {
        let size = usize::try_from(len).map_err(|_| InflightError::Bounds { queues, size: queue_size })?;
        let mapping = SharedMapping::new(file, offset, size, alarm).map_err(InflightError::Map)?;
        Ok(Self { mapping: Arc::new(mapping), queues, queue_size })
    }

    /// The part of queue `index`; `None` if the region was made for fewer queues or smaller ones.
    pub fn queue(&self, index: u16, queue_size: u16) -> Option<InflightQueue> {
        if index >= self.queues || queue_size > self.queue_size {
            return None;
        }
        let base = self.mapping.as_ptr().wrapping_add(queue_bytes(self.queue_size) * usize::from(index));
        let mut queue =
            InflightQueue { _mapping: Arc::clone(&self.mapping), base, size: queue_size, counter: 0 };
        queue.initialise();
        Some(queue)
    }
}

/// One queue's record. Belongs to the worker that owns the queue.
#[derive(Debug)]
pub struct InflightQueue {
    _mapping: Arc<SharedMapping>,
    base: *mut u8,
    size: u16,
    counter: u64,
}

// SAFETY: `base` leads into `_mapping`, which lives as long; used by one thread at a time.
unsafe impl Send for InflightQueue {}

impl InflightQueue {
    fn u16_at(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: callers pass even offsets within this queue's part, which is mapped and 64-aligned.
        unsafe { AtomicU16::from_ptr(self.base.add(offset).cast()) }
    }

    fn entry(&self, head: u16) -> usize {
        HEADER + ENTRY * usize::from(head)
    }

    fn mark(&self, head: u16) -> &AtomicU8 {
        // SAFETY: `head` is below `size` (callers check), so the entry lies within this queue's part.
        unsafe { AtomicU8::from_ptr(self.base.add(self.entry(head))) }
    }

    fn next(&self, head: u16) -> &AtomicU16 {
        self.u16_at(self.entry(head) + 6)
    }

    fn counter(&self, head: u16) -> &AtomicU64 {
        // SAFETY: as for `mark`; entries are 16-aligned, so the counter at +8 is 8-aligned.
        unsafe { AtomicU64::from_ptr(self.base.add(self.entry(head) + 8).cast()) }
    }

    fn initialise(&mut self) {
        if self.u16_at(8).load(Ordering::Relaxed) == 0 {
            self.u16_at(8).store(VERSION.to_le(), Ordering::Relaxed);
            self.u16_at(10).store(self.size.to_le(), Ordering::Relaxed);
        }
    }

    /// A request was taken from the ring.
    pub fn begin(&mut self, head: u16) {
        if head < self.size {
            // A front-end may have left any number behind.
            self.counter = self.counter.wrapping_add(1);
            self.counter(head).store(self.counter.to_le(), Ordering::Relaxed);
            self.mark(head).store(1, Ordering::Release);
        }
    }

    /// The used entries of `batch` are written and about to be published.
    pub fn link_batch(&mut self, batch: &[u16]) {
        let mut previous = u16::from_le(self.u16_at(12).load(Ordering::Relaxed));
        for head in batch.iter().copied().filter(|head| *head < self.size) {
            self.next(head).store(previous.to_le(), Ordering::Relaxed);
            previous = head;
        }
        self.u16_at(12).store(previous.to_le(), Ordering::Release);
    }

    /// The batch is published, the ring's used index being `used_idx` now.
    pub fn end_batch(&mut self, batch: &[u16], used_idx: u16) {
        for head in batch.iter().copied().filter(|head| *head < self.size) {
            self.mark(head).store(0, Ordering::Release);
        }
        self.u16_at(14).store(used_idx.to_le(), Ordering::Release);
    }

    /// After a crash: finishes the batch that was being published, then lists the requests that were taken and never
    /// answered, oldest first. `used_idx` is the ring's.
    pub fn recover(&mut self, used_idx: u16) -> Vec<u16> {
        let recorded = u16::from_le(self.u16_at(14).load(Ordering::Acquire));
        let published = used_idx.wrapping_sub(recorded);
        if published <= self.size {
            let mut head = u16::from_le(self.u16_at(12).load(Ordering::Relaxed));
            for _ in 0..published {
                if head >= self.size {
                    break;
                }
                self.mark(head).store(0, Ordering::Relaxed);
                head = u16::from_le(self.next(head).load(Ordering::Relaxed));
            }
        }
        self.u16_at(14).store(used_idx.to_le(), Ordering::Release);
        let mut heads: Vec<(u64, u16)> = (0..self.size)
            .filter(|head| self.mark(*head).load(Ordering::Relaxed) == 1)
            .map(|head| (u64::from_le(self.counter(head).load(Ordering::Relaxed)), head))
            .collect();
        heads.sort_unstable();
        self.counter = heads.last().map_or(0, |(counter, _)| *counter);
        heads.into_iter().map(|(_, head)| head).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alarm() -> Alarm {
        Alarm::new().unwrap()
    }

    #[test]
    fn a_crash_at_any_step_of_completion_leaves_exactly_the_unanswered_requests() {
        // 0..6 are taken in order; 4 and 1 are answered as one batch; the daemon stops at `step`.
        for step in 0..4 {
            let (region, file) = InflightRegion::create(2, 8, &alarm()).unwrap();
            let mut queue = region.queue(1, 8).unwrap();
            for head in 0..6 {
                queue.begin(head);
            }
            queue.link_batch(&[2]);
            queue.end_batch(&[2], 1);
            let mut used = 1;
            if step >= 1 {
                queue.link_batch(&[4, 1]);
            }
            if step >= 2 {
                used = 3;
            }
            if step >= 3 {
                queue.mark(4).store(0, Ordering::Relaxed);
            }
            drop((queue, region));
            let region = InflightRegion::open(file, 0, InflightRegion::len(2, 8), (2, 8), &alarm()).unwrap();
            let expected: &[u16] = if step >= 2 { &[0, 3, 5] } else { &[0, 1, 3, 4, 5] };
            let mut queue = region.queue(1, 8).unwrap();
            assert_eq!(queue.recover(used), expected, "stopped at step {step}");
            assert_eq!(queue.recover(used), expected, "a second recovery changes nothing, step {step}");
            assert_eq!(region.queue(0, 8).unwrap().recover(0), &[] as &[u16]);
        }
    }

    #[test]
    fn a_scribbled_region_yields_heads_in_bounds() {
        let (region, file) = InflightRegion::create(1, 16, &alarm()).unwrap();
        let len = usize::try_from(InflightRegion::len(1, 16)).unwrap();
        for fill in [0xff_u8, 0x01, 0x80] {
            rustix::io::pwrite(&file, &vec![fill; len], 0).unwrap();
            let heads = region.queue(0, 16).unwrap().recover(5);
            assert!(heads.iter().all(|head| *head < 16));
        }
    }

    #[test]
    fn counters_at_their_limit_are_gone_on_from() {
        let (region, _) = InflightRegion::create(1, 16, &alarm()).unwrap();
        let queue = region.queue(0, 16).unwrap();
        queue.mark(3).store(1, Ordering::Relaxed);
        queue.counter(3).store(u64::MAX, Ordering::Relaxed);
        let mut next = region.queue(0, 16).unwrap();
        assert_eq!(next.recover(0), [3]);
        next.begin(4);
    }

    #[test]
    fn a_region_that_does_not_fit_its_file_is_refused() {
        let (_, file) = InflightRegion::create(1, 16, &alarm()).unwrap();
        let open = |offset, len, shape| {
            InflightRegion::open(file.try_clone().unwrap(), offset, len, shape, &alarm())
        };
        assert!(open(0, 1 << 20, (64, 1024)).is_err());
        assert!(open(u64::MAX, 1 << 20, (1, 16)).is_err());
        assert!(open(0, 0, (1, 16)).is_err());
        let region = open(0, InflightRegion::len(1, 16), (1, 16)).unwrap();
        assert!(region.queue(1, 16).is_none() && region.queue(0, 32).is_none());
    }
}
