// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The worker threads: a fixed number, each with an epoll set, a pool lane and the queues assigned to it.
//!
//! ```text
//!            ┌──────────── epoll ────────────┐
//!   kick ───►│ process up to a batch a queue │──► lane ──► completions ─┐
//!   mailbox ►│ start/stop/memory/reply       │                          │
//!   lane ───►│ reap ─────────────────────────┼──► answers ► publish ► interrupt
//!            └───────────────────────────────┘
//! ```
//!
//! Workers share nothing but the pool: no lock is taken on the way of a request. With nothing to do a worker sleeps; where work
//! is expected soon, it first looks for it for a moment ([`Poller`]). While it looks, the drivers are not asked for kicks.
//!
//! It works in rounds, in which each queue with work has one turn, the longest since its last one first.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use std::{io, thread};

use rustix::event::epoll;
use tracing::{debug, error};
use vssd_pool::{Lane, Pool, turns};

use super::dirty_log::QueueLog;
use super::mailbox::{Mailbox, StopOrder, StopTicket, stop_order};
use super::memory::GuestMemory;
use super::poller::Poller;
use super::queue::{ActiveQueue, QueueStart, Stopped, split_token};
use crate::device::ReplySink;
use crate::sandbox::{Sandbox, Thread};

const MAILBOX: u64 = u64::MAX;
const LANE: u64 = u64::MAX - 1;

/// What a session, or the owner's reply, tells a worker.
#[derive(Debug)]
enum Command {
    Start(Box<QueueStart>),
    Stop { key: u32, order: StopOrder<Stopped> },
    Abandon { key: u32 },
    SetMemory { key: u32, mem: Arc<GuestMemory> },
    SetLog { key: u32, log: Option<QueueLog>, done: mpsc::Sender<()> },
    SetCall { key: u32, call: Option<OwnedFd> },
    Reply { ticket: u64, response: Vec<u8> },
    Exit,
}

impl ReplySink for Mailbox<Command> {
    fn complete(&self, ticket: u64, response: Vec<u8>) {
        self.post(Command::Reply { ticket, response });
    }
}

/// Sends commands to one worker.
#[derive(Clone, Debug)]
pub struct WorkerHandle {
    mailbox: Arc<Mailbox<Command>>,
}

impl WorkerHandle {
    pub fn start(&self, queue: QueueStart) {
        self.mailbox.post(Command::Start(Box::new(queue)));
    }

    /// Begins to stop a queue.
    pub fn stop(&self, key: u32) -> StopTicket<Stopped> {
        let (order, ticket) = stop_order();
        self.mailbox.post(Command::Stop { key, order });
        ticket
    }

    /// Leaves the guest-channel requests of a stopping queue unanswered, to be replayed by whoever serves the guest next.
    pub fn abandon(&self, key: u32) {
        self.mailbox.post(Command::Abandon { key });
    }

    pub fn set_memory(&self, key: u32, mem: Arc<GuestMemory>) {
        self.mailbox.post(Command::SetMemory { key, mem });
    }

    /// Begins or ends the noting of a queue's writes. The receiver hears, or is cut off, once nothing is noted as before.
    pub fn set_log(&self, key: u32, log: Option<QueueLog>) -> mpsc::Receiver<()> {
        let (done, is_done) = mpsc::channel();
        self.mailbox.post(Command::SetLog { key, log, done });
        is_done
    }

    pub fn set_call(&self, key: u32, call: Option<OwnedFd>) {
        self.mailbox.post(Command::SetCall { key, call });
    }
}

/// The worker threads of the daemon.
#[derive(Debug)]
pub struct Workers {
    handles: Vec<WorkerHandle>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    /// Starts `count` threads, each with a lane of `pool`, that look for work for up to `polling` before they sleep.
    pub fn spawn(pool: &Arc<Pool>, count: usize, polling: Duration, sandbox: &Sandbox) -> io::Result<Self> {
        let mut workers = Self { handles: Vec::new(), threads: Vec::new() };
        for index in 0..count.max(1) {
            let mailbox = Arc::new(Mailbox::new()?);
            let handle = WorkerHandle { mailbox: Arc::clone(&mailbox) };
            let (pool, sandbox) = (Arc::clone(pool), sandbox.clone());
            let (ready, started) = mpsc::channel();
            // The lane is made on the thread that uses it: its io_uring accepts no other.
            let begin = move || {
                let worker = Worker::new(&pool, mailbox, polling)?;
                turns::set_short();
                sandbox.enter(Thread::Worker).map_err(io::Error::other)?;
                Ok(worker)
            };
            let body = move || match begin() {
                Ok(mut worker) => {
                    let _ = ready.send(Ok(()));
                    if let Err(error) = worker.run() {
                        error!(%error, "a worker thread ended; its queues are dead");
                    }
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            };
            let thread = thread::Builder::new().name(format!("worker-{index}")).spawn(body)?;
            workers.handles.push(handle);
            workers.threads.push(thread);
            started.recv().unwrap_or_else(|_| Err(io::Error::other("worker thread died at its start")))?;
        }
        Ok(workers)
    }

    pub fn handles(&self) -> &[WorkerHandle] {
        &self.handles
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        for handle in &self.handles {
            handle.mailbox.post(Command::Exit);
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                error!("a worker thread panicked");
            }
        }
    }
}

