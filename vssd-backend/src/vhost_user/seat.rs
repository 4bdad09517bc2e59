// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Who may run the rings of a vSSD. Several front-ends may be connected: when a guest moves to another machine monitor on this
//! host, the new one connects and reads the configuration while the old one still runs the guest. Only one of them *sits*: has
//! queues that run.
//!
//! ```text
//!   old   ══ connected ══ sits ═══════════════ stops its queues ═╤═ leaves ══
//!   new           ══ connected, asks ══════════════ waits ═══════╧═ sits ════
//! ```
//!
//! The seat is free once every queue of whoever sat has drained. A front-end that starts a queue while another sits waits for a
//! while and is then disconnected: the running guest keeps its disk. Guests count as one as long as anybody is connected, so
//! that a session of the guest channel survives the move. Knows no messages, rings or sizes.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing::{debug, info};

use super::backend_channel;
use crate::device::FrontendStatus;

/// How long a front-end may wait for the seat. A monitor that moves its guest asks when the other has stopped it.
const PATIENCE: Duration = Duration::from_secs(5);

/// Names a connection of a vSSD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Visitor(u64);

/// Why a front-end may not run its queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SeatError {
    #[error("another front-end (process {0:?}) runs the queues of this vSSD and does not stop them")]
    Taken(Option<i32>),
    #[error("the vSSD's socket is being closed")]
    Closing,
}

#[derive(Debug)]
struct Connection {
    visitor: Visitor,
    pid: Option<i32>,
    /// Where the front-end hears of config changes.
    channel: Option<OwnedFd>,
    queues: u32,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    /// In the order in which they came.
    connections: Vec<Connection>,
    sitting: Option<Visitor>,
    total: u64,
}

impl State {
    fn get_mut(&mut self, visitor: Visitor) -> Option<&mut Connection> {
        self.connections.iter_mut().find(|connection| connection.visitor == visitor)
    }

    /// The one that sits, else the one that came last.
    fn foremost(&self) -> Option<&Connection> {
        let sitting = self.connections.iter().find(|connection| Some(connection.visitor) == self.sitting);
        sitting.or(self.connections.last())
    }
}

/// What the front-ends of a vSSD, its socket's thread and the owner share.
#[derive(Debug, Default)]
pub struct Shared {
    /// Bytes, as in the configuration space.
    pub capacity: AtomicU64,
    closing: AtomicBool,
    state: Mutex<State>,
    moved: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A front-end connected. `first` runs, before anybody can leave, if there is no other.
    pub fn enter(&self, pid: Option<i32>, first: impl FnOnce()) -> Visitor {
        let mut state = self.state();
        state.next += 1;
        state.total += 1;
        let visitor = Visitor(state.next);
        state.connections.push(Connection { visitor, pid, channel: None, queues: 0 });
        if state.connections.len() == 1 {
            first();
        }
        visitor
    }

    /// A front-end is gone and its queues have drained. `last` runs, before anybody can enter, if there is no other.
    pub fn leave(&self, visitor: Visitor, last: impl FnOnce()) {
        let mut state = self.state();
        state.connections.retain(|connection| connection.visitor != visitor);
        if state.sitting == Some(visitor) {
            state.sitting = None;
        }
        if state.connections.is_empty() {
            last();
        }
        drop(state);
        self.moved.notify_all();
    }

    /// Takes the seat; waits for it if another has it.
    pub fn sit(&self, visitor: Visitor, device: &str) -> Result<(), SeatError> {
        self.sit_within(visitor, device, PATIENCE)
    }

