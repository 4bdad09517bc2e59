// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a medium is and what can be done with it: found by trying, not by assuming.
//!
//! Three questions: do its bytes outlive the power ([`Capabilities::verdict`]), how do a processor's stores get there
//! ([`Flush`]), and what can the kernel tell about accesses to it ([`UserFaults`]).

use std::fmt;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FallocateFlags, StatxAttributes, StatxFlags, fallocate, fstatfs, statx};
use rustix::mm::MapFlags;
use serde::Serialize;

use super::cache;
use super::error::{Error, Result};
use super::store::{Flush, Mapping};
use super::uffd::{self, Support, UserFaults};

/// Guests map their memory in pages of that size where they can.
const ALIGNMENT: u64 = 2 << 20;
const PROBE_FILE: &str = "vm-nvram.probe";

/// What the path names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MediumKind {
    /// Regions are files in it.
    Directory,
    /// A plain file; regions are extents of it.
    File,
    BlockDevice,
    /// A character device of the `dax` class: mapped only.
    DaxDevice,
}

/// A file system, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FsKind {
    Tmpfs,
    Ramfs,
    Hugetlbfs,
    /// ext2, ext3 or ext4.
    Ext,
    Xfs,
    Overlay,
    Other,
}

/// What statfs(2) says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct FileSystem {
    pub kind: FsKind,
    /// The number that the kernel knows it by.
    pub magic: u64,
    /// Of hugetlbfs its page size.
    pub block_bytes: u64,
}

impl FileSystem {
    pub(super) fn of(file: &File) -> std::io::Result<Self> {
        let found = fstatfs(file)?;
        // The field's type differs between architectures; the numbers fit in 32 bits on all.
        #[allow(clippy::cast_sign_loss, clippy::unnecessary_cast)]
        let magic = found.f_type as u64 & 0xffff_ffff;
        let kind = match magic {
            0x0102_1994 => FsKind::Tmpfs,
            0x8584_58f6 => FsKind::Ramfs,
            0x9584_58f6 => FsKind::Hugetlbfs,
            0xef53 => FsKind::Ext,
            0x5846_5342 => FsKind::Xfs,
            0x794c_7630 => FsKind::Overlay,
            _ => FsKind::Other,
        };
        Ok(Self { kind, magic, block_bytes: u64::try_from(found.f_bsize).unwrap_or(0) })
    }

    fn is_memory(self) -> bool {
        matches!(self.kind, FsKind::Tmpfs | FsKind::Ramfs | FsKind::Hugetlbfs)
    }
}

impl fmt::Display for FileSystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            FsKind::Tmpfs => f.write_str("tmpfs"),
            FsKind::Ramfs => f.write_str("ramfs"),
            FsKind::Hugetlbfs => f.write_str("hugetlbfs"),
            FsKind::Ext => f.write_str("ext4"),
            FsKind::Xfs => f.write_str("xfs"),
            FsKind::Overlay => f.write_str("overlayfs"),
            FsKind::Other => write!(f, "file system {:#x}", self.magic),
        }
    }
}

/// What is still saved when the power goes, of an NVDIMM region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PersistenceDomain {
    /// The processors' caches, too.
    CpuCache,
    /// What has reached the memory controller.
    MemoryController,
    /// The kernel does not say: taken for `MemoryController`.
    Unknown,
}

/// The NVDIMM region below a medium.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NvdimmRegion {
    /// As in /sys/bus/nd/devices.
    pub name: String,
    pub domain: PersistenceDomain,
    /// Memory that does not outlive the power, in the clothes of a region.
    pub is_volatile: bool,
}

/// What a medium can do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Capabilities {
    pub kind: MediumKind,
    /// Of a directory or file.
    pub file_system: Option<FileSystem>,
    /// Of a file or device.
    pub size_bytes: Option<u64>,
    /// What each region begins at and is a multiple of.
    pub alignment_bytes: u64,
    /// Loads and stores reach the medium itself, with no page cache between.
    pub is_dax: bool,
    /// A mapping made so keeps the file system's metadata durable with each fault.
    pub map_sync: Support,
    pub user_faults: UserFaults,
    pub nvdimm: Option<NvdimmRegion>,
    /// By its nature; what the operator declares is not in it.
    pub survives_reboot: bool,
    /// The operator says that its memory is battery-backed.
    pub declared_persistent: bool,
    pub flush: Flush,
}

