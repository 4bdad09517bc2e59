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

mod copies;
mod iov;
mod job;
mod moves;
mod ring;
mod sync;
mod work;

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use crate::core::Core;
use crate::error::{Error, Result};
use crate::types::{IoError, Submitted};
use crate::vssd::{Vssd, count};
use job::{Job, Op};
use work::Work;

/// A worker's way to the data of every vSSD of the pool. It may be made on any thread, but from its first
/// request on it must stay on one.
///
/// Between [`Lane::begin_batch`] and [`Lane::end_batch`] requests are only prepared; the latter submits them
/// in one system call. A request outside a batch is a batch of its own. Offsets and lengths are bytes of the
/// vSSD, multiples of 512, and for writes of the pool's `logical_block_bytes`.
#[derive(Debug)]
pub struct Lane {
    core: Arc<Core>,
    /// Apart from `core`, so that it can be changed while the media in there are borrowed: a reference count on
    /// the data path would be shared by all lanes.
    work: Work,
}

// SAFETY: the raw pointers in it (parked and submitted buffers) are only followed while the request is under
// way, and `read` and `write` demand that they stay valid that long, on whatever thread.
unsafe impl Send for Lane {}

impl Lane {
    pub(crate) fn new(core: Arc<Core>) -> Result<Self> {
        let slot = core.grace.register().ok_or_else(|| {
            Error::invalid(format!("a pool has at most {} lanes at a time", crate::grace::MAX_LANES))
        })?;
        let lane = Self { work: Work::new(slot), core };
        lane.core.lanes[slot]
            .event()
            .map_err(|source| Error::io("cannot make an event descriptor", source))?;
        Ok(lane)
    }

    /// Makes the io_uring that the pool's media need now and not at first use: for a thread that soon may not make one.
    pub fn make_ring(&mut self) -> std::result::Result<(), IoError> {
        let needed = self.core.media.iter().flatten().any(|medium| medium.store.ring().is_some());
        if needed { self.work.ring(&self.core).map(drop) } else { Ok(()) }
    }

    /// Opens a batch. Resizes wait for the batch to end, so do not block inside.
    pub fn begin_batch(&mut self) {
        self.work.enter(&self.core);
    }

    /// Submits what the batch prepared and makes the copies that it put off. What its requests changed survives the end of
    /// this process from here on, so what they returned is not to be told to anyone before. False if a medium has lost part
    /// of what it held meanwhile, or does not take the records of what they changed: then what they returned may be wrong,
    /// and they are to be handed in again.
    pub fn end_batch(&mut self) -> bool {
        self.work.end_batch(&self.core)
    }

    /// Fills `iov` from `offset` on.
    ///
    /// # Safety
    /// Every iovec must be valid for writes until the request is done (the token was reported, or this
    /// returned `Done` and the batch has ended). Its bytes may be read and written by others meanwhile.
    pub unsafe fn read(
        &mut self,
        vssd: &Arc<Vssd>,
        offset: u64,
        iov: &[libc::iovec],
        token: u64,
    ) -> Submitted {
        let Some(len) = iov::total_len(iov) else { return Submitted::Done(Err(IoError::OutOfRange)) };
        count(&vssd.counters(self.work.slot).reads, 1);
        self.work.start(&self.core, Job { vssd, op: Op::Read, offset, len, iov, token })
    }

    /// Writes `iov` from `offset` on.
    ///
    /// # Safety
    /// Every iovec must be valid for reads until the request is done, as for `read`. Its bytes may change meanwhile.
    pub unsafe fn write(
        &mut self,
        vssd: &Arc<Vssd>,
        offset: u64,
        iov: &[libc::iovec],
        token: u64,
    ) -> Submitted {
        let Some(len) = iov::total_len(iov) else { return Submitted::Done(Err(IoError::OutOfRange)) };
        count(&vssd.counters(self.work.slot).writes, 1);
        self.work.start(&self.core, Job { vssd, op: Op::Write, offset, len, iov, token })
    }

    /// Gives the blocks that lie wholly in the range back to the pool; they read as zeroes. The edges stay.
    pub fn discard(&mut self, vssd: &Arc<Vssd>, offset: u64, len: u64, token: u64) -> Submitted {
        count(&vssd.counters(self.work.slot).discards, 1);
        self.work.start(&self.core, Job { vssd, op: Op::Discard, offset, len, iov: &[], token })
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
        count(&vssd.counters(self.work.slot).discards, 1);
        self.work.start(&self.core, Job { vssd, op: Op::WriteZeroes { unmap }, offset, len, iov: &[], token })
    }

    /// Makes every write, discard and write-zeroes of this vSSD that completed before this call durable,
    /// whichever lane carried it.
    pub fn flush(&mut self, vssd: &Arc<Vssd>, token: u64) -> Submitted {
        count(&vssd.counters(self.work.slot).flushes, 1);
        self.work.flush(&self.core, token)
    }

    /// Reports what has finished and returns how many.
    pub fn poll(&mut self, done: &mut impl FnMut(u64, std::result::Result<(), IoError>)) -> usize {
        self.work.poll(&self.core, done)
    }

    /// Readable when [`Lane::poll`] has something to do (it may turn out to be nothing). `poll` resets it.
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        match self.core.lanes[self.work.slot].event() {
            Ok(event) => event.as_fd(),
            Err(error) => unreachable!("the event descriptor was made with the lane: {error}"),
        }
    }

    /// Whether [`Lane::poll`] has something to do, for a caller that looks instead of waiting. Costs a few loads.
    pub fn has_news(&mut self) -> bool {
        self.work.has_news(&self.core)
    }

    /// Whether some request has not been reported yet.
    pub fn has_pending(&self) -> bool {
        self.work.has_pending()
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
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.work.finish(&self.core);
    }
}
