// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Bytes that outlive the power: what the registry and the slots are written through.
//!
//! Two ways to reach them: by system calls, where the kernel knows what it has to write back, and by a mapping, for
//! hugetlbfs, which has no write(2), and for DAX devices, which have neither. Knows nothing of what the bytes mean.

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use rustix::mm::{MapFlags, MsyncFlags, ProtFlags, mmap, msync, munmap};
use serde::Serialize;

use super::cache;

/// A stretch of a medium. Offsets count from its beginning.
pub(super) trait Store: Debug + Send + Sync {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;

    /// Until [`Store::sync`] each write may have arrived or not, whole or in part, whatever became of the others.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Returns when all that was written before is durable.
    fn sync(&self) -> io::Result<()>;
}

/// How stores of a processor become durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Flush {
    /// They are once they are visible: the power domain includes the caches, or the memory itself is said to be kept.
    Nothing,
    /// The kernel writes back what has been written to since the last time: fsync(2) or msync(2). It costs in
    /// proportion to that, and the next store to each page faults once more.
    Sync,
    /// Each cache line of the region is written back: costs in proportion to the region's size, tens of GiB a second.
    CacheLines,
    /// There is no way: a DAX device on a processor that has no instruction for it.
    Impossible,
}

pub(super) fn out_of_bounds() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "outside of the medium")
}

fn check(len: u64, offset: u64, n: usize) -> io::Result<()> {
    match offset.checked_add(n as u64) {
        Some(end) if end <= len => Ok(()),
        _ => Err(out_of_bounds()),
    }
}

/// Whether all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    const ZEROES: [u8; 4096] = [0; 4096];
    bytes.chunks(ZEROES.len()).all(|part| *part == ZEROES[..part.len()])
}

/// A stretch of a file or device, reached by pread(2) and pwrite(2).
#[derive(Debug)]
pub(super) struct FileStore {
    file: Arc<File>,
    start: u64,
    len: u64,
}

impl FileStore {
    pub(super) fn new(file: Arc<File>, start: u64, len: u64) -> Self {
        Self { file, start, len }
    }
}

impl Store for FileStore {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        check(self.len, offset, buf.len())?;
        self.file.read_exact_at(buf, self.start + offset)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        check(self.len, offset, bytes.len())?;
        self.file.write_all_at(bytes, self.start + offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}

/// A shared mapping, unmapped when dropped.
#[derive(Debug)]
pub(super) struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: plain memory, only accessed through raw pointers within its bounds and unmapped by Drop, when nobody has it any more.
unsafe impl Send for Mapping {}
// SAFETY: as above; `write` takes no exclusive reference, but races only make bytes indeterminate, never references.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// `offset` and `len` in whole pages of the file. `extra` flags are for `MAP_SYNC`.
    pub(super) fn new(file: &File, offset: u64, len: u64, extra: MapFlags) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(|_| out_of_bounds())?;
        let flags = if extra.is_empty() { MapFlags::SHARED } else { MapFlags::SHARED_VALIDATE | extra };
        // SAFETY: a new mapping at an address of the kernel's choice disturbs no other memory.
        let start =
            unsafe { mmap(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags, file, offset) }?;
        let start = NonNull::new(start.cast()).ok_or_else(out_of_bounds)?;
        Ok(Self { start, len })
    }

    pub(super) fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    fn at(&self, offset: u64, n: usize) -> io::Result<*mut u8> {
        check(self.len as u64, offset, n)?;
        let offset = usize::try_from(offset).map_err(|_| out_of_bounds())?;
        // SAFETY: just checked to lie within the mapping.
        Ok(unsafe { self.start.as_ptr().add(offset) })
    }

    /// Makes durable what anybody stored to it.
    pub(super) fn flush(&self, how: Flush) -> io::Result<()> {
        match how {
            Flush::Nothing => Ok(()),
            // SAFETY: msync changes no byte; the range is the mapping's own.
            Flush::Sync => Ok(unsafe { msync(self.start.as_ptr().cast(), self.len, MsyncFlags::SYNC) }?),
            Flush::CacheLines => {
                cache::write_back(self.start.as_ptr(), self.len);
                Ok(())
            }
            Flush::Impossible => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: start and len are those of the successful mmap; nothing uses it any more.
        if let Err(error) = unsafe { munmap(self.start.as_ptr().cast(), self.len) } {
            tracing::error!(%error, "cannot unmap NV-RAM");
        }
    }
}

/// A mapped stretch.
#[derive(Debug)]
pub(super) struct MappedStore {
    mapping: Mapping,
    flush: Flush,
}

impl MappedStore {
    pub(super) fn new(mapping: Mapping, flush: Flush) -> Self {
        Self { mapping, flush }
    }
}

impl Store for MappedStore {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let from = self.mapping.at(offset, buf.len())?;
        // SAFETY: `at` checked the bounds; `buf` is exclusively ours, so they do not overlap.
        unsafe { ptr::copy_nonoverlapping(from, buf.as_mut_ptr(), buf.len()) };
        Ok(())
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let to = self.mapping.at(offset, bytes.len())?;
        // SAFETY: as in `read_at`; bytes of the mapping are never behind references.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
        match self.flush {
            // Of a large slot only what was written: [`Mapping::flush`] would go through all of it.
            Flush::CacheLines => cache::write_back(to, bytes.len()),
            Flush::Impossible => return Err(io::ErrorKind::Unsupported.into()),
            Flush::Nothing | Flush::Sync => {}
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        match self.flush {
            // `write_at` has done it.
            Flush::Nothing | Flush::CacheLines => Ok(()),
            how @ (Flush::Sync | Flush::Impossible) => self.mapping.flush(how),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Arc<File> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(16384).unwrap();
        Arc::new(file)
    }

    #[test]
    fn both_ways_reach_the_same_bytes() {
        let file = example();
        let by_calls = FileStore::new(Arc::clone(&file), 4096, 8192);
        let mapping = Mapping::new(&file, 4096, 8192, MapFlags::empty()).unwrap();
        let mapped = MappedStore::new(mapping, Flush::Sync);
        by_calls.write_at(10, b"calls").unwrap();
        mapped.write_at(8192 - 6, b"mapped").unwrap();
        by_calls.sync().unwrap();
        mapped.sync().unwrap();

        let mut buf = [0; 5];
        mapped.read_at(10, &mut buf).unwrap();
        assert_eq!(&buf, b"calls");
        let mut buf = [0; 6];
        by_calls.read_at(8192 - 6, &mut buf).unwrap();
        assert_eq!(&buf, b"mapped");
    }

    #[test]
    fn accesses_past_the_end_are_refused() {
        let file = example();
        let mapping = Mapping::new(&file, 0, 4096, MapFlags::empty()).unwrap();
        let stores: [Box<dyn Store>; 2] = [
            Box::new(FileStore::new(Arc::clone(&file), 0, 4096)),
            Box::new(MappedStore::new(mapping, Flush::Nothing)),
        ];
        for store in stores {
            for offset in [4090, 4096, u64::MAX - 1] {
                assert!(store.write_at(offset, &[1; 7]).is_err(), "write at {offset}");
                assert!(store.read_at(offset, &mut [0; 7]).is_err(), "read at {offset}");
            }
        }
    }
}