/// Whether persistent virtual machines may live on a medium.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "verdict")]
pub enum Verdict {
    /// They may. The notes are for the operator.
    Keeps { notes: Vec<String> },
    /// Their memory would not be there after a power cut.
    Loses { why: String, advice: String },
}

impl Verdict {
    pub fn keeps(&self) -> bool {
        matches!(self, Self::Keeps { .. })
    }
}

impl Capabilities {
    /// The domain of the region below, `Unknown` without one.
    pub fn persistence_domain(&self) -> PersistenceDomain {
        self.nvdimm.as_ref().map_or(PersistenceDomain::Unknown, |region| region.domain)
    }

    fn what(&self) -> String {
        match (&self.kind, &self.file_system) {
            (MediumKind::BlockDevice, _) => "a block device".to_owned(),
            (MediumKind::DaxDevice, _) => "a DAX device".to_owned(),
            (_, Some(fs)) if fs.is_memory() || self.is_dax => fs.to_string(),
            (_, Some(fs)) => format!("{fs} without DAX"),
            (_, None) => "a file".to_owned(),
        }
    }

    /// Whether what guests store here is there after a power cut, and if not, why and what to do about it.
    pub fn verdict(&self) -> Verdict {
        const DECLARE: &str =
            "set declared_persistent if the host's memory is battery-backed and survives its restart";
        let what = self.what();
        if self.flush == Flush::Impossible {
            return Verdict::Loses {
                why: format!("{what}: this processor has no instruction that writes back its caches"),
                advice: "use a file system with DAX on the device".to_owned(),
            };
        }
        let mut notes = Vec::new();
        if !self.survives_reboot {
            if !self.declared_persistent {
                return Verdict::Loses {
                    why: match &self.nvdimm {
                        Some(region) if region.is_volatile => format!("{what} on volatile {}", region.name),
                        _ => format!("{what}: its pages are in the host's memory, and gone after a restart"),
                    },
                    advice: match self.kind {
                        MediumKind::BlockDevice => {
                            "make a file system on the pmem device and mount it with -o dax=always, or use its devdax mode"
                                .to_owned()
                        }
                        _ if self.file_system.is_some_and(FileSystem::is_memory) => DECLARE.to_owned(),
                        _ => format!("mount with -o dax=always on a pmem device, or {DECLARE}"),
                    },
                };
            }
            notes.push(format!("{what}, which the configuration declares to outlive the power"));
        }
        match self.flush {
            Flush::Sync if self.is_dax => notes.push(format!(
                "stores in the processors' caches are lost unless flushed (persistence domain {:?}): a flush costs in proportion to \
                 what was written since the last one",
                self.persistence_domain()
            )),
            Flush::Sync => notes.push("only what was flushed outlives the power".to_owned()),
            Flush::CacheLines => notes.push(format!(
                "stores in the processors' caches are lost unless flushed (persistence domain {:?}): a flush goes through the whole \
                 region",
                self.persistence_domain()
            )),
            Flush::Nothing | Flush::Impossible => {}
        }
        if let Support::No { why } = &self.user_faults.write_protect_async {
            notes.push(format!("its pages cannot be tracked ({why}): no checkpoints"));
        }
        Verdict::Keeps { notes }
    }
}

/// A medium's file, and what it is.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) kind: MediumKind,
    pub(super) path: PathBuf,
    /// The directory itself, or the file or device, open for reading and writing.
    pub(super) file: File,
    pub(super) file_system: Option<FileSystem>,
    pub(super) size: Option<u64>,
    /// Of a DAX device.
    device_alignment: u64,
}

