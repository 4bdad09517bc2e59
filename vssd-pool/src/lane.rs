// SPDX-License-Identifier: Apache-2.0 OR MIT

//! I/O of one worker thread.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::types::{IoError, Submitted};
use crate::vssd::Vssd;

/// A worker's way to the data of every vSSD of the pool. It may be made on any thread, but from its first
/// request on it must stay on one.
///
/// Between [`Lane::begin_batch`] and [`Lane::end_batch`] requests are only prepared; the latter submits them
/// in one system call. A request outside a batch is a batch of its own. Offsets and lengths are bytes of the
/// vSSD, multiples of 512.
#[derive(Debug)]
pub struct Lane {}

impl Lane {
    /// Opens a batch. Resizes wait for the batch to end, so do not block inside.
    pub fn begin_batch(&mut self) {}

    /// Submits what the batch prepared.
    pub fn end_batch(&mut self) {}

    /// Fills `iov` from `offset` on.
    ///
    /// # Safety
    /// Every iovec must be valid for writes until the request is done (the token was reported, or this
    /// returned `Done`). Its bytes may be read and written by others meanwhile.
    pub unsafe fn read(
        &mut self,
        _vssd: &Arc<Vssd>,
        _offset: u64,
        _iov: &[libc::iovec],
        _token: u64,
    ) -> Submitted {
        unimplemented!()
    }

    /// Writes `iov` from `offset` on.
    ///
    /// # Safety
    /// Every iovec must be valid for reads until the request is done. Its bytes may change meanwhile.
    pub unsafe fn write(
        &mut self,
        _vssd: &Arc<Vssd>,
        _offset: u64,
        _iov: &[libc::iovec],
        _token: u64,
    ) -> Submitted {
        unimplemented!()
    }

    /// Makes every write, discard and write-zeroes of this vSSD that completed before this call durable,
    /// whichever lane carried it.
    pub fn flush(&mut self, _vssd: &Arc<Vssd>, _token: u64) -> Submitted {
        unimplemented!()
    }

    /// Gives the blocks that lie wholly in the range back to the pool; they read as zeroes. The edges stay.
    pub fn discard(&mut self, _vssd: &Arc<Vssd>, _offset: u64, _len: u64, _token: u64) -> Submitted {
        unimplemented!()
    }

    /// Makes the range read as zeroes; with `unmap` whole blocks go back to the pool.
    pub fn write_zeroes(
        &mut self,
        _vssd: &Arc<Vssd>,
        _offset: u64,
        _len: u64,
        _unmap: bool,
        _token: u64,
    ) -> Submitted {
        unimplemented!()
    }

    /// Reports what has finished and returns how many.
    pub fn poll(&mut self, _done: &mut impl FnMut(u64, Result<(), IoError>)) -> usize {
        unimplemented!()
    }

    /// Readable when [`Lane::poll`] has something to do (it may turn out to be nothing). `poll` resets it.
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        unimplemented!()
    }

    /// Whether some request has not been reported yet.
    pub fn has_pending(&self) -> bool {
        unimplemented!()
    }

    /// Blocks until everything is reported.
    pub fn drain(&mut self, _done: &mut impl FnMut(u64, Result<(), IoError>)) {
        unimplemented!()
    }
}
