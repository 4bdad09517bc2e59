// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The log of events: numbered, the newest [`KEPT`] kept, encoded once for all who read it.
//!
//! This module knows neither who reads the events nor what they mean.

use std::collections::VecDeque;
use std::sync::Arc;

use serde_json::{Map, Value, json};
use vssd_protocol::control::method;

use crate::clock::rfc3339;

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
    fn new(seq: u64, unix_ms: u64, name: &str, about: About<'_>, data: Value) -> Self {
        let mut params = Map::new();
        params.insert("seq".to_owned(), seq.into());
        params.insert("time".to_owned(), rfc3339(unix_ms).into());
        params.insert("event".to_owned(), name.into());
        if let Some((key, object)) = about.object {
            params.insert(key.to_owned(), object.into());
        }
        if let Some(job) = about.job {
            params.insert("job".to_owned(), job.into());
        }
        if !data.is_null() {
            params.insert("data".to_owned(), data);
        }
        let notification = json!({ "jsonrpc": "2.0", "method": method::EVENT, "params": params });
        Self { seq, name: name.to_owned(), line: format!("{notification}\n") }
    }
}

/// What an event is about, besides its data.
#[derive(Clone, Copy, Debug, Default)]
pub struct About<'a> {
    /// What this channel calls its objects, and the name of one: `("device", "vm1")`.
    pub object: Option<(&'static str, &'a str)>,
    pub job: Option<u64>,
}

impl<'a> About<'a> {
    /// About the whole daemon.
    pub const NOTHING: Self = Self { object: None, job: None };

    pub fn object(key: &'static str, name: &'a str) -> Self {
        Self { object: Some((key, name)), job: None }
    }

    #[must_use]
    pub fn job(self, job: Option<u64>) -> Self {
        Self { job, ..self }
    }
}

/// Tells a reader how many events it was too slow for. It has the number of the newest of them.
pub fn lost(n: u64, seq: u64, unix_ms: u64) -> String {
    Entry::new(seq, unix_ms, "events.lost", About::NOTHING, json!({ "n": n })).line
}

/// The newest events.
#[derive(Debug, Default)]
pub struct EventLog {
    seq: u64,
    kept: VecDeque<Arc<Entry>>,
}

impl EventLog {
    pub fn push(&mut self, unix_ms: u64, name: &str, about: About<'_>, data: Value) {
        self.seq += 1;
        if self.kept.len() == KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back(Arc::new(Entry::new(self.seq, unix_ms, name, about, data)));
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
        (0..n).for_each(|_| log.push(0, "pool.low", About::NOTHING, Value::Null));
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
        log.push(0, "device.created", About::object("device", "vm1").job(Some(7)), json!({"x": "a\nb"}));
        log.push(1, "power.lost", About::NOTHING, Value::Null);
        let lines: Vec<&str> = log.after(0).map(|entry| entry.line.as_str()).collect();
        let device = r#""data":{"x":"a\nb"},"device":"vm1","event":"device.created","job":7,"seq":1"#;
        let rest = r#""event":"power.lost","seq":2"#;
        assert_eq!(
            lines,
            [
                format!(
                    r#"{{"jsonrpc":"2.0","method":"event","params":{{{device},"time":"{}"}}}}"#,
                    rfc3339(0)
                ) + "\n",
                format!(
                    r#"{{"jsonrpc":"2.0","method":"event","params":{{{rest},"time":"{}"}}}}"#,
                    rfc3339(1)
                ) + "\n",
            ]
        );
    }

    #[test]
    fn line_is_what_clients_of_vssds_read() {
        let mut log = EventLog::default();
        log.push(5, "device.created", About::object("device", "vm1").job(Some(7)), json!({ "x": 1 }));
        let value: Value = serde_json::from_str(&log.after(0).next().unwrap().line).unwrap();
        let event: vssd_protocol::control::Event = serde_json::from_value(value["params"].clone()).unwrap();
        assert_eq!((event.seq, event.device.as_deref(), event.job), (1, Some("vm1"), Some(7)));
        assert_eq!(serde_json::to_value(&event).unwrap(), value["params"], "and nothing besides");
    }
}
