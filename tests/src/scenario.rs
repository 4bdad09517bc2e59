// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What most scenarios with a guest do: a pool with vSSDs on the host, our driver bound in the guest, hints, and a look at
//! every block from both sides.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::backend::{Backend, control_socket, device_socket, pool_command};
use crate::ctl::Ctl;
use crate::guest::Guest;
use crate::image::{GuestImage, ImageBuilder};
use crate::kernel::Kernel;
use crate::mock::operator::Operator;
use crate::paths;
use crate::scratch::Scratch;
use crate::wait::Deadline;

/// Where the driver puts its files.
const PROC: &str = "/proc/vssd";
/// Enough for a scan of a gigabyte under emulation.
const SCAN: Duration = Duration::from_secs(120);
/// What a guest's driver says when a read meets an evicted block.
pub const ENODATA: &str = "61";

/// `count` blocks from `start` on.
pub type Range = (u64, u64);

/// A daemon that serves a pool on a file, and the operator's command for it.
#[derive(Debug)]
pub struct PoolHost {
    pub daemon: Backend,
    pub ctl: Ctl,
    pub pool: PathBuf,
    runtime: PathBuf,
}

/// What a new pool lies on.
#[derive(Clone, Copy, Debug)]
pub enum Medium {
    Nvram,
    Ssd,
}

impl Medium {
    /// The option of `vssd-backend pool create`.
    pub fn option(self) -> &'static str {
        match self {
            Self::Nvram => "--nvram",
            Self::Ssd => "--ssd",
        }
    }

    /// What a daemon may come to keep, in KiB: in each worker, a worker a processor, up to 64 buffers of 64 KiB for requests of odd
    /// alignment, and for each of 256 transfers two lists of 2 KiB of the guest's buffers. How soon all of them are there depends
    /// on the disk.
    pub fn kept_buffers_kib(self) -> u64 {
        match self {
            Self::Nvram => 0,
            Self::Ssd => {
                ((64 * 64 + 256 * 4) * thread::available_parallelism().map_or(1, NonZeroUsize::get)) as u64
            }
        }
    }
}

impl PoolHost {
    /// Makes a pool of `size` (`2G`) and serves it.
    pub fn new(scratch: &Scratch, medium: Medium, size: &str) -> Result<Self> {
        Self::with(scratch, medium, size, &[])
    }

    /// The same, with more options for the daemon.
    pub fn with(scratch: &Scratch, medium: Medium, size: &str, options: &[&str]) -> Result<Self> {
        let pool = scratch.join("pool");
        pool_command(&["create", medium.option(), &format!("{}:{size}", pool.display())])?;
        let runtime = scratch.join("run");
        let daemon = Backend::pool(&[&pool], &runtime, &scratch.join("backend.log"))?
            .args(options.iter().copied())
            .started()?;
        Ok(Self { daemon, ctl: Ctl::new(&control_socket(&runtime))?, pool, runtime })
    }

    /// Where its sockets are.
    pub fn runtime(&self) -> &Path {
        &self.runtime
    }

    /// Makes a vSSD; `options` as for `balloon-ctl create`. Gives its socket.
    pub fn create(&self, name: &str, options: &[&str]) -> Result<PathBuf> {
        self.ctl.ok(&[&["create", name], options].concat())?;
        Ok(device_socket(&self.runtime, name))
    }

    /// An operator's program beside [`PoolHost::ctl`].
    pub fn operator(&self) -> Result<Operator> {
        Operator::connect(&control_socket(&self.runtime))
    }

    /// What the daemon says of a vSSD.
    pub fn show(&self, name: &str) -> Result<Value> {
        let mut shown = self.ctl.ok(&["show", name])?;
        Ok(shown.get_mut("device").map(Value::take).unwrap_or(shown))
    }

    /// What becomes of a shrink or grow (`verb`) that may be partial or refused: the state of its job.
    pub fn try_resize(&self, verb: &str, name: &str, bytes: u64) -> Result<String> {
        let run = self.ctl.run(&[verb, name, &bytes.to_string(), "--wait"])?;
        let job = run.documents.iter().find_map(|said| find(said, "job"));
        let state = job.and_then(|job| job["state"].as_str());
        state.map(str::to_owned).with_context(|| format!("{verb} {bytes}: {} {}", run.code, run.stderr))
    }

