// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Block requests on one queue (virtio 1.3, §5.2.6).

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::PATIENCE;
use super::ring::{Ring, Segment, Used};
use crate::wait::Deadline;

pub const T_IN: u32 = 0;
pub const T_OUT: u32 = 1;
pub const T_FLUSH: u32 = 4;
pub const T_GET_ID: u32 = 8;
pub const T_DISCARD: u32 = 11;
pub const T_WRITE_ZEROES: u32 = 13;

pub const S_OK: u8 = 0;
pub const S_IOERR: u8 = 1;
pub const S_UNSUPP: u8 = 2;
/// What a status byte holds before the device writes it.
pub const UNWRITTEN: u8 = 0xee;

pub const SECTOR: u64 = 512;
/// Header, status and indirect table of one request.
const SLOT: u64 = 4096;
const STATUS_AT: u64 = 32;
const TABLE_AT: u64 = 64;
/// For requests that bring no memory of their own.
const BOUNCE: u64 = 1 << 20;

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    pub head: u16,
    pub status: u8,
    /// `used.len`: bytes the device says it wrote from the first writable one on; the status byte only if all before it were.
    pub written: u32,
}

/// How a chain lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    Direct,
    /// In an indirect table.
    Table,
}

#[derive(Debug)]
struct Pending {
    slot: u64,
    writable: u32,
}

/// A request queue.
#[derive(Debug)]
pub struct Queue {
    pub ring: Ring,
    pub layout: Layout,
    slots: Vec<u64>,
    bounce: u64,
    pending: HashMap<u16, Pending>,
    done: HashMap<u16, Answer>,
}

impl Queue {
    pub fn new(ring: Ring) -> Self {
        let slots = (0..ring.shape.size).map(|_| ring.ram.alloc(SLOT, SLOT)).collect();
        let bounce = ring.ram.alloc(BOUNCE, 4096);
        Self { ring, layout: Layout::Direct, slots, bounce, pending: HashMap::new(), done: HashMap::new() }
    }

    /// Guest memory for the caller's own chains, [`Queue::bounce_len`] bytes. The synchronous calls use it too.
    pub fn bounce(&self) -> u64 {
        self.bounce
    }

    pub fn bounce_len(&self) -> usize {
        usize::try_from(BOUNCE).unwrap_or(0)
    }

    /// Requests that the device has.
    pub fn in_flight(&self) -> usize {
        self.pending.len()
    }

    /// Offers a request without showing it to the device. `data`: first what the device reads, then what it writes.
    pub fn prepare(&mut self, kind: u32, sector: u64, data: &[Segment]) -> Result<u16> {
        let slot = self.slots.pop().context("as many requests as the queue has descriptors")?;
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.ring.ram.write(slot, &header);
        self.ring.ram.write(slot + STATUS_AT, &[UNWRITTEN]);
        let mut segments = vec![Segment::out(slot, 16)];
        segments.extend_from_slice(data);
        segments.push(Segment::into(slot + STATUS_AT, 1));
        let built = match self.layout {
            Layout::Direct => self.ring.chain(&segments),
            Layout::Table => {
                let room = usize::try_from((SLOT - TABLE_AT) / 16)?;
                ensure!(segments.len() <= room, "{} descriptors do not fit a slot's table", segments.len());
                self.ring.indirect(&segments, slot + TABLE_AT)
            }
        };
        let head = match built {
            Ok(head) => head,
            Err(error) => {
                self.slots.push(slot);
                return Err(error);
            }
        };
        let writable = segments.iter().filter(|s| s.write).map(|s| s.len).sum();
        self.pending.insert(head, Pending { slot, writable });
        self.ring.offer(head);
        Ok(head)
    }

    /// Sends a request; returns its head.
    pub fn submit(&mut self, kind: u32, sector: u64, data: &[Segment]) -> Result<u16> {
        let head = self.prepare(kind, sector, data)?;
        self.ring.publish()?;
        Ok(head)
    }

    /// Judges a used entry.
    fn settle(&mut self, used: Used) -> Result<Answer> {
        let head = u16::try_from(used.id).ok().filter(|head| self.pending.contains_key(head));
        let Some((head, pending)) = head.and_then(|head| Some((head, self.pending.remove(&head)?))) else {
            bail!("the device used {used:?}, which it does not have");
        };
        let status = self.ring.ram.read(pending.slot + STATUS_AT, 1)[0];
        self.slots.push(pending.slot);
        // V-35.
        ensure!(used.len <= pending.writable, "{used:?}: the chain has {} writable bytes", pending.writable);
        Ok(Answer { head, status, written: used.len })
    }

    /// The next answer, in whatever order the device gives them.
    pub fn next(&mut self, limit: Duration) -> Result<Answer> {
        if let Some(head) = self.done.keys().next().copied()
            && let Some(answer) = self.done.remove(&head)
        {
            return Ok(answer);
        }
        let used = self.ring.wait_used(limit)?;
        self.settle(used)
    }

