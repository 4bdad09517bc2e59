// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The log of events of a daemon with many threads: any of them may tell what happened, and each connection reads it at its own
//! pace, so that nothing is kept for one that is slow.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::event::{EventfdFlags, eventfd};
use serde_json::Value;

use crate::clock::Clock;
use crate::events::{About, Entry, EventLog};

/// How many events a reader takes at a time.
const BATCH: usize = 64;

/// The events of a daemon.
#[derive(Debug)]
pub struct Feed {
    clock: Clock,
    shared: Mutex<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    log: EventLog,
    /// Of readers that may still be there.
    bells: Vec<Weak<OwnedFd>>,
}

impl Feed {
    pub fn new(clock: Clock) -> Self {
        Self { clock, shared: Mutex::default() }
    }

    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    /// Writes an event down and wakes who waits for one. Never waits for a client.
    pub fn tell(&self, name: &str, about: About<'_>, data: Value) {
        let unix_ms = self.unix_ms();
        let mut shared = self.shared();
        shared.log.push(unix_ms, name, about, data);
        shared.bells.retain(|bell| bell.upgrade().is_some_and(|bell| ring(&bell)));
    }

    /// The number of the newest event; 0 before the first.
    pub fn newest(&self) -> u64 {
        self.shared().log.newest()
    }

    pub(super) fn unix_ms(&self) -> u64 {
        self.clock.unix_ms(self.clock.now_ms())
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to read; nothing yet. Gives the number of the newest event, too.
    pub(super) fn reader(&self) -> io::Result<(Reader, u64)> {
        let bell = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let mut shared = self.shared();
        shared.bells.retain(|bell| bell.strong_count() > 0);
        shared.bells.push(Arc::downgrade(&bell));
        let newest = shared.log.newest();
        Ok((Reader { bell, seen: newest }, newest))
    }
}

/// How far one connection has read.
#[derive(Debug)]
pub(super) struct Reader {
    bell: Arc<OwnedFd>,
    seen: u64,
}

/// What a reader takes at a time.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// How many events were dropped before they were read, and the number of the newest of them.
    pub(super) lost: (u64, u64),
    pub(super) entries: Vec<Arc<Entry>>,
}

impl Batch {
    pub(super) fn is_empty(&self) -> bool {
        self.lost.0 == 0 && self.entries.is_empty()
    }
}

impl Reader {
    /// Readable when there may be something new.
    pub(super) fn bell(&self) -> &OwnedFd {
        &self.bell
    }

    pub(super) fn hush(&self) {
        let mut counter = [0; 8];
        // Fails only when nobody has rung.
        let _ = rustix::io::read(&self.bell, &mut counter);
    }

    /// There may be more, though nobody will say so.
    pub(super) fn come_back(&self) {
        ring(&self.bell);
    }

    /// Goes on after event number `seq`; with one that was not given out yet, from the beginning.
    pub(super) fn seek(&mut self, seq: u64, newest: u64) {
        self.seen = if seq > newest { 0 } else { seq };
    }

    /// The next events, or none.
    pub(super) fn take(&mut self, feed: &Feed) -> Batch {
        let shared = feed.shared();
        let lost = shared.log.lost_after(self.seen);
        if lost.0 > 0 {
            self.seen = lost.1;
        }
        let entries: Vec<Arc<Entry>> = shared.log.after(self.seen).take(BATCH).map(Arc::clone).collect();
        if let Some(last) = entries.last() {
            self.seen = last.seq;
        }
        Batch { lost, entries }
    }
}

/// Always true.
fn ring(bell: &OwnedFd) -> bool {
    // Fails only when it has been rung very often, and then it rings already.
    let _ = rustix::io::write(bell, &1u64.to_ne_bytes());
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::KEPT;

    fn feed(n: usize) -> Feed {
        let feed = Feed::new(Clock::start());
        (0..n).for_each(|_| feed.tell("lamp.on", About::NOTHING, Value::Null));
        feed
    }

    fn seqs(batch: &Batch) -> Vec<u64> {
        batch.entries.iter().map(|entry| entry.seq).collect()
    }

    #[test]
    fn reader_sees_what_comes_after_it_once() {
        let feed = feed(3);
        let (mut reader, newest) = feed.reader().unwrap();
        assert!(newest == 3 && reader.take(&feed).is_empty());
        feed.tell("lamp.off", About::NOTHING, Value::Null);
        assert_eq!(seqs(&reader.take(&feed)), [4]);
        assert!(reader.take(&feed).is_empty());
        reader.seek(1, 4);
        assert_eq!(seqs(&reader.take(&feed)), [2, 3, 4]);
        reader.seek(99, 4);
        assert_eq!(seqs(&reader.take(&feed)), [1, 2, 3, 4]);
    }

    #[test]
    fn reader_that_was_away_too_long_is_told_how_much_it_missed() {
        let feed = feed(0);
        let (mut reader, _) = feed.reader().unwrap();
        (0..KEPT + 7).for_each(|_| feed.tell("lamp.on", About::NOTHING, Value::Null));
        let first = reader.take(&feed);
        assert_eq!((first.lost, first.entries[0].seq), ((7, 7), 8));
        let mut count = first.entries.len();
        loop {
            let next = reader.take(&feed);
            assert_eq!(next.lost.0, 0);
            if next.is_empty() {
                break;
            }
            count += next.entries.len();
        }
        assert_eq!(count, KEPT);
    }

    #[test]
    fn bells_of_readers_that_are_gone_are_forgotten() {
        let feed = feed(0);
        for _ in 0..10 {
            feed.reader().unwrap();
        }
        let (_kept, _) = feed.reader().unwrap();
        feed.tell("lamp.on", About::NOTHING, Value::Null);
        assert_eq!(feed.shared().bells.len(), 1);
    }
}
