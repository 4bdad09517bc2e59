// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A split virtqueue from the device's side (virtio 1.3, §2.7).
//!
//! ```text
//!   desc table                driver writes   see [`DescriptorTable`]
//!   avail ring                driver writes   { le16 flags, le16 idx, le16 ring[size], le16 used_event }
//!   used ring                 device writes   { le16 flags, le16 idx, { le32 id, le32 len }[size], le16 avail_event }
//! ```
//!
//! Each of the three lies in one memory region (checked when the ring is made), so that the hot path reads through
//! pointers. Every field is read once; what it says is checked by the reader. Knows rings, not requests.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering, fence};

use super::dirty_log::{QueueLog, RingLog};
use super::inflight::InflightQueue;
use super::memory::GuestMemory;
use super::table::DescriptorTable;

/// Largest queue that virtio allows (§2.7: a power of two up to 32768).
pub const MAX_QUEUE_SIZE: u16 = 32768;

const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;

/// Where a ring is and where it stands.
#[derive(Clone, Copy, Debug)]
pub struct RingSpec {
    pub size: u16,
    /// Guest addresses.
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
    pub event_idx: bool,
    /// Index of the next avail entry to take.
    pub next_avail: u16,
}

/// Why a ring cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    #[error("queue size {0} is not a power of two from 1 to {MAX_QUEUE_SIZE}")]
    Size(u16),
    #[error("{part} at guest address {addr:#x} is misaligned or not in one memory region")]
    Address { part: &'static str, addr: u64 },
    #[error("avail index {avail} is more than {size} ahead of {next}")]
    AvailIndex { avail: u16, next: u16, size: u16 },
}

/// The ring. Belongs to one worker thread.
#[derive(Debug)]
pub struct Ring {
    spec: RingSpec,
    table: DescriptorTable,
    avail: *const u8,
    used: *mut u8,
    next_used: u16,
    /// Used entries up to here have been considered for an interrupt.
    signalled_used: u16,
    /// Entries written behind `next_used` but not published yet.
    batch: Vec<u16>,
    inflight: Option<InflightQueue>,
    log: Option<Box<RingLog>>,
}

// SAFETY: the pointers lead into the memory that `table` keeps mapped; a ring is used by one thread at a time.
unsafe impl Send for Ring {}

impl Ring {
    /// Makes the ring; its used index goes on from what is in guest memory.
    pub fn new(
        spec: RingSpec,
        mem: Arc<GuestMemory>,
        inflight: Option<InflightQueue>,
    ) -> Result<Self, RingError> {
        if !spec.size.is_power_of_two() || spec.size > MAX_QUEUE_SIZE {
            return Err(RingError::Size(spec.size));
        }
        let (table, avail, used) = Self::locate(&spec, mem)?;
        let mut ring = Self {
            spec,
            table,
            avail,
            used,
            next_used: 0,
            signalled_used: 0,
            batch: Vec::with_capacity(usize::from(spec.size)),
            inflight,
            log: None,
        };
        ring.next_used = ring.used_idx().load(Ordering::Acquire);
        ring.signalled_used = ring.next_used;
        Ok(ring)
    }

    fn locate(
        spec: &RingSpec,
        mem: Arc<GuestMemory>,
    ) -> Result<(DescriptorTable, *const u8, *mut u8), RingError> {
        let size = u64::from(spec.size);
        let part = |part, addr: u64, align: u64, len: u64| {
            addr.is_multiple_of(align)
                .then(|| mem.translate_whole(addr, len))
                .flatten()
                .ok_or(RingError::Address { part, addr })
        };
        let avail = part("avail ring", spec.avail, 2, 6 + 2 * size)?;
        let used = part("used ring", spec.used, 4, 6 + 8 * size)?;
        let table = DescriptorTable::new(mem, spec.desc, spec.size)
            .ok_or(RingError::Address { part: "descriptor table", addr: spec.desc })?;
        Ok((table, avail, used))
    }

    /// Goes on with another memory table in which the ring has the same guest addresses.
    pub fn set_memory(&mut self, mem: Arc<GuestMemory>) -> Result<(), RingError> {
        (self.table, self.avail, self.used) = Self::locate(&self.spec, mem)?;
        Ok(())
    }

    pub fn table(&self) -> &DescriptorTable {
        &self.table
    }

    pub fn memory(&self) -> &Arc<GuestMemory> {
        self.table.memory()
    }

    pub fn size(&self) -> u16 {
        self.spec.size
    }

