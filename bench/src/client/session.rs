// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A connection to a backend: queues, buffers in shared memory, and one queue's work.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail, ensure};
use hdrhistogram::Histogram;
use memmap2::{MmapMut, MmapOptions};
use rustix::fs::{MemfdFlags, memfd_create};
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioBlkQueue,
    VirtioBlkReqBuf, VirtioBlkTransport, VirtioFeatureFlags,
};

use super::load::{Load, Request, Source};

/// Descriptors of a ring; a request takes three.
const QUEUE_SIZE: usize = 128;
/// Latencies above this are as good as infinite.
const LATENCY_LIMIT_NS: u64 = 60_000_000_000;

/// A place for one request: its buffer, and what is in flight.
#[derive(Clone, Copy, Debug)]
struct Slot {
    /// Which buffer the next request uses.
    buffer: usize,
    request: Request,
    since: Instant,
    flushing: bool,
}

/// A queue with its share of the load.
pub(super) struct Queue {
    ring: VirtioBlkQueue<'static, u16>,
    notifier: Box<dyn QueueNotifier>,
    pub(super) call: Arc<EventFd>,
    source: Source,
    block: usize,
    /// Where this queue's buffers begin, and how many there are.
    buffers: (*mut u8, usize),
    slots: Vec<Slot>,
    in_flight: usize,
    done: Vec<(u16, i32)>,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").field("in_flight", &self.in_flight).finish_non_exhaustive()
    }
}

// SAFETY: the pointer leads to memory that the session owns and that is only ever given to the device.
unsafe impl Send for Queue {}

/// What was completed.
#[derive(Clone, Debug)]
pub(super) struct Record {
    pub latencies: Histogram<u64>,
    pub bytes: u64,
}

impl Record {
    pub(super) fn new() -> Result<Self> {
        Ok(Self { latencies: Histogram::new_with_bounds(1, LATENCY_LIMIT_NS, 3)?, bytes: 0 })
    }
}

impl Queue {
    /// Starts the load.
    pub(super) fn start(&mut self) -> Result<()> {
        let now = Instant::now();
        for slot in 0..self.slots.len() {
            if !self.begin(slot, now)? {
                break;
            }
        }
        self.kick()
    }

    /// Makes the next request in a free slot. False at the end of a list.
    fn begin(&mut self, slot: usize, now: Instant) -> Result<bool> {
        let Some(request) = self.source.next() else { return Ok(false) };
        let ((base, count), at) = (self.buffers, self.slots[slot].buffer);
        // A slot's buffers lie a queue's depth apart, so that no two slots share one.
        let next = if at + self.slots.len() < count { at + self.slots.len() } else { slot };
        self.slots[slot] = Slot { buffer: next, request, since: now, flushing: false };
        let (context, buffer) = (u16::try_from(slot)?, base.wrapping_add(at * self.block));
        if request.is_read {
            // SAFETY: `at` is below `count`, so the buffer of `block` bytes lies in the memory behind `buffers`, which stays mapped
            // until the session ends and to which nobody makes a reference.
            unsafe { self.ring.read_raw(request.offset, buffer, self.block, context)? };
        } else {
            // SAFETY: as above.
            unsafe { self.ring.write_raw(request.offset, buffer, self.block, context)? };
        }
        self.in_flight += 1;
        Ok(true)
    }

    /// Collects what is done and goes on with the load unless it is to `end`. The number of answers.
    pub(super) fn turn(&mut self, end: bool, mut record: Option<&mut Record>) -> Result<usize> {
        self.done.clear();
        self.done.extend(self.ring.completions().map(|done| (done.context, done.ret)));
        if self.done.is_empty() {
            return Ok(0);
        }
        // One look at the clock for the batch: it is when the client got to know.
        let now = Instant::now();
        for at in 0..self.done.len() {
            let (context, outcome) = self.done[at];
            let slot = usize::from(context);
            let Slot { request, since, flushing, .. } = self.slots[slot];
            ensure!(outcome == 0, "{request:?} was answered with error {outcome}");
            if request.flushed && !flushing {
                self.slots[slot].flushing = true;
                self.ring.flush(context)?;
                continue;
            }
            self.in_flight -= 1;
            if let Some(record) = record.as_deref_mut() {
                let ns = u64::try_from(now.duration_since(since).as_nanos()).unwrap_or(LATENCY_LIMIT_NS);
                record.latencies.saturating_record(ns.max(1));
                record.bytes += self.block as u64;
            }
            if !end {
                self.begin(slot, now)?;
            }
        }
        self.kick()?;
        Ok(self.done.len())
    }

