// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Random block requests, valid and not, that can be given to any virtio-blk device, and the disk that they must leave behind.
//!
//! A trace knows what a request means, not who carries it out. What the specification leaves to the device (what a discarded
//! sector holds, what becomes of a request that a driver must not send) is followed by steps that give those sectors a
//! content again on which all devices must agree.

use std::collections::VecDeque;
use std::ops::Range;

use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

use super::queue::{SECTOR, T_DISCARD, T_FLUSH, T_GET_ID, T_IN, T_OUT, T_WRITE_ZEROES};
use crate::pattern;

/// Bytes of the disk.
pub const DISK: u64 = 16 << 20;
/// Bytes of the longest read or write.
pub const LONGEST: u64 = 256 << 10;
/// Most descriptors of one chain outside a table, and in one.
const PIECES: usize = 8;
const TABLE_PIECES: usize = 48;
const HEADER: usize = 16;
/// Set in a request's type by drivers of long ago, who asked for a barrier (virtio 1.3, §5.2.3.1).
const BARRIER: u32 = 1 << 31;
const UNMAP: u32 = 1;

/// What kind of request a step is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    Read,
    Write,
    Flush,
    GetId,
    Discard,
    Zero,
    ZeroUnmap,
    ReadNothing,
    WriteNothing,
    DiscardNothing,
    ZeroNothing,
    /// What the edges of a discard hold now.
    ReadDiscarded,
    FlushWithSector,
    FlushWithData,
    ReadPastEnd,
    WritePastEnd,
    DiscardPastEnd,
    ZeroPastEnd,
    ReadOdd,
    WriteOdd,
    ReadWithInput,
    WriteWithOutput,
    GetIdShort,
    GetIdLong,
    DiscardUnmap,
    DiscardFlags,
    ZeroFlags,
    FlagsPastEnd,
    SegmentShort,
    SegmentOdd,
    SegmentTwice,
    Unknown,
    BarrierRead,
    BarrierWrite,
}

impl Kind {
    /// A request that a driver may send: every device carries it out.
    pub fn is_valid(self) -> bool {
        self < Self::FlushWithSector
    }
}

/// How often each kind comes, besides reads and writes.
const OTHERS: &[(Kind, u32)] = &[
    (Kind::Flush, 30),
    (Kind::GetId, 10),
    (Kind::Discard, 50),
    (Kind::Zero, 30),
    (Kind::ZeroUnmap, 40),
    (Kind::ReadNothing, 5),
    (Kind::WriteNothing, 5),
    (Kind::DiscardNothing, 5),
    (Kind::ZeroNothing, 5),
    (Kind::FlushWithSector, 5),
    (Kind::FlushWithData, 5),
    (Kind::ReadPastEnd, 15),
    (Kind::WritePastEnd, 15),
    (Kind::DiscardPastEnd, 10),
    (Kind::ZeroPastEnd, 10),
    (Kind::ReadOdd, 10),
    (Kind::WriteOdd, 10),
    (Kind::ReadWithInput, 8),
    (Kind::WriteWithOutput, 8),
    (Kind::GetIdShort, 5),
    (Kind::GetIdLong, 5),
    (Kind::DiscardUnmap, 5),
    (Kind::DiscardFlags, 5),
    (Kind::ZeroFlags, 5),
    (Kind::FlagsPastEnd, 5),
    (Kind::SegmentShort, 5),
    (Kind::SegmentOdd, 5),
    (Kind::SegmentTwice, 5),
    (Kind::Unknown, 15),
    (Kind::BarrierRead, 5),
    (Kind::BarrierWrite, 5),
];

/// One request, and how it lies in memory.
#[derive(Clone, Debug)]
pub struct Step {
    pub kind: Kind,
    /// The header and what follows it for the device to read.
    pub readable: Vec<u8>,
    /// Bytes for the device to write before the status byte.
    pub writable: usize,
    /// Lengths of the descriptors of either part, the status byte included; header, data and status share descriptors.
    pub out_cuts: Vec<usize>,
    pub in_cuts: Vec<usize>,
    /// In an indirect table.
    pub table: bool,
    /// How far from a page's start the memory begins, for both parts.
    pub skew: u64,
    /// Bytes of the disk that it names, as far as they exist.
    pub bytes: Range<u64>,
    /// It may change them.
    pub changes: bool,
}

