// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What a lane has under way: its section, its ring, and the requests that are in it, parked, or ready to be
//! reported.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::Instant;

use vssd_protocol::units::SECTOR_SIZE;

use super::copies::Copies;
use super::job::{Job, Op, Outcome, Step, Why, errno};
use super::ring::{Finished, Ring, WARM};
use super::sync::Group;
use crate::core::Core;
use crate::grace::Parity;
use crate::map::Entry;
use crate::store::AlignedBuf;
use crate::types::{IoError, MediumKind, Submitted, VssdId};
use crate::vssd::Vssd;

/// A request with parts in the ring, or a flush.
#[derive(Debug)]
pub(super) struct Request {
    token: u64,
    pub(super) left: u32,
    pub(super) result: Outcome,
    /// What it counts as in flight under; flushes touch no blocks.
    section: Option<Parity>,
    origin: Origin,
}

/// What it takes to start a request over that found no room on its medium.
#[derive(Debug, Default)]
struct Origin {
    /// `None`: it is not to be started over.
    what: Option<(VssdId, Op)>,
    offset: u64,
    len: u64,
    /// Kept for its capacity when the request is over.
    iov: Vec<libc::iovec>,
    /// When it was first started, if it was started over.
    since: Option<Instant>,
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

/// See the module's text.
#[derive(Debug)]
pub(super) struct Work {
    pub(super) slot: usize,
    pub(super) section: Option<Parity>,
    pub(super) ring: Option<Ring>,
    pub(super) copies: Copies,
    pub(super) requests: Vec<Request>,
    free: Vec<u32>,
    /// Requests that wait for parts or for the journal.
    open: usize,
    /// Flushes that wait for a medium.
    syncs: [Group; 2],
    /// Flushes that wait for the journal: (position, request).
    flushes: Vec<(u64, u32)>,
    parked: VecDeque<Parked>,
    /// Something was parked since the section began: look once more, for the waker may not have seen it.
    look_again: bool,
    ready: Vec<(u64, Outcome)>,
    /// What the current request's blocks are; kept for its capacity.
    pub(super) resolved: Vec<Entry>,
    pub(super) zeroes: Option<AlignedBuf>,
    /// Media that had lost part of what they held when the last section ended; nothing is asked of them any more.
    pub(super) lost: [bool; 2],
    /// Media that were looked at in the section of now.
    pub(super) looked: [bool; 2],
    /// When the parked request that is being started over was first started.
    retrying_since: Option<Instant>,
    /// Records could not be handed over. Said once: later changes are refused at once.
    unrecorded: bool,
}

impl Work {
    pub(super) fn new(slot: usize) -> Self {
        Self {
            slot,
            section: None,
            ring: None,
            copies: Copies::new(),
            requests: Vec::with_capacity(WARM),
            free: Vec::with_capacity(WARM),
            open: 0,
            syncs: Default::default(),
            flushes: Vec::new(),
            parked: VecDeque::new(),
            look_again: false,
            ready: Vec::with_capacity(WARM),
            resolved: Vec::with_capacity(WARM),
            zeroes: None,
            lost: [false; 2],
            looked: [false; 2],
            retrying_since: None,
            unrecorded: false,
        }
    }

    pub(super) fn has_pending(&self) -> bool {
        self.open > 0 || !self.parked.is_empty() || !self.ready.is_empty()
    }

    /// The lane goes: waits for what the kernel has, forgets the rest.
    pub(super) fn finish(&mut self, core: &Core) {
        self.leave(core);
        self.parked.clear();
        // The kernel may still be writing to the callers' buffers.
        while self.ring.as_ref().is_some_and(|ring| ring.in_flight() > 0) {
            if !self.ring.as_mut().is_some_and(Ring::wait) {
                tracing::error!("a lane was dropped on another thread than its own, with requests in flight");
                break;
            }
            self.reap(core);
        }
        for request in &mut self.requests {
            if let Some(parity) = request.section.take() {
                core.grace.leave(self.slot, parity);
            }
        }
        let slot = &core.lanes[self.slot];
        slot.waiting.store(false, Ordering::Relaxed);
        slot.woken.store(false, Ordering::Relaxed);
        core.grace.unregister(self.slot);
    }

