// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A tenant who writes its name into every sector, gives blocks back in every way there is, and looks at all of a block
//! whenever it gets another: what it did not write must be zeroes.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IteratorRandom;
use serde_json::{Value, json};
use vssd_protocol::control::method;
use vssd_protocol::guest::STATUS_EVICTED;
use vssd_protocol::units::BlockRange;

use super::PATIENCE;
use super::driver::Driver;
use super::machine::{Machine, Options};
use super::probe::{Outcome, Probe, TOGETHER};
use super::queue::{S_OK, SECTOR};
use super::site::Site;
use super::trace::{Kind, Step};
use crate::wait::Deadline;

const SECTOR_LEN: usize = 512;
const MARK: &[u8; 8] = b"written:";

/// Versions of the sectors of a block; 0 is zeroes.
type Versions = Vec<u64>;

/// What all tenants did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Blocks written for the first time since they were given back.
    pub touched: u64,
    /// Blocks given back, by how.
    pub discarded: u64,
    pub zeroed: u64,
    pub unplugged: u64,
    pub deleted: u64,
    /// Blocks read whole.
    pub judged: u64,
    pub evicted_reads: u64,
}

/// A vSSD with its guest.
#[derive(Debug)]
pub struct Tenant {
    name: String,
    id: u64,
    size: u64,
    machine: Machine,
    driver: Driver,
    probe: Probe,
    /// Blocks that hold data.
    blocks: BTreeMap<u64, Versions>,
    /// Touched and not looked at since.
    unseen: BTreeSet<u64>,
    sent: Vec<Step>,
    version: u64,
}

/// What a sector holds: whose it is, which one it is, and the how-manieth write it comes from, over and over.
fn content(id: u64, sector: u64, version: u64, bytes: &mut [u8]) {
    if version == 0 {
        return bytes.fill(0);
    }
    for piece in bytes.chunks_mut(32) {
        let words = [u64::from_le_bytes(*MARK), id, sector, version];
        for (to, word) in piece.chunks_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
    }
}

/// Says whose bytes those are.
fn describe(bytes: &[u8]) -> String {
    if bytes.iter().all(|byte| *byte == 0) {
        return "zeroes".to_owned();
    }
    let word = |at: usize| bytes[at..at + 8].try_into().map_or(0, u64::from_le_bytes);
    match bytes.windows(8).position(|window| window == MARK) {
        Some(at) if at + 32 <= bytes.len() => {
            format!("sector {} of tenant {}, version {}", word(at + 16), word(at + 8), word(at + 24))
        }
        _ => "bytes of nobody".to_owned(),
    }
}

impl Tenant {
    /// Makes the vSSD `name`. `id` must be another for each vSSD that ever was.
    pub fn new(site: &mut Site, name: &str, id: u64, size: u64) -> Result<Self> {
        let options = Options { queues: 2, queue_size: 64, ..Options::default() };
        let mut machine = site.machine(name, size, options)?;
        let driver = Driver::start(machine.take_queue(0)?)?;
        let probe = Probe::new(machine.take_queue(1)?.ring);
        Ok(Self {
            name: name.to_owned(),
            id,
            size,
            machine,
            driver,
            probe,
            blocks: BTreeMap::new(),
            unseen: BTreeSet::new(),
            sent: Vec::new(),
            version: 0,
        })
    }

    /// How many blocks hold data.
    pub fn live(&self) -> usize {
        self.blocks.len()
    }

    fn block(&self) -> u64 {
        self.driver.block_size()
    }

    fn bytes(&self, block: u64) -> Range<u64> {
        block * self.block()..(block + 1) * self.block()
    }

    fn is_plugged(&self, block: u64) -> bool {
        usize::try_from(block).is_ok_and(|block| self.driver.plugged[block])
    }

    fn sectors(&self) -> usize {
        usize::try_from(self.block() / SECTOR).unwrap_or(0)
    }

