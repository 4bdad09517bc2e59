// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Random I/O that knows what every sector must hold: each write leaves its own version of each sector it covers.
//!
//! A read is never in flight together with a request that changes what it reads, so it has one right answer. Writes may be in
//! flight together with writes of the same sectors ([`Load::overlapping`]): then either may be the last, until a read tells.

use std::collections::HashMap;
use std::ops::Range;
use std::time::Instant;

use anyhow::{Result, bail, ensure};
use rand::Rng;
use rand::rngs::StdRng;

use super::PATIENCE;
use super::latency::Latency;
use super::queue::{
    Answer, Layout, Queue, S_OK, SECTOR, T_DISCARD, T_FLUSH, T_IN, T_OUT, T_WRITE_ZEROES, range_segment,
};
use super::ring::Segment;
use crate::pattern;

const SECTOR_LEN: usize = 512;
/// Bytes of the largest request.
const LARGEST: u64 = 256 << 10;
/// Most pieces of memory in one request.
const PIECES: usize = 6;

/// How the load is made.
#[derive(Clone, Debug)]
pub struct Profile {
    /// Bytes of the disk that it uses.
    pub bytes: Range<u64>,
    /// Unit of requests in bytes: the logical block.
    pub unit: u64,
    /// Unit in which a discard takes effect.
    pub block: u64,
    /// Requests in flight on each queue.
    pub depth: usize,
    /// DISCARD and WRITE_ZEROES too.
    pub zeroing: bool,
    /// Half of the chains lie in indirect tables.
    pub tables: bool,
}

#[derive(Debug)]
struct Flight {
    kind: u32,
    sectors: Range<u64>,
    memory: u64,
    version: u32,
    order: u64,
    sent: Instant,
}

/// A version of a sector and when it was answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Written {
    /// 0 is zeroes.
    version: u32,
    answered: u64,
}

/// What the load did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    pub zeroings: u64,
    /// Answers that overtook an older request of their queue.
    pub overtaken: u64,
    /// Writes sent while another write to one of their sectors was in flight.
    pub overlaps: u64,
    /// Sectors that held a mixture of writes that overlapped.
    pub mixtures: u64,
}

/// A load and its queues.
#[derive(Debug)]
pub struct Load {
    pub queues: Vec<Queue>,
    pub counts: Counts,
    /// From the making of a request to when its answer is seen.
    pub latency: Latency,
    profile: Profile,
    seed: u64,
    rng: StdRng,
    overlapping: bool,
    /// Of every sector of the range, what was written last as far as its answer tells.
    versions: Vec<Written>,
    /// What sectors may hold instead: writes that were in flight together with the last one.
    rivals: HashMap<u64, Vec<Written>>,
    /// Sectors that were found to hold some of one and some of the other.
    mixed: HashMap<u64, Vec<u8>>,
    version: u32,
    /// Counts requests and answers.
    order: u64,
    flights: HashMap<(usize, u16), Flight>,
    memory: Vec<u64>,
}

impl Load {
    /// The part of the disk that is used must hold zeroes.
    pub fn new(queues: Vec<Queue>, profile: Profile, seed: u64) -> Result<Self> {
        let sectors = usize::try_from((profile.bytes.end - profile.bytes.start) / SECTOR)?;
        let count = profile.depth * queues.len();
        let ram = &queues[0].ring.ram;
        // A page more than needed, so that requests can begin anywhere in it.
        let memory = (0..count).map(|_| ram.alloc(LARGEST + 4096, 4096)).collect();
        Ok(Self {
            queues,
            counts: Counts::default(),
            latency: Latency::default(),
            profile,
            seed,
            rng: super::rng(seed),
            overlapping: false,
            versions: vec![Written::default(); sectors],
            rivals: HashMap::new(),
            mixed: HashMap::new(),
            version: 0,
            order: 0,
            flights: HashMap::new(),
            memory,
        })
    }

    /// Lets writes be in flight together with writes of the same sectors, and aims half of all requests at a sixteenth of the
    /// range, so that this happens often.
    #[must_use]
    pub fn overlapping(mut self) -> Self {
        self.overlapping = true;
        self
    }

    /// Requests in flight.
    pub fn in_flight(&self) -> usize {
        self.flights.len()
    }

