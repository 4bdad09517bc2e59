// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Walks a descriptor chain and turns it into host memory segments (virtio 1.3, §2.7.4–§2.7.5).
//!
//! What a guest can get wrong is found here: indices out of bounds, loops, tables in tables, memory it does not have,
//! device-readable after device-writable parts. Knows descriptors, not block requests.

use vssd_pool::sabotage::{Sabotage, active};

use super::memory::GuestMemory;
use super::table::{Descriptor, DescriptorTable};

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;

/// Descriptors of a chain at most, however long the queue: eight times what `seg_max` allows, and bounded work.
const MAX_DESCRIPTORS: u16 = 1024;

/// What is wrong with a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    #[error("descriptor index {index} is not below {size}")]
    Index { index: u16, size: u32 },
    #[error("chain has more than {0} descriptors")]
    TooLong(u16),
    #[error("indirect table of {len} bytes is empty, not a multiple of 16 or too long")]
    TableLength { len: u32 },
    #[error("indirect descriptor within an indirect table, or with NEXT")]
    Nested,
    #[error("no guest memory at {addr:#x} for {len} bytes")]
    Address { addr: u64, len: u32 },
    #[error("device-readable descriptor after a device-writable one")]
    Order,
    #[error("chain is longer than 4 GiB")]
    TotalLength,
}

/// The memory of one chain: first what the device reads, then what it writes. Kept and refilled, so that no request
/// allocates once the vectors have their size.
#[derive(Debug, Default)]
pub struct Segments {
    pub readable: Vec<libc::iovec>,
    pub writable: Vec<libc::iovec>,
    pub readable_len: u32,
    pub writable_len: u32,
    /// Descriptors that were looked at, also of a chain that is refused.
    pub descriptors: u16,
}

// SAFETY: the pointers are plain addresses here; whoever dereferences them vouches for their being mapped.
unsafe impl Send for Segments {}

impl Segments {
    pub fn clear(&mut self) {
        self.readable.clear();
        self.writable.clear();
        self.readable_len = 0;
        self.writable_len = 0;
        self.descriptors = 0;
    }

    /// Counts a descriptor, of which there may be `most`.
    fn count(&mut self, most: u16) -> Result<(), ChainError> {
        if self.descriptors >= most {
            return Err(ChainError::TooLong(most));
        }
        self.descriptors += 1;
        Ok(())
    }

    /// Copies `buf.len()` bytes off the front of the readable part and removes them from it. False if there are fewer.
    ///
    /// # Safety
    /// The segments must be mapped.
    pub unsafe fn take_readable(&mut self, buf: &mut [u8]) -> bool {
        if (self.readable_len as usize) < buf.len() {
            return false;
        }
        let mut done = 0;
        let mut used_up = 0;
        for segment in &mut self.readable {
            let n = segment.iov_len.min(buf.len() - done);
            // SAFETY: `n` bytes are within the segment, which the caller says is mapped, and within `buf`.
            unsafe {
                std::ptr::copy_nonoverlapping(segment.iov_base.cast::<u8>(), buf[done..].as_mut_ptr(), n);
            };
            segment.iov_base = segment.iov_base.wrapping_byte_add(n);
            segment.iov_len -= n;
            done += n;
            if segment.iov_len > 0 {
                break;
            }
            used_up += 1;
            if done == buf.len() {
                break;
            }
        }
        self.readable.drain(..used_up);
        self.readable_len -= u32::try_from(buf.len()).unwrap_or(self.readable_len);
        true
    }

    /// Removes the last writable byte, the place of the status, and returns its address.
    pub fn take_status(&mut self) -> Option<*mut u8> {
        let last = self.writable.last_mut()?;
        last.iov_len -= 1;
        let status = last.iov_base.cast::<u8>().wrapping_add(last.iov_len);
        if last.iov_len == 0 {
            self.writable.pop();
        }
        self.writable_len -= 1;
        Some(status)
    }

    /// Copies `bytes` to the front of the writable part, as far as it goes; returns how many were written.
    ///
    /// # Safety
    /// The segments must be mapped.
    pub unsafe fn write(writable: &[libc::iovec], bytes: &[u8]) -> usize {
        let mut done = 0;
        for segment in writable {
            let n = segment.iov_len.min(bytes.len() - done);
            // SAFETY: `n` bytes are within the segment, which the caller says is mapped, and within `bytes`.
            unsafe {
                std::ptr::copy_nonoverlapping(bytes[done..].as_ptr(), segment.iov_base.cast::<u8>(), n);
            };
            done += n;
            if done == bytes.len() {
                break;
            }
        }
        done
    }

