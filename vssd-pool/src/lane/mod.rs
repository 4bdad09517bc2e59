// SPDX-License-Identifier: Apache-2.0 OR MIT

//! I/O of one worker thread.
//!
//! A request is *resolved* (every block it touches is looked up; a write gives empty blocks a physical one),
//! then *carried out* (copied inline, or prepared as parts of the lane's io_uring), then *reported*. Nothing is
//! moved before everything is resolved, so a request that meets an unplugged block does nothing. One that meets
//! a fence, or finds no block or no room in the journal, is *parked*: its buffers are remembered and it starts
//! over when somebody wakes the lane.
//!
//! A section of the grace scheme covers each batch, and each request in the ring until its last part is over: a
//! physical block that a request looked up cannot change hands under it.

mod iov;
mod ring;

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::time::{Duration, Instant};

use vssd_protocol::units::{BlockIndex, PhysicalBlock, SECTOR_SIZE};

use crate::core::Core;
use crate::error::{Error, Result};
use crate::grace::Parity;
use crate::map::Entry;
use crate::record::Record;
use crate::store::AlignedBuf;
use crate::types::{IoError, MediumKind, Submitted};
use crate::vssd::{Vssd, count};
use iov::Cursor;
use ring::{Direction, Finished, Ring};

/// Zeroes written at a time to media without a better way.
const ZEROES: usize = 256 << 10;
/// Blocks discarded under one hold of the ledger's lock.
const DISCARD_AT_ONCE: u32 = 1024;

/// A worker's way to the data of every vSSD of the pool. It may be made on any thread, but from its first
/// request on it must stay on one.
///
/// Between [`Lane::begin_batch`] and [`Lane::end_batch`] requests are only prepared; the latter submits them
/// in one system call. A request outside a batch is a batch of its own. Offsets and lengths are bytes of the
/// vSSD, multiples of 512, and for writes of the pool's `logical_block_bytes`.
#[derive(Debug)]
pub struct Lane {
    core: Arc<Core>,
    slot: usize,
    section: Option<Parity>,
    ring: Option<Ring>,
    requests: Vec<Request>,
    free: Vec<u32>,
    /// Requests that wait for parts or for the journal.
    open: usize,
    /// Flushes that wait for the journal: (position, request).
    flushes: Vec<(u64, u32)>,
    parked: VecDeque<Parked>,
    /// Something was parked since the section began: look once more, for the waker may not have seen it.
    look_again: bool,
    ready: Vec<(u64, std::result::Result<(), IoError>)>,
    /// What the current request's blocks are; kept for its capacity.
    resolved: Vec<Entry>,
    zeroes: Option<AlignedBuf>,
}

// SAFETY: the raw pointers in it (parked and submitted buffers) are only followed while the request is under
// way, and `read` and `write` demand that they stay valid that long, on whatever thread.
unsafe impl Send for Lane {}

/// A request with parts in the ring, or a flush.
#[derive(Debug)]
struct Request {
    token: u64,
    left: u32,
    result: std::result::Result<(), IoError>,
    /// What it counts as in flight under; flushes touch no blocks.
    section: Option<Parity>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    Read,
    Write,
    Discard,
    WriteZeroes { unmap: bool },
}

/// A request as handed in.
#[derive(Clone, Copy)]
struct Job<'a> {
    vssd: &'a Arc<Vssd>,
    op: Op,
    offset: u64,
    len: u64,
    iov: &'a [libc::iovec],
    token: u64,
}

#[derive(Debug)]
struct Parked {
    vssd: Arc<Vssd>,
    op: Op,
    offset: u64,
    len: u64,
    iov: Vec<libc::iovec>,
    token: u64,
    since: Instant,
}

/// What a parked request waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    Fence,
    Space,
    Journal,
}

/// Why a request goes no further now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    Failed(IoError),
    Wait(Why),
}

impl From<IoError> for Stop {
    fn from(error: IoError) -> Self {
        Self::Failed(error)
    }
}

enum Step {
    Done(std::result::Result<(), IoError>),
    Pending,
    Wait(Why),
}

fn errno(error: &std::io::Error) -> IoError {
    match error.raw_os_error() {
        Some(libc::ENOSPC) => IoError::NoSpace,
        Some(errno) => IoError::Io(errno),
        None => IoError::Io(libc::EIO),
    }
}