    pub(super) fn end_batch(&mut self, core: &Core) -> bool {
        let sound = self.leave(core);
        if std::mem::take(&mut self.look_again) {
            self.retry_parked(core);
            if !self.ready.is_empty() {
                core.lanes[self.slot].ring();
            }
        }
        sound
    }

    pub(super) fn flush(&mut self, core: &Core, token: u64) -> Submitted {
        if core.read_only {
            return Submitted::Done(Ok(()));
        }
        if core.journal.has_failed() {
            return Submitted::Done(Err(IoError::Io(libc::EIO)));
        }
        // What is counted as written has to be there before a sync may cover it.
        self.copies.finish(core, self.slot);
        let request = self.open_request(token, None);
        for kind in MediumKind::ALL {
            let Some(medium) = &core.media[kind.index()] else { continue };
            let Some(writes) = core.unsynced(kind) else { continue };
            if medium.store.ring().is_some() {
                match self.ring(core) {
                    Ok(_) => {
                        self.syncs[kind.index()].join(writes, request);
                        self.requests[request as usize].left += 1;
                    }
                    Err(error) => self.requests[request as usize].result = Err(error),
                }
            } else {
                let synced = medium.store.sync();
                core.note_sync(kind, writes, &synced);
                if let Err(error) = synced {
                    self.requests[request as usize].result = Err(errno(&error));
                }
            }
        }
        let position = core.journal.ledger().buffer.position();
        if core.journal.durable() < position {
            if core.commits_inline() {
                if core.journal.commit(position).is_err() {
                    self.requests[request as usize].result = Err(IoError::Io(libc::EIO));
                }
            } else {
                self.requests[request as usize].left += 1;
                self.flushes.push((position, request));
                self.announce_waiting(core);
                core.commit_bell.ring();
            }
        }
        self.begin_syncs(core);
        if self.section.is_none() {
            self.submit(core);
        }
        self.close_request(core, request)
    }

    /// Prepares the syncs that flushes wait for. Whether there were some.
    fn begin_syncs(&mut self, core: &Core) -> bool {
        let mut any = false;
        for kind in MediumKind::ALL {
            let group = &mut self.syncs[kind.index()];
            if group.is_due()
                && let Some(ring) = &mut self.ring
            {
                let writes = core.writes_on(kind);
                ring.sync(kind, writes);
                group.begin(writes);
                any = true;
            }
        }
        any
    }

    pub(super) fn poll(&mut self, core: &Core, done: &mut impl FnMut(u64, Outcome)) -> usize {
        let slot = &core.lanes[self.slot];
        let woken = slot.woken.swap(false, Ordering::Acquire);
        if woken || self.ring.is_some() || !self.ready.is_empty() {
            // Before looking at anything, so that news from now on makes it readable again.
            let mut counter = [0; 8];
            if let Ok(event) = slot.event() {
                // Not readable is as good.
                let _ = rustix::io::read(event, &mut counter);
            }
        }
        self.reap(core);
        self.finish_flushes(core);
        if !self.parked.is_empty() && (woken || self.is_overdue(core)) {
            self.retry_parked(core);
        }
        let ready = std::mem::take(&mut self.ready);
        let reported = ready.len();
        for &(token, result) in &ready {
            done(token, result);
        }
        // The callback cannot reach the lane, so nothing was added meanwhile; keep the capacity.
        self.ready = ready;
        self.ready.clear();
        self.update_waiting(core);
        reported
    }

    pub(super) fn has_news(&mut self, core: &Core) -> bool {
        !self.ready.is_empty()
            || core.lanes[self.slot].woken.load(Ordering::Relaxed)
            || self.ring.as_mut().is_some_and(Ring::has_news)
    }

