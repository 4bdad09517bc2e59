// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Regions of NV-RAM: where the memory of persistent VMs lies, and a slot for the saved state beside each.
//!
//! ```text
//!   Nvram ──► regions ──► table      (pure) which there are, where a new one goes, quotas
//!     │          ├──────► registry   what of that is durable; two copies on the medium
//!     │          └──────► place      files of a directory, or extents of a device
//!     ├──► probe ──► uffd            what a medium is and can do, found by trying
//!     └──► slot ───► store           one saved state, whole or recognised as torn
//! ```
//!
//! A medium is a *directory* (on a file system with DAX, tmpfs or hugetlbfs; each region is a file) or one *device*
//! (a DAX device, a block device or a plain file; each region is an extent). One daemon owns it, by a lock that ends
//! with the process.
//!
//! On a plain file with DAX each save and each change of the registry makes durable what all guests have stored to
//! it: a kernel knows no smaller unit than a file. A directory is the better choice there.
//!
//! On hugetlbfs, which has no write(2), the registry is a file like elsewhere, reached through a mapping. It takes a
//! huge page, but lives and dies with the memory that it tells of; a registry in another file system would outlive
//! its regions at each restart.
//!
//! Knows no VMM, no power and no clock, starts no thread, and never touches a byte of a guest's memory once the region is made.

mod cache;
mod error;
#[doc(hidden)]
pub mod fuzzing;
mod place;
mod probe;
mod regions;
mod registry;
mod slot;
mod store;
mod table;
#[cfg(test)]
mod testkit;
#[cfg(test)]
mod tests;
mod uffd;

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::mm::MapFlags;
use serde::{Deserialize, Serialize};

pub use error::{Error, Result};
use place::{Device, Directory, Extents, Fill, Place, RawDevice};
use probe::Target;
pub use probe::{Capabilities, FileSystem, FsKind, MediumKind, NvdimmRegion, PersistenceDomain, Verdict};
use regions::Regions;
pub use registry::MAX_NAME;
use registry::{Identity, REGISTRY_BYTES};
pub use slot::{MAX_METADATA, SLOT_HEADER_BYTES, SavedHeader, SavedState, Slot, SlotContent};
pub use store::Flush;
pub(crate) use store::is_zero;
use store::{FileStore, MappedStore, Mapping, Store};
use table::{Entry, Limits, Span};
pub use table::{MAX_OWNER, MAX_REGIONS, Purpose, RegionId};
pub use uffd::{Support, UserFaults};

const REGISTRY_FILE: &str = "vm-nvram.registry";
const NEW_REGISTRY_FILE: &str = "vm-nvram.registry.new";
const LOCK_FILE: &str = "vm-nvram.lock";

/// One medium, as the configuration names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MediumConfig {
    /// 1 to [`MAX_NAME`] letters, digits, `-`, `_` or `.`. Written on the medium: one of another name is refused.
    pub name: String,
    /// A directory, a plain file, a block device or a DAX device; which one is found out. Absolute.
    pub path: PathBuf,
    /// The operator vouches that the host's memory outlives the power: for media in memory.
    #[serde(default)]
    pub declared_persistent: bool,
    /// Bytes that stay free.
    #[serde(default)]
    pub reserve_bytes: u64,
    /// What each owner may have, unless `quota_bytes` says otherwise.
    #[serde(default)]
    pub default_quota_bytes: Option<u64>,
    /// What an owner may have, all its regions together.
    #[serde(default)]
    pub quota_bytes: BTreeMap<String, u64>,
}

impl MediumConfig {
    /// A medium without limits.
    pub fn new(name: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        Self {
            name: name.into(),
            path: path.into(),
            declared_persistent: false,
            reserve_bytes: 0,
            default_quota_bytes: None,
            quota_bytes: BTreeMap::new(),
        }
    }

    fn limits(&self) -> Limits {
        Limits {
            reserve: self.reserve_bytes,
            quotas: self.quota_bytes.clone(),
            default_quota: self.default_quota_bytes,
        }
    }