    fn kick(&mut self) -> Result<()> {
        if self.ring.avail_notif_needed() {
            self.notifier.notify().context("kick")?;
        }
        Ok(())
    }

    pub(super) fn is_idle(&self) -> bool {
        self.in_flight == 0
    }

    /// Asks not to be woken.
    pub(super) fn look(&mut self) {
        self.ring.set_used_notif_enabled(false);
    }

    /// Asks to be woken. True if there are answers already, of which no wake-up will tell.
    pub(super) fn arm(&mut self) -> bool {
        self.ring.set_used_notif_enabled(true);
        self.ring.completions().has_next()
    }
}

/// A connection with a load on it.
pub struct Session {
    // The queues lie in the transport's memory and use the buffers, so they go first.
    pub(super) queues: Vec<Queue>,
    _transport: Box<VirtioBlkTransport>,
    _buffers: MmapMut,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("queues", &self.queues).finish_non_exhaustive()
    }
}

impl Session {
    /// Connects to a backend.
    pub fn connect(socket: &Path, load: &Load, seed: u64) -> Result<Self> {
        let path = socket.to_str().context("the socket's path is not text")?;
        let features = VirtioFeatureFlags::VERSION_1.bits()
            | VirtioFeatureFlags::RING_EVENT_IDX.bits()
            | VirtioBlkFeatureFlags::FLUSH.bits()
            | VirtioBlkFeatureFlags::MQ.bits();
        let transport = VhostUser::<VirtioBlkConfig, VirtioBlkReqBuf>::new(path, features)
            .with_context(|| format!("connect to {path}"))?;
        let mut transport: Box<VirtioBlkTransport> = Box::new(transport);
        ensure!(
            transport.get_features() & VirtioFeatureFlags::RING_EVENT_IDX.bits() != 0,
            "the backend does not know EVENT_IDX"
        );
        let config = transport.get_config()?;
        let capacity = u64::from(config.capacity) * 512;
        ensure!(capacity >= load.span, "the disk has {capacity} bytes, the load uses {}", load.span);
        if load.depth * 3 > QUEUE_SIZE {
            bail!("{} requests do not fit a ring of {QUEUE_SIZE} descriptors", load.depth);
        }
        let size = u16::try_from(QUEUE_SIZE)?;
        let rings = VirtioBlkQueue::setup_queues(transport.as_mut(), load.queues, size)?;

        ensure!(load.buffers >= load.depth, "{} buffers for {} requests", load.buffers, load.depth);
        let len = load.queues * load.buffers * load.block;
        let file = File::from(memfd_create("buffers", MemfdFlags::CLOEXEC)?);
        file.set_len(len as u64)?;
        // SAFETY: the file is an anonymous one of this function's own, which nobody truncates.
        let mut buffers =
            unsafe { MmapOptions::new().populate().map_mut(&file) }.context("map the buffers")?;
        buffers.fill(0x5a);
        let base = buffers.as_mut_ptr();
        transport.map_mem_region(base as usize, len, file.as_raw_fd(), 0)?;

        let mut queues = Vec::new();
        for (index, ring) in rings.into_iter().enumerate() {
            let now = Instant::now();
            let slots = (0..load.depth).map(|slot| Slot {
                buffer: slot,
                request: Request { offset: 0, is_read: true, flushed: false },
                since: now,
                flushing: false,
            });
            queues.push(Queue {
                ring,
                notifier: transport.get_submission_notifier(index),
                call: transport.get_completion_fd(index),
                source: Source::new(load, index, seed),
                block: load.block,
                buffers: (base.wrapping_add(index * load.buffers * load.block), load.buffers),
                slots: slots.collect(),
                in_flight: 0,
                done: Vec::with_capacity(load.depth),
            });
        }
        if queues.is_empty() {
            return Err(anyhow!("a session needs a queue"));
        }
        Ok(Self { queues, _transport: transport, _buffers: buffers })
    }
}
