// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The driver's files of one vSSD, `/proc/vssd/<disk>/`: what the host asks, which blocks are gone, hints.
//!
//! Described in `guest-driver/Documentation/ABI/testing/procfs-vssd`. It knows nothing of file systems.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FlockOperation, flock};
use vssd_protocol::units::BlockRange;

use crate::blocks::BlockSet;
use crate::error::{AgentError, Result};

/// Where the driver's files are.
pub(crate) const PROC: &str = "/proc/vssd";
const LOCKS: &str = "/run/vssd-agent";
/// A write is taken line by line; this many bytes at a time.
const WRITE: usize = 32 << 10;

/// What the driver knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Status {
    /// The host's name for the vSSD.
    pub(crate) name: String,
    /// Of the driver's session with the host.
    pub(crate) epoch: String,
    pub(crate) state: String,
    /// Number of the host's newest news, in this session.
    pub(crate) seq: u64,
    pub(crate) reason: String,
    /// 0: none.
    pub(crate) deadline_ms: u32,
    pub(crate) block_size: u32,
    pub(crate) total_blocks: u32,
    pub(crate) requested_blocks: u32,
    pub(crate) plugged_blocks: u32,
    pub(crate) evicted_blocks: u32,
}

impl Status {
    /// How many blocks the host still wants back.
    pub(crate) fn to_give(&self) -> u32 {
        self.plugged_blocks.saturating_sub(self.requested_blocks)
    }

    fn parse(text: &str) -> Option<Self> {
        let fields: HashMap<&str, &str> = text.lines().filter_map(|line| line.split_once(' ')).collect();
        let word = |key| fields.get(key)?.parse().ok();
        let text = |key| fields.get(key).map(|&value| value.to_owned());
        Some(Self {
            name: text("name").unwrap_or_default(),
            epoch: text("epoch")?,
            state: text("state")?,
            seq: fields.get("seq")?.parse().ok()?,
            reason: text("reason")?,
            deadline_ms: word("deadline_ms")?,
            block_size: word("block_size").filter(|size: &u32| size.is_power_of_two())?,
            total_blocks: word("total_blocks")?,
            requested_blocks: word("requested_blocks")?,
            plugged_blocks: word("plugged_blocks")?,
            evicted_blocks: word("evicted_blocks")?,
        })
    }
}

/// Why no more hints come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    Nothing,
    Policy,
    Error,
}

impl Why {
    fn word(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::Policy => "policy",
            Self::Error => "error",
        }
    }
}

/// A vSSD that is served by this process. While it is open, the driver waits for its hints.
#[derive(Debug)]
pub(crate) struct Disk {
    name: String,
    dir: PathBuf,
    request: File,
    /// One agent a disk; let go of by the kernel, however this process ends.
    _lock: File,
}