    fn check(&self) -> Result<()> {
        if self.name.len() > MAX_NAME || table::check_owner(&self.name).is_err() {
            return Err(Error::invalid(format!(
                "medium name {:?} is not 1 to {MAX_NAME} letters, digits, '-', '_' or '.'",
                self.name
            )));
        }
        if !self.path.is_absolute() {
            // A VMM may have another working directory.
            return Err(Error::invalid(format!("medium path {} is not absolute", self.path.display())));
        }
        Ok(())
    }
}

/// Tries what the medium can do, whether it is formatted or not. Its content stays as it is, and it need not be free.
///
/// # Errors
/// `NotFound`, `Medium`, `Io`. What the kernel refuses is in the answer.
pub fn probe(config: &MediumConfig) -> Result<Capabilities> {
    Target::open(&config.path)?.probe(config.declared_persistent)
}

/// An open medium. All methods may be called from any thread.
#[derive(Debug)]
pub struct Nvram {
    config: MediumConfig,
    capabilities: Capabilities,
    regions: Regions,
    /// Held as long as the medium is open.
    _lock: File,
}

/// A region, as it was when it was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Region {
    pub id: RegionId,
    /// The VM that has it.
    pub owner: String,
    pub purpose: Purpose,
    /// What was asked for, rounded up to the alignment.
    pub bytes: u64,
    pub alignment_bytes: u64,
    /// The region's file, or the device.
    pub path: PathBuf,
    /// The region's first byte in that.
    pub offset_bytes: u64,
    is_pmem: bool,
}

/// What QEMU's `memory-backend-file` has to be told, besides `share=on`.
///
/// `discard-data` must stay off, and `prealloc` is not needed: the pages are there already, and touching them all
/// only costs time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Backing {
    /// `mem-path`
    pub mem_path: PathBuf,
    /// `offset`: where it is not 0, QEMU 8.1 or later is needed.
    pub offset_bytes: u64,
    /// `size` at most.
    pub size_bytes: u64,
    /// `align`
    pub align_bytes: u64,
    /// `pmem`: maps with `MAP_SYNC` and writes back what QEMU itself stores. A QEMU without libpmem refuses it; as the region's
    /// extents are written, the guest's memory is as safe without.
    pub pmem: bool,
    /// `prealloc`
    pub prealloc: bool,
}

impl Region {
    /// How a VMM maps it.
    pub fn backing(&self) -> Backing {
        Backing {
            mem_path: self.path.clone(),
            offset_bytes: self.offset_bytes,
            size_bytes: self.bytes,
            align_bytes: self.alignment_bytes,
            pmem: self.is_pmem,
            prealloc: false,
        }
    }
}

/// How full a medium is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Bytes of all regions.
    pub used_bytes: u64,
    /// Bytes without a region. On a directory, what its file system has left.
    pub free_bytes: u64,
    /// What of it the reserve leaves to new regions. On a device it may be in pieces.
    pub available_bytes: u64,
}

impl Nvram {
    /// Makes the registry of a blank medium, and opens it. A directory may hold other files; a device must begin with zeroes.
    ///
    /// # Errors
    /// `Medium` where it holds something, `Locked`, `NotFound`, `Invalid`, `Io`.
    pub fn create(config: &MediumConfig) -> Result<Self> {
        config.check()?;
        let target = Target::open(&config.path)?;
        let lock = lock(&target)?;
        format_medium(&target, config)?;
        Self::open_locked(config, &target, lock)
    }

    /// Opens a medium that has a registry; finishes what an unclean end left half-done.
    ///
    /// # Errors
    /// `Unformatted`, `NewerVersion`, `Damaged`, `Medium`, with nothing changed; `Locked`, `NotFound`, `Invalid`, `Io`.
    pub fn open(config: &MediumConfig) -> Result<Self> {
        config.check()?;
        let target = Target::open(&config.path)?;
        let lock = lock(&target)?;
        Self::open_locked(config, &target, lock)
    }

