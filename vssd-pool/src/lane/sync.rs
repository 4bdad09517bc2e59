// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Flushes that share a sync: of each medium at most one is under way in a lane, and a flush that comes meanwhile waits for it or
//! for the next. A sync covers every write that had completed when it began.

use crate::types::IoError;

/// The flushes of one medium.
#[derive(Debug, Default)]
pub(super) struct Group {
    /// How many writes the sync under way covers.
    under_way: Option<u64>,
    /// How many writes a request needs covered, and the request.
    waiting: Vec<(u64, u32)>,
}

impl Group {
    pub(super) fn join(&mut self, writes: u64, request: u32) {
        self.waiting.push((writes, request));
    }

    /// Whether a sync has to begin.
    pub(super) fn is_due(&self) -> bool {
        self.under_way.is_none() && !self.waiting.is_empty()
    }

    pub(super) fn begin(&mut self, writes: u64) {
        self.under_way = Some(writes);
    }

    /// The sync is over: reports whom it serves. A failed one serves nobody any more: what is on the medium is not known.
    pub(super) fn end(&mut self, result: Result<(), IoError>, mut over: impl FnMut(u32)) {
        let covered = self.under_way.take();
        self.waiting.retain(|&(writes, request)| {
            let is_over = result.is_err() || covered.is_some_and(|covered| writes <= covered);
            if is_over {
                over(request);
            }
            !is_over
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(group: &mut Group, result: Result<(), IoError>) -> Vec<u32> {
        let mut over = Vec::new();
        group.end(result, |request| over.push(request));
        over
    }

    #[test]
    fn flush_is_served_by_a_sync_that_began_after_its_writes_completed() {
        let mut group = Group::default();
        assert!(!group.is_due());
        group.join(5, 1);
        assert!(group.is_due());
        group.begin(6);
        assert!(!group.is_due(), "one at a time");
        for (writes, request) in [(6, 2), (7, 3), (9, 4)] {
            group.join(writes, request);
        }
        assert_eq!(ended(&mut group, Ok(())), [1, 2]);
        assert!(group.is_due());
        group.begin(9);
        assert_eq!(ended(&mut group, Ok(())), [3, 4]);
        assert!(!group.is_due());
    }

    #[test]
    fn failed_sync_fails_every_flush_that_waits() {
        let mut group = Group::default();
        group.join(1, 1);
        group.begin(1);
        group.join(2, 2);
        assert_eq!(ended(&mut group, Err(IoError::Io(5))), [1, 2]);
        assert!(!group.is_due());
    }
}