/// Adds to a counter that only this thread writes.
fn add(counter: &AtomicU64, by: u64) {
    counter.store(counter.load(Ordering::Relaxed) + by, Ordering::Release);
}

impl Lane {
    pub(crate) fn new(core: Arc<Core>) -> Result<Self> {
        let slot = core.grace.register().ok_or_else(|| {
            Error::invalid(format!("a pool has at most {} lanes at a time", crate::grace::MAX_LANES))
        })?;
        let lane = Self {
            slot,
            section: None,
            ring: None,
            requests: Vec::new(),
            free: Vec::new(),
            open: 0,
            flushes: Vec::new(),
            parked: VecDeque::new(),
            look_again: false,
            ready: Vec::new(),
            resolved: Vec::new(),
            zeroes: None,
            core,
        };
        lane.core.lanes[slot]
            .event()
            .map_err(|source| Error::io("cannot make an event descriptor", source))?;
        Ok(lane)
    }

    /// Opens a batch. Resizes wait for the batch to end, so do not block inside.
    pub fn begin_batch(&mut self) {
        self.enter();
    }

    /// Submits what the batch prepared.
    pub fn end_batch(&mut self) {
        self.leave();
        if std::mem::take(&mut self.look_again) {
            self.retry_parked();
            if !self.ready.is_empty() {
                self.core.lanes[self.slot].ring();
            }
        }
    }

    /// Fills `iov` from `offset` on.
    ///
    /// # Safety
    /// Every iovec must be valid for writes until the request is done (the token was reported, or this
    /// returned `Done`). Its bytes may be read and written by others meanwhile.
    pub unsafe fn read(
        &mut self,
        vssd: &Arc<Vssd>,
        offset: u64,
        iov: &[libc::iovec],
        token: u64,
    ) -> Submitted {
        let Some(len) = iov::total_len(iov) else { return Submitted::Done(Err(IoError::OutOfRange)) };
        count(&vssd.counters(self.slot).reads, 1);
        self.start(Job { vssd, op: Op::Read, offset, len, iov, token })
    }

    /// Writes `iov` from `offset` on.
    ///
    /// # Safety
    /// Every iovec must be valid for reads until the request is done. Its bytes may change meanwhile.
    pub unsafe fn write(
        &mut self,
        vssd: &Arc<Vssd>,
        offset: u64,
        iov: &[libc::iovec],
        token: u64,
    ) -> Submitted {
        let Some(len) = iov::total_len(iov) else { return Submitted::Done(Err(IoError::OutOfRange)) };
        count(&vssd.counters(self.slot).writes, 1);
        self.start(Job { vssd, op: Op::Write, offset, len, iov, token })
    }

    /// Gives the blocks that lie wholly in the range back to the pool; they read as zeroes. The edges stay.
    pub fn discard(&mut self, vssd: &Arc<Vssd>, offset: u64, len: u64, token: u64) -> Submitted {
        count(&vssd.counters(self.slot).discards, 1);
        self.start(Job { vssd, op: Op::Discard, offset, len, iov: &[], token })
    }

    /// Makes the range read as zeroes; with `unmap` whole blocks go back to the pool.
    pub fn write_zeroes(
        &mut self,
        vssd: &Arc<Vssd>,
        offset: u64,
        len: u64,
        unmap: bool,
        token: u64,
    ) -> Submitted {
        count(&vssd.counters(self.slot).discards, 1);
        self.start(Job { vssd, op: Op::WriteZeroes { unmap }, offset, len, iov: &[], token })
    }

