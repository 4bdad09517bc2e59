// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The loop that serves one disk. It is level-triggered: each round asks what the host wants now and what is the case, and
//! remembers nothing that a crash could lose.
//!
//! ```text
//!   to give > 0:  nominate what the source holds, have it take more, nominate that, …    until the host has enough,
//!                 or nothing more can go: then say so ("end")
//!   else:         take all hints back ► read which blocks are gone ► let go of all others
//! ```

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use tracing::{debug, error, info, warn};
use vssd_protocol::units::{BlockRange, ByteCount};

use crate::blocks::BlockSet;
use crate::config::DiskConfig;
use crate::disk::{self, Disk, Status};
use crate::error::{AgentError, Result};
use crate::estimate::Estimate;
use crate::source::{self, Source};

/// News ends a wait; this is for what brings none: a file system that is mounted or has become emptier.
const IDLE: Duration = Duration::from_secs(10);
/// Though nothing seems to have changed, somebody may have deleted the balloon file.
const LOOK_AGAIN: Duration = Duration::from_secs(60);
/// For blocks that were nominated to go.
const GOING: Duration = Duration::from_secs(1);
/// For the host to give blocks back.
const GRANT: Duration = Duration::from_secs(3);
/// The driver waits for hints for three times as long.
const TICK: Duration = Duration::from_secs(1);
/// For a source to find some blocks or say that there are none.
const LONGEST: Duration = Duration::from_secs(300);
/// For a disk that is not there.
const ABSENT: Duration = Duration::from_secs(5);

/// Serves the disk called `name` for as long as this process lives.
pub(crate) fn serve(name: &str, config: &DiskConfig) -> Result<()> {
    let mut source = source::of(name, config);
    loop {
        match Disk::open(name) {
            Ok(disk) => {
                info!(disk = name, "serves");
                let (disk, source) = (Arc::new(disk), source.as_mut());
                let mut server =
                    Server { disk, source, ended: None, settled: None, told: None, reported: None };
                let gone = server.run();
                warn!(disk = name, reason = %gone, "the disk has gone");
            }
            Err(AgentError::NoDisk { .. }) => {}
            // There will be no other outcome by waiting.
            Err(error) => return Err(error),
        }
        thread::sleep(ABSENT);
    }
}

/// How a round ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Round {
    /// News are waited for.
    Over,
    /// The next one follows at once.
    GoesOn,
}

struct Server<'a> {
    disk: Arc<Disk>,
    source: &'a mut dyn Source,
    /// Session and number of the news that were answered with "end".
    ended: Option<(String, u64)>,
    /// What was the case when the balloon file was last looked at and found right, and when that was.
    settled: Option<(Status, Instant)>,
    /// The last complaint, so that each is made once.
    told: Option<String>,
    /// The session with the host, and what it was told last that could go.
    reported: Option<(String, Estimate)>,
}

