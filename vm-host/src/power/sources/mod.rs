// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Where power events come from: each source is a thread that waits for its descriptors and says what it sees. It knows nothing of
//! the others, of what follows, or of how long anything takes.
//!
//! A source says what *is*, again when it changes. It never ends because of what it meets: what cannot be heard is
//! [`Kind::Lost`] with the error in its health, and is tried again; only [`Stop`] ends it.

pub mod edge;
#[doc(hidden)]
pub mod fuzzing;
pub mod logind;
pub mod nut;
pub mod signal;
pub mod uevent;

use std::io;
use std::mem::discriminant;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::mpsc::{SyncSender, TrySendError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::time::Timespec;
use serde::Serialize;
use tracing::{debug, info, warn};

use super::observation::{Kind, Observation, SourceId};

/// Ends sources: an eventfd that is never read, so that it stays readable for all who wait for it.
#[derive(Clone, Debug)]
pub struct Stop(Arc<OwnedFd>);

impl Stop {
    pub fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)))
    }

    pub fn stop(&self) {
        // Fails only where it was done very many times.
        let _ = rustix::io::write(&*self.0, &1u64.to_ne_bytes());
    }

    pub fn is_stopped(&self) -> bool {
        matches!(self.wait(&[], Some(Duration::ZERO)), Ok(Woken::Stopped))
    }

    /// Waits for one of `fds`, for at most `timeout` (`None`: for ever).
    pub(crate) fn wait(
        &self,
        fds: &[(BorrowedFd<'_>, PollFlags)],
        timeout: Option<Duration>,
    ) -> io::Result<Woken> {
        let until = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut polled = vec![PollFd::new(&*self.0, PollFlags::IN)];
        polled.extend(fds.iter().map(|&(fd, flags)| PollFd::from_borrowed_fd(fd, flags)));
        loop {
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            match poll(&mut polled, left.as_ref()) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno.into()),
            }
            let mut ready = polled.iter().map(PollFd::revents);
            if ready.next().is_some_and(|events| !events.is_empty()) {
                return Ok(Woken::Stopped);
            }
            return Ok(match ready.position(|events| !events.is_empty()) {
                Some(place) => Woken::Ready(place),
                None => Woken::TimedOut,
            });
        }
    }
}

impl AsFd for Stop {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Why a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Woken {
    Stopped,
    /// The place of the first descriptor that is ready, hung up or failed.
    Ready(usize),
    TimedOut,
}

/// How a source does, for `vm-host power status`.
#[derive(Clone, Debug, Serialize)]
pub struct Health {
    pub name: String,
    /// Which sort of source.
    pub kind: &'static str,
    /// The last word; `None` where there was none yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub state: Option<Kind>,
    /// Since when it is the last word, as milliseconds since 1970.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since_unix_ms: Option<u64>,
    /// When the source was last heard, changed or not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_heard_unix_ms: Option<u64>,
    /// What keeps it from being heard, or what it last said that made no sense.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// What more there is to say: the UPS that was chosen, the lock that is held.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

/// What all sources share.
#[derive(Clone, Debug)]
pub struct Outlet {
    pub sender: SyncSender<Observation>,
    /// An eventfd that is written after each observation, for a receiver that waits for descriptors.
    pub notify: Option<Arc<OwnedFd>>,
    pub stop: Stop,
}

/// One source's way to say something.
#[derive(Clone, Debug)]
pub struct Reporter {
    id: SourceId,
    outlet: Outlet,
    health: Arc<Mutex<Health>>,
}

impl Reporter {
    pub fn new(id: SourceId, name: &str, kind: &'static str, outlet: Outlet) -> Self {
        let health = Health {
            name: name.to_owned(),
            kind,
            state: None,
            since_unix_ms: None,
            last_heard_unix_ms: None,
            error: None,
            detail: None,
        };
        Self { id, outlet, health: Arc::new(Mutex::new(health)) }
    }

    pub fn health(&self) -> Health {
        self.lock().clone()
    }

    pub(crate) fn stop(&self) -> &Stop {
        &self.outlet.stop
    }