impl Target {
    pub(super) fn open(path: &Path) -> Result<Self> {
        use std::os::unix::fs::FileTypeExt;
        let io_error = |source| Error::io(format!("cannot open {}", path.display()), source);
        let metadata = std::fs::metadata(path).map_err(|source| {
            if source.kind() == std::io::ErrorKind::NotFound {
                Error::NotFound { what: format!("medium {}", path.display()) }
            } else {
                io_error(source)
            }
        })?;
        let kind = match metadata.file_type() {
            kind if kind.is_dir() => MediumKind::Directory,
            kind if kind.is_file() => MediumKind::File,
            kind if kind.is_block_device() => MediumKind::BlockDevice,
            kind if kind.is_char_device() => MediumKind::DaxDevice,
            _ => return Err(Error::medium(path, "is no directory, file or device")),
        };
        let is_directory = kind == MediumKind::Directory;
        let mut file = OpenOptions::new().read(true).write(!is_directory).open(path).map_err(io_error)?;
        let file_system = match kind {
            MediumKind::Directory | MediumKind::File => Some(FileSystem::of(&file).map_err(io_error)?),
            MediumKind::BlockDevice | MediumKind::DaxDevice => None,
        };
        let mut device_alignment = 1;
        let size = match kind {
            MediumKind::Directory => None,
            MediumKind::File => Some(metadata.len()),
            MediumKind::BlockDevice => {
                Some(std::io::Seek::seek(&mut file, std::io::SeekFrom::End(0)).map_err(io_error)?)
            }
            MediumKind::DaxDevice => {
                let sys = sysfs_of(Path::new("/sys"), "char", metadata.rdev());
                let number = |what: &str| -> Option<u64> {
                    std::fs::read_to_string(sys.as_ref()?.join(what)).ok()?.trim().parse().ok()
                };
                let Some(size) = number("size") else {
                    return Err(Error::medium(path, "is a character device that is none of the dax class"));
                };
                device_alignment = number("align").unwrap_or(ALIGNMENT);
                Some(size)
            }
        };
        Ok(Self { kind, path: path.to_owned(), file, file_system, size, device_alignment })
    }

    fn is_hugetlbfs(&self) -> bool {
        self.file_system.is_some_and(|fs| fs.kind == FsKind::Hugetlbfs)
    }

    pub(super) fn alignment(&self) -> u64 {
        let page = self.file_system.filter(|_| self.is_hugetlbfs()).map_or(1, |fs| fs.block_bytes);
        ALIGNMENT.max(page).max(self.device_alignment)
    }

    /// Whether it can be reached through mappings only.
    pub(super) fn must_map(&self) -> bool {
        self.kind == MediumKind::DaxDevice || self.is_hugetlbfs()
    }

    /// A file on it to try things on, at least one page long.
    fn probe_file(&self) -> std::io::Result<(File, u64)> {
        let page = match self.kind {
            _ if self.is_hugetlbfs() => self.alignment(),
            MediumKind::DaxDevice => self.alignment(),
            _ => rustix::param::page_size() as u64,
        };
        if self.kind != MediumKind::Directory {
            if self.kind == MediumKind::File {
                // A store into a hole of a full file system is a SIGBUS. Keeps what is there.
                fallocate(&self.file, FallocateFlags::KEEP_SIZE, 0, page)?;
            }
            return Ok((self.file.try_clone()?, page));
        }
        match self.new_probe_file(page) {
            Ok(file) => Ok((file, page)),
            // A full file system must not look like a worse one: the registry is there since it was formatted.
            Err(error) => {
                let registry = self.path.join(super::REGISTRY_FILE);
                let file = OpenOptions::new().read(true).write(true).open(registry).map_err(|_| error)?;
                // Where the registry was copied sparsely, its page may be a hole.
                fallocate(&file, FallocateFlags::KEEP_SIZE, 0, page)?;
                Ok((file, page))
            }
        }
    }