impl Server<'_> {
    /// Until the disk goes.
    fn run(&mut self) -> AgentError {
        loop {
            let outcome = self.disk.look().and_then(|status| self.round(&status));
            match outcome {
                Ok(round) => {
                    self.told = None;
                    if round == Round::GoesOn {
                        continue;
                    }
                }
                Err(error @ AgentError::NoDisk { .. }) => return error,
                Err(error) => self.complain(&error),
            }
            let disk = Arc::clone(&self.disk);
            if let Err(error) = patiently(&disk, Some(TICK), || self.report()) {
                debug!(disk = self.disk.name(), %error, "cannot tell the host what could go");
            }
            if let Err(error) = self.disk.wait(IDLE) {
                return error;
            }
        }
    }

    /// Tells the host what could go, whether or not it asks for any. Nothing can where the source says why it cannot.
    fn report(&mut self) -> Result<()> {
        // Not looked at as news: those are for the next round.
        let status = disk::status(self.disk.name())?;
        let evicted = self.disk.evicted(status.total_blocks)?;
        let estimate =
            self.source.estimate(&status, &evicted).unwrap_or_default().within(status.plugged_blocks);
        let now = (status.epoch, estimate);
        if self.reported.as_ref() != Some(&now) {
            self.disk.report(&estimate)?;
            self.reported = Some(now);
        }
        Ok(())
    }

    /// Does what the host wants now.
    fn round(&mut self, status: &Status) -> Result<Round> {
        if status.to_give() > 0 {
            self.give(status).or_else(|error| self.refuse(status, error).map(|()| Round::Over))
        } else {
            // Meanwhile the host may come to want some.
            let disk = Arc::clone(&self.disk);
            patiently(&disk, Some(TICK), || self.settle(status).and_then(|()| self.ask(status)))
                .map(|()| Round::Over)
        }
    }

    fn complain(&mut self, error: &AgentError) {
        let text = error.message();
        if self.told.as_ref() != Some(&text) {
            error!(disk = self.disk.name(), code = error.code(), hint = error.hint(), "{text}");
            self.told = Some(text);
        }
    }

    /// Gives blocks until the host has what it wants, or no more can go.
    fn give(&mut self, first: &Status) -> Result<Round> {
        let name = self.disk.name().to_owned();
        let total = first.total_blocks;
        let bytes = |blocks: u32| ByteCount(u64::from(blocks) * u64::from(first.block_size));
        // Who has said that there are no more is not waited for.
        let tick = (!self.has_ended(first)).then_some(Duration::ZERO);
        if tick.is_some() {
            info!(disk = name, seq = first.seq, reason = first.reason, wanted = %bytes(first.to_give()), "the host asks for blocks back");
        }
        let mut nominated = BlockSet::new(total);
        let mut held = patiently(&self.disk, tick, || self.source.held(first))?;
        loop {
            // In this order: a block that goes in between is counted twice as going, and no block is taken in vain.
            let evicted = self.disk.evicted(total)?;
            let status = self.disk.look()?;
            let wanted = status.to_give();
            if wanted == 0 || status.total_blocks != total {
                // The next round settles. What it is about may have been looked at just now, and would not end a wait.
                return Ok(Round::GoesOn);
            }
            let new = new_of(&held, &evicted, &mut nominated);
            if !new.is_empty() {
                self.disk.hint(new)?;
            }
            let going = nominated.without(&evicted).len();
            if going >= wanted {
                self.disk.wait(GOING)?;
                // Whatever keeps them, the driver tells the host.
                if disk::status(self.disk.name())?.plugged_blocks == status.plugged_blocks {
                    return Ok(Round::Over);
                }
                continue;
            }
            held = patiently(&self.disk, tick, || self.source.take(&status, &evicted, wanted - going))?;
        }
    }

    fn has_ended(&self, status: &Status) -> bool {
        self.ended.as_ref().is_some_and(|(epoch, seq)| *epoch == status.epoch && *seq == status.seq)
    }

    /// Says to the host, once for each of its wishes, that no more can go.
    fn refuse(&mut self, status: &Status, error: AgentError) -> Result<()> {
        if !self.has_ended(status) {
            self.disk.end(status.seq, error.why(), 0)?;
            self.ended = Some((status.epoch.clone(), status.seq));
        }
        Err(error)
    }

    /// Lets go of everything that the host does not have.
    fn settle(&mut self, status: &Status) -> Result<()> {
        if self.settled.as_ref().is_some_and(|(then, at)| then == status && at.elapsed() < LOOK_AGAIN) {
            return Ok(());
        }
        self.settled = None;
        // Hints that were not used would let blocks go later that the file system has again by then.
        self.disk.clear()?;
        let evicted = self.disk.evicted(status.total_blocks)?;
        if !evicted.is_empty() {
            self.cover(status, &evicted)?;
        }
        // Some may have come back meanwhile; they are let go of now. What is news by now is for the next round, which must not be
        // kept waiting: the host may ask for some.
        let seen = disk::status(self.disk.name())?;
        let evicted = self.disk.evicted(status.total_blocks)?;
        match self.source.keep(&seen, &evicted) {
            // There is nothing to let go of, until something is mounted.
            Err(AgentError::NotMounted { .. }) if evicted.is_empty() => return Ok(()),
            other => other?,
        }
        self.settled = Some((seen, Instant::now()));
        Ok(())
    }

    /// Asks for blocks back when they are missed.
    fn ask(&mut self, status: &Status) -> Result<()> {
        match self.source.wanted(status, Instant::now())? {
            Some(blocks) => {
                info!(disk = self.disk.name(), blocks, "asks the host for blocks back");
                self.disk.pull(blocks)
            }
            None => Ok(()),
        }
    }

    /// Somebody has deleted the balloon file, or the host took blocks that the file system holds free.
    fn cover(&mut self, status: &Status, evicted: &BlockSet) -> Result<()> {
        let mut evicted = evicted.clone();
        loop {
            let missing = self.source.uncovered(status, &evicted)?;
            if missing.is_empty() {
                return Ok(());
            }
            warn!(
                disk = self.disk.name(),
                missing = missing.len(),
                "blocks that the host has may still be used here"
            );
            // It is safest to have them back: whatever the file system does with them then goes well.
            self.disk.pull(missing.len())?;
            let since = Instant::now();
            while since.elapsed() < GRANT && self.disk.look()?.evicted_blocks == evicted.len() {
                self.disk.wait(GRANT / 10)?;
            }
            let now = self.disk.evicted(status.total_blocks)?;
            if now.len() >= evicted.len() {
                break;
            }
            evicted = now;
        }
        // The host has no more. They are taken out of the file system, before it writes to them.
        let still = self.source.cover(status, &evicted)?;
        if still.is_empty() {
            return Ok(());
        }
        Err(AgentError::Uncovered { path: self.source.place()?, blocks: still.len() })
    }
}