    /// Opens a section, unless one is open; whether it did.
    pub(super) fn enter(&mut self, core: &Core) -> bool {
        if self.section.is_some() {
            return false;
        }
        self.section = Some(core.grace.enter(self.slot));
        self.looked = [false; 2];
        true
    }

    /// Submits what was prepared, makes the copies that wait, and closes the section. False if one of them may have met a
    /// hole in its medium.
    fn leave(&mut self, core: &Core) -> bool {
        self.submit(core);
        self.copies.finish(core, self.slot);
        let sound = self.notice_losses(core);
        if let Some(parity) = self.section.take() {
            core.grace.leave(self.slot, parity);
            // The journal remembers a failure and refuses every later change; what this batch changed is to be refused, too.
            if let Err(error) = core.journal.hand_over()
                && !std::mem::replace(&mut self.unrecorded, true)
            {
                tracing::debug!(%error, "records stay in memory");
                self.fail_all();
                return false;
            }
        }
        sound
    }

    /// False if a medium lost part of what it held since this was last asked. Whatever is under way then fails, for it may
    /// have met the hole, and so do all changes of the pool from now on.
    fn notice_losses(&mut self, core: &Core) -> bool {
        let mut sound = true;
        for (lost, medium) in self.lost.iter_mut().zip(&core.media) {
            let Some(medium) = medium else { continue };
            if !*lost && medium.store.is_lost() {
                *lost = true;
                sound = false;
            }
        }
        if !sound {
            core.journal.fail(&std::io::Error::from_raw_os_error(libc::EIO));
            self.fail_all();
        }
        sound
    }

    /// Whatever is under way or not yet reported fails.
    fn fail_all(&mut self) {
        let failed = Err(IoError::Io(libc::EIO));
        self.requests.iter_mut().for_each(|request| request.result = failed);
        self.ready.iter_mut().for_each(|(_, result)| *result = failed);
    }

    /// Validates a request and carries it out or parks it.
    pub(super) fn start(&mut self, core: &Core, job: Job<'_>) -> Submitted {
        if let Err(error) = self.validate(core, &job) {
            return Submitted::Done(Err(error));
        }
        if job.len == 0 {
            return Submitted::Done(Ok(()));
        }
        let opened = self.enter(core);
        let submitted = match self.run(core, &job) {
            Step::Done(result) => Submitted::Done(result),
            Step::Pending => Submitted::Pending,
            Step::Wait(_) => {
                self.park(core, &job);
                Submitted::Pending
            }
        };
        if opened && !self.end_batch(core) && submitted != Submitted::Pending {
            return Submitted::Done(Err(IoError::Io(libc::EIO)));
        }
        submitted
    }

    fn validate(&self, core: &Core, job: &Job<'_>) -> Outcome {
        let size = job.vssd.block_size().bytes_of(job.vssd.total_blocks());
        let is_inside = job.offset.checked_add(job.len).is_some_and(|end| end <= size);
        let is_whole = (job.offset | job.len).is_multiple_of(SECTOR_SIZE);
        if !is_inside || !is_whole || job.vssd.instance() != core.instance {
            return Err(IoError::OutOfRange);
        }
        if job.op != Op::Read {
            if core.read_only {
                return Err(IoError::ReadOnly);
            }
            // What could not be made durable must not be acknowledged.
            if core.journal.has_failed() {
                return Err(IoError::Io(libc::EIO));
            }
        }
        Ok(())
    }

    /// The ring, made at first use: the kernel binds it to the thread that makes it.
    pub(super) fn ring(&mut self, core: &Core) -> Result<&mut Ring, IoError> {
        let ring = match self.ring.take() {
            Some(ring) => ring,
            None => {
                let targets = [0, 1].map(|i| {
                    core.media[i].as_ref().and_then(|medium: &crate::core::Medium| medium.store.ring())
                });
                let event = core.lanes[self.slot].event_raw().ok_or(IoError::Io(libc::EBADF))?;
                Ring::new(targets, event).map_err(|error| {
                    tracing::error!(%error, "cannot make an io_uring");
                    errno(&error)
                })?
            }
        };
        Ok(self.ring.insert(ring))
    }