    fn open_locked(config: &MediumConfig, target: &Target, lock: File) -> Result<Self> {
        let capabilities = target.probe(config.declared_persistent)?;
        let io_error = |source| Error::io(format!("cannot open {}", config.path.display()), source);
        let (store, place): (Box<dyn Store>, Box<dyn Place>) = match target.kind {
            MediumKind::Directory => {
                let directory = Directory {
                    path: config.path.clone(),
                    handle: target.file.try_clone().map_err(io_error)?,
                    fill: if capabilities.is_dax { Fill::Write } else { Fill::Allocate },
                    flush: capabilities.flush,
                    must_map: target.must_map(),
                };
                (open_registry_file(target, capabilities.flush)?, Box::new(directory))
            }
            _ => {
                let device = raw_device(target, capabilities.flush).map_err(io_error)?;
                let store = device.window(0, data_start(target)).map_err(io_error)?;
                (store, Box::new(Extents { device }))
            }
        };
        let check = |identity: &Identity| check_identity(config, target.size, target.alignment(), identity);
        let regions = Regions::open(&config.path, store, place, config.limits(), check)?;
        Ok(Self { config: config.clone(), capabilities, regions, _lock: lock })
    }

    /// The medium's name in the configuration.
    pub fn name(&self) -> &str {
        &self.config.name
    }

    /// Random bytes that were drawn when it was formatted: a medium in memory gets others after each restart.
    pub fn id(&self) -> [u8; 16] {
        self.regions.medium()
    }

    /// What it can do, tried when it was opened.
    pub fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// Makes a region of zeroes. `bytes` are rounded up to the medium's alignment. Takes as long as writing them,
    /// where the medium needs that; `progress` is told (done, total) in bytes and ends it with an error. A power cut leaves all of it or
    /// nothing.
    ///
    /// # Errors
    /// `Invalid` (a bad owner or size, or it has such a region already), `OverQuota`, `NoSpace`, `Io`.
    pub fn allocate(
        &self,
        owner: &str,
        purpose: Purpose,
        bytes: u64,
        mut progress: impl FnMut(u64, u64) -> io::Result<()>,
    ) -> Result<Region> {
        let alignment = self.capabilities.alignment_bytes;
        self.regions.allocate(owner, purpose, bytes, alignment, &mut progress).map(|entry| self.region(entry))
    }

    /// Gives a region back; nobody may have it mapped. Once it is begun, a power cut only delays it to the next opening.
    ///
    /// # Errors
    /// `NotFound`, `Io`.
    pub fn free(&self, id: RegionId) -> Result<()> {
        self.regions.free(id)
    }

    /// All regions, by ascending id.
    pub fn list(&self) -> Vec<Region> {
        self.regions.ready().into_iter().map(|entry| self.region(entry)).collect()
    }

    /// # Errors
    /// `NotFound`.
    pub fn get(&self, id: RegionId) -> Result<Region> {
        self.regions.get(id).map(|entry| self.region(entry))
    }

    /// The region that an owner has for a purpose.
    pub fn find(&self, owner: &str, purpose: Purpose) -> Option<Region> {
        let mut all = self.regions.ready().into_iter();
        all.find(|entry| entry.owner == owner && entry.purpose == purpose).map(|entry| self.region(entry))
    }

    /// What is wrong with a region: its file is missing, or has another length. To be asked before a guest is given it.
    ///
    /// # Errors
    /// `NotFound`, `Io`.
    pub fn fault(&self, id: RegionId) -> Result<Option<String>> {
        self.regions.fault(&self.regions.get(id)?)
    }

    /// Files of the directory that look like regions and are none, by name. They are left alone.
    ///
    /// # Errors
    /// `Io`.
    pub fn strangers(&self) -> Result<Vec<String>> {
        if self.capabilities.kind != MediumKind::Directory {
            return Ok(Vec::new());
        }
        let mut found = place::region_files(&self.config.path)
            .map_err(|source| Error::io(format!("cannot list {}", self.config.path.display()), source))?;
        let known: Vec<String> = self.regions.ready().iter().map(Entry::file_name).collect();
        found.retain(|name| !known.contains(name));
        Ok(found)
    }

    /// How full it is.
    ///
    /// # Errors
    /// `Io`.
    pub fn usage(&self) -> Result<Usage> {
        let used_bytes = self.regions.ready().iter().map(|entry| entry.bytes).sum();
        let (free_bytes, available_bytes) = self.regions.free_bytes()?;
        Ok(Usage { used_bytes, free_bytes, available_bytes })
    }

