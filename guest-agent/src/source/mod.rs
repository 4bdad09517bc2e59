// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Where blocks come from that a disk can do without. Each source knows one way in which a vSSD is used.
//!
//! ```text
//!   serve ──► Source ──┬── filesystem    free space of a mounted ext4 or XFS
//!                      ├── hint_files    what programs say they can do without
//!                      └── dm_cache      the end of a dm-cache's fast device
//! ```
//!
//! A source does not speak to the driver. It says which blocks nothing uses any more; they are nominated by [`crate::serve`],
//! and may go from then on until the hints are taken back.

pub(crate) mod dm_cache;
pub(crate) mod filesystem;
pub(crate) mod hint_files;

use std::path::PathBuf;
use std::time::Instant;

use vssd_protocol::units::BlockRange;

use crate::blocks::BlockSet;
use crate::config::{DiskConfig, Kind};
use crate::disk::Status;
use crate::error::{AgentError, Result};
use crate::estimate::Estimate;

/// One way in which a vSSD is used. Nothing of it is remembered that the guest does not keep durably itself.
pub(crate) trait Source {
    /// What it works on, for people: a file, a device.
    fn place(&self) -> Result<PathBuf>;

    /// The blocks that nothing uses, most expendable first; those that have gone may be among them.
    fn held(&self, status: &Status) -> Result<Vec<BlockRange>>;

    /// Sees to it that about `want` more blocks are used by nothing, or as many as one step brings, and gives all that
    /// [`Self::held`] would. An error says why there are no more.
    fn take(&mut self, status: &Status, evicted: &BlockSet, want: u32) -> Result<Vec<BlockRange>>;

    /// All blocks but `evicted` may be used again: no hint for any of them is left.
    fn keep(&mut self, status: &Status, evicted: &BlockSet) -> Result<()>;

    /// Evicted blocks that something may still use: any is a fault.
    fn uncovered(&self, status: &Status, evicted: &BlockSet) -> Result<BlockSet>;

    /// Stops the use of such blocks, and gives those that it cannot.
    fn cover(&mut self, status: &Status, evicted: &BlockSet) -> Result<BlockSet>;

    /// How many blocks to ask the host for, if it is time to ask.
    fn wanted(&mut self, status: &Status, now: Instant) -> Result<Option<u32>>;

    /// What could go beyond the blocks that have gone.
    fn estimate(&self, status: &Status, evicted: &BlockSet) -> Result<Estimate>;

    /// What is wrong with it and does not keep it from going on.
    fn complaints(&self, _status: &Status) -> Result<Vec<AgentError>> {
        Ok(Vec::new())
    }
}

/// The source that is configured for a disk.
pub(crate) fn of(disk: &str, config: &DiskConfig) -> Box<dyn Source> {
    match config.source {
        Kind::Filesystem => Box::new(filesystem::Filesystem::new(disk, config)),
        Kind::DmCache => Box::new(dm_cache::DmCache::new(disk, config)),
        Kind::HintFiles => Box::new(hint_files::HintFiles::new(disk, &config.hints)),
    }
}
