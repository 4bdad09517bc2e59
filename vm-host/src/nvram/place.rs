// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Where regions lie: files of a directory, or extents of a device. Makes their bytes and takes them away; which regions
//! there are it does not know.
//!
//! A new region reads as zeroes before anybody can be given it: a file is new, an extent is overwritten. So no owner ever
//! sees another's memory. An extent that was freed keeps its bytes until it is used again.

use std::fmt::Debug;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use rustix::mm::MapFlags;

use super::store::{FileStore, Flush, MappedStore, Mapping, Store};
use super::table::Entry;

/// Told how many bytes of how many are done.
pub(super) type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> io::Result<()>;

/// What is written at once when a region is filled with zeroes.
const CHUNK: usize = 4 << 20;
/// What is allocated at once, so that progress can be told.
const STEP: u64 = 256 << 20;

pub(super) trait Place: Debug + Send + Sync {
    /// Returns when the region's bytes are there, zero and durable. After an error some of it may be there.
    fn make(&self, entry: &Entry, progress: Progress<'_>) -> io::Result<()>;

    /// Returns when the region's bytes are gone, durably. Not an error where they were gone already.
    fn unmake(&self, entry: &Entry) -> io::Result<()>;

    /// What is wrong with a region that should be there.
    fn check(&self, entry: &Entry) -> io::Result<Option<String>>;

    /// The region's own bytes.
    fn open(&self, entry: &Entry) -> io::Result<Box<dyn Store>>;

    /// Makes durable what others stored to it through mappings.
    fn flush(&self, entry: &Entry) -> io::Result<()>;

    /// Bytes that are left for regions; `None` where the registry itself knows.
    fn free(&self) -> io::Result<Option<u64>>;
}

/// How the bytes of a new file are taken from its file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fill {
    /// Allocated: a page that could not be had later would end the guest with SIGBUS.
    Allocate,
    /// Allocated and written: on DAX, the first store to an unwritten extent would change the file system's metadata, which an
    /// unclean end can lose together with the page.
    Write,
}

/// Each region is a file.
#[derive(Debug)]
pub(super) struct Directory {
    pub(super) path: PathBuf,
    pub(super) handle: File,
    pub(super) fill: Fill,
    pub(super) flush: Flush,
    /// hugetlbfs has no write(2).
    pub(super) must_map: bool,
}

impl Directory {
    pub(super) fn path_of(&self, entry: &Entry) -> PathBuf {
        self.path.join(entry.file_name())
    }

    fn open_file(&self, entry: &Entry) -> io::Result<File> {
        OpenOptions::new().read(true).write(true).open(self.path_of(entry))
    }
}

/// Allocates the whole file, and writes it where that is asked for or allocating is not supported.
pub(super) fn fill(file: &File, bytes: u64, how: Fill, progress: Progress<'_>) -> io::Result<()> {
    let mut done = 0;
    let mut write = how == Fill::Write;
    while done < bytes {
        let step = STEP.min(bytes - done);
        match fallocate(file, FallocateFlags::empty(), done, step) {
            Ok(()) => done += step,
            Err(Errno::INTR) => {}
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                write = true;
                break;
            }
            Err(source) => return Err(source.into()),
        }
        if !write {
            progress(done, bytes)?;
        }
    }
    if write {
        let file = file.try_clone()?;
        zero(&FileStore::new(Arc::new(file), 0, bytes), bytes, progress)?;
    }
    Ok(())
}

fn zero(store: &dyn Store, bytes: u64, progress: Progress<'_>) -> io::Result<()> {
    let zeroes = vec![0; usize::try_from(bytes).unwrap_or(CHUNK).min(CHUNK)];
    let mut done = 0;
    while done < bytes {
        let left = usize::try_from(bytes - done).unwrap_or(CHUNK).min(zeroes.len());
        store.write_at(done, &zeroes[..left])?;
        done += left as u64;
        progress(done, bytes)?;
    }
    Ok(())
}

impl Place for Directory {
    fn make(&self, entry: &Entry, progress: Progress<'_>) -> io::Result<()> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(self.path_of(entry))?;
        file.set_len(entry.bytes)?;
        fill(&file, entry.bytes, self.fill, progress)?;
        file.sync_all()?;
        self.handle.sync_all()
    }

    fn unmake(&self, entry: &Entry) -> io::Result<()> {
        match std::fs::remove_file(self.path_of(entry)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => self.handle.sync_all(),
        }
    }

