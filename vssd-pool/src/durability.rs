// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Making durable what was acknowledged: what is left to do, and who does it for the whole pool.
//!
//! Whether a medium has to be synced is decided here for both who ask: a lane that carries a FLUSH, and the *syncer*, a thread
//! that makes the promise of a FLUSH for all vSSDs at once ([`Pool::sync`](crate::Pool::sync)). Both skip a medium on which no
//! write completed since its last sync, and the journal where its records are durable. A write counts as completed
//! before it is acknowledged, and when its bytes are where a sync covers them.
//!
//! It knows neither vSSDs nor requests.

use std::sync::atomic::Ordering;

use crate::core::Core;
use crate::error::{Error, Result};
use crate::types::MediumKind;

impl Core {
    /// How many completed writes a sync of the medium would cover; `None` if all of them are durable.
    pub(crate) fn unsynced(&self, kind: MediumKind) -> Option<u64> {
        let writes = self.writes_on(kind);
        (writes != self.synced[kind.index()].load(Ordering::Acquire)).then_some(writes)
    }

    /// Notes how a sync ended that began when so many writes had completed.
    pub(crate) fn note_sync(&self, kind: MediumKind, writes: u64, result: &std::io::Result<()>) {
        match result {
            Ok(()) => drop(self.synced[kind.index()].fetch_max(writes, Ordering::AcqRel)),
            Err(error) => self.journal.fail(error),
        }
    }

    /// Makes everything durable that was acknowledged before this call. Waits for the media.
    pub(crate) fn make_durable(&self) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.journal.health()?;
        for kind in MediumKind::ALL {
            let Some(medium) = &self.media[kind.index()] else { continue };
            let Some(writes) = self.unsynced(kind) else { continue };
            let synced = medium.store.sync();
            self.note_sync(kind, writes, &synced);
            synced.map_err(|source| {
                Error::io(format!("cannot flush {}", medium.store.path().display()), source)
            })?;
        }
        let position = self.journal.ledger().buffer.position();
        self.journal.commit(position)?;
        if self.stores().any(|store| store.is_lost()) {
            self.journal.fail(&std::io::Error::from_raw_os_error(libc::EIO));
        }
        // The kernel tells of a failed write-back once, to whoever asks first. Where somebody was told meanwhile, this cannot
        // vouch for anything.
        self.journal.health()
    }
}

/// The syncer's thread. Whoever asks while a sync is under way is served by the next, all of them by one.
pub(crate) fn run_syncer(core: &Core) {
    let _guard = NobodyWaitsForTheDead(core);
    while !core.stop.load(Ordering::Acquire) {
        core.syncs.bell.wait(None);
        let waiting = core.syncs.take();
        if waiting.is_empty() {
            continue;
        }
        let mut outcome = core.make_durable();
        for done in waiting {
            // A failure is remembered by the journal, and met again.
            let next = if outcome.is_ok() { Ok(()) } else { core.make_durable() };
            done(std::mem::replace(&mut outcome, next));
        }
    }
}

/// However the syncer ends, those who wait are told, and those who come later.
struct NobodyWaitsForTheDead<'a>(&'a Core);

impl Drop for NobodyWaitsForTheDead<'_> {
    fn drop(&mut self) {
        for done in self.0.syncs.close() {
            done(Err(Error::Busy { what: "the pool".to_owned() }));
        }
    }
}
