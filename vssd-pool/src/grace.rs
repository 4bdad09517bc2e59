// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Grace periods: waiting until no request that may have seen an old map entry is still under way.
//!
//! Each lane has two counters of what it has in flight and adds to the one that the global epoch's parity
//! names. Only the lane's own thread writes them. [`Grace::synchronize`] flips the epoch and waits for the
//! old parity's counters to reach zero, twice.
//!
//! # Why this suffices
//!
//! A lane does: *load epoch; add to counter; full fence; load map entry; use it; subtract (release)*.
//! The caller of `synchronize` does: *change map entry; full fence; … load counter (acquire)*.
//! By the two full fences (store buffering), for every request and every later load of the counter it adds
//! to: either that load sees the addition, or the request sees the changed map entry and does no harm. Each
//! of the two rounds ends with having read one parity's counters as zero after the change, and together
//! they cover both parities; so a request that saw the old entry was seen, and was waited for, whichever
//! parity it had. One round would not do: a lane may load the epoch, be preempted through a whole flip, and
//! add to a parity that the next `synchronize` would not look at.
//!
//! The flips are for progress only: while one parity is waited for, new requests count under the other, so
//! a busy lane cannot keep the wait alive for ever (a lane that loaded the epoch just before the flip can
//! prolong it by one batch).
//!
//! It knows nothing of maps or I/O. `schedules/tests/grace.rs` runs it through every schedule, and without what it is said
//! here to need.

use crate::sabotage::{Sabotage, active};
use crate::sync::{AtomicBool, AtomicU32, Mutex, Ordering, PoisonError, fence, pause};

/// How many lanes there can be at a time.
pub(crate) const MAX_LANES: usize = 64;

/// Which of a lane's two counters a request is counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Parity(u8);

/// Two cache lines, because the prefetcher fetches lines in pairs.
#[repr(align(128))]
#[derive(Debug, Default)]
struct Slot {
    taken: AtomicBool,
    in_flight: [AtomicU32; 2],
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Grace<const LANES: usize = MAX_LANES> {
    epoch: AtomicU32,
    slots: [Slot; LANES],
    /// One `synchronize` at a time, or one's flips would cut another's waits short.
    one_at_a_time: Mutex<()>,
}

impl<const LANES: usize> Grace<LANES> {
    pub(crate) fn new() -> Self {
        Self {
            epoch: AtomicU32::new(0),
            slots: std::array::from_fn(|_| Slot::default()),
            one_at_a_time: Mutex::new(()),
        }
    }

