// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Walks a descriptor chain and turns it into host memory segments (virtio 1.3, §2.7.4–§2.7.5).
//!
//! What a guest can get wrong is found here: indices out of bounds, loops, tables in tables, memory it does not have,
//! device-readable after device-writable parts. Knows descriptors, not block requests.

use super::memory::GuestMemory;
use super::ring::{Descriptor, Ring};

const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;

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
}

// SAFETY: the pointers are plain addresses here; whoever dereferences them vouches for their being mapped.
unsafe impl Send for Segments {}

impl Segments {
    pub fn clear(&mut self) {
        self.readable.clear();
        self.writable.clear();
        self.readable_len = 0;
        self.writable_len = 0;
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
                std::ptr::copy_nonoverlapping(segment.iov_base.cast::<u8>(), buf[done..].as_mut_ptr(), n)
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
                std::ptr::copy_nonoverlapping(bytes[done..].as_ptr(), segment.iov_base.cast::<u8>(), n)
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
pub fn walk(ring: &Ring, head: u16, segments: &mut Segments) -> Result<(), ChainError> {
    segments.clear();
    let mem = ring.memory();
    let size = u32::from(ring.size());
    let mut index = head;
    // No legal chain has more descriptors than the queue, wherever they are (§2.7.5.3.1).
    let mut budget = ring.size();
    loop {
        let desc = ring.descriptor(index).ok_or(ChainError::Index { index, size })?;
        if desc.flags & F_INDIRECT != 0 {
            if desc.flags & F_NEXT != 0 {
                return Err(ChainError::Nested);
            }
            return walk_table(mem, desc, &mut budget, ring.size(), segments);
        }
        budget = budget.checked_sub(1).ok_or(ChainError::TooLong(ring.size()))?;
        segments.add(mem, desc)?;
        if desc.flags & F_NEXT == 0 {
            return Ok(());
        }
        index = desc.next;
    }
}

fn walk_table(
    mem: &GuestMemory,
    table: Descriptor,
    budget: &mut u16,
    queue_size: u16,
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
        *budget = budget.checked_sub(1).ok_or(ChainError::TooLong(queue_size))?;
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
