// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Agent-only mode: a vSSD under a driver that knows nothing of vSSDs, Linux's `virtio_blk`.
//!
//! ```text
//!   host ── "use no more than n blocks" ──► line ──► serve ──► balloon file takes the rest ──► discard ──► pool
//!   host ◄── "so much is held" ─────────── line ◄──────┘
//! ```
//!
//! The blocks of the balloon file stay the guest's: nothing becomes an error, whoever uses them. They are only kept from being
//! used, and discarded, so that the pool has the space. The same file and the same file systems as with our driver, but for
//! one thing: where blocks of the disk are unplugged already, which is known to our driver alone, nothing is let go of.

mod line;

use std::thread;
use std::time::{Duration, Instant};

use tracing::{debug, error, info, warn};
use vssd_protocol::letter::{Letter, Notice, Report, Shortfall};
use vssd_protocol::units::{BlockRange, ByteCount};

use self::line::Line;
pub(crate) use self::line::list_besides;
use crate::blocks::BlockSet;
use crate::config::{DiskConfig, Kind};
use crate::disk::{self, Status};
use crate::error::{AgentError, Result};
use crate::source::Source;
use crate::source::filesystem::Filesystem;
use crate::why::Why;

/// How often the host is asked: it cannot call.
const POLL: Duration = Duration::from_secs(5);
/// Complaints that change every time are not repeated sooner.
const COMPLAIN: Duration = Duration::from_secs(60);

/// Serves the disk `name` until it is gone.
pub(crate) fn serve(name: &str, config: &DiskConfig) -> Result<()> {
    let _lock = disk::lock(name)?;
    let mut line = match Line::open(name) {
        Err(AgentError::NoDisk { .. }) => return Ok(()),
        other => other?,
    };
    info!(disk = name, "serves without a driver that knows vSSDs");
    let mut server = Server {
        name,
        source: Filesystem::new(name, config),
        may_use: config.source == Kind::Filesystem,
        discarded: None,
        trimmed: 0,
        told: None,
    };
    let mut told: Option<Report> = None;
    loop {
        match line.exchange(told.map_or(Letter::Ask, Letter::Report)) {
            Ok(notice) => {
                let report = match server.round(&line, notice) {
                    Err(AgentError::NoDisk { .. }) => return Ok(()),
                    other => other?,
                };
                // What came of a wish is for the host to know at once.
                let news = |report: Report| (report.seq, report.shortfall, report.held, report.want);
                let is_news = told.map(news) != Some(news(report));
                told = Some(report);
                if is_news {
                    continue;
                }
            }
            Err(AgentError::NoDisk { .. }) => return Ok(()),
            Err(error) => server.complain(&error),
        }
        thread::sleep(POLL);
    }
}

/// What the host wishes of a disk that need not be served by this process.
pub(crate) fn status(name: &str) -> Result<Status> {
    let mut line = Line::open(name)?;
    let notice = line.exchange(Letter::Ask)?;
    let block_size = 1u32 << notice.block_shift;
    let status = status_of(name, block_size, blocks_of(line.size()?, block_size));
    let requested_blocks = notice.soft_blocks.unwrap_or(u32::MAX).min(status.total_blocks);
    Ok(Status { requested_blocks, ..status })
}

struct Server<'a> {
    name: &'a str,
    source: Filesystem,
    /// The disk is used as something that this mode can serve.
    may_use: bool,
    /// Blocks of the balloon file that were discarded, since this process began.
    discarded: Option<BlockSet>,
    /// The notice for which free space was discarded; 0: none.
    trimmed: u8,
    told: Option<(String, Instant)>,
}