impl Step {
    /// A request over whole sectors, laid out as most drivers do.
    fn plain(kind: Kind, readable: Vec<u8>, writable: usize, bytes: Range<u64>) -> Self {
        let mut out_cuts = vec![HEADER];
        if readable.len() > HEADER {
            out_cuts.push(readable.len() - HEADER);
        }
        let in_cuts = if writable > 0 { vec![writable, 1] } else { vec![1] };
        let changes = changes(kind);
        Self { kind, readable, writable, out_cuts, in_cuts, table: false, skew: 0, bytes, changes }
    }

    pub fn read(bytes: Range<u64>) -> Self {
        let len = index(&bytes).len();
        Self::plain(Kind::Read, header(T_IN, bytes.start / SECTOR), len, bytes)
    }

    pub fn write(start: u64, data: &[u8]) -> Self {
        let bytes = start..start + data.len() as u64;
        Self::plain(Kind::Write, [&header(T_OUT, start / SECTOR), data].concat(), 0, bytes)
    }

    pub fn discard(bytes: Range<u64>) -> Self {
        let segment = segment(bytes.start / SECTOR, sectors(&bytes), 0);
        Self::plain(Kind::Discard, [header(T_DISCARD, 0), segment].concat(), 0, bytes)
    }

    /// A write-zeroes that may give the blocks back.
    pub fn zero_unmap(bytes: Range<u64>) -> Self {
        let segment = segment(bytes.start / SECTOR, sectors(&bytes), UNMAP);
        Self::plain(Kind::ZeroUnmap, [header(T_WRITE_ZEROES, 0), segment].concat(), 0, bytes)
    }
}

/// A generator of steps and the disk as they leave it.
#[derive(Debug)]
pub struct Trace {
    rng: StdRng,
    /// The unit in which a discard of the vSSD takes effect.
    block: u64,
    disk: Vec<u8>,
    forced: VecDeque<(Kind, Range<u64>)>,
    written: u64,
}

