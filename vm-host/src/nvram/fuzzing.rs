// SPDX-License-Identifier: Apache-2.0 OR MIT

//! For the fuzz targets: a medium in memory, whatever bytes it has.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::place::{Device, Extents, Place, Progress};
use super::store::{Store, out_of_bounds};
use super::table::{Entry, is_region_file};
use super::*;

/// Regions begin here, and their sizes are multiples of this.
pub const ALIGNMENT: u64 = 4096;
/// Where the copies of the registry lie.
pub const COPIES: [u64; 2] = registry::COPIES;
/// What they take, together.
pub const REGISTRY: u64 = REGISTRY_BYTES;

/// The bytes of a device, or of a directory's registry.
#[derive(Clone, Debug)]
pub struct Bytes(Arc<Mutex<Vec<u8>>>);

impl Bytes {
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Arc::new(Mutex::new(bytes)))
    }

    pub fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of them as a slot.
    pub fn slot(&self) -> Slot {
        let len = self.lock().len() as u64;
        Slot::new(Box::new(Part { bytes: self.clone(), start: 0, len }), len)
    }
}

#[derive(Debug)]
struct Part {
    bytes: Bytes,
    start: u64,
    len: u64,
}

impl Part {
    fn reach<T>(&self, offset: u64, len: usize, with: impl FnOnce(&mut [u8]) -> T) -> io::Result<T> {
        let end = offset.checked_add(len as u64).filter(|end| *end <= self.len).ok_or_else(out_of_bounds)?;
        let place = |at: u64| self.start.checked_add(at).and_then(|at| usize::try_from(at).ok());
        let (Some(from), Some(to)) = (place(offset), place(end)) else { return Err(out_of_bounds()) };
        self.bytes.lock().get_mut(from..to).map(with).ok_or_else(out_of_bounds)
    }
}

impl Store for Part {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.reach(offset, buf.len(), |bytes| buf.copy_from_slice(bytes))
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.reach(offset, bytes.len(), |own| own.copy_from_slice(bytes))
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

impl Device for Bytes {
    fn window(&self, offset: u64, len: u64) -> io::Result<Box<dyn Store>> {
        Ok(Box::new(Part { bytes: self.clone(), start: offset, len }))
    }

    fn flush(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }
}

/// A directory without files. What is taken away from it must be a region's.
#[derive(Debug)]
struct Nowhere;

impl Place for Nowhere {
    fn make(&self, _entry: &Entry, _progress: Progress<'_>) -> io::Result<()> {
        Ok(())
    }

    fn unmake(&self, entry: &Entry) -> io::Result<()> {
        let name = entry.file_name();
        assert!(is_region_file(&name), "{name} would be removed");
        Ok(())
    }

    fn check(&self, _entry: &Entry) -> io::Result<Option<String>> {
        Ok(None)
    }

    fn open(&self, _entry: &Entry) -> io::Result<Box<dyn Store>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn flush(&self, _entry: &Entry) -> io::Result<()> {
        Ok(())
    }

    fn free(&self) -> io::Result<Option<u64>> {
        Ok(Some(1 << 40))
    }
}

/// An open medium.
#[derive(Debug)]
pub struct Opened(Regions);

/// Which kind of medium the bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Directory,
    Device,
}

fn config() -> MediumConfig {
    MediumConfig::new("fuzz", "/fuzz")
}

/// Makes a registry without regions.
///
/// # Errors
/// Where the bytes are too few.
pub fn format(bytes: &Bytes, kind: Kind) -> Result<()> {
    let end = bytes.lock().len() as u64;
    let span = Span { start: REGISTRY_BYTES, end };
    let device = (kind == Kind::Device).then_some((end, span));
    let identity = Identity { name: config().name, medium: [7; 16], device };
    registry::format(&*window(bytes)?, Path::new("/fuzz"), &identity)
}

/// # Errors
/// Those of [`Nvram::open`].
pub fn open(bytes: &Bytes, kind: Kind) -> Result<Opened> {
    let config = config();
    let (size, place): (_, Box<dyn Place>) = match kind {
        Kind::Directory => (None, Box::new(Nowhere)),
        Kind::Device => (Some(bytes.lock().len() as u64), Box::new(Extents { device: bytes.clone() })),
    };
    let check = |identity: &Identity| check_identity(&config, size, ALIGNMENT, identity);
    Regions::open(&config.path, window(bytes)?, place, Limits::default(), check).map(Opened)
}

fn window(bytes: &Bytes) -> Result<Box<dyn Store>> {
    bytes.window(0, REGISTRY_BYTES).map_err(|source| Error::io("cannot open the registry", source))
}

impl Opened {
    /// As [`Nvram::list`].
    pub fn list(&self) -> Vec<Region> {
        self.0.ready().into_iter().map(region).collect()
    }

    /// As [`Nvram::allocate`].
    ///
    /// # Errors
    /// Those of that.
    pub fn allocate(&self, owner: &str, purpose: Purpose, bytes: u64) -> Result<Region> {
        self.0.allocate(owner, purpose, bytes, ALIGNMENT, &mut |_, _| Ok(())).map(region)
    }

    /// As [`Nvram::free`].
    ///
    /// # Errors
    /// Those of that.
    pub fn free(&self, id: RegionId) -> Result<()> {
        self.0.free(id)
    }
}

fn region(entry: Entry) -> Region {
    Region {
        path: PathBuf::from(entry.file_name()),
        id: entry.id,
        owner: entry.owner,
        purpose: entry.purpose,
        bytes: entry.bytes,
        alignment_bytes: entry.alignment,
        offset_bytes: entry.offset,
        is_pmem: false,
    }
}
