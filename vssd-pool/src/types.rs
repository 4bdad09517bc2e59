// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The plain values of the public interface: what callers hand in and get back.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use vssd_protocol::units::BlockSize;

/// What a medium is, which decides how its bytes are moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MediumKind {
    /// Byte-addressable and mapped; requests complete inside the call.
    Nvram,
    /// A block device or a file on one; requests go through an io_uring with `O_DIRECT`.
    Ssd,
}

impl MediumKind {
    pub const ALL: [Self; 2] = [Self::Nvram, Self::Ssd];

    pub(crate) fn index(self) -> usize {
        match self {
            Self::Nvram => 0,
            Self::Ssd => 1,
        }
    }
}

impl fmt::Display for MediumKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nvram => "nvram",
            Self::Ssd => "ssd",
        })
    }
}

/// What makes stores to a mapped NV-RAM medium survive a power cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Persistence {
    /// `MapSync` where the file system grants it, `Battery` on tmpfs, hugetlbfs and memfd, else `Msync`.
    #[default]
    Auto,
    /// DAX: stores reach the medium by writing back cache lines.
    MapSync,
    /// The memory itself outlives the power (battery-backed, or emulated and declared so): nothing to do.
    Battery,
    /// A page-cache mapping: a flush writes dirty pages with `fdatasync`.
    Msync,
}

/// Whether an SSD medium goes through the host's page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cache {
    /// `O_DIRECT`; refused by a file system that cannot, except tmpfs, which is memory anyway.
    #[default]
    Direct,
    /// Through the page cache.
    Buffered,
}

/// One medium of a new pool.
#[derive(Clone, Debug)]
pub struct MediumSpec {
    pub kind: MediumKind,
    pub path: PathBuf,
    /// Create (or with `force` replace) a file of that many bytes; `None` takes an existing file or device as it is.
    pub size: Option<u64>,
    /// Of an NV-RAM medium.
    pub persistence: Persistence,
    /// Of an SSD medium.
    pub cache: Cache,
}

impl MediumSpec {
    /// A medium with the defaults for everything but its kind, place and size.
    pub fn new(kind: MediumKind, path: impl Into<PathBuf>, size: Option<u64>) -> Self {
        Self { kind, path: path.into(), size, persistence: Persistence::Auto, cache: Cache::Direct }
    }
}

/// How to make a pool.
#[derive(Clone, Debug)]
pub struct CreateOptions {
    /// 1 to 64 bytes of UTF-8 without control characters.
    pub name: String,
    /// One NV-RAM medium, one SSD medium, or one of each.
    pub media: Vec<MediumSpec>,
    pub block_size: BlockSize,
    /// How much may be promised, in per cent of the physical blocks: 100 to 1000.
    pub overcommit_percent: u32,
    /// Overwrite whatever the media hold.
    pub force: bool,
}

impl CreateOptions {
    pub fn new(name: impl Into<String>, media: Vec<MediumSpec>) -> Self {
        Self {
            name: name.into(),
            media,
            block_size: BlockSize::DEFAULT,
            overcommit_percent: 100,
            force: false,
        }
    }
}

/// A medium of an existing pool. What it is, its superblock says.
#[derive(Clone, Debug)]
pub struct MediumPath {
    pub path: PathBuf,
    /// Of an NV-RAM medium.
    pub persistence: Persistence,
    /// Of an SSD medium.
    pub cache: Cache,
}

impl From<PathBuf> for MediumPath {
    fn from(path: PathBuf) -> Self {
        Self { path, persistence: Persistence::Auto, cache: Cache::Direct }
    }
}

/// How to open a pool.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Every medium of the pool, in any order.
    pub media: Vec<MediumPath>,
    /// Serve reads only; nothing on the media changes.
    pub read_only: bool,
    /// How long a request may wait for a clean block before it fails with `NoSpace`.
    pub space_wait: Duration,
    /// Run the keeper, the scrubber and the committer on threads of their own. Without, nothing
    /// happens in the background until [`Pool::run_background`](crate::Pool::run_background) is
    /// called, which makes a test's order of events its own.
    pub threads: bool,
    /// What each of these threads does before anything else.
    pub thread_start: Option<ThreadStart>,
}

/// The threads of a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolThread {
    Keeper,
    Committer,
    Scrubber,
    Syncer,
}

/// Called by each thread of a pool, once, when it begins. Every file is open by then.
#[derive(Clone)]
pub struct ThreadStart(Arc<dyn Fn(PoolThread) + Send + Sync>);

impl ThreadStart {
    pub fn new(call: impl Fn(PoolThread) + Send + Sync + 'static) -> Self {
        Self(Arc::new(call))
    }

    pub(crate) fn call(&self, thread: PoolThread) {
        (self.0)(thread);
    }
}

impl fmt::Debug for ThreadStart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ThreadStart")
    }
}

impl OpenOptions {
    pub fn new<P: Into<PathBuf>>(paths: impl IntoIterator<Item = P>) -> Self {
        Self {
            media: paths.into_iter().map(|path| path.into().into()).collect(),
            read_only: false,
            space_wait: Duration::from_secs(5),
            threads: true,
            thread_start: None,
        }
    }
}

/// Sixteen random bytes that tell pools, media and vSSDs apart.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Uuid(pub [u8; 16]);

