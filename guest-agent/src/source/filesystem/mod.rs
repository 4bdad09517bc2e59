// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The file system source: blocks that a mounted ext4 or XFS has free, held in a balloon file.
//!
//! ```text
//!   mountinfo ──► mount ──► balloon (fallocate, punch) ◄──► ioctl (FIEMAP)
//!                                 └──► layout (extents ◄──► blocks, pure)
//! ```
//!
//! The order makes it safe. A block is nominated only when a file that is durable holds it, and a block leaves that file only
//! when it is plugged again: so the file system never uses a block that the host has, in any crash of guest or agent.

mod balloon;
mod ioctl;
mod layout;
mod mount;
mod pull;

use std::fs::File;
use std::path::PathBuf;
use std::time::Instant;

use tracing::{debug, info};
use vssd_protocol::units::{BlockRange, ByteCount};

use self::balloon::{Balloon, Space};
use self::layout::Geometry;
use self::mount::Mount;
use self::pull::{Need, Pull};
use super::Source;
use crate::blocks::BlockSet;
use crate::config::{DiskConfig, Share};
use crate::disk::Status;
use crate::error::{AgentError, Result};
use crate::estimate::Estimate;

/// The most that is allocated at a time: the host sees progress in between.
const STEP: u64 = 1 << 30;
/// Of a step, at least this part must be whole blocks, or the file system is too fragmented to go on.
const LEAST_GAIN: u64 = 8;

/// What a disk's file system can do without.
#[derive(Debug)]
pub(crate) struct Filesystem {
    disk: String,
    point: Option<PathBuf>,
    reserve: Share,
    pull: Pull,
}

impl Filesystem {
    pub(crate) fn new(disk: &str, config: &DiskConfig) -> Self {
        Self {
            disk: disk.to_owned(),
            point: config.mount.clone(),
            reserve: config.reserve,
            pull: Pull::new(config.pull_below, config.pull_until),
        }
    }

    fn mount(&self) -> Result<Mount> {
        mount::find(&self.disk, self.point.as_deref())
    }

    fn geometry(mount: &Mount, status: &Status) -> Result<Geometry> {
        let Mount { point, place, .. } = mount;
        let (len, group) = if mount.is_xfs {
            let root = File::open(point).map_err(|source| AgentError::io("open", point, source))?;
            let (len, group) = ioctl::xfs_lens(&root)
                .map_err(|source| AgentError::io("ask for the length of", point, source))?;
            (len, Some(group))
        } else {
            (place.len, None)
        };
        Ok(Geometry {
            offset: place.offset,
            end: place.offset.saturating_add(len),
            group,
            block_size: status.block_size.into(),
            total_blocks: status.total_blocks,
            grain: balloon::stat(point)?.f_frsize,
        })
    }

    /// The balloon file, if there is one.
    fn balloon(&self, status: &Status) -> Result<Option<Balloon>> {
        let mount = self.mount()?;
        Balloon::open(&mount, Self::geometry(&mount, status)?)
    }

    /// The balloon file; there is one from now on.
    fn made_balloon(&self, status: &Status) -> Result<Balloon> {
        let mount = self.mount()?;
        if mount.read_only {
            return Err(AgentError::io("write to", &mount.point, rustix::io::Errno::ROFS));
        }
        Balloon::make(&mount, Self::geometry(&mount, status)?)
    }

    /// The blocks that the balloon file holds.
    fn ballooned(&self, status: &Status) -> Result<BlockSet> {
        match self.balloon(status)? {
            Some(balloon) => balloon.blocks(),
            None => Ok(BlockSet::new(status.total_blocks)),
        }
    }

    /// Discards what it has free; what was deleted is free once it has noted that.
    pub(crate) fn trim(&self) -> Result<()> {
        let point = self.mount()?.point;
        let root = File::open(&point).map_err(|source| AgentError::io("open", &point, source))?;
        rustix::fs::syncfs(&root).map_err(|errno| AgentError::io("sync", &point, errno))?;
        match ioctl::trim(&root) {
            Ok(bytes) => info!(disk = self.disk, trimmed = %ByteCount(bytes), "discarded what is free"),
            Err(error) => debug!(disk = self.disk, %error, "cannot discard what is free"),
        }
        Ok(())
    }

    /// Its size and what it has free.
    fn space(&self) -> Result<Space> {
        Ok(Space::of(&balloon::stat(&self.mount()?.point)?))
    }

    fn room(&self, space: Space) -> u64 {
        space.free.saturating_sub(self.reserve.bytes(space.size))
    }