/// The disk as it must be in `bytes`.
fn index(bytes: &Range<u64>) -> Range<usize> {
    let at = |byte: u64| usize::try_from(byte).unwrap_or(usize::MAX);
    at(bytes.start)..at(bytes.end)
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = vec![0; HEADER];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

fn sectors(bytes: &Range<u64>) -> u32 {
    u32::try_from((bytes.end - bytes.start) / SECTOR).unwrap_or(u32::MAX)
}

impl Trace {
    /// A trace over a disk of zeroes.
    pub fn new(rng: StdRng, block: u64) -> Self {
        let disk = vec![0; usize::try_from(DISK).unwrap_or(0)];
        Self { rng, block, disk, forced: VecDeque::new(), written: 0 }
    }

    /// The whole disk as it must be.
    pub fn disk(&self) -> &[u8] {
        &self.disk
    }

    /// What a read of `bytes` must give.
    pub fn expected(&self, bytes: &Range<u64>) -> &[u8] {
        &self.disk[index(bytes)]
    }

    /// Whether the whole disk has a content that the specification gives.
    pub fn is_settled(&self) -> bool {
        self.forced.is_empty()
    }

    /// Steps that may be in flight together: none changes what another one names.
    pub fn batch(&mut self, most: usize) -> Vec<Step> {
        let mut steps: Vec<Step> = Vec::new();
        while steps.len() < most {
            let (kind, bytes) = match self.forced.front() {
                Some(next) => next.clone(),
                None => self.choose(),
            };
            let changes = changes(kind);
            let collides = |other: &Step| {
                (changes || other.changes) && other.bytes.start < bytes.end && bytes.start < other.bytes.end
            };
            if steps.iter().any(collides) {
                if steps.is_empty() {
                    continue;
                }
                break;
            }
            self.forced.pop_front();
            let step = self.build(kind, bytes);
            steps.push(step);
            if !self.forced.is_empty() {
                break;
            }
        }
        steps
    }

    /// Steps that read the whole disk, `most` together.
    pub fn scan(&mut self, most: usize) -> Vec<Vec<Step>> {
        let starts: Vec<u64> = (0..DISK / LONGEST).map(|i| i * LONGEST).collect();
        let read = |start: &u64| (Kind::Read, *start..start + LONGEST);
        starts
            .chunks(most)
            .map(|starts| starts.iter().map(read).map(|(kind, bytes)| self.build(kind, bytes)).collect())
            .collect()
    }

    /// Records that the device did what a valid step says. Sectors whose content is not given by the specification are
    /// looked at and written next.
    pub fn done(&mut self, step: &Step) {
        let bytes = step.bytes.clone();
        match step.kind {
            Kind::Write => self.disk[index(&bytes)].copy_from_slice(&step.readable[HEADER..]),
            Kind::Zero | Kind::ZeroUnmap => self.disk[index(&bytes)].fill(0),
            Kind::Discard => {
                let start = bytes.start.next_multiple_of(self.block);
                let end = bytes.end / self.block * self.block;
                if start >= end {
                    self.settle(bytes);
                } else {
                    self.disk[index(&(start..end))].fill(0);
                    self.settle(bytes.start..start);
                    self.settle(end..bytes.end);
                }
            }
            // Some devices carry it out.
            Kind::BarrierWrite | Kind::WriteWithOutput => self.forced.push_back((Kind::Write, bytes)),
            _ => {}
        }
    }

    /// Looks at what a discard left behind and writes it anew.
    fn settle(&mut self, bytes: Range<u64>) {
        if !bytes.is_empty() {
            self.forced.push_back((Kind::ReadDiscarded, bytes.clone()));
            self.forced.push_back((Kind::Write, bytes));
        }
    }

    /// A kind, and the bytes that it names.
    fn choose(&mut self) -> (Kind, Range<u64>) {
        let kind = match self.rng.random_range(0..100) {
            0..32 => Kind::Read,
            32..66 => Kind::Write,
            _ => OTHERS
                .choose_weighted(&mut self.rng, |(_, weight)| *weight)
                .map_or(Kind::Read, |(kind, _)| *kind),
        };
        let longest = match kind {
            Kind::Discard | Kind::ZeroUnmap | Kind::Zero => 1 << 20,
            _ => LONGEST,
        };
        // Mostly a few sectors, at times pages, at times long; whole blocks now and then.
        let (unit, units) = match self.rng.random_range(0..20) {
            0..9 => (SECTOR, self.rng.random_range(1..=16)),
            9..14 => (4096, self.rng.random_range(1..=8)),
            14..17 => (SECTOR, self.rng.random_range(1..=longest / SECTOR)),
            17..19 => (self.block, self.rng.random_range(1..=longest / self.block)),
            _ => (SECTOR, self.rng.random_range(1..=128)),
        };
        let len = unit * units;
        let start = self.rng.random_range(0..=(DISK - len) / unit) * unit;
        // Half of the requests meet in a tenth of the disk.
        let start = if self.rng.random() { start / (10 * unit) * unit } else { start };
        (kind, start..start + len)
    }

    fn content(&mut self, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        self.written += 1;
        pattern::fill(&mut bytes, 0xd1ff, self.written);
        bytes
    }

    /// A sector and a length that do not fit the disk, by little or by as much as the numbers hold.
    fn past_end(&mut self, bytes: &Range<u64>) -> u64 {
        let len = (bytes.end - bytes.start) / SECTOR;
        let end = DISK / SECTOR;
        match self.rng.random_range(0..6) {
            0 => end - len + 1,
            1 => end,
            2 => u64::MAX,
            3 => u64::MAX - len + 1,
            4 => u64::MAX / SECTOR,
            _ => self.rng.random_range(end - len + 1..u64::MAX),
        }
    }

    fn build(&mut self, kind: Kind, bytes: Range<u64>) -> Step {
        let len = bytes.end - bytes.start;
        let (sector, count) = (bytes.start / SECTOR, sectors(&bytes));
        let size = usize::try_from(len).unwrap_or(0);
        let odd = self.rng.random_range(1..511usize);
        let whole = self.rng.random::<u32>() | 2;
        let far = self.past_end(&bytes);
        let range = |kind: u32, segment: Vec<u8>| [header(kind, 0), segment].concat();
        let (readable, writable) = match kind {
            Kind::Read | Kind::ReadDiscarded => (header(T_IN, sector), size),
            Kind::Write => ([header(T_OUT, sector), self.content(len)].concat(), 0),
            Kind::Flush => (header(T_FLUSH, 0), 0),
            Kind::FlushWithSector => (header(T_FLUSH, sector), 0),
            Kind::FlushWithData => ([header(T_FLUSH, 0), self.content(len)].concat(), 0),
            Kind::GetId => (header(T_GET_ID, 0), 20),
            Kind::GetIdShort => (header(T_GET_ID, 0), odd % 20),
            Kind::GetIdLong => (header(T_GET_ID, 0), 21 + odd),
            Kind::Discard => (range(T_DISCARD, segment(sector, count, 0)), 0),
            Kind::Zero => (range(T_WRITE_ZEROES, segment(sector, count, 0)), 0),
            Kind::ZeroUnmap => (range(T_WRITE_ZEROES, segment(sector, count, UNMAP)), 0),
            Kind::ReadNothing => (header(T_IN, sector), 0),
            Kind::WriteNothing => (header(T_OUT, sector), 0),
            Kind::DiscardNothing => (range(T_DISCARD, segment(sector, 0, 0)), 0),
            Kind::ZeroNothing => (range(T_WRITE_ZEROES, segment(sector, 0, UNMAP)), 0),
            Kind::ReadPastEnd => (header(T_IN, far), size),
            Kind::WritePastEnd => ([header(T_OUT, far), self.content(len)].concat(), 0),
            Kind::DiscardPastEnd => (range(T_DISCARD, segment(far, count, 0)), 0),
            Kind::ZeroPastEnd => (range(T_WRITE_ZEROES, segment(far, count, UNMAP)), 0),
            Kind::ReadOdd => (header(T_IN, sector), size - odd),
            Kind::WriteOdd => ([header(T_OUT, sector), self.content(len - odd as u64)].concat(), 0),
            Kind::ReadWithInput => ([header(T_IN, sector), self.content(512)].concat(), size),
            Kind::WriteWithOutput => ([header(T_OUT, sector), self.content(len)].concat(), 512),
            Kind::DiscardUnmap => (range(T_DISCARD, segment(sector, count, UNMAP)), 0),
            Kind::DiscardFlags => (range(T_DISCARD, segment(sector, count, whole)), 0),
            Kind::ZeroFlags => (range(T_WRITE_ZEROES, segment(sector, count, whole)), 0),
            Kind::FlagsPastEnd => (range(T_WRITE_ZEROES, segment(far, count, whole)), 0),
            Kind::SegmentShort => (range(T_WRITE_ZEROES, segment(sector, count, 0)[..odd % 16].to_vec()), 0),
            Kind::SegmentOdd => {
                let long = [segment(sector, count, 0), vec![0; 1 + odd % 15]].concat();
                (range(T_WRITE_ZEROES, long), 0)
            }
            Kind::SegmentTwice => (range(T_DISCARD, segment(sector, count, 0).repeat(2)), 0),
            Kind::Unknown => ([header(self.unknown(), sector), self.content(len)].concat(), odd),
            Kind::BarrierRead => (header(BARRIER | T_IN, sector), size),
            Kind::BarrierWrite => ([header(BARRIER | T_OUT, sector), self.content(len)].concat(), 0),
        };
        let table = self.rng.random();
        let pieces = if table { TABLE_PIECES } else { PIECES };
        let out_cuts = self.cuts(readable.len(), pieces / 2);
        let in_cuts = self.cuts(writable + 1, pieces / 2);
        let skew = if self.rng.random() { 0 } else { self.rng.random_range(0..4096) };
        // What is refused must not have happened: a read, later, would show it.
        Step { kind, readable, writable, out_cuts, in_cuts, table, skew, changes: changes(kind), bytes }
    }

    /// A type that neither virtio-blk nor the guest channel has.
    fn unknown(&mut self) -> u32 {
        match self.rng.random_range(0..4) {
            // SCSI, flush-out, lifetime, erase and zones: types that exist and were not offered.
            0 => *[2, 3, 5, 10, 14, 15, 16, 18, 20, 22, 24, 26].choose(&mut self.rng).unwrap_or(&2),
            1 => 1 << self.rng.random_range(8..31),
            2 => self.rng.random_range(27..0x5653_0000),
            _ => self.rng.random_range(0x5654_0000..BARRIER),
        }
    }

    /// Cuts `len` bytes into descriptors.
    fn cuts(&mut self, len: usize, most: usize) -> Vec<usize> {
        let pieces = self.rng.random_range(1..=most.min(len));
        let mut cuts: Vec<usize> = (1..pieces).map(|_| self.rng.random_range(1..len)).collect();
        // As most drivers do it: the header, the data.
        if len > HEADER && self.rng.random() {
            cuts.push(HEADER);
        }
        cuts.extend([0, len]);
        cuts.sort_unstable();
        cuts.dedup();
        cuts.windows(2).map(|cut| cut[1] - cut[0]).collect()
    }
}

/// Requests of which some device may change what they name.
fn changes(kind: Kind) -> bool {
    !matches!(
        kind,
        Kind::Read
            | Kind::ReadDiscarded
            | Kind::Flush
            | Kind::GetId
            | Kind::ReadNothing
            | Kind::FlushWithSector
            | Kind::FlushWithData
            | Kind::ReadPastEnd
            | Kind::ReadOdd
            | Kind::ReadWithInput
            | Kind::BarrierRead
    )
}