    pub fn next_avail(&self) -> u16 {
        self.spec.next_avail
    }

    pub fn next_used(&self) -> u16 {
        self.next_used
    }

    pub fn set_next_avail(&mut self, next_avail: u16) {
        self.spec.next_avail = next_avail;
    }

    /// From now on notes its writes as told; `None` to note nothing. Covers what is written and not published yet.
    pub fn set_log(&mut self, log: Option<QueueLog>) {
        self.log = log.map(RingLog::new).map(Box::new);
    }

    pub fn inflight_mut(&mut self) -> Option<&mut InflightQueue> {
        self.inflight.as_mut()
    }

    fn avail_u16(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: `locate` checked that the avail ring of 6 + 2·size bytes is mapped and 2-aligned; callers pass
        // offsets within it; the guest may write concurrently, which atomics allow.
        unsafe { AtomicU16::from_ptr(self.avail.add(offset).cast_mut().cast()) }
    }

    fn used_u16(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: as for the avail ring: 6 + 8·size bytes, 4-aligned.
        unsafe { AtomicU16::from_ptr(self.used.add(offset).cast()) }
    }

    fn used_idx(&self) -> &AtomicU16 {
        self.used_u16(2)
    }

    fn mask(&self) -> u16 {
        self.spec.size - 1
    }

    /// How many chains wait. An index further ahead than the ring is long means that the driver is broken.
    pub fn available(&self) -> Result<u16, RingError> {
        let avail = u16::from_le(self.avail_u16(2).load(Ordering::Acquire));
        let next = self.spec.next_avail;
        let waiting = avail.wrapping_sub(next);
        if waiting > self.spec.size {
            return Err(RingError::AvailIndex { avail, next, size: self.spec.size });
        }
        Ok(waiting)
    }

    /// Takes the head of the next chain; call only while [`Self::available`] said there is one. The head is as the
    /// driver wrote it and may be out of bounds.
    pub fn pop(&mut self) -> u16 {
        let slot = usize::from(self.spec.next_avail & self.mask());
        let head = u16::from_le(self.avail_u16(4 + 2 * slot).load(Ordering::Relaxed));
        self.spec.next_avail = self.spec.next_avail.wrapping_add(1);
        if let Some(inflight) = &mut self.inflight {
            inflight.begin(head);
        }
        head
    }

    /// Writes a used entry. It becomes visible to the driver with [`Self::publish`].
    pub fn push_used(&mut self, head: u16, len: u32) {
        if self.is_batch_full() {
            self.publish();
        }
        let slot = usize::from(self.next_used.wrapping_add(self.batch_len()) & self.mask());
        let entry = self.used.wrapping_add(4 + 8 * slot);
        // SAFETY: the slot lies within the used ring checked by `locate`; raw writes, for the guest may look.
        unsafe {
            entry.cast::<u32>().write_volatile(u32::from(head).to_le());
            entry.add(4).cast::<u32>().write_volatile(len.to_le());
        }
        self.batch.push(head);
    }

    /// Whether as many entries as the ring has wait to be published.
    pub fn is_batch_full(&self) -> bool {
        self.batch.len() == usize::from(self.spec.size)
    }

    fn batch_len(&self) -> u16 {
        // At most `size` entries: `push_used` publishes a full batch first.
        u16::try_from(self.batch.len()).unwrap_or(self.spec.size)
    }

    /// How many entries wait to be published.
    pub fn unpublished(&self) -> usize {
        self.batch.len()
    }

    /// Takes unpublished entries back, from the one numbered `first` on; gives their heads.
    pub fn take_back(&mut self, first: usize) -> impl DoubleEndedIterator<Item = u16> {
        self.batch.drain(first.min(self.batch.len())..)
    }

    /// Makes the entries pushed since the last call visible to the driver. None of them if its memory is lost: an answer
    /// might rest on zeroes that nobody wrote. The requests then stay in flight.
    pub fn publish(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        if self.memory().is_lost() {
            self.batch.clear();
            return;
        }
        if let Some(inflight) = &mut self.inflight {
            inflight.link_batch(&self.batch);
        }
        if self.log.is_some() {
            self.log_batch();
        }
        self.next_used = self.next_used.wrapping_add(self.batch_len());
        self.used_idx().store(self.next_used.to_le(), Ordering::Release);
        self.log_used(2, 2);
        if let Some(inflight) = &mut self.inflight {
            inflight.end_batch(&self.batch, self.next_used);
        }
        self.batch.clear();
    }

