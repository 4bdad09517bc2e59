// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Gives the steps of a trace to one device and tells what came back, to the last byte of the memory around it.

use std::collections::HashMap;

use anyhow::{Context, Result, ensure};

use super::PATIENCE;
use super::queue::UNWRITTEN;
use super::ring::{Ring, Segment};
use super::trace::{LONGEST, Step};

/// Steps that can be in flight together.
pub const TOGETHER: usize = 12;
/// Bytes behind every buffer that nobody may touch.
const GUARD: usize = 64;
const BLANK: u8 = 0xa5;
/// Room for either part of a step: its bytes, the skew, the guard, the header or status byte.
const ROOM: u64 = LONGEST + 3 * 4096;
const TABLE: u64 = 64 * 16;

/// What a device made of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub status: u8,
    /// `used.len`.
    pub used: u32,
    /// What lies in the writable part, without the status byte.
    pub data: Vec<u8>,
}

impl Outcome {
    /// Whether only bytes that `used.len` counts were written, besides the status byte (virtio 1.3, §2.7.8.2).
    pub fn tail_is_untouched(&self) -> bool {
        let counted = usize::try_from(self.used).unwrap_or(usize::MAX).min(self.data.len());
        self.data[counted..].iter().all(|byte| *byte == BLANK)
    }

    /// Whether nothing but the status byte was written.
    pub fn is_untouched(&self) -> bool {
        self.data.iter().all(|byte| *byte == BLANK)
    }
}

#[derive(Clone, Copy, Debug)]
struct Place {
    readable: u64,
    writable: u64,
    table: u64,
}

/// A queue of a device that is asked the steps of a trace.
#[derive(Debug)]
pub struct Probe {
    ring: Ring,
    places: Vec<Place>,
    flights: HashMap<u16, usize>,
}

/// Descriptors for a part of a step.
fn segments(mut at: u64, cuts: &[usize], write: bool) -> Result<Vec<Segment>> {
    let mut segments = Vec::with_capacity(cuts.len());
    for cut in cuts {
        segments.push(Segment { addr: at, len: u32::try_from(*cut)?, write });
        at += *cut as u64;
    }
    Ok(segments)
}

impl Probe {
    pub fn new(ring: Ring) -> Self {
        let places = (0..TOGETHER).map(|_| Place {
            readable: ring.ram.alloc(ROOM, 4096),
            writable: ring.ram.alloc(ROOM, 4096),
            table: ring.ram.alloc(TABLE, 16),
        });
        let places = places.collect();
        Self { ring, places, flights: HashMap::new() }
    }

    /// Sends steps, at most [`TOGETHER`].
    pub fn send(&mut self, steps: &[Step]) -> Result<()> {
        ensure!(self.flights.is_empty(), "the steps before are not over");
        for (index, step) in steps.iter().enumerate() {
            let place = *self.places.get(index).context("too many steps at a time")?;
            let ram = &self.ring.ram;
            ram.write(place.readable + step.skew, &step.readable);
            let writable = place.writable + step.skew;
            ram.fill(writable, step.writable + 1 + GUARD, BLANK);
            ram.write(writable + step.writable as u64, &[UNWRITTEN]);
            let mut chain = segments(place.readable + step.skew, &step.out_cuts, false)?;
            chain.extend(segments(writable, &step.in_cuts, true)?);
            let table = step.table || self.ring.free() < chain.len() + TOGETHER;
            let head =
                if table { self.ring.indirect(&chain, place.table)? } else { self.ring.chain(&chain)? };
            self.flights.insert(head, index);
            self.ring.offer(head);
        }
        self.ring.publish()
    }

    /// Waits for every step sent; outcomes in the order of the steps.
    pub fn receive(&mut self, steps: &[Step]) -> Result<Vec<Outcome>> {
        let mut outcomes = vec![None; steps.len()];
        while !self.flights.is_empty() {
            let used = self.ring.wait_used(PATIENCE)?;
            let head = u16::try_from(used.id)?;
            let index = self.flights.remove(&head).with_context(|| format!("{used:?} is not in flight"))?;
            let step = &steps[index];
            let bytes =
                self.ring.ram.read(self.places[index].writable + step.skew, step.writable + 1 + GUARD);
            let (data, rest) = bytes.split_at(step.writable);
            ensure!(rest[0] != UNWRITTEN, "{:?}: no status was written", step.kind);
            ensure!(
                rest[1..].iter().all(|byte| *byte == BLANK),
                "{:?}: bytes behind the chain's buffers were written",
                step.kind
            );
            ensure!(
                usize::try_from(used.len)? <= step.writable + 1,
                "{:?}: {used:?} with {} bytes to write",
                step.kind,
                step.writable + 1
            );
            outcomes[index] = Some(Outcome { status: rest[0], used: used.len, data: data.to_vec() });
        }
        outcomes.into_iter().collect::<Option<_>>().context("a step was answered twice")
    }
}