/// The vSSDs of this guest.
pub(crate) fn list() -> Vec<String> {
    let entries = fs::read_dir(PROC).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries
        .filter(|entry| entry.path().is_dir())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

/// What the driver knows of a disk that need not be served by this process.
pub(crate) fn status(name: &str) -> Result<Status> {
    read_status(name, &Path::new(PROC).join(name))
}

fn read_status(name: &str, dir: &Path) -> Result<Status> {
    let no_disk = |source| AgentError::NoDisk { disk: name.to_owned(), source };
    let text = fs::read_to_string(dir.join("status")).map_err(no_disk)?;
    Status::parse(&text).ok_or_else(|| {
        no_disk(io::Error::new(io::ErrorKind::InvalidData, "the driver's status is not understood"))
    })
}

/// The blocks that the host has.
pub(crate) fn evicted(name: &str, total: u32) -> Result<BlockSet> {
    let path = Path::new(PROC).join(name).join("evicted");
    let text = fs::read_to_string(&path).map_err(|source| AgentError::io("read", &path, source))?;
    parse_ranges(&text, total)
        .ok_or_else(|| AgentError::io("understand", &path, io::Error::from(io::ErrorKind::InvalidData)))
}

fn parse_ranges(text: &str, total: u32) -> Option<BlockSet> {
    let mut set = BlockSet::new(total);
    for line in text.lines() {
        let (start, count) = line.split_once(' ')?;
        set.insert(BlockRange::new(start.parse().ok()?, count.parse().ok()?));
    }
    Some(set)
}

impl Disk {
    pub(crate) fn open(name: &str) -> Result<Self> {
        let dir = Path::new(PROC).join(name);
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
        let request = File::open(dir.join("request"))
            .map_err(|source| AgentError::NoDisk { disk: name.to_owned(), source })?;
        Ok(Self { name: name.to_owned(), dir, request, _lock: lock })
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// What the driver knows now. What changes from here on ends [`Self::wait`].
    pub(crate) fn look(&self) -> Result<Status> {
        let mut seen = [0; 512];
        self.request
            .read_at(&mut seen, 0)
            .map_err(|source| AgentError::NoDisk { disk: self.name.clone(), source })?;
        read_status(&self.name, &self.dir)
    }

    /// Waits for news from the driver, or until the time is up.
    pub(crate) fn wait(&self, limit: Duration) -> Result<()> {
        let limit = Timespec {
            tv_sec: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: limit.subsec_nanos().into(),
        };
        let mut fds = [PollFd::new(&self.request, PollFlags::PRI)];
        match poll(&mut fds, Some(&limit)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(errno) => Err(AgentError::io("wait for", &self.dir.join("request"), errno)),
        }
    }

    pub(crate) fn evicted(&self, total: u32) -> Result<BlockSet> {
        evicted(&self.name, total)
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

    /// Asks the host for more blocks.
    pub(crate) fn pull(&self, blocks: u32) -> Result<()> {
        let path = self.dir.join("pull");
        fs::write(&path, format!("{blocks} pressure\n"))
            .map_err(|source| AgentError::io("write", &path, source))
    }

    fn hints(&self) -> Result<File> {
        let path = self.dir.join("hints");
        OpenOptions::new().write(true).open(&path).map_err(|source| AgentError::io("open", &path, source))
    }

    fn tell(&self, file: &mut File, lines: &str) -> Result<()> {
        file.write_all(lines.as_bytes())
            .map_err(|source| AgentError::io("write", &self.dir.join("hints"), source))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str = "name vm1\nepoch 12ab\nstate shrinking\nseq 7\nreason operator\ndeadline_ms 250\n\
        block_size 65536\ntotal_blocks 512\nmin_blocks 0\nrequested_blocks 100\nplugged_blocks 400\n\
        evicted_blocks 112\nsomething new\n";

    #[test]
    fn status_is_read_whatever_else_it_says() {
        let status = Status::parse(STATUS).unwrap();
        assert_eq!((status.name.as_str(), status.seq, status.to_give()), ("vm1", 7, 300));
        for key in ["state", "seq", "block_size", "total_blocks", "plugged_blocks"] {
            let without: Vec<_> = STATUS.lines().filter(|line| !line.starts_with(key)).collect();
            assert_eq!(Status::parse(&without.join("\n")), None, "{key}");
        }
        assert_eq!(Status::parse(&STATUS.replace("65536", "65535")), None);
        assert_eq!(
            Status::parse(&STATUS.replace("requested_blocks 100", "requested_blocks 500")).unwrap().to_give(),
            0
        );
    }

    #[test]
    fn evicted_blocks_are_read() {
        let set = parse_ranges("3 2\n9 1\n", 10).unwrap();
        assert_eq!(set.ranges().collect::<Vec<_>>(), [BlockRange::new(3, 2), BlockRange::new(9, 1)]);
        assert!(parse_ranges("", 10).unwrap().is_empty());
        for bad in ["3", "a 1", "1 -1", "1  2"] {
            assert_eq!(parse_ranges(bad, 10), None, "{bad}");
        }
    }
}
