// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The driver's side of a split virtqueue (virtio 1.3, §2.7), with every descriptor in the test's hands.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::PATIENCE;
use super::ram::GuestRam;
use crate::wait::Deadline;

pub const F_NEXT: u16 = 1;
pub const F_WRITE: u16 = 2;
pub const F_INDIRECT: u16 = 4;

const NO_NOTIFY: u16 = 1;

/// A piece of memory in a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub addr: u64,
    pub len: u32,
    /// The device writes it.
    pub write: bool,
}

impl Segment {
    /// The device reads it.
    pub fn out(addr: u64, len: u32) -> Self {
        Self { addr, len, write: false }
    }

    /// The device writes it.
    pub fn into(addr: u64, len: u32) -> Self {
        Self { addr, len, write: true }
    }
}

/// A descriptor as it lies in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

impl Descriptor {
    pub fn new(addr: u64, len: u32, flags: u16, next: u16) -> Self {
        Self { addr, len, flags, next }
    }

    pub fn bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// Where a ring lies and how each side wakes the other: what a front-end tells the device.
#[derive(Debug)]
pub struct Shape {
    pub size: u16,
    /// Guest addresses.
    pub desc: u64,
    pub avail: u64,
    pub used: u64,
    pub kick: OwnedFd,
    pub call: OwnedFd,
}

impl Shape {
    /// A ring of `size` in fresh memory.
    pub fn new(ram: &GuestRam, size: u16) -> Result<Self> {
        let n = u64::from(size);
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        Ok(Self {
            size,
            desc: ram.alloc(16 * n, 16),
            avail: ram.alloc(6 + 2 * n, 2),
            used: ram.alloc(6 + 8 * n, 4),
            kick: eventfd(0, flags)?,
            call: eventfd(0, flags)?,
        })
    }

    /// Guest address of the avail ring's index.
    pub fn avail_idx(&self) -> u64 {
        self.avail + 2
    }

    /// Guest address of the used ring's index.
    pub fn used_idx(&self) -> u64 {
        self.used + 2
    }
}

/// An entry of the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    pub id: u32,
    pub len: u32,
}

/// A ring as its driver sees it.
#[derive(Debug)]
pub struct Ring {
    pub ram: Arc<GuestRam>,
    pub shape: Arc<Shape>,
    event_idx: bool,
    free: Vec<u16>,
    /// Descriptors of each chain that the device has.
    chains: HashMap<u16, Vec<u16>>,
    next_avail: u16,
    kicked: u16,
    last_used: u16,
}

impl Ring {
    /// The ring as a driver that has just initialised the device has it.
    pub fn new(ram: &Arc<GuestRam>, shape: &Arc<Shape>, event_idx: bool) -> Self {
        let mut ring = Self {
            ram: Arc::clone(ram),
            shape: Arc::clone(shape),
            event_idx,
            free: Vec::new(),
            chains: HashMap::new(),
            next_avail: 0,
            kicked: 0,
            last_used: 0,
        };
        ring.reset();
        ring
    }

    /// Begins anew at index 0; what the device had is forgotten.
    pub fn reset(&mut self) {
        let n = usize::from(self.shape.size);
        self.ram.fill(self.shape.desc, 16 * n, 0);
        self.ram.fill(self.shape.avail, 6 + 2 * n, 0);
        self.ram.fill(self.shape.used, 6 + 8 * n, 0);
        self.free = (0..self.shape.size).rev().collect();
        self.chains.clear();
        (self.next_avail, self.kicked, self.last_used) = (0, 0, 0);
    }

    /// As if the driver had already made 2¹⁶ − `before` rounds: indices are about to wrap.
    pub fn start_before_wrap(&mut self, before: u16) {
        let at = 0u16.wrapping_sub(before);
        (self.next_avail, self.kicked, self.last_used) = (at, at, at);
        self.ram.store(self.shape.avail_idx(), at);
        self.ram.store(self.shape.used_idx(), at);
    }

    /// Begins anew at the index at which the device has stopped, whatever lies in the ring's memory.
    pub fn restart_at(&mut self, index: u16) {
        self.reset();
        self.start_before_wrap(0u16.wrapping_sub(index));
    }

    /// How many more descriptors there are.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Takes a descriptor out of circulation for a chain made by hand. [`Ring::adopt`] lets it come back.
    pub fn take(&mut self) -> Result<u16> {
        self.free.pop().context("no descriptor left")
    }

    pub fn set(&self, index: u16, desc: Descriptor) {
        self.ram.write(self.shape.desc + 16 * u64::from(index), &desc.bytes());
    }

    /// Descriptors that are free again once the chain at `head` is used.
    pub fn adopt(&mut self, head: u16, descriptors: Vec<u16>) {
        self.chains.insert(head, descriptors);
    }

    /// Gives descriptors back that the device never saw.
    pub fn give_back(&mut self, descriptors: &[u16]) {
        self.free.extend(descriptors);
    }

    /// Builds a chain of descriptors; returns its head.
    pub fn chain(&mut self, segments: &[Segment]) -> Result<u16> {
        ensure!(!segments.is_empty() && segments.len() <= self.free.len(), "no room for the chain");
        let indices: Vec<u16> = segments.iter().filter_map(|_| self.free.pop()).collect();
        for (i, segment) in segments.iter().enumerate() {
            let next = indices.get(i + 1).copied();
            self.set(indices[i], descriptor(segment, next));
        }
        let head = indices[0];
        self.chains.insert(head, indices);
        Ok(head)
    }

