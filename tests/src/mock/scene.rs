// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A hostile guest's place: an [`Arena`], and a queue of the attacked device that is driven descriptor by descriptor.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};

use super::PATIENCE;
use super::arena::{Arena, Verdict};
use super::machine::{Machine, Options};
use super::queue::{S_OK, T_IN, T_OUT, UNWRITTEN};
use super::ram::GuestRam;
use super::ring::{Descriptor, Ring, Segment, Used};
use super::site::MIB;
use crate::scenario::Medium;

/// Bytes of the attacker's disk.
pub const SIZE: u64 = 32 * MIB;

/// An arena with the attacker's machine, whose first queue is driven by hand.
#[derive(Debug)]
pub struct Scene {
    pub arena: Arena,
    pub machine: Machine,
    pub ring: Ring,
    pub ram: Arc<GuestRam>,
    /// Memory for headers, data and status.
    pub area: u64,
}

/// Offsets in the area.
pub const HEADER: u64 = 0;
pub const DATA: u64 = 0x1000;
pub const STATUS: u64 = 0x8000;
pub const TABLE: u64 = 0x9000;
const AREA: u64 = 0x20000;

impl Scene {
    /// On NV-RAM.
    pub fn new(class: &'static str) -> Result<Self> {
        Self::with(Arena::new(class, Medium::Nvram, SIZE)?, Options::default())
    }

    /// In an arena of the test's choice.
    pub fn with(arena: Arena, options: Options) -> Result<Self> {
        let mut machine = arena.machine(options)?;
        let ring = machine.take_queue(0)?.ring;
        let ram = Arc::clone(&machine.ram);
        let area = ram.alloc(AREA, 4096);
        Ok(Self { arena, machine, ring, ram, area })
    }

    /// Writes a header for a request.
    pub fn header(&self, kind: u32, sector: u64) {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        self.ram.write(self.area + HEADER, &bytes);
        self.ram.write(self.area + STATUS, &[UNWRITTEN]);
    }

    /// What lies in the place of the status.
    pub fn status(&self) -> u8 {
        self.ram.read(self.area + STATUS, 1)[0]
    }

    /// Offers `head` and waits for its used entry.
    pub fn send(&mut self, head: u16) -> Result<Used> {
        self.ring.offer(head);
        self.ring.publish()?;
        let used = self.ring.wait_used(PATIENCE)?;
        ensure!(used.id == u32::from(head), "{used:?} instead of {head}");
        Ok(used)
    }

    /// Writes descriptors as they are, at indices that follow each other from a fresh head on, and sends the head. In
    /// `next`, 0 is the head.
    pub fn chain(&mut self, descriptors: &[Descriptor]) -> Result<Used> {
        let mut indices = Vec::new();
        for _ in descriptors {
            indices.push(self.ring.take()?);
        }
        for (index, desc) in indices.iter().zip(descriptors) {
            let next = indices.get(usize::from(desc.next)).copied().unwrap_or(desc.next);
            self.ring.set(*index, Descriptor { next, ..*desc });
        }
        let head = indices[0];
        self.ring.adopt(head, indices);
        self.send(head)
    }

    /// A correct write and read on the same queue.
    pub fn expect_good(&mut self, after: &str) -> Result<()> {
        let area = self.area;
        let mark = after.bytes().fold(0x3c, |sum: u8, byte| sum.wrapping_mul(31) ^ byte);
        self.ram.fill(area + DATA, 4096, mark);
        for (kind, data) in
            [(T_OUT, Segment::out(area + DATA, 4096)), (T_IN, Segment::into(area + DATA + 4096, 4096))]
        {
            self.header(kind, 64);
            let chain = [Segment::out(area + HEADER, 16), data, Segment::into(area + STATUS, 1)];
            let head = self.ring.chain(&chain)?;
            self.send(head).with_context(|| format!("a good request after: {after}"))?;
            ensure!(self.status() == S_OK, "a good request after: {after}: status {}", self.status());
        }
        let read = self.ram.read(area + DATA + 4096, 4096);
        ensure!(read.iter().all(|byte| *byte == mark), "wrong data after: {after}");
        Ok(())
    }

    /// Judges one round: the attack and a good request behind it.
    pub fn judge(&mut self, case: &str, attack: impl FnOnce(&mut Self) -> Result<Verdict>) -> Result<()> {
        let verdict = attack(self).and_then(|verdict| {
            self.expect_good(case)?;
            Ok(verdict)
        });
        self.arena.judge(case, verdict)
    }

    /// See [`Arena::end`].
    pub fn end(mut self) -> Result<()> {
        self.machine.disconnect();
        self.arena.end()
    }
}

/// A descriptor as it lies in memory.
pub fn desc(addr: u64, len: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor::new(addr, len, flags, next)
}
