// SPDX-License-Identifier: Apache-2.0 OR MIT

//! NV-RAM: a mapped file or device whose bytes are reached by load and store.
//!
//! Three ways for a store to become durable ([`Persistence`]): by writing back cache lines on a DAX mapping
//! made with `MAP_SYNC` (the kernel then keeps the file's metadata durable, so user space need only care for
//! the data), by doing nothing where the memory itself outlives the power, or by `fdatasync`.
//!
//! Larger writes go past the cache ([`stream`]): what a disk is given is seldom read back soon, and a cache line need not
//! be fetched to be overwritten whole. Such stores, and with `MAP_SYNC` the write-backs of the others, are ordered by
//! [`Store::settle`] on the thread that made them: a store fence orders only its own core's, so the flush of another
//! worker could not do it later.
//!
//! A write that was not flushed may be torn by a power cut anywhere, also within a sector; a disk's guest may count on
//! no more, but an SSD happens to give it whole sectors.
//!
//! A file that someone truncates while it is mapped, or whose filesystem has no room for its holes, loses pages. The
//! mapping is watched ([`sigbus`](crate::sigbus)): the store is *lost* from then on, and every operation fails. Lanes copy
//! without looking and ask [`Store::is_lost`] once a batch.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use super::file::MediumFile;
use super::{RingTarget, Store, out_of_bounds, stream, within};
use crate::error::{Error, Result};
use crate::sigbus::{Alarm, Watch};
use crate::types::{MediumKind, Persistence};

/// See the module's text.
#[derive(Debug)]
pub struct NvramStore {
    medium: MediumFile,
    mapping: Mapping,
    alarm: Alarm,
    persistence: Persistence,
    bytes_written: AtomicU64,
}

/// A shared mapping of a whole medium, unmapped when dropped.
#[derive(Debug)]
struct Mapping {
    start: NonNull<u8>,
    len: usize,
    watch: Option<Watch>,
}

// SAFETY: the mapping is plain memory that is only accessed through raw pointers within its bounds; it is
// unmapped by Drop, when no reference to the store is left.
unsafe impl Send for Mapping {}
// SAFETY: as above; concurrent access to the same bytes is what a disk allows, and never through references.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // It must not outlive the mapping.
        self.watch = None;
        // SAFETY: start and len are those of the successful mmap; nothing uses it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

fn map(medium: &MediumFile, flags: libc::c_int, alarm: &Alarm) -> io::Result<Mapping> {
    let len = usize::try_from(medium.size).map_err(|_| out_of_bounds())?;
    let protection = if medium.read_only { libc::PROT_READ } else { libc::PROT_READ | libc::PROT_WRITE };
    // SAFETY: a new mapping at an address of the kernel's choice disturbs no other memory.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, medium.fd(), 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    // Random access to small pages waits as long for the page tables as for the data. DAX maps large ones by itself, tmpfs does
    // where it is allowed to (`huge=advise`); anything else refuses, which does no harm.
    // SAFETY: only advice, on the mapping just made.
    unsafe { libc::madvise(start, len, libc::MADV_HUGEPAGE) };
    let start = NonNull::new(start.cast()).ok_or_else(out_of_bounds)?;
    let mut mapping = Mapping { start, len, watch: None };
    // SAFETY: the mapping is this one's own, drops the watch first, and is only accessed through raw pointers.
    let watch = unsafe { Watch::new(start.as_ptr(), len, &medium.file, protection, alarm) }?;
    mapping.watch = Some(watch);
    Ok(mapping)
}

impl NvramStore {
    pub(super) fn new(medium: MediumFile, wanted: Persistence) -> Result<Self> {
        if medium.size == 0 {
            return Err(Error::medium(&medium.path, "is empty"));
        }
        let alarm = Alarm::new().map_err(|source| Error::io("cannot make an event descriptor", source))?;
        let io_error = |source| Error::io(format!("cannot map {}", medium.path.display()), source);
        let sync_mapping = || {
            if stream::can_write_back() {
                map(&medium, libc::MAP_SHARED_VALIDATE | libc::MAP_SYNC, &alarm)
            } else {
                Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
            }
        };
        let plain_mapping = || map(&medium, libc::MAP_SHARED, &alarm).map_err(io_error);
        let (mapping, persistence) = match wanted {
            Persistence::MapSync => {
                let mapping = sync_mapping().map_err(|source| {
                    Error::medium(
                        &medium.path,
                        format!("cannot be mapped with MAP_SYNC ({source}); is it on DAX?"),
                    )
                })?;
                (mapping, Persistence::MapSync)
            }
            Persistence::Battery => (plain_mapping()?, Persistence::Battery),
            Persistence::Msync => (plain_mapping()?, Persistence::Msync),
            Persistence::Auto if medium.is_memory() => (plain_mapping()?, Persistence::Battery),
            Persistence::Auto => match sync_mapping() {
                Ok(mapping) => (mapping, Persistence::MapSync),
                Err(_) => (plain_mapping()?, Persistence::Msync),
            },
        };
        Ok(Self { medium, mapping, alarm, persistence, bytes_written: AtomicU64::new(0) })
    }