    fn content(&self, sector: u64, version: u32, bytes: &mut [u8]) {
        if version == 0 {
            bytes.fill(0);
        } else {
            pattern::fill(bytes, self.seed ^ u64::from(version) << 32, sector);
        }
    }

    fn last_of(&mut self, sector: u64) -> &mut Written {
        let index = usize::try_from(sector - self.profile.bytes.start / SECTOR).unwrap_or(usize::MAX);
        &mut self.versions[index]
    }

    /// Sends requests until every queue has its depth.
    pub fn fill(&mut self) -> Result<()> {
        for queue in 0..self.queues.len() {
            let mut tries = 4 * self.profile.depth;
            while self.queues[queue].in_flight() < self.profile.depth && tries > 0 {
                self.send(queue)?;
                tries -= 1;
            }
            self.queues[queue].ring.publish()?;
        }
        Ok(())
    }

    fn choose(&mut self) -> (u32, Range<u64>) {
        let kind = match self.rng.random_range(0..100) {
            0..45 => T_IN,
            45..90 => T_OUT,
            90..94 => T_FLUSH,
            _ if !self.profile.zeroing => T_OUT,
            94..97 => T_DISCARD,
            _ => T_WRITE_ZEROES,
        };
        if kind == T_FLUSH {
            return (kind, 0..0);
        }
        let unit = self.profile.unit;
        let longest = LARGEST / unit;
        // Mostly small, at times as large as a few blocks.
        let units = match self.rng.random_range(0..10) {
            0..5 => 1,
            5..9 => self.rng.random_range(1..=longest.min(64)),
            _ => self.rng.random_range(1..=longest),
        };
        let (first, end) = (self.profile.bytes.start / unit, self.profile.bytes.end / unit);
        let units = units.min(end - first);
        let mut start = self.rng.random_range(first..=end - units);
        if self.overlapping && self.rng.random() {
            start = first + (start - first) / 16;
        }
        let per_unit = unit / SECTOR;
        (kind, start * per_unit..(start + units) * per_unit)
    }

    fn collides(&self, kind: u32, sectors: &Range<u64>) -> bool {
        self.flights.values().any(|other| {
            (kind != T_IN || other.kind != T_IN)
                && !(self.overlapping && kind == T_OUT && other.kind == T_OUT)
                && other.sectors.start < sectors.end
                && sectors.start < other.sectors.end
        })
    }

    fn send(&mut self, queue: usize) -> Result<()> {
        let (kind, sectors) = self.choose();
        if self.collides(kind, &sectors) {
            return Ok(());
        }
        // Header, status and the pieces, if they lie in the ring itself.
        let fits = self.queues[queue].ring.free() >= PIECES + 2;
        if !fits && (!self.profile.tables || self.queues[queue].ring.free() == 0) {
            return Ok(());
        }
        let table = self.profile.tables && (!fits || self.rng.random());
        self.queues[queue].layout = if table { Layout::Table } else { Layout::Direct };
        let Some(memory) = self.memory.pop() else { return Ok(()) };
        let len = usize::try_from((sectors.end - sectors.start) * SECTOR)?;
        let mut version = 0;
        let at = memory + self.rng.random_range(0..4096);
        let (sector, data) = match kind {
            T_FLUSH => (0, Vec::new()),
            T_DISCARD | T_WRITE_ZEROES => {
                let flags = u32::from(kind == T_WRITE_ZEROES && self.rng.random());
                let segment = range_segment(sectors.start * SECTOR, len as u64, flags)?;
                self.queues[queue].ring.ram.write(at, &segment);
                (0, vec![Segment::out(at, 16)])
            }
            _ => {
                if kind == T_OUT {
                    self.version += 1;
                    version = self.version;
                    let mut bytes = vec![0; len];
                    for (sector, bytes) in sectors.clone().zip(bytes.chunks_mut(SECTOR_LEN)) {
                        self.content(sector, version, bytes);
                    }
                    self.queues[queue].ring.ram.write(at, &bytes);
                } else {
                    self.queues[queue].ring.ram.fill(at, len, 0xa5);
                }
                (sectors.start, self.pieces(at, len, kind == T_IN)?)
            }
        };
        let head = self.queues[queue].prepare(kind, sector, &data)?;
        let meets = |other: &Flight| other.sectors.start < sectors.end && sectors.start < other.sectors.end;
        if self.overlapping && kind == T_OUT && self.flights.values().any(meets) {
            self.counts.overlaps += 1;
        }
        self.order += 1;
        let flight = Flight { kind, sectors, memory: at, version, order: self.order, sent: Instant::now() };
        self.flights.insert((queue, head), flight);
        Ok(())
    }

