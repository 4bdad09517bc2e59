// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A pool.

use std::sync::Arc;

use vssd_protocol::units::{BlockRange, BlockSize};

use crate::check::{CheckOptions, CheckReport};
use crate::error::Result;
use crate::lane::Lane;
use crate::types::{CreateOptions, OpenOptions, PoolInfo, RangeStatus, VssdAttrs, VssdId, VssdSpec};
use crate::vssd::Vssd;

/// Called once on the keeper's thread with one status a range, in order. It must only hand over.
pub type ResizeDone = Box<dyn FnOnce(Result<Vec<RangeStatus>>) + Send>;

/// An open pool. Dropping the last handle closes it in order.
#[derive(Debug)]
pub struct Pool {}

impl Pool {
    /// Makes a pool on media that hold nothing (or anything, with `force`).
    pub fn create(_options: &CreateOptions) -> Result<()> {
        unimplemented!()
    }

    /// Locks the media, recovers, and starts the background threads.
    pub fn open(_options: &OpenOptions) -> Result<Arc<Self>> {
        unimplemented!()
    }

    /// Looks for contradictions on the media of a closed pool. Changes nothing.
    pub fn check(_options: &CheckOptions) -> Result<CheckReport> {
        unimplemented!()
    }

    /// Ends background work, writes a final checkpoint and unlocks the media. Requests that are still in
    /// flight on lanes fail. Dropping the pool does the same but cannot report what went wrong.
    pub fn close(&self) -> Result<()> {
        unimplemented!()
    }

    pub fn info(&self) -> PoolInfo {
        unimplemented!()
    }

    pub fn block_size(&self) -> BlockSize {
        unimplemented!()
    }

    /// Durable on return.
    pub fn create_vssd(&self, _spec: &VssdSpec) -> Result<Arc<Vssd>> {
        unimplemented!()
    }

    /// Its requests in flight finish, later ones get `Evicted`. Durable on return.
    pub fn delete_vssd(&self, _id: VssdId) -> Result<()> {
        unimplemented!()
    }

    /// All vSSDs, by id.
    pub fn vssds(&self) -> Vec<Arc<Vssd>> {
        unimplemented!()
    }

    pub fn vssd(&self, _id: VssdId) -> Option<Arc<Vssd>> {
        unimplemented!()
    }

    pub fn vssd_by_name(&self, _name: &str) -> Option<Arc<Vssd>> {
        unimplemented!()
    }

    /// Durable on return. Raising `requested_blocks` takes the promise at once or fails with `PoolFull`;
    /// lowering it frees promise only as far as `plugged_blocks` goes down.
    pub fn set_attrs(&self, _id: VssdId, _attrs: &VssdAttrs) -> Result<()> {
        unimplemented!()
    }

    /// Raises a vSSD's maximum. Durable on return.
    pub fn extend_vssd(&self, _id: VssdId, _new_max_blocks: u32) -> Result<()> {
        unimplemented!()
    }

    /// Takes ranges from a vSSD: fences new I/O, waits for what is in flight, makes it durable, then calls
    /// `done`; the blocks are zeroed afterwards and only then lent again.
    pub fn unplug(&self, _id: VssdId, _ranges: Vec<BlockRange>, _done: ResizeDone) {
        unimplemented!()
    }

    /// Gives ranges to a vSSD, never so that it holds more than `limit_blocks`; they read as zeroes. Durable
    /// before `done` is called.
    pub fn plug(&self, _id: VssdId, _ranges: Vec<BlockRange>, _limit_blocks: u32, _done: ResizeDone) {
        unimplemented!()
    }

    /// [`Pool::unplug`] that waits. Not for the threads that run lanes: it waits for their batches to end.
    pub fn unplug_wait(&self, _id: VssdId, _ranges: Vec<BlockRange>) -> Result<Vec<RangeStatus>> {
        unimplemented!()
    }

    /// [`Pool::plug`] that waits.
    pub fn plug_wait(
        &self,
        _id: VssdId,
        _ranges: Vec<BlockRange>,
        _limit_blocks: u32,
    ) -> Result<Vec<RangeStatus>> {
        unimplemented!()
    }

    /// I/O for one worker thread. There may be 64 at a time.
    pub fn lane(self: &Arc<Self>) -> Result<Lane> {
        unimplemented!()
    }

    /// Does what the background threads would have done by now. Only for a pool opened without threads.
    pub fn run_background(&self) {
        unimplemented!()
    }
}