    /// Adds guest memory. Empty descriptors are legal and add nothing.
    fn add(&mut self, mem: &GuestMemory, desc: Descriptor) -> Result<(), ChainError> {
        let Descriptor { mut addr, len, flags, .. } = desc;
        let writable = flags & F_WRITE != 0;
        if !writable && self.writable_len > 0 {
            return Err(ChainError::Order);
        }
        let (list, total) = if writable {
            (&mut self.writable, &mut self.writable_len)
        } else {
            (&mut self.readable, &mut self.readable_len)
        };
        *total = total.checked_add(len).ok_or(ChainError::TotalLength)?;
        let mut left = u64::from(len);
        while left > 0 {
            let (host, n) = mem.translate(addr, left).ok_or(ChainError::Address { addr, len })?;
            // Fits: `n` is at most `len`.
            list.push(libc::iovec { iov_base: host.cast(), iov_len: usize::try_from(n).unwrap_or(0) });
            left -= n;
            addr = addr.checked_add(n).ok_or(ChainError::Address { addr, len })?;
        }
        Ok(())
    }
}

/// Fills `segments` from the chain that begins at `head`.
pub fn walk(table: &DescriptorTable, head: u16, segments: &mut Segments) -> Result<(), ChainError> {
    segments.clear();
    let mem = table.memory();
    let size = u32::from(table.size());
    let mut index = head;
    // No legal chain has more descriptors than the queue, wherever they are (§2.7.5.3.1).
    let most = table.size().min(MAX_DESCRIPTORS);
    loop {
        let desc = table.get(index).ok_or(ChainError::Index { index, size })?;
        if desc.flags & F_INDIRECT != 0 {
            if desc.flags & F_NEXT != 0 {
                return Err(ChainError::Nested);
            }
            return walk_table(mem, desc, most, segments);
        }
        segments.count(most)?;
        segments.add(mem, desc)?;
        if active(Sabotage::FetchLengthTwice)
            && desc.flags & F_WRITE == 0
            && let Some(again) = table.get(index)
            && let Some(last) = segments.readable.last_mut()
        {
            last.iov_len = again.len as usize;
        }
        if desc.flags & F_NEXT == 0 {
            return Ok(());
        }
        index = desc.next;
    }
}

fn walk_table(
    mem: &GuestMemory,
    table: Descriptor,
    most: u16,
    segments: &mut Segments,
) -> Result<(), ChainError> {
    let len = table.len;
    let entries = len / 16;
    if len == 0 || !len.is_multiple_of(16) || entries > u32::from(u16::MAX) + 1 {
        return Err(ChainError::TableLength { len });
    }
    let mut index = 0u16;
    loop {
        if u32::from(index) >= entries {
            return Err(ChainError::Index { index, size: entries });
        }
        let addr = table
            .addr
            .checked_add(u64::from(index) * Descriptor::SIZE)
            .ok_or(ChainError::Address { addr: table.addr, len })?;
        let desc = read_table_entry(mem, addr).ok_or(ChainError::Address { addr, len })?;
        if desc.flags & F_INDIRECT != 0 {
            return Err(ChainError::Nested);
        }
        segments.count(most)?;
        segments.add(mem, desc)?;
        if desc.flags & F_NEXT == 0 {
            return Ok(());
        }
        index = desc.next;
    }
}