    /// Cuts `len` bytes at `at` into pieces of odd lengths.
    fn pieces(&mut self, at: u64, len: usize, write: bool) -> Result<Vec<Segment>> {
        let mut cuts: Vec<usize> =
            (1..self.rng.random_range(1..=PIECES)).map(|_| self.rng.random_range(1..len)).collect();
        cuts.extend([0, len]);
        cuts.sort_unstable();
        cuts.dedup();
        cuts.windows(2)
            .map(|cut| Ok(Segment { addr: at + cut[0] as u64, len: u32::try_from(cut[1] - cut[0])?, write }))
            .collect()
    }

    fn settle(&mut self, queue: usize, answer: Answer) -> Result<()> {
        let Some(flight) = self.flights.remove(&(queue, answer.head)) else {
            bail!("queue {queue}: {answer:?} for a request that is not in flight");
        };
        let what = || format!("queue {queue}: {flight:?}: {answer:?}");
        ensure!(answer.status == S_OK, "{}", what());
        self.latency.add(flight.sent.elapsed());
        self.memory.push(flight.memory & !0xfff);
        if self.flights.iter().any(|((q, _), other)| *q == queue && other.order < flight.order) {
            self.counts.overtaken += 1;
        }
        match flight.kind {
            T_IN => {
                self.counts.reads += 1;
                let len = usize::try_from((flight.sectors.end - flight.sectors.start) * SECTOR)?;
                ensure!(usize::try_from(answer.written)? == len + 1, "{}", what());
                let found = self.queues[queue].ring.ram.read(flight.memory, len);
                self.compare(flight.sectors.start, &found)?;
            }
            T_OUT => {
                self.counts.writes += 1;
                self.order += 1;
                for sector in flight.sectors.clone() {
                    self.written(sector, &flight);
                }
            }
            T_FLUSH => self.counts.flushes += 1,
            kind => {
                self.counts.zeroings += 1;
                let Range { mut start, mut end } = flight.sectors;
                if kind == T_DISCARD {
                    let block = self.profile.block / SECTOR;
                    (start, end) = (start.next_multiple_of(block), end / block * block);
                }
                for sector in start..end {
                    self.settled(sector, 0);
                }
            }
        }
        Ok(())
    }

    /// A write of `sector` was answered just now. It came after all that was answered before it was sent; what was answered
    /// since may be the one that lasts.
    fn written(&mut self, sector: u64, flight: &Flight) {
        let now = Written { version: flight.version, answered: self.order };
        let before = std::mem::replace(self.last_of(sector), now);
        self.mixed.remove(&sector);
        if let Some(rivals) = self.rivals.get_mut(&sector) {
            rivals.retain(|rival| rival.answered > flight.order);
        }
        if before.answered > flight.order {
            self.rivals.entry(sector).or_default().push(before);
        }
    }

    /// Nothing is in flight to `sector`, and it holds `version`.
    fn settled(&mut self, sector: u64, version: u32) {
        self.order += 1;
        *self.last_of(sector) = Written { version, answered: self.order };
        self.rivals.remove(&sector);
        self.mixed.remove(&sector);
    }

    fn compare(&mut self, first: u64, found: &[u8]) -> Result<()> {
        let mut expected = [0; SECTOR_LEN];
        for (sector, found) in (first..).zip(found.chunks(SECTOR_LEN)) {
            let version = self.last_of(sector).version;
            self.content(sector, version, &mut expected);
            if found != expected {
                self.compare_with_rivals(sector, version, found)?;
            } else if !self.rivals.is_empty() {
                self.rivals.remove(&sector);
            }
        }
        Ok(())
    }

