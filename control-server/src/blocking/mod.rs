// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A ready-made server for daemons whose methods may take seconds: one thread a connection, which sleeps until its client, an
//! event or the end of the daemon wakes it.
//!
//! ```text
//!   serve ── accepts ──► connection thread ── lines ──► Service::call (may block)
//!                              ▲   └─ reads at its own pace ─┐
//!                              └──────── bell ──────────── Feed ◄── tell(what happened), from any thread
//! ```
//!
//! A call that blocks keeps its own connection waiting, its events included, and no other. Of a client that does not read, a
//! bounded amount is kept; events that it was too slow for are lost to it, and `events.lost` says how many. Knows no method
//! but `events.subscribe`.

mod connection;
mod feed;

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};
use serde_json::{Map, Value};
use tracing::{debug, warn};

use crate::fault::Fault;
use crate::peer::{Peer, peer_of};
use crate::rpc::{self, Door};
use crate::session::Session;
use connection::Connection;
pub use feed::Feed;

/// Clients at a time on each socket: whoever may only watch cannot keep operators out.
pub const MAX_CLIENTS: usize = 64;
/// How long nobody is accepted when descriptors or threads have run out.
const ACCEPT_PAUSE: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// What a method does to the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// It only reads: the monitor socket serves it, too.
    Read,
    Change,
}

/// What a daemon does for its clients.
pub trait Service: Send + Sync {
    /// What a method does; `None` where there is none of this name. Not asked about `events.subscribe`.
    fn access(&self, method: &str) -> Option<Access>;

    /// Carries out a call of a method that [`Service::access`] knows and `door` permits. May block; many threads call it at a
    /// time.
    fn call(&self, door: Door, peer: Peer, method: &str, params: Map<String, Value>) -> Result<Value, Fault>;

    /// Where clients' events come from.
    fn feed(&self) -> &Feed;
}

/// The sockets of a daemon, see [`bind`](crate::bind()).
#[derive(Debug, Default)]
pub struct Listeners {
    pub control: Option<UnixListener>,
    pub monitor: Option<UnixListener>,
}

/// Why clients cannot be served any more.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("cannot prepare a control socket")]
    Listener(#[source] io::Error),
    #[error("cannot wait for clients")]
    Wait(#[source] io::Error),
}

/// Serves until `shutdown`, an eventfd, is readable: nobody is accepted and no call begins from then on. Calls that are under way
/// have `patience` to end, and are answered. Those that take longer keep their threads, which end when they do.
pub fn serve(
    listeners: Listeners,
    service: Arc<dyn Service>,
    shutdown: OwnedFd,
    patience: Duration,
) -> Result<(), ServeError> {
    let Listeners { control, monitor } = listeners;
    let listeners: Vec<(UnixListener, Door)> = [(control, Door::Control), (monitor, Door::Monitor)]
        .into_iter()
        .filter_map(|(l, d)| Some((l?, d)))
        .collect();
    for (listener, _) in &listeners {
        listener.set_nonblocking(true).map_err(ServeError::Listener)?;
    }
    let host = Host { service, shutdown: Arc::new(shutdown), clients: Arc::default() };
    let result = host.accept_all(&listeners);
    drop(listeners);
    host.clients.wait_until_gone(patience);
    result
}

/// What connections are made from.
struct Host {
    service: Arc<dyn Service>,
    shutdown: Arc<OwnedFd>,
    clients: Arc<Clients>,
}

impl Host {
    fn accept_all(&self, listeners: &[(UnixListener, Door)]) -> Result<(), ServeError> {
        let mut is_short = false;
        loop {
            let mut fds = vec![PollFd::from_borrowed_fd(self.shutdown.as_fd(), PollFlags::IN)];
            if !is_short {
                fds.extend(listeners.iter().map(|(l, _)| PollFd::from_borrowed_fd(l.as_fd(), PollFlags::IN)));
            }
            match poll(&mut fds, is_short.then_some(&ACCEPT_PAUSE)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(ServeError::Wait(errno.into())),
            }
            if !fds[0].revents().is_empty() {
                return Ok(());
            }
            is_short = false;
            for (fd, (listener, door)) in fds[1..].iter().zip(listeners) {
                if fd.revents().is_empty() {
                    continue;
                }
                match accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                    Ok(stream) => self.welcome(stream.into(), *door),
                    Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
                    Err(error) => {
                        // Out of descriptors or memory: the client stays in the queue, and asking again at once is a busy loop.
                        warn!(%error, "cannot accept a client");
                        is_short = true;
                    }
                }
            }
        }
    }

    fn welcome(&self, stream: UnixStream, door: Door) {
        let peer = match peer_of(&stream) {
            Ok(peer) => peer,
            Err(error) => {
                debug!(%error, "client is gone before it was served");
                return;
            }
        };
        let mut session = Session::new(stream, door, peer);
        let Some(seat) = Clients::take_seat(&self.clients, door) else {
            session.send(&rpc::too_many_clients(MAX_CLIENTS));
            let _ = session.flush(0);
            return;
        };
        let connection = Connection::new(session, Arc::clone(&self.service), Arc::clone(&self.shutdown));
        let body = move || {
            connection.run();
            drop(seat);
        };
        if let Err(error) = thread::Builder::new().name("client".into()).spawn(body) {
            warn!(%error, "cannot serve a client");
        }
    }
}

/// How many clients there are.
#[derive(Debug, Default)]
struct Clients {
    control_and_monitor: Mutex<[usize; 2]>,
    left: Condvar,
}

impl Clients {
    fn counts(&self) -> MutexGuard<'_, [usize; 2]> {
        self.control_and_monitor.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_seat(clients: &Arc<Self>, door: Door) -> Option<Seat> {
        let count = &mut clients.counts()[index(door)];
        if *count >= MAX_CLIENTS {
            return None;
        }
        *count += 1;
        Some(Seat { clients: Arc::clone(clients), door })
    }

    fn wait_until_gone(&self, patience: Duration) {
        let some_are_left = |counts: &mut [usize; 2]| counts.iter().any(|count| *count > 0);
        let waited = self.left.wait_timeout_while(self.counts(), patience, some_are_left);
        let (counts, _) = waited.unwrap_or_else(PoisonError::into_inner);
        let calls: usize = counts.iter().sum();
        if calls > 0 {
            warn!(calls, "ending beside calls that have not ended");
        }
    }
}

fn index(door: Door) -> usize {
    match door {
        Door::Control => 0,
        Door::Monitor => 1,
    }
}

/// A client counts for as long as its thread has this, however the thread ends.
struct Seat {
    clients: Arc<Clients>,
    door: Door,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.clients.counts()[index(self.door)] -= 1;
        self.clients.left.notify_all();
    }
}

impl fmt::Debug for dyn Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Service")
    }
}