impl Server<'_> {
    /// Does what the host wishes, and says what came of it.
    fn round(&mut self, line: &Line, notice: Notice) -> Result<Report> {
        let block_size = 1u32 << notice.block_shift;
        let total = blocks_of(line.size()?, block_size);
        let status = status_of(self.name, block_size, total);
        let mut report = Report { seq: notice.seq, ..Report::default() };
        if let Err(error) = self.converge(line, notice, &status) {
            if matches!(error, AgentError::NoDisk { .. }) {
                return Err(error);
            }
            report.shortfall = match error.why() {
                Why::Nothing => Shortfall::Nothing,
                Why::Busy => Shortfall::Busy,
                Why::Policy => Shortfall::Policy,
                Why::Error => Shortfall::Error,
            };
            if !matches!(error, AgentError::NotMounted { .. }) || notice.soft_blocks.is_some() {
                self.complain(&error);
            }
        }
        let gone = BlockSet::new(total);
        if let Ok(estimate) = self.source.estimate(&status, &gone) {
            report.held = estimate.held_blocks;
            report.free = estimate.free_blocks.min(total - estimate.held_blocks.min(total));
        }
        let held = Status { evicted_blocks: report.held, ..status };
        if let Ok(Some(blocks)) = self.source.wanted(&held, Instant::now()) {
            report.want = blocks;
        }
        Ok(report)
    }

    /// Has the balloon file hold what the guest is not to use, and no more.
    fn converge(&mut self, line: &Line, notice: Notice, status: &Status) -> Result<()> {
        let wish = notice.soft_blocks.map_or(0, |soft| status.total_blocks.saturating_sub(soft));
        if wish > 0 && !self.may_use {
            let what = "is no file system, and only those can be served without the driver".to_owned();
            return Err(AgentError::Unsuitable { path: line.path().to_owned(), what });
        }
        if notice.has_holes {
            // The balloon file may be all that keeps the file system from unplugged blocks.
            let what = "has unplugged blocks, of which only the driver knows: load it, or grow the vSSD back"
                .to_owned();
            return if wish == 0 {
                Ok(())
            } else {
                Err(AgentError::Unsuitable { path: line.path().to_owned(), what })
            };
        }
        let none = BlockSet::new(status.total_blocks);
        if wish > 0 && self.trimmed != notice.seq {
            self.source.trim()?;
            self.trimmed = notice.seq;
        }
        let mut outcome = Ok(());
        let mut held = match self.source.held(status) {
            // There is nothing to let go of, until something is mounted.
            Err(AgentError::NotMounted { .. }) if wish == 0 => return Ok(()),
            other => BlockSet::of(status.total_blocks, other?),
        };
        let before = held.len();
        while held.len() < wish && outcome.is_ok() {
            match self.source.take(status, &none, wish - held.len()) {
                Ok(ranges) => held = BlockSet::of(status.total_blocks, ranges),
                Err(error) => outcome = Err(error),
            }
        }
        if held.len() > wish {
            held = first(&held, wish, status.total_blocks);
            self.source.keep(status, &held)?;
        } else {
            held = BlockSet::of(status.total_blocks, self.source.held(status)?);
        }
        if held.len() != before {
            let bytes = |blocks: u32| ByteCount(u64::from(blocks) * u64::from(status.block_size));
            info!(disk = self.name, held = %bytes(held.len()), wished = %bytes(wish), "free space changed hands");
        }
        let known = self.discarded.take().unwrap_or_else(|| BlockSet::new(status.total_blocks));
        let fresh = held.without(&known);
        if !fresh.is_empty() {
            match line.discard(status.block_size.into(), fresh.ranges()) {
                // Some kernels let nobody write to a mounted disk. What was free when it was trimmed is discarded anyway.
                Err(error) if error.is_forbidden() => debug!(disk = self.name, %error, "only trimmed"),
                other => other?,
            }
        }
        self.discarded = Some(held);
        outcome
    }

    fn complain(&mut self, error: &AgentError) {
        let text = error.message();
        if self.told.as_ref().is_none_or(|(told, at)| *told != text && at.elapsed() >= COMPLAIN) {
            if matches!(error, AgentError::NotMounted { .. }) {
                warn!(disk = self.name, code = error.code(), hint = error.hint(), "{text}");
            } else {
                error!(disk = self.name, code = error.code(), hint = error.hint(), "{text}");
            }
            self.told = Some((text, Instant::now()));
        }
    }
}

fn blocks_of(size: u64, block_size: u32) -> u32 {
    u32::try_from(size / u64::from(block_size)).unwrap_or(u32::MAX)
}

/// What the driver would say, as far as sources ask.
fn status_of(name: &str, block_size: u32, total: u32) -> Status {
    Status {
        name: name.to_owned(),
        epoch: String::new(),
        state: "agent-only".to_owned(),
        seq: 0,
        reason: String::new(),
        deadline_ms: 0,
        block_size,
        total_blocks: total,
        requested_blocks: total,
        plugged_blocks: total,
        evicted_blocks: 0,
    }
}

/// The lowest `count` blocks.
fn first(set: &BlockSet, count: u32, total: u32) -> BlockSet {
    let mut left = count;
    let ranges = set.ranges().map_while(|range| {
        let taken = range.count.min(left);
        left -= taken;
        (taken > 0).then(|| BlockRange::new(range.start, taken))
    });
    BlockSet::of(total, ranges)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_blocks_are_kept() {
        let ranges = [BlockRange::new(2, 3), BlockRange::new(9, 4)];
        let set = BlockSet::of(20, ranges);
        for (count, kept) in [(0, vec![]), (2, vec![BlockRange::new(2, 2)]), (3, vec![ranges[0]])] {
            assert_eq!(first(&set, count, 20).ranges().collect::<Vec<_>>(), kept);
        }
        assert_eq!(
            first(&set, 5, 20).ranges().collect::<Vec<_>>(),
            [BlockRange::new(2, 3), BlockRange::new(9, 2)]
        );
        assert_eq!(first(&set, 90, 20), set);
    }
}
