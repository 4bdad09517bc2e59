// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Memory that a front-end shares and may take away again: mapped, and watched.
//!
//! A front-end can shorten a file after it was mapped. Who then touches a page that is gone meets zeroes, and the
//! [`Alarm`] of the connection is raised ([`vssd_pool::sigbus`]). All mappings of a connection share one alarm. A queue looks
//! at it once a batch, publishes nothing more when it is raised, and the session ends: what the guest has in flight
//! stays in its inflight region. Knows files and addresses, neither guests nor rings.

use std::fs::File;

use vm_memory::FileOffset;
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder, MmapRegionError};
use vssd_pool::sigbus::{Alarm, Watch};

/// Why memory of a front-end cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MappingError {
    #[error("cannot map the file")]
    Map(#[source] MmapRegionError),
    #[error("cannot watch the mapping")]
    Watch(#[source] std::io::Error),
}

/// A shared mapping of part of a front-end's file, for reading and writing.
#[derive(Debug)]
pub struct SharedMapping {
    /// Dropped before the mapping, as it must be.
    _watch: Watch,
    mapping: MmapRegion<()>,
}

impl SharedMapping {
    /// Maps `len` bytes of `file` from `offset` on. A page that is lost later raises `alarm`.
    pub fn new(file: File, offset: u64, len: usize, alarm: &Alarm) -> Result<Self, MappingError> {
        const PROTECTION: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
        let copy = file.try_clone().map_err(MappingError::Watch)?;
        let mapping = MmapRegionBuilder::new(len)
            .with_file_offset(FileOffset::new(file, offset))
            .with_mmap_prot(PROTECTION)
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .build()
            .map_err(MappingError::Map)?;
        // SAFETY: the mapping is owned, stays until the watch is dropped, and hands out nothing but a raw pointer.
        let watch = unsafe { Watch::new(mapping.as_ptr(), len, &copy, PROTECTION, alarm) }
            .map_err(MappingError::Watch)?;
        Ok(Self { _watch: watch, mapping })
    }

    /// Where it is, for as long as it lives.
    pub fn as_ptr(&self) -> *mut u8 {
        self.mapping.as_ptr()
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::tests::{file, memory};
    use super::super::memory::{GuestMemory, RegionSpec};
    use super::*;

    #[test]
    fn memory_that_is_taken_away_is_noticed_in_every_table_that_shares_it_and_in_no_other() {
        let alarm = Alarm::new().unwrap();
        let file = file(0x4000);
        let spec = RegionSpec { guest: 0, size: 0x4000, user: 0, file_offset: 0 };
        let mem = GuestMemory::new(alarm.clone()).with_region(spec, file.try_clone().unwrap()).unwrap();
        let copy = mem.clone();
        let other = memory(&[(0, 0x4000)]);
        file.set_len(0x1000).unwrap();
        let byte = |mem: &GuestMemory, at| {
            // SAFETY: one mapped byte.
            unsafe { mem.translate_whole(at, 1).unwrap().read_volatile() }
        };
        byte(&mem, 0xfff);
        assert!(!mem.is_lost());
        byte(&mem, 0x3000);
        byte(&other, 0x3000);
        assert!(mem.is_lost() && copy.is_lost() && alarm.is_raised() && !other.is_lost());
    }
}
