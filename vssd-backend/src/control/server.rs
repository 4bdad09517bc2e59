// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The control loop: one thread that waits for clients, queues, the pool and time, and serves each a little at a time.
//!
//! It sleeps until there is something to do: an idle daemon is never woken. No client can hold it up: sockets do not
//! block, each turn of a client is bounded, and what a client does not read is dropped or stops its own requests.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use control_server::{Door, Input, Session, peer_of, rpc};
use rustix::event::{Timespec, epoll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};
use serde_json::Value;
use tracing::{debug, info, warn};
use vssd_pool::Pool;
use vssd_protocol::control::{ErrorCode, SyncAnswer};

use super::fault::Fault;
use super::negotiation::Actor;
use super::verbs::{self, Awaited, Outcome};
use crate::device::owner::{Owner, OwnerError};
use crate::device::{DeviceEvent, Frontends};
use crate::sandbox::refusals::Refusals;

/// Clients at a time on each socket: whoever may only watch cannot keep operators out.
pub const MAX_SESSIONS: usize = 256;
/// Calls of one connection that wait for something.
const MAX_WAITS: usize = 64;
/// Requests that one client is served before it is the next one's turn.
const TURN: usize = 8;
/// How long clients are served before guests, the pool and time have theirs.
const BUDGET: Duration = Duration::from_millis(10);
/// How long nobody is accepted when descriptors have run out.
const ACCEPT_PAUSE_MS: u64 = 1_000;

const CONTROL: u64 = 0;
const MONITOR: u64 = 1;
const DEVICES: u64 = 2;
const COMPLETIONS: u64 = 3;
const SHUTDOWN: u64 = 4;
const REFUSALS: u64 = 5;
const FIRST_SESSION: u64 = 16;

/// A call that is not answered yet.
#[derive(Debug)]
struct Waiting {
    id: Value,
    what: Awaited,
}

impl Waiting {
    /// When it is answered at the latest.
    fn until_ms(&self) -> Option<u64> {
        match self.what {
            Awaited::Job { until_ms, .. } => Some(until_ms),
            Awaited::Sync { .. } => None,
        }
    }
}

/// The ends of syncs, by ticket.
type Synced = HashMap<u64, Result<SyncAnswer, Fault>>;

/// A client, and what it waits for.
#[derive(Debug)]
struct Client {
    session: Session,
    waits: Vec<Waiting>,
}

impl Client {
    /// Nothing will ever be said here again.
    fn is_over(&self) -> bool {
        self.session.is_over() && self.waits.is_empty()
    }
}

/// What the control loop needs.
pub struct ServerOptions {
    pub pool: Arc<Pool>,
    pub frontends: Box<dyn Frontends>,
    /// The receiving ends of an [`OwnerHandle`](crate::device::OwnerHandle).
    pub events: mpsc::Receiver<DeviceEvent>,
    pub wake: Arc<OwnedFd>,
    pub control: Option<UnixListener>,
    pub monitor: Option<UnixListener>,
    /// An eventfd: readable means that the daemon is to end.
    pub shutdown: OwnedFd,
    /// What the sandbox refuses, to be logged.
    pub refusals: Option<Refusals>,
}

impl std::fmt::Debug for ServerOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerOptions")
            .field("control", &self.control)
            .field("monitor", &self.monitor)
            .finish_non_exhaustive()
    }
}

