// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The descriptor table of a split virtqueue (virtio 1.3, §2.7.5): 16 bytes each, `{ le64 addr, le32 len, le16 flags, le16 next }`,
//! in one memory region, so that it is read through a pointer. Every field is read once; what it says is checked by the reader.

use std::sync::Arc;

use super::memory::GuestMemory;

/// A descriptor, copied out of guest memory.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

impl Descriptor {
    pub const SIZE: u64 = 16;

    /// Reads the descriptor at `at`.
    ///
    /// # Safety
    /// `at` must point to 16 bytes that stay mapped during the call.
    pub unsafe fn read(at: *const u8) -> Self {
        // SAFETY: the caller vouches for 16 bytes; the fields may change under us, and each is read once.
        unsafe {
            Self {
                addr: u64::from_le(at.cast::<u64>().read_unaligned()),
                len: u32::from_le(at.add(8).cast::<u32>().read_unaligned()),
                flags: u16::from_le(at.add(12).cast::<u16>().read_unaligned()),
                next: u16::from_le(at.add(14).cast::<u16>().read_unaligned()),
            }
        }
    }
}

/// The table, and the memory that its descriptors speak of.
#[derive(Debug)]
pub struct DescriptorTable {
    mem: Arc<GuestMemory>,
    at: *const u8,
    size: u16,
}

// SAFETY: the pointer leads into `mem`, which the table keeps mapped, and is only read through.
unsafe impl Send for DescriptorTable {}

impl DescriptorTable {
    /// The table of `size` descriptors at guest address `addr`. `None` if it is misaligned or not in one region of `mem`.
    pub fn new(mem: Arc<GuestMemory>, addr: u64, size: u16) -> Option<Self> {
        let at = mem.translate_whole(addr, Descriptor::SIZE * u64::from(size))?;
        addr.is_multiple_of(Descriptor::SIZE).then_some(Self { at, mem, size })
    }

    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.mem
    }

    pub fn size(&self) -> u16 {
        self.size
    }

    /// The descriptor `index`. `None` if there are not so many.
    pub fn get(&self, index: u16) -> Option<Descriptor> {
        if index >= self.size {
            return None;
        }
        // SAFETY: `new` checked 16·size bytes of table, which stay mapped while `mem` lives.
        Some(unsafe { Descriptor::read(self.at.add(usize::from(index) * 16)) })
    }
}