    /// Without a name, or with one for a moment.
    fn new_probe_file(&self, page: u64) -> std::io::Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600);
        let file = match options.clone().custom_flags(libc::O_TMPFILE).open(&self.path) {
            Ok(file) => file,
            Err(_) => {
                let path = self.path.join(PROBE_FILE);
                let file = options.create(true).truncate(true).open(&path)?;
                std::fs::remove_file(&path)?;
                file
            }
        };
        file.set_len(page)?;
        fallocate(&file, FallocateFlags::empty(), 0, page)?;
        Ok(file)
    }

    /// Tries what the medium can do. Its content stays as it is.
    pub(super) fn probe(&self, declared_persistent: bool) -> Result<Capabilities> {
        let io_error = |source| Error::io(format!("cannot examine {}", self.path.display()), source);
        let metadata = self.file.metadata().map_err(io_error)?;
        let nvdimm = match self.kind {
            MediumKind::Directory | MediumKind::File => {
                nvdimm_below(Path::new("/sys"), "block", metadata.dev())
            }
            MediumKind::BlockDevice => nvdimm_below(Path::new("/sys"), "block", metadata.rdev()),
            MediumKind::DaxDevice => nvdimm_below(Path::new("/sys"), "char", metadata.rdev()),
        };
        let (map_sync, user_faults, is_dax_file) = match self.probe_file() {
            Ok((file, page)) => {
                let map_sync = Mapping::new(&file, 0, page, MapFlags::SYNC).map(drop).into();
                let user_faults = match Mapping::new(&file, 0, page, MapFlags::empty()) {
                    Ok(mapping) => uffd::try_all(&mapping),
                    Err(error) => uffd::untried(&error.to_string()),
                };
                (map_sync, user_faults, has_dax(&file))
            }
            Err(error) => {
                let why = format!("no page of it can be had to try: {error}");
                (Support::no(&*why), uffd::untried(&why), has_dax(&self.file))
            }
        };
        let nature =
            Nature::of(self.kind, self.file_system, is_dax_file, nvdimm.as_ref(), declared_persistent);
        Ok(Capabilities {
            kind: self.kind,
            file_system: self.file_system,
            size_bytes: self.size,
            alignment_bytes: self.alignment(),
            is_dax: nature.is_dax,
            map_sync,
            user_faults,
            nvdimm,
            survives_reboot: nature.survives_reboot,
            declared_persistent,
            flush: nature.flush,
        })
    }
}

/// What follows from what was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Nature {
    is_dax: bool,
    survives_reboot: bool,
    flush: Flush,
}

impl Nature {
    fn of(
        kind: MediumKind,
        file_system: Option<FileSystem>,
        is_dax_file: bool,
        nvdimm: Option<&NvdimmRegion>,
        declared_persistent: bool,
    ) -> Self {
        let is_memory = file_system.is_some_and(FileSystem::is_memory);
        // Others, virtiofs say, have DAX on something that is not theirs to vouch for.
        let is_known = file_system.is_some_and(|fs| matches!(fs.kind, FsKind::Ext | FsKind::Xfs));
        let is_volatile = nvdimm.is_some_and(|region| region.is_volatile);
        let keeps_caches = nvdimm.is_some_and(|region| region.domain == PersistenceDomain::CpuCache);
        let is_dax = match kind {
            MediumKind::DaxDevice => true,
            MediumKind::BlockDevice => false,
            MediumKind::Directory | MediumKind::File => is_dax_file,
        };
        let survives_reboot = match kind {
            // Without a region it is memory that was set aside, not NV-RAM.
            MediumKind::DaxDevice => nvdimm.is_some() && !is_volatile,
            _ => is_dax && is_known && !is_volatile,
        };
        let flush = match kind {
            _ if is_memory || (is_dax && keeps_caches) => Flush::Nothing,
            MediumKind::DaxDevice if !survives_reboot && declared_persistent => Flush::Nothing,
            MediumKind::DaxDevice if cache::can_write_back() => Flush::CacheLines,
            MediumKind::DaxDevice => Flush::Impossible,
            _ => Flush::Sync,
        };
        Self { is_dax, survives_reboot, flush }
    }
}

fn has_dax(file: &File) -> bool {
    statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS)
        .is_ok_and(|found| found.stx_attributes.contains(StatxAttributes::DAX))
}

/// The folder of a device in sysfs, without links on the way.
fn sysfs_of(sys: &Path, class: &str, device: u64) -> Option<PathBuf> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    std::fs::canonicalize(sys.join(format!("dev/{class}/{major}:{minor}"))).ok()
}

/// The NVDIMM region that a device lies on; of several below a mapped device the least.
fn nvdimm_below(sys: &Path, class: &str, device: u64) -> Option<NvdimmRegion> {
    region_of(&sysfs_of(sys, class, device)?, 8)
}