/// Why the control loop cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error(transparent)]
    Owner(#[from] OwnerError),
    #[error("cannot prepare a control socket")]
    Listener(#[source] io::Error),
    #[error("cannot wait for events")]
    Epoll(#[source] io::Error),
}

/// The control loop.
#[derive(Debug)]
pub struct Server {
    epoll: OwnedFd,
    owner: Owner,
    wake: Arc<OwnedFd>,
    completions: Arc<OwnedFd>,
    shutdown: OwnedFd,
    refusals: Option<Refusals>,
    control: Option<UnixListener>,
    monitor: Option<UnixListener>,
    clients: HashMap<u64, Client>,
    next_token: u64,
    /// Sessions that may have requests at hand.
    unfinished: BTreeSet<u64>,
    /// Whose turn it was last.
    last_served: u64,
    /// Sessions that have got something to write.
    to_flush: BTreeSet<u64>,
    /// Number of the newest event that sessions have been offered.
    told: u64,
    accept_again_ms: Option<u64>,
}

impl Server {
    /// Lets no message of a guest carry more ranges. Before [`Server::run`]: it is constant within a session.
    #[must_use]
    pub fn with_max_ranges(mut self, max_ranges: u32) -> Self {
        self.owner.set_max_ranges(max_ranges);
        self
    }

    /// Begins to serve every vSSD of the pool.
    pub fn new(options: ServerOptions) -> Result<Self, ServerError> {
        let ServerOptions { pool, frontends, events, wake, control, monitor, shutdown, refusals } = options;
        let owner = Owner::open(pool, frontends, events)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|e| ServerError::Epoll(e.into()))?;
        let completions = owner.completion_wake();
        let server = Self {
            epoll,
            owner,
            wake,
            completions,
            shutdown,
            refusals,
            control,
            monitor,
            clients: HashMap::new(),
            next_token: FIRST_SESSION,
            unfinished: BTreeSet::new(),
            last_served: 0,
            to_flush: BTreeSet::new(),
            told: 0,
            accept_again_ms: None,
        };
        for (listener, token) in [(&server.control, CONTROL), (&server.monitor, MONITOR)] {
            if let Some(listener) = listener {
                listener.set_nonblocking(true).map_err(ServerError::Listener)?;
                server.watch(listener, token)?;
            }
        }
        server.watch(&server.wake, DEVICES)?;
        server.watch(&server.completions, COMPLETIONS)?;
        server.watch(&server.shutdown, SHUTDOWN)?;
        if let Some(refusals) = &server.refusals {
            server.watch(refusals.event(), REFUSALS)?;
        }
        Ok(server)
    }

    /// Serves until the shutdown event, then disconnects every front-end.
    pub fn run(mut self) -> Result<(), ServerError> {
        let mut buffer = Vec::with_capacity(64);
        self.look_around();
        loop {
            buffer.clear();
            let timeout = self.timeout();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut buffer), timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(ServerError::Epoll(errno.into())),
            }
            self.owner.pace().has_slept();
            for event in &buffer {
                let flags = event.flags;
                match event.data.u64() {
                    CONTROL => self.accept(Door::Control),
                    MONITOR => self.accept(Door::Monitor),
                    DEVICES => drain(&self.wake),
                    COMPLETIONS => drain(&self.completions),
                    REFUSALS => self.refusals.iter_mut().for_each(Refusals::log),
                    SHUTDOWN => {
                        self.end();
                        return Ok(());
                    }
                    token => self.ready(token, flags),
                }
            }
            self.look_around();
        }
    }

    /// What is to be done after anything may have happened.
    fn look_around(&mut self) {
        let now = self.owner.clock().now_ms();
        if self.accept_again_ms.is_some_and(|at| at <= now) {
            self.accept_again_ms = None;
            self.listen(true);
        }
        self.owner.run();
        self.serve_clients();
        self.owner.run();
        // It has its events, so before they are offered.
        let synced = self.owner.take_synced().into_iter().collect();
        self.offer_events();
        self.answer_waits(synced);
        for token in std::mem::take(&mut self.to_flush) {
            self.settle(token);
        }
    }

    fn timeout(&self) -> Option<Timespec> {
        if !self.unfinished.is_empty() {
            return Some(Timespec { tv_sec: 0, tv_nsec: 0 });
        }
        let waits =
            self.clients.values().flat_map(|client| &client.waits).filter_map(Waiting::until_ms).min();
        let at = [self.owner.wake_at(), waits, self.accept_again_ms].into_iter().flatten().min()?;
        let ms = at.saturating_sub(self.owner.clock().now_ms());
        // A moment too late rather than too early: the clock counts whole milliseconds.
        let ms = ms.saturating_add(1).min(3_600_000);
        let seconds = i64::try_from(ms / 1000).unwrap_or(3600);
        Some(Timespec { tv_sec: seconds, tv_nsec: i64::try_from(ms % 1000).unwrap_or(0) * 1_000_000 })
    }

    fn watch(&self, fd: impl AsFd, token: u64) -> Result<(), ServerError> {
        epoll::add(&self.epoll, fd, epoll::EventData::new_u64(token), epoll::EventFlags::IN)
            .map_err(|errno| ServerError::Epoll(errno.into()))
    }

    /// Takes listeners out of the loop, or in again.
    fn listen(&self, on: bool) {
        let flags = if on { epoll::EventFlags::IN } else { epoll::EventFlags::empty() };
        for (listener, token) in [(&self.control, CONTROL), (&self.monitor, MONITOR)] {
            if let Some(listener) = listener {
                let _ = epoll::modify(&self.epoll, listener, epoll::EventData::new_u64(token), flags);
            }
        }
    }

    fn accept(&mut self, door: Door) {
        let listener = if door == Door::Control { &self.control } else { &self.monitor };
        let Some(listener) = listener else { return };
        match accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(stream) => self.welcome(stream.into(), door),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(error) => {
                // Out of descriptors or memory: the client stays in the queue, and asking again at once is a busy loop.
                warn!(%error, "cannot accept a client");
                self.listen(false);
                self.accept_again_ms = Some(self.owner.clock().now_ms() + ACCEPT_PAUSE_MS);
            }
        }
    }

    fn welcome(&mut self, stream: UnixStream, door: Door) {
        let peer = match peer_of(&stream) {
            Ok(peer) => peer,
            Err(error) => {
                debug!(%error, "client is gone before it was served");
                return;
            }
        };
        let token = self.next_token;
        let mut session = Session::new(stream, door, peer);
        if self.clients.values().filter(|other| other.session.door == door).count() >= MAX_SESSIONS {
            session.send(&rpc::too_many_clients(MAX_SESSIONS));
            let _ = session.flush(0);
            return;
        }
        if let Err(error) = self.watch(session.stream(), token) {
            warn!(%error, "cannot serve a client");
            return;
        }
        self.next_token += 1;
        self.clients.insert(token, Client { session, waits: Vec::new() });
    }

    fn ready(&mut self, token: u64, flags: epoll::EventFlags) {
        let Some(Client { session, .. }) = self.clients.get_mut(&token) else { return };
        if flags.intersects(epoll::EventFlags::ERR | epoll::EventFlags::HUP)
            && !flags.contains(epoll::EventFlags::IN)
        {
            self.drop_session(token);
            return;
        }
        if flags.contains(epoll::EventFlags::IN)
            && session.wants_input()
            && let Err(error) = session.fill()
        {
            debug!(%error, "client is gone");
            self.drop_session(token);
            return;
        }
        self.unfinished.insert(token);
    }

    /// Gives clients their turns, operators first, as long as the budget lasts.
    fn serve_clients(&mut self) {
        let start = Instant::now();
        let after = self.unfinished.range(self.last_served.saturating_add(1)..);
        let mut queue: Vec<u64> = after.chain(self.unfinished.range(..=self.last_served)).copied().collect();
        queue.sort_by_key(|token| self.clients.get(token).is_some_and(|c| c.session.door == Door::Monitor));
        for token in queue {
            self.unfinished.remove(&token);
            self.last_served = token;
            self.serve(token);
            if start.elapsed() >= BUDGET {
                break;
            }
        }
    }

    /// Gives a client its turn.
    fn serve(&mut self, token: u64) {
        self.to_flush.insert(token);
        for _ in 0..TURN {
            let Some(Client { session, waits }) = self.clients.get_mut(&token) else { return };
            let line = match session.next_line() {
                Input::Line(line) => line,
                Input::None => return,
                Input::TooLong => {
                    session.send(&rpc::line_too_long(session.door));
                    let _ = session.flush(0);
                    self.drop_session(token);
                    return;
                }
            };
            let actor = Actor { uid: session.peer.uid, pid: session.peer.pid };
            let outcome = verbs::handle(&mut self.owner, session.door, actor, &line);
            self.owner.pace().breathe();
            match outcome {
                Outcome::Answer(answer) => session.send(&answer),
                Outcome::Wait { id, .. } if waits.len() >= MAX_WAITS => {
                    let message = format!("{MAX_WAITS} calls wait already");
                    session.send(&rpc::refusal(&id, ErrorCode::TooLarge, &message));
                }
                Outcome::Wait { id, what } => waits.push(Waiting { id, what }),
                Outcome::Subscribe { answer, filter, since } => {
                    session.send(&answer);
                    // What has happened so far is the past for this client: it is offered here or not at all.
                    self.offer_events();
                    let log = self.owner.log();
                    let (lost, lost_seq) = log.lost_after(since);
                    if let Some(Client { session, .. }) = self.clients.get_mut(&token) {
                        session.subscribe(filter, lost, lost_seq);
                        for entry in log.after(since) {
                            session.offer(entry);
                        }
                    }
                }
            }
        }
        self.unfinished.insert(token);
    }

    /// Offers new events to all who subscribed.
    fn offer_events(&mut self) {
        let log = self.owner.log();
        if log.newest() == self.told {
            return;
        }
        for entry in log.after(self.told) {
            for (token, Client { session, .. }) in &mut self.clients {
                if session.offer(entry) {
                    self.to_flush.insert(*token);
                }
            }
        }
        self.told = log.newest();
    }

    fn answer_waits(&mut self, mut synced: Synced) {
        let changed = self.owner.jobs().take_changed();
        let now = self.owner.clock().now_ms();
        for (token, Client { session, waits }) in &mut self.clients {
            let is_due = |wait: &mut Waiting| match wait.what {
                Awaited::Job { job, until_ms } => until_ms <= now || changed.contains(&job),
                Awaited::Sync { ticket } => synced.contains_key(&ticket),
            };
            let due: Vec<Waiting> = waits.extract_if(.., is_due).collect();
            for Waiting { id, what } in due {
                let answer = match what {
                    Awaited::Job { job, .. } => verbs::waited(&self.owner, &id, job),
                    Awaited::Sync { ticket } => match synced.remove(&ticket) {
                        Some(result) => verbs::synced(&id, result),
                        None => continue,
                    },
                };
                session.send(&answer);
                self.to_flush.insert(*token);
            }
        }
    }

    /// Writes what waits, and decides what to wait for next.
    fn settle(&mut self, token: u64) {
        let unix_ms = self.owner.clock().unix_ms(self.owner.clock().now_ms());
        let Some(client) = self.clients.get_mut(&token) else { return };
        let session = &mut client.session;
        if let Err(error) = session.flush(unix_ms) {
            debug!(%error, "client is gone");
            self.drop_session(token);
            return;
        }
        if session.has_line_at_hand() {
            // It was held back for want of room or turn; no event will say that there is some now.
            self.unfinished.insert(token);
        }
        if client.is_over() {
            self.drop_session(token);
            return;
        }
        let mut flags = epoll::EventFlags::empty();
        let session = &client.session;
        flags.set(epoll::EventFlags::IN, session.wants_input());
        flags.set(epoll::EventFlags::OUT, session.wants_output());
        if let Err(errno) =
            epoll::modify(&self.epoll, session.stream(), epoll::EventData::new_u64(token), flags)
        {
            warn!(%errno, "cannot serve a client any more");
            self.drop_session(token);
        }
    }

    fn drop_session(&mut self, token: u64) {
        // Closing the descriptor takes it out of the epoll set.
        self.clients.remove(&token);
        self.unfinished.remove(&token);
    }

    fn end(&mut self) {
        info!(clients = self.clients.len(), "control loop ends");
        self.owner.run();
        self.owner.shut_down();
        let synced = self.owner.take_synced().into_iter().collect();
        self.offer_events();
        self.answer_waits(synced);
        for Client { session, .. } in self.clients.values_mut() {
            let _ = session.flush(0);
        }
    }
}

/// Empties an eventfd.
fn drain(fd: &OwnedFd) {
    let mut counter = [0; 8];
    // Fails only when it is empty already.
    let _ = rustix::io::read(fd, &mut counter);
}