    /// Returns when all that was stored to a region, by whatever processor, is durable. The cost is that of
    /// [`Capabilities::flush`]; nobody else is kept waiting by it.
    ///
    /// # Errors
    /// `NotFound`, `Io`.
    pub fn flush(&self, id: RegionId) -> Result<()> {
        if self.capabilities.flush == Flush::Nothing {
            return self.regions.get(id).map(drop);
        }
        self.regions.flush(id)
    }

    /// The slot in a region for state. To be opened before the time in which it is needed: that takes longer than saving.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` where the region is for memory; `Damaged` where its file is not what it should be; `Io`.
    pub fn slot(&self, id: RegionId) -> Result<Slot> {
        let (entry, store) = self.regions.open_store(id)?;
        if entry.purpose != Purpose::State {
            return Err(Error::invalid(format!("{id} is for {}, not for saved state", entry.purpose)));
        }
        Ok(Slot::new(store, entry.bytes))
    }

    fn region(&self, entry: Entry) -> Region {
        let path = match self.capabilities.kind {
            MediumKind::Directory => self.config.path.join(entry.file_name()),
            _ => self.config.path.clone(),
        };
        Region {
            id: entry.id,
            owner: entry.owner,
            purpose: entry.purpose,
            bytes: entry.bytes,
            alignment_bytes: entry.alignment,
            path,
            offset_bytes: entry.offset,
            is_pmem: self.capabilities.is_dax && self.capabilities.map_sync.is_yes(),
        }
    }
}

/// Locks a medium against every other open file description, in this process too; it ends with the last copy of the
/// descriptor, and so with the process, however that ends.
fn lock(target: &Target) -> Result<File> {
    let path = &target.path;
    let io_error = |source| Error::io(format!("cannot lock {}", path.display()), source);
    let file = match target.kind {
        // A directory cannot be opened for writing, as a lock demands.
        MediumKind::Directory => OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path.join(LOCK_FILE))
            .map_err(io_error)?,
        _ => target.file.try_clone().map_err(io_error)?,
    };
    // SAFETY: flock is plain data; all-zero is a valid value (the whole file, l_pid 0 as OFD locks demand).
    let mut wanted: libc::flock = unsafe { std::mem::zeroed() };
    // The constants are small; the field is an i16.
    #[allow(clippy::cast_possible_truncation)]
    {
        wanted.l_type = libc::F_WRLCK as libc::c_short;
        wanted.l_whence = libc::SEEK_SET as libc::c_short;
    }
    // SAFETY: F_OFD_SETLK reads the structure the pointer names, which lives on this frame.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const wanted) } == 0 {
        return Ok(file);
    }
    match io::Error::last_os_error() {
        error if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            Err(Error::Locked { path: path.clone() })
        }
        error => Err(io_error(error)),
    }
}

fn data_start(target: &Target) -> u64 {
    REGISTRY_BYTES.next_multiple_of(target.alignment())
}

fn raw_device(target: &Target, flush: Flush) -> io::Result<RawDevice> {
    Ok(RawDevice { file: Arc::new(target.file.try_clone()?), flush, must_map: target.must_map() })
}

/// The registry's file, of one huge page on hugetlbfs.
fn registry_store(target: &Target, file: File, flush: Flush) -> io::Result<Box<dyn Store>> {
    if !target.must_map() {
        return Ok(Box::new(FileStore::new(Arc::new(file), 0, REGISTRY_BYTES)));
    }
    let bytes = data_start(target);
    if file.metadata()?.len() < bytes {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Box::new(MappedStore::new(Mapping::new(&file, 0, bytes, MapFlags::empty())?, flush)))
}

fn open_registry_file(target: &Target, flush: Flush) -> Result<Box<dyn Store>> {
    let path = target.path.join(REGISTRY_FILE);
    let io_error = |source| Error::io(format!("cannot open {}", path.display()), source);
    let file = match OpenOptions::new().read(true).write(true).open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            refuse_orphans(target)?;
            return Err(Error::Unformatted { path: target.path.clone() });
        }
        Err(error) => return Err(io_error(error)),
    };
    if file.metadata().map_err(io_error)?.len() < REGISTRY_BYTES {
        return Err(Error::damaged(&target.path, format!("{REGISTRY_FILE} was truncated")));
    }
    registry_store(target, file, flush).map_err(io_error)
}