/// Reads a descriptor that may lie across two memory regions: a table need not be aligned (§2.7.5.3).
fn read_table_entry(mem: &GuestMemory, addr: u64) -> Option<Descriptor> {
    if let Some(at) = mem.translate_whole(addr, Descriptor::SIZE) {
        // SAFETY: `translate_whole` found 16 bytes, mapped while `mem` lives.
        return Some(unsafe { Descriptor::read(at) });
    }
    let mut bytes = [0u8; 16];
    for (i, byte) in bytes.iter_mut().enumerate() {
        let at = mem.translate_whole(addr.checked_add(i as u64)?, 1)?;
        // SAFETY: `translate_whole` found one byte, mapped while `mem` lives.
        *byte = unsafe { at.read_volatile() };
    }
    // SAFETY: `bytes` has 16 bytes.
    Some(unsafe { Descriptor::read(bytes.as_ptr()) })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
    use std::time::{Duration, Instant};

    use proptest::prelude::*;

    use super::super::memory::tests::memory;
    use super::*;

    const SIZE: u16 = 8;
    const DESC: u64 = 0x1000;

    /// A table of 8 at 0x1000, in two adjacent regions with a hole behind them.
    fn table(entries: &[(u64, u32, u16, u16)]) -> DescriptorTable {
        let mem = Arc::new(memory(&[(0, 0x8000), (0x8000, 0x8000)]));
        put(&mem, DESC, entries);
        DescriptorTable::new(mem, DESC, SIZE).unwrap()
    }

    fn put(mem: &GuestMemory, at: u64, table: &[(u64, u32, u16, u16)]) {
        for (i, (addr, len, flags, next)) in table.iter().enumerate() {
            let mut bytes = [0u8; 16];
            bytes[..8].copy_from_slice(&addr.to_le_bytes());
            bytes[8..12].copy_from_slice(&len.to_le_bytes());
            bytes[12..14].copy_from_slice(&flags.to_le_bytes());
            bytes[14..].copy_from_slice(&next.to_le_bytes());
            for (offset, byte) in bytes.iter().enumerate() {
                let host = mem.translate_whole(at + (i * 16 + offset) as u64, 1).unwrap();
                // SAFETY: one mapped byte.
                unsafe { host.write(*byte) };
            }
        }
    }

    fn walked(table: &DescriptorTable, head: u16) -> Result<(usize, usize, u32, u32), ChainError> {
        let mut s = Segments::default();
        walk(table, head, &mut s)?;
        Ok((s.readable.len(), s.writable.len(), s.readable_len, s.writable_len))
    }

    #[test]
    fn buffer_across_the_seam_of_two_regions_becomes_two_segments() {
        let table = table(&[(0x7f00, 0x200, F_NEXT, 1), (0x100, 1, F_WRITE, 0)]);
        assert_eq!(walked(&table, 0), Ok((2, 1, 0x200, 1)));
    }

    #[test]
    fn buffer_that_reaches_into_a_hole_is_refused() {
        let table = table(&[(0xff00, 0x200, 0, 0)]);
        assert!(matches!(walked(&table, 0), Err(ChainError::Address { .. })));
    }

    #[test]
    fn loop_ends_after_as_many_descriptors_as_the_queue_has() {
        let table = table(&[(0, 16, F_NEXT, 1), (0, 16, F_NEXT, 0)]);
        assert_eq!(walked(&table, 0), Err(ChainError::TooLong(SIZE)));
    }

    #[test]
    fn readable_after_writable_is_refused() {
        let table = table(&[(0, 16, F_NEXT | F_WRITE, 1), (0, 16, 0, 0)]);
        assert_eq!(walked(&table, 0), Err(ChainError::Order));
    }

    #[test]
    fn index_outside_the_table_is_refused() {
        let table = table(&[(0, 16, F_NEXT, SIZE)]);
        assert!(matches!(walked(&table, 0), Err(ChainError::Index { index: SIZE, .. })));
        assert!(matches!(walked(&table, SIZE), Err(ChainError::Index { .. })));
    }

    /// What was checked is what is used, however the guest changes it in between.
    #[test]
    fn length_that_changes_after_its_check_is_not_used() {
        let table = table(&[(0xfe00, 512, 0, 0)]);
        let at = table.memory().translate_whole(DESC + 8, 4).unwrap().cast::<u32>();
        // SAFETY: four mapped and aligned bytes, which live as long as the table.
        let len = unsafe { AtomicU32::from_ptr(at) };
        let stop = AtomicBool::new(false);
        // Chains found in order, and chains that were refused: enough of both. And enough walks during which the length did
        // change: on a busy machine many go by between two turns of the other thread.
        const ENOUGH: u32 = 20_000;
        let (mut walks, mut changed, mut longest) = ([0u64; 2], 0, 0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    // The second one reaches past the end of memory.
                    len.store(512, Ordering::Relaxed);
                    len.store(0x1_0000, Ordering::Relaxed);
                }
            });
            let until = Instant::now() + Duration::from_secs(120);
            let mut segments = Segments::default();
            let is_enough =
                |changed, walks: [u64; 2]| changed >= ENOUGH && walks.iter().all(|&count| count >= 5000);
            while !is_enough(changed, walks) && longest <= 512 && Instant::now() < until {
                let before = len.load(Ordering::Relaxed);
                let refused = walk(&table, 0, &mut segments).is_err();
                walks[usize::from(refused)] += 1;
                if !refused {
                    longest = longest.max(segments.readable[0].iov_len);
                }
                changed += u32::from(len.load(Ordering::Relaxed) != before);
            }
            stop.store(true, Ordering::Relaxed);
        });
        println!(
            "{} chains found in order, {} refused, the length changed during {changed}",
            walks[0], walks[1]
        );
        assert_eq!(longest, 512);
        assert!(
            changed >= ENOUGH && walks.iter().all(|&count| count >= 5000),
            "the length hardly changed: {walks:?}"
        );
    }

    #[test]
    fn indirect_table_may_be_unaligned_and_cross_a_seam() {
        for at in [0x4001, 0x7ff8] {
            let table = table(&[(at, 48, F_INDIRECT, 0)]);
            put(table.memory(), at, &[(0, 16, F_NEXT, 1), (0x20, 512, F_NEXT, 2), (0x400, 1, F_WRITE, 0)]);
            assert_eq!(walked(&table, 0), Ok((2, 1, 528, 1)), "table at {at:#x}");
        }
    }

    #[test]
    fn indirect_tables_that_lie_are_refused() {
        for (len, flags, error) in [
            (0, F_INDIRECT, ChainError::TableLength { len: 0 }),
            (17, F_INDIRECT, ChainError::TableLength { len: 17 }),
            (0xffff_fff0, F_INDIRECT, ChainError::TableLength { len: 0xffff_fff0 }),
            (16, F_INDIRECT | F_NEXT, ChainError::Nested),
        ] {
            let table = table(&[(0x4000, len, flags, 1)]);
            assert_eq!(walked(&table, 0), Err(error));
        }
        let nested = table(&[(0x4000, 32, F_INDIRECT, 0)]);
        put(nested.memory(), 0x4000, &[(0, 16, F_NEXT, 1), (0x4000, 32, F_INDIRECT, 0)]);
        assert_eq!(walked(&nested, 0), Err(ChainError::Nested));
        let outside = table(&[(0x4000, 32, F_INDIRECT, 0)]);
        put(outside.memory(), 0x4000, &[(0, 16, F_NEXT, 2)]);
        assert!(matches!(walked(&outside, 0), Err(ChainError::Index { index: 2, size: 2 })));
    }

    #[test]
    fn header_split_over_descriptors_is_put_together_and_the_status_is_the_last_byte() {
        let table = table(&[(0x100, 4, F_NEXT, 1), (0x200, 12, F_NEXT, 2), (0x300, 5, F_WRITE, 0)]);
        let mut s = Segments::default();
        walk(&table, 0, &mut s).unwrap();
        let mut header = [0; 16];
        // SAFETY: the segments are mapped by the table's memory.
        assert!(unsafe { s.take_readable(&mut header) });
        assert_eq!((s.readable_len, s.readable.len()), (0, 0));
        assert_eq!(s.take_status(), table.memory().translate_whole(0x304, 1));
        assert_eq!((s.writable_len, s.writable.len()), (4, 1));
        // SAFETY: as above.
        assert!(!unsafe { s.take_readable(&mut header) }, "nothing is left");
    }

    proptest! {
        /// Whatever the table: walking ends, and every segment lies within guest memory.
        #[test]
        fn any_table_is_walked_or_refused(
            table in prop::collection::vec(
                (0u64..0x12000, prop_oneof![0u32..2048, any::<u32>()], 0u16..8, 0u16..10), 8),
            inner in prop::collection::vec((0u64..0x12000, 0u32..2048, 0u16..8, 0u16..10), 8),
            head in 0u16..10,
        ) {
            let table = self::table(&table);
            put(table.memory(), 0x4000, &inner);
            let mut s = Segments::default();
            if walk(&table, head, &mut s).is_ok() {
                let total: usize = s.readable.iter().chain(&s.writable).map(|v| v.iov_len).sum();
                prop_assert_eq!(total as u64, u64::from(s.readable_len) + u64::from(s.writable_len));
                let low = table.memory().translate_whole(0, 1).unwrap() as usize;
                let high = table.memory().translate_whole(0x8000, 1).unwrap() as usize;
                for v in s.readable.iter().chain(&s.writable) {
                    let at = v.iov_base as usize;
                    let inside = |base: usize| at >= base && at + v.iov_len <= base + 0x8000;
                    prop_assert!(inside(low) || inside(high));
                }
            }
        }
    }
}
