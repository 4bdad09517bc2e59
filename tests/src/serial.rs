// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Guest tests one at a time, whatever `--test-threads` says. Whoever has built everything beforehand starts the programs, too, and sees
//! himself to how many of them run beside each other.

use std::env;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::Result;

use crate::paths::{self, CacheLock, PREBUILT_ENV};

/// The right to run guests, until dropped.
#[derive(Debug)]
pub struct GuestSlot {
    // Dropped in this order: the file lock first.
    _between_processes: Option<CacheLock>,
    _between_threads: MutexGuard<'static, ()>,
}

/// Waits until no other test of this program or of another one from the same checkout runs guests.
pub fn guest_slot() -> Result<GuestSlot> {
    static SLOT: Mutex<()> = Mutex::new(());
    // A test that failed while it held the slot leaves nothing behind that the next one could trip over.
    let threads = SLOT.lock().unwrap_or_else(PoisonError::into_inner);
    let alone = env::var_os(PREBUILT_ENV).is_none();
    let processes = alone.then(|| paths::lock_cache("guests")).transpose()?;
    Ok(GuestSlot { _between_processes: processes, _between_threads: threads })
}
