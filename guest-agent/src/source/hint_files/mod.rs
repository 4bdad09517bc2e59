// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The hint-file source: blocks that programs in the guest say they can do without.
//!
//! ```text
//!   <hints>/<disk>/<program> ──► folder (open, check, parse) ──► merge ──► most expendable first
//!                                       └──► wish (blocks that programs would like to have)
//! ```
//!
//! A program has forgotten what it names, or copes with its loss: so nothing needs to be held, and nothing let go of. This
//! source does not know what is in the blocks, nor whose they are: whoever may write in that directory can give any block of
//! the disk away.

mod folder;
mod merge;
mod wish;

use std::cell::RefCell;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;
use tracing::error;
use vssd_client::Cost;
use vssd_protocol::units::BlockRange;

use self::folder::Folder;
use self::wish::Wish;
use super::Source;
use crate::blocks::BlockSet;
use crate::disk::Status;
use crate::error::{AgentError, Result};
use crate::estimate::Estimate;

/// How long programs have to bring hints once the host has asked: as long as the driver gives those that bring them themselves.
const PATIENCE: Duration = Duration::from_secs(3);
/// A program that replaces its file again and again is read no more often than this.
const BREATH: Duration = Duration::from_millis(5);

/// What programs say they can do without.
#[derive(Debug)]
pub(crate) struct HintFiles {
    /// Of this disk.
    dir: PathBuf,
    /// Blocks that were offered for the wish of the host at hand: only others are news.
    offered: RefCell<BlockSet>,
    /// Complaints that were made, so that each is made once.
    told: RefCell<Vec<String>>,
    wish: Wish,
}

impl HintFiles {
    /// For a disk whose directory lies in `hints`.
    pub(crate) fn new(disk: &str, hints: &Path) -> Self {
        Self {
            dir: hints.join(disk),
            offered: RefCell::new(BlockSet::new(0)),
            told: RefCell::default(),
            wish: Wish::default(),
        }
    }

    /// What the files say now.
    fn read(&self, status: &Status) -> Result<Folder> {
        let folder = folder::read(&self.dir, status.total_blocks)?;
        let mut told = self.told.borrow_mut();
        let complaints: Vec<String> = folder.complaints.iter().map(AgentError::message).collect();
        for (complaint, text) in folder.complaints.iter().zip(&complaints) {
            if !told.contains(text) {
                error!(code = complaint.code(), hint = complaint.hint(), "{text}");
            }
        }
        *told = complaints;
        Ok(folder)
    }

    /// All hints, in the order in which their blocks may go.
    fn hints(&self, status: &Status) -> Result<Vec<(Cost, BlockRange)>> {
        let lists: Vec<_> = self.read(status)?.files.into_iter().map(|file| file.ranges).collect();
        Ok(merge::merge(&lists, status.total_blocks))
    }

    fn ranges(&self, status: &Status) -> Result<Vec<BlockRange>> {
        Ok(self.hints(status)?.into_iter().map(|(_, range)| range).collect())
    }

    /// Sees to it that programs have a place for their files.
    fn make_dir(&self) -> Result<()> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&self.dir)
            .map_err(|source| AgentError::io("make", &self.dir, source))
    }
}

impl Source for HintFiles {
    /// The directory that the files are in.
    fn place(&self) -> Result<PathBuf> {
        Ok(self.dir.clone())
    }

    /// What the files name.
    fn held(&self, status: &Status) -> Result<Vec<BlockRange>> {
        let ranges = self.ranges(status)?;
        *self.offered.borrow_mut() = BlockSet::of(status.total_blocks, ranges.iter().copied());
        Ok(ranges)
    }

    /// Waits for programs to name others: they have heard of the host's wish when the agent did.
    fn take(&mut self, status: &Status, evicted: &BlockSet, _want: u32) -> Result<Vec<BlockRange>> {
        self.make_dir()?;
        // Watched first: what is written while it is read is seen afterwards.
        let watch = Watch::of(&self.dir)?;
        let limit = patience(status);
        let since = Instant::now();
        loop {
            let ranges = self.ranges(status)?;
            let named = BlockSet::of(status.total_blocks, ranges.iter().copied());
            let offered = self.offered.get_mut();
            let is_news = !named.without(evicted).without(offered).is_empty();
            offered.extend(&named);
            if is_news {
                return Ok(ranges);
            }
            let left = limit.saturating_sub(since.elapsed());
            if left.is_zero() || !watch.wait(left)? {
                return Err(AgentError::NoHints { path: self.dir.clone() });
            }
        }
    }