    /// Sends requests, none for a block that another names: what was touched is read, blocks are touched while fewer than
    /// `budget` hold data and given back else, and some are read or written again.
    pub fn send(&mut self, rng: &mut StdRng, budget: usize, counts: &mut Counts) -> Result<()> {
        let mut named = BTreeSet::new();
        let mut steps = Vec::new();
        while steps.len() < TOGETHER
            && let Some(block) = self.unseen.pop_first()
        {
            named.insert(block);
            steps.push(Step::read(self.bytes(block)));
        }
        while steps.len() < TOGETHER {
            let block = rng.random_range(0..self.size / self.block());
            let (block, step) = if !self.is_plugged(block) {
                counts.evicted_reads += 1;
                (block, Step::read(self.bytes(block)))
            } else if self.blocks.len() < budget
                && !self.blocks.contains_key(&block)
                && rng.random_ratio(3, 4)
            {
                (block, self.touch(rng, block))
            } else {
                let Some(mine) = self.blocks.keys().choose(rng).copied() else { continue };
                match rng.random_range(0..8) {
                    0 => (block, Step::read(self.bytes(block))),
                    1 => (mine, self.touch(rng, mine)),
                    2..5 => (mine, Step::discard(self.bytes(mine))),
                    _ => (mine, Step::zero_unmap(self.bytes(mine))),
                }
            };
            if named.insert(block) {
                steps.push(step);
            }
        }
        self.sent = steps;
        self.probe.send(&self.sent)
    }

    /// Writes a part of a block.
    fn touch(&mut self, rng: &mut StdRng, block: u64) -> Step {
        let start = rng.random_range(0..self.sectors());
        let end = rng.random_range(start + 1..=self.sectors());
        let first = block * self.sectors() as u64;
        self.version += 1;
        let mut data = vec![0; (end - start) * SECTOR_LEN];
        for (sector, bytes) in (first + start as u64..).zip(data.chunks_mut(SECTOR_LEN)) {
            content(self.id, sector, self.version, bytes);
        }
        Step::write((first + start as u64) * SECTOR, &data)
    }

    /// Waits for what was sent and judges every answer.
    pub fn receive(&mut self, counts: &mut Counts) -> Result<()> {
        let steps = std::mem::take(&mut self.sent);
        let outcomes = self.probe.receive(&steps).with_context(|| self.name.clone())?;
        for (step, outcome) in steps.iter().zip(&outcomes) {
            self.judge(step, outcome, counts).with_context(|| {
                format!("tenant {} ({}): {:?} of {:x?}", self.id, self.name, step.kind, step.bytes)
            })?;
        }
        Ok(())
    }

    fn judge(&mut self, step: &Step, outcome: &Outcome, counts: &mut Counts) -> Result<()> {
        let block = step.bytes.start / self.block();
        ensure!(outcome.tail_is_untouched(), "more was written than `used.len` says: {}", outcome.used);
        if !self.is_plugged(block) {
            ensure!(outcome.status == STATUS_EVICTED, "status {:#x} for an unplugged block", outcome.status);
            ensure!(outcome.is_untouched() && outcome.used <= 1, "EVICTED, and bytes were written");
            return Ok(());
        }
        ensure!(outcome.status == S_OK, "status {:#x}", outcome.status);
        match step.kind {
            Kind::Read => {
                ensure!(usize::try_from(outcome.used)? == step.writable + 1, "used.len {}", outcome.used);
                counts.judged += 1;
                self.judge_block(block, &outcome.data)?;
            }
            Kind::Write => {
                let mut fresh = vec![0; self.sectors()];
                let versions = self.blocks.entry(block).or_insert_with(|| {
                    counts.touched += 1;
                    std::mem::take(&mut fresh)
                });
                let version = step.readable[16 + 24..16 + 32].try_into().map(u64::from_le_bytes)?;
                let start = usize::try_from(step.bytes.start % self.driver.block_size() / SECTOR)?;
                let count = (step.readable.len() - 16) / SECTOR_LEN;
                versions[start..start + count].fill(version);
                self.unseen.insert(block);
            }
            Kind::Discard | Kind::ZeroUnmap => {
                let gone =
                    if step.kind == Kind::Discard { &mut counts.discarded } else { &mut counts.zeroed };
                *gone += u64::from(self.blocks.remove(&block).is_some());
            }
            other => bail!("{other:?} was not sent"),
        }
        Ok(())
    }