    fn check(&self, entry: &Entry) -> io::Result<Option<String>> {
        match std::fs::symlink_metadata(self.path_of(entry)) {
            Ok(found) if !found.is_file() => Ok(Some("it is no file".to_owned())),
            Ok(found) if found.len() != entry.bytes => {
                Ok(Some(format!("its file has {} bytes instead of {}", found.len(), entry.bytes)))
            }
            Ok(_) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Ok(Some("its file does not exist".to_owned()))
            }
            Err(error) => Err(error),
        }
    }

    fn open(&self, entry: &Entry) -> io::Result<Box<dyn Store>> {
        let file = self.open_file(entry)?;
        if self.must_map {
            let mapping = Mapping::new(&file, 0, entry.bytes, MapFlags::empty())?;
            return Ok(Box::new(MappedStore::new(mapping, self.flush)));
        }
        Ok(Box::new(FileStore::new(Arc::new(file), 0, entry.bytes)))
    }

    fn flush(&self, entry: &Entry) -> io::Result<()> {
        match self.flush {
            Flush::Nothing => Ok(()),
            Flush::Sync => self.open_file(entry)?.sync_data(),
            how @ (Flush::CacheLines | Flush::Impossible) => {
                Mapping::new(&self.open_file(entry)?, 0, entry.bytes, MapFlags::empty())?.flush(how)
            }
        }
    }

    fn free(&self) -> io::Result<Option<u64>> {
        free_bytes(&self.handle).map(Some)
    }
}

/// What an unprivileged user may still allocate on the file system of an open file.
fn free_bytes(file: &File) -> io::Result<u64> {
    let found = rustix::fs::fstatfs(file)?;
    let unit = u64::try_from(found.f_bsize).unwrap_or(0);
    let is_hugetlbfs = super::probe::FileSystem::of(file)?.kind == super::probe::FsKind::Hugetlbfs;
    if !is_hugetlbfs {
        return Ok(found.f_bavail.saturating_mul(unit));
    }
    // The pool of huge pages is shared by all mounts; one that was mounted without a limit reports no blocks at all.
    let pages = |what: &str| {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-{}kB/{what}", unit >> 10);
        std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u64>().ok()).unwrap_or(0)
    };
    let free = pages("free_hugepages").saturating_sub(pages("resv_hugepages"));
    let free = if found.f_blocks > 0 { free.min(found.f_bavail) } else { free };
    Ok(free.saturating_mul(unit))
}

/// A device or file whose parts are reached alone.
pub(super) trait Device: Debug + Send + Sync {
    /// `offset` and `len` in multiples of the medium's alignment.
    fn window(&self, offset: u64, len: u64) -> io::Result<Box<dyn Store>>;

    /// As [`Place::flush`].
    fn flush(&self, offset: u64, len: u64) -> io::Result<()>;
}

/// A device or a file with regions at offsets.
#[derive(Debug)]
pub(super) struct RawDevice {
    pub(super) file: Arc<File>,
    pub(super) flush: Flush,
    /// A DAX device has neither read(2) nor write(2).
    pub(super) must_map: bool,
}

impl Device for RawDevice {
    fn window(&self, offset: u64, len: u64) -> io::Result<Box<dyn Store>> {
        if self.must_map {
            let mapping = Mapping::new(&self.file, offset, len, MapFlags::empty())?;
            return Ok(Box::new(MappedStore::new(mapping, self.flush)));
        }
        Ok(Box::new(FileStore::new(Arc::clone(&self.file), offset, len)))
    }

    fn flush(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.flush == Flush::Nothing {
            return Ok(());
        }
        Mapping::new(&self.file, offset, len, MapFlags::empty())?.flush(self.flush)
    }
}

/// Each region is an extent of a device.
#[derive(Debug)]
pub(super) struct Extents<D> {
    pub(super) device: D,
}

impl<D: Device> Place for Extents<D> {
    fn make(&self, entry: &Entry, progress: Progress<'_>) -> io::Result<()> {
        let store = self.open(entry)?;
        zero(&*store, entry.bytes, progress)?;
        store.sync()
    }

    fn unmake(&self, _entry: &Entry) -> io::Result<()> {
        Ok(())
    }

    fn check(&self, _entry: &Entry) -> io::Result<Option<String>> {
        Ok(None)
    }

    fn open(&self, entry: &Entry) -> io::Result<Box<dyn Store>> {
        self.device.window(entry.offset, entry.bytes)
    }

    fn flush(&self, entry: &Entry) -> io::Result<()> {
        self.device.flush(entry.offset, entry.bytes)
    }

    fn free(&self) -> io::Result<Option<u64>> {
        Ok(None)
    }
}

/// Files of a directory that only a region can be called, by name.
pub(super) fn region_files(directory: &Path) -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    for file in std::fs::read_dir(directory)? {
        if let Ok(name) = file?.file_name().into_string()
            && super::table::is_region_file(&name)
        {
            found.push(name);
        }
    }
    found.sort_unstable();
    Ok(found)
}
