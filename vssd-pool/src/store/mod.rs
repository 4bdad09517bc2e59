// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Media: the only part that knows files, mappings and system calls for storage.
//!
//! A [`Store`] is a run of bytes with a barrier. It knows neither blocks nor vSSDs. What it promises:
//!
//! * a write is visible to every later read of the same bytes, at once;
//! * a write survives a power cut once a [`Store::sync`] that began after it has returned `Ok`. Until then
//!   any part of it, down to the medium's atom (a sector, a cache line), may be there or not, in any order;
//! * after a failed `sync` nothing is known about what was written before.
//!
//! Bulk data takes one of two ways, which [`Store::ring`] tells apart: either the lane's io_uring works
//! on the file descriptor, or the lane copies with [`Store::copy_in`] and [`Store::copy_out`].

pub mod fault;
mod file;
mod mem;
mod nvram;
mod ssd;
mod stream;

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::types::{Cache, MediumKind, MediumPath, MediumSpec, Persistence};

pub use mem::MemStore;
pub use nvram::NvramStore;
pub use ssd::SsdStore;

/// What a lane's io_uring needs to know of a medium.
#[derive(Clone, Copy, Debug)]
pub struct RingTarget<'a> {
    pub fd: BorrowedFd<'a>,
    /// Whether data moves through the ring; otherwise only flushes (`fdatasync`) do.
    pub data: bool,
    /// What the address of a buffer must be a multiple of.
    pub memory_align: u32,
    /// What offset and length on the medium must be multiples of.
    pub offset_align: u32,
}

/// A medium. See the module's text for the contract.
pub trait Store: Send + Sync + fmt::Debug {
    fn kind(&self) -> MediumKind;

    /// Where it is, for people.
    fn path(&self) -> &Path;

    /// Bytes.
    fn size(&self) -> u64;

    /// Whether every byte is known to be zero (a file that was just made).
    fn is_fresh(&self) -> bool {
        false
    }

    fn persistence(&self) -> Option<Persistence> {
        None
    }

    fn cache(&self) -> Option<Cache> {
        None
    }

    /// Fills `buf` from `offset`.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Writes all of `buf` at `offset`; both must be multiples of [`Store::write_align`].
    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()>;

    /// What metadata writes must be multiples of.
    fn write_align(&self) -> u32;

