// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The log of events: numbered, the newest [`KEPT`] kept, encoded once for all who read it.
//!
//! This module knows neither who reads the events nor what they mean.

use std::collections::VecDeque;
use std::sync::Arc;

use serde_json::{Value, json};
use vssd_protocol::control::{Event, method};

use super::clock::rfc3339;

/// How many events are kept for those who ask for the past.
pub const KEPT: usize = 4096;

/// One event, ready to be sent.
#[derive(Debug)]
pub struct Entry {
    pub seq: u64,
    pub name: String,
    /// The notification with its newline.
    pub line: String,
}

impl Entry {
    fn new(event: &Event) -> Self {
        let notification = json!({ "jsonrpc": "2.0", "method": method::EVENT, "params": event });
        Self { seq: event.seq, name: event.event.clone(), line: format!("{notification}\n") }
    }
}

/// Tells a reader how many events it was too slow for. It has the number of the newest of them.
pub fn lost(n: u64, seq: u64, unix_ms: u64) -> String {
    let event = Event {
        seq,
        time: rfc3339(unix_ms),
        event: "events.lost".to_owned(),
        device: None,
        job: None,
        data: json!({ "n": n }),
    };
    Entry::new(&event).line
}

/// The newest events.
#[derive(Debug, Default)]
pub struct EventLog {
    seq: u64,
    kept: VecDeque<Arc<Entry>>,
}

impl EventLog {
    pub fn push(&mut self, unix_ms: u64, event: &str, device: Option<&str>, job: Option<u64>, data: Value) {
        self.seq += 1;
        let event = Event {
            seq: self.seq,
            time: rfc3339(unix_ms),
            event: event.to_owned(),
            device: device.map(str::to_owned),
            job,
            data,
        };
        if self.kept.len() == KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back(Arc::new(Entry::new(&event)));
    }

    /// The number of the newest event; 0 before the first.
    pub fn newest(&self) -> u64 {
        self.seq
    }

    /// How many events after number `seq` are not kept any more, and the number of the newest of them.
    pub fn lost_after(&self, seq: u64) -> (u64, u64) {
        let before = self.kept.front().map_or(self.seq, |oldest| oldest.seq - 1);
        let seq = if seq > self.seq { 0 } else { seq };
        (before.saturating_sub(seq), before)
    }

    /// What is kept of the events after number `seq`, oldest first. A number that was not given out yet is of
    /// another run of the daemon: all that is kept follows it.
    pub fn after(&self, seq: u64) -> impl Iterator<Item = &Arc<Entry>> {
        let seq = if seq > self.seq { 0 } else { seq };
        let skip = self.kept.partition_point(|entry| entry.seq <= seq);
        self.kept.iter().skip(skip)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(n: u64) -> EventLog {
        let mut log = EventLog::default();
        (0..n).for_each(|_| log.push(0, "pool.low", None, None, Value::Null));
        log
    }

    #[test]
    fn oldest_events_are_dropped_numbers_go_on() {
        let log = log(KEPT as u64 + 10);
        let seqs: Vec<u64> = log.after(0).map(|entry| entry.seq).collect();
        assert_eq!((log.lost_after(0), log.lost_after(4), log.lost_after(10)), ((10, 10), (6, 10), (0, 10)));
        assert_eq!((seqs.len(), seqs[0], *seqs.last().unwrap()), (KEPT, 11, KEPT as u64 + 10));
    }

    #[test]
    fn after_skips_what_was_seen_and_distrusts_numbers_of_another_run() {
        let log = log(5);
        assert_eq!(log.after(3).map(|entry| entry.seq).collect::<Vec<_>>(), [4, 5]);
        assert_eq!(log.after(5).count(), 0);
        assert_eq!(log.after(99).count(), 5);
    }

    #[test]
    fn line_is_one_notification() {
        let mut log = EventLog::default();
        log.push(0, "device.created", Some("vm1"), Some(7), json!({"x": "a\nb"}));
        let line = &log.after(0).next().unwrap().line;
        assert_eq!(line.matches('\n').count(), 1);
        let value: Value = serde_json::from_str(line).unwrap();
        assert_eq!(value["method"], "event");
        assert_eq!(value["params"]["device"], "vm1");
    }
}
