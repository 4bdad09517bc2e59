// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest's memory: regions on memfds, shared with the daemon. Knows addresses, not what lies there.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicU16, Ordering, fence};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use anyhow::{Context, Result};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

/// Guest addresses in the front-end's own numbering lie this much higher, so that nobody can take one for the other.
const USER_BASE: u64 = 0x5000_0000_0000;
/// Kept free on both sides of a seam between regions, for tests that lay buffers across it.
pub const SEAM: u64 = 1 << 20;

/// Memory at `guest`, `len` bytes.
#[derive(Debug)]
pub struct Region {
    pub guest: u64,
    pub len: u64,
    /// The address of the region in the front-end's numbering.
    pub user: u64,
    /// Where the region begins in its file.
    pub offset: u64,
    file: OwnedFd,
    host: *mut u8,
}

// SAFETY: `host` points to shared memory that stays mapped until the region is dropped; it is only accessed with raw copies
// and atomics.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    fn new(index: u64, guest: u64, len: u64) -> Result<Self> {
        // Another offset for each, as a monitor does that keeps all memory in one file.
        let offset = index << 16;
        let file = memfd_create("guest-memory", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        ftruncate(&file, offset + len)?;
        let size = usize::try_from(len)?;
        // SAFETY: a new mapping at an address that the kernel chooses touches nothing that exists.
        let host = unsafe {
            mmap(ptr::null_mut(), size, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, offset)
        };
        let host = host.context("map guest memory")?.cast();
        Ok(Self { guest, len, user: USER_BASE + guest, offset, file, host })
    }

    /// The file behind it.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping is this region's own and nobody keeps a pointer into it.
        let _ = unsafe { munmap(self.host.cast(), usize::try_from(self.len).unwrap_or(0)) };
    }
}

/// All memory of a guest.
#[derive(Debug)]
pub struct GuestRam {
    regions: Vec<Region>,
    cursor: Mutex<u64>,
    copy: OnceLock<Mutex<Vec<Vec<u8>>>>,
}

impl GuestRam {
    /// Regions of (guest address, bytes), ascending. What [`GuestRam::alloc`] gives comes from the first.
    pub fn new(layout: &[(u64, u64)]) -> Result<Self> {
        let regions = (0..).zip(layout).map(|(index, (guest, len))| Region::new(index, *guest, *len));
        let regions = regions.collect::<Result<Vec<_>>>()?;
        let first = regions.first().context("no memory")?.guest;
        Ok(Self { regions, cursor: Mutex::new(first + 0x1000), copy: OnceLock::new() })
    }

    /// 64 MiB, directly followed by a region of 16 MiB from another file, and after a hole 16 MiB at 4 GiB.
    pub fn standard() -> Result<Self> {
        Self::new(&[(0, 64 << 20), (64 << 20, 16 << 20), (4 << 30, 16 << 20)])
    }

    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Where the first region ends and the second begins. [`SEAM`] bytes on both sides belong to nobody.
    pub fn seam(&self) -> u64 {
        self.regions[0].guest + self.regions[0].len
    }

    /// Takes `len` bytes, zeroed, aligned to `align`, for the life of the memory.
    pub fn alloc(&self, len: u64, align: u64) -> u64 {
        let mut cursor = self.cursor.lock().unwrap_or_else(PoisonError::into_inner);
        let at = cursor.next_multiple_of(align);
        *cursor = at + len;
        assert!(*cursor <= self.seam() - SEAM, "the guest of the test needs more memory");
        at
    }

    /// The front-end's number for a guest address.
    pub fn user(&self, guest: u64) -> u64 {
        self.regions.iter().find(|r| (r.guest..r.guest + r.len).contains(&guest)).map_or_else(
            || panic!("the test's guest has no memory at {guest:#x}"),
            |r| r.user + (guest - r.guest),
        )
    }

    /// A pointer to `guest` and how many bytes follow it in its region.
    fn locate(&self, guest: u64) -> (*mut u8, usize) {
        let found = self.regions.iter().find(|r| (r.guest..r.guest + r.len).contains(&guest));
        let Some(region) = found else { panic!("the test's guest has no memory at {guest:#x}") };
        let offset = usize::try_from(guest - region.guest).unwrap_or(usize::MAX);
        let len = usize::try_from(region.len).unwrap_or(0);
        (region.host.wrapping_add(offset), len - offset)
    }