    /// A request with one unfinished part, which [`Work::close_request`] takes away.
    pub(super) fn open_request(&mut self, token: u64, section: Option<Parity>) -> u32 {
        self.open += 1;
        if let Some(id) = self.free.pop() {
            let request = &mut self.requests[id as usize];
            (request.token, request.left, request.result, request.section) = (token, 1, Ok(()), section);
            request.origin.what = None;
            return id;
        }
        self.requests.push(Request { token, left: 1, result: Ok(()), section, origin: Origin::default() });
        // A lane has at most a few thousand requests.
        u32::try_from(self.requests.len() - 1).unwrap_or(u32::MAX)
    }

    /// All parts are prepared; tells whether they are over already.
    pub(super) fn close_request(&mut self, core: &Core, id: u32) -> Submitted {
        match self.part_over(core, id) {
            Some((_, result)) => Submitted::Done(result),
            None => Submitted::Pending,
        }
    }

    /// Remembers where an opened request comes from.
    pub(super) fn set_origin(&mut self, id: u32, job: &Job<'_>) {
        if job.op == Op::Read {
            return;
        }
        let since = self.retrying_since;
        let origin = &mut self.requests[id as usize].origin;
        origin.what = Some((job.vssd.id(), job.op));
        (origin.offset, origin.len, origin.since) = (job.offset, job.len, since);
        origin.iov.clear();
        origin.iov.extend_from_slice(job.iov);
    }

    /// Parks a request that is over but found no room on its medium, unless it has waited long enough. Its blocks stay
    /// mapped; the rest of what was to be written is written when there is room.
    fn park_again(&mut self, core: &Core, id: u32) -> bool {
        let request = &mut self.requests[id as usize];
        let origin = &mut request.origin;
        let Some((vssd, op)) = origin.what.take() else { return false };
        let since = origin.since.unwrap_or_else(Instant::now);
        if request.result != Err(IoError::NoSpace) || since.elapsed() >= core.space_wait {
            return false;
        }
        let Some(vssd) = core.vssd(vssd) else { return false };
        let (offset, len, iov) = (origin.offset, origin.len, origin.iov.clone());
        self.parked.push_back(Parked { vssd, op, offset, len, iov, token: request.token, since });
        self.announce_waiting(core);
        core.keeper_bell.ring();
        true
    }

    fn part_over(&mut self, core: &Core, id: u32) -> Option<(u64, Outcome)> {
        let request = &mut self.requests[id as usize];
        request.left -= 1;
        if request.left > 0 {
            return None;
        }
        match request.section.take() {
            Some(parity) => core.grace.leave(self.slot, parity),
            // Only a flush has none. The kernel tells of a failed write-back once, to whoever asks first: where somebody
            // was told, this flush cannot vouch for anything.
            None if core.journal.has_failed() => {
                request.result = request.result.and(Err(IoError::Io(libc::EIO)));
            }
            None => {}
        }
        let (token, result) = (request.token, request.result);
        self.open -= 1;
        self.free.push(id);
        if self.park_again(core, id) { None } else { Some((token, result)) }
    }

    fn reap(&mut self, core: &Core) {
        let Some(mut ring) = self.ring.take() else { return };
        ring.reap(|finished| self.finished(core, &finished));
        self.ring = Some(ring);
        if self.begin_syncs(core) {
            self.submit(core);
        }
    }

    fn finished(&mut self, core: &Core, part: &Finished) {
        if let Some(writes) = part.synced {
            self.synced(core, part.medium, writes, part.result);
            return;
        }
        if part.written > 0 {
            core.lanes[self.slot].moved(part.medium, part.written);
            core.lanes[self.slot].completed(part.medium, 1);
        }
        if let Err(error) = part.result {
            self.requests[part.request as usize].result = Err(error);
        }
        let over = self.part_over(core, part.request);
        self.ready.extend(over);
    }

