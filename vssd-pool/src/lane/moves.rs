// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Carrying out one request: looking up its blocks, giving them physical ones, moving its bytes.

use std::sync::atomic::Ordering;

use vssd_protocol::units::{BlockIndex, PhysicalBlock};

use super::copies::Copy;
use super::iov::Cursor;
use super::job::{Job, Op, Outcome, Step, Stop, Why, errno};
use super::ring::Direction;
use super::work::Work;
use crate::core::Core;
use crate::map::Entry;
use crate::record::Record;
use crate::store::AlignedBuf;
use crate::types::{IoError, MediumKind, Submitted};
use crate::vssd::{Vssd, count};

/// Zeroes written at a time to media without a better way.
const ZEROES: usize = 256 << 10;
/// Blocks discarded under one hold of the ledger's lock.
const DISCARD_AT_ONCE: u32 = 1024;

impl Work {
    /// Within a section.
    pub(super) fn run(&mut self, core: &Core, job: &Job<'_>) -> Step {
        let carried_out = match job.op {
            Op::Read => {
                self.resolve(core, job, false).and_then(|()| self.transfer(core, job, Direction::Read))
            }
            Op::Write => {
                self.resolve(core, job, true).and_then(|()| self.transfer(core, job, Direction::Write))
            }
            Op::Discard => {
                self.resolve(core, job, false).and_then(|()| self.discard_blocks(core, job).map(|()| None))
            }
            Op::WriteZeroes { unmap } => {
                self.resolve(core, job, false).and_then(|()| self.zero(core, job, unmap))
            }
        };
        match carried_out {
            Ok(None) => Step::Done(Ok(())),
            Ok(Some(request)) => match self.close_request(core, request) {
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
    fn resolve(&mut self, core: &Core, job: &Job<'_>, writing: bool) -> Result<(), Stop> {
        let (first, end) = touched_blocks(job);
        self.resolved.clear();
        let mut is_fenced = false;
        let mut has_empty = false;
        for block in (first..end).map(BlockIndex) {
            let entry = job.vssd.map().lookup(block);
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
                    self.resolved[i] = self.first_touch(core, job.vssd, block)?;
                }
            }
        }
        Ok(())
    }

    /// Gives an empty block a physical one; the record becomes durable with the next flush.
    fn first_touch(&mut self, core: &Core, vssd: &Vssd, block: BlockIndex) -> Result<Entry, Stop> {
        let commits_inline = core.commits_inline();
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
                core.journal.announce(&ledger);
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
    fn transfer(&mut self, core: &Core, job: &Job<'_>, direction: Direction) -> Result<Option<u32>, Stop> {
        let mut cursor = Cursor::new(job.iov);
        let mut request = None;
        let counters = job.vssd.counters(self.slot);
        let bytes = if direction == Direction::Read { &counters.bytes_read } else { &counters.bytes_written };
        let mut at = job.offset;
        let end = job.offset + job.len;
        while at < end {
            let (physical, len) = self.run_at(core, job, at, end - at);
            at += len;
            let Some(physical) = physical else {
                let zeroed: Outcome = cursor.take_all(len, |to, n| {
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
            if self.lost[kind.index()] {
                self.fail_request(request, IoError::Io(libc::EIO))?;
                break;
            }
            let offset = medium.offset_of(physical, core.layout.block_size)
                + (start & (core.layout.block_size.bytes() - 1));
            count(&bytes[kind.index()], len);
            if medium.store.ring().is_some_and(|ring| ring.data) {
                self.transfer_by_ring(core, job, &mut request, (kind, offset, len), direction, &mut cursor)?;
                if request.is_some_and(|id| self.requests[id as usize].result.is_err()) {
                    break;
                }
                continue;
            }
            let mut offset = offset;
            let copies = &mut self.copies;
            let copied = cursor.take_all(len, |memory, len| {
                let copy = Copy { direction, medium: kind, offset, memory, len };
                offset += len as u64;
                // SAFETY: the callers of `read` and `write` keep the buffers valid until the batch has ended.
                unsafe { copies.push(core, copy) }
            });
            if direction == Direction::Write {
                core.lanes[self.slot].moved(kind, len);
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
    fn run_at(&self, core: &Core, job: &Job<'_>, at: u64, max: u64) -> (Option<PhysicalBlock>, u64) {
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
                        && (physical.0 < core.layout.blocks[0]) == (start.0 < core.layout.blocks[0])
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
        core: &Core,
        job: &Job<'_>,
        request: &mut Option<u32>,
        place: (MediumKind, u64, u64),
        direction: Direction,
        buffers: &mut Cursor<'_>,
    ) -> Result<(), Stop> {
        let (kind, offset, len) = place;
        let Some(medium) = &core.media[kind.index()] else { return Err(IoError::Io(libc::ENODEV).into()) };
        if !std::mem::replace(&mut self.looked[kind.index()], true) {
            medium.store.look();
        }
        if offset + len > medium.store.intact() {
            return self.fail_request(*request, IoError::Io(libc::EIO));
        }
        self.ring(core)?;
        let id = match *request {
            Some(id) => id,
            None => {
                let section = self.section;
                if let Some(parity) = section {
                    core.grace.hold(self.slot, parity);
                }
                let id = self.open_request(job.token, section);
                self.set_origin(id, job);
                *request.insert(id)
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
    fn fail_request(&mut self, request: Option<u32>, error: IoError) -> Result<(), Stop> {
        match request {
            Some(id) => {
                self.requests[id as usize].result = Err(error);
                Ok(())
            }
            None => Err(error.into()),
        }
    }

    /// Takes the data from the whole blocks of a resolved job.
    fn discard_blocks(&mut self, core: &Core, job: &Job<'_>) -> Result<(), Stop> {
        let (first, end) = whole_blocks(job);
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
            core.journal.announce(&ledger);
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
    fn zero(&mut self, core: &Core, job: &Job<'_>, unmap: bool) -> Result<Option<u32>, Stop> {
        let bytes = job.vssd.block_size().bytes();
        let mut request = None;
        let end = job.offset + job.len;
        let mut keep = (0, 0);
        if unmap {
            self.discard_blocks(core, job)?;
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
            let (physical, len) = self.run_at(core, job, at, max);
            if let Some(physical) = physical {
                self.zero_run(core, job, physical, at, len, &mut request)?;
            }
            at += len;
        }
        Ok(request)
    }

    fn zero_run(
        &mut self,
        core: &Core,
        job: &Job<'_>,
        physical: PhysicalBlock,
        at: u64,
        len: u64,
        request: &mut Option<u32>,
    ) -> Result<(), Stop> {
        let (kind, Some(medium)) = core.medium_of(physical) else {
            return Err(IoError::Io(libc::ENODEV).into());
        };
        let block_size = core.layout.block_size;
        let offset = medium.offset_of(physical, block_size) + (at & (block_size.bytes() - 1));
        count(&job.vssd.counters(self.slot).bytes_written[kind.index()], len);
        if !medium.store.ring().is_some_and(|ring| ring.data) {
            let result = medium.store.zero(offset, len);
            core.lanes[self.slot].completed(kind, 1);
            return result.or_else(|error| self.fail_request(*request, errno(&error)));
        }
        let zeroes = self.zeroes.get_or_insert_with(|| AlignedBuf::zeroed(ZEROES)).as_mut_ptr();
        let buffers = [libc::iovec { iov_base: zeroes.cast(), iov_len: ZEROES }; 4];
        let most = (ZEROES * buffers.len()) as u64;
        let mut done = 0;
        while done < len {
            let n = (len - done).min(most);
            let place = (kind, offset + done, n);
            self.transfer_by_ring(core, job, request, place, Direction::Write, &mut Cursor::new(&buffers))?;
            done += n;
        }
        Ok(())
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