    /// Makes every write, discard and write-zeroes of this vSSD that completed before this call durable,
    /// whichever lane carried it.
    pub fn flush(&mut self, vssd: &Arc<Vssd>, token: u64) -> Submitted {
        count(&vssd.counters(self.slot).flushes, 1);
        if self.core.read_only {
            return Submitted::Done(Ok(()));
        }
        let core = Arc::clone(&self.core);
        if core.journal.has_failed() {
            return Submitted::Done(Err(IoError::Io(libc::EIO)));
        }
        let request = self.open_request(token, None);
        for kind in MediumKind::ALL {
            let Some(medium) = &core.media[kind.index()] else { continue };
            let writes = core.writes_on(kind);
            if writes == core.synced[kind.index()].load(Ordering::Acquire) {
                continue;
            }
            if medium.store.ring().is_some() {
                match self.ring() {
                    Ok(ring) => {
                        ring.flush(request, kind, writes);
                        self.requests[request as usize].left += 1;
                    }
                    Err(error) => self.requests[request as usize].result = Err(error),
                }
            } else {
                match medium.store.sync() {
                    Ok(()) => drop(core.synced[kind.index()].fetch_max(writes, Ordering::AcqRel)),
                    Err(error) => {
                        core.journal.fail(&error);
                        self.requests[request as usize].result = Err(errno(&error));
                    }
                }
            }
        }
        let position = core.journal.ledger().buffer.position();
        if core.journal.durable() < position {
            if core.journal.is_instant() || !core.has_threads {
                if core.journal.commit(position).is_err() {
                    self.requests[request as usize].result = Err(IoError::Io(libc::EIO));
                }
            } else {
                self.requests[request as usize].left += 1;
                self.flushes.push((position, request));
                self.announce_waiting();
                core.commit_bell.ring();
            }
        }
        if self.section.is_none()
            && let Some(ring) = &mut self.ring
        {
            ring.submit();
        }
        self.close_request(request)
    }

    /// Reports what has finished and returns how many.
    pub fn poll(&mut self, done: &mut impl FnMut(u64, std::result::Result<(), IoError>)) -> usize {
        let slot = &self.core.lanes[self.slot];
        let woken = slot.woken.swap(false, Ordering::Acquire);
        if woken || self.ring.is_some() || !self.ready.is_empty() {
            // Before looking at anything, so that news from now on makes it readable again.
            let mut counter = [0; 8];
            if let Ok(event) = slot.event() {
                // Not readable is as good.
                let _ = rustix::io::read(event, &mut counter);
            }
        }
        self.reap();
        self.finish_flushes();
        if !self.parked.is_empty() && (woken || self.is_overdue()) {
            self.retry_parked();
        }
        let ready = std::mem::take(&mut self.ready);
        let reported = ready.len();
        for &(token, result) in &ready {
            done(token, result);
        }
        // The callback cannot reach the lane, so nothing was added meanwhile; keep the capacity.
        self.ready = ready;
        self.ready.clear();
        self.update_waiting();
        reported
    }