    fn synced(&mut self, core: &Core, kind: MediumKind, writes: u64, result: Outcome) {
        let synced = result.map_err(|error| {
            std::io::Error::from_raw_os_error(if let IoError::Io(errno) = error { errno } else { libc::EIO })
        });
        core.note_sync(kind, writes, &synced);
        let mut group = std::mem::take(&mut self.syncs[kind.index()]);
        group.end(result, |request| {
            if result.is_err() {
                self.requests[request as usize].result = result;
            }
            let over = self.part_over(core, request);
            self.ready.extend(over);
        });
        self.syncs[kind.index()] = group;
    }

    fn finish_flushes(&mut self, core: &Core) {
        if self.flushes.is_empty() {
            return;
        }
        let durable = core.journal.durable();
        let has_failed = core.journal.has_failed();
        let mut flushes = std::mem::take(&mut self.flushes);
        flushes.retain(|&(position, request)| {
            if durable < position && !has_failed {
                return true;
            }
            if durable < position {
                self.requests[request as usize].result = Err(IoError::Io(libc::EIO));
            }
            let over = self.part_over(core, request);
            self.ready.extend(over);
            false
        });
        self.flushes = flushes;
    }

    fn park(&mut self, core: &Core, job: &Job<'_>) {
        self.parked.push_back(Parked {
            vssd: Arc::clone(job.vssd),
            op: job.op,
            offset: job.offset,
            len: job.len,
            iov: job.iov.to_vec(),
            token: job.token,
            since: Instant::now(),
        });
        self.announce_waiting(core);
        self.look_again = true;
        // It looks after deadlines while somebody waits.
        core.keeper_bell.ring();
    }

    fn announce_waiting(&self, core: &Core) {
        core.lanes[self.slot].waiting.store(true, Ordering::Relaxed);
        // Pairs with the fence in `Core::wake_lanes`.
        fence(Ordering::SeqCst);
    }

    fn submit(&mut self, core: &Core) {
        if let Some(ring) = &mut self.ring {
            ring.submit();
            self.look_after_ring(core);
        }
    }

    /// What the kernel did not take makes no event: the keeper reminds the lane.
    fn look_after_ring(&mut self, core: &Core) -> bool {
        let is_stuck = self.ring.as_mut().is_some_and(Ring::is_stuck);
        if is_stuck && !core.lanes[self.slot].waiting.load(Ordering::Relaxed) {
            self.announce_waiting(core);
            core.keeper_bell.ring();
        }
        is_stuck
    }

    fn update_waiting(&mut self, core: &Core) {
        let is_stuck = self.look_after_ring(core);
        let waits = is_stuck || !self.parked.is_empty() || !self.flushes.is_empty();
        if !waits && core.lanes[self.slot].waiting.load(Ordering::Relaxed) {
            core.lanes[self.slot].waiting.store(false, Ordering::Relaxed);
        }
    }

    fn is_overdue(&self, core: &Core) -> bool {
        self.parked.front().is_some_and(|first| first.since.elapsed() >= core.space_wait)
    }

    fn retry_parked(&mut self, core: &Core) {
        let opened = self.enter(core);
        for _ in 0..self.parked.len() {
            let Some(parked) = self.parked.pop_front() else { break };
            let Parked { vssd, op, offset, len, iov, token, since } = &parked;
            let job = Job { vssd, op: *op, offset: *offset, len: *len, iov, token: *token };
            self.retrying_since = Some(*since);
            // The pool may have failed meanwhile.
            let step = match self.validate(core, &job) {
                Ok(()) => self.run(core, &job),
                Err(error) => Step::Done(Err(error)),
            };
            self.retrying_since = None;
            match step {
                Step::Done(result) => self.ready.push((*token, result)),
                Step::Pending => {}
                Step::Wait(why) if why != Why::Fence && since.elapsed() >= core.space_wait => {
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
            self.leave(core);
        }
    }
}