    /// An answer that is there already.
    pub fn try_next(&mut self) -> Result<Option<Answer>> {
        if let Some(head) = self.done.keys().next().copied() {
            return Ok(self.done.remove(&head));
        }
        match self.ring.take_used()? {
            Some(used) => self.settle(used).map(Some),
            None => Ok(None),
        }
    }

    /// The answer to one request; others are kept for later.
    pub fn wait(&mut self, head: u16, limit: Duration) -> Result<Answer> {
        let deadline = Deadline::after(limit);
        loop {
            if let Some(answer) = self.done.remove(&head) {
                return Ok(answer);
            }
            let used = self.ring.wait_used(deadline.left()).with_context(|| format!("request {head}"))?;
            let answer = self.settle(used)?;
            self.done.insert(answer.head, answer);
        }
    }

    /// Whether a request is answered; looks once.
    pub fn answered(&mut self, head: u16) -> Result<Option<Answer>> {
        while let Some(used) = self.ring.take_used()? {
            let answer = self.settle(used)?;
            self.done.insert(answer.head, answer);
        }
        Ok(self.done.remove(&head))
    }

    /// Sends a request and waits for its answer.
    pub fn call(&mut self, kind: u32, sector: u64, data: &[Segment]) -> Result<Answer> {
        let head = self.submit(kind, sector, data)?;
        self.wait(head, PATIENCE)
    }

    /// Reads `len` bytes at `offset`; the status if it is not OK.
    pub fn read(&mut self, offset: u64, len: usize) -> Result<Result<Vec<u8>, u8>> {
        let mut bytes = Vec::with_capacity(len);
        while bytes.len() < len {
            let n = (len - bytes.len()).min(self.bounce_len());
            let at = offset + bytes.len() as u64;
            self.ring.ram.fill(self.bounce, n, 0xa5);
            let size = u32::try_from(n)?;
            let answer = self.call(T_IN, at / SECTOR, &[Segment::into(self.bounce, size)])?;
            if answer.status != S_OK {
                let untouched = self.ring.ram.read(self.bounce, n).iter().all(|byte| *byte == 0xa5);
                ensure!(untouched, "a read that failed with {:#x} left bytes behind", answer.status);
                return Ok(Err(answer.status));
            }
            ensure!(answer.written == size + 1, "a read of {n} bytes wrote {}", answer.written);
            bytes.extend(self.ring.ram.read(self.bounce, n));
        }
        Ok(Ok(bytes))
    }

    /// Writes; the status.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<u8> {
        for (i, piece) in bytes.chunks(self.bounce_len()).enumerate() {
            self.ring.ram.write(self.bounce, piece);
            let at = offset + i as u64 * BOUNCE;
            let data = [Segment::out(self.bounce, u32::try_from(piece.len())?)];
            let answer = self.call(T_OUT, at / SECTOR, &data)?;
            if answer.status != S_OK {
                return Ok(answer.status);
            }
            ensure!(answer.written == 1, "a write wrote {} bytes to the guest", answer.written);
        }
        Ok(S_OK)
    }

    pub fn flush(&mut self) -> Result<u8> {
        Ok(self.call(T_FLUSH, 0, &[])?.status)
    }

    /// A request that carries one segment: DISCARD or WRITE_ZEROES.
    pub fn range(&mut self, kind: u32, offset: u64, len: u64, flags: u32) -> Result<u8> {
        self.ring.ram.write(self.bounce, &range_segment(offset, len, flags)?);
        Ok(self.call(kind, 0, &[Segment::out(self.bounce, 16)])?.status)
    }

    pub fn discard(&mut self, offset: u64, len: u64) -> Result<u8> {
        self.range(T_DISCARD, offset, len, 0)
    }

    pub fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) -> Result<u8> {
        self.range(T_WRITE_ZEROES, offset, len, unmap.into())
    }

    /// The serial number, NUL-padded.
    pub fn id(&mut self) -> Result<String> {
        let answer = self.call(T_GET_ID, 0, &[Segment::into(self.bounce, 20)])?;
        ensure!(answer.status == S_OK && answer.written == 21, "GET_ID: {answer:?}");
        let bytes = self.ring.ram.read(self.bounce, 20);
        let len = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
        Ok(String::from_utf8(bytes[..len].to_vec())?)
    }
}

/// The segment of a DISCARD or WRITE_ZEROES.
pub fn range_segment(offset: u64, len: u64, flags: u32) -> Result<[u8; 16]> {
    let mut segment = [0; 16];
    segment[..8].copy_from_slice(&(offset / SECTOR).to_le_bytes());
    segment[8..12].copy_from_slice(&u32::try_from(len / SECTOR)?.to_le_bytes());
    segment[12..].copy_from_slice(&flags.to_le_bytes());
    Ok(segment)
}