    /// A sector does not hold what was written to it last; it may hold what was written at the same time.
    fn compare_with_rivals(&mut self, sector: u64, version: u32, found: &[u8]) -> Result<()> {
        if self.mixed.get(&sector).is_some_and(|mixed| mixed == found) {
            return Ok(());
        }
        let rivals = self.rivals.get(&sector).cloned().unwrap_or_default();
        let candidates = rivals.iter().map(|rival| rival.version).chain([version]).map(|version| {
            let mut bytes = [0; SECTOR_LEN];
            self.content(sector, version, &mut bytes);
            (version, bytes)
        });
        let candidates: Vec<_> = candidates.collect();
        if let Some((version, _)) = candidates.iter().find(|(_, bytes)| found == bytes) {
            self.settled(sector, *version);
            return Ok(());
        }
        // No clause makes a device carry out writes of the same sectors one after the other.
        let is_mixture =
            (0..found.len()).all(|at| candidates.iter().any(|(_, bytes)| bytes[at] == found[at]));
        if !is_mixture || self.mixed.contains_key(&sector) {
            let holds = self.describe(sector, found);
            bail!("sector {sector} should hold version {version} (or {rivals:?}) and holds {holds}");
        }
        self.counts.mixtures += 1;
        self.mixed.insert(sector, found.to_vec());
        Ok(())
    }

    /// What a sector that is wrong holds instead.
    fn describe(&self, sector: u64, found: &[u8]) -> String {
        if found.iter().all(|byte| *byte == 0) {
            return "zeroes".into();
        }
        let mut bytes = [0; SECTOR_LEN];
        let older = (1..=self.version).rev().find(|version| {
            self.content(sector, *version, &mut bytes);
            found == bytes
        });
        older.map_or_else(|| "something else".into(), |version| format!("version {version}"))
    }

    /// Takes the answers that are there; waits for one if there is none.
    pub fn collect(&mut self) -> Result<usize> {
        let mut taken = self.collect_ready()?;
        if taken == 0
            && let Some(queue) = (0..self.queues.len()).find(|queue| self.queues[*queue].in_flight() > 0)
        {
            let answer = self.queues[queue].next(PATIENCE)?;
            self.settle(queue, answer)?;
            taken = 1 + self.collect_ready()?;
        }
        Ok(taken)
    }

    /// Takes the answers that are there.
    pub fn collect_ready(&mut self) -> Result<usize> {
        let mut taken = 0;
        for queue in 0..self.queues.len() {
            while let Some(answer) = self.queues[queue].try_next()? {
                self.settle(queue, answer)?;
                taken += 1;
            }
        }
        Ok(taken)
    }

    /// Writes all of the range and flushes it, so that every block has its place on the medium.
    pub fn touch_all(&mut self) -> Result<()> {
        self.drain()?;
        self.queues[0].layout = Layout::Direct;
        self.version += 1;
        let version = self.version;
        let mut at = self.profile.bytes.start;
        while at < self.profile.bytes.end {
            let len = (self.profile.bytes.end - at).min(1 << 20);
            let mut bytes = vec![0; usize::try_from(len)?];
            for (sector, bytes) in (at / SECTOR..).zip(bytes.chunks_mut(SECTOR_LEN)) {
                self.content(sector, version, bytes);
                self.settled(sector, version);
            }
            ensure!(self.queues[0].write(at, &bytes)? == S_OK, "write at {at:#x}");
            at += len;
        }
        ensure!(self.queues[0].flush()? == S_OK, "flush");
        Ok(())
    }

    /// Carries out about `requests` requests; some may be in flight at the end.
    pub fn run(&mut self, requests: usize) -> Result<()> {
        let mut done = 0;
        while done < requests {
            self.fill()?;
            done += self.collect()?;
        }
        Ok(())
    }

    /// Waits for everything in flight.
    pub fn drain(&mut self) -> Result<()> {
        while !self.flights.is_empty() {
            self.collect()?;
        }
        Ok(())
    }

    /// Reads every sector of the range and judges it.
    pub fn verify(&mut self) -> Result<()> {
        self.drain()?;
        self.queues[0].layout = Layout::Direct;
        let step = 1 << 20;
        let mut at = self.profile.bytes.start;
        while at < self.profile.bytes.end {
            let len = usize::try_from((self.profile.bytes.end - at).min(step))?;
            let read = self.queues[0].read(at, len)?;
            let found = read.map_err(|status| anyhow::anyhow!("read at {at:#x}: status {status:#x}"))?;
            self.compare(at / SECTOR, &found)?;
            at += len as u64;
        }
        Ok(())
    }
}
