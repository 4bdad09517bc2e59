// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Guest tests one at a time, whatever `--test-threads` says.

use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::Result;

use crate::paths::{self, CacheLock};

/// The right to run guests, until dropped.
#[derive(Debug)]
pub struct GuestSlot {
    // Dropped in this order: the file lock first.
    _between_processes: CacheLock,
    _between_threads: MutexGuard<'static, ()>,
}

/// Waits until no other test of this program or of another one from the same checkout runs guests.
pub fn guest_slot() -> Result<GuestSlot> {
    static SLOT: Mutex<()> = Mutex::new(());
    // A test that failed while it held the slot leaves nothing behind that the next one could trip over.
    let threads = SLOT.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(GuestSlot { _between_processes: paths::lock_cache("guests")?, _between_threads: threads })
}