impl Uuid {
    /// A new random (version 4) identifier.
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = [0u8; 16];
        let mut filled = 0;
        while filled < bytes.len() {
            // SAFETY: the pointer and length name the unfilled tail of `bytes`, which lives on this frame.
            let n = unsafe { libc::getrandom(bytes[filled..].as_mut_ptr().cast(), bytes.len() - filled, 0) };
            match usize::try_from(n) {
                Ok(n) => filled += n,
                Err(_) => {
                    let error = std::io::Error::last_os_error();
                    if error.kind() != std::io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        bytes[6] = (bytes[6] & 0x0f) | 0x40;
        bytes[8] = (bytes[8] & 0x3f) | 0x80;
        Ok(Self(bytes))
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            if matches!(i, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Names a vSSD within its pool; never used twice in a pool's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VssdId(pub u32);

impl fmt::Display for VssdId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vSSD {}", self.0)
    }
}

/// Where a vSSD's blocks may lie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Class {
    /// On NV-RAM while that lasts, then on the SSD.
    #[default]
    Any,
    /// On NV-RAM only.
    Nvram,
    /// On the SSD only.
    Ssd,
}

impl Class {
    /// The one medium it is confined to.
    pub(crate) fn strict(self) -> Option<MediumKind> {
        match self {
            Self::Any => None,
            Self::Nvram => Some(MediumKind::Nvram),
            Self::Ssd => Some(MediumKind::Ssd),
        }
    }
}

/// What the operator wishes of a vSSD.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VssdAttrs {
    /// How many blocks it is promised. The promise is the larger of this and what is plugged.
    pub requested_blocks: u32,
    /// An unplug never goes below this.
    pub min_blocks: u32,
    pub class: Class,
    /// At most 256 bytes kept for the control side; the pool does not look inside.
    pub policy: String,
}

/// A new vSSD.
#[derive(Clone, Debug)]
pub struct VssdSpec {
    /// 1 to 64 bytes, unique in the pool.
    pub name: String,
    /// How many blocks it can ever hold, unless the operator raises it.
    pub max_blocks: u32,
    /// The first so many are plugged from the start.
    pub initial_blocks: u32,
    pub attrs: VssdAttrs,
}

/// What became of one range of an unplug or plug. Each range is done whole or not at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeStatus {
    /// Done, durably.
    Ok,
    /// Nothing to do: it was so already.
    Already,
    /// Empty, or not within the vSSD.
    Range,
    /// [`Pool::unplug_empty`](crate::Pool::unplug_empty): a block of it holds data.
    Busy,
    /// Unplug: the vSSD would fall below its minimum.
    Protected,
    /// Plug: the vSSD would hold more than the caller's limit.
    Limit,
    /// Plug: the pool cannot promise that much.
    NoSpace,
}

/// A pool at a glance.
#[derive(Clone, Debug)]
pub struct PoolInfo {
    pub name: String,
    pub uuid: Uuid,
    pub block_size: BlockSize,
    pub media: Vec<MediumInfo>,
    pub read_only: bool,
    /// Blocks of all media.
    pub total_blocks: u32,
    /// Clean and unowned.
    pub free_blocks: u32,
    /// Given back, not zeroed yet.
    pub scrubbing_blocks: u32,
    /// In some vSSD's map.
    pub leased_blocks: u32,
    /// Clean and set aside for first writes.
    pub reserved_blocks: u32,
    /// The sum over all vSSDs of what each is promised.
    pub promised_blocks: u64,
    /// What may be promised at most.
    pub promisable_blocks: u64,
    pub overcommit_percent: u32,
    /// Bytes of the journal in use, and its size.
    pub journal_used_bytes: u64,
    pub journal_bytes: u64,
    /// Checkpoints written since the pool was opened.
    pub checkpoints: u64,
    /// The smallest request the media take: the logical block size to show to guests (512 or 4096).
    pub logical_block_bytes: u32,
    /// A journal write or flush failed: nothing can be changed any more.
    pub failed: bool,
}

/// A medium at a glance.
#[derive(Clone, Debug)]
pub struct MediumInfo {
    pub kind: MediumKind,
    pub path: PathBuf,
    pub uuid: Uuid,
    pub size_bytes: u64,
    /// Blocks in its data area.
    pub blocks: u32,
    pub leased_blocks: u32,
    /// What `Auto` was resolved to; `None` on an SSD.
    pub persistence: Option<Persistence>,
    /// Whether the page cache is in the way; `None` on NV-RAM.
    pub cache: Option<Cache>,
    /// Written since the pool was opened: data, scrubbing and metadata.
    pub bytes_written: u64,
    /// Part of it has vanished under the pool: the file was shortened, or its filesystem has no room for all of it.
    /// Requests to that part fail; on NV-RAM, where it is not known which, every request.
    pub is_lost: bool,
}

/// What a vSSD did since the pool was opened. Arrays are indexed like [`MediumKind::ALL`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VssdStats {
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    /// DISCARD and WRITE_ZEROES requests.
    pub discards: u64,
    pub bytes_read: [u64; 2],
    pub bytes_written: [u64; 2],
    /// Requests that met an unplugged block.
    pub evicted: u64,
    /// Blocks that were given a physical block.
    pub first_touches: u64,
}

/// Why one request failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IoError {
    /// It touches a block that is not plugged. Nothing was read or written.
    #[error("the range is not plugged")]
    Evicted,
    /// No physical block became free in time.
    #[error("no space left in the pool")]
    NoSpace,
    /// It reaches past the vSSD's end, or is not made of whole logical blocks.
    #[error("the range lies outside the disk")]
    OutOfRange,
    /// The medium failed with this errno.
    #[error("medium error {0}")]
    Io(i32),
    /// The pool is open read-only.
    #[error("read-only")]
    ReadOnly,
}

/// What became of a request that was just handed in.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Submitted {
    /// It is finished; its token will not be reported again.
    Done(Result<(), IoError>),
    /// [`Lane::poll`](crate::Lane::poll) will report its token.
    Pending,
}