    /// There is nothing to let go of: programs see for themselves which blocks are gone.
    fn keep(&mut self, _status: &Status, _evicted: &BlockSet) -> Result<()> {
        self.make_dir()
    }

    /// None that is known of: programs have forgotten what they named, or cope.
    fn uncovered(&self, status: &Status, _evicted: &BlockSet) -> Result<BlockSet> {
        Ok(BlockSet::new(status.total_blocks))
    }

    fn cover(&mut self, status: &Status, evicted: &BlockSet) -> Result<BlockSet> {
        self.uncovered(status, evicted)
    }

    fn wanted(&mut self, status: &Status, now: Instant) -> Result<Option<u32>> {
        let wants = self.read(status)?.files.into_iter().filter_map(|file| file.want).collect();
        Ok(self.wish.want(wants, status.evicted_blocks, now))
    }

    fn estimate(&self, status: &Status, evicted: &BlockSet) -> Result<Estimate> {
        let mut estimate = Estimate::default();
        let mut sets = Cost::ALL.map(|cost| (cost, BlockSet::new(status.total_blocks)));
        for (cost, range) in self.hints(status)? {
            if let Some((_, set)) = sets.iter_mut().find(|(class, _)| *class == cost) {
                set.insert(range);
            }
        }
        for (cost, set) in sets {
            let blocks = set.without(evicted).len();
            match cost {
                Cost::Free => estimate.free_blocks = blocks,
                Cost::CleanCold => estimate.clean_cold_blocks = blocks,
                Cost::CleanHot => estimate.clean_hot_blocks = blocks,
                Cost::Dirty => estimate.dirty_blocks = blocks,
            }
        }
        Ok(estimate)
    }

    fn complaints(&self, status: &Status) -> Result<Vec<AgentError>> {
        Ok(folder::read(&self.dir, status.total_blocks)?.complaints)
    }
}

/// Half of the time that the host gives is the programs', for blocks need some to go.
fn patience(status: &Status) -> Duration {
    match status.deadline_ms {
        0 => PATIENCE,
        ms => PATIENCE.min(Duration::from_millis(u64::from(ms) / 2)),
    }
}

/// Tells when a file in a directory was replaced or written.
#[derive(Debug)]
struct Watch {
    dir: PathBuf,
    inotify: OwnedFd,
}