    pub(crate) fn name(&self) -> String {
        self.lock().name.clone()
    }

    /// The source was heard and says `kind`.
    pub(crate) fn say(&self, kind: Kind) {
        let (turn, name) = {
            let mut health = self.lock();
            let now = unix_ms();
            health.last_heard_unix_ms = Some(now);
            health.error = None;
            (turn(&mut health, kind, now), health.name.clone())
        };
        match turn {
            Turn::Same => return,
            Turn::Detail => debug!(source = name, state = %kind, "power"),
            Turn::Other => info!(source = name, state = %kind, "power"),
        }
        self.send(kind);
    }

    /// The source cannot be heard, and why.
    pub(crate) fn lost(&self, error: impl Into<String>) {
        self.fail(Kind::Lost, &error.into());
    }

    /// There is no such source here, and how that shows.
    pub(crate) fn not_available(&self, error: impl Into<String>) {
        self.fail(Kind::NotAvailable, &error.into());
    }

    fn fail(&self, kind: Kind, error: &str) {
        let (turn, news, name) = {
            let mut health = self.lock();
            let news = health.error.as_deref() != Some(error);
            health.error = Some(error.to_owned());
            (turn(&mut health, kind, unix_ms()), news, health.name.clone())
        };
        if news {
            warn!(source = name, state = %kind, error, "power");
        }
        if turn != Turn::Same {
            self.send(kind);
        }
    }

    /// The source said something that makes no sense: it is still heard.
    pub(crate) fn complain(&self, error: impl Into<String>) {
        let error = error.into();
        debug!(source = self.name(), error, "not understood");
        self.lock().error = Some(error);
    }

    pub(crate) fn detail(&self, detail: impl Into<String>) {
        self.lock().detail = Some(detail.into());
    }

    /// Waits while the receiver is far behind, but not for one that has gone or when it is to stop.
    fn send(&self, kind: Kind) {
        const FULL: Duration = Duration::from_millis(5);
        let mut observation = Observation { source: self.id, kind };
        loop {
            match self.outlet.sender.try_send(observation) {
                Ok(()) => break,
                Err(TrySendError::Full(back)) => observation = back,
                Err(TrySendError::Disconnected(_)) => return,
            }
            if !matches!(self.stop().wait(&[], Some(FULL)), Ok(Woken::TimedOut)) {
                return;
            }
        }
        if let Some(notify) = &self.outlet.notify {
            // Fails only where it is readable anyway.
            let _ = rustix::io::write(&**notify, &1u64.to_ne_bytes());
        }
    }

    fn lock(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How a word differs from the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    Same,
    /// Only in how much is left.
    Detail,
    Other,
}

fn turn(health: &mut Health, kind: Kind, now: u64) -> Turn {
    let before = health.state.replace(kind);
    if before == Some(kind) {
        Turn::Same
    } else if before.is_some_and(|before| discriminant(&before) == discriminant(&kind)) {
        Turn::Detail
    } else {
        health.since_unix_ms = Some(now);
        Turn::Other
    }
}

/// Starts a source's thread.
pub(crate) fn spawn(
    reporter: &Reporter,
    body: impl FnOnce(&Reporter) + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let reporter = reporter.clone();
    let name: String = format!("power-{}", reporter.name()).chars().take(15).collect();
    thread::Builder::new().name(name.replace('\0', "")).spawn(move || body(&reporter))
}

pub(crate) fn unix_ms() -> u64 {
    let unix = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(unix.as_millis()).unwrap_or(u64::MAX)
}

/// How long to wait before the next try: twice as long each time, up to a limit.
#[derive(Debug)]
pub(crate) struct Backoff {
    next: Duration,
    first: Duration,
}

impl Backoff {
    pub(crate) fn new(first: Duration) -> Self {
        Self { next: first, first }
    }

    pub(crate) fn reset(&mut self) {
        self.next = self.first;
    }

    pub(crate) fn step(&mut self, limit: Duration) -> Duration {
        let now = self.next.min(limit);
        self.next = (now * 2).min(limit).max(self.first);
        now
    }
}

#[cfg(test)]
pub(crate) mod testkit;
