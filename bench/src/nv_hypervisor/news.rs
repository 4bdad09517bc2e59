// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the guest says, with the host's time at which it was heard: the one clock of all that is measured. A guest's own stands still
//! during an outage, or begins anew.
//!
//! The guest's port is a file of the host that QEMU appends to, so nothing has to be connected again after a cut, and what has
//! arrived there was told outside the guest.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// How often the file is looked at: the error of every time.
const STEP: Duration = Duration::from_millis(5);

/// Something that the guest said.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Word {
    /// A step is done.
    Step(String),
    /// The ledger's update to this number was acknowledged.
    Acknowledged(u64),
    /// Transactions a second since the line before, and how long the load has run, in the guest's seconds.
    Rate { tps: f64, runs: f64 },
    /// It went wrong.
    Failed(String),
}

impl Word {
    /// Of a line; what pgbench says besides is nothing.
    fn parse(line: &str) -> Option<Self> {
        let (kind, rest) = line.split_once(' ')?;
        match kind {
            "S" => Some(Self::Step(rest.to_owned())),
            "J" => Some(Self::Acknowledged(rest.parse().ok()?)),
            "E" => Some(Self::Failed(rest.to_owned())),
            "P" => {
                // progress: 12.0 s, 1234.5 tps, lat …
                let mut parts = rest.strip_prefix("progress: ")?.split(", ");
                let runs = parts.next()?.strip_suffix(" s")?.parse().ok()?;
                let tps = parts.next()?.strip_suffix(" tps")?.parse().ok()?;
                Some(Self::Rate { tps, runs })
            }
            _ => None,
        }
    }
}

/// A reader of the port's file.
#[derive(Debug)]
pub(super) struct News {
    path: PathBuf,
    file: File,
    /// The line that has not ended yet.
    rest: Vec<u8>,
    heard: Vec<(Instant, Word)>,
}

impl News {
    /// Of a file that is made.
    pub(super) fn open(path: &Path) -> Result<Self> {
        fs::write(path, "").with_context(|| format!("make {}", path.display()))?;
        let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
        Ok(Self { path: path.to_owned(), file, rest: Vec::new(), heard: Vec::new() })
    }

    /// Where a QEMU is to write.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// All that was heard so far.
    pub(super) fn heard(&self) -> &[(Instant, Word)] {
        &self.heard
    }

    /// Reads what has come.
    pub(super) fn look(&mut self) -> Result<()> {
        self.file.read_to_end(&mut self.rest).context("read what the guest says")?;
        let now = Instant::now();
        while let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=end).collect();
            self.heard.extend(Word::parse(String::from_utf8_lossy(&line).trim_end()).map(|word| (now, word)));
        }
        Ok(())
    }

    /// Listens until `found` gives a value of all that was heard; an error once the guest says that something failed. Gives nothing
    /// after `limit`.
    pub(super) fn listen<T>(
        &mut self,
        limit: Duration,
        mut found: impl FnMut(&[(Instant, Word)]) -> Option<T>,
    ) -> Result<Option<T>> {
        let begun = Instant::now();
        let mut checked = 0;
        loop {
            self.look()?;
            for (at, word) in &self.heard[checked..] {
                // The words of a life that was cut are not of this one.
                if let Word::Failed(text) = word
                    && *at >= begun
                {
                    bail!("the guest: {text}");
                }
            }
            checked = self.heard.len();
            if let Some(value) = found(&self.heard) {
                return Ok(Some(value));
            }
            if begun.elapsed() >= limit {
                return Ok(None);
            }
            std::thread::sleep(STEP);
        }
    }

    /// Waits for a step's end at or after `since`; when it was.
    pub(super) fn wait_step(&mut self, step: &str, since: Instant, limit: Duration) -> Result<Instant> {
        let found = self.listen(limit, |heard| {
            heard
                .iter()
                .find(|(at, word)| *at >= since && matches!(word, Word::Step(name) if name == step))
                .map(|(at, _)| *at)
        })?;
        found.with_context(|| format!("waited {limit:.0?} for the guest to be {step}"))
    }

    /// Listens for that long.
    pub(super) fn listen_for(&mut self, time: Duration) -> Result<()> {
        let never: Option<()> = self.listen(time, |_| None)?;
        ensure!(never.is_none(), "listening ended early");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn lines_are_read_whole_and_what_is_torn_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("news");
        let mut news = News::open(&path).unwrap();
        let mut guest = File::options().append(true).open(&path).unwrap();
        let said = "S serving\nJ 41\nP progress: 3.0 s, 812.5 tps, lat 4.9 ms stddev 1.2, 0 failed\nP scaling factor: 20\nJ 4";
        guest.write_all(said.as_bytes()).unwrap();
        news.look().unwrap();
        let words: Vec<Word> = news.heard().iter().map(|(_, word)| word.clone()).collect();
        let rate = Word::Rate { tps: 812.5, runs: 3.0 };
        assert_eq!(words, [Word::Step("serving".into()), Word::Acknowledged(41), rate]);
        guest.write_all(b"2\n").unwrap();
        news.look().unwrap();
        assert_eq!(news.heard().last().map(|(_, word)| word), Some(&Word::Acknowledged(42)));
    }

    #[test]
    fn a_guest_that_fails_ends_the_wait() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("news");
        let mut news = News::open(&path).unwrap();
        fs::write(&path, "E mount: no such file\n").unwrap();
        let error = news.wait_step("mounted", Instant::now(), Duration::from_secs(5)).unwrap_err();
        assert!(error.to_string().contains("no such file"), "{error}");
        let nothing = news.listen(Duration::from_millis(1), |_| None::<()>).unwrap();
        assert!(nothing.is_none(), "told once");
    }
}