    fn judge_block(&self, block: u64, found: &[u8]) -> Result<()> {
        let mut expected = [0; SECTOR_LEN];
        let versions = self.blocks.get(&block);
        for (index, found) in found.chunks(SECTOR_LEN).enumerate() {
            let sector = block * self.sectors() as u64 + index as u64;
            let version = versions.map_or(0, |versions| versions[index]);
            content(self.id, sector, version, &mut expected);
            ensure!(
                found == expected,
                "sector {sector} should hold version {version} and holds {}",
                describe(found)
            );
        }
        Ok(())
    }

    /// Lets the operator shrink the vSSD by `count` blocks, which go with what they hold, or grow it back.
    pub fn resize(
        &mut self,
        site: &mut Site,
        rng: &mut StdRng,
        count: u32,
        counts: &mut Counts,
    ) -> Result<()> {
        let plugged = self.driver.count();
        let target = if plugged < self.driver.hello.total_blocks {
            self.driver.hello.total_blocks
        } else {
            plugged - count
        };
        let job = site.operator.resize(&self.name, u64::from(target) * self.block(), &json!({}))?;
        // What holds data first: those blocks are to change hands.
        let mut mine = self.blocks.keys().copied().choose_multiple(rng, count as usize);
        mine.sort_unstable();
        let mut choose = |driver: &Driver, count: u32| {
            let held = mine.iter().filter_map(|block| u32::try_from(*block).ok());
            let others = driver.present().rev().filter(|block| !mine.contains(&u64::from(*block)));
            let still = |block: &u32| driver.plugged[*block as usize];
            let blocks = held.filter(still).chain(others).take(count as usize);
            blocks.map(|block| BlockRange::new(block, 1)).collect()
        };
        let deadline = Deadline::after(PATIENCE);
        while self.driver.count() != target {
            self.driver.live(&mut choose, Duration::from_millis(100))?;
            ensure!(!deadline.passed(), "{}: {} blocks, not {target}", self.name, self.driver.count());
        }
        site.operator.finish(job.id)?;
        let before = self.blocks.len();
        let plugged = &self.driver.plugged;
        self.blocks.retain(|block, _| usize::try_from(*block).is_ok_and(|block| plugged[block]));
        self.unseen.retain(|block| usize::try_from(*block).is_ok_and(|block| plugged[block]));
        counts.unplugged += (before - self.blocks.len()) as u64;
        Ok(())
    }

    /// Deletes the vSSD and makes another of the same name, for somebody else.
    pub fn replace(self, site: &mut Site, id: u64, counts: &mut Counts) -> Result<Self> {
        counts.deleted += self.blocks.len() as u64;
        let (name, size) = (self.name.clone(), self.size);
        drop(self);
        let params = json!({ "name": name, "force": true });
        let deadline = Deadline::after(PATIENCE);
        // The daemon notices the end of the connection in its own time.
        deadline.poll(&format!("{name} to be deleted"), || {
            match site.operator.call::<Value>(method::DEVICE_DELETE, &params) {
                Ok(_) => Ok(Some(())),
                Err(error) if format!("{error:#}").starts_with("E_IN_USE") => Ok(None),
                Err(error) => Err(error),
            }
        })?;
        Self::new(site, &name, id, size)
    }

    /// Goes on with another daemon.
    pub fn reconnect(&mut self) -> Result<()> {
        self.machine.reconnect()
    }

    /// Reads every block that holds data.
    pub fn verify(&mut self, counts: &mut Counts) -> Result<()> {
        let blocks: Vec<u64> = self.blocks.keys().copied().collect();
        for blocks in blocks.chunks(TOGETHER) {
            self.sent = blocks.iter().map(|block| Step::read(self.bytes(*block))).collect();
            self.probe.send(&self.sent)?;
            self.receive(counts)?;
        }
        Ok(())
    }
}