    /// A slot for a new lane.
    pub(crate) fn register(&self) -> Option<usize> {
        self.slots.iter().position(|slot| {
            slot.taken.compare_exchange(false, true, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        })
    }

    /// Gives a slot back. Its lane has nothing in flight any more.
    pub(crate) fn unregister(&self, slot: usize) {
        self.slots[slot].taken.store(false, Ordering::Release);
    }

    /// Starts a section that may read maps. Only the lane that owns the slot calls this.
    pub(crate) fn enter(&self, slot: usize) -> Parity {
        let parity = Parity((self.epoch.load(Ordering::Relaxed) & 1) as u8);
        self.hold(slot, parity);
        fence(Ordering::SeqCst);
        parity
    }

    /// Counts one more use within an open section, for a request that outlives it.
    pub(crate) fn hold(&self, slot: usize, parity: Parity) {
        let counter = &self.slots[slot].in_flight[usize::from(parity.0)];
        // One writer, so no read-modify-write.
        counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    /// Ends a section or a use.
    pub(crate) fn leave(&self, slot: usize, parity: Parity) {
        let counter = &self.slots[slot].in_flight[usize::from(parity.0)];
        counter.store(counter.load(Ordering::Relaxed) - 1, Ordering::Release);
    }

    /// Returns `true` once everything that may have seen map entries from before this call is over, or
    /// `false` when `give_up` was set meanwhile.
    #[must_use]
    pub(crate) fn synchronize(&self, give_up: &AtomicBool) -> bool {
        if active(Sabotage::FreeBeforeFence) {
            return true;
        }
        let _turn = self.one_at_a_time.lock().unwrap_or_else(PoisonError::into_inner);
        fence(Ordering::SeqCst);
        for _ in 0..2 {
            let old = self.epoch.fetch_add(1, Ordering::SeqCst) & 1;
            if !self.wait_for(old as usize, give_up) {
                return false;
            }
        }
        true
    }

    fn wait_for(&self, parity: usize, give_up: &AtomicBool) -> bool {
        let mut turns = 0u32;
        while self.slots.iter().any(|slot| slot.in_flight[parity].load(Ordering::Acquire) != 0) {
            if give_up.load(Ordering::Relaxed) {
                return false;
            }
            turns = turns.saturating_add(1);
            pause(turns);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;

    #[test]
    fn synchronize_waits_for_what_was_in_flight_and_not_for_what_comes_after() {
        let grace = Arc::new(<Grace>::new());
        let never = AtomicBool::new(false);
        let slot = grace.register().unwrap();
        let first = grace.enter(slot);
        let waiter = std::thread::spawn({
            let grace = Arc::clone(&grace);
            move || grace.synchronize(&AtomicBool::new(false))
        });
        while grace.epoch.load(Ordering::Relaxed) == 0 {
            std::thread::yield_now();
        }
        assert!(!waiter.is_finished());
        let second = grace.enter(slot);
        assert_ne!(first, second);
        grace.leave(slot, first);
        while grace.epoch.load(Ordering::Relaxed) < 2 {
            std::thread::yield_now();
        }
        grace.leave(slot, second);
        assert!(waiter.join().unwrap());
        assert!(grace.synchronize(&never));
    }

    #[test]
    fn lane_that_loaded_the_epoch_long_ago_is_waited_for() {
        let grace = Arc::new(<Grace>::new());
        let slot = grace.register().unwrap();
        // It loaded epoch 1, and was preempted until the epoch was 2.
        grace.epoch.store(1, Ordering::Relaxed);
        let parity = grace.enter(slot);
        grace.epoch.store(2, Ordering::Relaxed);
        let waiter = std::thread::spawn({
            let grace = Arc::clone(&grace);
            move || grace.synchronize(&AtomicBool::new(false))
        });
        std::thread::sleep(Duration::from_millis(50));
        assert!(!waiter.is_finished());
        grace.leave(slot, parity);
        assert!(waiter.join().unwrap());
    }

    #[test]
    fn synchronize_gives_up_when_told() {
        let grace = <Grace>::new();
        let slot = grace.register().unwrap();
        let _parity = grace.enter(slot);
        assert!(!grace.synchronize(&AtomicBool::new(true)));
    }

    /// Readers dereference an index that the writer retires; a retired value must never be seen in use
    /// after its grace period.
    #[test]
    fn no_reader_uses_a_value_after_its_grace_period() {
        let grace = Arc::new(<Grace>::new());
        let current = Arc::new(AtomicU32::new(0));
        let alive: Arc<Vec<AtomicBool>> = Arc::new((0..150).map(|_| AtomicBool::new(true)).collect());
        let stop = Arc::new(AtomicBool::new(false));
        let readers: Vec<_> = (0..3)
            .map(|_| {
                let (grace, current) = (Arc::clone(&grace), Arc::clone(&current));
                let (alive, stop) = (Arc::clone(&alive), Arc::clone(&stop));
                std::thread::spawn(move || {
                    let slot = grace.register().unwrap();
                    while !stop.load(Ordering::Relaxed) {
                        let parity = grace.enter(slot);
                        let seen = current.load(Ordering::Relaxed);
                        std::hint::spin_loop();
                        assert!(
                            alive[seen as usize].load(Ordering::Relaxed),
                            "value {seen} used after its grace"
                        );
                        grace.leave(slot, parity);
                    }
                    grace.unregister(slot);
                })
            })
            .collect();
        for next in 1..150u32 {
            current.store(next, Ordering::Relaxed);
            assert!(grace.synchronize(&AtomicBool::new(false)));
            alive[next as usize - 1].store(false, Ordering::Relaxed);
        }
        stop.store(true, Ordering::Relaxed);
        for reader in readers {
            reader.join().unwrap();
        }
    }
}