/// A directory with regions and without a registry has lost it: to make a new one would be to lose them.
fn refuse_orphans(target: &Target) -> Result<()> {
    let found = place::region_files(&target.path)
        .map_err(|source| Error::io(format!("cannot list {}", target.path.display()), source))?;
    match found.first() {
        None => Ok(()),
        Some(name) => Err(Error::damaged(
            &target.path,
            format!("it holds {} regions ({name}, for one) and no registry", found.len()),
        )),
    }
}

/// Whether it is the configuration's medium, and still what it was formatted as. Of a directory, there is no `size`.
fn check_identity(
    config: &MediumConfig,
    size: Option<u64>,
    alignment: u64,
    identity: &Identity,
) -> Result<()> {
    if identity.name != config.name {
        let what = format!("is named {:?}, the configuration says {:?}", identity.name, config.name);
        return Err(Error::medium(&config.path, what));
    }
    match (identity.device, size) {
        (None, None) => Ok(()),
        (Some((bytes, span)), Some(size)) => {
            if size < bytes {
                return Err(Error::medium(
                    &config.path,
                    format!("has {size} bytes, it was formatted with {bytes}"),
                ));
            }
            if !span.start.is_multiple_of(alignment) {
                let what = format!("was formatted for another alignment than {alignment}");
                return Err(Error::medium(&config.path, what));
            }
            Ok(())
        }
        (Some(_), None) => {
            Err(Error::medium(&config.path, "holds the registry of a device, but is a directory"))
        }
        (None, Some(_)) => Err(Error::medium(&config.path, "holds the registry of a directory, but is none")),
    }
}

fn format_medium(target: &Target, config: &MediumConfig) -> Result<()> {
    let io_error = |source| Error::io(format!("cannot format {}", target.path.display()), source);
    let mut medium = [0; 16];
    File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut medium)).map_err(io_error)?;
    let mut identity = Identity { name: config.name.clone(), medium, device: None };
    let Some(size) = target.size else {
        return format_directory(target, &identity);
    };
    let start = data_start(target);
    let end = size - size % target.alignment();
    if end <= start {
        let needed = start + target.alignment();
        return Err(Error::medium(&target.path, format!("has {size} bytes, at least {needed} are needed")));
    }
    identity.device = Some((end, Span { start, end }));
    // What flushes a mapped device is not yet known; write-back does no harm where it is not needed.
    let flush = if cache::can_write_back() { Flush::CacheLines } else { Flush::Nothing };
    let store = raw_device(target, flush).and_then(|device| device.window(0, start)).map_err(io_error)?;
    if !registry::is_blank(&*store, &target.path)? {
        return Err(Error::medium(
            &target.path,
            format!("is not blank: its first {REGISTRY_BYTES} bytes must be zero"),
        ));
    }
    registry::format(&*store, &target.path, &identity)
}

/// Under another name first, so that an interrupted formatting leaves no registry.
fn format_directory(target: &Target, identity: &Identity) -> Result<()> {
    let io_error = |source| Error::io(format!("cannot format {}", target.path.display()), source);
    let path = |name: &str| -> PathBuf { Path::new(&target.path).join(name) };
    if path(REGISTRY_FILE).try_exists().map_err(io_error)? {
        return Err(Error::medium(&target.path, format!("is not blank: {REGISTRY_FILE} exists")));
    }
    refuse_orphans(target)?;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path(NEW_REGISTRY_FILE))
        .map_err(io_error)?;
    let bytes = if target.must_map() { data_start(target) } else { REGISTRY_BYTES };
    // Written: a commit must neither run out of space nor change metadata.
    let fill = if target.must_map() { Fill::Allocate } else { Fill::Write };
    file.set_len(bytes)
        .and_then(|()| place::fill(&file, bytes, fill, &mut |_, _| Ok(())))
        .map_err(io_error)?;
    let store =
        file.try_clone().and_then(|file| registry_store(target, file, Flush::Nothing)).map_err(io_error)?;
    registry::format(&*store, &target.path, identity)?;
    file.sync_all()
        .and_then(|()| std::fs::rename(path(NEW_REGISTRY_FILE), path(REGISTRY_FILE)))
        .and_then(|()| target.file.sync_all())
        .map_err(io_error)
}