    /// Makes bytes zero.
    fn zero(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Takes room for bytes that will be written, so that a full file system is met now and not then.
    fn reserve(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    /// Makes every write that has returned survive a power cut.
    fn sync(&self) -> io::Result<()>;

    /// Whether [`Store::sync`] returns without waiting for a device, so that a worker may call it.
    fn sync_is_instant(&self) -> bool;

    /// How an io_uring reaches it; `None` where everything is done inline.
    fn ring(&self) -> Option<RingTarget<'_>> {
        None
    }

    /// Copies from the medium to memory.
    ///
    /// # Safety
    /// `to` must be valid for writes of `len` bytes. Others may access those bytes at the same time.
    unsafe fn copy_out(&self, offset: u64, to: *mut u8, len: usize) -> io::Result<()>;

    /// Copies from memory to the medium. Other threads may rely on it after [`Store::settle`] only.
    ///
    /// # Safety
    /// `from` must be valid for reads of `len` bytes. Others may change those bytes at the same time.
    unsafe fn copy_in(&self, offset: u64, from: *const u8, len: usize) -> io::Result<()>;

    /// Orders what this thread copied in before whatever it tells others of.
    fn settle(&self) {}

    /// Announces a copy of `len` bytes at `offset`. True if the copy cannot fail, so that a caller may count on it and
    /// make it later, when the bytes have come closer.
    fn prepare_copy(&self, _offset: u64, _len: usize, _is_write: bool) -> bool {
        false
    }

    /// Whether part of the medium has vanished under its mapping since it was opened. What was copied from or to it since
    /// the answer was last `false` may be wrong. Costs one load.
    fn is_lost(&self) -> bool {
        false
    }

    /// Looks whether the medium still reaches as far as when it was opened: a file can be shortened by whoever may write it. Costs a
    /// system call where that can happen without [`Store::is_lost`]; a lane asks once a batch.
    fn look(&self) {}

    /// What lies behind this was lost, as far as [`Store::look`] has seen. It is neither read, for it would come back as zeroes, nor
    /// written, for that would lengthen the file again and hide the loss.
    fn intact(&self) -> u64 {
        self.size()
    }

    /// Bytes written or made zero since it was opened, without those of lanes (`copy_in` and rings), which count for
    /// themselves lest they share a counter.
    fn bytes_written(&self) -> u64;
}

/// Opens a medium of a pool.
pub(crate) fn open(medium: &MediumPath, kind: MediumKind, read_only: bool) -> Result<Arc<dyn Store>> {
    let file = file::open_existing(&medium.path, read_only)?;
    Ok(match kind {
        MediumKind::Nvram => Arc::new(NvramStore::new(file, medium.persistence)?),
        MediumKind::Ssd => Arc::new(SsdStore::new(file, medium.cache)?),
    })
}

/// Makes (or takes) a medium for a new pool.
pub(crate) fn create(spec: &MediumSpec, force: bool) -> Result<Arc<dyn Store>> {
    let file = match spec.size {
        Some(size) => file::create(&spec.path, size, spec.kind, force)?,
        None => file::open_existing(&spec.path, false)?,
    };
    Ok(match spec.kind {
        MediumKind::Nvram => Arc::new(NvramStore::new(file, spec.persistence)?),
        MediumKind::Ssd => Arc::new(SsdStore::new(file, spec.cache)?),
    })
}

/// Reads the first bytes of a medium without locking it, to learn what it is.
pub(crate) fn peek(path: &Path, buf: &mut [u8], offset: u64) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::open(path).map_err(|source| file::open_error(path, source))?;
    file.read_exact_at(buf, offset).map_err(|source| match source.kind() {
        io::ErrorKind::UnexpectedEof => Error::medium(path, "is too small to hold a pool"),
        _ => Error::io(format!("cannot read {}", path.display()), source),
    })
}

pub(crate) fn out_of_bounds() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "access past the end of the medium")
}

/// Whether `len` bytes from `offset` on lie below `size`.
pub(crate) fn within(offset: u64, len: u64, size: u64) -> bool {
    offset.checked_add(len).is_some_and(|end| end <= size)
}

/// Zeroed memory on a page boundary, as `O_DIRECT` wants it.
pub(crate) struct AlignedBuf {
    start: NonNull<u8>,
    layout: std::alloc::Layout,
}

impl AlignedBuf {
    pub(crate) const ALIGN: usize = 4096;

    /// At least one byte.
    pub(crate) fn zeroed(len: usize) -> Self {
        let layout = std::alloc::Layout::from_size_align(len.max(1), Self::ALIGN)
            .unwrap_or_else(|_| std::alloc::handle_alloc_error(std::alloc::Layout::new::<u8>()));
        // SAFETY: the layout has a size of at least one byte.
        let start = unsafe { std::alloc::alloc_zeroed(layout) };
        let start = NonNull::new(start).unwrap_or_else(|| std::alloc::handle_alloc_error(layout));
        Self { start, layout }
    }

    pub(crate) fn len(&self) -> usize {
        self.layout.size()
    }

    pub(crate) fn as_mut_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    pub(crate) fn as_slice(&self) -> &[u8] {
        // SAFETY: the allocation is `len` initialised bytes, owned by self, and only changed through &mut
        // self or through `as_mut_ptr` by a caller who holds no slice meanwhile.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len()) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as in `as_slice`, and &mut self excludes other slices.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len()) }
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with this very layout, freed once.
        unsafe { std::alloc::dealloc(self.start.as_ptr(), self.layout) };
    }
}

// SAFETY: it owns its memory like a Vec<u8>.
unsafe impl Send for AlignedBuf {}
// SAFETY: shared access only reads, except through the raw pointer, whose users answer for it.
unsafe impl Sync for AlignedBuf {}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuf({})", self.len())
    }
}