fn region_of(device: &Path, depth: u32) -> Option<NvdimmRegion> {
    for folder in device.ancestors() {
        let Some(name) = folder.file_name().and_then(|name| name.to_str()) else { continue };
        if !name.starts_with("region") {
            continue;
        }
        let attribute =
            |what: &str| std::fs::read_to_string(folder.join(what)).map(|text| text.trim().to_owned()).ok();
        let Some(kind) = attribute("devtype") else { continue };
        let domain = match attribute("persistence_domain").as_deref() {
            Some("cpu_cache") => PersistenceDomain::CpuCache,
            Some("memory_controller") => PersistenceDomain::MemoryController,
            _ => PersistenceDomain::Unknown,
        };
        return Some(NvdimmRegion { name: name.to_owned(), domain, is_volatile: kind != "nd_pmem" });
    }
    let mut all = Vec::new();
    for slave in std::fs::read_dir(device.join("slaves")).into_iter().flatten().flatten() {
        let below = std::fs::canonicalize(slave.path()).ok()?;
        // A part that is no NVDIMM makes the whole none.
        all.push(region_of(&below, depth.checked_sub(1)?)?);
    }
    let is_volatile = all.iter().any(|region| region.is_volatile);
    let keeps_caches = all.iter().all(|region| region.domain == PersistenceDomain::CpuCache);
    let weakest = all.iter().find(|region| region.domain != PersistenceDomain::CpuCache);
    let domain = if keeps_caches {
        PersistenceDomain::CpuCache
    } else {
        weakest.map_or(PersistenceDomain::Unknown, |region| region.domain)
    };
    let name = all.iter().map(|region| region.name.as_str()).collect::<Vec<_>>().join("+");
    (!all.is_empty()).then_some(NvdimmRegion { name, domain, is_volatile })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn fs(kind: FsKind) -> Option<FileSystem> {
        Some(FileSystem { kind, magic: 0, block_bytes: 4096 })
    }

    fn region(domain: PersistenceDomain, is_volatile: bool) -> NvdimmRegion {
        NvdimmRegion { name: "region0".to_owned(), domain, is_volatile }
    }

    fn capabilities(
        kind: MediumKind,
        file_system: Option<FileSystem>,
        is_dax_file: bool,
        nvdimm: Option<NvdimmRegion>,
        declared_persistent: bool,
    ) -> Capabilities {
        let nature = Nature::of(kind, file_system, is_dax_file, nvdimm.as_ref(), declared_persistent);
        Capabilities {
            kind,
            file_system,
            size_bytes: None,
            alignment_bytes: ALIGNMENT,
            is_dax: nature.is_dax,
            map_sync: Support::Yes,
            user_faults: uffd::untried("not tried"),
            nvdimm,
            survives_reboot: nature.survives_reboot,
            declared_persistent,
            flush: nature.flush,
        }
    }

    #[test]
    fn what_keeps_virtual_machines_and_how_it_is_flushed() {
        use MediumKind::{BlockDevice, DaxDevice, Directory, File};
        use PersistenceDomain::{CpuCache, MemoryController, Unknown};
        let lines = if cache::can_write_back() { Flush::CacheLines } else { Flush::Impossible };
        let (ext, xfs, tmpfs, huge, other) =
            (fs(FsKind::Ext), fs(FsKind::Xfs), fs(FsKind::Tmpfs), fs(FsKind::Hugetlbfs), fs(FsKind::Other));
        let on = |domain| Some(region(domain, false));
        let volatile = || Some(region(CpuCache, true));
        let cases = [
            (Directory, ext, true, on(CpuCache), false, true, Flush::Nothing),
            (Directory, ext, true, on(MemoryController), false, true, Flush::Sync),
            (Directory, xfs, true, on(Unknown), false, true, Flush::Sync),
            // A mapped device whose parts are not known.
            (Directory, xfs, true, None, false, true, Flush::Sync),
            (File, ext, true, on(CpuCache), false, true, Flush::Nothing),
            (Directory, ext, true, volatile(), false, false, Flush::Nothing),
            (Directory, other, true, None, false, false, Flush::Sync),
            (Directory, ext, false, on(CpuCache), false, false, Flush::Sync),
            (Directory, ext, false, None, true, true, Flush::Sync),
            (Directory, tmpfs, false, None, false, false, Flush::Nothing),
            (Directory, tmpfs, false, None, true, true, Flush::Nothing),
            (Directory, huge, false, None, true, true, Flush::Nothing),
            (BlockDevice, None, false, on(CpuCache), false, false, Flush::Sync),
            (DaxDevice, None, false, on(CpuCache), false, true, Flush::Nothing),
            (DaxDevice, None, false, on(Unknown), false, lines == Flush::CacheLines, lines),
            (DaxDevice, None, false, None, false, false, lines),
            (DaxDevice, None, false, None, true, true, Flush::Nothing),
        ];
        for (kind, file_system, is_dax_file, nvdimm, declared, keeps, flush) in cases {
            let found = capabilities(kind, file_system, is_dax_file, nvdimm, declared);
            assert_eq!((found.verdict().keeps(), found.flush), (keeps, flush), "{found:?}");
        }
    }

    #[test]
    fn verdict_says_what_is_lost_and_what_to_do() {
        let ext = capabilities(MediumKind::Directory, fs(FsKind::Ext), false, None, false);
        let Verdict::Loses { why, advice } = ext.verdict() else { panic!() };
        assert_eq!(why, "ext4 without DAX: its pages are in the host's memory, and gone after a restart");
        assert!(advice.starts_with("mount with -o dax=always on a pmem device, or set declared_persistent"));
        let dax = region(PersistenceDomain::MemoryController, false);
        let dax = capabilities(MediumKind::Directory, fs(FsKind::Ext), true, Some(dax), false);
        let Verdict::Keeps { notes } = dax.verdict() else { panic!() };
        assert!(notes[0].contains("MemoryController") && notes[0].contains("flush"), "{notes:?}");
    }

    /// A sysfs with an NVDIMM region a domain, each with a disk of a partition, and a mapped device over all of them.
    fn sysfs(domains: &[Option<&str>]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        fs::create_dir_all(at("dev/block")).unwrap();
        let mapped = at("devices/virtual/block/dm-0/slaves");
        fs::create_dir_all(&mapped).unwrap();
        symlink(mapped.parent().unwrap(), at("dev/block/253:0")).unwrap();
        for (i, domain) in domains.iter().enumerate() {
            let region = at(&format!("devices/ndbus0/region{i}"));
            let disk = region.join(format!("namespace{i}.0/block/pmem{i}"));
            fs::create_dir_all(disk.join("slaves")).unwrap();
            fs::create_dir_all(disk.join(format!("pmem{i}p1"))).unwrap();
            fs::write(region.join("devtype"), "nd_pmem\n").unwrap();
            if let Some(domain) = domain {
                fs::write(region.join("persistence_domain"), format!("{domain}\n")).unwrap();
            }
            symlink(&disk, at(&format!("dev/block/259:{i}"))).unwrap();
            symlink(disk.join(format!("pmem{i}p1")), at(&format!("dev/block/260:{i}"))).unwrap();
            symlink(&disk, mapped.join(format!("pmem{i}"))).unwrap();
        }
        root
    }

    fn below(root: &tempfile::TempDir, major: u32, minor: u32) -> Option<NvdimmRegion> {
        nvdimm_below(root.path(), "block", rustix::fs::makedev(major, minor))
    }

    #[test]
    fn domain_is_that_of_the_region_below() {
        let root = sysfs(&[Some("cpu_cache"), Some("memory_controller"), None]);
        let expected =
            [PersistenceDomain::CpuCache, PersistenceDomain::MemoryController, PersistenceDomain::Unknown];
        for (minor, domain) in (0..).zip(expected) {
            for major in [259, 260] {
                let found = below(&root, major, minor).unwrap();
                assert_eq!((found.domain, found.is_volatile), (domain, false));
                assert_eq!(found.name, format!("region{minor}"));
            }
        }
        assert_eq!(below(&root, 8, 0), None);
    }

    #[test]
    fn mapped_device_has_the_domain_of_its_weakest_part() {
        for (parts, expected) in [
            (&[Some("cpu_cache"), Some("cpu_cache")][..], PersistenceDomain::CpuCache),
            (&[Some("cpu_cache"), Some("memory_controller")], PersistenceDomain::MemoryController),
            (&[None, Some("cpu_cache")], PersistenceDomain::Unknown),
        ] {
            let root = sysfs(parts);
            assert_eq!(below(&root, 253, 0).unwrap().domain, expected);
        }
        let root = sysfs(&[Some("cpu_cache")]);
        let disk = root.path().join("devices/pci0/block/sda");
        fs::create_dir_all(&disk).unwrap();
        symlink(&disk, root.path().join("devices/virtual/block/dm-0/slaves/sda")).unwrap();
        assert_eq!(below(&root, 253, 0), None, "a part of it is no NVDIMM");
    }

    #[test]
    fn volatile_region_is_told() {
        let root = sysfs(&[Some("cpu_cache")]);
        fs::write(root.path().join("devices/ndbus0/region0/devtype"), "nd_volatile\n").unwrap();
        assert!(below(&root, 259, 0).unwrap().is_volatile);
    }
}