    /// The blocks of `blocks` that are this file system's, wholly or in part.
    fn inside(&self, status: &Status, blocks: &BlockSet) -> Result<BlockSet> {
        let place = self.mount()?.place;
        let block = u64::from(status.block_size);
        let at = |block: u64| u32::try_from(block).unwrap_or(u32::MAX);
        let (first, end) = (at(place.offset / block), at((place.offset + place.len).div_ceil(block)));
        let outside = [BlockRange::new(0, first), BlockRange::new(end, u32::MAX)];
        Ok(blocks.without(&BlockSet::of(status.total_blocks, outside)))
    }
}

impl Source for Filesystem {
    /// Where the balloon file is, or would be.
    fn place(&self) -> Result<PathBuf> {
        Ok(self.mount()?.point.join(balloon::NAME))
    }

    /// The blocks that the balloon file holds.
    fn held(&self, status: &Status) -> Result<Vec<BlockRange>> {
        Ok(self.ballooned(status)?.ranges().collect())
    }

    /// Takes about `want` blocks more into the balloon file, a step at a time, and gives all that it holds then.
    fn take(&mut self, status: &Status, evicted: &BlockSet, want: u32) -> Result<Vec<BlockRange>> {
        let mut balloon = self.made_balloon(status)?;
        let before = balloon.blocks()?;
        // Also of blocks that have gone without being in the file as a whole.
        let mut keep = before.clone();
        keep.extend(evicted);
        let block = u64::from(status.block_size);
        let mut room = self.room(balloon.space()?);
        if room < u64::from(want) * block {
            // Pieces of blocks are of no use here. They become part of what stays free, and for them comes what is in one piece:
            // both ext4 and XFS look for that first.
            balloon.shrink_to(&keep)?;
            // More is asked for than is free: whatever is not used need not be stored.
            self.trim()?;
            room = self.room(balloon.space()?);
        }
        if room < block {
            let space = balloon.space()?;
            return Err(AgentError::Full {
                path: balloon.path().to_owned(),
                free: ByteCount(space.free),
                reserve: ByteCount(self.reserve.bytes(space.size)),
            });
        }
        let step = room.min(STEP).min(u64::from(want) * block) / block * block;
        balloon.grow(step)?;
        let held = balloon.blocks()?;
        let whole = u64::from(held.len().saturating_sub(before.len())) * block;
        if whole < step / LEAST_GAIN {
            keep.extend(&held);
            balloon.shrink_to(&keep)?;
            let (asked, whole) = (ByteCount(step), ByteCount(whole));
            return Err(AgentError::Fragmented { path: balloon.path().to_owned(), asked, whole });
        }
        Ok(held.ranges().collect())
    }

    /// Lets the file system have all that is no part of the blocks in `keep`.
    fn keep(&mut self, status: &Status, keep: &BlockSet) -> Result<()> {
        match self.balloon(status)? {
            Some(mut balloon) => balloon.shrink_to(keep),
            None => Ok(()),
        }
    }

    /// Blocks of this file system that the host has and the balloon file has not.
    fn uncovered(&self, status: &Status, evicted: &BlockSet) -> Result<BlockSet> {
        Ok(self.inside(status, evicted)?.without(&self.ballooned(status)?))
    }

    /// Takes all free space for a moment, so that the balloon file holds every free block that the host has; gives those that
    /// it does not hold even then.
    fn cover(&mut self, status: &Status, evicted: &BlockSet) -> Result<BlockSet> {
        let mut balloon = self.made_balloon(status)?;
        let gone = self.inside(status, evicted)?;
        let mut step = STEP;
        loop {
            let missing = gone.without(&balloon.blocks()?);
            if missing.is_empty() || step < u64::from(status.block_size) {
                return Ok(missing);
            }
            step = step.min(balloon.space()?.free);
            if step > 0 && !balloon.grow(step)? {
                step /= 2;
            }
        }
    }

    fn wanted(&mut self, status: &Status, now: Instant) -> Result<Option<u32>> {
        if status.evicted_blocks == 0 {
            return Ok(None);
        }
        let space = self.space()?;
        let need = Need {
            size: space.size,
            free: space.free,
            block_size: status.block_size.into(),
            evicted_blocks: status.evicted_blocks,
        };
        let wanted = self.pull.want(need, now);
        if wanted.is_some() {
            info!(disk = self.disk, free = %ByteCount(space.free), "short of space");
        }
        Ok(wanted)
    }

    fn estimate(&self, status: &Status, evicted: &BlockSet) -> Result<Estimate> {
        let held_blocks = self.ballooned(status)?.without(evicted).len();
        let room = self.room(self.space()?) / u64::from(status.block_size);
        Ok(Estimate {
            held_blocks,
            free_blocks: u32::try_from(room).unwrap_or(u32::MAX),
            ..Estimate::default()
        })
    }
}