    fn sit_within(&self, visitor: Visitor, device: &str, patience: Duration) -> Result<(), SeatError> {
        let start = Instant::now();
        let mut state = self.state();
        let mut waits = false;
        loop {
            let pid = state.foremost().and_then(|connection| connection.pid);
            match state.sitting {
                Some(sitting) if sitting == visitor => return Ok(()),
                // It cannot lapse: its queues drain and answer as those of others do.
                None => {
                    state.sitting = Some(visitor);
                    if waits {
                        info!(device, "the queues were handed over to another front-end");
                    }
                    return Ok(());
                }
                Some(_) => {}
            }
            if self.is_closing() {
                return Err(SeatError::Closing);
            }
            let left = patience.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Err(SeatError::Taken(pid));
            }
            if !waits {
                info!(device, pid, "a second front-end waits until the first stops its queues");
                waits = true;
            }
            state = self.moved.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// How many of a front-end's queues run, now that a message was dealt with. It rises from the seat when none does.
    pub fn set_queues(&self, visitor: Visitor, queues: u32) {
        let mut state = self.state();
        if let Some(connection) = state.get_mut(visitor) {
            connection.queues = queues;
        }
        if queues == 0 && state.sitting == Some(visitor) {
            state.sitting = None;
            drop(state);
            self.moved.notify_all();
        }
    }

    /// Where a front-end is to hear of config changes.
    pub fn set_channel(&self, visitor: Visitor, channel: OwnedFd) {
        if let Some(connection) = self.state().get_mut(visitor) {
            connection.channel = Some(channel);
        }
    }

    /// Tells every front-end to read the configuration space again.
    pub fn notify_config_change(&self) {
        for channel in self.state().connections.iter().filter_map(|connection| connection.channel.as_ref()) {
            if let Err(error) = backend_channel::send_config_change(channel) {
                debug!(%error, "a front-end does not take the config-change message");
            }
        }
    }

    /// The owner closes the socket and answers nobody until that is done.
    pub fn close(&self) {
        self.closing.store(true, Ordering::Release);
        // Whoever looked before and is about to wait holds the lock until it waits.
        drop(self.state());
        self.moved.notify_all();
    }

    pub fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// Waits until somebody may have left.
    pub fn wait_moved(&self, limit: Duration) {
        drop(self.moved.wait_timeout(self.state(), limit));
    }

    /// What is known of the front-end that sits, or else came last.
    pub fn status(&self) -> FrontendStatus {
        let state = self.state();
        let foremost = state.foremost();
        FrontendStatus {
            connected: foremost.is_some(),
            pid: foremost.and_then(|connection| connection.pid),
            queues: foremost.map_or(0, |connection| connection.queues),
            connections: state.total,
            ..FrontendStatus::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;

    const SHORT: Duration = Duration::from_millis(20);

    #[test]
    fn second_front_end_waits_for_the_seat_and_gets_it_when_the_first_stops_its_queues() {
        let shared = Arc::new(Shared::default());
        let (old, new) = (shared.enter(Some(1), || {}), shared.enter(Some(2), || panic!("not the first")));
        shared.sit(old, "a").unwrap();
        shared.set_queues(old, 2);
        assert_eq!(shared.status().pid, Some(1));
        assert_eq!(shared.sit_within(new, "a", SHORT), Err(SeatError::Taken(Some(1))));
        let waiter = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || shared.sit(new, "a"))
        };
        shared.set_queues(old, 1);
        thread::sleep(SHORT);
        assert!(!waiter.is_finished(), "one queue of the first still runs");
        shared.set_queues(old, 0);
        waiter.join().unwrap().unwrap();
        assert_eq!(shared.sit_within(old, "a", SHORT), Err(SeatError::Taken(Some(2))));
        let status = shared.status();
        assert_eq!((status.pid, status.connections, status.connected), (Some(2), 2, true));
    }

    #[test]
    fn the_owner_hears_of_the_first_that_comes_and_the_last_that_goes() {
        let shared = Shared::default();
        let mut news = Vec::new();
        let old = shared.enter(None, || news.push("came"));
        let new = shared.enter(None, || news.push("came again"));
        shared.sit(old, "a").unwrap();
        shared.leave(old, || news.push("gone too early"));
        shared.sit_within(new, "a", SHORT).unwrap();
        shared.leave(new, || news.push("gone"));
        assert_eq!(news, ["came", "gone"]);
        assert!(!shared.status().connected);
    }

    #[test]
    fn closing_ends_the_wait() {
        let shared = Arc::new(Shared::default());
        let (old, new) = (shared.enter(None, || {}), shared.enter(None, || {}));
        shared.sit(old, "a").unwrap();
        let waiter = {
            let shared = Arc::clone(&shared);
            thread::spawn(move || shared.sit(new, "a"))
        };
        shared.close();
        assert_eq!(waiter.join().unwrap(), Err(SeatError::Closing));
    }
}