/// Keeps the driver from giving up the wait for hints while `work` goes on, from `first` on, unless that takes longer than anything
/// may.
fn patiently<T>(disk: &Disk, first: Option<Duration>, work: impl FnOnce() -> T) -> T {
    let Some(mut pause) = first else { return work() };
    let begun = Instant::now();
    thread::scope(|scope| {
        let (working, done) = mpsc::channel::<()>();
        scope.spawn(move || {
            while begun.elapsed() < LONGEST && done.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
                pause = TICK;
                if let Err(error) = disk.still_looking() {
                    debug!(disk = disk.name(), %error, "cannot ask the driver to wait");
                }
            }
        });
        let outcome = work();
        drop(working);
        outcome
    })
}

/// What of `held` has neither gone nor been nominated; it is from now on.
fn new_of(held: &[BlockRange], evicted: &BlockSet, nominated: &mut BlockSet) -> Vec<BlockRange> {
    let mut new: Vec<BlockRange> = Vec::new();
    for range in held {
        for block in range.start..range.start.saturating_add(range.count) {
            if evicted.contains(block) || nominated.contains(block) {
                continue;
            }
            match new.last_mut() {
                Some(last) if last.start + last.count == block => last.count += 1,
                _ => new.push(BlockRange::new(block, 1)),
            }
        }
    }
    for range in &new {
        nominated.insert(*range);
    }
    new
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_is_nominated_once_and_in_order() {
        let ranges = |list: &[(u32, u32)]| -> Vec<_> {
            list.iter().map(|&(start, count)| BlockRange::new(start, count)).collect()
        };
        let evicted = BlockSet::of(20, ranges(&[(5, 2)]));
        let mut nominated = BlockSet::new(20);
        let first = new_of(&ranges(&[(10, 2), (3, 6)]), &evicted, &mut nominated);
        assert_eq!(first, ranges(&[(10, 2), (3, 2), (7, 2)]));
        assert_eq!(new_of(&ranges(&[(10, 3), (3, 6)]), &evicted, &mut nominated), ranges(&[(12, 1)]));
    }
}