    /// The blocks that the daemon holds for unplugged.
    pub fn evicted(&self, name: &str) -> Result<Vec<Range>> {
        let said = self.ctl.ok(&["evicted", name])?;
        let ranges = find(&said, "ranges").and_then(Value::as_array).context("no ranges")?;
        ranges
            .iter()
            .map(|range| Some((range["start"].as_u64()?, range["count"].as_u64()?)))
            .collect::<Option<Vec<_>>>()
            .with_context(|| format!("not ranges: {said}"))
    }

    /// Ends the daemon in order and checks the pool: sound, nothing owned twice.
    pub fn finish(&mut self) -> Result<()> {
        let status = self.daemon.terminate()?;
        ensure!(status.success(), "the daemon ended with {status}\n{}", self.daemon.log());
        self.daemon.expect_clean_log()?;
        self.check()
    }

    /// `vssd-backend pool check`.
    pub fn check(&self) -> Result<()> {
        pool_command(&["check", &self.pool.to_string_lossy()]).map(drop)
    }
}

/// Looks a key up wherever it is in a document.
pub fn find<'a>(document: &'a Value, key: &str) -> Option<&'a Value> {
    match document {
        Value::Object(map) => map.get(key).or_else(|| map.values().find_map(|value| find(value, key))),
        Value::Array(list) => list.iter().find_map(|value| find(value, key)),
        _ => None,
    }
}

/// A guest image with our driver and the block tool.
pub fn image(kernel: &Kernel) -> Result<GuestImage> {
    builder(kernel)?.driver()?.build()
}

/// A guest image with the stock drivers and the block tool.
pub fn stock_image(kernel: &Kernel) -> Result<GuestImage> {
    builder(kernel)?.build()
}

fn builder(kernel: &Kernel) -> Result<ImageBuilder> {
    let tool = paths::artifact("vssd-tests", "guest_blocks")?;
    Ok(ImageBuilder::new(kernel).file("/tools/guest_blocks", &tool))
}

/// A vSSD with our driver in a guest.
#[derive(Clone, Debug)]
pub struct Disk {
    /// The guest's name for it, `vssda`.
    pub name: String,
    pub block_size: u64,
    pub total_blocks: u64,
}

/// The outcome of reading every block.
#[derive(Clone, Debug, Default)]
pub struct Scan {
    /// Outcome (`intact`, `zero`, `wrong`, an errno) to ranges.
    pub outcomes: BTreeMap<String, Vec<Range>>,
}

impl Scan {
    pub fn blocks(&self, outcome: &str) -> u64 {
        blocks(self.ranges(outcome))
    }

    pub fn ranges(&self, outcome: &str) -> &[Range] {
        self.outcomes.get(outcome).map_or(&[], Vec::as_slice)
    }
}

/// How many blocks ranges hold.
pub fn blocks(ranges: &[Range]) -> u64 {
    ranges.iter().map(|(_, count)| count).sum()
}

/// Sorted and merged, so that equal sets are equal.
pub fn normal(mut ranges: Vec<Range>) -> Vec<Range> {
    ranges.sort_unstable();
    let mut merged: Vec<Range> = Vec::with_capacity(ranges.len());
    for (start, count) in ranges {
        match merged.last_mut() {
            Some((first, len)) if *first + *len == start => *len += count,
            _ => merged.push((start, count)),
        }
    }
    merged
}

/// Loads our driver and hands it machine disk number `index`.
pub fn bind(guest: &mut Guest, index: usize) -> Result<Disk> {
    guest.ok("modprobe vssd")?;
    let stock = guest.disk(index)?;
    guest.ok(&format!("vssd-bind {stock}"))?;
    disk(guest, index)
}

/// The disk that our driver serves for machine disk number `index`.
pub fn disk(guest: &mut Guest, index: usize) -> Result<Disk> {
    let deadline = Deadline::after(Duration::from_secs(20));
    let name = deadline.poll("our driver to serve the disk", || {
        Ok(guest.disk(index).ok().filter(|name| name.starts_with("vssd")))
    })?;
    let mut disk = Disk { name, block_size: 0, total_blocks: 0 };
    let status = disk.status(guest)?;
    disk.block_size = number(&status, "block_size")?;
    disk.total_blocks = number(&status, "total_blocks")?;
    Ok(disk)
}

/// A number from the driver's status.
pub fn number(status: &BTreeMap<String, String>, key: &str) -> Result<u64> {
    let text = status.get(key).with_context(|| format!("the driver's status has no {key}: {status:?}"))?;
    text.parse().with_context(|| format!("{key} is {text:?}"))
}

impl Disk {
    fn file(&self, name: &str) -> String {
        format!("{PROC}/{}/{name}", self.name)
    }

