// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Guest memory as the front-end shared it.
//!
//! The guest writes to it whenever it likes, so nothing here ever makes a Rust reference to its bytes: it hands out raw
//! pointers that are valid for as long as the [`GuestMemory`] lives, and whoever reads through one copies first and
//! checks the copy.

use std::fs::File;
use std::sync::Arc;

use vssd_pool::sigbus::Alarm;

use super::sigbus::{MappingError, SharedMapping};

/// Most regions a front-end may share; what `vhost` announces and virtiofsd, QEMU and cloud-hypervisor stay below.
pub const MAX_REGIONS: usize = 509;

/// Why a memory table was refused.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("region of {size:#x} bytes at guest address {guest:#x} is empty or wraps around")]
    Bounds { guest: u64, size: u64 },
    #[error("region at guest address {guest:#x} overlaps another")]
    Overlap { guest: u64 },
    #[error("no region at guest address {guest:#x} of {size:#x} bytes")]
    NoSuchRegion { guest: u64, size: u64 },
    #[error("{0} regions, at most {MAX_REGIONS} are allowed")]
    TooMany(usize),
    #[error("region needs {needed:#x} bytes of its file, which has {actual:#x}")]
    FileTooShort { needed: u64, actual: u64 },
    #[error("cannot map guest memory")]
    Map(#[source] MappingError),
    #[error("cannot examine the file of guest memory")]
    Stat(#[source] std::io::Error),
}

/// One region as a vhost-user message describes it.
#[derive(Clone, Copy, Debug)]
pub struct RegionSpec {
    pub guest: u64,
    pub size: u64,
    /// The front-end's own address of the region: ring addresses are given in these.
    pub user: u64,
    pub file_offset: u64,
}

#[derive(Debug)]
struct Region {
    guest: u64,
    size: u64,
    user: u64,
    host: *mut u8,
    /// Keeps `host` mapped.
    _mapping: SharedMapping,
}

// SAFETY: `host` points into `_mapping`, which is shared memory that any thread may access; all accesses are raw.
unsafe impl Send for Region {}
// SAFETY: as above; a Region itself never changes after it was made.
unsafe impl Sync for Region {}

/// An immutable memory table. Changing it makes a new one that shares the mappings.
#[derive(Debug, Clone)]
pub struct GuestMemory {
    /// Sorted by guest address, not overlapping.
    regions: Vec<Arc<Region>>,
    alarm: Alarm,
}

impl GuestMemory {
    /// No memory. `alarm` is raised when some that is added later gets lost.
    pub fn new(alarm: Alarm) -> Self {
        Self { regions: Vec::new(), alarm }
    }

    /// No memory, with the alarm of this table.
    pub fn emptied(&self) -> Self {
        Self::new(self.alarm.clone())
    }

    /// The alarm of whatever else the same front-end shares.
    pub fn alarm(&self) -> &Alarm {
        &self.alarm
    }

    /// Whether the front-end has taken back memory under its mapping: what was read may be zeroes, what was written gone.
    pub fn is_lost(&self) -> bool {
        self.alarm.is_raised()
    }

    /// This table with one more region, mapped from `file`.
    pub fn with_region(&self, spec: RegionSpec, file: File) -> Result<Self, MemoryError> {
        let bounds = || MemoryError::Bounds { guest: spec.guest, size: spec.size };
        let end = spec.guest.checked_add(spec.size).ok_or_else(bounds)?;
        spec.user.checked_add(spec.size).ok_or_else(bounds)?;
        let len = usize::try_from(spec.size).map_err(|_| bounds())?;
        if len == 0 || isize::try_from(len).is_err() {
            return Err(bounds());
        }
        if self.regions.len() >= MAX_REGIONS {
            return Err(MemoryError::TooMany(self.regions.len() + 1));
        }
        if self.regions.iter().any(|r| spec.guest < r.guest + r.size && r.guest < end) {
            return Err(MemoryError::Overlap { guest: spec.guest });
        }
        let needed = spec.file_offset.checked_add(spec.size).ok_or_else(bounds)?;
        let metadata = file.metadata().map_err(MemoryError::Stat)?;
        // Devices report no length.
        if metadata.is_file() && metadata.len() < needed {
            return Err(MemoryError::FileTooShort { needed, actual: metadata.len() });
        }
        let mapping =
            SharedMapping::new(file, spec.file_offset, len, &self.alarm).map_err(MemoryError::Map)?;
        let region = Region {
            guest: spec.guest,
            size: spec.size,
            user: spec.user,
            host: mapping.as_ptr(),
            _mapping: mapping,
        };
        let mut regions = self.regions.clone();
        regions.push(Arc::new(region));
        regions.sort_by_key(|r| r.guest);
        Ok(Self { regions, alarm: self.alarm.clone() })
    }

    /// This table without the region that was shared as `spec`.
    pub fn without_region(&self, spec: RegionSpec) -> Result<Self, MemoryError> {
        let is_it = |r: &Arc<Region>| r.guest == spec.guest && r.size == spec.size && r.user == spec.user;
        let at = self
            .regions
            .iter()
            .position(is_it)
            .ok_or(MemoryError::NoSuchRegion { guest: spec.guest, size: spec.size })?;
        let mut regions = self.regions.clone();
        regions.remove(at);
        Ok(Self { regions, alarm: self.alarm.clone() })
    }

    /// The guest address of a front-end address, as ring addresses are given.
    pub fn guest_of_user(&self, user: u64) -> Option<u64> {
        let region = self.regions.iter().find(|r| (r.user..r.user + r.size).contains(&user))?;
        Some(region.guest + (user - region.user))
    }

    /// The guest address of a byte that [`Self::translate`] gave a pointer to.
    pub fn guest_of_host(&self, host: *const u8) -> Option<u64> {
        let host = host.addr() as u64;
        self.regions.iter().find_map(|r| {
            let offset = host.checked_sub(r.host.addr() as u64)?;
            (offset < r.size).then(|| r.guest + offset)
        })
    }

    /// One past the highest guest address.
    pub fn end(&self) -> u64 {
        self.regions.last().map_or(0, |r| r.guest + r.size)
    }

    /// A pointer to the bytes from `guest` on and how many of them are contiguous, at most `len`.
    /// `None` where the guest has no memory there. `len` must not be zero.
    pub fn translate(&self, guest: u64, len: u64) -> Option<(*mut u8, u64)> {
        let at = self.regions.partition_point(|r| r.guest <= guest).checked_sub(1)?;
        let region = &self.regions[at];
        let offset = guest - region.guest;
        let left = region.size.checked_sub(offset).filter(|left| *left > 0)?;
        // Fits: the region was mapped with its size as a usize.
        let host = region.host.wrapping_add(usize::try_from(offset).ok()?);
        Some((host, left.min(len)))
    }

    /// A pointer to `len` contiguous bytes from `guest` on.
    pub fn translate_whole(&self, guest: u64, len: u64) -> Option<*mut u8> {
        let (host, contiguous) = self.translate(guest, len)?;
        (contiguous == len).then_some(host)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Guest memory of `size` bytes at guest address `guest`, on a memfd; user addresses are guest addresses + 1 GiB.
    pub(crate) fn memory(layout: &[(u64, u64)]) -> GuestMemory {
        let empty = GuestMemory::new(Alarm::new().unwrap());
        layout.iter().fold(empty, |mem, (guest, size)| {
            let spec = RegionSpec { guest: *guest, size: *size, user: guest + (1 << 30), file_offset: 0 };
            mem.with_region(spec, file(*size)).unwrap()
        })
    }

    pub(crate) fn file(size: u64) -> File {
        let fd = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(size).unwrap();
        file
    }

    #[test]
    fn translate_stops_at_the_end_of_a_region_and_refuses_holes() {
        let mem = memory(&[(0, 0x1000), (0x1000, 0x1000), (0x4000, 0x1000)]);
        assert_eq!(mem.translate(0xff0, 0x20).unwrap().1, 0x10);
        assert_eq!(mem.translate(0x1000, 0x20).unwrap().1, 0x20);
        assert!(mem.translate(0x2000, 1).is_none());
        assert!(mem.translate(0x5000, 1).is_none());
        assert!(mem.translate(u64::MAX, 1).is_none());
        assert!(mem.translate_whole(0xff0, 0x20).is_none());
        assert_eq!(mem.guest_of_user((1 << 30) + 0x4010), Some(0x4010));
        assert_eq!(mem.guest_of_user(0x10), None);
        let host = mem.translate(0x1010, 1).unwrap().0;
        assert_eq!(mem.guest_of_host(host), Some(0x1010));
        assert_eq!(mem.guest_of_host(std::ptr::null()), None);
        assert_eq!(mem.end(), 0x5000);
    }

    #[test]
    fn regions_that_overlap_wrap_or_exceed_their_file_are_refused() {
        let mem = memory(&[(0x1000, 0x1000)]);
        let file = || file(0x1000);
        let spec = |guest, size| RegionSpec { guest, size, user: 0, file_offset: 0 };
        assert!(matches!(mem.with_region(spec(0x1fff, 0x10), file()), Err(MemoryError::Overlap { .. })));
        assert!(matches!(mem.with_region(spec(0, 0), file()), Err(MemoryError::Bounds { .. })));
        assert!(matches!(mem.with_region(spec(u64::MAX, 2), file()), Err(MemoryError::Bounds { .. })));
        assert!(matches!(
            mem.with_region(spec(0x4000, 0x2000), file()),
            Err(MemoryError::FileTooShort { .. })
        ));
        assert!(mem.without_region(spec(0x1000, 0x1000)).is_err(), "another user address is another region");
    }
}