    /// Readable when [`Lane::poll`] has something to do (it may turn out to be nothing). `poll` resets it.
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        match self.core.lanes[self.slot].event() {
            Ok(event) => event.as_fd(),
            Err(error) => unreachable!("the event descriptor was made with the lane: {error}"),
        }
    }

    /// Whether some request has not been reported yet.
    pub fn has_pending(&self) -> bool {
        self.open > 0 || !self.parked.is_empty() || !self.ready.is_empty()
    }

    /// Blocks until everything is reported.
    pub fn drain(&mut self, done: &mut impl FnMut(u64, std::result::Result<(), IoError>)) {
        while self.has_pending() {
            if self.poll(done) == 0 && self.has_pending() {
                let mut fds =
                    [rustix::event::PollFd::from_borrowed_fd(self.event_fd(), rustix::event::PollFlags::IN)];
                // A signal, or the time for a look at deadlines: either way, look again.
                let limit = rustix::time::Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
                let _ = rustix::event::poll(&mut fds, Some(&limit));
            }
        }
    }

    fn enter(&mut self) -> bool {
        if self.section.is_some() {
            return false;
        }
        self.section = Some(self.core.grace.enter(self.slot));
        true
    }

    fn leave(&mut self) {
        if let Some(ring) = &mut self.ring {
            ring.submit();
        }
        if let Some(parity) = self.section.take() {
            self.core.grace.leave(self.slot, parity);
        }
    }

    fn start(&mut self, job: Job<'_>) -> Submitted {
        if let Err(error) = self.validate(&job) {
            return Submitted::Done(Err(error));
        }
        if job.len == 0 {
            return Submitted::Done(Ok(()));
        }
        let opened = self.enter();
        let submitted = match self.run(&job) {
            Step::Done(result) => Submitted::Done(result),
            Step::Pending => Submitted::Pending,
            Step::Wait(_) => {
                self.park(&job);
                Submitted::Pending
            }
        };
        if opened {
            self.end_batch();
        }
        submitted
    }

    fn validate(&self, job: &Job<'_>) -> std::result::Result<(), IoError> {
        let size = job.vssd.block_size().bytes_of(job.vssd.total_blocks());
        let is_inside = job.offset.checked_add(job.len).is_some_and(|end| end <= size);
        let is_whole = (job.offset | job.len).is_multiple_of(SECTOR_SIZE);
        if !is_inside || !is_whole || job.vssd.instance() != self.core.instance {
            return Err(IoError::OutOfRange);
        }
        if job.op != Op::Read {
            if self.core.read_only {
                return Err(IoError::ReadOnly);
            }
            // What could not be made durable must not be acknowledged.
            if self.core.journal.has_failed() {
                return Err(IoError::Io(libc::EIO));
            }
        }
        Ok(())
    }

    /// Within a section.
    fn run(&mut self, job: &Job<'_>) -> Step {
        let carried_out = match job.op {
            Op::Read => self.resolve(job, false).and_then(|()| self.transfer(job, Direction::Read)),
            Op::Write => self.resolve(job, true).and_then(|()| self.transfer(job, Direction::Write)),
            Op::Discard => self.resolve(job, false).and_then(|()| self.discard_blocks(job).map(|()| None)),
            Op::WriteZeroes { unmap } => self.resolve(job, false).and_then(|()| self.zero(job, unmap)),
        };
        match carried_out {
            Ok(None) => Step::Done(Ok(())),
            Ok(Some(request)) => match self.close_request(request) {
                Submitted::Done(result) => Step::Done(result),
                Submitted::Pending => Step::Pending,
            },
            Err(Stop::Failed(error)) => {
                if error == IoError::Evicted {
                    count(&job.vssd.counters(self.slot).evicted, 1);
                }
                Step::Done(Err(error))
            }
            Err(Stop::Wait(why)) => Step::Wait(why),
        }
    }

    /// Looks up every block of the job; for a write, gives each a physical block.
    fn resolve(&mut self, job: &Job<'_>, writing: bool) -> std::result::Result<(), Stop> {
        let (first, end) = touched_blocks(job);
        self.resolved.clear();
        let mut is_fenced = false;
        let mut has_empty = false;
        for block in (first..end).map(BlockIndex) {
            let entry = job.vssd.map().get(block);
            if !entry.is_plugged() {
                return Err(IoError::Evicted.into());
            }
            is_fenced |= entry.is_fenced();
            has_empty |= entry.is_empty();
            self.resolved.push(entry);
        }
        if is_fenced {
            return Err(Stop::Wait(Why::Fence));
        }
        if writing && has_empty {
            for i in 0..self.resolved.len() {
                if self.resolved[i].is_empty() {
                    // Below the vSSD's length, a u32.
                    let block = BlockIndex(first + u32::try_from(i).unwrap_or(0));
                    self.resolved[i] = self.first_touch(job.vssd, block)?;
                }
            }
        }
        Ok(())
    }

    /// Gives an empty block a physical one; the record becomes durable with the next flush.
    fn first_touch(&mut self, vssd: &Vssd, block: BlockIndex) -> std::result::Result<Entry, Stop> {
        let core = &*self.core;
        let commits_inline = core.journal.is_instant() || !core.has_threads;
        for has_committed in [false, true] {
            let mut ledger = core.journal.ledger();
            if core.closing.load(Ordering::Relaxed) {
                return Err(IoError::Io(libc::ESHUTDOWN).into());
            }
            if core.journal.room(&ledger) < core.lane_room() {
                drop(ledger);
                core.keeper_bell.ring();
                return Err(Stop::Wait(Why::Journal));
            }
            // Maps change from empty to mapped under this lock only, so what is read here stays, but for fences.
            let now = vssd.map().get(block);
            if now.is_fenced() || !now.is_plugged() {
                return Err(if now.is_plugged() { Stop::Wait(Why::Fence) } else { IoError::Evicted.into() });
            }
            if now.physical().is_some() {
                return Ok(now);
            }
            let taken = ledger.blocks.take(vssd.class(), core.journal.durable());
            let refilled = core.refill(&mut ledger);
            if let Some(physical) = taken {
                let entry = Entry::mapped(physical);
                if vssd.map().exchange(block, Entry::EMPTY, entry).is_err() {
                    ledger.blocks.put_back(physical, vssd.class());
                    return Err(Stop::Wait(Why::Fence));
                }
                let position = ledger.buffer.append(&Record::Map {
                    vssd: vssd.id(),
                    start: block.0,
                    count: 1,
                    physical,
                });
                vssd.add_allocated(1);
                drop(ledger);
                core.appended(position);
                if refilled {
                    core.commit_soon();
                }
                count(&vssd.counters(self.slot).first_touches, 1);
                return Ok(entry);
            }
            drop(ledger);
            if has_committed || !commits_inline {
                if refilled {
                    core.commit_soon();
                }
                break;
            }
            core.commit_soon();
        }
        core.scrub_bell.ring();
        Err(Stop::Wait(Why::Space))
    }

    /// Moves the data of a resolved job; the request, if part of it is in the ring.
    fn transfer(&mut self, job: &Job<'_>, direction: Direction) -> std::result::Result<Option<u32>, Stop> {
        let core = Arc::clone(&self.core);
        let mut cursor = Cursor::new(job.iov);
        let mut request = None;
        let counters = job.vssd.counters(self.slot);
        let bytes = if direction == Direction::Read { &counters.bytes_read } else { &counters.bytes_written };
        let mut at = job.offset;
        let end = job.offset + job.len;
        while at < end {
            let (physical, len) = self.run_at(job, at, end - at);
            at += len;
            let Some(physical) = physical else {
                let zeroed: std::result::Result<(), IoError> = cursor.take_all(len, |to, n| {
                    // SAFETY: the caller of `read` keeps the buffers writable.
                    unsafe { to.write_bytes(0, n) };
                    Ok(())
                });
                zeroed?;
                continue;
            };
            let start = at - len;
            let (kind, Some(medium)) = core.medium_of(physical) else {
                return Err(IoError::Io(libc::ENODEV).into());
            };
            let offset = medium.offset_of(physical, core.layout.block_size)
                + (start & (core.layout.block_size.bytes() - 1));
            count(&bytes[kind.index()], len);
            if medium.store.ring().is_some_and(|ring| ring.data) {
                self.transfer_by_ring(job.token, &mut request, (kind, offset, len), direction, &mut cursor)?;
                if request.is_some_and(|id| self.requests[id as usize].result.is_err()) {
                    break;
                }
                continue;
            }
            let mut offset = offset;
            let copied = cursor.take_all(len, |memory, n| {
                // SAFETY: the callers of `read` and `write` keep the buffers valid.
                let result = unsafe {
                    match direction {
                        Direction::Read => medium.store.copy_out(offset, memory, n),
                        Direction::Write => medium.store.copy_in(offset, memory, n),
                    }
                };
                offset += n as u64;
                result
            });
            if direction == Direction::Write {
                add(&core.lanes[self.slot].writes[kind.index()], 1);
            }
            if let Err(error) = copied {
                self.fail_request(request, errno(&error))?;
                break;
            }
        }
        Ok(request)
    }

    /// The physical block at `at` and how many of the next `max` bytes follow it on the medium; `None` for
    /// bytes without data.
    fn run_at(&self, job: &Job<'_>, at: u64, max: u64) -> (Option<PhysicalBlock>, u64) {
        let shift = job.vssd.block_size().shift();
        let bytes = job.vssd.block_size().bytes();
        // The job was validated: block numbers fit.
        let index = |at: u64| usize::try_from((at >> shift) - (job.offset >> shift)).unwrap_or(usize::MAX);
        let physical = |i: usize| self.resolved.get(i).and_then(|entry| entry.physical());
        let first = index(at);
        let start = physical(first);
        let mut len = (bytes - (at & (bytes - 1))).min(max);
        let mut next = first + 1;
        while len < max {
            let follows = match (start, physical(next)) {
                (None, None) => true,
                (Some(start), Some(physical)) => {
                    u64::from(physical.0) == u64::from(start.0) + (next - first) as u64
                        && (physical.0 < self.core.layout.blocks[0]) == (start.0 < self.core.layout.blocks[0])
                }
                _ => false,
            };
            if !follows {
                break;
            }
            len = (len + bytes).min(max);
            next += 1;
        }
        (start, len)
    }

    fn transfer_by_ring(
        &mut self,
        token: u64,
        request: &mut Option<u32>,
        place: (MediumKind, u64, u64),
        direction: Direction,
        buffers: &mut Cursor<'_>,
    ) -> std::result::Result<(), Stop> {
        self.ring()?;
        let id = match *request {
            Some(id) => id,
            None => {
                let section = self.section;
                if let Some(parity) = section {
                    self.core.grace.hold(self.slot, parity);
                }
                *request.insert(self.open_request(token, section))
            }
        };
        let mut parts = 0;
        let prepared = match &mut self.ring {
            Some(ring) => ring.transfer(id, place, direction, buffers, &mut parts),
            None => Err(IoError::Io(libc::ENODEV)),
        };
        let open = &mut self.requests[id as usize];
        open.left += parts;
        if let Err(error) = prepared {
            open.result = Err(error);
        }
        Ok(())
    }

    /// Notes that an opened request fails; without one, the error is for the caller to return.
    fn fail_request(&mut self, request: Option<u32>, error: IoError) -> std::result::Result<(), Stop> {
        match request {
            Some(id) => {
                self.requests[id as usize].result = Err(error);
                Ok(())
            }
            None => Err(error.into()),
        }
    }

    /// Takes the data from the whole blocks of a resolved job.
    fn discard_blocks(&mut self, job: &Job<'_>) -> std::result::Result<(), Stop> {
        let (first, end) = whole_blocks(job);
        let core = &*self.core;
        let map = job.vssd.map();
        let mut at = first;
        let mut freed_any = false;
        while at < end {
            let stop = end.min(at + DISCARD_AT_ONCE);
            if (at..stop).all(|block| map.get(BlockIndex(block)).is_empty()) {
                at = stop;
                continue;
            }
            let mut ledger = core.journal.ledger();
            if core.closing.load(Ordering::Relaxed) {
                return Err(IoError::Io(libc::ESHUTDOWN).into());
            }
            if core.journal.room(&ledger) < core.lane_room() {
                core.keeper_bell.ring();
                return Err(Stop::Wait(Why::Journal));
            }
            let class = job.vssd.class();
            let mut position = 0;
            let mut run = at;
            let mut freed = 0;
            let mut is_fenced = false;
            // One record for each run of blocks that are empty now, whether they were before or not.
            for block in at..stop {
                let entry = map.get(BlockIndex(block));
                let is_empty_now = entry == Entry::EMPTY
                    || entry.physical().is_some_and(|physical| {
                        let exchanged = map.exchange(BlockIndex(block), entry, Entry::EMPTY).is_ok();
                        if exchanged {
                            ledger.blocks.release(physical, class);
                            freed += 1;
                        }
                        exchanged
                    });
                if !is_empty_now {
                    is_fenced = true;
                    if run < block {
                        let record = Record::Empty { vssd: job.vssd.id(), start: run, count: block - run };
                        position = ledger.buffer.append(&record);
                    }
                    run = block + 1;
                }
            }
            if run < stop && freed > 0 {
                position = ledger.buffer.append(&Record::Empty {
                    vssd: job.vssd.id(),
                    start: run,
                    count: stop - run,
                });
            }
            job.vssd.sub_allocated(freed);
            drop(ledger);
            core.appended(position);
            freed_any |= freed > 0;
            if is_fenced {
                // Starting over does no harm to what is done.
                return Err(Stop::Wait(Why::Fence));
            }
            at = stop;
        }
        if freed_any {
            core.scrub_bell.ring();
        }
        Ok(())
    }

    /// Makes a resolved job's range zero.
    fn zero(&mut self, job: &Job<'_>, unmap: bool) -> std::result::Result<Option<u32>, Stop> {
        let bytes = job.vssd.block_size().bytes();
        let mut request = None;
        let end = job.offset + job.len;
        let mut keep = (0, 0);
        if unmap {
            self.discard_blocks(job)?;
            let (first, last) = whole_blocks(job);
            if first < last {
                keep = (u64::from(first) * bytes, u64::from(last) * bytes);
            }
        }
        let mut at = job.offset;
        while at < end {
            if (keep.0..keep.1).contains(&at) {
                at = keep.1;
                continue;
            }
            let max = if at < keep.0 { keep.0 - at } else { end - at };
            let (physical, len) = self.run_at(job, at, max);
            if let Some(physical) = physical {
                self.zero_run(job, physical, at, len, &mut request)?;
            }
            at += len;
        }
        Ok(request)
    }

    fn zero_run(
        &mut self,
        job: &Job<'_>,
        physical: PhysicalBlock,
        at: u64,
        len: u64,
        request: &mut Option<u32>,
    ) -> std::result::Result<(), Stop> {
        let core = Arc::clone(&self.core);
        let (kind, Some(medium)) = core.medium_of(physical) else {
            return Err(IoError::Io(libc::ENODEV).into());
        };
        let block_size = core.layout.block_size;
        let offset = medium.offset_of(physical, block_size) + (at & (block_size.bytes() - 1));
        count(&job.vssd.counters(self.slot).bytes_written[kind.index()], len);
        if !medium.store.ring().is_some_and(|ring| ring.data) {
            let result = medium.store.zero(offset, len);
            add(&core.lanes[self.slot].writes[kind.index()], 1);
            return result.or_else(|error| self.fail_request(*request, errno(&error)));
        }
        let zeroes = self.zeroes.get_or_insert_with(|| AlignedBuf::zeroed(ZEROES)).as_mut_ptr();
        let mut buffers = Vec::new();
        let mut left = len;
        while left > 0 {
            let n = left.min(ZEROES as u64);
            // At most ZEROES.
            buffers
                .push(libc::iovec { iov_base: zeroes.cast(), iov_len: usize::try_from(n).unwrap_or(ZEROES) });
            left -= n;
        }
        self.transfer_by_ring(
            job.token,
            request,
            (kind, offset, len),
            Direction::Write,
            &mut Cursor::new(&buffers),
        )
    }

    fn ring(&mut self) -> std::result::Result<&mut Ring, IoError> {
        let ring = match self.ring.take() {
            Some(ring) => ring,
            None => {
                let targets = [0, 1].map(|i| {
                    self.core.media[i].as_ref().and_then(|medium: &crate::core::Medium| medium.store.ring())
                });
                let event = self.core.lanes[self.slot].event_raw().ok_or(IoError::Io(libc::EBADF))?;
                Ring::new(targets, event).map_err(|error| {
                    tracing::error!(%error, "cannot make an io_uring");
                    errno(&error)
                })?
            }
        };
        Ok(self.ring.insert(ring))
    }

    /// A request with one unfinished part, which [`Lane::close_request`] takes away.
    fn open_request(&mut self, token: u64, section: Option<Parity>) -> u32 {
        let request = Request { token, left: 1, result: Ok(()), section };
        self.open += 1;
        if let Some(id) = self.free.pop() {
            self.requests[id as usize] = request;
            return id;
        }
        self.requests.push(request);
        // A lane has at most a few thousand requests.
        u32::try_from(self.requests.len() - 1).unwrap_or(u32::MAX)
    }

    /// All parts are prepared; tells whether they are over already.
    fn close_request(&mut self, id: u32) -> Submitted {
        match self.part_over(id) {
            Some((_, result)) => Submitted::Done(result),
            None => Submitted::Pending,
        }
    }

    fn part_over(&mut self, id: u32) -> Option<(u64, std::result::Result<(), IoError>)> {
        let request = &mut self.requests[id as usize];
        request.left -= 1;
        if request.left > 0 {
            return None;
        }
        if let Some(parity) = request.section.take() {
            self.core.grace.leave(self.slot, parity);
        }
        self.open -= 1;
        self.free.push(id);
        Some((request.token, request.result))
    }

    fn reap(&mut self) {
        let Some(mut ring) = self.ring.take() else { return };
        ring.reap(|finished| self.finished(&finished));
        self.ring = Some(ring);
    }

    fn finished(&mut self, part: &Finished) {
        let core = Arc::clone(&self.core);
        let i = part.medium.index();
        if part.written > 0 {
            add(&core.lanes[self.slot].ring_bytes_written[i], part.written);
            add(&core.lanes[self.slot].writes[i], 1);
        }
        if let Err(error) = part.result {
            if part.flushed.is_some() {
                let errno = if let IoError::Io(errno) = error { errno } else { libc::EIO };
                core.journal.fail(&std::io::Error::from_raw_os_error(errno));
            }
            self.requests[part.request as usize].result = Err(error);
        } else if let Some(writes) = part.flushed {
            core.synced[i].fetch_max(writes, Ordering::AcqRel);
        }
        let over = self.part_over(part.request);
        self.ready.extend(over);
    }

    fn finish_flushes(&mut self) {
        if self.flushes.is_empty() {
            return;
        }
        let durable = self.core.journal.durable();
        let has_failed = self.core.journal.has_failed();
        let mut flushes = std::mem::take(&mut self.flushes);
        flushes.retain(|&(position, request)| {
            if durable < position && !has_failed {
                return true;
            }
            if durable < position {
                self.requests[request as usize].result = Err(IoError::Io(libc::EIO));
            }
            let over = self.part_over(request);
            self.ready.extend(over);
            false
        });
        self.flushes = flushes;
    }

    fn park(&mut self, job: &Job<'_>) {
        self.parked.push_back(Parked {
            vssd: Arc::clone(job.vssd),
            op: job.op,
            offset: job.offset,
            len: job.len,
            iov: job.iov.to_vec(),
            token: job.token,
            since: Instant::now(),
        });
        self.announce_waiting();
        self.look_again = true;
        // It looks after deadlines while somebody waits.
        self.core.keeper_bell.ring();
    }

    fn announce_waiting(&self) {
        self.core.lanes[self.slot].waiting.store(true, Ordering::Relaxed);
        // Pairs with the fence in `Core::wake_lanes`.
        fence(Ordering::SeqCst);
    }

    fn update_waiting(&self) {
        let waits = !self.parked.is_empty() || !self.flushes.is_empty();
        if !waits && self.core.lanes[self.slot].waiting.load(Ordering::Relaxed) {
            self.core.lanes[self.slot].waiting.store(false, Ordering::Relaxed);
        }
    }

    fn is_overdue(&self) -> bool {
        self.parked.front().is_some_and(|first| first.since.elapsed() >= self.core.space_wait)
    }

    fn retry_parked(&mut self) {
        let opened = self.enter();
        for _ in 0..self.parked.len() {
            let Some(parked) = self.parked.pop_front() else { break };
            let Parked { vssd, op, offset, len, iov, token, since } = &parked;
            let job = Job { vssd, op: *op, offset: *offset, len: *len, iov, token: *token };
            // The pool may have failed meanwhile.
            let step = match self.validate(&job) {
                Ok(()) => self.run(&job),
                Err(error) => Step::Done(Err(error)),
            };
            match step {
                Step::Done(result) => self.ready.push((*token, result)),
                Step::Pending => {}
                Step::Wait(why) if why != Why::Fence && self.has_waited(since.elapsed()) => {
                    let error = match why {
                        Why::Space => IoError::NoSpace,
                        _ => IoError::Io(libc::ETIMEDOUT),
                    };
                    self.ready.push((*token, Err(error)));
                }
                Step::Wait(_) => self.parked.push_back(parked),
            }
        }
        if opened {
            self.leave();
        }
    }

    fn has_waited(&self, time: Duration) -> bool {
        time >= self.core.space_wait
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.leave();
        self.parked.clear();
        // The kernel may still be writing to the callers' buffers.
        while self.ring.as_ref().is_some_and(|ring| ring.in_flight() > 0) {
            if !self.ring.as_mut().is_some_and(Ring::wait) {
                tracing::error!("a lane was dropped on another thread than its own, with requests in flight");
                break;
            }
            self.reap();
        }
        for request in &mut self.requests {
            if let Some(parity) = request.section.take() {
                self.core.grace.leave(self.slot, parity);
            }
        }
        let slot = &self.core.lanes[self.slot];
        slot.waiting.store(false, Ordering::Relaxed);
        slot.woken.store(false, Ordering::Relaxed);
        self.core.grace.unregister(self.slot);
    }
}

/// The blocks a job touches: first, and one past the last.
fn touched_blocks(job: &Job<'_>) -> (u32, u32) {
    let size = job.vssd.block_size();
    let block = |bytes: u64| u32::try_from(bytes >> size.shift()).unwrap_or(u32::MAX);
    (block(job.offset), block((job.offset + job.len).next_multiple_of(size.bytes())))
}

/// The blocks that lie wholly in a job.
fn whole_blocks(job: &Job<'_>) -> (u32, u32) {
    let size = job.vssd.block_size();
    let block = |bytes: u64| u32::try_from(bytes >> size.shift()).unwrap_or(u32::MAX);
    (block(job.offset.next_multiple_of(size.bytes())), block(job.offset + job.len))
}
