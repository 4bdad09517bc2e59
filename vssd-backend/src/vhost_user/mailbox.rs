// SPDX-License-Identifier: Apache-2.0 OR MIT

//! How a worker is told what to do, and how it says that a queue has stopped.
//!
//! ```text
//!   anybody ── post ──► [ … ] ── take ──► worker            session ── StopOrder ──► worker
//!                  └─ first: signal ─► its sleep ends           ◄── quiet ── stopped ──┘
//! ```
//!
//! Nothing posted is overlooked: the first of a batch signals after it is in, and whoever takes clears the signal before it
//! looks. It knows neither commands nor queues. `schedules/tests/mailbox.rs` runs it through thousands of schedules.

use std::io;
use std::time::Duration;

use super::sync::{AtomicBool, Event, Mutex, Ordering, PoisonError, mpsc};

/// What is posted to a worker and not yet taken.
#[derive(Debug)]
pub(super) struct Mailbox<T> {
    mail: Mutex<Vec<T>>,
    /// Set while there is some; for a worker that is looking.
    has_mail: AtomicBool,
    wake: Event,
}

impl<T> Mailbox<T> {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { mail: Mutex::default(), has_mail: AtomicBool::new(false), wake: Event::new()? })
    }

    pub(super) fn post(&self, item: T) {
        let first = {
            let mut mail = self.mail.lock().unwrap_or_else(PoisonError::into_inner);
            mail.push(item);
            self.has_mail.store(true, Ordering::Relaxed);
            mail.len() == 1
        };
        if first {
            self.wake.signal();
        }
    }

    /// What a sleeper waits for.
    pub(super) fn wake(&self) -> &Event {
        &self.wake
    }

    /// A hint for who does not sleep.
    pub(super) fn has_mail(&self) -> bool {
        self.has_mail.load(Ordering::Relaxed)
    }

    /// Swaps what was posted for `into`, which is empty.
    pub(super) fn take(&self, into: &mut Vec<T>) {
        self.wake.clear();
        let mut mail = self.mail.lock().unwrap_or_else(PoisonError::into_inner);
        self.has_mail.store(false, Ordering::Relaxed);
        std::mem::swap(&mut *mail, into);
    }
}

/// The wish that a queue stop, on its way to the worker. Dropped, it says that the queue does not run.
#[derive(Debug)]
pub(super) struct StopOrder<S> {
    quiet: mpsc::Sender<()>,
    stopped: mpsc::Sender<S>,
}

/// A queue that is stopping. A request parked with the owner keeps it from ending, and must be asked back between the two
/// waits: after the first, no further request can reach the owner.
#[derive(Debug)]
pub struct StopTicket<S> {
    quiet: mpsc::Receiver<()>,
    stopped: mpsc::Receiver<S>,
}

pub(super) fn stop_order<S>() -> (StopOrder<S>, StopTicket<S>) {
    let (quiet, is_quiet) = mpsc::channel();
    let (stopped, is_stopped) = mpsc::channel();
    (StopOrder { quiet, stopped }, StopTicket { quiet: is_quiet, stopped: is_stopped })
}

impl<S> StopOrder<S> {
    /// `stop` makes the queue take no more chains, and keeps the sender for when every chain taken is answered.
    pub(super) fn obey(self, stop: impl FnOnce(mpsc::Sender<S>)) {
        stop(self.stopped);
        let _ = self.quiet.send(());
    }
}

impl<S> StopTicket<S> {
    /// Waits until the queue takes no more chains.
    pub fn wait_quiet(&self) {
        // An error means that the queue was not running: quiet too.
        let _ = self.quiet.recv();
    }

    /// Waits until every chain taken is answered, or for `timeout`. `Ok(None)` if the queue was not running.
    pub fn wait(&self, timeout: Duration) -> Result<Option<S>, mpsc::RecvTimeoutError> {
        match self.stopped.recv_timeout(timeout) {
            Ok(stopped) => Ok(Some(stopped)),
            Err(mpsc::RecvTimeoutError::Disconnected) => Ok(None),
            Err(timeout) => Err(timeout),
        }
    }
}