/// The queues of a worker, by key. Keys are given out in rising order, so the list is sorted as it grows.
#[derive(Default)]
struct Queues(Vec<ActiveQueue>);

impl Queues {
    fn get_mut(&mut self, key: u32) -> Option<&mut ActiveQueue> {
        let at = self.0.binary_search_by_key(&key, ActiveQueue::key).ok()?;
        self.0.get_mut(at)
    }

    fn insert(&mut self, queue: ActiveQueue) {
        let at = self.0.partition_point(|other| other.key() < queue.key());
        self.0.insert(at, queue);
    }

    fn remove(&mut self, key: u32) {
        self.0.retain(|queue| queue.key() != key);
    }
}

struct Worker {
    mailbox: Arc<Mailbox<Command>>,
    sink: Arc<dyn ReplySink>,
    epoll: OwnedFd,
    lane: Lane,
    queues: Queues,
    poller: Poller,
    /// Queues with chains waiting: whether a kick said so.
    ready: Vec<(u32, bool)>,
    /// Queues whose drivers were not asked for a kick since their chains were taken.
    quiet: Vec<u32>,
    /// Turns given to queues so far.
    turns: u64,
    /// Queues that have answers to publish.
    answered: Vec<u32>,
    commands: Vec<Command>,
    exit: bool,
}

/// Rounds of work found by looking before the descriptors get their turn.
const ROUNDS_WITHOUT_EPOLL: u32 = 16;

