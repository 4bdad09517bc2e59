// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Runs in the guest: an application whose blocks are of the version that it wrote last, or of a later one than the last it synced.
//!
//! ```text
//! guest_versions fill DISK FIRST COUNT SEED               writes version 0 of COUNT blocks of 4 KiB, from block FIRST on
//! guest_versions run DISK FIRST COUNT SEED STOP           reads and writes some of them over and over, until the file STOP is there
//! guest_versions check DISK FIRST COUNT SEED STEPS MOST   reads all: each must be as it was after STEPS steps, or any later up to MOST
//! ```
//!
//! What is done in which step follows from SEED, so that what `run` did can be told afterwards, also of one that died. It prints
//! `synced STEPS` when all that it had written by then is durable, and at its end how many steps it made, and for how many milliseconds
//! the slowest of them took. I/O is direct.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use vssd_tests::pattern::{self, Found};
use vssd_tests::tool;

const O_DIRECT: i32 = 0o40000;
const BLOCK: usize = 4096;
/// Blocks of one request of `fill` and `check`.
const STRIDE: usize = 16;
/// Steps between two syncs.
const SYNC: u64 = 64;
/// After each: emulated processors are few.
const PAUSE: Duration = Duration::from_millis(10);

fn main() -> ExitCode {
    tool::main("guest_versions", run)
}

fn run(words: &[&str]) -> Result<()> {
    let number = |text: &str| text.parse::<u64>().with_context(|| format!("{text:?} is no number"));
    let [verb, disk, first, count, seed, rest @ ..] = words else {
        bail!("usage: fill|run|check DISK FIRST COUNT SEED …");
    };
    let (first, count, seed) = (number(first)?, number(count)?, number(seed)?);
    let area = Area { file: open(disk)?, first, seed, versions: vec![0; usize::try_from(count)?] };
    match (*verb, rest) {
        ("fill", []) => area.fill(),
        ("run", [stop]) => area.run(Path::new(stop)),
        ("check", [steps, most]) => area.check(number(steps)?, number(most)?),
        _ => bail!("usage: fill|run|check DISK FIRST COUNT SEED …"),
    }
}

fn open(disk: &str) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(O_DIRECT)
        .open(disk)
        .with_context(|| format!("open {disk}"))
}

/// Memory for direct I/O.
struct Buffer {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buffer {
    fn new(len: usize) -> Self {
        let memory = vec![0; len + BLOCK];
        let start = memory.as_ptr().align_offset(BLOCK);
        Self { memory, start, len }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..][..self.len]
    }
}

struct Area {
    file: File,
    first: u64,
    seed: u64,
    /// Of each block, as far as steps were gone through.
    versions: Vec<u32>,
}

enum Step {
    Read(usize),
    Write(usize),
}

/// What is done, in order. A sixteenth of the blocks is concerned by half of it.
fn steps(seed: u64, count: usize) -> impl Iterator<Item = Step> {
    let mut rng = StdRng::seed_from_u64(seed);
    std::iter::repeat_with(move || {
        let at = rng.random_range(0..count);
        // Four uniform numbers below one another: exact in whole numbers, on both sides alike.
        let block = (0..3).fold(at, |below, _| rng.random_range(0..=below));
        if rng.random() { Step::Write(block) } else { Step::Read(block) }
    })
}

fn pattern_of(seed: u64, version: u32) -> u64 {
    seed.wrapping_mul(0x1_0000_0001).wrapping_add(u64::from(version))
}

impl Area {
    fn offset(&self, block: usize) -> u64 {
        (self.first + block as u64) * BLOCK as u64
    }

    fn fill(&self) -> Result<()> {
        let mut buffer = Buffer::new(BLOCK * STRIDE);
        for start in (0..self.versions.len()).step_by(STRIDE) {
            let count = STRIDE.min(self.versions.len() - start);
            let bytes = &mut buffer.bytes()[..count * BLOCK];
            for (block, chunk) in (start..).zip(bytes.chunks_mut(BLOCK)) {
                pattern::fill(chunk, pattern_of(self.seed, 0), block as u64);
            }
            self.file
                .write_all_at(bytes, self.offset(start))
                .with_context(|| format!("write block {start}"))?;
        }
        Ok(self.file.sync_all()?)
    }

    fn run(mut self, stop: &Path) -> Result<()> {
        let mut buffer = Buffer::new(BLOCK);
        let (mut done, mut slowest) = (0, Duration::ZERO);
        for step in steps(self.seed, self.versions.len()) {
            let begun = Instant::now();
            self.step(&step, buffer.bytes()).with_context(|| format!("step {done}"))?;
            slowest = slowest.max(begun.elapsed());
            done += 1;
            if done % SYNC == 0 {
                self.file.sync_data().context("sync")?;
                println!("synced {done}");
                io::stdout().flush()?;
                if stop.exists() {
                    break;
                }
                thread::sleep(PAUSE);
            }
        }
        println!("steps {done} slowest_ms {}", slowest.as_millis());
        Ok(())
    }

    fn step(&mut self, step: &Step, bytes: &mut [u8]) -> Result<()> {
        match *step {
            Step::Write(block) => {
                self.versions[block] += 1;
                pattern::fill(bytes, pattern_of(self.seed, self.versions[block]), block as u64);
                self.file
                    .write_all_at(bytes, self.offset(block))
                    .with_context(|| format!("write block {block}"))
            }
            Step::Read(block) => {
                let version = self.versions[block];
                self.file
                    .read_exact_at(bytes, self.offset(block))
                    .with_context(|| format!("read block {block}"))?;
                ensure!(
                    self.is_of(bytes, block, version, version),
                    "block {block} is not of version {version}"
                );
                Ok(())
            }
        }
    }

    /// Whether these are the bytes of a block of one of these versions.
    fn is_of(&self, bytes: &[u8], block: usize, least: u32, last: u32) -> bool {
        let judge = |version| pattern::judge(bytes, pattern_of(self.seed, version), block as u64);
        (least..=last).any(|version| judge(version) == Found::Intact)
    }

    /// The versions after so many steps.
    fn after(&self, done: u64) -> Result<Vec<u32>> {
        let mut versions = vec![0; self.versions.len()];
        for step in steps(self.seed, versions.len()).take(usize::try_from(done)?) {
            if let Step::Write(block) = step {
                versions[block] += 1;
            }
        }
        Ok(versions)
    }

    fn check(&self, done: u64, most: u64) -> Result<()> {
        let (least, last) = (self.after(done)?, self.after(most)?);
        let mut buffer = Buffer::new(BLOCK * STRIDE);
        let mut wrong = Vec::new();
        for start in (0..least.len()).step_by(STRIDE) {
            let count = STRIDE.min(least.len() - start);
            let bytes = &mut buffer.bytes()[..count * BLOCK];
            self.file
                .read_exact_at(bytes, self.offset(start))
                .with_context(|| format!("read block {start}"))?;
            let is_wrong =
                |(block, bytes): &(usize, &[u8])| !self.is_of(bytes, *block, least[*block], last[*block]);
            wrong.extend((start..).zip(bytes.chunks(BLOCK)).filter(is_wrong).map(|(block, _)| block));
        }
        ensure!(
            wrong.is_empty(),
            "{} of {} blocks are older than after step {done}, or wrong: {wrong:?}",
            wrong.len(),
            least.len()
        );
        println!("blocks {} right", least.len());
        Ok(())
    }
}