    /// Calls `copy` with each contiguous piece of `len` bytes from `guest` on: pointer, offset, length.
    fn pieces(&self, guest: u64, len: usize, mut copy: impl FnMut(*mut u8, usize, usize)) {
        let mut done = 0;
        while done < len {
            let (host, room) = self.locate(guest + done as u64);
            let n = room.min(len - done);
            copy(host, done, n);
            done += n;
        }
    }

    /// Begins to keep a copy of all memory as another machine would have it that the guest is being moved to. What the driver
    /// writes goes there at once, what the device writes only with [`GuestRam::copy_range`].
    pub fn keep_copy(&self) {
        let copy = self.regions.iter().map(|r| vec![0; usize::try_from(r.len).unwrap_or(0)]).collect();
        let _ = self.copy.set(Mutex::new(copy));
        for region in &self.regions {
            self.copy_range(region.guest, region.len);
        }
    }

    fn copy(&self) -> Option<MutexGuard<'_, Vec<Vec<u8>>>> {
        self.copy.get().map(|copy| copy.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Brings `len` bytes of the copy up to date. What is no memory is passed over.
    pub fn copy_range(&self, guest: u64, len: u64) {
        let Some(mut copy) = self.copy() else { return };
        for (region, copy) in self.regions.iter().zip(copy.iter_mut()) {
            let (from, to) = (guest.max(region.guest), (guest + len).min(region.guest + region.len));
            if from < to {
                let at = usize::try_from(from - region.guest).unwrap_or(0);
                let n = usize::try_from(to - from).unwrap_or(0);
                self.read_into(from, &mut copy[at..at + n]);
            }
        }
    }

    /// Where memory differs from the copy: the first such byte, and how many there are.
    pub fn differs_from_copy(&self) -> Option<(u64, usize)> {
        let copy = self.copy()?;
        let mut found = None;
        for (region, copy) in self.regions.iter().zip(copy.iter()) {
            let now = self.read(region.guest, copy.len());
            if now != *copy {
                for (at, _) in now.iter().zip(copy).enumerate().filter(|(_, (now, copy))| now != copy) {
                    found.get_or_insert((region.guest + at as u64, 0)).1 += 1;
                }
            }
        }
        found
    }

    /// The driver wrote `len` bytes at `guest`.
    fn wrote(&self, guest: u64, len: usize) {
        if self.copy.get().is_some() {
            self.copy_range(guest, len as u64);
        }
    }

    pub fn write(&self, guest: u64, bytes: &[u8]) {
        self.pieces(guest, bytes.len(), |host, at, n| {
            // SAFETY: `locate` gave `n` mapped bytes; nobody has a reference to them.
            unsafe { ptr::copy_nonoverlapping(bytes[at..].as_ptr(), host, n) };
        });
        self.wrote(guest, bytes.len());
    }

    pub fn read_into(&self, guest: u64, bytes: &mut [u8]) {
        let base = bytes.as_mut_ptr();
        self.pieces(guest, bytes.len(), |host, at, n| {
            // SAFETY: `locate` gave `n` mapped bytes; `at + n` is within `bytes`, which is borrowed for the call.
            unsafe { ptr::copy_nonoverlapping(host, base.add(at), n) };
        });
    }

    pub fn read(&self, guest: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.read_into(guest, &mut bytes);
        bytes
    }

    pub fn fill(&self, guest: u64, len: usize, value: u8) {
        self.pieces(guest, len, |host, _, n| {
            // SAFETY: `locate` gave `n` mapped bytes; nobody has a reference to them.
            unsafe { ptr::write_bytes(host, value, n) };
        });
        self.wrote(guest, len);
    }

    fn atomic(&self, guest: u64) -> &AtomicU16 {
        let (host, room) = self.locate(guest);
        assert!(room >= 2 && guest.is_multiple_of(2), "no 16-bit field at {guest:#x}");
        // SAFETY: two mapped, aligned bytes that live as long as `self`; all who share them use atomics.
        unsafe { AtomicU16::from_ptr(host.cast()) }
    }

    /// Reads a 16-bit field; what the other side wrote before it is visible afterwards.
    pub fn load(&self, guest: u64) -> u16 {
        u16::from_le(self.atomic(guest).load(Ordering::Acquire))
    }

    /// Writes a 16-bit field after everything written before.
    pub fn store(&self, guest: u64, value: u16) {
        self.atomic(guest).store(value.to_le(), Ordering::Release);
        self.wrote(guest, 2);
    }

    /// A full barrier, as between publishing an index and reading the other side's wish.
    pub fn barrier(&self) {
        fence(Ordering::SeqCst);
    }
}