    /// `/proc/vssd/<disk>/status` as keys and values.
    pub fn status(&self, guest: &mut Guest) -> Result<BTreeMap<String, String>> {
        let text = guest.ok(&format!("cat {}", self.file("status")))?;
        let pairs = text.lines().filter_map(|line| line.split_once(' '));
        Ok(pairs.map(|(key, value)| (key.to_owned(), value.trim().to_owned())).collect())
    }

    /// Blocks that the driver holds for plugged.
    pub fn plugged(&self, guest: &mut Guest) -> Result<u64> {
        number(&self.status(guest)?, "plugged_blocks")
    }

    /// The blocks that the driver holds for unplugged.
    pub fn evicted(&self, guest: &mut Guest) -> Result<Vec<Range>> {
        let text = guest.ok(&format!("cat {}", self.file("evicted")))?;
        parse_ranges(&text)
    }

    /// Writes hints, most expendable first.
    pub fn hint(&self, guest: &mut Guest, ranges: &[Range]) -> Result<()> {
        let lines: String = ranges.iter().map(|(start, count)| format!("{start} {count}\n")).collect();
        guest.write_file(&self.file("hints"), lines.as_bytes())
    }

    /// Takes all hints back.
    pub fn clear_hints(&self, guest: &mut Guest) -> Result<()> {
        guest.ok(&format!("echo clear > {}", self.file("hints"))).map(drop)
    }

    /// Writes the test pattern to ranges. An error unless every block was written.
    pub fn fill(&self, guest: &mut Guest, seed: u64, ranges: &[Range]) -> Result<()> {
        for (start, count) in ranges {
            let command =
                format!("guest_blocks fill /dev/{} {} {seed} {start} {count}", self.name, self.block_size);
            let said = guest.sh_within(&command, SCAN)?.check()?.text();
            ensure!(*count == 0 || said == format!("written {start} {count}"), "fill said: {said}");
        }
        Ok(())
    }

    /// Reads every block.
    pub fn scan(&self, guest: &mut Guest, seed: u64) -> Result<Scan> {
        let command = format!("guest_blocks scan /dev/{} {} {seed}", self.name, self.block_size);
        let text = guest.sh_within(&command, SCAN)?.check()?.text();
        let mut scan = Scan::default();
        for line in text.lines() {
            let (outcome, range) = line.split_once(' ').with_context(|| format!("scan said {line:?}"))?;
            scan.outcomes.entry(outcome.to_owned()).or_default().extend(parse_ranges(range)?);
        }
        let seen: u64 = scan.outcomes.values().map(|ranges| blocks(ranges)).sum();
        ensure!(seen == self.total_blocks, "scan saw {seen} of {} blocks", self.total_blocks);
        Ok(scan)
    }

    /// Waits until the driver holds `plugged` blocks.
    pub fn wait_plugged(&self, guest: &mut Guest, plugged: u64) -> Result<Duration> {
        let start = Instant::now();
        let what = format!("{} to hold {plugged} blocks", self.name);
        Deadline::after(Duration::from_secs(30)).until(&what, || Ok(self.plugged(guest)? == plugged))?;
        Ok(start.elapsed())
    }

    /// Checks that driver and daemon hold the same blocks for unplugged, and that reading every block says the same:
    /// exactly those answer ENODATA. Gives the scan.
    pub fn agree(&self, guest: &mut Guest, host: &PoolHost, name: &str, seed: u64) -> Result<Scan> {
        let (guests, hosts) = (normal(self.evicted(guest)?), normal(host.evicted(name)?));
        ensure!(guests == hosts, "the driver says {guests:?} are evicted, the daemon {hosts:?}");
        let scan = self.scan(guest, seed)?;
        let failing = normal(scan.ranges(ENODATA).to_vec());
        ensure!(failing == guests, "evicted are {guests:?}, ENODATA is answered by {failing:?}");
        let known = ["intact", "zero", ENODATA];
        if let Some((outcome, ranges)) =
            scan.outcomes.iter().find(|(word, _)| !known.contains(&word.as_str()))
        {
            bail!("blocks {ranges:?} answer {outcome}");
        }
        Ok(scan)
    }
}

fn parse_ranges(text: &str) -> Result<Vec<Range>> {
    text.lines()
        .filter(|line| !line.trim().is_empty())
        .map(|line| {
            let (start, count) =
                line.trim().split_once(' ').with_context(|| format!("no range: {line:?}"))?;
            Ok((start.parse()?, count.trim().parse()?))
        })
        .collect()
}