impl Worker {
    fn new(pool: &Arc<Pool>, mailbox: Arc<Mailbox<Command>>, polling: Duration) -> io::Result<Self> {
        let mut lane = pool.lane().map_err(io::Error::other)?;
        // Now: a confined thread cannot make one. Why it fails is logged there, and requests will fail for it.
        let _ = lane.make_ring();
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, mailbox.wake(), epoll::EventData::new_u64(MAILBOX), epoll::EventFlags::IN)?;
        epoll::add(&epoll, lane.event_fd(), epoll::EventData::new_u64(LANE), epoll::EventFlags::IN)?;
        let sink: Arc<dyn ReplySink> = Arc::<Mailbox<Command>>::clone(&mailbox);
        Ok(Self {
            mailbox,
            sink,
            epoll,
            lane,
            queues: Queues::default(),
            poller: Poller::new(polling),
            ready: Vec::new(),
            quiet: Vec::new(),
            turns: 0,
            answered: Vec::new(),
            commands: Vec::new(),
            exit: false,
        })
    }

    fn run(&mut self) -> io::Result<()> {
        let mut round: Vec<(u64, u32, bool)> = Vec::new();
        let mut rounds = 0;
        while !self.exit {
            if !self.ready.is_empty() {
                // What comes to these meanwhile brings no kick, and is to have its turn as well.
                self.find_chains();
            } else if !self.look() {
                self.ask_for_kicks();
            }
            if self.exit {
                break;
            }
            if self.ready.is_empty() || rounds >= ROUNDS_WITHOUT_EPOLL || self.may_have_been_kicked() {
                self.wait()?;
                rounds = 0;
            }
            rounds += 1;
            // One turn a round for each, however often it was said to be ready: kicks are free for a guest. Whoever has waited
            // longest is first; in any other order some queues are refilled in time for each round, and others for every second.
            for (key, kicked) in self.ready.drain(..) {
                if let Some(queue) = self.queues.get_mut(key) {
                    round.push((queue.last_turn, key, kicked));
                }
            }
            round.sort_unstable();
            round.dedup_by(|later, first| {
                let is_same = later.1 == first.1;
                first.2 |= is_same && later.2;
                is_same
            });
            for (_, key, kicked) in round.drain(..) {
                if let Some(queue) = self.queues.get_mut(key) {
                    self.turns += 1;
                    queue.last_turn = self.turns;
                    let more = queue.process(&mut self.lane, &self.sink, kicked);
                    if more {
                        self.ready.push((key, false));
                        // A whole turn: others have waited for it.
                        rounds = ROUNDS_WITHOUT_EPOLL;
                    } else if !self.quiet.contains(&key) {
                        self.quiet.push(key);
                    }
                    // Before the next queue's turn, which may bring a long message of the guest channel.
                    queue.flush_used();
                }
            }
            self.publish();
        }
        Ok(())
    }

    /// Whether there is a queue besides those that are known to have work or are looked at: only the descriptors tell of it,
    /// and it is to have its turn as often as they.
    fn may_have_been_kicked(&self) -> bool {
        let others = self.ready.iter().filter(|(key, _)| !self.quiet.contains(key)).count();
        self.queues.0.len() > self.quiet.len() + others
    }

    /// Waits for the descriptors, or only asks them if there is work already.
    fn wait(&mut self) -> io::Result<()> {
        const NOW: rustix::event::Timespec = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        let sleeps = self.ready.is_empty();
        let since = (sleeps && self.poller.is_on()).then(Instant::now);
        let mut events = [const { MaybeUninit::uninit() }; 64];
        let events = match epoll::wait(&self.epoll, &mut events, (!sleeps).then_some(&NOW)) {
            Ok((events, _)) => events,
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        };
        if let Some(since) = since {
            self.poller.slept(since.elapsed());
        }
        for event in events {
            match event.data.u64() {
                MAILBOX => self.obey(),
                LANE => self.reap(),
                // Edge-triggered, so the kick's counter is never read.
                key => self.ready.push((u32::try_from(key).unwrap_or(u32::MAX), true)),
            }
        }
        Ok(())
    }

    /// Queues whose drivers were not asked for a kick, and have work nevertheless, are ready.
    fn find_chains(&mut self) {
        for &key in &self.quiet {
            if self.queues.get_mut(key).is_some_and(|queue| queue.has_chains()) {
                self.ready.push((key, false));
            }
        }
    }

    /// Looks for work for as long as that promises to be worth it. True if there was some.
    fn look(&mut self) -> bool {
        let window = self.poller.window();
        if window.is_zero() || self.quiet.is_empty() {
            return false;
        }
        let mut since = Instant::now();
        loop {
            self.find_chains();
            if self.lane.has_news() {
                self.reap();
                self.publish();
                // The driver answers to answers.
                since = Instant::now();
            }
            if self.mailbox.has_mail() {
                self.obey();
                self.publish();
            }
            if !self.ready.is_empty() || self.exit {
                self.poller.found();
                return true;
            }
            if since.elapsed() >= window {
                return false;
            }
            std::hint::spin_loop();
        }
    }

    /// Before a sleep. A chain that came meanwhile brings no kick: its queue is ready.
    fn ask_for_kicks(&mut self) {
        for key in self.quiet.drain(..) {
            if self.queues.get_mut(key).is_some_and(ActiveQueue::ask_for_kick) {
                self.ready.push((key, false));
            }
        }
    }

    /// Publishes answers and lets go of the queues that were to stop and are idle now.
    fn publish(&mut self) {
        for key in self.answered.drain(..) {
            let Some(queue) = self.queues.get_mut(key) else { continue };
            queue.flush_used();
            if queue.finish_stop() {
                let _ = epoll::delete(&self.epoll, queue.kick());
                self.queues.remove(key);
            }
        }
    }

    fn reap(&mut self) {
        let (queues, answered, ready) = (&mut self.queues, &mut self.answered, &mut self.ready);
        self.lane.poll(&mut |token, result| {
            let (key, head) = split_token(token);
            if let Some(queue) = queues.get_mut(key) {
                let was_full = queue.is_full();
                queue.complete(head, result);
                if was_full && !queue.is_full() {
                    // Chains may have waited for this, and their kick is long past.
                    ready.push((key, false));
                }
                answered.push(key);
            }
        });
    }

    fn obey(&mut self) {
        let mut commands = std::mem::take(&mut self.commands);
        self.mailbox.take(&mut commands);
        for command in commands.drain(..) {
            match command {
                Command::Start(start) => self.start(*start),
                Command::Stop { key, order } => {
                    if let Some(queue) = self.queues.get_mut(key) {
                        order.obey(|stopped| queue.stop(stopped));
                        self.answered.push(key);
                    }
                }
                Command::Abandon { key } => {
                    if let Some(queue) = self.queues.get_mut(key) {
                        queue.abandon_guest_calls();
                        self.answered.push(key);
                    }
                }
                Command::SetMemory { key, mem } => {
                    if let Some(queue) = self.queues.get_mut(key)
                        && let Err(error) = queue.set_memory(mem)
                    {
                        debug!(%error, "the ring is not in the new memory table: the queue stops taking chains");
                        let (done, _) = mpsc::channel();
                        queue.stop(done);
                        self.answered.push(key);
                    }
                }
                Command::SetLog { key, log, done } => {
                    if let Some(queue) = self.queues.get_mut(key) {
                        queue.set_log(log);
                        let _ = done.send(());
                    }
                }
                Command::SetCall { key, call } => {
                    if let Some(queue) = self.queues.get_mut(key) {
                        queue.set_call(call);
                        // An interrupt may have been due while there was no descriptor for it.
                        queue.signal();
                    }
                }
                Command::Reply { ticket, response } => {
                    let (key, head) = split_token(ticket);
                    if let Some(queue) = self.queues.get_mut(key) {
                        queue.reply(head, &response);
                        self.answered.push(key);
                    }
                }
                Command::Exit => self.exit = true,
            }
        }
        self.commands = commands;
    }

    fn start(&mut self, start: QueueStart) {
        let queue = ActiveQueue::new(start);
        let key = queue.key();
        let data = epoll::EventData::new_u64(u64::from(key));
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        if let Err(error) = epoll::add(&self.epoll, queue.kick().as_fd(), data, flags) {
            error!(%error, "cannot watch a queue's kick descriptor");
            return;
        }
        // The driver may have kicked, or missed an interrupt, while nobody was here.
        queue.signal();
        self.queues.insert(queue);
        self.ready.push((key, true));
    }
}
