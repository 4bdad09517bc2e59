// SPDX-License-Identifier: Apache-2.0 OR MIT

//! What the hand-offs to and from the workers need of threads, in one place: `schedules/` compiles them against stand-ins of the
//! same names that run very many schedules.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
pub(super) use std::sync::atomic::{AtomicBool, Ordering};
pub(super) use std::sync::{Mutex, PoisonError, mpsc};

use rustix::event::{EventfdFlags, eventfd};

/// A descriptor that is readable from a signal on until it is cleared.
#[derive(Debug)]
pub(super) struct Event(OwnedFd);

impl Event {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?))
    }

    pub(super) fn signal(&self) {
        // Fails only when the counter is at its limit, and then it is readable anyway.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    pub(super) fn clear(&self) {
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