    /// Builds a chain in a table at `table`, which one descriptor leads to; returns its head.
    pub fn indirect(&mut self, segments: &[Segment], table: u64) -> Result<u16> {
        for (i, segment) in (0u16..).zip(segments) {
            let next = (usize::from(i) + 1 < segments.len()).then_some(i + 1);
            self.ram.write(table + 16 * u64::from(i), &descriptor(segment, next).bytes());
        }
        let head = self.take()?;
        let len = u32::try_from(16 * segments.len())?;
        self.set(head, Descriptor::new(table, len, F_INDIRECT, 0));
        self.chains.insert(head, vec![head]);
        Ok(head)
    }

    /// Puts a head into the avail ring without showing it to the device.
    pub fn offer(&mut self, head: u16) {
        let slot = u64::from(self.next_avail & (self.shape.size - 1));
        self.ram.store(self.shape.avail + 4 + 2 * slot, head);
        self.next_avail = self.next_avail.wrapping_add(1);
    }

    /// Shows the device everything offered and kicks it if it wants that.
    pub fn publish(&mut self) -> Result<()> {
        self.ram.store(self.shape.avail_idx(), self.next_avail);
        self.ram.barrier();
        let (old, new) = (self.kicked, self.next_avail);
        self.kicked = new;
        let wanted = if self.event_idx {
            let event = self.ram.load(self.shape.used + 4 + 8 * u64::from(self.shape.size));
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            self.ram.load(self.shape.used) & NO_NOTIFY == 0
        };
        if wanted { self.kick() } else { Ok(()) }
    }

    /// Kicks, wanted or not.
    pub fn kick(&self) -> Result<()> {
        match rustix::io::write(&self.shape.kick, &1u64.to_ne_bytes()) {
            Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(()),
            Err(errno) => Err(errno).context("kick"),
        }
    }

    /// Writes the avail index as it is, whatever was offered.
    pub fn force_avail_idx(&mut self, idx: u16) {
        self.next_avail = idx;
        self.ram.store(self.shape.avail_idx(), idx);
    }

    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// Chains that the device has.
    pub fn in_flight(&self) -> usize {
        self.chains.len()
    }

    /// The next used entry, if there is one.
    pub fn take_used(&mut self) -> Result<Option<Used>> {
        let ahead = self.ram.load(self.shape.used_idx()).wrapping_sub(self.last_used);
        if ahead == 0 {
            return Ok(None);
        }
        ensure!(ahead <= self.shape.size, "the device is {ahead} used entries ahead");
        let slot = u64::from(self.last_used & (self.shape.size - 1));
        let entry = self.ram.read(self.shape.used + 4 + 8 * slot, 8);
        let word = |at: usize| u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]]);
        let used = Used { id: word(0), len: word(4) };
        self.last_used = self.last_used.wrapping_add(1);
        if let Ok(head) = u16::try_from(used.id)
            && let Some(descriptors) = self.chains.remove(&head)
        {
            self.free.extend(descriptors);
        }
        Ok(Some(used))
    }

    /// The next used entry; sleeps on the call descriptor until it comes, so that a lost interrupt is a failure.
    pub fn wait_used(&mut self, limit: Duration) -> Result<Used> {
        let deadline = Deadline::after(limit);
        loop {
            if let Some(used) = self.take_used()? {
                return Ok(used);
            }
            if self.event_idx {
                self.ram.store(self.shape.avail + 4 + 2 * u64::from(self.shape.size), self.last_used);
            }
            self.ram.barrier();
            if let Some(used) = self.take_used()? {
                return Ok(used);
            }
            if !self.wait_call(deadline.left())? {
                let in_flight = self.chains.len();
                if self.ram.load(self.shape.used_idx()) == self.last_used {
                    bail!("nothing was used in {:.3} s, {in_flight} chains in flight", limit.as_secs_f64());
                }
                // The device may have been held up just between the answer and its interrupt.
                ensure!(self.wait_call(PATIENCE)?, "an interrupt was lost, {in_flight} chains in flight");
            }
        }
    }

    /// Waits for an interrupt. The daemon makes the descriptor non-blocking, so it is polled.
    pub fn wait_call(&self, limit: Duration) -> Result<bool> {
        let timeout =
            Timespec { tv_sec: i64::try_from(limit.as_secs())?, tv_nsec: limit.subsec_nanos().into() };
        let mut fds = [PollFd::new(&self.shape.call, PollFlags::IN)];
        let came = poll(&mut fds, Some(&timeout)).context("wait for an interrupt")? > 0;
        if came {
            // One that comes after the poll is kept for the next.
            let _ = rustix::io::read(&self.shape.call, &mut [0; 8]);
        }
        Ok(came)
    }
}

fn descriptor(segment: &Segment, next: Option<u16>) -> Descriptor {
    let mut flags = if segment.write { F_WRITE } else { 0 };
    if next.is_some() {
        flags |= F_NEXT;
    }
    Descriptor::new(segment.addr, segment.len, flags, next.unwrap_or(0))
}
