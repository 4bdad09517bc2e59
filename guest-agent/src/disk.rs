// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The driver's files of one vSSD, `/proc/vssd/<disk>/`: what the host asks, which blocks are gone, hints.
//!
//! Described in `guest-driver/Documentation/ABI/testing/procfs-vssd`. It knows nothing of file systems.

use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
pub(crate) use vssd_client::{Status, list};
use vssd_protocol::units::BlockRange;

use crate::blocks::BlockSet;
use crate::error::{AgentError, Result};
use crate::estimate::Estimate;
use crate::why::Why;

/// Where what is kept for as long as the guest runs is kept.
pub(crate) const LOCKS: &str = "/run/vssd-agent";
/// A write is taken line by line; this many bytes at a time.
const WRITE: usize = 32 << 10;

/// A vSSD that is served by this process. While it is open, the driver waits for its hints.
#[derive(Debug)]
pub(crate) struct Disk {
    client: vssd_client::Disk,
    /// One agent a disk; let go of by the kernel, however this process ends.
    _lock: File,
}

/// Whether a disk has the driver that knows vSSDs.
pub(crate) fn has_driver(name: &str) -> bool {
    Path::new(vssd_client::PROC).join(name).is_dir()
}

/// What the driver knows of a disk that need not be served by this process.
pub(crate) fn status(name: &str) -> Result<Status> {
    Ok(vssd_client::status(name)?)
}

/// The blocks that the host has.
pub(crate) fn evicted(name: &str, total: u32) -> Result<BlockSet> {
    Ok(blocks(vssd_client::evicted(name)?, total))
}

fn blocks(ranges: Vec<vssd_client::BlockRange>, total: u32) -> BlockSet {
    BlockSet::of(total, ranges.into_iter().map(|range| BlockRange::new(range.start, range.count)))
}

/// Makes this process the agent of a disk, for as long as it has the file.
pub(crate) fn lock(name: &str) -> Result<File> {
    let locks = Path::new(LOCKS);
    fs::create_dir_all(locks).map_err(|source| AgentError::io("make", locks, source))?;
    let path = locks.join(format!("{name}.lock"));
    let lock = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&path)
        .map_err(|source| AgentError::io("open", &path, source))?;
    flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|errno| match errno {
        rustix::io::Errno::WOULDBLOCK => AgentError::Locked { disk: name.to_owned() },
        other => AgentError::io("lock", &path, other),
    })?;
    Ok(lock)
}

impl Disk {
    pub(crate) fn open(name: &str) -> Result<Self> {
        let client = vssd_client::Disk::open(name)?;
        Ok(Self { client, _lock: lock(name)? })
    }

    pub(crate) fn name(&self) -> &str {
        self.client.name()
    }

    /// What the driver knows now. What changes from here on ends [`Self::wait`].
    pub(crate) fn look(&self) -> Result<Status> {
        self.client.request()?;
        Ok(self.client.status()?)
    }

    /// Waits for news from the driver, or until the time is up.
    pub(crate) fn wait(&self, limit: Duration) -> Result<()> {
        Ok(self.client.wait(limit).map(drop)?)
    }

    pub(crate) fn evicted(&self, total: u32) -> Result<BlockSet> {
        Ok(blocks(self.client.evicted()?, total))
    }

    /// Nominates blocks, most expendable first.
    pub(crate) fn hint(&self, ranges: impl IntoIterator<Item = BlockRange>) -> Result<()> {
        let mut file = self.hints()?;
        let mut lines = String::new();
        for range in ranges {
            let _ = writeln!(lines, "{} {}", range.start, range.count);
            if lines.len() >= WRITE {
                self.tell(&mut file, &lines)?;
                lines.clear();
            }
        }
        if lines.is_empty() { Ok(()) } else { self.tell(&mut file, &lines) }
    }

    /// Takes all hints back. No block that was hinted before goes once this has returned.
    pub(crate) fn clear(&self) -> Result<()> {
        self.tell(&mut self.hints()?, "clear\n")
    }

    /// There are no more hints for the news `seq`.
    pub(crate) fn end(&self, seq: u64, why: Why, could_give: u32) -> Result<()> {
        self.tell(&mut self.hints()?, &format!("end {seq} {} {could_give}\n", why.word()))
    }

    /// There may be hints yet: the driver's patience begins anew.
    pub(crate) fn still_looking(&self) -> Result<()> {
        self.tell(&mut self.hints()?, "wait\n")
    }

    /// Asks the host for more blocks.
    pub(crate) fn pull(&self, blocks: u32) -> Result<()> {
        let path = self.file("pull");
        fs::write(&path, format!("{blocks} pressure\n"))
            .map_err(|source| AgentError::io("write", &path, source))
    }

    /// Tells the host how much could go. A driver that does not know of that is not told.
    pub(crate) fn report(&self, estimate: &Estimate) -> Result<()> {
        let Estimate { held_blocks, free_blocks, clean_cold_blocks, clean_hot_blocks, dirty_blocks } =
            *estimate;
        let free = held_blocks.saturating_add(free_blocks);
        let path = self.file("estimate");
        let line = format!("{free} {clean_cold_blocks} {clean_hot_blocks} {dirty_blocks}\n");
        match OpenOptions::new().write(true).open(&path).and_then(|mut file| file.write_all(line.as_bytes()))
        {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(AgentError::io("write", &path, error))
            }
            _ => Ok(()),
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.client.dir().join(name)
    }

    fn hints(&self) -> Result<File> {
        let path = self.file("hints");
        OpenOptions::new().write(true).open(&path).map_err(|source| AgentError::io("open", &path, source))
    }

    fn tell(&self, file: &mut File, lines: &str) -> Result<()> {
        file.write_all(lines.as_bytes())
            .map_err(|source| AgentError::io("write", &self.file("hints"), source))
    }
}