impl Watch {
    fn of(dir: &Path) -> Result<Self> {
        let watch = |errno: Errno| AgentError::io("watch", dir, errno);
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).map_err(watch)?;
        let news = WatchFlags::MOVED_TO | WatchFlags::CLOSE_WRITE | WatchFlags::ONLYDIR;
        inotify::add_watch(&inotify, dir, news).map_err(watch)?;
        Ok(Self { dir: dir.to_owned(), inotify })
    }

    /// Whether something came within `limit`.
    fn wait(&self, limit: Duration) -> Result<bool> {
        let failed = |errno: Errno| AgentError::io("watch", &self.dir, errno);
        let limit = Timespec::try_from(limit).ok();
        match poll(&mut [PollFd::new(&self.inotify, PollFlags::IN)], limit.as_ref()) {
            Ok(0) => return Ok(false),
            Ok(_) => thread::sleep(BREATH),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(failed(errno)),
        }
        let mut events = [0; 4096];
        loop {
            match rustix::io::read(&self.inotify, &mut events) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(true),
                Err(errno) => return Err(failed(errno)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const TOTAL: u32 = 100;

    fn status(deadline_ms: u32) -> Status {
        Status {
            name: "vm1".to_owned(),
            epoch: "1".to_owned(),
            state: "shrinking".to_owned(),
            seq: 1,
            reason: "operator".to_owned(),
            deadline_ms,
            block_size: 65536,
            total_blocks: TOTAL,
            requested_blocks: 50,
            plugged_blocks: TOTAL,
            evicted_blocks: 0,
        }
    }

    fn source(dir: &Path) -> HintFiles {
        HintFiles::new("vssda", dir)
    }

    fn publish(dir: &Path, name: &str, text: &str) {
        let aside = dir.join("vssda").join(format!(".{name}"));
        fs::write(&aside, text).unwrap();
        fs::rename(&aside, dir.join("vssda").join(name)).unwrap();
    }

    fn range(start: u32, count: u32) -> BlockRange {
        BlockRange::new(start, count)
    }

    #[test]
    fn without_hints_it_waits_a_moment_and_says_that_there_are_none() {
        let dir = tempfile::tempdir().unwrap();
        let mut source = source(dir.path());
        assert_eq!(source.held(&status(0)).unwrap(), [], "before the directory is there");
        let before = Instant::now();
        let error = source.take(&status(100), &BlockSet::new(TOTAL), 50).unwrap_err();
        assert_eq!(error.code(), "E_NO_HINTS");
        let waited = before.elapsed();
        assert!(waited >= Duration::from_millis(50) && waited < PATIENCE, "{waited:?}");
    }

    #[test]
    fn hints_that_come_while_it_waits_are_taken() {
        let dir = tempfile::tempdir().unwrap();
        let mut source = source(dir.path());
        source.keep(&status(0), &BlockSet::new(TOTAL)).unwrap();
        publish(dir.path(), "old", "1 1\n");
        assert_eq!(source.held(&status(0)).unwrap(), [range(1, 1)]);
        // Whether they are replaced as they should be, or written in place.
        let place = dir.path().to_owned();
        fs::write(place.join("aside"), "7 3\n1 1\n").unwrap();
        let late = thread::spawn(move || {
            thread::sleep(Duration::from_millis(50));
            fs::rename(place.join("aside"), place.join("vssda/late")).unwrap();
            thread::sleep(Duration::from_millis(50));
            fs::write(place.join("vssda/.idle"), "20 1\n").unwrap();
            fs::write(place.join("vssda/later"), "30 1\n").unwrap();
        });
        for named in [&[range(1, 1), range(7, 3)][..], &[range(1, 1), range(7, 3), range(30, 1)]] {
            let ranges = source.take(&status(0), &BlockSet::new(TOTAL), 50).unwrap();
            assert_eq!(BlockSet::of(TOTAL, ranges), BlockSet::of(TOTAL, named.iter().copied()));
        }
        late.join().unwrap();
        // What is gone, or was offered, is no news.
        let error = source.take(&status(40), &BlockSet::of(TOTAL, [range(90, 1)]), 50).unwrap_err();
        assert_eq!(error.code(), "E_NO_HINTS");
        publish(dir.path(), "gone", "90 1\n");
        let error = source.take(&status(40), &BlockSet::of(TOTAL, [range(90, 1)]), 50).unwrap_err();
        assert_eq!(error.code(), "E_NO_HINTS");
    }

    #[test]
    fn what_could_go_is_counted_once_and_by_its_cost() {
        let dir = tempfile::tempdir().unwrap();
        let mut source = source(dir.path());
        source.keep(&status(0), &BlockSet::new(TOTAL)).unwrap();
        publish(dir.path(), "a", "cost free\n0 4\ncost clean-hot\n10 2\ncost dirty\n20 1\n");
        publish(dir.path(), "b", "2 6\nwant 9\n");
        let estimate = source.estimate(&status(0), &BlockSet::of(TOTAL, [range(0, 1)])).unwrap();
        let expected = Estimate {
            held_blocks: 0,
            free_blocks: 3,
            clean_cold_blocks: 4,
            clean_hot_blocks: 2,
            dirty_blocks: 1,
        };
        assert_eq!(estimate, expected);
        let short = Status { evicted_blocks: 20, ..status(0) };
        assert_eq!(source.wanted(&short, Instant::now()).unwrap(), Some(9));
        assert_eq!(source.wanted(&short, Instant::now()).unwrap(), None, "it has asked");
    }

    #[test]
    fn a_complaint_stands_until_its_file_is_right() {
        let dir = tempfile::tempdir().unwrap();
        let mut source = source(dir.path());
        source.keep(&status(0), &BlockSet::new(TOTAL)).unwrap();
        publish(dir.path(), "bad", "1 1\nnonsense\n");
        assert_eq!(source.held(&status(0)).unwrap(), [range(1, 1)]);
        assert_eq!(source.told.borrow().len(), 1);
        let complaints = source.complaints(&status(0)).unwrap();
        assert!(complaints[0].code() == "E_HINTS" && complaints[0].message().contains("bad: line 2"));
        publish(dir.path(), "bad", "1 1\n");
        assert_eq!(source.held(&status(0)).unwrap(), [range(1, 1)]);
        assert!(source.told.borrow().is_empty());
    }
}
