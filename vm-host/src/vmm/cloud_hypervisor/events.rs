// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What cloud-hypervisor tells of itself (`--event-monitor`; `event_monitor/` in its source): JSON objects over several lines, an empty
//! line behind each.
//!
//! They come through a named pipe that cloud-hypervisor has open for reading, too: what it says while no daemon listens waits there,
//! 64 KiB of it, and the end of cloud-hypervisor is the end of the pipe. One that finds the pipe full leaves out the rest of what it was
//! saying, so half an event is nothing unusual; no event has an empty line inside.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use rustix::fd::{AsFd, BorrowedFd};
use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat, open};
use serde::Deserialize;

use crate::vmm::News;

/// No event comes near; what is longer is none.
const LONGEST: usize = 64 << 10;
const CHUNK: usize = 16 << 10;
const GAP: &[u8] = b"\n\n";

/// As much of an event as is of use here.
#[derive(Debug, PartialEq, Eq, Deserialize)]
struct Event {
    source: String,
    event: String,
}

/// The listener's end.
#[derive(Debug)]
pub(super) struct Events {
    pipe: File,
    received: Vec<u8>,
}

impl Events {
    /// Makes the pipe, and gives its two ends: ours, and that of the hypervisor.
    pub(super) fn make(path: &Path) -> io::Result<(Self, File)> {
        mknodat(CWD, path, FileType::Fifo, Mode::from_raw_mode(0o600), 0)?;
        let ours = Self::open(path)?;
        // Both ways: one that is open for writing alone has an end when nobody reads it.
        Ok((ours, File::options().read(true).write(true).open(path)?))
    }

    /// Opens the pipe of a hypervisor that runs.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let pipe = open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { pipe: pipe.into(), received: Vec::new() })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }

    /// The news that have come; never waits. An error of `UnexpectedEof` once the hypervisor has ended.
    pub(super) fn take(&mut self) -> io::Result<Vec<News>> {
        let mut news = Vec::new();
        let ended = loop {
            let mut chunk = [0; CHUNK];
            match self.pipe.read(&mut chunk) {
                Ok(0) => break true,
                Ok(count) => news.extend(self.add(&chunk[..count])),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        };
        // The last words come before the end.
        if ended && news.is_empty() { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(news) }
    }

    fn add(&mut self, said: &[u8]) -> Vec<News> {
        self.received.extend_from_slice(said);
        let mut news = Vec::new();
        while let Some(at) = self.received.windows(GAP.len()).position(|two| two == GAP) {
            let one: Vec<u8> = self.received.drain(..at + GAP.len()).collect();
            news.extend(event_in(&one).as_ref().and_then(news_of));
        }
        if self.received.len() > LONGEST {
            self.received.clear();
        }
        news
    }
}

/// The event that these bytes end with: before it there may be the beginning of one that was not finished.
fn event_in(bytes: &[u8]) -> Option<Event> {
    // Each begins on a line of its own, unless it follows half of another.
    let starts = bytes.iter().enumerate().filter(|&(_, &byte)| byte == b'{').map(|(at, _)| at);
    starts.take(MOST_STARTS).find_map(|at| serde_json::from_slice(&bytes[at..]).ok())
}

/// An event has one object inside.
const MOST_STARTS: usize = 8;

fn news_of(event: &Event) -> Option<News> {
    match (event.source.as_str(), event.event.as_str()) {
        ("vm", "rebooted") => Some(News::Reset),
        ("vm", "shutdown") => Some(News::Shutdown),
        ("guest", "panic") => Some(News::Panicked),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const REBOOTED: &str = "{\n  \"timestamp\": {\n    \"secs\": 7,\n    \"nanos\": 1\n  },\n  \"source\": \"vm\",\n  \"event\": \"rebooted\",\n  \"properties\": null\n}\n\n";
    const PANIC: &str = "{\n  \"timestamp\": {\n    \"secs\": 8,\n    \"nanos\": 1\n  },\n  \"source\": \"guest\",\n  \"event\": \"panic\",\n  \"properties\": {\n    \"event\": \"panic\"\n  }\n}\n\n";

    fn pipe() -> (tempfile::TempDir, Events, File) {
        let dir = tempfile::tempdir().unwrap();
        let (ours, theirs) = Events::make(&dir.path().join("events")).unwrap();
        (dir, ours, theirs)
    }

    #[test]
    fn events_are_heard_however_they_are_cut_and_the_end_after_them() {
        let text = format!("{REBOOTED}{}{PANIC}", REBOOTED.replace("rebooted", "booting"));
        for cut in [1, 30, REBOOTED.len() - 1, REBOOTED.len(), text.len() - 1] {
            let (_dir, mut ours, mut theirs) = pipe();
            assert_eq!(ours.take().unwrap(), []);
            theirs.write_all(&text.as_bytes()[..cut]).unwrap();
            let mut news = ours.take().unwrap();
            theirs.write_all(&text.as_bytes()[cut..]).unwrap();
            drop(theirs);
            news.extend(ours.take().unwrap());
            assert_eq!(news, [News::Reset, News::Panicked]);
            assert_eq!(ours.take().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        }
    }

    #[test]
    fn half_an_event_and_words_between_hide_no_other() {
        for before in ["thread panicked\n", &PANIC[..PANIC.len() / 2], &REBOOTED[..20], "{{", "\n\n\n"] {
            let (_dir, mut ours, mut theirs) = pipe();
            theirs.write_all(format!("{before}{REBOOTED}").as_bytes()).unwrap();
            assert_eq!(ours.take().unwrap(), [News::Reset], "{before:?}");
        }
        let (_dir, mut ours, mut theirs) = pipe();
        for _ in 0..8 {
            theirs.write_all(&[b'x'; CHUNK]).unwrap();
            assert_eq!(ours.take().unwrap(), []);
        }
        assert!(ours.received.len() <= LONGEST);
        theirs.write_all(format!("\n\n{REBOOTED}").as_bytes()).unwrap();
        assert_eq!(ours.take().unwrap(), [News::Reset]);
    }

    #[test]
    fn what_is_said_while_nobody_listens_waits() {
        let (dir, ours, mut theirs) = pipe();
        drop(ours);
        theirs.write_all(REBOOTED.as_bytes()).unwrap();
        let mut next = Events::open(&dir.path().join("events")).unwrap();
        assert_eq!(next.take().unwrap(), [News::Reset]);
    }
}