    fn at(&self, offset: u64, len: usize) -> io::Result<*mut u8> {
        if !within(offset, len as u64, self.mapping.len as u64) {
            return Err(out_of_bounds());
        }
        let offset = usize::try_from(offset).map_err(|_| out_of_bounds())?;
        // SAFETY: offset + len was just checked to lie within the mapping.
        Ok(unsafe { self.mapping.start.as_ptr().add(offset) })
    }

    /// To be asked behind an access: an error if it may have met a hole.
    fn alive(&self) -> io::Result<()> {
        if self.alarm.is_raised() { Err(io::Error::from_raw_os_error(libc::EIO)) } else { Ok(()) }
    }

    fn writable_at(&self, offset: u64, len: usize) -> io::Result<*mut u8> {
        if self.medium.read_only {
            return Err(io::Error::from_raw_os_error(libc::EROFS));
        }
        self.at(offset, len)
    }
}

impl Store for NvramStore {
    fn kind(&self) -> MediumKind {
        MediumKind::Nvram
    }

    fn path(&self) -> &Path {
        &self.medium.path
    }

    fn size(&self) -> u64 {
        self.medium.size
    }

    fn is_fresh(&self) -> bool {
        self.medium.is_fresh
    }

    fn persistence(&self) -> Option<Persistence> {
        Some(self.persistence)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        // SAFETY: buf is exclusively ours and buf.len() bytes long.
        unsafe { self.copy_out(offset, buf.as_mut_ptr(), buf.len()) }?;
        self.alive()
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.bytes_written.fetch_add(buf.len() as u64, Ordering::Relaxed);
        // SAFETY: buf is buf.len() readable bytes.
        unsafe { self.copy_in(offset, buf.as_ptr(), buf.len()) }?;
        self.settle();
        self.alive()
    }

    fn write_align(&self) -> u32 {
        64
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        let len = usize::try_from(len).map_err(|_| out_of_bounds())?;
        let to = self.writable_at(offset, len)?;
        // SAFETY: `at` checked the bounds; medium bytes are never behind references.
        unsafe { to.write_bytes(0, len) };
        if self.persistence == Persistence::MapSync {
            stream::write_back(to, len);
        }
        self.settle();
        self.bytes_written.fetch_add(len as u64, Ordering::Relaxed);
        self.alive()
    }

    fn sync(&self) -> io::Result<()> {
        if self.persistence == Persistence::Msync {
            self.medium.file.sync_data()?;
        }
        self.alive()
    }

    fn sync_is_instant(&self) -> bool {
        self.persistence != Persistence::Msync
    }

    fn ring(&self) -> Option<RingTarget<'_>> {
        (self.persistence == Persistence::Msync).then(|| RingTarget {
            fd: self.medium.file.as_fd(),
            data: false,
            memory_align: 1,
            offset_align: 1,
        })
    }

    unsafe fn copy_out(&self, offset: u64, to: *mut u8, len: usize) -> io::Result<()> {
        let from = self.at(offset, len)?;
        // SAFETY: the caller answers for `to`, `at` for `from`. `copy`, because a VM's memory may be
        // mapped from the same NV-RAM.
        unsafe { std::ptr::copy(from, to, len) };
        Ok(())
    }

    unsafe fn copy_in(&self, offset: u64, from: *const u8, len: usize) -> io::Result<()> {
        let to = self.writable_at(offset, len)?;
        // SAFETY: as in copy_out.
        let cached = unsafe { stream::copy(to, from, len) };
        if self.persistence == Persistence::MapSync && cached {
            stream::write_back(to, len);
        }
        Ok(())
    }

    fn settle(&self) {
        stream::settle();
    }

    fn prepare_copy(&self, offset: u64, len: usize, is_write: bool) -> bool {
        match if is_write { self.writable_at(offset, len) } else { self.at(offset, len) } {
            Ok(at) if is_write => stream::prefetch_page(at),
            Ok(at) => stream::prefetch(at, len),
            Err(_) => return false,
        }
        true
    }

    fn is_lost(&self) -> bool {
        self.alarm.is_raised()
    }

    fn bytes_written(&self) -> u64 {
        self.bytes_written.load(Ordering::Relaxed)
    }
}