    /// Notes what the answers of the batch changed, used entries included.
    #[cold]
    fn log_batch(&mut self) {
        let Some(mut log) = self.log.take() else { return };
        for head in &self.batch {
            log.mark_chain(&self.table, *head);
        }
        let (first, count) = (usize::from(self.next_used & self.mask()), self.batch.len());
        let before_wrap = count.min(usize::from(self.spec.size) - first);
        log.mark_used(4 + 8 * first, 8 * before_wrap);
        log.mark_used(4, 8 * (count - before_wrap));
        self.log = Some(log);
    }

    /// Notes that `len` bytes at `offset` of the used ring were written.
    fn log_used(&self, offset: usize, len: usize) {
        if let Some(log) = &self.log {
            log.mark_used(offset, len);
        }
    }

    /// Whether the driver wants an interrupt for what was published since this was last asked.
    pub fn needs_signal(&mut self) -> bool {
        let (old, new) = (self.signalled_used, self.next_used);
        if old == new {
            return false;
        }
        self.signalled_used = new;
        // The used index must be visible before the driver's wish is read, or both sides may go to sleep (§2.7.10).
        fence(Ordering::SeqCst);
        if self.spec.event_idx {
            let used_event =
                u16::from_le(self.avail_u16(4 + 2 * usize::from(self.spec.size)).load(Ordering::Relaxed));
            new.wrapping_sub(used_event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            u16::from_le(self.avail_u16(0).load(Ordering::Relaxed)) & AVAIL_F_NO_INTERRUPT == 0
        }
    }

    /// Asks the driver for a kick at the next chain. True if one arrived meanwhile, which may bring no kick.
    pub fn enable_kick(&mut self) -> bool {
        if self.spec.event_idx {
            let offset = 4 + 8 * usize::from(self.spec.size);
            self.used_u16(offset).store(self.spec.next_avail.to_le(), Ordering::Relaxed);
            self.log_used(offset, 2);
        } else {
            self.used_u16(0).store(0, Ordering::Relaxed);
            self.log_used(0, 2);
        }
        fence(Ordering::SeqCst);
        matches!(self.available(), Ok(1..))
    }

    /// Asks for silence while chains are taken anyway. With EVENT_IDX it is enough not to move the event index.
    pub fn disable_kick(&mut self) {
        if !self.spec.event_idx {
            self.used_u16(0).store(USED_F_NO_NOTIFY.to_le(), Ordering::Relaxed);
            self.log_used(0, 2);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::inflight::InflightRegion;
    use super::super::memory::tests::memory;
    use super::*;

    const SIZE: u16 = 4;
    const AVAIL: u64 = 0x2000;
    const USED: u64 = 0x3000;

    fn spec(event_idx: bool) -> RingSpec {
        RingSpec { size: SIZE, desc: 0x1000, avail: AVAIL, used: USED, event_idx, next_avail: 0 }
    }

    fn ring(event_idx: bool) -> Ring {
        Ring::new(spec(event_idx), Arc::new(memory(&[(0, 0x8000)])), None).unwrap()
    }

    /// A driver's or a test's own view of a 16-bit field.
    fn field(ring: &Ring, addr: u64) -> &AtomicU16 {
        // SAFETY: mapped and aligned; other accesses are atomic or volatile.
        unsafe { AtomicU16::from_ptr(ring.memory().translate_whole(addr, 2).unwrap().cast()) }
    }

    fn offer(ring: &Ring, heads: &[u16]) {
        let idx = field(ring, AVAIL + 2).load(Ordering::Relaxed);
        let mut next = idx;
        for head in heads {
            let slot = u64::from(next & (SIZE - 1));
            field(ring, AVAIL + 4 + 2 * slot).store(*head, Ordering::Relaxed);
            next = next.wrapping_add(1);
        }
        field(ring, AVAIL + 2).store(next, Ordering::Release);
    }

    #[test]
    fn used_entries_become_visible_all_at_once() {
        let mut ring = ring(false);
        offer(&ring, &[2, 0, 3]);
        assert_eq!(ring.available(), Ok(3));
        assert_eq!([ring.pop(), ring.pop(), ring.pop()], [2, 0, 3]);
        assert_eq!(ring.available(), Ok(0));
        ring.push_used(0, 7);
        ring.push_used(2, 9);
        assert_eq!(field(&ring, USED + 2).load(Ordering::Relaxed), 0);
        ring.publish();
        assert_eq!(field(&ring, USED + 2).load(Ordering::Relaxed), 2);
        assert_eq!(field(&ring, USED + 4).load(Ordering::Relaxed), 0, "id of the first");
        assert_eq!(field(&ring, USED + 8).load(Ordering::Relaxed), 7, "length of the first");
        assert_eq!(field(&ring, USED + 12).load(Ordering::Relaxed), 2, "id of the second");
    }

    #[test]
    fn indices_wrap_around_65535() {
        let mem = Arc::new(memory(&[(0, 0x8000)]));
        let start = RingSpec { next_avail: 65534, ..spec(false) };
        let first = Ring::new(start, Arc::clone(&mem), None).unwrap();
        field(&first, AVAIL + 2).store(65534, Ordering::Relaxed);
        field(&first, USED + 2).store(65534, Ordering::Relaxed);
        let mut ring = Ring::new(start, mem, None).unwrap();
        offer(&ring, &[1, 2, 3]);
        assert_eq!(ring.available(), Ok(3));
        assert_eq!([ring.pop(), ring.pop(), ring.pop()], [1, 2, 3]);
        (1..4).for_each(|head| ring.push_used(head, 1));
        ring.publish();
        assert_eq!(field(&ring, USED + 2).load(Ordering::Relaxed), 1);
        assert_eq!(ring.next_avail(), 1);
    }

    #[test]
    fn avail_index_too_far_ahead_is_an_error() {
        let ring = ring(false);
        field(&ring, AVAIL + 2).store(SIZE + 1, Ordering::Relaxed);
        assert_eq!(ring.available(), Err(RingError::AvailIndex { avail: 5, next: 0, size: 4 }));
    }

    #[test]
    fn without_event_idx_the_driver_is_signalled_unless_it_asked_for_silence() {
        let mut ring = ring(false);
        assert!(!ring.needs_signal(), "nothing was used");
        for (flags, wanted) in [(0, true), (AVAIL_F_NO_INTERRUPT, false), (0, true)] {
            field(&ring, AVAIL).store(flags, Ordering::Relaxed);
            ring.push_used(0, 1);
            ring.publish();
            assert_eq!(ring.needs_signal(), wanted);
        }
    }

    #[test]
    fn with_event_idx_the_driver_is_signalled_when_its_event_index_is_passed() {
        let mut ring = ring(true);
        let used_event = AVAIL + 4 + 2 * u64::from(SIZE);
        for (event, wanted) in [(0u16, true), (0, false), (5, false), (3, true)] {
            field(&ring, used_event).store(event, Ordering::Relaxed);
            ring.push_used(0, 1);
            ring.publish();
            assert_eq!(ring.needs_signal(), wanted, "event {event}, used {}", ring.next_used());
        }
    }

    #[test]
    fn a_chain_that_arrives_while_kicks_are_enabled_is_not_lost() {
        let mut ring = ring(true);
        assert!(!ring.enable_kick());
        offer(&ring, &[1]);
        assert!(ring.enable_kick());
        ring.pop();
        assert!(!ring.enable_kick());
        let avail_event = USED + 4 + 8 * u64::from(SIZE);
        assert_eq!(field(&ring, avail_event).load(Ordering::Relaxed), 1);
    }

    #[test]
    fn rings_outside_memory_or_misaligned_are_refused() {
        let mem = || Arc::new(memory(&[(0, 0x3020), (0x8000, 0x1000)]));
        for bad in [
            RingSpec { size: 3, ..spec(false) },
            RingSpec { size: 0, ..spec(false) },
            RingSpec { desc: 0x1008, ..spec(false) },
            RingSpec { used: 0x3002, ..spec(false) },
            RingSpec { used: USED, ..spec(false) },
            RingSpec { avail: u64::MAX - 1, ..spec(false) },
        ] {
            assert!(Ring::new(bad, mem(), None).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_is_popped_and_not_published_is_in_flight_after_a_crash() {
        let mem = Arc::new(memory(&[(0, 0x8000)]));
        let (region, _file) = InflightRegion::create(1, SIZE, mem.alarm()).unwrap();
        let mut ring = Ring::new(spec(false), Arc::clone(&mem), region.queue(0, SIZE)).unwrap();
        offer(&ring, &[3, 1, 0]);
        let _taken: Vec<u16> = (0..3).map(|_| ring.pop()).collect();
        ring.push_used(1, 1);
        ring.publish();
        ring.push_used(0, 1);
        drop(ring);
        let mut next = Ring::new(spec(false), mem, region.queue(0, SIZE)).unwrap();
        let used = next.next_used();
        assert_eq!(next.inflight_mut().unwrap().recover(used), [3, 0]);
    }
}
