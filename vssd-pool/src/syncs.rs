// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The queue before the syncer: see [`durability`](crate::durability).

use std::sync::Mutex;

use crate::bell::Bell;
use crate::error::Result;
use crate::lock;

/// Called once, as a rule on the syncer's thread: it must only hand over.
pub type SyncDone = Box<dyn FnOnce(Result<()>) + Send>;

/// Those who wait for the syncer.
#[derive(Default)]
pub(crate) struct Syncs {
    /// `None` while there is no syncer.
    waiting: Mutex<Option<Vec<SyncDone>>>,
    pub(crate) bell: Bell,
}

impl std::fmt::Debug for Syncs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Syncs({:?} waiting)", lock(&self.waiting).as_ref().map(Vec::len))
    }
}

impl Syncs {
    /// There will be a syncer: who asks from now on waits for it.
    pub(crate) fn open(&self) {
        lock(&self.waiting).get_or_insert_default();
    }

    /// Gives `done` back if there is no syncer.
    pub(crate) fn ask(&self, done: SyncDone) -> std::result::Result<(), SyncDone> {
        match &mut *lock(&self.waiting) {
            Some(waiting) => waiting.push(done),
            None => return Err(done),
        }
        self.bell.ring();
        Ok(())
    }

    /// Those who wait now.
    pub(crate) fn take(&self) -> Vec<SyncDone> {
        lock(&self.waiting).as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// There is no syncer any more. Gives those who wait for it.
    pub(crate) fn close(&self) -> Vec<SyncDone> {
        lock(&self.waiting).take().unwrap_or_default()
    }
}
